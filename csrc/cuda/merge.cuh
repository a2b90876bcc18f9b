// Partial results of attention for a row and a head become one, weighted by their log-sum-exp: what
// merge_states and the second launch of collective_attention have in common.
//
// Of K partials with outputs o_k and LSEs l_k:  lse = log(sum exp(l_k)),
// out = sum(exp(l_k) o_k) / (exp(lse) + exp(sink)), without the last term where there is no sink.
// - A partial with an LSE of -inf has seen nothing: it is left out, whatever its output holds.
// - Any other counts, with the weight 0 as well: a NaN or an infinity in it reaches the result.
// - Where all are left out, or there are none, out is 0 and lse is -inf, with sinks too.
// The CPU's kernels do the same (csrc/cpu/kernels/merge_states.cpp, csrc/cpu/attention_results.h).
//
// Why groups. What takes time is waiting: a row of a decode step has a dozen partials or two, and
// there are few rows. So a head's partials are dealt out to groups of threads, and every thread
// asks for the LSEs and its vectors of up to eight partials before it looks at the first: with
// eight groups 64 are under way at once. A group goes through its partials in their order, with a
// running maximum, and the groups are added up in theirs: results depend on the shape of the launch
// alone, which is a function of the params.
#pragma once

#include "cuda/merge_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/vector_io.cuh"

namespace tokendance::cuda {

// A row and a head, and where its partials are.
template <typename Partial, typename Out>
struct MergedHead {
  bool exists;             // else the threads only wait for the others
  int32_t begin, end;      // partials
  const int32_t* numbers;  // of partials, from `begin` on; null: partial i has the number i
  int64_t stride;          // heads from a number to the next
  int64_t head;            // of number 0
  const Partial* partial_out;
  const float* partial_lse;
  const float* sink;  // null = none
  Out* out;
  float* lse;
};

// exp(lse - base), of an LSE that is not above the base by much: 1 at the base, exactly.
__device__ __forceinline__ float weight_of(float lse, float base) {
  constexpr float kLog2e = 1.44269504f;
  return fast_exp2((lse - base) * kLog2e);
}

// What LSEs are taken relative to. Where nothing was seen, all weights are exp(-inf - 0) = 0.
__device__ __forceinline__ float base_of(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}

template <int V, typename Out>
__device__ __forceinline__ void store_merged(Out* out, const float (&merged)[V]) {
  constexpr int kBytes = V * static_cast<int>(sizeof(Out));
  if (reinterpret_cast<uintptr_t>(out) % kBytes == 0) {
    Vector<Out, V> vector;
    pack(merged, &vector);
    store_vector<Out, V>(out, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float value[1] = {merged[i]};
    Vector<Out, 1> element;
    pack(value, &element);
    store_vector<Out, 1>(out + i, element);
  }
}

// Called by all threads of a block. kWaits: partials are what the launch before this one writes,
// while this one may have begun.
template <bool kWaits, typename Partial, typename Out>
__device__ __forceinline__ void merge_head(const MergedHead<Partial, Out>& m, int32_t head_dim) {
  constexpr int V = static_cast<int>(kVectorBytes / sizeof(Partial));
  constexpr int kAtOnce = 8;
  __shared__ float4 merged_of_group[V / 4][kMergeThreads];
  __shared__ float highest_of_group[kMergeThreads], sum_of_group[kMergeThreads];
  const int32_t groups = static_cast<int32_t>(blockDim.y);
  const int32_t group = static_cast<int32_t>(threadIdx.y);
  const int32_t dim = static_cast<int32_t>(threadIdx.x) * V;

  int32_t number[kAtOnce];
  auto load_numbers = [&](int32_t first) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = first + j * groups;
      if (i < m.end) number[j] = m.numbers ? __ldg(m.numbers + i) : i;
    }
  };
  load_numbers(m.begin + group);
  if constexpr (kWaits) wait_for_launch_before();

  float highest = -INFINITY, sum = 0.0f;
  float merged[V] = {};
#pragma unroll 1
  for (int32_t first = m.begin + group; first < m.end; first += kAtOnce * groups) {
    float lse[kAtOnce];
    Vector<Partial, V> part[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      lse[j] = -INFINITY;
      if (j > 0 && first + j * groups >= m.end) continue;
      const int64_t place = number[j] * m.stride + m.head;
      lse[j] = m.partial_lse[place];
      part[j] = load_vector<Partial, V>(m.partial_out + place * head_dim + dim);
    }
    load_numbers(first + kAtOnce * groups);
    const float before = highest;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) highest = fmaxf(highest, lse[j]);
    const float base = base_of(highest);
    const float factor = weight_of(before, base);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < V; ++i) merged[i] *= factor;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (lse[j] == -INFINITY) continue;
      const float weight = weight_of(lse[j], base);
      float value[V];
      unpack(part[j], value);
#pragma unroll
      for (int i = 0; i < V; ++i) merged[i] = fmaf(weight, value[i], merged[i]);
      sum += weight;
    }
  }

  if (groups > 1) {
    const int32_t of_head = static_cast<int32_t>(threadIdx.z) * groups;
    const int32_t vectors = static_cast<int32_t>(blockDim.x);
    const int32_t vector = static_cast<int32_t>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      merged_of_group[i][(of_head + group) * vectors + vector] =
          make_float4(merged[4 * i], merged[4 * i + 1], merged[4 * i + 2], merged[4 * i + 3]);
    }
    if (vector == 0) {
      highest_of_group[of_head + group] = highest;
      sum_of_group[of_head + group] = sum;
    }
    __syncthreads();
    if (group != 0) return;
#pragma unroll 1
    for (int32_t other = 1; other < groups; ++other) {
      const float before = highest;
      highest = fmaxf(before, highest_of_group[of_head + other]);
      const float base = base_of(highest);
      const float factor = weight_of(before, base);
      const float weight = weight_of(highest_of_group[of_head + other], base);
      sum = fmaf(weight, sum_of_group[of_head + other], sum * factor);
#pragma unroll
      for (int i = 0; i < V / 4; ++i) {
        const float4 four = merged_of_group[i][(of_head + other) * vectors + vector];
        merged[4 * i] = fmaf(weight, four.x, merged[4 * i] * factor);
        merged[4 * i + 1] = fmaf(weight, four.y, merged[4 * i + 1] * factor);
        merged[4 * i + 2] = fmaf(weight, four.z, merged[4 * i + 2] * factor);
        merged[4 * i + 3] = fmaf(weight, four.w, merged[4 * i + 3] * factor);
      }
    }
  }
  if (!m.exists) return;
  const float base = base_of(highest);
  const float total = m.sink ? sum + expf(__ldg(m.sink) - base) : sum;
  const float factor = sum == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int i = 0; i < V; ++i) merged[i] *= factor;
  store_merged(m.out + dim, merged);
  if (dim == 0) *m.lse = base + logf(sum);  // log(0) = -inf
}

}  // namespace tokendance::cuda
