// How far fresh keys are from the cached keys that would stand in for them.
//
// Reads every fresh and cached row once and writes one float per token: bound by memory reads.
// Tokens are taken in groups, agent by agent: while an agent's tokens keep one shift its angles are
// made once, and the cached rows of a group stay in the first-level cache for all agents. Each
// token sums over agents, heads and dims in an order that depends on neither threads nor vector
// length.
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/rotation.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

constexpr int64_t kTokensOfGroup = 8;

// Two accumulators, so that the sums of the halves of a head do not wait for each other.
struct SquaredDistance {
  F32 even, odd;
};

template <typename T>
TOKENDANCE_INLINE void add_squares(SquaredDistance& sum, int dim, F32 fresh, const T* cached,
                                   int n) {
  const F32 held = n == kLanes ? load(cached + dim) : load(cached + dim, n);
  const F32 distance = sub(fresh, held);
  F32& part = dim / kLanes % 2 ? sum.odd : sum.even;
  part = fma_add(distance, distance, part);
}

// Lanes beyond n of `fresh` are 0, as are those of a partial load.
template <bool kInterleaved, typename T>
TOKENDANCE_INLINE void add_head(SquaredDistance& sum, const T* fresh, const T* cached,
                                const MoveAngles& angles, bool rotated, F32 scale,
                                const KeyDeviationParams& params) {
  const int rotary_dim = params.rope.rotary_dim;
  if (rotated) {
    rotate_head<kInterleaved>(fresh, angles, rotary_dim, [&](int dim, F32 value, int n) {
      add_squares(sum, dim, mul(value, scale), cached, n);
    });
  } else {
    int i = 0;
    for (; i + kLanes <= rotary_dim; i += kLanes) {
      add_squares(sum, i, mul(load(fresh + i), scale), cached, kLanes);
    }
    if (i < rotary_dim) {
      const int n = rotary_dim - i;
      add_squares(sum, i, mul(load(fresh + i, n), scale), cached, n);
    }
  }
  int i = rotary_dim;
  for (; i + kLanes <= params.head_dim; i += kLanes) {
    add_squares(sum, i, load(fresh + i), cached, kLanes);
  }
  if (i < params.head_dim) {
    const int n = params.head_dim - i;
    add_squares(sum, i, load(fresh + i, n), cached, n);
  }
}

template <bool kInterleaved, typename T>
void deviation_of_group(const KeyDeviationParams& params, int64_t begin, int64_t end,
                        MoveAngles& angles) {
  const T* fresh = static_cast<const T*>(params.fresh);
  const T* cached = static_cast<const T*>(params.cached);
  const F32 scale = broadcast(params.scale);
  SquaredDistance sums[kTokensOfGroup];
  for (SquaredDistance& sum : sums) sum = {broadcast(0.0f), broadcast(0.0f)};
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
      SquaredDistance sum = sums[token - begin];
      for (int32_t head = 0; head < params.num_heads; ++head) {
        add_head<kInterleaved>(sum, fresh_row + head * params.fresh_layout.head_stride,
                               cached_row + head * params.cached_layout.head_stride, angles,
                               rotated, scale, params);
      }
      sums[token - begin] = sum;
    }
  }
  for (int64_t token = begin; token < end; ++token) {
    const SquaredDistance& sum = sums[token - begin];
    params.deviation[token] = sum_of_lanes(add(sum.even, sum.odd));
  }
}

}  // namespace

void key_deviation(const KeyDeviationParams& params, ParallelFor parallel_for) {
  with_types(params.dtype, params.rope.interleaved, [&](auto element, auto interleaved) {
    const int64_t groups = (params.num_tokens + kTokensOfGroup - 1) / kTokensOfGroup;
    parallel_ranges(parallel_for, groups, 1, [&](int64_t begin, int64_t end) {
      MoveAngles angles;
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kTokensOfGroup;
        const int64_t last = first + kTokensOfGroup;
        deviation_of_group<decltype(interleaved)::value, decltype(element)>(
            params, first, last < params.num_tokens ? last : params.num_tokens, angles);
      }
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
