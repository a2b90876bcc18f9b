// A tile of keys, or of values, on its way from its pages to a stage.
#pragma once

#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/attention_sight.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// Page ids of a tile: lane i has that of its i-th page. From a page that the pools do not have on,
// nothing of the chunk is seen.
__device__ __forceinline__ int32_t page_ids(const CollectiveAttentionParams& p, KeyTile& tile,
                                            const Place& here) {
  const int32_t page = (tile.first >> here.page_shift) + here.lane;
  int32_t id = page <= tile.last >> here.page_shift ? __ldg(tile.pages + page) : 0;
  const int64_t rows = min(p.k_layout.num_rows, p.v_layout.num_rows);
  const bool exists = id >= 0 && int64_t{id} << here.page_shift < rows;
  const uint32_t missing = __ballot_sync(kAllLanes, !exists);
  if (missing != 0) {
    const int32_t before = __ffs(static_cast<int>(missing)) - 1;
    tile.last = (page - here.lane + before << here.page_shift) - 1;
    if (here.lane >= before) id = 0;
  }
  return id;
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
                                          const KeyTile& tile, int32_t page_id, int32_t to,
                                          const Place& here) {
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
    const int32_t page = __shfl_sync(kAllLanes, page_id, key >> here.page_shift);
    return source + page * layout.page_stride + (key & (size - 1)) * layout.row_stride;
  };
  const int32_t count = tile.last - tile.first + 1;
  Pool* const stage = Block::stage(to);
  if constexpr (Block::kWide) {
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
  } else {
#pragma unroll 4
    for (int i = 0; i < Block::kKeys * Block::kHeadDim / kThreads; ++i) {
      const int32_t index = i * kThreads + thread;
      const int32_t tile_row = index / Block::kHeadDim, dim = index % Block::kHeadDim;
      const Pool* const from = row_pointer(tile_row) + dim;
      Vector<Pool, 1> element = {};
      if (tile_row < count) element = load_vector<Pool, 1>(from);
      store_vector<Pool, 1>(stage + Rows::element(tile_row, dim), element);
    }
  }
}

}  // namespace tokendance::cuda
