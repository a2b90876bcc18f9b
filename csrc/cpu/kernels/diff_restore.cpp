// Mirrors written out as dense rows.
//
// A work item is one page of one layer, keys and values. A Master page is read once and written for
// every agent that uses it while it is in cache, so that N agents cost N writes and one read: a
// restore that copies the Master per agent first would read N times and write twice. Nothing dense
// is kept in between: a row goes from its page through registers to its slot. Rows that are
// streamed are written key and value in turn: a key is turned while the value before it drains to
// memory.
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/move.h"
#include "cpu/parallel.h"
#include "cpu/round_pages.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

struct Restore {
  const DiffRestoreParams& params;
  MasterUses uses;
  MoveContext keys;
  RowShape values;
  Writing writing;
  int64_t master_pages;  // pages of all Masters
  int64_t pages;         // and of all own rows
};

// The slots of an agent's rows from `position` on.
const int64_t* slots_of(const DiffRestoreParams& params, int64_t agent, int64_t position) {
  return params.slot_mapping + agent * params.slot_stride + position;
}

// Calls write(row of the page, out row) for the rows `wanted` that have a slot.
template <typename Write>
TOKENDANCE_INLINE void for_each_slot(const DiffRestoreParams& params, int64_t agent,
                                     int64_t position, uint32_t wanted, const Write& write) {
  while (wanted != 0) {
    const int row = __builtin_ctz(wanted);
    wanted &= wanted - 1;
    const int64_t slot = *slots_of(params, agent, position + row);
    if (slot >= 0) write(row, slot);
  }
}

// Calls restore(row of the page, slot, shift) for every row of a Master page, agent by agent.
template <typename Write>
void restore_master_page(const Restore& restore, int64_t index, const Write& write) {
  const DiffRestoreParams& params = restore.params;
  const RoundView& round = params.round;
  const int64_t master = list_of(round.master_page_indptr, round.extents.masters, index);
  const int64_t page = index - round.master_page_indptr[master];
  for (const int32_t index_of_use : restore.uses.of(master)) {
    const UsePage use = use_page(round, index_of_use, page);
    if (use.rows == 0) continue;
    const int64_t inside = std::min<int64_t>(use.rows, params.max_length - use.position);
    const uint32_t wanted = row_bits(use.position < 0 ? -use.position : 0, inside) &
                            ~static_cast<uint32_t>(round.use_masks[use.mask_index]);
    for_each_slot(params, use.agent, use.position, wanted,
                  [&](int row, int64_t slot) { write(row, slot, use.shift); });
  }
}

template <typename Write>
void restore_own_page(const Restore& restore, int64_t index, const Write& write) {
  const DiffRestoreParams& params = restore.params;
  const RoundView& round = params.round;
  const int64_t block_size = round.extents.block_size;
  const int64_t agent = list_of(round.own_page_indptr, round.extents.agents, index);
  const int64_t first = (index - round.own_page_indptr[agent]) * block_size;
  const int64_t rows = std::min<int64_t>(block_size, round.own_length[agent] - first);
  const int32_t* positions = round.own_position + index * block_size;
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0 || positions[row] >= params.max_length) continue;
    const int64_t slot = *slots_of(params, agent, positions[row]);
    if (slot >= 0) write(row, slot, 0);
  }
}

// Page `index` of all Masters' and own pages: its id in the pool.
int64_t page_of(const Restore& restore, int64_t index) {
  const RoundView& round = restore.params.round;
  return index < restore.master_pages ? round.master_pages[index]
                                      : round.own_pages[index - restore.master_pages];
}

// Calls write(row of the page, slot, shift) for every row of the page that is restored.
template <typename Write>
TOKENDANCE_INLINE void restore_rows(const Restore& restore, int64_t index, const Write& write) {
  if (index >= restore.master_pages) {
    restore_own_page(restore, index - restore.master_pages, write);
  } else {
    restore_master_page(restore, index, write);
  }
}

template <bool kInterleaved, typename T>
void restore_page(const Restore& restore, int64_t layer, int64_t index,
                  LineAngles<T, kInterleaved>& angles) {
  const DiffRestoreParams& params = restore.params;
  const int64_t page = page_of(restore, index);
  const T* keys =
      static_cast<const T*>(params.pool.k[layer]) + page * params.pool_k_layout.page_stride;
  const T* values =
      static_cast<const T*>(params.pool.v[layer]) + page * params.pool_v_layout.page_stride;
  T* out_k = static_cast<T*>(params.out.k[layer]);
  T* out_v = static_cast<T*>(params.out.v[layer]);
  with_writing(restore.writing, [&](auto how) {
    constexpr Writing kWriting = decltype(how)::value;
    const auto write_key = [&](int64_t row, int64_t slot, int64_t shift) {
      move_row<kWriting>(out_k + row_offset(params.out_k_layout, slot),
                         keys + row * params.pool_k_layout.row_stride, shift, restore.keys, angles);
    };
    const auto write_value = [&](int64_t row, int64_t slot, int64_t) {
      copy_row<kWriting>(out_v + row_offset(params.out_v_layout, slot),
                         values + row * params.pool_v_layout.row_stride, restore.values);
    };
    if constexpr (kWriting == Writing::kStore) {
      restore_rows(restore, index, write_key);
      restore_rows(restore, index, write_value);
    } else {
      restore_rows(restore, index, [&](int64_t row, int64_t slot, int64_t shift) {
        write_key(row, slot, shift);
        write_value(row, slot, shift);
      });
      finish_streaming();
    }
  });
}

// A page of a quantized pool, read out in another dtype.
void convert_page(const Restore& restore, const RowConversion& keys, const RowConversion& values,
                  int64_t layer, int64_t index, MoveAngles& angles) {
  const DiffRestoreParams& params = restore.params;
  const int64_t page = page_of(restore, index);
  const int64_t first_head = layer * params.num_heads;
  const HeadScales k_scales = {params.k_scale ? params.k_scale + first_head : nullptr, nullptr};
  const HeadScales v_scales = {params.v_scale ? params.v_scale + first_head : nullptr, nullptr};
  const RowLayout &k_layout = params.pool_k_layout, &v_layout = params.pool_v_layout;
  restore_rows(restore, index, [&](int64_t row, int64_t slot, int64_t shift) {
    keys.move(
        keys.out_row(params.out.k[layer], row_offset(params.out_k_layout, slot)),
        keys.in_row(params.pool.k[layer], page * k_layout.page_stride + row * k_layout.row_stride),
        shift, k_scales, angles);
  });
  restore_rows(restore, index, [&](int64_t row, int64_t slot, int64_t) {
    values.copy(values.out_row(params.out.v[layer], row_offset(params.out_v_layout, slot)),
                values.in_row(params.pool.v[layer],
                              page * v_layout.page_stride + row * v_layout.row_stride),
                v_scales);
  });
}

// An upper bound: what is hidden or has no slot is not written.
int64_t restored_rows(const RoundView& round) {
  int64_t rows = 0;
  for (int64_t use = 0; use < round.agent_use_indptr[round.extents.agents]; ++use) {
    rows += round.use_length[use];
  }
  for (int64_t agent = 0; agent < round.extents.agents; ++agent) rows += round.own_length[agent];
  return rows;
}

}  // namespace

void diff_restore(const DiffRestoreParams& params, ParallelFor parallel_for) {
  const RoundExtents& extents = params.round.extents;
  const int64_t master_pages = params.round.master_page_indptr[extents.masters];
  Restore restore{.params = params,
                  .uses = MasterUses(params.round),
                  .keys = {params.rope,
                           {params.num_heads, params.head_dim, params.pool_k_layout.head_stride,
                            params.out_k_layout.head_stride},
                           1.0f},
                  .values = {params.num_heads, params.head_dim, params.pool_v_layout.head_stride,
                             params.out_v_layout.head_stride},
                  .writing = Writing::kStream,
                  .master_pages = master_pages,
                  .pages = master_pages + params.round.own_page_indptr[extents.agents]};
  if (params.dtype != params.out_dtype) {
    const RowConversion keys(params.dtype, params.out_dtype, params.rope, restore.keys.shape, 1.0f);
    const RowConversion values(params.dtype, params.out_dtype, params.rope, restore.values, 1.0f);
    return parallel_items(parallel_for, params.num_layers * restore.pages, [&](const auto& next) {
      MoveAngles angles;
      for (int64_t item = next(); item >= 0; item = next()) {
        convert_page(restore, keys, values, item / restore.pages, item % restore.pages, angles);
      }
    });
  }
  with_stored_types(params.dtype, params.rope.interleaved, [&](auto element, auto interleaved) {
    using T = decltype(element);
    const int64_t row_bytes =
        int64_t{params.num_heads} * params.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t bytes = restored_rows(params.round) * row_bytes * 2 * params.num_layers;
    for (int32_t layer = 0; layer < params.num_layers; ++layer) {
      restore.writing =
          std::max({restore.writing,
                    choose_writing<T>(params.out.k[layer], params.out_k_layout, restore.keys.shape,
                                      written_part(params.rope), bytes),
                    choose_writing<T>(params.out.v[layer], params.out_v_layout, restore.values,
                                      params.head_dim, bytes)});
    }
    parallel_items(parallel_for, params.num_layers * restore.pages, [&](const auto& next) {
      LineAngles<T, decltype(interleaved)::value> angles;
      for (int64_t item = next(); item >= 0; item = next()) {
        restore_page<decltype(interleaved)::value, T>(restore, item / restore.pages,
                                                      item % restore.pages, angles);
      }
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
