// Dense rows stored as what differs from the Masters.
//
// First the masks: a work item is a few adjacent pages of a Master, through all layers, so that it
// alone writes the mask words of those pages' uses, and the Master's rows stay in the caches near
// the core for all agents. Of each agent it reads the keys of all these pages, then the values:
// long stretches, for the hardware's prefetch; 16-bit rows that lie beyond the caches are fetched
// ahead besides. A row that has differed once is not read again in
// the layers above. Then each agent's own rows are listed in the order of positions, and last they
// are copied, page by page: each row is read once more, the others never.
#include <algorithm>

#include "cpu/move.h"
#include "cpu/parallel.h"
#include "cpu/round_pages.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

constexpr int64_t kMaxPagesOfItem = 16;
constexpr int64_t kWantedItems = 64;

// Decides whether dense rows are what restore would give.
template <bool kInterleaved, bool kExact, typename T>
class RowComparison {
 public:
  RowComparison(const DiffEncodeParams& params, LineAngles<T, kInterleaved>& angles)
      : params_(params),
        angles_(angles),
        atol_(broadcast(params.atol)),
        rtol_(broadcast(params.rtol)) {}

  // `scales` of the layer's heads, null = 1.
  bool same_key(const T* dense, const T* master, int64_t shift, const float* scales) const {
    const int rotary_dim = shift != 0 ? params_.rope.rotary_dim : 0;
    if (rotary_dim > 0) angles_.set(params_.rope, shift);
    for (int32_t head = 0; head < params_.num_heads; ++head) {
      const T* in = dense + head * params_.in_k_layout.head_stride;
      const T* held = master + head * params_.pool_k_layout.head_stride;
      Difference differs(*this, atol_of(scales, head));
      rotate_lines(held, angles_, rotary_dim, [&](int dim, const Wide<T>& value, int n) {
        differs.add(in + dim, narrow(value), n);
      });
      compare_unmoved(differs, in, held, rotary_dim);
      if (differs.found()) return false;
    }
    return true;
  }

  bool same_value(const T* dense, const T* master, const float* scales) const {
    for (int32_t head = 0; head < params_.num_heads; ++head) {
      Difference differs(*this, atol_of(scales, head));
      compare_unmoved(differs, dense + head * params_.in_v_layout.head_stride,
                      master + head * params_.pool_v_layout.head_stride, 0);
      if (differs.found()) return false;
    }
    return true;
  }

 private:
  static constexpr int kElements = kLineElements<T>;

  // Whether any element of the lines given to it differs.
  class Difference {
   public:
    Difference(const RowComparison& by, F32 atol) : by_(by), atol_(atol) {}

    // The first n elements of `moved`, which are to be those at `in`.
    TOKENDANCE_INLINE void add(const T* in, Line<T> moved, int n) {
      if (n < kElements) {
        alignas(kCacheLine) T elements[kElements];
        store_line(static_cast<T*>(elements), moved);
        add_line(load_line(in, n), load_line(static_cast<const T*>(elements), n));
      } else {
        add_line(load_line(in), moved);
      }
    }
    TOKENDANCE_INLINE bool found() const {
      if constexpr (kExact) return any(bits_);
      return beyond_;
    }

   private:
    TOKENDANCE_INLINE void add_line(Line<T> in, Line<T> moved) {
      if constexpr (kExact) {
        bits_ = either(bits_, difference(in, moved));
      } else {
        const Wide<T> found = widen(in), wanted = widen(moved);
        for (int v = 0; v < kLineVectors<T>; ++v) {
          const F32 bound =
              tokendance::TOKENDANCE_ISA::add(atol_, mul(by_.rtol_, abs(wanted.v[v])));
          beyond_ |= !all_less_equal(abs(sub(found.v[v], wanted.v[v])), bound);
        }
      }
    }

    const RowComparison& by_;
    F32 atol_;
    Line<T> bits_ = {};
    bool beyond_ = false;
  };

  // In units of the head's elements.
  TOKENDANCE_INLINE F32 atol_of(const float* scales, int32_t head) const {
    if constexpr (kIsQuantized<T>) {
      if (scales) return broadcast(params_.atol / scales[head]);
    }
    return atol_;
  }

  TOKENDANCE_INLINE void compare_unmoved(Difference& differs, const T* in, const T* held,
                                         int begin) const {
    int i = begin;
    for (; i + kElements <= params_.head_dim; i += kElements) {
      differs.add(in + i, load_line(held + i), kElements);
    }
    if (i < params_.head_dim) {
      const int n = params_.head_dim - i;
      differs.add(in + i, load_line(held + i, n), n);
    }
  }

  const DiffEncodeParams& params_;
  LineAngles<T, kInterleaved>& angles_;
  F32 atol_, rtol_;
};

// Sets in a mask word the bits of the rows of a page that differ.
template <typename T, typename Same>
TOKENDANCE_INLINE void add_differing(const DiffEncodeParams& params, const UsePage& use,
                                     const T* dense, const RowLayout& layout, int64_t rows_ahead,
                                     const Same& same) {
  const int64_t last = params.length[use.agent] - use.position - 1;
  const int64_t rows = std::min<int64_t>(use.rows, params.length[use.agent] - use.position);
  const int64_t* slots = params.slot_mapping + use.agent * params.slot_stride + use.position;
  uint32_t mask = static_cast<uint32_t>(params.round.use_masks[use.mask_index]);
  uint32_t open = row_bits(0, rows) & ~mask;
  while (open != 0) {
    const int row = __builtin_ctz(open);
    open &= open - 1;
    if (rows_ahead > 0) {
      const T* ahead = dense + row_offset(layout, slots[std::min(row + rows_ahead, last)]);
      for (int32_t head = 0; head < params.num_heads; ++head) {
        fetch_head(ahead + head * layout.head_stride, params.head_dim);
      }
    }
    if (!same(row, slots[row])) mask |= uint32_t{1} << row;
  }
  params.round.use_masks[use.mask_index] = static_cast<int32_t>(mask);
}

// The masks of pages `begin` .. `end` of a Master.
template <bool kInterleaved, bool kExact, typename T>
void encode_pages(const DiffEncodeParams& params, const MasterUses& all_uses, int64_t master,
                  int64_t begin, int64_t end, int64_t rows_ahead,
                  LineAngles<T, kInterleaved>& angles) {
  const MutableRoundView& round = params.round;
  const int32_t* pages = round.master_pages + round.master_page_indptr[master];
  const RowComparison<kInterleaved, kExact, T> comparison(params, angles);
  const std::span<const int32_t> uses = all_uses.of(master);
  const auto for_each_page = [&](int64_t use, const auto& visit) {
    for (int64_t page = begin; page < end; ++page) {
      const UsePage part = use_page(round, use, page);
      if (part.rows == 0) break;
      visit(part, int64_t{pages[page]});
    }
  };
  for (const int32_t use : uses) {
    for_each_page(use, [&](const UsePage& part, int64_t) { round.use_masks[part.mask_index] = 0; });
  }
  for (int32_t layer = 0; layer < params.num_layers; ++layer) {
    const T* k_in = static_cast<const T*>(params.in.k[layer]);
    const T* v_in = static_cast<const T*>(params.in.v[layer]);
    const T* k_pool = static_cast<const T*>(params.pool.k[layer]);
    const T* v_pool = static_cast<const T*>(params.pool.v[layer]);
    const int64_t first_head = int64_t{layer} * params.num_heads;
    const float* k_scale = params.k_scale ? params.k_scale + first_head : nullptr;
    const float* v_scale = params.v_scale ? params.v_scale + first_head : nullptr;
    for (const int32_t use : uses) {
      for_each_page(use, [&](const UsePage& part, int64_t page) {
        const T* held = k_pool + page * params.pool_k_layout.page_stride;
        add_differing(params, part, k_in, params.in_k_layout, rows_ahead,
                      [&](int row, int64_t slot) {
                        return comparison.same_key(k_in + row_offset(params.in_k_layout, slot),
                                                   held + row * params.pool_k_layout.row_stride,
                                                   part.shift, k_scale);
                      });
      });
      for_each_page(use, [&](const UsePage& part, int64_t page) {
        const T* held = v_pool + page * params.pool_v_layout.page_stride;
        add_differing(
            params, part, v_in, params.in_v_layout, rows_ahead, [&](int row, int64_t slot) {
              return comparison.same_value(v_in + row_offset(params.in_v_layout, slot),
                                           held + row * params.pool_v_layout.row_stride, v_scale);
            });
      });
    }
  }
}

// Lists the positions at which the agent needs rows of its own.
void list_own_rows(const DiffEncodeParams& params, int64_t agent) {
  const MutableRoundView& round = params.round;
  const int64_t block_size = round.extents.block_size;
  const int64_t first_page = round.own_page_indptr[agent];
  const int64_t capacity = (round.own_page_indptr[agent + 1] - first_page) * block_size;
  int32_t* positions = round.own_position + first_page * block_size;
  const int64_t length = params.length[agent];
  int64_t count = 0;
  const auto add = [&](int64_t position) {
    if (count < capacity) positions[count] = static_cast<int32_t>(position);
    ++count;
  };
  int64_t position = 0;
  for (int64_t use = round.agent_use_indptr[agent]; use < round.agent_use_indptr[agent + 1];
       ++use) {
    const int64_t delta = round.use_delta[use];
    for (; position < std::min(delta, length); ++position) add(position);
    const int64_t rows = std::min<int64_t>(round.use_length[use], length - delta);
    for (int64_t row = 0; row < rows; row += block_size) {
      uint32_t mask =
          static_cast<uint32_t>(round.use_masks[round.use_page_indptr[use] + row / block_size]) &
          row_bits(0, std::min(block_size, rows - row));
      for (; mask != 0; mask &= mask - 1) add(delta + row + __builtin_ctz(mask));
    }
    position = std::max(position, delta + rows);
  }
  for (; position < length; ++position) add(position);
  round.own_length[agent] = static_cast<int32_t>(count);
}

template <typename T>
void copy_own_page(const DiffEncodeParams& params, int64_t layer, bool is_key, int64_t index) {
  const MutableRoundView& round = params.round;
  const int64_t block_size = round.extents.block_size;
  const RowLayout& in_layout = is_key ? params.in_k_layout : params.in_v_layout;
  const RowLayout& pool_layout = is_key ? params.pool_k_layout : params.pool_v_layout;
  const RowShape shape = {params.num_heads, params.head_dim, in_layout.head_stride,
                          pool_layout.head_stride};
  const T* in = static_cast<const T*>(is_key ? params.in.k[layer] : params.in.v[layer]);
  T* page = static_cast<T*>(is_key ? params.pool.k[layer] : params.pool.v[layer]) +
            round.own_pages[index] * pool_layout.page_stride;
  const int64_t agent = list_of(round.own_page_indptr, round.extents.agents, index);
  const int64_t first = (index - round.own_page_indptr[agent]) * block_size;
  const int64_t rows = std::min<int64_t>(block_size, round.own_length[agent] - first);
  const int64_t* slots = params.slot_mapping + agent * params.slot_stride;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = slots[round.own_position[index * block_size + row]];
    copy_row<Writing::kStore>(page + row * pool_layout.row_stride, in + row_offset(in_layout, slot),
                              shape);
  }
}

}  // namespace

void diff_encode(const DiffEncodeParams& params, ParallelFor parallel_for) {
  const RoundExtents& extents = params.round.extents;
  const int64_t master_pages = params.round.master_page_indptr[extents.masters];
  const int64_t own_pages = params.round.own_page_indptr[extents.agents];
  const MasterUses uses(params.round);
  const bool exact = params.atol == 0.0f && params.rtol == 0.0f;
  with_stored_types(params.dtype, params.rope.interleaved, [&](auto element, auto interleaved) {
    using T = decltype(element);
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const int64_t row_bytes =
        int64_t{params.num_heads} * params.head_dim * static_cast<int64_t>(sizeof(T));
    int64_t dense_rows = 0;
    for (int64_t agent = 0; agent < extents.agents; ++agent) dense_rows += params.length[agent];
    const int64_t rows_ahead =
        rows_to_fetch_ahead<T>(row_bytes, dense_rows * row_bytes * 2 * params.num_layers);
    const int64_t pages_of_item =
        std::clamp<int64_t>(master_pages / kWantedItems, 1, kMaxPagesOfItem);
    const int64_t items = (master_pages + pages_of_item - 1) / pages_of_item;
    parallel_items(parallel_for, items, [&](const auto& next) {
      LineAngles<T, kInterleaved> angles;
      for (int64_t item = next(); item >= 0; item = next()) {
        int64_t begin = item * pages_of_item;
        const int64_t end = std::min(begin + pages_of_item, master_pages);
        while (begin < end) {
          const int64_t master = list_of(params.round.master_page_indptr, extents.masters, begin);
          const int64_t first = params.round.master_page_indptr[master];
          const int64_t last = std::min<int64_t>(end, params.round.master_page_indptr[master + 1]);
          if (exact) {
            encode_pages<kInterleaved, true, T>(params, uses, master, begin - first, last - first,
                                                rows_ahead, angles);
          } else {
            encode_pages<kInterleaved, false, T>(params, uses, master, begin - first, last - first,
                                                 rows_ahead, angles);
          }
          begin = last;
        }
      }
    });
    parallel_items(parallel_for, extents.agents, [&](const auto& next) {
      for (int64_t agent = next(); agent >= 0; agent = next()) list_own_rows(params, agent);
    });
    parallel_items(parallel_for, 2 * params.num_layers * own_pages, [&](const auto& next) {
      for (int64_t item = next(); item >= 0; item = next()) {
        const int64_t part = item / own_pages;
        copy_own_page<T>(params, part / 2, part % 2 == 0, item % own_pages);
      }
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
