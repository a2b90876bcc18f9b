// The query rows that see a part of a source, rotated to where its keys stand.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <algorithm>

#include "cpu/attention_scratch.h"
#include "cpu/dtypes.h"
#include "cpu/lanes.h"

namespace tokendance::TOKENDANCE_ISA {

// Calls visit(Q{}) for the type of queries and output: T, that of keys and values, or any that is
// not quantized if T is.
template <typename T, typename Visit>
void with_query_element(DType dtype, const Visit& visit) {
  if constexpr (kIsQuantized<T>) {
    with_element(dtype, visit);
  } else {
    visit(T{});
  }
}

inline float scale_of(const float* scales, int kv_head) { return scales ? scales[kv_head] : 1.0f; }

// Finds the rows of the tile that see a part of the chunk.
inline void find_active_rows(const CollectiveAttentionParams& params, const AttentionTile& tile,
                             int32_t chunk, Scratch& s) {
  const RoundView& round = params.round;
  const int32_t* fields = round.work_chunks + chunk * kChunkFields;
  const int32_t source = fields[0], begin = fields[1], end = fields[2];
  s.num_active = 0;
  for (int slot = 0; slot < tile.num_rows; ++slot) {
    const int32_t row = tile.rows[slot];
    const int32_t agent = round.row_agent[row];
    const int32_t position = round.row_position[row];
    ActiveRow active{slot, 0, 0, position, 0, nullptr};
    int64_t low = begin, high = int64_t{end} - 1;
    if (source >= 0) {
      const int32_t use = round.work_uses[tile.use_at(chunk, slot)];
      if (use < 0) continue;
      const int64_t reach = int64_t{position} - round.use_delta[use];
      high = std::min({high, reach, int64_t{round.use_length[use]} - 1});
      if (params.window > 0) low = std::max(low, reach - params.window + 1);
      active.shift = round.use_shift[use];
      active.masks = round.use_masks + round.use_page_indptr[use];
    } else {
      if (agent != -1 - source) continue;
      const int32_t* positions = round.own_position + fields[3] * round.extents.block_size;
      const int32_t* last = positions + end;
      high = std::upper_bound(positions, last, position) - positions - 1;
      if (params.window > 0) {
        const int64_t hidden = int64_t{position} - params.window;
        low = std::max<int64_t>(low, std::partition_point(positions, last, [=](int32_t p) {
                                       return p <= hidden;
                                     }) - positions);
      }
    }
    if (high < low) continue;
    active.low = static_cast<int32_t>(low);
    active.high = static_cast<int32_t>(high);
    // Insertion keeps them in order of how far they see; mostly they come in order.
    int at = s.num_active++;
    for (; at > 0 && s.active[at - 1].high > active.high; --at) s.active[at] = s.active[at - 1];
    s.active[at] = active;
  }
}

// R(p) R(-shift).
inline void set_angles(const RopeTables& rope, const ActiveRow& row, MoveAngles& angles) {
  const int half = rope.rotary_dim / 2;
  const int64_t distance = row.shift < 0 ? -int64_t{row.shift} : row.shift;
  const float* cos_row = rope.cos + int64_t{row.position} * half;
  const float* sin_row = rope.sin + int64_t{row.position} * half;
  const float* shift_cos = rope.cos + distance * half;
  const float* shift_sin = rope.sin + distance * half;
  const F32 sign = broadcast(row.shift < 0 ? -1.0f : 1.0f);
  alignas(kCacheLine) float pairs[2 * kMaxHeadDim];
  float* cos = rope.interleaved ? pairs : angles.cos;
  float* sin = rope.interleaved ? pairs + kMaxHeadDim : angles.sin;
  for (int i = 0; i < half; i += kLanes) {
    const int n = std::min(half - i, kLanes);
    const auto read = [&](const float* p) { return n == kLanes ? load(p + i) : load(p + i, n); };
    const F32 c = read(cos_row), s = read(sin_row);
    const F32 shift_c = read(shift_cos), shift_s = mul(read(shift_sin), sign);
    store(cos + i, narrow<float>(fma_add(c, shift_c, mul(s, shift_s))));
    store(sin + i, narrow<float>(fma_sub(s, shift_c, mul(c, shift_s))));
  }
  if (rope.interleaved) {
    for (int i = 0; i < half; ++i) {
      angles.cos[2 * i] = angles.cos[2 * i + 1] = cos[i];
      angles.sin[2 * i + 1] = sin[i];
      angles.sin[2 * i] = -sin[i];
    }
  }
}

template <typename Q>
void rotate_query(const CollectiveAttentionParams& params, const Q* q, float query_factor,
                  const MoveAngles& angles, float* out) {
  const int rotary_dim = params.rope.rotary_dim;
  const F32 factor = broadcast(query_factor);
  const F32 attention_factor = broadcast(params.attention_factor);
  const auto emit = [&](int dim, F32 value, int n) {
    const Packed<float> packed = narrow<float>(mul(value, factor));
    n == kLanes ? store(out + dim, packed) : store(out + dim, packed, n);
  };
  const auto emit_rotated = [&](int dim, F32 value, int n) {
    emit(dim, mul(value, attention_factor), n);
  };
  if (rotary_dim > 0 && params.rope.interleaved) {
    rotate_head<true>(q, angles, rotary_dim, emit_rotated);
  } else if (rotary_dim > 0) {
    rotate_head<false>(q, angles, rotary_dim, emit_rotated);
  }
  for (int dim = rotary_dim; dim < params.head_dim; dim += kLanes) {
    const int n = std::min(params.head_dim - dim, kLanes);
    emit(dim, n == kLanes ? load(q + dim) : load(q + dim, n), n);
  }
}

// Queries of the active rows, [KV head][row][head], in fp32, times the factor of the scores. Own
// rows have shift 0, whose rotation leaves R(p) as it is.
template <typename T>
void rotate_queries(const CollectiveAttentionParams& params, const AttentionTile& tile,
                    float query_factor, Scratch& s) {
  with_query_element<T>(params.dtype, [&](auto element) {
    using Q = decltype(element);
    for (int i = 0; i < s.num_active; ++i) {
      const ActiveRow& active = s.active[i];
      if (params.rope.rotary_dim > 0) set_angles(params.rope, active, s.angles);
      const Q* q_row =
          static_cast<const Q*>(params.q) + tile.rows[active.slot] * params.q_row_stride;
      for (int h = 0; h < tile.kv_heads; ++h) {
        const float factor = query_factor * scale_of(params.k_scale, tile.kv_head + h);
        for (int g = 0; g < tile.heads; ++g) {
          const int64_t query = (h * s.num_active + i) * tile.heads + g;
          rotate_query(params, q_row + tile.q_head(h, g) * params.q_head_stride, factor, s.angles,
                       s.queries + query * params.head_dim);
        }
      }
    }
  });
}

// The same dims of all queries of a KV head side by side: [KV head][dims / kFullLanes][query]
// [kFullLanes].
inline void interleave_queries(int kv_heads, int queries, int head_dim, Scratch& s) {
  const float* from = s.queries;
  for (int h = 0; h < kv_heads; ++h) {
    float* head = s.query_lanes + h * int64_t{queries} * head_dim;
    for (int q = 0; q < queries; ++q, from += head_dim) {
      float* to = head + q * kFullLanes;
      for (int dim = 0; dim < head_dim; dim += kFullLanes, to += queries * kFullLanes) {
        store_lanes(to, load_lanes<Full>(from + dim));
      }
    }
  }
}

// The queries with rows in the lanes; lanes beyond the rows are zero.
inline void transpose_queries(int queries, int head_dim, int stride, Scratch& s) {
  static const float zeros[kMaxHeadDim] = {};
  for (int begin = 0; begin < stride; begin += 8) {
    const float* rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = begin + i < queries ? s.queries + (begin + i) * int64_t{head_dim} : zeros;
    }
    float* lanes = s.query_lanes + begin;
    for (int dim = 0; dim < head_dim; ++dim, lanes += stride) {
      for (int i = 0; i < 8; ++i) lanes[i] = rows[i][dim];
    }
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
