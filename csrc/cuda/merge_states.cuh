// merge_states: partial attention outputs become one, weighted by their log-sum-exp.
//
// Bytes of R rows, H heads, K partials at 16 bits: R * H * (K + 1) * (2 * D + 4). FLOPs: 2 per
// element read: 1 FLOP/byte, bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H100: 67 TFLOPS,
// 3350 GB/s; datasheets).
//
// Why 256 threads. A thread has 16 bytes of one head, so that the lanes of a head read whole lines
// of every partial, and nothing passes between threads: a block is as many whole heads as 256
// threads hold. Four partials are under way at once, for few rows make few blocks. 48 registers at
// most, no spills, no shared memory: five blocks and more, at least 40 of 64 warps.
#pragma once

#include "cuda/merge_states_plan.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A thread has one vector of one row and head. All threads of a head compute the same weights:
// their loads of the LSEs are broadcasts. Heads of all rows are counted in 32 bits: with one
// partial, 2^32 of the smallest (128 bytes, in and out) are 1 TiB.
template <typename T, int V>
__device__ __forceinline__ void merge_states(const MergeStatesParams& p, const Tile& tile) {
  const int32_t vectors = p.head_dim / V;
  const int32_t head_of_block = static_cast<int32_t>(threadIdx.x) / vectors;
  const int32_t vector = static_cast<int32_t>(threadIdx.x) % vectors;
  const uint32_t head_of_all = blockIdx.x * tile.heads + head_of_block;
  const int64_t head = head_of_all;
  const int64_t heads = p.num_rows * p.num_heads;
  if (head_of_block >= tile.heads || head >= heads) return;

  // Loads of several partials at once: one after the other, their latencies would add up. The last
  // partial stands in for those beyond the end, with a weight of 0.
  constexpr int kBatch = 4;
  const int32_t partials = static_cast<int32_t>(p.num_partials);
  float highest = -INFINITY;
#pragma unroll 1
  for (int32_t k = 0; k < partials; k += kBatch) {
    float lse[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      lse[j] = __ldg(p.partial_lse + min(k + j, partials - 1) * heads + head);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) highest = fmaxf(highest, lse[j]);
  }
  // Where nothing was seen, all weights are exp(-inf - 0) = 0.
  const float base = highest == -INFINITY ? 0.0f : highest;
  float sum = 0.0f;
  float merged[V] = {};
  const T* const partial = static_cast<const T*>(p.partial_out) + head * p.head_dim + vector * V;
#pragma unroll 1
  for (int32_t first = 0; first < partials; first += kBatch) {
    float lse[kBatch];
    Vector<T, V> part[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t place = min(first + j, partials - 1) * heads;
      lse[j] = __ldg(p.partial_lse + place + head);
      part[j] = load_vector<T, V>(partial + place * p.head_dim);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float weight = j == 0 || first + j < partials ? expf(lse[j] - base) : 0.0f;
      if (weight == 0.0f) continue;  // it saw nothing, whatever its output holds
      float value[V];
      unpack(part[j], value);
#pragma unroll
      for (int i = 0; i < V; ++i) merged[i] = fmaf(weight, value[i], merged[i]);
      sum += weight;
    }
  }
  // Where nothing was seen the sum is 0, and so is the output; elsewhere it is 1 at least, or NaN.
  const float total = p.sinks ? sum + expf(__ldg(p.sinks + head_of_all % p.num_heads) - base) : sum;
#pragma unroll
  for (int i = 0; i < V; ++i) merged[i] = sum == 0.0f ? 0.0f : merged[i] / total;
  Vector<T, V> out;
  pack(merged, &out);
  store_vector<T, V>(static_cast<T*>(p.out) + head * p.head_dim + vector * V, out);
  if (vector == 0) p.lse[head] = base + logf(sum);  // log(0) = -inf
}

}  // namespace tokendance::cuda
