// merge_states: partial attention outputs become one, weighted by their log-sum-exp.
//
// Bytes of R rows, H heads, K partials at 16 bits: R * H * (K + 1) * (2 * D + 4). FLOPs: 2 per
// element read: 1 FLOP/byte, bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H100: 67 TFLOPS,
// 3350 GB/s; datasheets).
//
// Why 256 threads. A thread has 16 bytes of one head, so that the lanes of a head read whole lines
// of every partial, and nothing passes between threads: a block is as many whole heads as 256
// threads hold. 32 registers, no spills, no shared memory: eight blocks, all 64 warps.
#pragma once

#include "cuda/merge_states_plan.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A thread has one vector of one row and head. All threads of a head compute the same weights:
// their loads of the LSEs are broadcasts. Heads of all rows are counted in 32 bits, in which there
// are more of them than any device's memory holds.
template <typename T, int V>
__device__ __forceinline__ void merge_states(const MergeStatesParams& p, const Tile& tile) {
  const int32_t vectors = p.head_dim / V;
  const int32_t head_of_block = static_cast<int32_t>(threadIdx.x) / vectors;
  const int32_t vector = static_cast<int32_t>(threadIdx.x) % vectors;
  const uint32_t head_of_all = blockIdx.x * tile.heads + head_of_block;
  const int64_t head = head_of_all;
  const int64_t heads = p.num_rows * p.num_heads;
  if (head_of_block >= tile.heads || head >= heads) return;

  float highest = -INFINITY;
  for (int64_t k = 0; k < p.num_partials; ++k) {
    highest = fmaxf(highest, __ldg(p.partial_lse + k * heads + head));
  }
  float sum = 0.0f;
  float merged[V] = {};
  const T* partial = static_cast<const T*>(p.partial_out) + head * p.head_dim + vector * V;
#pragma unroll 4
  for (int64_t k = 0; k < p.num_partials; ++k) {
    const float lse = __ldg(p.partial_lse + k * heads + head);
    if (lse == -INFINITY) continue;  // it saw nothing, whatever its output holds
    const float weight = expf(lse - highest);
    float value[V];
    unpack(load_vector<T, V>(partial + k * heads * p.head_dim), value);
#pragma unroll
    for (int i = 0; i < V; ++i) merged[i] = fmaf(weight, value[i], merged[i]);
    sum += weight;
  }
  // Where nothing was seen the sum is 0, and so is the output; elsewhere it is 1 at least.
  float total = sum;
  if (p.sinks) total += expf(__ldg(p.sinks + head_of_all % p.num_heads) - highest);
#pragma unroll
  for (int i = 0; i < V; ++i) merged[i] = sum > 0.0f ? merged[i] / total : 0.0f;
  Vector<T, V> out;
  pack(merged, &out);
  store_vector<T, V>(static_cast<T*>(p.out) + head * p.head_dim + vector * V, out);
  if (vector == 0) p.lse[head] = sum > 0.0f ? highest + logf(sum) : -INFINITY;
}

}  // namespace tokendance::cuda
