// The second launch of collective_attention: partial results of a row become one, and sinks enter.
//
// In the order of row_partials, so that the result does not depend on which block came first.
//
// Bytes: 4 * (D + 1) per partial, row and head, and the output. FLOPs: 2 per element read, below
// one per byte: bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H100: 67 TFLOPS, 3350 GB/s;
// datasheets).
//
// Why these blocks. How many partials a row has is known on the device only, so a block has one row
// and reads its part of row_partials once; more than 256 threads of a row's heads are other blocks.
// Four partials are under way at once, for a row may have dozens, and few rows make few blocks. 48
// registers at most, no spills, no shared memory: five blocks of 256 threads and more, at least 40
// of 64 warps.
#pragma once

#include "cuda/collective_attention_plan.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A block has a row, or some of its heads; a thread one vector of one head. All threads of a head
// compute the same weights: their loads of indices and LSEs are broadcasts.
template <typename T, int V>
__device__ __forceinline__ void merge_partials(const CollectiveAttentionParams& p) {
  const int64_t row = blockIdx.x;
  const int32_t begin = __ldg(p.round.row_partial_indptr + row);
  const int32_t end = __ldg(p.round.row_partial_indptr + row + 1);
  if (begin >= end) return;  // padding, or written by its only item
  const uint32_t index = blockIdx.y * blockDim.x + threadIdx.x;
  const uint32_t vectors = static_cast<uint32_t>(p.head_dim) / V;
  const int32_t head = static_cast<int32_t>(index / vectors);
  const int32_t dim = static_cast<int32_t>(index % vectors) * V;
  if (head >= p.num_q_heads) return;
  const int64_t heads = p.round.extents.partials * p.num_q_heads;
  const float* const partial_lse = p.workspace + heads * p.head_dim;
  auto place_of = [&](int32_t i) {
    return int64_t{__ldg(p.round.row_partials + i)} * p.num_q_heads + head;
  };

  // Loads of several partials at once: one after the other, their latencies would add up. The last
  // partial stands in for those beyond the end, with a weight of 0.
  constexpr int kBatch = 4;
  float highest = -INFINITY;
#pragma unroll 1
  for (int32_t i = begin; i < end; i += kBatch) {
    float lse[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) lse[j] = __ldg(partial_lse + place_of(min(i + j, end - 1)));
#pragma unroll
    for (int j = 0; j < kBatch; ++j) highest = fmaxf(highest, lse[j]);
  }
  // Where nothing was seen, all weights are exp(-inf - 0) = 0.
  const float base = highest == -INFINITY ? 0.0f : highest;
  float sum = 0.0f;
  float merged[V] = {};
#pragma unroll 1
  for (int32_t first = begin; first < end; first += kBatch) {
    float lse[kBatch], value[kBatch][V];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t place = place_of(min(first + j, end - 1));
      lse[j] = __ldg(partial_lse + place);
      load_floats<V>(p.workspace + place * p.head_dim + dim, value[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float weight = j == 0 || first + j < end ? expf(lse[j] - base) : 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) merged[k] = fmaf(weight, value[j][k], merged[k]);
      sum += weight;
    }
  }
  const float total = p.sinks ? sum + expf(__ldg(p.sinks + head) - base) : sum;
  const float factor = sum > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) merged[j] *= factor;
  Vector<T, V> out;
  pack(merged, &out);
  store_vector<T, V>(
      static_cast<T*>(p.out) + row * p.out_row_stride + head * p.out_head_stride + dim, out);
  if (dim == 0) p.lse[row * p.num_q_heads + head] = base + logf(sum);  // log(0) = -inf
}

}  // namespace tokendance::cuda
