// How merge_states is launched.
#pragma once

#include "cuda/launch_plan.h"

// One kernel per dtype and width of accesses; calls X(variant, element type, elements of a vector)
// in the order in which the plan counts them.
#define TOKENDANCE_MERGE_STATES_KERNELS(X) \
  X(f32_wide, float, 4)                    \
  X(f32_narrow, float, 1)                  \
  X(f16_wide, __half, 8)                   \
  X(f16_narrow, __half, 1)                 \
  X(bf16_wide, __nv_bfloat16, 8)           \
  X(bf16_narrow, __nv_bfloat16, 1)

namespace tokendance {

#define TOKENDANCE_MERGE_STATES_NAME(variant, T, V) "tokendance_merge_states_" #variant,
constexpr const char* kMergeStatesKernels[] = {
    TOKENDANCE_MERGE_STATES_KERNELS(TOKENDANCE_MERGE_STATES_NAME)};
constexpr int kMergeStatesThreads = 256;

inline LaunchPlan plan_merge_states(const MergeStatesParams& p) {
  LaunchPlan plan = {};
  if (p.num_rows == 0 || p.num_heads == 0) return plan;
  const bool wide = is_aligned(p.partial_out) && is_aligned(p.out);
  const int64_t vector = wide ? kVectorBytes / element_bytes(p.dtype) : 1;
  const int kernel = static_cast<int>(p.dtype) * 2 + !wide;
  Tile tile = {};
  tile.heads = static_cast<int32_t>(kMergeStatesThreads / (p.head_dim / vector));  // of all rows
  add_launch(&plan, kMergeStatesKernels[kernel], kernel,
             ceil_div(p.num_rows * p.num_heads, tile.heads), 1, 1, kMergeStatesThreads, 0, tile);
  return plan;
}

}  // namespace tokendance
