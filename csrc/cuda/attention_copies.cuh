// A tile of keys, or of values, on its way from its pages to a stage.
#pragma once

#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/attention_sight.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// From a page that the pools do not have on, nothing of the tile's chunk is seen.
__device__ __forceinline__ void leave_out_missing_pages(const CollectiveAttentionParams& p,
                                                        KeyTile& tile, const Place& here) {
  const int64_t rows = min(p.k_layout.num_rows, p.v_layout.num_rows);
  const bool exists = tile.page_id >= 0 && int64_t{tile.page_id} << here.page_shift < rows;
  const uint32_t missing = __ballot_sync(kAllLanes, !exists);
  if (missing != 0) {
    const int32_t before = __ffs(static_cast<int>(missing)) - 1;
    const int32_t page = (tile.first >> here.page_shift) + before;
    tile.last = min(tile.last, (page << here.page_shift) - 1);
    if (here.lane >= before) tile.page_id = 0;
  }
}

// Adjacent rows that a thread copies its piece of.
__device__ constexpr int column_rows(int keys, int pieces, int threads) {
  int rows = pieces % 8 == 0 ? 8 : 1;
  while (rows > 1 && keys / rows * pieces % threads != 0) rows /= 2;
  return rows;
}

// Starts to copy a tile's keys, or values. Rows after the last that a query row sees are not read,
// and become zeros: they may hold NaN, which a weight of 0 does not make disappear. Rows before it
// that are hidden by masks or the window are read: of 16 or 32 bits they have to be finite.
template <typename Block>
__device__ __forceinline__ void copy_tile(const void* pool, const RowLayout& layout,
                                          const KeyTile& tile, int32_t to, const Place& here) {
  using Pool = typename Block::Pool;
  using Rows = SwizzledRows<Pool, Block::kHeadDim>;
  constexpr int kThreads = Block::kShape.threads;
  const uint32_t thread = recomputed<kThreads>(here.warp * kWarpSize + here.lane);
  const Pool* const source =
      static_cast<const Pool*>(pool) + recomputed<1u << 31>(here.kv_head) * layout.head_stride;
  const int32_t size = 1 << here.page_shift;
  const int32_t row_of_page = tile.first & (size - 1);
  const auto row_pointer = [&](int32_t tile_row) {
    const int32_t key = row_of_page + tile_row;
    const int32_t page = __shfl_sync(kAllLanes, tile.page_id, key >> here.page_shift);
    return source + page * layout.page_stride + (key & (size - 1)) * layout.row_stride;
  };
  const int32_t count = tile.last - tile.first + 1;
  Pool* const stage = Block::stage(to);
  // A thread has the same piece of some adjacent rows, which are of one page. More than one only
  // where lanes that copy in one phase are within a row: rows further apart would meet in the
  // same banks.
  constexpr int kPieces = Rows::kPieces;
  constexpr int kRows = column_rows(Block::kKeys, kPieces, kThreads);
  constexpr int kColumns = Block::kKeys / kRows * kPieces;
#pragma unroll
  for (int i = 0; i < (kColumns + kThreads - 1) / kThreads; ++i) {
    const int32_t column = i * kThreads + thread;
    static_assert(kColumns % kWarpSize == 0, "whole warps have columns");
    if (kColumns % kThreads != 0 && column >= kColumns) break;
    const int32_t tile_row = column / kPieces * kRows;
    const int32_t piece = column % kPieces;
    const Pool* from = row_pointer(tile_row) + piece * Rows::kPiece;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      cp_async_16_or_zero(stage + Rows::piece(tile_row + j, piece), from, tile_row + j < count);
      from += layout.row_stride;
    }
  }
}

}  // namespace tokendance::cuda
