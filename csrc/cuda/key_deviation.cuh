// key_deviation: how far fresh keys are from cached ones, per token, over a group of agents.
//
// Bytes of N agents at 16 bits: (N + 1) * 2 * Hk * D a token, the cached row once for the group,
// and a row of the tables per agent and token, which all heads share through L1. FLOPs: 6 per fresh
// element (3 to rotate, 3 to compare): 3 FLOP/byte, against 9.6 (A100: 19.5 TFLOPS fp32, 2039 GB/s)
// and 14 (H200: 67 TFLOPS, 4800 GB/s; datasheets): bound by memory.
//
// A warp a token, so that no sum crosses a warp; 4 heads of 128 at 16 bits are one task for each
// lane. With a latency of 700 ns (assumed) an H200's share of 36 bytes/ns holds 25 KB under way.
// Two blocks of 256 threads, each with 32 bytes of two agents' keys, ask for 32 KB before they
// wait. On sm_100 and sm_120 registers leave room for one block of the wide kernels: 16 KB.
#pragma once

#include "cuda/key_deviation_plan.h"
#include "cuda/move.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

constexpr int kAgentsAhead = 2;  // whose keys and angles are under way

// Where an agent's fresh key of a token is.
struct FreshNumber {
  int64_t row;
  int32_t position;
};

// A lane's share of an agent's fresh key, and what it is turned by.
template <typename T, int V>
struct FreshKey {
  bool exists;
  int32_t shift;
  Vector<T, V> x, y;
  Angles<V> angles;
};

// A warp has one token: a lane has a task of the row, holds the cached key's share of it in
// registers and goes through the agents. Sums are taken in one order, so that results repeat.
//
// While one agent's key is compared, those of the next ones are under way with their angles, and
// the numbers of the agents after them.
template <typename T, int V, bool kInterleaved>
__device__ __forceinline__ void key_deviation(const KeyDeviationParams& p, const Tile& tile) {
  const int64_t token = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
  if (token >= p.num_tokens) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  const int32_t tasks_of_head = static_cast<int32_t>(tile.head.value);
  auto number_of = [&](int32_t agent) {
    FreshNumber number = {};
    if (agent < p.num_agents) {
      const int64_t entry = agent * p.num_tokens + token;
      number.row = __ldg(p.fresh_row + entry);
      if (p.fresh_position) number.position = __ldg(p.fresh_position + entry);
    }
    return number;
  };
  FreshNumber first_numbers[kAgentsAhead];
#pragma unroll
  for (int i = 0; i < kAgentsAhead; ++i) first_numbers[i] = number_of(i);
  const int64_t cached_row = __ldg(p.cached_row + token);
  const int32_t position = __ldg(p.cached_position + token);
  const bool is_cached = cached_row >= 0 && cached_row < p.cached_layout.num_rows;
  const int32_t tasks = is_cached ? p.num_heads * tasks_of_head : 0;
  const T* const cached_token =
      static_cast<const T*>(p.cached) + row_offset(p.cached_layout, tile.other_page, cached_row);

  float deviation = 0.0f;
#pragma unroll 1
  for (int32_t index = lane; index < tasks; index += kWarpSize) {
    const auto head = static_cast<int32_t>(quotient(static_cast<uint32_t>(index), tile.head));
    const auto task = MoveTask<V, kInterleaved>::make(index - head * tasks_of_head, p.head_dim,
                                                      p.rope.rotary_dim);
    auto load_key = [&](int32_t agent, const FreshNumber& number) {
      FreshKey<T, V> key;
      key.exists = make_shift(p.rope, position, number.position, &key.shift) &&
                   agent < p.num_agents && number.row >= 0 && number.row < p.fresh_layout.num_rows;
      if (!key.exists) return key;
      const T* const fresh = static_cast<const T*>(p.fresh) +
                             row_offset(p.fresh_layout, tile.in_page, number.row) +
                             head * p.fresh_layout.head_stride;
      key.x = load_vector<T, V>(fresh + task.first);
      key.y = load_vector<T, V>(fresh + task.second);
      if (task.rotates && key.shift != 0) {
        key.angles = task.load_angles(p.rope, abs(key.shift));
      }
      return key;
    };

    const T* const cached = cached_token + head * p.cached_layout.head_stride;
    const Vector<T, V> cached_x = load_vector<T, V>(cached + task.first);
    const Vector<T, V> cached_y = load_vector<T, V>(cached + task.second);
    FreshKey<T, V> key[kAgentsAhead];
    FreshNumber number[kAgentsAhead];
#pragma unroll
    for (int i = 0; i < kAgentsAhead; ++i) {
      key[i] = load_key(i, first_numbers[i]);
      number[i] = number_of(kAgentsAhead + i);
    }
#pragma unroll 1
    for (int32_t first = 0; first < p.num_agents; first += kAgentsAhead) {
#pragma unroll
      for (int i = 0; i < kAgentsAhead; ++i) {
        if (key[i].exists) {
          float fresh_x[V], fresh_y[V], x[V], y[V];
          unpack(key[i].x, fresh_x);
          unpack(key[i].y, fresh_y);
          if (task.rotates && key[i].shift != 0)
            task.rotate(key[i].angles.of_shift(key[i].shift), fresh_x, fresh_y);
          if (task.rotates && p.attention_factor != 1.0f)
            task.multiply(p.attention_factor, fresh_x, fresh_y);
          unpack(cached_x, x);
          unpack(cached_y, y);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float x_difference = fresh_x[j] - x[j];
            deviation = fmaf(x_difference, x_difference, deviation);
            const float y_difference = fresh_y[j] - y[j];
            deviation = fmaf(y_difference, y_difference, deviation);
          }
        }
        const int32_t following = first + kAgentsAhead + i;
        key[i] = load_key(following, number[i]);
        number[i] = number_of(following + kAgentsAhead);
      }
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    deviation += __shfl_xor_sync(0xffffffffu, deviation, distance);
  }
  if (lane == 0) p.deviation[token] = deviation;
}

}  // namespace tokendance::cuda
