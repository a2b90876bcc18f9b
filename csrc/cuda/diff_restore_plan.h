// How diff_restore is launched.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/moving_kernels.h"

namespace tokendance {

constexpr const char* kDiffRestoreKernels[] = {
    TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL_NAME, diff_restore)
        TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_KERNEL_NAME, diff_restore)
            TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_KERNEL_NAME, diff_restore)};
static_assert(are_in_order(kDiffRestoreKernels, "tokendance_diff_restore_", true, false));
constexpr int kRestoreThreads = 256;
constexpr int kRestoreStages = 2;
constexpr int64_t kRestoreStageBytes = 16 * 1024;  // wanted; one head may need more
constexpr int64_t kRestoreAgents = 16;             // that share one read of a Master page
constexpr int64_t kRestoreLayers = 8;              // at most, so that the last blocks end together

// How the threads of a block divide a page, or the heads of it that the block handles: a thread
// has one task of a row, of every `rows_of_pass`-th row.
struct RestoreShape {
  int32_t tasks_of_row;
  int32_t rows_of_pass;
  int32_t passes;

  TOKENDANCE_HOST_DEVICE RestoreShape(int32_t heads, int32_t tasks_of_head, int32_t block_size) {
    tasks_of_row = heads * tasks_of_head;
    rows_of_pass = kRestoreThreads / tasks_of_row;
    if (rows_of_pass > block_size) rows_of_pass = block_size;
    passes = (block_size + rows_of_pass - 1) / rows_of_pass;
  }
  TOKENDANCE_HOST_DEVICE int32_t threads() const {
    return (tasks_of_row * rows_of_pass + kWarpSize - 1) / kWarpSize * kWarpSize;
  }
  // Of a page on its way: every thread keeps what it loads itself.
  TOKENDANCE_HOST_DEVICE int32_t stage_bytes(int32_t vector_bytes) const {
    return threads() * passes * 2 * vector_bytes;
  }
};

inline LaunchPlan plan_diff_restore(const DiffRestoreParams& p) {
  LaunchPlan plan = {};
  const RoundExtents& e = p.round.extents;
  if (p.num_layers == 0 || p.num_heads == 0 || e.agents == 0 || e.master_pages + e.own_pages == 0) {
    return plan;
  }
  const int64_t widest = vector_elements(p.dtype, p.out_dtype, true);
  const bool wide = is_aligned(p.rope, widest) &&
                    are_aligned(p.pool, p.num_layers, widest * element_bytes(p.dtype)) &&
                    are_aligned(p.out, p.num_layers, widest * element_bytes(p.out_dtype)) &&
                    is_aligned(p.pool_k_layout, widest) && is_aligned(p.pool_v_layout, widest) &&
                    is_aligned(p.out_k_layout, widest) && is_aligned(p.out_v_layout, widest);
  const int32_t vector = vector_elements(p.dtype, p.out_dtype, wide);
  const int32_t vector_bytes = vector * static_cast<int32_t>(element_bytes(p.dtype));
  const int32_t tasks_of_head = move_tasks_of_head(p.head_dim, vector);
  const int32_t block_size = static_cast<int32_t>(e.block_size);

  // As many heads as fit a stage: their rows are contiguous, and what a block looks up serves more.
  int32_t heads = 1;
  while (heads < p.num_heads && (heads + 1) * tasks_of_head <= kRestoreThreads &&
         RestoreShape(heads + 1, tasks_of_head, block_size).stage_bytes(vector_bytes) <=
             kRestoreStageBytes) {
    ++heads;
  }
  const int64_t head_groups = ceil_div(p.num_heads, heads);
  heads = static_cast<int32_t>(ceil_div(p.num_heads, head_groups));
  const RestoreShape shape(heads, tasks_of_head, block_size);

  const int64_t agent_tiles = ceil_div(e.agents, kRestoreAgents);
  const int64_t agents = ceil_div(e.agents, agent_tiles);
  const int64_t sources = e.master_pages * agent_tiles + e.own_pages;
  int64_t layers = p.num_layers * sources * head_groups / kWantedBlocks;
  if (layers > kRestoreLayers) layers = kRestoreLayers;
  if (layers > p.num_layers) layers = p.num_layers;
  if (layers < 1) layers = 1;

  const int64_t shared =
      kRestoreStages * shape.stage_bytes(vector_bytes) +
      agents * (2 * block_size * int64_t{sizeof(int64_t)} + 3 * int64_t{sizeof(int32_t)} +
                shared_angles_size(p.rope.rotary_dim) * int64_t{sizeof(float)});
  const int kernel = moving_kernel(p.dtype, p.out_dtype, p.rope.interleaved, wide);
  Tile tile = {};
  tile.heads = heads;
  tile.agents = static_cast<int32_t>(agents);
  tile.layers = static_cast<int32_t>(layers);
  add_launch(&plan, kDiffRestoreKernels[kernel], kernel, sources, head_groups,
             ceil_div(p.num_layers, layers), shape.threads(), shared, tile);
  return plan;
}

}  // namespace tokendance
