// Combines partial attention outputs by their log-sum-exp.
//
// Reads every partial once and writes one output: bound by memory. The partials of a (row, head)
// are added up in registers, in their order; their weights are computed once for all dims, since an
// exponential takes as long as moving half a partial.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kHeadsAtOnce = 64;

// `weights` has room for one of each partial.
template <typename T>
void merge_head(const MergeStatesParams& params, int64_t index, float* weights) {
  const int64_t heads = params.num_rows * params.num_heads;
  const int head_dim = params.head_dim;
  float max = -kInfinity;
  for (int64_t k = 0; k < params.num_partials; ++k) {
    max = std::max(max, params.partial_lse[k * heads + index]);
  }
  T* out = static_cast<T*>(params.out) + index * head_dim;
  // Where nothing was seen, all weights are exp(-inf - 0) = 0. A NaN is nobody's maximum, but a
  // weight, and so the result.
  const float base = max == -kInfinity ? 0.0f : max;
  float sum = 0.0f;
  for (int64_t k = 0; k < params.num_partials; ++k) {
    weights[k] = expf(params.partial_lse[k * heads + index] - base);
    sum += weights[k];
  }
  if (sum == 0.0f) {
    params.lse[index] = -kInfinity;
    for (int dim = 0; dim < head_dim; dim += kLanes) {
      store(out + dim, narrow<T>(broadcast(0.0f)));
    }
    return;
  }
  const float lse = base + logf(sum);
  params.lse[index] = lse;
  float factor = 1.0f / sum;
  if (params.sinks) {
    factor /= 1.0f + expf(params.sinks[index % params.num_heads] - lse);
  }
  constexpr int kStep = 4 * kLanes;
  for (int begin = 0; begin < head_dim; begin += kStep) {
    const int end = std::min(begin + kStep, head_dim);
    F32 sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    for (int64_t k = 0; k < params.num_partials; ++k) {
      // A partial that saw nothing may hold anything.
      if (params.partial_lse[k * heads + index] == -kInfinity) continue;
      const F32 weight = broadcast(weights[k] * factor);
      const T* part = static_cast<const T*>(params.partial_out) + (k * heads + index) * head_dim;
      for (int i = 0, dim = begin; dim < end; ++i, dim += kLanes) {
        sums[i] = fma_add(load(part + dim), weight, sums[i]);
      }
    }
    for (int i = 0, dim = begin; dim < end; ++i, dim += kLanes) {
      store(out + dim, narrow<T>(sums[i]));
    }
  }
}

}  // namespace

void merge_states(const MergeStatesParams& params, ParallelFor parallel_for) {
  with_element(params.dtype, [&](auto element) {
    parallel_ranges(parallel_for, params.num_rows * params.num_heads, kHeadsAtOnce,
                    [&](int64_t begin, int64_t end) {
                      std::vector<float> weights(params.num_partials);
                      for (int64_t index = begin; index < end; ++index) {
                        merge_head<decltype(element)>(params, index, weights.data());
                      }
                    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
