// collective_attention: query rows of many agents meet one tile of keys and values as it is stored.
//
// A block takes a work item and a KV head: 64 query rows, rows of the round times heads of the
// group, of any agents. Their queries are rotated into shared memory, each by its own R(p)
// R(-shift), and again where the shift of a row changes from one source to the next. Keys and
// values come page by page through cp.async, K and V in turn over three stages, so that two stages
// are on their way while one is multiplied; a step has one barrier. The softmax is online, in units
// of log2. Each row's sight of a tile is one word of bits: the range that position, length of the
// use and window leave, without the overridden rows.
//
// Bytes, per item and KV head: 2 * D elements for every stored row that any of the query rows sees,
// once; queries and two rows of the tables per query row and shift; outputs, or partials in fp32.
// FLOPs: 4 * D per query row and key, so at 16 bits one FLOP per byte and query row of the tile: up
// to 64, against 153 (A100: 312 TFLOPS, 2039 GB/s) and 295 (H100: 989 TFLOPS, 3350 GB/s;
// datasheets). Decode is bound by memory. Prefill, whose tiles find their keys in L2, is bound by
// shared memory: ldmatrix reads 512 bytes for two mma, 4 cycles of a multiprocessor, as long as an
// A100's tensor cores take for both and twice as long as an H100's. In fp32 CUDA cores bound it
// above 19 (A100: 19.5 TFLOPS) or 40 (H100: 67 TFLOPS) query rows.
//
// Why these tiles. 64 query rows: decode with G = 4 puts 16 agents in a tile, and the sums of a
// warp, 16 x D in fp32, fit its registers up to D = 256. A stage is 64 keys of up to 128 dims, at
// most 16 KB: two under way in each of two blocks are 64 KB on a multiprocessor, where latency
// times bandwidth wants about 15 KB. Warps share no query row, so that none waits for another's
// softmax; a warp whose rows do not see a tile only helps to copy it.
//
// fp32 has tiles of 32 keys, and for D = 256 of 16, with 32 query rows in two warps. Registers,
// shared memory and blocks of a multiprocessor are in tools/sass_table.txt.
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

// With 256 dims the sums take half of the registers: none are left for addresses in stages.
template <typename Block>
__device__ __forceinline__ int32_t lane_of_products(const Place& here) {
  return Block::kHeadDim < 256 ? here.lane : recomputed<kWarpSize>(here.lane);
}

// Scores of the warp's query rows with a tile of keys become weights, of keys that they see.
template <typename Block>
__device__ __forceinline__ void weigh(const CollectiveAttentionParams& p, const KeyTile& tile,
                                      const Sight& sight, int32_t keys, const Place& here,
                                      typename Block::Products::Weights& weights,
                                      Weighted<Block::kHeadDim>& state) {
  float scores[Block::kKeys / 8][4];
  const uint32_t visible = visible_keys<Block>(p.round, tile, sight, here);
  Block::Products::score(Block::queries(here.warp), Block::stage(keys),
                         lane_of_products<Block>(here), scores);
  scale<Block>(p, here, scores);
  hide<Block>(visible, here, scores);
  soften<Block>(scores, state);
  weights = scores;
}

// The item's query rows from `first_query` on, with one KV head: AttentionShape::rows of them.
template <typename Block>
__device__ __forceinline__ void attend(const CollectiveAttentionParams& p, const WorkItem& item,
                                       int32_t first_query, const Place& here) {
  Weighted<Block::kHeadDim> state;
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
        load_whole(Block::sights(tile.set, here.warp) + here.lane % kAttentionWarpRows);
    const bool sees = warp_sees<Block>(tile, sight);
    if (sees) weigh<Block>(p, tile, sight, keys, here, weights, state);

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

template <typename T, typename Pool, int kHeadDim>
__device__ __forceinline__ void collective_attention(const CollectiveAttentionParams& p) {
  using Block = AttentionBlock<T, Pool, kHeadDim>;
  const Place here(p);
  // The item is read anew for every tile of query rows, rather than kept in registers.
#pragma unroll 1
  for (int32_t first = 0;; first += Block::kShape.rows) {
    const WorkItem item = item_of_block(p);
    if (!item.is_of(p.round.extents)) return;
    if (first >= (item.row_end - item.row_begin) * (p.num_q_heads / p.num_kv_heads)) return;
    if (first > 0) __syncthreads();  // all are done with the last tiles
    attend<Block>(p, item, first, here);
  }
}

}  // namespace tokendance::cuda
