// key_deviation: how far fresh keys are from cached ones, per token, over a group of agents.
//
// Bytes of N agents at 16 bits: (N + 1) * 2 * Hk * D a token, the cached row once for the group,
// and a row of the tables per agent and token, which all heads share through L1. FLOPs: 6 per fresh
// element (3 to rotate, 3 to compare): 3 FLOP/byte, against 9.6 (A100: 19.5 TFLOPS fp32, 2039 GB/s)
// and 20 (H100: 67 TFLOPS, 3350 GB/s; datasheets): bound by memory.
//
// A warp a token, so that no sum crosses a warp; 4 heads of 128 at 16 bits are one task for each
// lane. 97 registers at most on sm_80 and 106 on sm_90, no spills, no shared memory: two blocks of
// 256 threads, 16 of 64 warps with two agents' rows under way each, that is up to 32 KB of loads.
// With a latency of 700 ns (assumed) H100's share of 25 bytes/ns needs 18 KB: blocks may spend
// nearly half of their time waiting for row numbers and angles.
#pragma once

#include "cuda/key_deviation_plan.h"
#include "cuda/move.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

constexpr int kAgentsAtOnce = 2;  // whose rows are under way together

// A warp has one token: a lane has a task of the row, holds the cached key's share of it in
// registers and goes through the agents. Sums are taken in one order, so that results repeat.
template <typename T, int V, bool kInterleaved>
__device__ __forceinline__ void key_deviation(const KeyDeviationParams& p) {
  const int64_t token = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
  if (token >= p.num_tokens) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  const int32_t tasks_of_head = move_tasks_of_head(p.head_dim, V);
  const int64_t cached_row = __ldg(p.cached_row + token);
  const bool is_cached = cached_row >= 0 && cached_row < p.cached_layout.num_rows;
  const int32_t tasks = is_cached ? p.num_heads * tasks_of_head : 0;
  const int64_t position = __ldg(p.cached_position + token);

  float deviation = 0.0f;
#pragma unroll 1
  for (int32_t index = lane; index < tasks; index += kWarpSize) {
    const int32_t head = index / tasks_of_head;
    const auto task =
        MoveTask<V, kInterleaved>::make(index % tasks_of_head, p.head_dim, p.rope.rotary_dim);
    const T* const cached = static_cast<const T*>(p.cached) +
                            row_offset(p.cached_layout, cached_row) +
                            head * p.cached_layout.head_stride;
    float cached_x[V], cached_y[V];
    unpack(load_vector<T, V>(cached + task.first), cached_x);
    unpack(load_vector<T, V>(cached + task.second), cached_y);

#pragma unroll 1
    for (int32_t first = 0; first < p.num_agents; first += kAgentsAtOnce) {
      Vector<T, V> x[kAgentsAtOnce], y[kAgentsAtOnce];
      int64_t shift[kAgentsAtOnce];
      bool has_token[kAgentsAtOnce];
      // All their rows before any is waited for, then all their keys.
      int64_t row[kAgentsAtOnce];
#pragma unroll
      for (int i = 0; i < kAgentsAtOnce; ++i) {
        has_token[i] = i == 0 || first + i < p.num_agents;
        const int64_t agent = has_token[i] ? first + i : first;
        const int64_t entry = agent * p.num_tokens + token;
        row[i] = __ldg(p.fresh_row + entry);
        shift[i] = position - (p.fresh_position ? __ldg(p.fresh_position + entry) : 0);
      }
#pragma unroll
      for (int i = 0; i < kAgentsAtOnce; ++i) {
        has_token[i] = has_token[i] && row[i] >= 0 && row[i] < p.fresh_layout.num_rows &&
                       has_angles(p.rope, shift[i]);
        if (!has_token[i]) continue;
        const T* const fresh = static_cast<const T*>(p.fresh) + row_offset(p.fresh_layout, row[i]) +
                               head * p.fresh_layout.head_stride;
        x[i] = load_vector<T, V>(fresh + task.first);
        y[i] = load_vector<T, V>(fresh + task.second);
      }
#pragma unroll
      for (int i = 0; i < kAgentsAtOnce; ++i) {
        if (!has_token[i]) continue;
        float fresh_x[V], fresh_y[V];
        unpack(x[i], fresh_x);
        unpack(y[i], fresh_y);
        if (task.rotates && shift[i] != 0) {
          task.rotate(task.load_angles(p.rope, llabs(shift[i]), shift[i] < 0), fresh_x, fresh_y);
        }
        if (task.rotates && p.attention_factor != 1.0f)
          task.multiply(p.attention_factor, fresh_x, fresh_y);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float x_difference = fresh_x[j] - cached_x[j];
          deviation = fmaf(x_difference, x_difference, deviation);
          const float y_difference = fresh_y[j] - cached_y[j];
          deviation = fmaf(y_difference, y_difference, deviation);
        }
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
