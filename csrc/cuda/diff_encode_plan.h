// How diff_encode is launched: a comparison that makes the masks, then a compaction that reads
// them.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/moving_kernels.h"

// Kernels of the compaction, which only copies: X(variant, element type of the size, elements of a
// vector), in the order of compact_kernel().
#define TOKENDANCE_COMPACT_KERNELS(X) \
  X(b32_wide, float, 4)               \
  X(b32_narrow, float, 1)             \
  X(b16_wide, __half, 8)              \
  X(b16_narrow, __half, 1)            \
  X(b8_wide, Float8, 16)              \
  X(b8_narrow, Float8, 1)

namespace tokendance {

#define TOKENDANCE_COMPACT_NAME(variant, T, V) "tokendance_diff_encode_compact_" #variant,
constexpr const char* kDiffEncodeKernels[] = {
    TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL_NAME, diff_encode_compare)
        TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_KERNEL_NAME, diff_encode_compare)
            TOKENDANCE_COMPACT_KERNELS(TOKENDANCE_COMPACT_NAME)};
constexpr int kEncodeThreads = 256;
constexpr int64_t kEncodeAgents = 16;  // that share one read of a Master page, at most
constexpr int64_t kEncodeLayers = 8;   // that a block of the compaction copies, at most

constexpr int kNumCompareKernels = kNumMovingKernels + 4;

constexpr int compact_kernel(DType dtype, bool wide) {
  const int64_t bytes = element_bytes(dtype);
  return kNumCompareKernels + (bytes == 4 ? 0 : bytes == 2 ? 2 : 4) + !wide;
}

static_assert(are_in_order(kDiffEncodeKernels, "tokendance_diff_encode_compare_", false, false));
static_assert(
    is_named(kDiffEncodeKernels[moving_kernel(DType::kFloat8, DType::kFloat8, true, false)],
             "tokendance_diff_encode_compare_", "e4m3_interleaved_narrow"));
static_assert(is_named(kDiffEncodeKernels[compact_kernel(DType::kFloat32, true)],
                       "tokendance_diff_encode_compact_", "b32_wide"));
static_assert(is_named(kDiffEncodeKernels[compact_kernel(DType::kFloat8, false)],
                       "tokendance_diff_encode_compact_", "b8_narrow"));

// Whether the rows can be accessed by vectors of so many elements.
inline bool rows_are_aligned(const DiffEncodeParams& p, int64_t elements) {
  const int64_t bytes = elements * element_bytes(p.dtype);
  return are_aligned(p.in, p.num_layers, bytes) && are_aligned(p.pool, p.num_layers, bytes) &&
         is_aligned(p.in_k_layout, elements) && is_aligned(p.in_v_layout, elements) &&
         is_aligned(p.pool_k_layout, elements) && is_aligned(p.pool_v_layout, elements);
}

inline LaunchPlan plan_diff_encode(const DiffEncodeParams& p) {
  LaunchPlan plan = {};
  const RoundExtents& e = p.round.extents;
  if (p.num_layers == 0 || p.num_heads == 0 || e.agents == 0) return plan;
  if (e.master_pages > 0) {
    const int64_t widest = vector_elements(p.dtype, p.dtype, true);
    const bool wide = rows_are_aligned(p, widest) && is_aligned(p.rope, widest);
    // Small rounds get smaller tiles: their Master pages are read again, out of L2, by more blocks.
    int64_t agent_tiles = ceil_div(e.agents, kEncodeAgents);
    const int64_t wanted = ceil_div(kWantedBlocks, e.master_pages);
    if (agent_tiles < wanted) agent_tiles = wanted < e.agents ? wanted : e.agents;
    Tile tile = {};
    tile.agents = static_cast<int32_t>(ceil_div(e.agents, agent_tiles));
    tile.head =
        make_divisor(move_tasks_of_head(p.head_dim, vector_elements(p.dtype, p.dtype, wide)));
    agent_tiles = ceil_div(e.agents, tile.agents);
    const int64_t shared =
        tile.agents * (2 * e.block_size * int64_t{sizeof(int64_t)} + 2 * int64_t{sizeof(int32_t)} +
                       shared_angles_size(p.rope.rotary_dim) * int64_t{sizeof(float)}) +
        2 * e.block_size * int64_t{sizeof(uint32_t)};
    const int kernel = moving_kernel(p.dtype, p.dtype, p.rope.interleaved, wide);
    add_launch(&plan, kDiffEncodeKernels[kernel], kernel, e.master_pages * agent_tiles, 1, 1,
               kEncodeThreads, shared, tile);
  }

  // One block at least, for agents without tokens have a number of own rows, too.
  const int64_t chunks = p.max_length > 0 ? ceil_div(p.max_length, kEncodeThreads) : 1;
  int64_t layers = p.num_layers * chunks * e.agents / kWantedBlocks;
  if (layers > kEncodeLayers) layers = kEncodeLayers;
  if (layers > p.num_layers) layers = p.num_layers;
  if (layers < 1) layers = 1;
  Tile tile = {};
  tile.layers = static_cast<int32_t>(layers);
  const bool wide = rows_are_aligned(p, kVectorBytes / element_bytes(p.dtype));
  const int kernel = compact_kernel(p.dtype, wide);
  add_launch(&plan, kDiffEncodeKernels[kernel], kernel, chunks, e.agents,
             ceil_div(p.num_layers, layers), kEncodeThreads, 0, tile);
  return plan;
}

}  // namespace tokendance
