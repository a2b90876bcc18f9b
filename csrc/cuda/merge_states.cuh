// merge_states: partial attention outputs become one, weighted by their log-sum-exp (merge.cuh).
//
// Bytes of R rows, H heads, K partials at 16 bits: R * H * (K + 1) * (2 * D + 4). FLOPs: 2 per
// element read: 1 FLOP/byte, bound by memory (A100: 19.5 TFLOPS fp32, 2039 GB/s; H200: 67 TFLOPS,
// 4800 GB/s; datasheets).
#pragma once

#include "cuda/merge.cuh"
#include "cuda/merge_states_plan.h"
#include "tokendance/params.h"

namespace tokendance::cuda {

// Heads of all rows are counted in 32 bits: with one partial, 2^32 of the smallest (128 bytes, in
// and out) are 1 TiB.
template <typename T>
__device__ __forceinline__ void merge_states(const MergeStatesParams& p) {
  const uint32_t head = blockIdx.x * blockDim.z + threadIdx.z;
  const int64_t heads = p.num_rows * p.num_heads;
  MergedHead<T, T> m;
  m.exists = head < heads;
  m.begin = 0;
  m.end = m.exists ? static_cast<int32_t>(p.num_partials) : 0;
  m.numbers = nullptr;
  m.stride = heads;
  m.head = head;
  m.partial_out = static_cast<const T*>(p.partial_out);
  m.partial_lse = p.partial_lse;
  m.sink = p.sinks ? p.sinks + head % static_cast<uint32_t>(p.num_heads) : nullptr;
  m.out = static_cast<T*>(p.out) + m.head * p.head_dim;
  m.lse = p.lse + head;
  merge_head<false>(m, p.head_dim);
}

}  // namespace tokendance::cuda
