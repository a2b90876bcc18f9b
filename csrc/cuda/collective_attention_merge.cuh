// The second launch of collective_attention: partial results of a row become one, and sinks enter
// (merge.cuh).
//
// Bytes: 4 * (D + 1) per partial, row and head, and the output. FLOPs: 2 per element read, below
// one per byte: bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H200: 67 TFLOPS, 4800 GB/s;
// datasheets).
//
// From sm_90 on the launch may begin once every block of the first has. What the first does not
// write, a row's numbers of partials, is read meanwhile; then every block waits, one without
// partials too: the launch is over no earlier than the one before it.
#pragma once

#include "cuda/collective_attention_plan.h"
#include "cuda/merge.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A block has some heads of a row: how many partials a row has is known on the device only.
template <typename T>
__device__ __forceinline__ void merge_partials(const CollectiveAttentionParams& p) {
  const int64_t row = blockIdx.x;
  const int32_t head = static_cast<int32_t>(blockIdx.y * blockDim.z + threadIdx.z);
  const int32_t begin = __ldg(p.round.row_partial_indptr + row);
  const int32_t end = __ldg(p.round.row_partial_indptr + row + 1);
  if (begin >= end) {  // padding, or written by its only item
    wait_for_launch_before();
    return;
  }
  MergedHead<float, T> m;
  m.exists = head < p.num_q_heads;
  m.begin = begin;
  m.end = m.exists ? end : begin;
  m.numbers = p.round.row_partials;
  m.stride = p.num_q_heads;
  m.head = head;
  m.partial_out = p.workspace;
  m.partial_lse = p.workspace + p.round.extents.partials * p.num_q_heads * p.head_dim;
  m.sink = p.sinks ? p.sinks + head : nullptr;
  m.out = static_cast<T*>(p.out) + row * p.out_row_stride + head * p.out_head_stride;
  m.lse = p.lse + row * p.num_q_heads + head;
  merge_head<true>(m, p.head_dim);
}

}  // namespace tokendance::cuda
