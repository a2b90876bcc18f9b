// The second launch of collective_attention: partial results of a row become one, and sinks enter.
//
// In the order of row_partials, so that the result does not depend on which block came first.
//
// Bytes: 4 * (D + 1) per partial, row and head, and the output. FLOPs: 2 per element read, below
// one per byte: bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H100: 67 TFLOPS, 3350 GB/s;
// datasheets). 40 registers at most, no spills, no shared memory: six blocks of 256 threads and
// more, at least 48 of 64 warps.
#pragma once

#include "cuda/collective_attention_plan.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A thread has one vector of one row and head. All threads of a head compute the same weights:
// their loads of indices and LSEs are broadcasts.
template <typename T, int V>
__device__ __forceinline__ void merge_partials(const CollectiveAttentionParams& p) {
  const int32_t vectors = p.head_dim / V;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row_head = static_cast<int64_t>(static_cast<uint64_t>(index) / vectors);
  const int64_t row = static_cast<int64_t>(static_cast<uint64_t>(row_head) / p.num_q_heads);
  if (row >= p.round.extents.rows) return;
  const int32_t begin = __ldg(p.round.row_partial_indptr + row);
  const int32_t end = __ldg(p.round.row_partial_indptr + row + 1);
  if (begin == end) return;  // padding, or written by its only item
  const int32_t dim = static_cast<int32_t>(static_cast<uint64_t>(index) % vectors) * V;
  const int32_t head = static_cast<int32_t>(row_head - row * p.num_q_heads);
  const int64_t heads = p.round.extents.partials * p.num_q_heads;
  const float* const partial_lse = p.workspace + heads * p.head_dim;
  auto place_of = [&](int32_t i) {
    return int64_t{__ldg(p.round.row_partials + i)} * p.num_q_heads + head;
  };

  float highest = -INFINITY;
  for (int32_t i = begin; i < end; ++i) {
    highest = fmaxf(highest, partial_lse[place_of(i)]);
  }
  float sum = 0.0f;
  float merged[V] = {};
#pragma unroll 2
  for (int32_t i = begin; i < end; ++i) {
    const int64_t place = place_of(i);
    const float lse = partial_lse[place];
    if (lse == -INFINITY) continue;  // it saw nothing
    const float weight = expf(lse - highest);
    float value[V];
    load_floats<V>(p.workspace + place * p.head_dim + dim, value);
#pragma unroll
    for (int j = 0; j < V; ++j) merged[j] = fmaf(weight, value[j], merged[j]);
    sum += weight;
  }
  // Where nothing was seen, sum and output are 0.
  float total = sum;
  if (p.sinks && sum > 0.0f) total += expf(__ldg(p.sinks + head) - highest);
#pragma unroll
  for (int j = 0; j < V; ++j) merged[j] = sum > 0.0f ? merged[j] / total : 0.0f;
  Vector<T, V> out;
  pack(merged, &out);
  store_vector<T, V>(
      static_cast<T*>(p.out) + row * p.out_row_stride + head * p.out_head_stride + dim, out);
  if (dim == 0) p.lse[row_head] = sum > 0.0f ? highest + logf(sum) : -INFINITY;
}

}  // namespace tokendance::cuda
