// How far fresh keys are from the cached keys that would stand in for them.
//
// Reads every fresh and cached row once and writes one float per token: bound by memory reads
// beyond the caches, where 16-bit rows are fetched ahead, and by widening and rotating inside them.
// Tokens are taken in groups, agent by agent: while an agent's tokens keep one shift its angles are
// made once and stay in registers for a row, and the cached rows of a group stay in the caches near
// the core for all agents. Long groups let the hardware's prefetch get going on each agent's rows;
// short rounds have short ones, to keep all threads busy. Each token sums over agents, heads and
// dims in an order that depends on neither threads nor vector length nor group.
#include <algorithm>
#include <type_traits>

#include "cpu/move.h"
#include "cpu/parallel.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

constexpr int64_t kMaxTokensOfGroup = 256;
constexpr int64_t kWantedGroups = 32;

// Adds up the squared distance of two lines per vector of a line, so that no sum waits for another.
template <typename T>
struct SquaredDistance {
  F32 v[kLineVectors<T>];

  TOKENDANCE_INLINE void add(const Wide<T>& fresh, const Wide<T>& cached) {
    for (int i = 0; i < kLineVectors<T>; ++i) {
      const F32 distance = sub(fresh.v[i], cached.v[i]);
      v[i] = fma_add(distance, distance, v[i]);
    }
  }
};

template <typename T>
TOKENDANCE_INLINE Wide<T> load_wide(const T* p, int n) {
  return widen(n == kLineElements<T> ? load_line(p) : load_line(p, n));
}

// What one row of fresh keys adds. Elements beyond n of a line are 0 in both keys: rotating zeros
// by any angle gives zeros.
template <bool kScaled, typename T>
class RowDeviation {
 public:
  RowDeviation(const KeyDeviationParams& params, const T* fresh, const T* cached, const T* ahead)
      : params_(params),
        fresh_(fresh),
        cached_(cached),
        ahead_(ahead),
        scale_(broadcast(params.attention_factor)) {}

  // Heads that are not rotated.
  TOKENDANCE_INLINE void add(SquaredDistance<T>& sum) const {
    for_each_head(sum, [&](const T* fresh, const auto& add_scaled) {
      for_each_line(0, params_.rope.rotary_dim,
                    [&](int i, int n) { add_scaled(i, load_wide(fresh + i, n), n); });
    });
  }
  template <bool kInterleaved>
  TOKENDANCE_INLINE void add_rotated(SquaredDistance<T>& sum,
                                     const LineAngles<T, kInterleaved>& angles) const {
    for_each_head(sum, [&](const T* fresh, const auto& add_scaled) {
      rotate_lines(fresh, angles, params_.rope.rotary_dim, add_scaled);
    });
  }
  template <int kHalfLines>
  TOKENDANCE_INLINE void add_rotated(SquaredDistance<T>& sum,
                                     const RegisterAngles<T, kHalfLines>& angles) const {
    for_each_head(sum, [&](const T* fresh, const auto& add_scaled) {
      rotate_lines(fresh, angles, add_scaled);
    });
  }

 private:
  // Calls add_rotary(fresh head, add_scaled) per head, then adds what stands beyond rotary_dim.
  template <typename AddRotary>
  TOKENDANCE_INLINE void for_each_head(SquaredDistance<T>& total,
                                       const AddRotary& add_rotary) const {
    SquaredDistance<T> sum = total;
    for (int32_t head = 0; head < params_.num_heads; ++head) {
      const T* fresh = fresh_ + head * params_.fresh_layout.head_stride;
      const T* cached = cached_ + head * params_.cached_layout.head_stride;
      if (ahead_) fetch_head(ahead_ + head * params_.fresh_layout.head_stride, params_.head_dim);
      add_rotary(fresh, [&](int dim, const Wide<T>& value, int n) {
        const Wide<T> scaled =
            kScaled ? per_vector<T>([&](int v) { return mul(value.v[v], scale_); }) : value;
        sum.add(scaled, load_wide(cached + dim, n));
      });
      for_each_line(params_.rope.rotary_dim, params_.head_dim, [&](int i, int n) {
        sum.add(load_wide(fresh + i, n), load_wide(cached + i, n));
      });
    }
    total = sum;
  }
  template <typename Visit>
  TOKENDANCE_INLINE static void for_each_line(int begin, int end, const Visit& visit) {
    for (; begin + kLineElements<T> <= end; begin += kLineElements<T>) {
      visit(begin, kLineElements<T>);
    }
    if (begin < end) visit(begin, end - begin);
  }

  const KeyDeviationParams& params_;
  const T *fresh_, *cached_, *ahead_;
  const F32 scale_;
};

template <bool kScaled, bool kInterleaved, typename T>
void deviation_of_group(const KeyDeviationParams& params, int64_t begin, int64_t end,
                        LineAngles<T, kInterleaved>& angles) {
  const T* fresh = static_cast<const T*>(params.fresh);
  const T* cached = static_cast<const T*>(params.cached);
  const int64_t row_bytes =
      int64_t{params.num_heads} * params.head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t rows_ahead = rows_to_fetch_ahead<T>(
      row_bytes, row_bytes * params.num_tokens * (int64_t{params.num_agents} + 1));
  // Of half of a head's rotary dims, if they are whole lines.
  const int half = params.rope.rotary_dim / 2;
  const int half_lines = half % kLineElements<T> == 0 ? half / kLineElements<T> : 0;
  const int64_t last_entry = int64_t{params.num_agents} * params.num_tokens - 1;
  SquaredDistance<T> sums[kMaxTokensOfGroup];
  for (int64_t token = begin; token < end; ++token) {
    for (F32& part : sums[token - begin].v) part = broadcast(0.0f);
  }
  for (int64_t agent = 0; agent < params.num_agents; ++agent) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t entry = agent * params.num_tokens + token;
      if (params.fresh_row[entry] < 0) continue;
      const T* fresh_row = fresh + row_offset(params.fresh_layout, params.fresh_row[entry]);
      const T* cached_row = cached + row_offset(params.cached_layout, params.cached_row[token]);
      const int64_t shift = int64_t{params.cached_position[token]} -
                            (params.fresh_position ? params.fresh_position[entry] : 0);
      const bool rotated = shift != 0 && params.rope.rotary_dim > 0;
      if (rotated) angles.set(params.rope, shift);
      const int64_t later =
          rows_ahead > 0 ? params.fresh_row[std::min(entry + rows_ahead, last_entry)] : -1;
      const T* ahead = later < 0 ? nullptr : fresh + row_offset(params.fresh_layout, later);
      const RowDeviation<kScaled, T> row(params, fresh_row, cached_row, ahead);
      SquaredDistance<T>& sum = sums[token - begin];
      if (!rotated) {
        row.add(sum);
        continue;
      }
      if constexpr (!kInterleaved) {
        if (half_lines == 1) {
          row.add_rotated(sum, RegisterAngles<T, 1>(angles));
          continue;
        }
        if (half_lines == 2) {
          row.add_rotated(sum, RegisterAngles<T, 2>(angles));
          continue;
        }
        if (half_lines == 4) {
          row.add_rotated(sum, RegisterAngles<T, 4>(angles));
          continue;
        }
      }
      row.add_rotated(sum, angles);
    }
  }
  for (int64_t token = begin; token < end; ++token) {
    F32 sum = sums[token - begin].v[0];
    for (int i = 1; i < kLineVectors<T>; ++i) sum = add(sum, sums[token - begin].v[i]);
    params.deviation[token] = sum_of_lanes(sum);
  }
}

}  // namespace

void key_deviation(const KeyDeviationParams& params, ParallelFor parallel_for) {
  with_types(params.dtype, params.rope.interleaved, [&](auto element, auto interleaved) {
    using T = decltype(element);
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const int64_t tokens_of_group =
        std::clamp<int64_t>(params.num_tokens / kWantedGroups, 1, kMaxTokensOfGroup);
    const int64_t groups = (params.num_tokens + tokens_of_group - 1) / tokens_of_group;
    parallel_ranges(parallel_for, groups, 1, [&](int64_t begin, int64_t end) {
      LineAngles<T, kInterleaved> angles;
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * tokens_of_group;
        const int64_t last = std::min(first + tokens_of_group, params.num_tokens);
        if (params.attention_factor == 1.0f) {
          deviation_of_group<false, kInterleaved, T>(params, first, last, angles);
        } else {
          deviation_of_group<true, kInterleaved, T>(params, first, last, angles);
        }
      }
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
