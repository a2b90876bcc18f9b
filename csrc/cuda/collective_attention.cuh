// collective_attention: query rows of many agents meet one tile of keys and values as it is stored.
//
// A block takes a work item and a KV head: 64 query rows, rows of the round times heads of the
// group, of any agents. Their queries are rotated into shared memory once per source, each by its
// own R(p) R(-shift). Keys and values come page by page through cp.async, K and V in turn over
// three stages, so that two stages are on their way while one is multiplied; a step has one
// barrier. The softmax is online, in units of log2. Each row's sight of a tile is one word of bits:
// the range that position, length of the use and window leave, without the overridden rows.
//
// Bytes, per item and KV head: 2 * D elements for every stored row that any of the query rows sees,
// once; queries and two rows of the tables per query row and source; outputs, or partials in fp32.
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
// No spills. Blocks of 128 threads at 16 bits, as tools/sass_table.txt has them for A100 and H100:
//
//   D          registers   shared memory   blocks of a multiprocessor
//   64         148         34 KB           3 and 3, held by registers
//   80, 96     157 - 168   42, 50 KB       3 and 3
//   128        186 - 192   66 KB           2 and 2
//   256        243 - 244   82 KB           1 and 2; tiles of 32 keys
//
// fp32 has tiles of 32 keys, and for D = 256 of 16, with 32 query rows in two warps:
//
//   64, 80     150 - 168   42, 52 KB       3 and 3
//   96         166 - 168   62 KB           2 and 3
//   128        178 - 184   82 KB           1 and 2
//   256        228 - 238   81 KB           1 and 2
//
// Keys and values of e4m3 are 1 byte an element, in stages of half the size, so that decode may do
// 2 FLOPs per byte and query row. Every warp widens the tile for itself: before sm_89 by seven
// integer instructions for four elements. With four warps at work an A100, of 64 integer lanes a
// clock and multiprocessor, widens 64 / 7 bytes a clock, at 1.41 GHz 1.4 TB/s of 2.0: tiles of more
// than 32 query rows are bound by that, others by memory. From sm_89 on it is three instructions.
// Queries and weights are fp16. Registers 145 (D = 64) to 231 (D = 256), shared memory 22 to 58 KB.
#pragma once

#include "cuda/attention_products.cuh"
#include "cuda/collective_attention_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/round_lookup.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// A query row: a row of the round and a query head.
struct QueryRow {
  int32_t row;
  int32_t head;
  int32_t agent;  // -1: there is none, the tile is not full
  int32_t position;
};

// What a query row sees of a chunk.
struct Sight {
  int32_t low, high;  // rows of the source; low > high: none
  int32_t masks;      // where the override masks of its use begin, -1 = none
  int32_t shift;      // of its use, 0 for own rows; kNoShift: it need not be rotated for the source
};
constexpr int32_t kNoShift = -2147483647 - 1;

// Reads such a struct of shared memory whole: parts of adjacent ones would meet in the same banks.
template <typename Struct>
__device__ __forceinline__ Struct load_whole(const Struct* pointer) {
  static_assert(sizeof(Struct) == 16, "one access");
  const int4 words = load_shared_16(pointer);
  return {words.x, words.y, words.z, words.w};
}

// A tile of keys and the rest of its chunk.
struct TileOfKeys {
  int32_t chunk;        // index in work_chunks
  int32_t source;       // Master, or -1 - agent
  int32_t first, last;  // rows of the source, from the tile's first to the last that any row sees
  const int32_t* pages;
};

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

// A block's part of a work item for one KV head: AttentionShape::rows query rows.
//
// Every warp has 16 of them for itself, from the rotation to the result, so that warps share
// nothing but tiles of keys and values. What is needed once per chunk is kept in shared memory.
template <typename T, typename Pool, int kHeadDim, bool kWide>
class AttentionTile {
 public:
  static constexpr AttentionShape kShape{sizeof(T), sizeof(Pool), kHeadDim};
  static constexpr int kKeys = kShape.keys;

  __device__ __forceinline__ AttentionTile(const CollectiveAttentionParams& params,
                                           const int4& item, int32_t partial_begin, int32_t kv_head,
                                           int32_t first_query)
      : p(params),
        round(params.round),
        thread(static_cast<int32_t>(threadIdx.x)),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        kv_head(kv_head),
        chunk_end(item.w),
        block_shift(3 + (params.round.extents.block_size > 8) +
                    (params.round.extents.block_size > 16)) {
    if (lane < kAttentionWarpRows) {
      const int32_t group = p.num_q_heads / p.num_kv_heads;
      const int32_t query = first_query + warp * kAttentionWarpRows + lane;
      const int32_t slot = query / group;
      QueryRow of_lane = {0, kv_head * group + query % group, -1, 0};
      if (slot < item.y - item.x) {
        const int32_t row = __ldg(round.work_rows + item.x + slot);
        const int32_t position = __ldg(round.row_position + row);
        // Beyond the tables there is no angle: such a row is left out, as padding is.
        if (p.rope.rotary_dim == 0 || static_cast<uint32_t>(position) < p.rope.max_position) {
          of_lane.row = row;
          of_lane.agent = __ldg(round.row_agent + row);
          of_lane.position = position;
        }
      }
      query_rows()[lane] = of_lane;
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    }
    highest[0] = highest[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
    attend(item.z);
    write(partial_begin, first_query);
  }

 private:
  using Products = AttentionProducts<Pool, kHeadDim, kKeys>;
  using Query = typename Products::Query;
  using Rows = SwizzledRows<Pool, kHeadDim>;
  using QueryRows = SwizzledRows<T, kHeadDim>;  // of outputs, too
  static_assert(sizeof(Query) == sizeof(T), "outputs take the place of queries");
  static constexpr int kElements = kKeys * kHeadDim;  // of a stage
  // Adjacent rows that a thread copies its piece of. More than one only where lanes that copy in
  // one phase are within a row: rows further apart would meet in the same banks.
  static constexpr int column_rows() {
    int rows = Rows::kPieces % 8 == 0 ? 8 : 1;
    while (rows > 1 && kKeys / rows * Rows::kPieces % kShape.threads != 0) rows /= 2;
    return rows;
  }
  static constexpr int kColumnRows = column_rows();

  // Shared memory -------------------------------------------------------------------------------

  template <typename Element>
  static __device__ __forceinline__ Element* shared_at(int32_t offset) {
    extern __shared__ __align__(16) unsigned char shared[];
    return reinterpret_cast<Element*>(shared + offset);
  }
  static __device__ __forceinline__ Pool* stage(int32_t index) {
    return shared_at<Pool>(kShape.query_bytes + index * kShape.stage_bytes);
  }
  static constexpr int32_t kRowsAt = kShape.query_bytes + kAttentionStages * kShape.stage_bytes;
  // Of the warp.
  template <typename Element = Query>
  __device__ __forceinline__ Element* queries() const {
    return shared_at<Element>(warp * kAttentionWarpRows * kHeadDim *
                              static_cast<int32_t>(sizeof(Element)));
  }
  __device__ __forceinline__ QueryRow* query_rows() const {
    return shared_at<QueryRow>(kRowsAt) + warp * kAttentionWarpRows;
  }
  __device__ __forceinline__ Sight* sights() const {  // of the next tile's chunk
    return shared_at<Sight>(kRowsAt + kShape.row_bytes) + warp * kAttentionWarpRows;
  }
  // What each warp sees of a chunk.
  static __device__ __forceinline__ int2* ranges(int32_t set) {
    return shared_at<int2>(kRowsAt + 2 * kShape.row_bytes) + set * kShape.warps;
  }

  // What is seen --------------------------------------------------------------------------------

  __device__ __forceinline__ Sight sight_of(const QueryRow& query, const int4& chunk) const {
    Sight sight = {0, -1, -1, kNoShift};
    if (query.agent < 0) return sight;
    int64_t low = int64_t{chunk.y} << block_shift;
    int64_t high = (int64_t{chunk.z} << block_shift) - 1;
    if (chunk.x >= 0) {
      const int32_t use = use_of_master(round, query.agent, chunk.x);
      if (use < 0) return sight;
      const int64_t reach = int64_t{query.position} - __ldg(round.use_delta + use);
      high = min(min(high, reach), int64_t{__ldg(round.use_length + use)} - 1);
      if (p.window > 0) low = max(low, reach - p.window + 1);
      const int32_t shift = __ldg(round.use_shift + use);
      if (!has_angles(p.rope, shift)) return sight;
      sight.masks = __ldg(round.use_page_indptr + use);
      sight.shift = shift;
    } else {
      sight.shift = 0;  // other agents' rows, too, which may be the next: R(p) serves all own rows
      if (query.agent != -1 - chunk.x) return sight;
      const int32_t* const positions =
          round.own_position + (int64_t{__ldg(round.own_page_indptr + query.agent)} << block_shift);
      const int32_t count = __ldg(round.own_length + query.agent);
      high = min(high, int64_t{rows_up_to(positions, count, query.position)} - 1);
      if (p.window > 0) {
        low = max(low, int64_t{rows_up_to(positions, count, int64_t{query.position} - p.window)});
      }
    }
    if (low > high) return sight;
    sight.low = static_cast<int32_t>(low);
    sight.high = static_cast<int32_t>(high);
    return sight;
  }

  // The first tile of the first chunk, from chunk `index` on, that any query row of the block sees;
  // its `chunk` is chunk_end if there is none. Barriers: called by all threads.
  __device__ __forceinline__ void find_chunk(int32_t index) {
    for (; index < chunk_end; ++index) {
      const int4 chunk = __ldg(reinterpret_cast<const int4*>(round.work_chunks) + index);
      const int32_t query = lane % kAttentionWarpRows;
      const Sight sight = sight_of(load_whole(query_rows() + query), chunk);
      if (lane < kAttentionWarpRows) sights()[query] = sight;
      const bool sees = sight.low <= sight.high;
      const int32_t low = __reduce_min_sync(kAllLanes, sees ? sight.low : INT32_MAX);
      const int32_t high = __reduce_max_sync(kAllLanes, sight.high);
      // Two sets in turn: this one was last read before the barrier of the turn before.
      int2* const range = ranges(index & 1);
      if (lane == 0) range[warp] = make_int2(low, high);
      __syncthreads();
      int32_t first = INT32_MAX, last = -1;
#pragma unroll
      for (int i = 0; i < kShape.warps; ++i) {
        const int2 of_warp = range[i];
        first = min(first, of_warp.x);
        last = max(last, of_warp.y);
      }
      if (first > last) continue;
      const int32_t alignment = min(1 << block_shift, kKeys);
      next.source = chunk.x;
      next.first = first / alignment * alignment;
      next.last = last;
      next.pages = chunk.x >= 0 ? round.master_pages + __ldg(round.master_page_indptr + chunk.x)
                                : round.own_pages + __ldg(round.own_page_indptr + (-1 - chunk.x));
      break;
    }
    next.chunk = index;
  }

  // Bit i: the lane's query row sees key first + i, or, in the upper lanes where a tile has 64
  // keys, first + 32 + i.
  __device__ __forceinline__ uint32_t visible_keys(int32_t first) const {
    const int32_t base = first + (kKeys > 32 ? lane / 16 * 32 : 0);
    const int32_t from = low - base, to = high - base;
    uint32_t visible = from > 31 ? 0 : kAllLanes << max(from, 0);
    visible &= to < 0 ? 0 : kAllLanes >> (31 - min(to, 31));
    if (masks >= 0) {
      const int32_t size = 1 << block_shift;
      uint32_t hidden = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // pages of 32 keys
        const int32_t at = i << block_shift;
        const uint32_t keys_of_page = at < 32 ? kAllLanes >> (32 - size) << at : 0;
        const int32_t key = base + at;
        int32_t mask = 0;
        if (visible & keys_of_page) {  // else its use may have no such page
          mask = __ldg(round.use_masks + masks + (key >> block_shift));
        }
        hidden |= static_cast<uint32_t>(mask) >> (key & (size - 1)) << (at & 31);
      }
      visible &= ~hidden;
    }
    return visible;
  }

  // Copies --------------------------------------------------------------------------------------

  // Page ids of the next tile: lane i has that of its i-th page.
  __device__ __forceinline__ int32_t page_ids() const {
    const int32_t page = (next.first >> block_shift) + lane;
    return page <= next.last >> block_shift ? __ldg(next.pages + page) : 0;
  }

  // Starts to copy the next tile's keys, or values. Rows after the last that a query row sees are
  // not read, and become zeros: they may hold NaN, which a weight of 0 does not make disappear.
  // Rows before it that are hidden by masks or the window are read, and have to be finite.
  __device__ __forceinline__ void copy_tile(const void* pool, const RowLayout& layout,
                                            int32_t page_id, int32_t to) const {
    const int32_t thread = recomputed<kShape.threads>(this->thread);
    const Pool* const source = static_cast<const Pool*>(pool) + kv_head * layout.head_stride;
    const int32_t size = 1 << block_shift;
    const int32_t row_of_page = next.first & (size - 1);
    auto row_pointer = [&](int32_t tile_row) {
      const int32_t key = row_of_page + tile_row;
      const int32_t page = __shfl_sync(kAllLanes, page_id, key >> block_shift);
      return source + page * layout.page_stride + (key & (size - 1)) * layout.row_stride;
    };
    const int32_t count = next.last - next.first + 1;
    if constexpr (kWide) {
      // A thread has the same piece of some adjacent rows, which are of one page.
      constexpr int kColumns = kKeys / kColumnRows * Rows::kPieces;
#pragma unroll
      for (int i = 0; i < (kColumns + kShape.threads - 1) / kShape.threads; ++i) {
        const int32_t column = i * kShape.threads + thread;
        static_assert(kColumns % kWarpSize == 0, "whole warps have columns");
        if (kColumns % kShape.threads != 0 && column >= kColumns) break;
        const int32_t tile_row = column / Rows::kPieces * kColumnRows;
        const int32_t piece = column % Rows::kPieces;
        const Pool* from = row_pointer(tile_row) + piece * Rows::kPiece;
#pragma unroll
        for (int j = 0; j < kColumnRows; ++j) {
          cp_async_16_or_zero(stage(to) + Rows::piece(tile_row + j, piece), from,
                              tile_row + j < count);
          from += layout.row_stride;
        }
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kElements / kShape.threads; ++i) {
        const int32_t index = i * kShape.threads + thread;
        const int32_t tile_row = index / kHeadDim, dim = index % kHeadDim;
        const Pool* const from = row_pointer(tile_row) + dim;
        Vector<Pool, 1> element = {};
        if (tile_row < count) element = load_vector<Pool, 1>(from);
        store_vector<Pool, 1>(stage(to) + Rows::element(tile_row, dim), element);
      }
    }
  }

  // Queries -------------------------------------------------------------------------------------

  static __device__ __forceinline__ int32_t place(int32_t dim) {
    if constexpr (kIsQuantized<Pool>) {
      return Products::query_place(dim);
    } else {
      return dim;
    }
  }

  // Rotates the warp's queries for a source, R(p) R(-shift), into shared memory. A lane has one
  // pair of dims of every row.
  __device__ __forceinline__ void rotate_queries() const {
    const int32_t lane = recomputed<kWarpSize>(this->lane);
    const int32_t half = p.rope.rotary_dim / 2;
    constexpr int kBatch = kHeadDim < 256 ? 4 : 2;
    __syncwarp();  // all lanes are done with what stood there
#pragma unroll 1
    for (int32_t first = 0; first < kHeadDim / 2; first += kWarpSize) {
      const int32_t pair = first + lane;
      if (kHeadDim / 2 % kWarpSize != 0 && pair >= kHeadDim / 2) break;
      // Dims that stay as they are make pairs of neighbours.
      const bool rotates = pair < half;
      const bool split = rotates && !p.rope.interleaved;
      const int32_t x_dim = split ? pair : 2 * pair;
      const int32_t y_dim = split ? pair + half : 2 * pair + 1;
#pragma unroll 1
      for (int32_t row = 0; row < kAttentionWarpRows; row += kBatch) {
        int32_t shift[kBatch];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          shift[i] = sights()[row + i].shift;
          any |= shift[i] != kNoShift;
        }
        if (!any) continue;
        // All loads of some rows before the first use, so that their latencies overlap. Rows that
        // are not wanted are loaded like row 0: rather that than a branch between loads.
        Vector<T, 1> x_of[kBatch], y_of[kBatch];
        Angle angle[kBatch], back[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const QueryRow query = load_whole(query_rows() + row + i);
          const T* const from = static_cast<const T*>(p.q) + query.row * p.q_row_stride +
                                query.head * p.q_head_stride;
          x_of[i] = load_vector<T, 1>(from + x_dim);
          y_of[i] = load_vector<T, 1>(from + y_dim);
          angle[i] = back[i] = {1.0f, 0.0f};
          if (rotates) {
            const int64_t at = int64_t{query.position} * half + pair;
            const int64_t back_at =
                (shift[i] == kNoShift ? 0 : int64_t{abs(shift[i])}) * half + pair;
            angle[i] = {__ldg(p.rope.cos + at), __ldg(p.rope.sin + at)};
            back[i] = {__ldg(p.rope.cos + back_at), __ldg(p.rope.sin + back_at)};
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          float x[1], y[1];
          unpack(x_of[i], x);
          unpack(y_of[i], y);
          if (rotates) {
            rotate_pair(
                counter_rotation(angle[i], angle_of_shift(back[i].cos, back[i].sin, shift[i])),
                x[0], y[0], &x[0], &y[0]);
            x[0] = rounded_product(x[0], p.attention_factor);
            y[0] = rounded_product(y[0], p.attention_factor);
          }
          Vector<Query, 1> rounded;
          pack(x, &rounded);
          store_vector<Query, 1>(queries() + QueryRows::element(row + i, place(x_dim)), rounded);
          pack(y, &rounded);
          store_vector<Query, 1>(queries() + QueryRows::element(row + i, place(y_dim)), rounded);
        }
      }
    }
    __syncwarp();  // all lanes see the queries
  }

  // The next tile becomes this one. At the start of a chunk, the queries turn to its source.
  __device__ __forceinline__ void take_next(bool is_first) {
    if (is_first || next.chunk != tile.chunk) {
      const Sight sight = load_whole(sights() + lane % kAttentionWarpRows);
      low = sight.low;
      high = sight.high;
      masks = sight.masks;
      const int32_t rotation = max(next.source, -1);
      if (is_first || rotation != rotated_for) rotate_queries();
      rotated_for = rotation;
    }
    tile = next;
  }

  // Attention -----------------------------------------------------------------------------------

  __device__ __forceinline__ void attend(int32_t chunk_begin) {
    find_chunk(chunk_begin);
    if (next.chunk == chunk_end) return;
    // Stages of a tile's keys, of its values, and of what comes next.
    int32_t keys = 0, values = 1, following = 2;
    {
      const int32_t page_id = page_ids();
      copy_tile(p.k_pool, p.k_layout, page_id, keys);
      cp_async_commit();
      copy_tile(p.v_pool, p.v_layout, page_id, values);
      cp_async_commit();
    }
    take_next(true);
#pragma unroll 1
    while (true) {
      cp_async_wait<1>();
      __syncthreads();  // all have their keys, and are done with the values of the tile before
      if (next.first + kKeys <= next.last) {
        next.first += kKeys;
      } else {
        find_chunk(next.chunk + 1);
      }
      const bool more = next.chunk < chunk_end;
      int32_t page_id = 0;
      if (more) {
        page_id = page_ids();
        copy_tile(p.k_pool, p.k_layout, page_id, following);
      }
      cp_async_commit();

      const bool sees = low <= min(tile.last, tile.first + kKeys - 1) && high >= tile.first;
      const bool warp_sees = __any_sync(kAllLanes, sees);
      float scores[kKeys / 8][4];
      if (warp_sees) {
        const uint32_t visible = visible_keys(tile.first);
        Products::score(queries(), stage(keys), lane_of_products(), scores);
        scale(scores);
        constexpr uint32_t kTile = kKeys < 32 ? (1u << kKeys % 32) - 1 : kAllLanes;
        if (!__all_sync(kAllLanes, (visible & kTile) == kTile)) hide(visible, scores);
        soften(scores);
      }
      cp_async_wait<1>();
      __syncthreads();  // all have their values, and are done with the keys
      if (more) copy_tile(p.v_pool, p.v_layout, page_id, keys);
      cp_async_commit();
      if (warp_sees) Products::add_values(scores, stage(values), lane_of_products(), sums);
      if (!more) break;

      const int32_t free = keys;
      keys = following;
      following = values;
      values = free;
      take_next(false);
    }
  }

  // With 256 dims the sums take half of the registers: none are left for addresses in stages.
  __device__ __forceinline__ int32_t lane_of_products() const {
    return kHeadDim < 256 ? lane : recomputed<kWarpSize>(lane);
  }

  // Of products of queries with keys as they were multiplied.
  __device__ __forceinline__ float score_scale() const {
    if constexpr (kIsQuantized<Pool>) {
      return p.softmax_scale * scale_of_head(p.k_scale);
    } else {
      return p.softmax_scale;
    }
  }
  // Of e4m3 elements as they are widened.
  __device__ __forceinline__ float scale_of_head(const float* scales) const {
    return (scales ? __ldg(scales + kv_head) : 1.0f) * widened_unit();
  }

  // Scores in units of log2.
  __device__ __forceinline__ void scale(float (&scores)[kKeys / 8][4]) const {
    if (p.soft_cap > 0.0f) {
      // cap * tanh(x / cap) = cap - 2 * cap / (1 + exp(2 * x / cap))
      const float factor = 2.0f * kLog2E * score_scale() / p.soft_cap;
      const float cap = p.soft_cap * kLog2E;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float power = fast_exp2(scores[n][i] * factor);
          scores[n][i] = fmaf(-cap, __fdividef(2.0f, 1.0f + power), cap);
        }
      }
    } else {
      const float factor = score_scale() * kLog2E;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= factor;
      }
    }
  }

  // Replaces scores of keys that their row does not see.
  __device__ __forceinline__ void hide(uint32_t visible, float (&scores)[kKeys / 8][4]) const {
    constexpr int kWords = kKeys > 32 ? 2 : 1;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        // Shifted, so that the bits of the lane's keys are those of lane 0.
        const uint32_t bits =
            __shfl_sync(kAllLanes, visible, word * 16 + j * 8 + lane / 4) >> lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < (kKeys < 32 ? kKeys : 32) / 8; ++n) {
          float (&score)[4] = scores[word * 4 + n];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if ((bits >> (n * 8 + i) & 1) == 0) score[2 * j + i] = -INFINITY;
          }
        }
      }
    }
  }

  // Online softmax: scores become weights.
  __device__ __forceinline__ void soften(float (&scores)[kKeys / 8][4]) {
    float rescale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float maximum = highest[j];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        maximum = fmaxf(maximum, fmaxf(scores[n][2 * j], scores[n][2 * j + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
      // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
      const float base = maximum == -INFINITY ? 0.0f : maximum;
      rescale[j] = maximum == highest[j] ? 1.0f : fast_exp2(highest[j] - base);
      highest[j] = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * j; i < 2 * j + 2; ++i) {
          scores[n][i] = fast_exp2(scores[n][i] - base);
          sum += scores[n][i];
        }
      }
      total[j] = fmaf(total[j], rescale[j], sum);  // of the lane's keys
    }
    if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] *= rescale[i / 2];
      }
    }
  }

  // Results -------------------------------------------------------------------------------------

  // partial_begin < 0: rows of the output; else partials, from that of the item's first row on.
  __device__ __forceinline__ void write(int32_t partial_begin, int32_t first_query) {
    const int32_t lane = recomputed<kWarpSize>(this->lane);
    float factor[2], lses[2];
    float value_scale = 1.0f;
    if constexpr (kIsQuantized<Pool>) {
      value_scale = scale_of_head(p.v_scale);
      Products::arrange(sums);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = total[j];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      lses[j] = sum == 0.0f ? -INFINITY : fmaf(highest[j], kLn2, logf(sum));
      factor[j] = sum == 0.0f ? 0.0f : 1.0f / sum;
      if constexpr (kIsQuantized<Pool>) factor[j] *= value_scale;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t index = lane / 4 + 8 * j;
      const QueryRow query = load_whole(query_rows() + index);
      if (query.agent < 0) continue;
      if (partial_begin >= 0) {
        const int32_t slot =
            (first_query + warp * kAttentionWarpRows + index) / (p.num_q_heads / p.num_kv_heads);
        const int64_t at = int64_t{partial_begin + slot} * p.num_q_heads + query.head;
        write_partial(lane, j, factor[j], p.workspace + at * kHeadDim);
        float* const partial_lse = p.workspace + round.extents.partials * p.num_q_heads * kHeadDim;
        if (lane % 4 == 0) partial_lse[at] = lses[j];
      } else {
        if (p.sinks && factor[j] != 0.0f) {
          factor[j] /= 1.0f + expf(__ldg(p.sinks + query.head) - lses[j]);
        }
        if (lane % 4 == 0) p.lse[int64_t{query.row} * p.num_q_heads + query.head] = lses[j];
      }
    }
    if (partial_begin < 0) write_output(lane, factor);
  }

  // A lane's part of a row: whole sectors, together with its three neighbours.
  __device__ __forceinline__ void write_partial(int32_t lane, int j, float factor,
                                                float* to) const {
    if constexpr (!kWide) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        to[Products::dim(n, lane)] = sums[n][2 * j] * factor;
        to[Products::dim(n, lane) + 1] = sums[n][2 * j + 1] * factor;
      }
    } else if constexpr (sizeof(T) == 4 || kIsQuantized<Pool>) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        *reinterpret_cast<float4*>(to + Products::dim(n, lane)) =
            make_float4(sums[n][2 * j] * factor, sums[n][2 * j + 1] * factor,
                        sums[n + 1][2 * j] * factor, sums[n + 1][2 * j + 1] * factor);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + Products::dim(n, lane)) =
            make_float2(sums[n][2 * j] * factor, sums[n][2 * j + 1] * factor);
      }
    }
  }

  // By way of the shared memory of the warp's queries, for stores of whole rows.
  __device__ __forceinline__ void write_output(int32_t lane, const float (&factor)[2]) const {
    __syncwarp();  // all lanes are done with the queries
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        T* const to = queries<T>() + QueryRows::element(lane / 4 + 8 * j, Products::dim(n, lane));
        const float x = sums[n][2 * j] * factor[j], y = sums[n][2 * j + 1] * factor[j];
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<float2*>(to) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(x, y);
        }
      }
    }
    __syncwarp();
    constexpr int kVector = kWide ? QueryRows::kPiece : 1;
    constexpr int kVectors = kHeadDim / kVector;  // of a row
#pragma unroll 4
    for (int i = 0; i < kAttentionWarpRows * kVectors / kWarpSize; ++i) {
      const int32_t index = i * kWarpSize + lane;
      const int32_t query = index / kVectors, dim = index % kVectors * kVector;
      const QueryRow written = query_rows()[query];
      if (written.agent < 0) continue;
      T* const to = static_cast<T*>(p.out) + written.row * p.out_row_stride +
                    written.head * p.out_head_stride + dim;
      const T* const from = queries<T>() + QueryRows::element(query, dim);
      if constexpr (kWide) {
        store_global_16(to, load_shared_16(from));
      } else {
        *to = *from;
      }
    }
  }

  const CollectiveAttentionParams& p;
  const RoundView& round;
  const int32_t thread, lane, warp;
  const int32_t kv_head;
  const int32_t chunk_end;
  const int32_t block_shift;  // log2 of the rows of a page

  TileOfKeys tile;      // that is attended to
  TileOfKeys next;      // that is copied
  int32_t rotated_for;  // Master, or -1: own rows
  // Sight of query row lane % 16, of the tile's chunk.
  int32_t low, high, masks;

  // Of rows lane / 4 and lane / 4 + 8.
  float sums[kHeadDim / 8][4];  // weighted values
  float highest[2];             // score, in units of log2
  float total[2];               // weight, of the lane's keys
};

// An item of the work list and a KV head: what a block does.
struct BlockWork {
  int4 item;  // the first four of its fields
  int32_t partial_begin;
  int32_t kv_head;
  int32_t queries;

  __device__ __forceinline__ BlockWork(const CollectiveAttentionParams& p, uint32_t block) {
    const int32_t kv_heads = p.num_kv_heads;
    const int32_t index = static_cast<int32_t>(block) / kv_heads;
    kv_head = static_cast<int32_t>(block) % kv_heads;
    const int32_t* const work = p.round.work + int64_t{index} * kWorkFields;
    item = __ldg(reinterpret_cast<const int4*>(work));
    partial_begin = __ldg(work + 4);
    queries = (item.y - item.x) * (p.num_q_heads / kv_heads);
  }
};

template <typename T, typename Pool, int kHeadDim, bool kWide>
__device__ __forceinline__ void collective_attention(const CollectiveAttentionParams& p) {
  BlockWork work(p, blockIdx.x);
  constexpr AttentionShape kShape{sizeof(T), sizeof(Pool), kHeadDim};
#pragma unroll 1
  for (int32_t first = 0; first < work.queries; first += kShape.rows) {
    if (first > 0) __syncthreads();  // all are done with the last tiles
    AttentionTile<T, Pool, kHeadDim, kWide>(p, work.item, work.partial_begin, work.kv_head, first);
    // With 256 dims the sums take half of the registers: none are left for what is read again.
    if constexpr (kHeadDim == 256) work = BlockWork(p, recomputed<1u << 31>(blockIdx.x));
  }
}

}  // namespace tokendance::cuda
