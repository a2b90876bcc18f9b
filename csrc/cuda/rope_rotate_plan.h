// How rope_rotate is launched.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/moving_kernels.h"

namespace tokendance {

constexpr const char* kRopeRotateKernels[] = {
    TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL_NAME, rope_rotate)
        TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_KERNEL_NAME, rope_rotate)
            TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_KERNEL_NAME, rope_rotate)
                TOKENDANCE_QUANTIZING_KERNELS(TOKENDANCE_KERNEL_NAME, rope_rotate)};
constexpr int kRopeRotateThreads = 256;

inline LaunchPlan plan_rope_rotate(const RopeRotateParams& p) {
  LaunchPlan plan = {};
  if (p.num_rows == 0 || p.destinations == 0 || p.num_heads == 0) return plan;
  const int64_t widest = vector_elements(p.dtype, p.out_dtype, true);
  const bool wide = is_aligned(p.x, widest * element_bytes(p.dtype)) &&
                    is_aligned(p.out, widest * element_bytes(p.out_dtype)) &&
                    is_aligned(p.x_layout, widest) && is_aligned(p.out_layout, widest) &&
                    is_aligned(p.rope, widest);
  const int kernel = moving_kernel(p.dtype, p.out_dtype, p.rope.interleaved, wide);
  // As many rows as fill a block; a row of more tasks takes several blocks along y.
  const int64_t tasks =
      p.num_heads * move_tasks_of_head(p.head_dim, vector_elements(p.dtype, p.out_dtype, wide));
  Tile tile = {};
  tile.rows = static_cast<int32_t>(tasks < kRopeRotateThreads ? kRopeRotateThreads / tasks : 1);
  const int64_t threads =
      tasks < kRopeRotateThreads ? round_up(tasks * tile.rows, kWarpSize) : kRopeRotateThreads;
  add_launch(&plan, kRopeRotateKernels[kernel], kernel, ceil_div(p.num_rows, tile.rows),
             ceil_div(tasks, kRopeRotateThreads), 1, threads, 0, tile);
  return plan;
}

}  // namespace tokendance
