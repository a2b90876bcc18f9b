// Attention of a round's query rows over Masters and own rows as they are stored.
//
// What bounds it. A work item and a KV head read each key and value once, 2 D elements, and spend
// 4 D flops per query row on them: in fp32 half a flop per byte and query row. A core that reads
// 10 GB/s and multiplies at 100 GFLOP/s is bound by memory below 20 query rows and by arithmetic
// above, so that an agent's own rows in decode (G query rows) want bandwidth, and shared tiles and
// prefill want full vectors.
//
// How. Keys are taken in blocks of 64, so that keys, values, scores and the tile's queries of a
// head of 64 dims (16 KiB each for 64 rows) stay in the first two cache levels, and the softmax is
// paid once per block. With many query rows these stand in the lanes: keys are broadcast straight
// from their page, scores come out with a row per lane, so that their maximum and sum over keys
// need no shuffles, and the weights are read back by broadcast. With few rows the dims stand in
// the lanes. Query rows are rotated to each source once per chunk, rows that see none of it are
// left out, and the rest stand in the order of how far they see, so that the rows that see a block
// are adjacent. 16-bit keys and values are widened block by block for many rows, in registers for
// few, and quantized ones in either case: they are exact in fp32, and the scales of a KV head
// multiply its queries and its output. The next block is fetched while the current one is
// multiplied.
//
// With few query rows one task takes all KV heads, block by block with the heads inside: their keys
// lie side by side, and a pass per head would fetch every page's address translation once per head.
// Blocks are of 64 KiB of keys there, of 16 to 64 keys: 64 keys and values of 8 heads of 128 dims
// in fp32, and as many that are fetched ahead, would fill a second-level cache of 1 MiB.
//
// A key that no row of the tile sees may hold anything, NaN too: its score is replaced and its
// value is read as zeros. Scores are kept in units of log2, so that exp2 is all that is needed.
//
// Threads take (item, KV head) pairs as they get free. Partial results are merged in a second pass,
// in the order that the work list gives: results do not depend on the number of threads.
#include <algorithm>

#include "cpu/attention_queries.h"
#include "cpu/attention_results.h"
#include "cpu/attention_scratch.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

// Hides scores of the keys of lanes that do not see the key; tells whether any lane does.
#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
TOKENDANCE_INLINE bool hide(Full& score, int32_t key, int32_t bit, const int32_t* low,
                            const int32_t* high, const int32_t* masks) {
  const __m512i k = _mm512_set1_epi32(key);
  __mmask16 sees = _mm512_cmple_epi32_mask(_mm512_loadu_si512(low), k);
  sees = _mm512_mask_cmple_epi32_mask(sees, k, _mm512_loadu_si512(high));
  sees = _mm512_mask_testn_epi32_mask(sees, _mm512_loadu_si512(masks), _mm512_set1_epi32(bit));
  score.v = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), sees, score.v);
  return sees != 0;
}
#else
TOKENDANCE_INLINE bool hide(Full& score, int32_t key, int32_t bit, const int32_t* low,
                            const int32_t* high, const int32_t* masks) {
  bool any = false;
  for (int i = 0; i < kFullLanes; ++i) {
    const bool sees = (low[i] <= key) & (key <= high[i]) & ((masks[i] & bit) == 0);
    score.v[i] = sees ? score.v[i] : -kInfinity;
    any |= sees;
  }
  return any;
}
#endif

// T is the type of keys and values. That of queries and output is the same, or any that is not
// quantized if T is.
template <typename T>
class Attention {
 public:
  explicit Attention(const CollectiveAttentionParams& params)
      : params_(params),
        round_(params.round),
        group_(params.num_q_heads / params.num_kv_heads),
        block_size_(static_cast<int>(params.round.extents.block_size)) {
    const bool capped = params.soft_cap > 0.0f;
    query_factor_ = capped ? params.softmax_scale / params.soft_cap : params.softmax_scale * kLog2E;
    cap_ = capped ? params.soft_cap * kLog2E : 0.0f;
  }

  int64_t num_tasks() const { return round_.extents.work * params_.num_kv_heads; }

  // Whether another task does this one's work: with few query rows, one task takes all KV heads,
  // since their keys lie side by side.
  bool is_empty(int64_t task) const {
    const int32_t* item = item_of(task);
    return item[0] == item[1] || head_of(task) % heads_at_once(item) != 0;
  }

  // One work item and KV head (or several); `next` is what this thread does after it, -1 = nothing.
  void run(int64_t task, int64_t next, Scratch& scratch) const {
    const int32_t* item = item_of(task);
    const int kv_head = head_of(task);
    const int kv_heads = std::min(heads_at_once(item), params_.num_kv_heads - kv_head);
    // A tile that exceeds the scratch is taken in parts.
    const int heads = std::min(group_, kMaxQueries);
    const int rows = kMaxQueries / heads;
    for (int32_t row = item[0]; row < item[1]; row += rows) {
      for (int g = 0; g < group_; g += heads) {
        const AttentionTile tile{item,
                                 round_.work_rows + row,
                                 std::min(rows, item[1] - row),
                                 row - item[0],
                                 kv_head,
                                 kv_heads,
                                 g,
                                 std::min(heads, group_ - g),
                                 group_};
        run_tile(tile, next, scratch);
      }
    }
  }

 private:
  const int32_t* item_of(int64_t task) const {
    return round_.work + task / params_.num_kv_heads * kWorkFields;
  }
  int head_of(int64_t task) const { return static_cast<int>(task % params_.num_kv_heads); }
  // Whether all chunks of the item are taken in the flat form.
  bool is_flat(const int32_t* item) const {
    return int64_t{item[1] - item[0]} * group_ <= kMaxFlatQueries;
  }
  // KV heads that a task of the item takes.
  int heads_at_once(const int32_t* item) const {
    if (!is_flat(item)) return 1;
    return std::min(params_.num_kv_heads, kMaxQueries / kMaxFlatQueries);
  }

  const int32_t* chunk(int32_t index) const { return round_.work_chunks + index * kChunkFields; }

  // Blocks ----------------------------------------------------------------------------------------

  // Rows of some adjacent heads.
  Ahead rows_ahead(const T* const* rows, int count, int heads, int64_t offset) const {
    const int bytes = heads * params_.head_dim * static_cast<int>(sizeof(T));
    return Ahead(reinterpret_cast<const void* const*>(rows), count,
                 (bytes + kCacheLine - 1) / kCacheLine, offset * static_cast<int64_t>(sizeof(T)));
  }

  // Rows of all heads of a tile, fetched while each head of the block before is multiplied.
  class HeadsAhead {
   public:
    HeadsAhead(const Attention& attention, const T* const* rows, int count, const RowLayout& layout,
               int heads)
        : attention_(attention), rows_(rows), count_(count), layout_(layout) {
      if (layout.head_stride != attention.params_.head_dim) return;
      ahead_ = attention.rows_ahead(rows, count, heads, 0);
      lines_ = (ahead_.lines() + heads - 1) / heads;
    }
    Share share(int head) {
      if (lines_ > 0) return {&ahead_, lines_};
      ahead_ = attention_.rows_ahead(rows_, count_, 1, head * layout_.head_stride);
      return {&ahead_, ahead_.lines()};
    }

   private:
    const Attention& attention_;
    const T* const* rows_;
    int count_;
    const RowLayout& layout_;
    Ahead ahead_;
    int lines_ = 0;  // for each head, 0 where heads are not adjacent
  };

  // Keys of a block in the flat form: a multiple of the block size.
  int flat_block_keys(int kv_heads) const {
    const int row_bytes = kv_heads * params_.head_dim * static_cast<int>(sizeof(T));
    const int unit = std::max(kMinFlatKeys, block_size_);
    return std::clamp(kFlatBlockBytes / row_bytes / unit, 1, kBlockKeys / unit) * unit;
  }

  // Block of the rows from `first` of a chunk's source, which is a multiple of the block size; at
  // most `limit` rows.
  void find_block(const int32_t* fields, int head, int64_t first, int64_t limit,
                  Block<T>& block) const {
    const int32_t* pages = (fields[0] >= 0 ? round_.master_pages : round_.own_pages) + fields[3];
    block.first = first;
    block.count = static_cast<int>(std::min<int64_t>(limit, kBlockKeys));
    const T* k_head = static_cast<const T*>(params_.k_pool) + head * params_.k_layout.head_stride;
    const T* v_head = static_cast<const T*>(params_.v_pool) + head * params_.v_layout.head_stride;
    int at = 0;
    for (int64_t page = first / block_size_; at < block.count; ++page) {
      const int rows = std::min(block_size_, block.count - at);
      const T* k = k_head + pages[page] * params_.k_layout.page_stride;
      const T* v = v_head + pages[page] * params_.v_layout.page_stride;
      for (int i = 0; i < rows; ++i, ++at) {
        block.keys[at] = k + i * params_.k_layout.row_stride;
        block.values[at] = v + i * params_.v_layout.row_stride;
      }
    }
    for (; at < kBlockKeys; ++at) {
      block.keys[at] = block.keys[at - 1];
      block.values[at] = block.values[at - 1];
    }
  }

  // The first block that another chunk begins with, as far as it is known without its rows.
  void guess_block(const int32_t* item, const int32_t* fields, int head, Block<T>& block) const {
    if (fields[1] == fields[2]) return;
    const int keys = is_flat(item) ? flat_block_keys(heads_at_once(item)) : kBlockKeys;
    const int32_t first = fields[1] / block_size_ * block_size_;
    find_block(fields, head, first, std::min(fields[2] - first, keys), block);
  }

  void guess_after(const AttentionTile& tile, int32_t index, int64_t next, Block<T>& block) const {
    block.count = 0;
    if (index + 1 < tile.item[3]) {
      return guess_block(tile.item, chunk(index + 1), tile.kv_head, block);
    }
    if (next < 0) return;
    const int32_t* item = item_of(next);
    if (item[2] < item[3]) guess_block(item, chunk(item[2]), head_of(next), block);
  }

  // Attention of a tile ---------------------------------------------------------------------------

  void run_tile(const AttentionTile& tile, int64_t next, Scratch& s) const {
    const int queries = tile.queries();
    std::fill_n(s.state_max, queries, -kInfinity);
    std::fill_n(s.state_sum, queries, 0.0f);
    std::fill_n(s.out, int64_t{queries} * params_.head_dim, 0.0f);
    for (int32_t index = tile.item[2]; index < tile.item[3]; ++index) {
      attend_chunk(tile, index, next, s);
    }
    const AttentionResults<T> results(params_);
    for (int h = 0; h < tile.kv_heads; ++h) {
      for (int slot = 0; slot < tile.num_rows; ++slot) {
        for (int g = 0; g < tile.heads; ++g) results.write(tile, h, slot, g, s);
      }
    }
  }

  void attend_chunk(const AttentionTile& tile, int32_t index, int64_t next, Scratch& s) const {
    const int32_t* fields = chunk(index);
    find_active_rows(params_, tile, index, s);
    if (s.num_active == 0) return;
    rotate_queries<T>(params_, tile, query_factor_, s);
    // Of one KV head.
    const int queries = s.num_active * tile.heads;
    const int stride = (queries + kLanes - 1) / kLanes * kLanes;
    const bool flat = queries <= kMaxFlatQueries;
    if (flat) {
      interleave_queries(tile.kv_heads, queries, params_.head_dim, s);
    } else {
      transpose_queries(queries, params_.head_dim, stride, s);
    }
    int32_t low = s.active[0].low;
    const int32_t high = s.active[s.num_active - 1].high;
    for (int i = 0; i < s.num_active; ++i) {
      const ActiveRow& active = s.active[i];
      low = std::min(low, active.low);
      std::fill_n(s.low + i * tile.heads, tile.heads, active.low);
      std::fill_n(s.high + i * tile.heads, tile.heads, active.high);
    }
    for_each_query(tile, s, [&](int to, int from) {
      s.max[to] = s.state_max[from];
      s.sum[to] = s.state_sum[from];
      s.out_rows[to] = s.out + from * int64_t{params_.head_dim};
    });
    if (!flat) {
      for (int i = queries; i < stride; ++i) {
        s.max[i] = s.sum[i] = 0.0f;
        s.low[i] = 0;
        s.high[i] = -1;
      }
    }

    Block<T> blocks[2];
    int current = 0;
    const int block_keys = flat ? flat_block_keys(tile.kv_heads) : kBlockKeys;
    const auto find = [&](int64_t first_key, Block<T>& block) {
      const int64_t rest = int64_t{high} + 1 - first_key;
      find_block(fields, tile.kv_head, first_key, std::min<int64_t>(rest, block_keys), block);
    };
    int64_t first = low / block_size_ * block_size_;
    find(first, blocks[0]);
    int begin = 0;  // rows before it see less far
    while (first <= high) {
      Block<T>& block = blocks[current];
      Block<T>& ahead = blocks[1 - current];
      const int64_t following = first + block_keys;
      if (following <= high) {
        find(following, ahead);
      } else {
        guess_after(tile, index, next, ahead);
      }
      while (s.active[begin].high < first) ++begin;
      int end = s.num_active;
      while (end > begin && s.active[end - 1].low >= first + block.count) --end;
      if (end > begin) {
        if (flat) {
          attend_flat(tile, {0, s.num_active, tile.heads, queries, stride}, block, ahead, s);
        } else {
          attend_tall({begin, end, tile.heads, queries, stride}, block, ahead, s);
        }
      }
      first = following;
      current = 1 - current;
    }

    for_each_query(tile, s, [&](int from, int to) {
      s.state_max[to] = s.max[from];
      s.state_sum[to] = s.sum[from];
    });
  }

  // visit(index among the queries of the chunk, index among those of the item).
  template <typename Visit>
  static void for_each_query(const AttentionTile& tile, const Scratch& s, const Visit& visit) {
    for (int h = 0; h < tile.kv_heads; ++h) {
      for (int i = 0; i < s.num_active; ++i) {
        for (int g = 0; g < tile.heads; ++g) {
          visit((h * s.num_active + i) * tile.heads + g,
                (h * tile.num_rows + s.active[i].slot) * tile.heads + g);
        }
      }
    }
  }

  // Active rows that meet a block.
  struct Rows {
    int begin, end;
    int heads;
    int queries;  // of all active rows, for one KV head
    int stride;
    int first_query() const { return begin * heads; }
    int last_query() const { return end * heads; }
  };

  // Reads the override masks of the block's pages; tells whether any row has a hidden key.
  bool find_masks(const Rows& rows, const Block<T>& block, Scratch& s) const {
    const int64_t first_page = block.first / block_size_;
    const int pages = (block.count + block_size_ - 1) / block_size_;
    int32_t any = 0;
    for (int page = 0; page < pages; ++page) {
      for (int i = rows.begin; i < rows.end; ++i) {
        const ActiveRow& active = s.active[i];
        const int64_t index = first_page + page;
        // Beyond a row's reach its use may have no more pages.
        const int32_t mask =
            active.masks && index * block_size_ <= active.high ? active.masks[index] : 0;
        any |= mask;
        for (int g = 0; g < rows.heads; ++g) s.masks[page][i * rows.heads + g] = mask;
      }
    }
    return any != 0;
  }

  bool sees_all(const Rows& rows, const Block<T>& block, const Scratch& s) const {
    // In order of `high`; `low` only differs from row to row with a window.
    if (s.active[rows.begin].high < block.first + block.count - 1) return false;
    for (int i = rows.begin; i < rows.end; ++i) {
      if (s.active[i].low > block.first) return false;
    }
    return true;
  }

  void attend_tall(const Rows& rows, const Block<T>& block, const Block<T>& ahead,
                   Scratch& s) const {
    const int begin = rows.first_query() / kLanes * kLanes;
    const int end = rows.last_query();
    const int groups = (block.count + kKeyGroup - 1) / kKeyGroup;
    const bool masked = find_masks(rows, block, s) | !sees_all(rows, block, s) |
                        (begin != rows.first_query()) | (end != rows.queries);
    const float* const* keys;
    const float* const* values;
    if constexpr (std::is_same_v<T, float>) {
      keys = block.keys;
      values = block.values;
      if (masked) {
        std::copy_n(block.values, block.count, s.value_rows);
        values = s.value_rows;
      }
    } else {
      widen_rows(block.keys, groups * kKeyGroup, s.wide_keys, s.key_rows);
      widen_rows(block.values, block.count, s.wide_values, s.value_rows);
      keys = s.key_rows;
      values = s.value_rows;
    }
    Ahead keys_ahead = rows_ahead(ahead.keys, ahead.count, 1, 0);
    Ahead values_ahead = rows_ahead(ahead.values, ahead.count, 1, 0);
    tall_block(s.query_lanes, rows.stride, keys, groups, params_.head_dim, begin, end, s.weights,
               {&keys_ahead, keys_ahead.lines()});
    if (masked) {
      std::fill_n(s.seen, block.count, false);
      // Rows that stand in the same vectors and see nothing here.
      for (int page = 0; page * block_size_ < block.count; ++page) {
        for (int i = begin; i < rows.first_query(); ++i) s.masks[page][i] = 0;
        for (int i = end; i < rows.stride; ++i) s.masks[page][i] = 0;
      }
    }
    for (int lane = begin; lane < end; lane += kFullLanes) {
      if (cap_ > 0.0f) {
        masked ? soften<true, true>(lane, rows.stride, block, s)
               : soften<false, true>(lane, rows.stride, block, s);
      } else {
        masked ? soften<true, false>(lane, rows.stride, block, s)
               : soften<false, false>(lane, rows.stride, block, s);
      }
    }
    if (masked && !replace_unseen(s.value_rows, block.count, s.seen)) return;
    const int first = rows.first_query();
    const TallWeights weights{s.weights + first, rows.stride};
    add_values_block(end - first, s.out_rows + first, s.rescale + first, weights, values, 0,
                     block.count, params_.head_dim, {&values_ahead, values_ahead.lines()});
  }

  // Softmax over the block of the rows in one vector: scores become weights.
  template <bool kMasked, bool kCapped>
  void soften(int lane, int stride, const Block<T>& block, Scratch& s) const {
    float* weights = s.weights + lane;
    const Full old_max = load_lanes<Full>(s.max + lane);
    constexpr int kMaxima = 4;  // side by side: one would wait for each of the keys in turn
    Full maxima[kMaxima];
    for (Full& max : maxima) max = old_max;
    const Full cap = repeat<Full>(cap_);
    const auto see = [&](int k, Full& max) {
      Full score = load_lanes<Full>(weights + k * stride);
      if constexpr (kCapped) score = cap * tanh(score);
      if constexpr (kMasked) {
        const int32_t bit = static_cast<int32_t>(1u << (k % block_size_));
        s.seen[k] |= hide(score, static_cast<int32_t>(block.first + k), bit, s.low + lane,
                          s.high + lane, s.masks[k / block_size_] + lane);
      }
      if constexpr (kCapped || kMasked) store_lanes(weights + k * stride, score);
      max = larger(max, score);
    };
    int k = 0;
    for (; k + kMaxima <= block.count; k += kMaxima) {
      TOKENDANCE_UNROLL
      for (int i = 0; i < kMaxima; ++i) see(k + i, maxima[i]);
    }
    for (; k < block.count; ++k) see(k, maxima[0]);
    Full max = maxima[0];
    for (int i = 1; i < kMaxima; ++i) max = larger(max, maxima[i]);
    // A row that has seen nothing yet has weights exp2(-inf - 0) = 0.
    const Full base = {max.v == -kInfinity ? Full::Floats{} : max.v};
    const Full rescale = exp2(old_max - base);
    Full sum = load_lanes<Full>(s.sum + lane) * rescale;
    for (k = 0; k < block.count; ++k) {
      const Full weight = exp2(load_lanes<Full>(weights + k * stride) - base);
      store_lanes(weights + k * stride, weight);
      sum = sum + weight;
    }
    store_lanes(s.max + lane, max);
    store_lanes(s.sum + lane, sum);
    store_lanes(s.rescale + lane, rescale);
  }

  void widen_rows(const T* const* rows, int count, float* wide, const float** wide_rows) const {
    const int head_dim = params_.head_dim;
    for (int k = 0; k < count; ++k) {
      float* to = wide + k * int64_t{head_dim};
      const T* from = rows[k];
      for (int dim = 0; dim < head_dim; dim += kFullLanes) {
        store_lanes(to + dim, load_full(from + dim));
      }
      wide_rows[k] = to;
    }
  }

  // A key that no row sees has weight 0, but its value may be NaN: a value that is seen stands in.
  // False if none is.
  template <typename Row>
  static bool replace_unseen(Row* values, int count, const bool* seen) {
    const bool* first = std::find(seen, seen + count, true);
    if (first == seen + count) return false;
    for (int k = 0; k < count; ++k) {
      if (!seen[k]) values[k] = values[first - seen];
    }
    return true;
  }

  void attend_flat(const AttentionTile& tile, const Rows& rows, Block<T>& block,
                   const Block<T>& ahead, Scratch& s) const {
    const bool masked = find_masks(rows, block, s) | !sees_all(rows, block, s);
    if (masked) {
      for (int k = 0; k < block.count; ++k) s.seen[k] = any_sees(rows, block, k, s);
      if (!replace_unseen(block.values, block.count, s.seen)) return;
    }
    // Where heads are adjacent, the lines of all heads are fetched row by row.
    HeadsAhead keys_ahead(*this, ahead.keys, ahead.count, params_.k_layout, tile.kv_heads);
    HeadsAhead values_ahead(*this, ahead.values, ahead.count, params_.v_layout, tile.kv_heads);
    for (int h = 0; h < tile.kv_heads; ++h) {
      const int first = h * rows.queries;
      const int64_t k_offset = h * params_.k_layout.head_stride;
      const int64_t v_offset = h * params_.v_layout.head_stride;
      flat_block(rows.queries, s.query_lanes + first * int64_t{params_.head_dim}, block, k_offset,
                 keys_ahead.share(h), s);
      for (int q = 0; q < rows.queries; ++q) soften_flat(first + q, q, masked, block, s);
      add_values_block(rows.queries, s.out_rows + first, s.rescale + first, FlatWeights{s.weights},
                       block.values, v_offset, block.count, params_.head_dim,
                       values_ahead.share(h));
    }
  }

  bool sees(int q, const Block<T>& block, int k, const Scratch& s) const {
    const int64_t key = block.first + k;
    const uint32_t mask = static_cast<uint32_t>(s.masks[k / block_size_][q]);
    return s.low[q] <= key && key <= s.high[q] && !(mask >> (k % block_size_) & 1);
  }

  bool any_sees(const Rows& rows, const Block<T>& block, int k, const Scratch& s) const {
    for (int q = 0; q < rows.queries; q += rows.heads) {
      if (sees(q, block, k, s)) return true;
    }
    return false;
  }

  void flat_block(int count, const float* queries, const Block<T>& block, int64_t k_offset,
                  Share share, Scratch& s) const {
    const auto scores = [&](auto constant) {
      flat_scores<decltype(constant)::value>(queries, block.keys, k_offset, block.count,
                                             params_.head_dim, s.weights, kBlockKeys, share);
    };
    static_assert(kMaxFlatQueries == 8);
    switch (count) {
      case 1:
        return scores(std::integral_constant<int, 1>{});
      case 2:
        return scores(std::integral_constant<int, 2>{});
      case 3:
        return scores(std::integral_constant<int, 3>{});
      case 4:
        return scores(std::integral_constant<int, 4>{});
      case 5:
        return scores(std::integral_constant<int, 5>{});
      case 6:
        return scores(std::integral_constant<int, 6>{});
      case 7:
        return scores(std::integral_constant<int, 7>{});
      default:
        return scores(std::integral_constant<int, 8>{});
    }
  }

  // Softmax over the block of one row, keys in the lanes.
  void soften_flat(int query, int q, bool masked, const Block<T>& block, Scratch& s) const {
    float* weights = s.weights + q * kBlockKeys;
    const int padded = (block.count + kFullLanes - 1) / kFullLanes * kFullLanes;
    if (cap_ > 0.0f) {
      for (int k = 0; k < padded; k += kFullLanes) {
        store_lanes(weights + k, repeat<Full>(cap_) * tanh(load_lanes<Full>(weights + k)));
      }
    }
    if (masked) {
      for (int k = 0; k < block.count; ++k) {
        if (!sees(q, block, k, s)) weights[k] = -kInfinity;
      }
    }
    for (int k = block.count; k < padded; ++k) weights[k] = -kInfinity;
    Full largest = load_lanes<Full>(weights);
    for (int k = kFullLanes; k < padded; k += kFullLanes) {
      largest = larger(largest, load_lanes<Full>(weights + k));
    }
    const float max = std::max(s.max[query], largest_lane(largest));
    const float base = max == -kInfinity ? 0.0f : max;
    const Full bases = repeat<Full>(base);
    Full sums = repeat<Full>(0.0f);
    for (int k = 0; k < padded; k += kFullLanes) {
      const Full weight = exp2(load_lanes<Full>(weights + k) - bases);
      store_lanes(weights + k, weight);
      sums = sums + weight;
    }
    const float rescale = max == s.max[query] ? 1.0f : exp2f(s.max[query] - base);
    s.max[query] = max;
    s.sum[query] = s.sum[query] * rescale + lane_sum(sums);
    s.rescale[query] = rescale;
  }

  const CollectiveAttentionParams& params_;
  const RoundView& round_;
  const int group_;
  const int block_size_;
  float query_factor_;  // multiplies the rotated queries
  float cap_;           // multiplies tanh of the scores, 0 = no cap
};

}  // namespace

void collective_attention(const CollectiveAttentionParams& params, ParallelFor parallel_for) {
  with_stored_element(params.pool_dtype, [&](auto element) {
    using T = decltype(element);
    const Attention<T> attention(params);
    const AttentionResults<T> results(params);
    parallel_items(parallel_for, attention.num_tasks(), [&](auto next) {
      Scratch& scratch = thread_scratch();
      const auto take = [&] {
        int64_t task = next();
        while (task >= 0 && attention.is_empty(task)) task = next();
        return task;
      };
      int64_t task = take();
      while (task >= 0) {
        const int64_t following = take();
        attention.run(task, following, scratch);
        task = following;
      }
    });
    constexpr int64_t kRowsAtOnce = 4;
    parallel_ranges(parallel_for, params.round.extents.rows, kRowsAtOnce,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t row = begin; row < end; ++row) results.merge(row);
                    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
