// collective_attention: query rows of many agents meet one tile of keys and values as it is stored.
//
// A block takes a work item and a KV head: its query rows, rows of the round times heads of the
// group, of any agents. Their queries are rotated into shared memory, each by its own R(p)
// R(-shift), and again where the shift of a row changes from one source to the next. Keys and
// values come page by page through cp.async, K and V in turn over three stages, so that two stages
// are on their way while one is multiplied; a step has one barrier. The softmax is online, in units
// of log2. Each row's sight of a tile is one word of bits: the range that position, length of the
// use and window leave, without the overridden rows.
//
// Bytes, per item and KV head: 2 * D elements for every stored row that any of the query rows sees,
// once for each tile of query rows; queries and two rows of the tables per query row and shift;
// outputs, or partials in fp32. FLOPs: 4 * D per query row and key, so at 16 bits one FLOP per byte
// and query row of the tile: up to 64 or 128, against 153 (A100: 312 TFLOPS, 2039 GB/s) and 206
// (H200: 989 TFLOPS, 4800 GB/s; datasheets). Decode is bound by memory.
//
// Shared memory binds before the tensor cores. ldmatrix reads 512 bytes in 4 cycles of a
// multiprocessor; an mma takes an A100 2 cycles, an H100 or H200 1. A low tile, of 64 query rows,
// has 16 to a warp: 9 ldmatrix for 16 mma, 2.25 cycles an mma. In a tall one, of 128, a warp has
// 32, and each fragment of keys and values that it reads meets them in two mma: half as many
// ldmatrix of keys and values, and 6 for 16 mma with those of queries, 1.5 cycles. So an H200 gets
// keys and values from memory as slowly as it reads them from shared memory for 91 query rows of
// low tiles, or 137 of tall ones; prefill, whose tiles find their keys in L2, is bound by the
// tensor cores of an A100, and by the shared memory of an H200, at two thirds of its datasheet.
//
// Which tiles an item meets is up to the planner: those of more than 64 query rows meet tall ones,
// where kernels have them. Items of both kinds are in one launch. A tall tile has 32 keys instead
// of 64. So a warp has as many scores, and queries of twice the size with stages of half the size
// take no more shared memory: as many blocks run as without tall tiles.
//
// Why these tiles. 64 query rows: decode with G = 4 puts 16 agents in a tile, and the sums of a
// warp, 16 x D in fp32, fit its registers up to D = 256. 128: the sums of 32 x D fit up to D = 128.
// A stage is 64 keys of up to 128 dims, at most 16 KB: two under way in each of two blocks are
// 64 KB on a multiprocessor, or 32 KB in tall tiles, where latency times bandwidth wants 15 KB of
// an A100 and 25 KB of an H200. Warps share no query row, so that none waits for another's softmax;
// a warp whose rows do not see a tile only helps to copy it.
//
// fp32 has tiles of 32 keys, and for D = 256 of 16, with 32 query rows in two warps: a fragment is
// read by every lane for itself, and nothing is gained by more rows. Registers, shared memory and
// blocks of a multiprocessor are in tools/sass_table.txt.
//
// Keys and values of e4m3 are 1 byte an element, in stages of half the size, so that decode may do
// 2 FLOPs per byte and query row. Every warp widens the tile for itself: before sm_89 by seven
// integer instructions for four elements. With four warps at work an A100, of 64 integer lanes a
// clock and multiprocessor, widens 64 / 7 bytes a clock, at 1.41 GHz 1.4 TB/s of 2.0: tiles of more
// than 32 query rows are bound by that, others by memory. From sm_89 on it is three instructions,
// and five for values, where NaN becomes a number. Queries and weights are fp16.
#pragma once

#include "cuda/attention_block.cuh"
#include "cuda/attention_copies.cuh"
#include "cuda/attention_queries.cuh"
#include "cuda/attention_results.cuh"
#include "cuda/attention_sight.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/ptx.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// Addresses in stages are made of it: anew for every tile where there are few registers.
template <typename Block>
__device__ __forceinline__ int32_t lane_of_products(const Place& here) {
  return Block::kHasFewRegisters ? recomputed<kWarpSize>(here.lane) : here.lane;
}

// Scores of the warp's query rows with a tile of keys become weights, of keys that they see.
template <typename Block>
__device__ __forceinline__ void weigh(const CollectiveAttentionParams& p, const KeyTile& tile,
                                      const Sight& sight, int32_t keys, float factor,
                                      const Place& here, typename Block::Products::Weights& weights,
                                      Weighted<Block>& state) {
  typename Block::Scores scores;
  const uint32_t visible = visible_keys<Block>(p.round, tile, sight, here);
  Block::Products::score(Block::queries(here.warp), Block::stage(keys),
                         lane_of_products<Block>(here), scores);
  scale<Block>(factor, p.soft_cap, scores);
  hide<Block>(visible, here, scores);
  soften<Block>(scores, state);
  weights = scores;
}

// The item's query rows from `first_query` on, with one KV head: AttentionShape::rows of them.
template <typename Block>
__device__ __forceinline__ void attend(const CollectiveAttentionParams& p, const WorkItem& item,
                                       int32_t first_query, const Place& here) {
  Weighted<Block> state;
  KeyTile next = begin_tiles<Block>(p, item, first_query, here);
  bool more = next.chunk < item.chunk_end;
  // Stages of a tile's keys, of its values, and of what comes next.
  int32_t keys = 0, values = 1, following = 2;
  if (more) {
    leave_out_missing_pages(p, next, here);
    copy_tile<Block>(p.k_pool, p.k_layout, next, keys, here);
    cp_async_commit();
    copy_tile<Block>(p.v_pool, p.v_layout, next, values, here);
    cp_async_commit();
  }
  const float factor = score_factor<Block>(p, here);
  int32_t turned_to = -1;  // the sights of the last tile
#pragma unroll 1
  while (more) {
    const KeyTile tile = next;
    if (tile.set != turned_to) turn_queries<Block>(p, tile.set, here);
    turned_to = tile.set;
    cp_async_wait<1>();
    __syncthreads();  // all have their keys, and are done with the values of the tile before

    next = tile_after<Block>(p, tile, here);
    more = next.chunk < item.chunk_end;
    if (more) {
      leave_out_missing_pages(p, next, here);
      copy_tile<Block>(p.k_pool, p.k_layout, next, following, here);
    }
    cp_async_commit();

    typename Block::Products::Weights weights;
    const Sight sight =
        load_whole(Block::sights(tile.set, here.warp) + here.lane % Block::kWarpRows);
    const bool sees = warp_sees<Block>(tile, sight);
    if (sees) weigh<Block>(p, tile, sight, keys, factor, here, weights, state);

    cp_async_wait<1>();
    __syncthreads();  // all have their values, and are done with the keys
    if (more) copy_tile<Block>(p.v_pool, p.v_layout, next, keys, here);
    cp_async_commit();
    if (sees) {
      Block::Products::add_values(weights, Block::stage(values), lane_of_products<Block>(here),
                                  state.sums);
    }
    const int32_t free = keys;
    keys = following;
    following = values;
    values = free;
  }
  write_results<Block>(p, here, state);
}

// All query rows of the block's item, a tile after the other. The item is read anew for each but
// the first, rather than kept in registers.
template <typename Block>
__device__ __forceinline__ void attend_in_turn(const CollectiveAttentionParams& p, WorkItem item) {
  const Place here(p);
#pragma unroll 1
  for (int32_t first = 0; first < queries_of(item, p); first += Block::kShape.rows) {
    if (first > 0) __syncthreads();  // all are done with the last tiles
    attend<Block>(p, item, first, here);
    item = item_of_block(p);
  }
}

// An item of more query rows than a low tile has meets tall ones, where the kernel has them. For
// those it is read anew, too, for they have no registers to spare; decode does not wait for it
// twice.
template <typename T, typename Pool, int kHeadDim>
__device__ __forceinline__ void collective_attention(const CollectiveAttentionParams& p) {
  using Low = AttentionBlock<T, Pool, kHeadDim, kMmaRows>;
  using Tall = AttentionBlock<T, Pool, kHeadDim, 2 * kMmaRows>;
  const WorkItem item = item_of_block(p);
  if (!item.is_of(p.round.extents)) return;
  if constexpr (has_tall_tiles(sizeof(T), sizeof(Pool), kHeadDim)) {
    if (queries_of(item, p) > Low::kShape.rows) {
      attend_in_turn<Tall>(p, item_of_block(p));
      return;
    }
  }
  attend_in_turn<Low>(p, item);
}

}  // namespace tokendance::cuda
