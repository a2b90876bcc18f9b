// How key_deviation is launched.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/moving_kernels.h"

namespace tokendance {

constexpr const char* kKeyDeviationKernels[] = {
    TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL_NAME, key_deviation)};
static_assert(are_in_order(kKeyDeviationKernels, "tokendance_key_deviation_", false, false));
constexpr int kDeviationThreads = 256;  // a warp has one token

inline LaunchPlan plan_key_deviation(const KeyDeviationParams& p) {
  LaunchPlan plan = {};
  if (p.num_tokens == 0) return plan;
  const bool wide = is_aligned(p.fresh) && is_aligned(p.cached) &&
                    is_aligned(p.fresh_layout, p.dtype) && is_aligned(p.cached_layout, p.dtype) &&
                    is_aligned(p.rope, p.dtype);
  const int kernel = moving_kernel(p.dtype, p.dtype, p.rope.interleaved, wide);
  Tile tile = {};
  tile.in_page = make_divisor(p.fresh_layout.block_size);
  tile.other_page = make_divisor(p.cached_layout.block_size);
  tile.head = make_divisor(move_tasks_of_head(p.head_dim, vector_elements(p.dtype, p.dtype, wide)));
  add_launch(&plan, kKeyDeviationKernels[kernel], kernel,
             ceil_div(p.num_tokens, kDeviationThreads / kWarpSize), 1, 1, kDeviationThreads, 0,
             tile);
  return plan;
}

}  // namespace tokendance
