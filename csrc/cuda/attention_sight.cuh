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
  int32_t use_begin;               // in work_uses
  int32_t uses_of_chunk;

  __device__ __forceinline__ WorkItem(const RoundView& round, int32_t index) {
    const int4* const work =
        reinterpret_cast<const int4*>(round.work + int64_t{index} * kWorkFields);
    const int4 ranges = __ldg(work), rest = __ldg(work + 1);
    row_begin = ranges.x;
    row_end = ranges.y;
    chunk_begin = ranges.z;
    chunk_end = ranges.w;
    partial_begin = rest.x;
    use_begin = rest.y;
    uses_of_chunk = rest.z;
  }

  __device__ __forceinline__ bool is_of(const RoundExtents& e) const {
    const int64_t chunks = int64_t{chunk_end} - chunk_begin;
    return row_begin >= 0 && row_end <= e.work_rows && chunk_begin >= 0 &&
           chunk_end <= e.work_chunks &&
           (partial_begin < 0 || partial_begin + int64_t{row_end} - row_begin <= e.partials) &&
           (chunks <= 0 || (use_begin >= 0 && uses_of_chunk > 0 &&
                            use_begin + chunks * uses_of_chunk <= e.work_uses));
  }
};

// KV heads of an item are neighbours. Never kept for later: it can be read again.
__device__ __forceinline__ WorkItem item_of_block(const CollectiveAttentionParams& p) {
  const uint32_t block = recomputed<1u << 31>(blockIdx.x);
  return {p.round, static_cast<int32_t>(block / static_cast<uint32_t>(p.num_kv_heads))};
}

// Query heads of a KV head. Never kept for later, either.
__device__ __forceinline__ int32_t heads_of_group(const CollectiveAttentionParams& p) {
  const uint32_t heads = recomputed<1u << 31>(static_cast<uint32_t>(p.num_q_heads));
  return static_cast<int32_t>(heads / static_cast<uint32_t>(p.num_kv_heads));
}

// Query rows of an item, with one KV head.
__device__ __forceinline__ int32_t queries_of(const WorkItem& item,
                                              const CollectiveAttentionParams& p) {
  return (item.row_end - item.row_begin) * heads_of_group(p);
}

// Of a query row, what decides what it sees.
struct Reader {
  int32_t slot;
  int32_t agent;
  int32_t position;

  __device__ __forceinline__ bool has_angle(const RopeTables& rope) const {
    return rope.rotary_dim == 0 ||
           static_cast<uint32_t>(position) < static_cast<uint32_t>(rope.max_position);
  }
  __device__ __forceinline__ bool can_see(const RopeTables& rope) const {
    return agent >= 0 && has_angle(rope);
  }
};

// A chunk of an item, and the use by which a reader sees it.
struct Chunk {
  int32_t source = 0;
  int32_t row_begin = 0, row_end = 0;  // none, if the round does not have them
  int32_t page_list = 0;
  int32_t use = -1;

  __device__ __forceinline__ Chunk(const RoundView& round, const WorkItem& item, int32_t index,
                                   int32_t slot, const Place& here) {
    if (index >= item.chunk_end) return;
    const int4 fields = __ldg(reinterpret_cast<const int4*>(round.work_chunks) + index);
    use = __ldg(round.work_uses + item.use_begin + (index - item.chunk_begin) * item.uses_of_chunk +
                min(slot, item.uses_of_chunk - 1));
    source = fields.x;
    page_list = fields.w;
    const int64_t pages = (int64_t{fields.z} + (1 << here.page_shift) - 1) >> here.page_shift;
    const int64_t capacity = source >= 0 ? round.extents.master_pages : round.extents.own_pages;
    if (fields.y < 0 || page_list < 0 || page_list + pages > capacity) return;
    row_begin = fields.y;
    row_end = fields.z;
  }

  __device__ __forceinline__ const int32_t* pages(const RoundView& round) const {
    return (source >= 0 ? round.master_pages : round.own_pages) + page_list;
  }
};

// A tile of keys, and the rest of its chunk.
struct KeyTile {
  int32_t chunk;        // index in work_chunks
  int32_t first, last;  // rows of the source, from the tile's first to the last that any row sees
  int32_t set;          // of sights
  int32_t page_id;      // lane i has that of the i-th page from the tile's first on, up to the last
  const int32_t* pages;
};

// Lane i gets the id of the i-th page from that of row `first` on, up to that of row `last`.
__device__ __forceinline__ int32_t page_ids(const int32_t* pages, int32_t first, int32_t last,
                                            const Place& here) {
  const int32_t page = (first >> here.page_shift) + here.lane;
  return page <= last >> here.page_shift ? __ldg(pages + page) : 0;
}

// How many of the ascending positions, the last of which is given, are at most `position`.
__device__ __forceinline__ int32_t rows_up_to(const int32_t* positions, int32_t count, int32_t last,
                                              int64_t position) {
  // In decode all of them are.
  if (last <= position) return count;
  int32_t low = 0, high = count - 1;  // rows before `low` are, row `high` is not
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (__ldg(positions + middle) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// What a query row sees of a chunk of a Master, through its agent's use.
__device__ __forceinline__ Sight sight_of_master(const CollectiveAttentionParams& p,
                                                 const Chunk& chunk, const Reader& reader) {
  const RoundView& round = p.round;
  const Sight nothing = {0, -1, -1, kNoShift};
  const int32_t use = chunk.use;
  if (use < 0 || use >= round.extents.uses) return nothing;
  // All at once, so that their latencies overlap.
  const int32_t delta = __ldg(round.use_delta + use), length = __ldg(round.use_length + use);
  const int32_t shift = __ldg(round.use_shift + use), masks = __ldg(round.use_page_indptr + use);
  const int64_t reach = int64_t{reader.position} - delta;
  const int64_t high = min(min(int64_t{chunk.row_end}, int64_t{length}) - 1, reach);
  int64_t low = chunk.row_begin;
  if (p.window > 0) low = max(low, reach - p.window + 1);
  if (!reader.can_see(p.rope) || !has_angles(p.rope, shift) || low > high) return nothing;
  return {static_cast<int32_t>(low), static_cast<int32_t>(high), masks,
          p.rope.rotary_dim == 0 ? 0 : shift};
}

// The same of a chunk of an agent's own rows. Those of other agents turn its query as well: they
// may be next, and all of them want it turned by R(p).
__device__ __forceinline__ Sight sight_of_own_rows(const CollectiveAttentionParams& p,
                                                   const Chunk& chunk, const Reader& reader,
                                                   const Place& here) {
  const int32_t* const positions =
      p.round.own_position + (int64_t{chunk.page_list} << here.page_shift);
  // Asked for before it is known whose the row is.
  const int32_t last = __ldg(positions + chunk.row_end - 1);
  Sight sight = {0, -1, -1, reader.can_see(p.rope) ? 0 : kNoShift};
  if (reader.agent != -1 - chunk.source || sight.shift == kNoShift) return sight;
  const int32_t high = rows_up_to(positions, chunk.row_end, last, reader.position) - 1;
  int32_t low = chunk.row_begin;
  if (p.window > 0) {
    low = max(low, rows_up_to(positions, chunk.row_end, last, int64_t{reader.position} - p.window));
  }
  if (low > high) return sight;
  sight.low = low;
  sight.high = high;
  return sight;
}

__device__ __forceinline__ Sight sight_of(const CollectiveAttentionParams& p, const Chunk& chunk,
                                          const Reader& reader, const Place& here) {
  if (chunk.row_begin >= chunk.row_end) return {0, -1, -1, kNoShift};
  return chunk.source >= 0 ? sight_of_master(p, chunk, reader)
                           : sight_of_own_rows(p, chunk, reader, here);
}

// The first tile of the first chunk, from chunk `index` on, that any query row of the block sees;
// its `chunk` is the item's chunk_end if there is none. Barriers: called by all threads.
template <typename Block>
__device__ __forceinline__ KeyTile find_tile(const CollectiveAttentionParams& p,
                                             const WorkItem& item, int32_t index, Chunk chunk,
                                             const Reader& reader, int32_t set, const Place& here) {
  while (index < item.chunk_end) {
    const int32_t* const pages = chunk.pages(p.round);
    // The tile mostly begins with the chunk.
    int32_t page_id = page_ids(pages, chunk.row_begin, chunk.row_end - 1, here);
    const Sight sight = sight_of(p, chunk, reader, here);
    if (here.lane < Block::kWarpRows) Block::sights(set, here.warp)[here.lane] = sight;
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
    if (first <= last) {
      const int32_t alignment = min(1 << here.page_shift, Block::kKeys);
      first = first / alignment * alignment;
      if (first >> here.page_shift != chunk.row_begin >> here.page_shift) {
        page_id = page_ids(pages, first, last, here);
      }
      return {index, first, last, set, page_id, pages};
    }
    chunk = Chunk(p.round, item, ++index, reader.slot, here);
  }
  return {item.chunk_end, 0, -1, set, 0, nullptr};
}

// Puts the warp's query rows into shared memory, from the item's `first_query`-th on, and finds the
// first tile that the block sees.
//
// A block that begins has nothing to do but to wait. So what memory has to be asked for one after
// the other is three times: the item; then rows, chunk and uses; then what is known of each of
// those and the ids of the first pages.
template <typename Block>
__device__ __forceinline__ KeyTile begin_tiles(const CollectiveAttentionParams& p,
                                               const WorkItem& item, int32_t first_query,
                                               const Place& here) {
  const RoundView& round = p.round;
  const int32_t group = heads_of_group(p);
  const int32_t index = here.lane % Block::kWarpRows;
  const int32_t query = first_query + here.warp * Block::kWarpRows + index;
  const int32_t slot = query / group;
  const int32_t row =
      slot < item.row_end - item.row_begin ? __ldg(round.work_rows + item.row_begin + slot) : -1;
  const Chunk chunk(round, item, item.chunk_begin, slot, here);

  const bool exists = row >= 0 && row < round.extents.rows;
  Reader reader = {slot, -1, 0};
  if (exists) {
    reader.agent = __ldg(round.row_agent + row);
    reader.position = __ldg(round.row_position + row);
  }
  const KeyTile tile = find_tile<Block>(p, item, item.chunk_begin, chunk, reader, 0, here);
  if (here.lane < Block::kWarpRows) {
    const bool has_angle = reader.has_angle(p.rope);
    QueryRow of_lane = {exists ? row : 0, here.kv_head * group + query % group, reader.agent, slot};
    if (reader.agent < 0) {
      of_lane.agent = kNoRow;
    } else if (!has_angle) {
      of_lane.agent = kBlind;
    }
    Block::query_rows(here.warp)[index] = of_lane;
    const int64_t offset = (of_lane.row * p.q_row_stride + of_lane.head * p.q_head_stride) *
                           static_cast<int64_t>(sizeof(typename Block::T));
    Block::turns(here.warp)[index] = {
        {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
        has_angle ? reader.position : 0,
        kNoShift};
  }
  __syncwarp();  // all lanes see them
  return tile;
}

// The tile that comes after: of the same chunk, or of the next that is seen.
template <typename Block>
__device__ __forceinline__ KeyTile tile_after(const CollectiveAttentionParams& p, KeyTile tile,
                                              const Place& here) {
  if (tile.first + Block::kKeys > tile.last) {
    const WorkItem item = item_of_block(p);
    const int32_t index = here.lane % Block::kWarpRows;
    const QueryRow query = load_whole(Block::query_rows(here.warp) + index);
    const Turn turn = load_whole(Block::turns(here.warp) + index);
    const Chunk chunk(p.round, item, tile.chunk + 1, query.slot, here);
    return find_tile<Block>(p, item, tile.chunk + 1, chunk,
                            {query.slot, query.agent, turn.position}, tile.set ^ 1, here);
  }
  tile.first += Block::kKeys;
  tile.page_id = page_ids(tile.pages, tile.first, tile.last, here);
  return tile;
}

template <typename Block>
__device__ __forceinline__ bool warp_sees(const KeyTile& tile, const Sight& sight) {
  const bool sees =
      sight.low <= min(tile.last, tile.first + Block::kKeys - 1) && sight.high >= tile.first;
  return __any_sync(kAllLanes, sees);
}

// Bit i: the query row lane % Block::kWarpRows sees key first + i, or, in the upper lanes where a
// tile has 64 keys, first + 32 + i.
template <typename Block>
__device__ __forceinline__ uint32_t visible_keys(const RoundView& round, const KeyTile& tile,
                                                 const Sight& sight, const Place& here) {
  static_assert(Block::kKeys * Block::kWarpRows <= 32 * kWarpSize, "a word of each lane suffices");
  const int32_t base = tile.first + (Block::kKeys > 32 ? here.lane / Block::kWarpRows * 32 : 0);
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
