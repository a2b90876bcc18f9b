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
static_assert(are_in_order(kRopeRotateKernels, "tokendance_rope_rotate_", true, true));
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
  // Threads in three dimensions, so that none divides: the tasks of a head, heads, and as many rows
  // as fill a block. A row of more heads takes several blocks along y.
  const int64_t tasks = move_tasks_of_head(p.head_dim, vector_elements(p.dtype, p.out_dtype, wide));
  const int64_t most_heads = kRopeRotateThreads / tasks;
  const int64_t blocks_of_row = ceil_div(p.num_heads, most_heads);
  const int64_t heads = ceil_div(p.num_heads, blocks_of_row);
  const int64_t rows = kRopeRotateThreads / (tasks * heads);
  Tile tile = {};
  tile.in_page = make_divisor(p.x_layout.block_size);
  tile.other_page = make_divisor(p.out_layout.block_size);
  add_launch(&plan, kRopeRotateKernels[kernel], kernel, ceil_div(p.num_rows, rows), blocks_of_row,
             1, {tasks, heads, rows}, 0, tile);
  return plan;
}

}  // namespace tokendance
