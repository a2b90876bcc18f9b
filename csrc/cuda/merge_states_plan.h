// How merge_states is launched.
#pragma once

#include "cuda/merge_plan.h"

// One kernel per dtype; calls X(variant, element type) in the order of DType.
#define TOKENDANCE_MERGE_STATES_KERNELS(X) \
  X(f32, float)                            \
  X(f16, __half)                           \
  X(bf16, __nv_bfloat16)

namespace tokendance {

#define TOKENDANCE_MERGE_STATES_NAME(variant, T) "tokendance_merge_states_" #variant,
constexpr const char* kMergeStatesKernels[] = {
    TOKENDANCE_MERGE_STATES_KERNELS(TOKENDANCE_MERGE_STATES_NAME)};

constexpr bool is_merge_states_kernel(DType dtype, const char* variant) {
  return is_named(kMergeStatesKernels[static_cast<int>(dtype)], "tokendance_merge_states_",
                  variant);
}
static_assert(is_merge_states_kernel(DType::kFloat32, "f32"));
static_assert(is_merge_states_kernel(DType::kFloat16, "f16"));
static_assert(is_merge_states_kernel(DType::kBFloat16, "bf16"));

// Whether there is such a kernel: partials are read 16 bytes at a time.
inline bool can_merge_states(const MergeStatesParams& p) {
  return !is_quantized(p.dtype) && is_aligned(p.partial_out);
}

inline LaunchPlan plan_merge_states(const MergeStatesParams& p) {
  LaunchPlan plan = {};
  const int64_t heads = p.num_rows * p.num_heads;
  if (heads == 0 || !can_merge_states(p)) return plan;
  const MergeShape shape = merge_shape(heads, p.num_partials, p.head_dim, element_bytes(p.dtype));
  const int kernel = static_cast<int>(p.dtype);
  add_launch(&plan, kMergeStatesKernels[kernel], kernel, ceil_div(heads, shape.heads), 1, 1,
             shape.threads(), 0, {});
  return plan;
}

}  // namespace tokendance
