// Which query rows a block has, and what they see: of a chunk a range of rows, of a tile bits.
//
// Indices that the round does not have are left out here: a host that checks contents refuses them,
// a kernel must not read beyond its arrays for them. The checks cost some instructions per item and
// chunk, none per key.
#pragma once

#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/round_lookup.cuh"
#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance::cuda {

// An item of the work list.
struct WorkItem {
  int32_t row_begin, row_end;      // in work_rows
  int32_t chunk_begin, chunk_end;  // in work_chunks
  int32_t partial_begin;           // negative: rows of the output

  // One that is not of the round does nothing.
  __device__ __forceinline__ WorkItem(const RoundView& round, int32_t index) {
    const int32_t* const work = round.work + int64_t{index} * kWorkFields;
    const int4 fields = __ldg(reinterpret_cast<const int4*>(work));
    partial_begin = __ldg(work + 4);
    row_begin = fields.x;
    row_end = fields.y;
    chunk_begin = fields.z;
    chunk_end = fields.w;
    const RoundExtents& e = round.extents;
    const bool is_legal =
        row_begin >= 0 && row_end <= e.work_rows && chunk_begin >= 0 &&
        chunk_end <= e.work_chunks &&
        (partial_begin < 0 || partial_begin + int64_t{row_end} - row_begin <= e.partials);
    if (!is_legal) row_end = row_begin;
  }
};

// KV heads of an item are neighbours. Never kept for later: it can be read again.
__device__ __forceinline__ WorkItem item_of_block(const CollectiveAttentionParams& p) {
  const uint32_t block = recomputed<1u << 31>(blockIdx.x);
  return {p.round, static_cast<int32_t>(block / static_cast<uint32_t>(p.num_kv_heads))};
}

// A tile of keys, and the rest of its chunk.
struct KeyTile {
  int32_t chunk;        // index in work_chunks
  int32_t first, last;  // rows of the source, from the tile's first to the last that any row sees
  int32_t set;          // of sights
  const int32_t* pages;
};

// Puts the warp's query rows into shared memory, from the item's `first_query`-th on.
template <typename Block>
__device__ __forceinline__ void find_rows(const CollectiveAttentionParams& p, const WorkItem& item,
                                          int32_t first_query, const Place& here) {
  const RoundView& round = p.round;
  if (here.lane < kAttentionWarpRows) {
    const int32_t group = p.num_q_heads / p.num_kv_heads;
    const int32_t query = first_query + here.warp * kAttentionWarpRows + here.lane;
    const int32_t slot = query / group;
    QueryRow of_lane = {0, here.kv_head * group + query % group, kNoRow, 0};
    const int32_t row =
        slot < item.row_end - item.row_begin ? __ldg(round.work_rows + item.row_begin + slot) : -1;
    if (row >= 0 && row < round.extents.rows) {
      const int32_t agent = __ldg(round.row_agent + row);
      const int32_t position = __ldg(round.row_position + row);
      const bool has_angle =
          p.rope.rotary_dim == 0 || static_cast<uint32_t>(position) < p.rope.max_position;
      of_lane.row = row;
      of_lane.agent = agent < 0                                   ? kNoRow
                      : has_angle && agent < round.extents.agents ? agent
                                                                  : kBlind;
      of_lane.position = has_angle ? position : 0;
    }
    Block::query_rows(here.warp)[here.lane] = of_lane;
    const int64_t offset = (of_lane.row * p.q_row_stride + of_lane.head * p.q_head_stride) *
                           static_cast<int64_t>(sizeof(typename Block::T));
    Block::turns(here.warp)[here.lane] = {
        {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
        of_lane.position,
        kNoShift};
  }
  __syncwarp();  // all lanes see them
}

// How many of the ascending positions are at most `position`.
__device__ __forceinline__ int32_t rows_up_to(const int32_t* positions, int32_t count,
                                              int64_t position) {
  // In decode all of them are.
  if (count == 0 || __ldg(positions + count - 1) <= position) return count;
  int32_t low = 0, high = count - 1;  // rows before `low` are, row `high` is not
  do {
    const int32_t middle = (low + high) / 2;
    if (__ldg(positions + middle) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  } while (low < high);
  return low;
}

// What a query row sees of a Master's rows low .. high, through its agent's use.
__device__ __forceinline__ Sight sight_of_master(const CollectiveAttentionParams& p,
                                                 const QueryRow& query, int32_t master, int64_t low,
                                                 int64_t high) {
  const RoundView& round = p.round;
  const Sight nothing = {0, -1, -1, kNoShift};
  const int32_t use = use_of_master(round, query.agent, master);
  if (use < 0 || use >= round.extents.uses) return nothing;
  // All at once, so that their latencies overlap.
  const int32_t delta = __ldg(round.use_delta + use), length = __ldg(round.use_length + use);
  const int32_t shift = __ldg(round.use_shift + use), masks = __ldg(round.use_page_indptr + use);
  const int64_t reach = int64_t{query.position} - delta;
  high = min(min(high, reach), int64_t{length} - 1);
  if (p.window > 0) low = max(low, reach - p.window + 1);
  if (!has_angles(p.rope, shift) || low > high) return nothing;
  return {static_cast<int32_t>(low), static_cast<int32_t>(high), masks,
          p.rope.rotary_dim == 0 ? 0 : shift};
}

// The same of an agent's own rows. Those of other agents turn its query as well: they may be next,
// and all of them want it turned by R(p).
__device__ __forceinline__ Sight sight_of_own_rows(const CollectiveAttentionParams& p,
                                                   const QueryRow& query, int32_t agent,
                                                   int64_t low, int64_t high, const Place& here) {
  const RoundView& round = p.round;
  Sight sight = {0, -1, -1, 0};
  if (query.agent != agent) return sight;
  const int32_t page = __ldg(round.own_page_indptr + agent);
  const int32_t* const positions = round.own_position + (int64_t{page} << here.page_shift);
  const int32_t count = __ldg(round.own_length + agent);
  if (page < 0 || (int64_t{page} << here.page_shift) + count > round.extents.own_pages
                                                                   << here.page_shift) {
    return sight;
  }
  high = min(high, int64_t{rows_up_to(positions, count, query.position)} - 1);
  if (p.window > 0) {
    low = max(low, int64_t{rows_up_to(positions, count, int64_t{query.position} - p.window)});
  }
  if (low > high) return sight;
  sight.low = static_cast<int32_t>(low);
  sight.high = static_cast<int32_t>(high);
  return sight;
}

// A chunk of the work list, and the pages of its source.
struct Chunk {
  int32_t source;
  int32_t page_begin, page_end;  // none, if the round does not have them
  const int32_t* pages;

  __device__ __forceinline__ Chunk(const RoundView& round, int32_t index) {
    const int4 fields = __ldg(reinterpret_cast<const int4*>(round.work_chunks) + index);
    source = fields.x;
    page_begin = page_end = 0;
    pages = nullptr;
    const bool is_master = source >= 0;
    const int32_t list = is_master ? source : -1 - source;
    if (list >= (is_master ? round.extents.masters : round.extents.agents)) return;
    const int32_t* const indptr = is_master ? round.master_page_indptr : round.own_page_indptr;
    const int64_t capacity = is_master ? round.extents.master_pages : round.extents.own_pages;
    const int32_t begin = __ldg(indptr + list), end = __ldg(indptr + list + 1);
    if (begin < 0 || end > capacity || fields.y < 0 || fields.z > end - begin) return;
    page_begin = fields.y;
    page_end = fields.z;
    pages = (is_master ? round.master_pages : round.own_pages) + begin;
  }
};

__device__ __forceinline__ Sight sight_of(const CollectiveAttentionParams& p, const QueryRow& query,
                                          const Chunk& chunk, const Place& here) {
  if (query.agent < 0 || chunk.page_begin >= chunk.page_end) return {0, -1, -1, kNoShift};
  const int64_t low = int64_t{chunk.page_begin} << here.page_shift;
  const int64_t high = (int64_t{chunk.page_end} << here.page_shift) - 1;
  return chunk.source >= 0 ? sight_of_master(p, query, chunk.source, low, high)
                           : sight_of_own_rows(p, query, -1 - chunk.source, low, high, here);
}

// The first tile of the first chunk, from chunk `index` on, that any query row of the block sees;
// its `chunk` is chunk_end if there is none. Barriers: called by all threads.
template <typename Block>
__device__ __forceinline__ KeyTile find_tile(const CollectiveAttentionParams& p, int32_t index,
                                             int32_t chunk_end, int32_t set, const Place& here) {
  for (; index < chunk_end; ++index) {
    const Chunk chunk(p.round, index);
    const int32_t query = here.lane % kAttentionWarpRows;
    const Sight sight = sight_of(p, load_whole(Block::query_rows(here.warp) + query), chunk, here);
    if (here.lane < kAttentionWarpRows) Block::sights(set, here.warp)[query] = sight;
    const bool sees = sight.low <= sight.high;
    const int32_t low = __reduce_min_sync(kAllLanes, sees ? sight.low : INT32_MAX);
    const int32_t high = __reduce_max_sync(kAllLanes, sight.high);
    // Two sets in turn: this one was last read before the barrier of the turn before.
    int2* const range = Block::ranges(index & 1);
    if (here.lane == 0) range[here.warp] = make_int2(low, high);
    __syncthreads();
    int32_t first = INT32_MAX, last = -1;
#pragma unroll
    for (int i = 0; i < Block::kShape.warps; ++i) {
      const int2 of_warp = range[i];
      first = min(first, of_warp.x);
      last = max(last, of_warp.y);
    }
    if (first > last) continue;
    const int32_t alignment = min(1 << here.page_shift, Block::kKeys);
    return {index, first / alignment * alignment, last, set, chunk.pages};
  }
  return {chunk_end, 0, -1, set, nullptr};
}

// The tile that comes after: of the same chunk, or of the next that is seen.
template <typename Block>
__device__ __forceinline__ KeyTile tile_after(const CollectiveAttentionParams& p, KeyTile tile,
                                              int32_t chunk_end, const Place& here) {
  if (tile.first + Block::kKeys > tile.last) {
    return find_tile<Block>(p, tile.chunk + 1, chunk_end, tile.set ^ 1, here);
  }
  tile.first += Block::kKeys;
  return tile;
}

template <typename Block>
__device__ __forceinline__ bool warp_sees(const KeyTile& tile, const Sight& sight) {
  const bool sees =
      sight.low <= min(tile.last, tile.first + Block::kKeys - 1) && sight.high >= tile.first;
  return __any_sync(kAllLanes, sees);
}

// Bit i: the query row lane % 16 sees key first + i, or, in the upper lanes where a tile has 64
// keys, first + 32 + i.
template <typename Block>
__device__ __forceinline__ uint32_t visible_keys(const RoundView& round, const KeyTile& tile,
                                                 const Sight& sight, const Place& here) {
  const int32_t base = tile.first + (Block::kKeys > 32 ? here.lane / 16 * 32 : 0);
  const int32_t from = sight.low - base, to = min(sight.high, tile.last) - base;
  uint32_t visible = from > 31 ? 0 : kAllLanes << max(from, 0);
  visible &= to < 0 ? 0 : kAllLanes >> (31 - min(to, 31));
  if (sight.masks >= 0) {
    const int32_t size = 1 << here.page_shift;
    uint32_t hidden = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pages of 32 keys
      const int32_t at = i << here.page_shift;
      const uint32_t keys_of_page = at < 32 ? kAllLanes >> (32 - size) << at : 0;
      const int32_t key = base + at;
      const int32_t index = sight.masks + (key >> here.page_shift);
      int32_t mask = 0;
      // Else its use may have no such page.
      if (visible & keys_of_page && index < round.extents.use_pages) {
        mask = __ldg(round.use_masks + index);
      }
      hidden |= static_cast<uint32_t>(mask) >> (key & (size - 1)) << (at & 31);
    }
    visible &= ~hidden;
  }
  return visible;
}

}  // namespace tokendance::cuda
