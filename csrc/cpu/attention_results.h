// What becomes of a tile's sums: the output, or partial results and their merge.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <math.h>

#include <algorithm>

#include "cpu/attention_queries.h"

namespace tokendance::TOKENDANCE_ISA {

// T is the type of keys and values.
template <typename T>
class AttentionResults {
 public:
  explicit AttentionResults(const CollectiveAttentionParams& params) : params_(params) {}

  // Of a row and a head of a tile.
  void write(const AttentionTile& tile, int h, int slot, int g, const Scratch& s) const {
    const int index = (h * tile.num_rows + slot) * tile.heads + g;
    const int head = tile.q_head(h, g);
    const float* sums = s.out + index * int64_t{params_.head_dim};
    const float sum = s.state_sum[index];
    const float max = s.state_max[index];
    const float lse = sum == 0.0f ? -kInfinity : max * kLn2 + logf(sum);
    const float inverse = sum == 0.0f ? 0.0f : scale_of(params_.v_scale, tile.kv_head + h) / sum;
    if (tile.item[4] >= 0) {
      const int64_t partial = int64_t{tile.item[4]} + tile.first_row + slot;
      float* out = partial_out(partial, head);
      const F32 factor = broadcast(inverse);
      for (int i = 0; i < params_.head_dim; i += kLanes) {
        store(out + i, narrow<float>(mul(load(sums + i), factor)));
      }
      *partial_lse(partial, head) = lse;
      return;
    }
    const int64_t row = tile.rows[slot];
    params_.lse[row * params_.num_q_heads + head] = lse;
    write_row(row, head, sums, inverse * sink_factor(head, lse));
  }

  // Merges the partial results of a row, if it has any.
  void merge(int64_t row) const {
    const int32_t* begin = params_.round.row_partials + params_.round.row_partial_indptr[row];
    const int32_t* end = params_.round.row_partials + params_.round.row_partial_indptr[row + 1];
    if (begin == end) return;
    for (int head = 0; head < params_.num_q_heads; ++head) merge_head(row, head, begin, end);
  }

 private:
  int64_t out_offset(int64_t row, int head) const {
    return row * params_.out_row_stride + head * params_.out_head_stride;
  }

  float* partial_out(int64_t partial, int head) const {
    return params_.workspace + (partial * params_.num_q_heads + head) * params_.head_dim;
  }
  float* partial_lse(int64_t partial, int head) const {
    return params_.workspace +
           params_.round.extents.partials * params_.num_q_heads * params_.head_dim +
           partial * params_.num_q_heads + head;
  }

  void write_row(int64_t row, int head, const float* sums, float factor) const {
    with_query_element<T>(params_.dtype, [&](auto element) {
      using Q = decltype(element);
      Q* out = static_cast<Q*>(params_.out) + out_offset(row, head);
      const F32 factors = broadcast(factor);
      for (int i = 0; i < params_.head_dim; i += kLanes) {
        store(out + i, narrow<Q>(mul(load(sums + i), factors)));
      }
    });
  }

  // exp(lse) / (exp(lse) + exp(sink)): what a sink leaves of the output.
  float sink_factor(int head, float lse) const {
    if (!params_.sinks || lse == -kInfinity) return 1.0f;
    return 1.0f / (1.0f + expf(params_.sinks[head] - lse));
  }

  void merge_head(int64_t row, int head, const int32_t* begin, const int32_t* end) const {
    float max = -kInfinity;
    for (const int32_t* partial = begin; partial < end; ++partial) {
      max = std::max(max, *partial_lse(*partial, head));
    }
    // As in merge_states: what saw nothing is left out, and a NaN is nobody's maximum, but a
    // weight.
    const float base = max == -kInfinity ? 0.0f : max;
    alignas(kCacheLine) float sums[kMaxHeadDim] = {};
    float sum = 0.0f;
    for (const int32_t* partial = begin; partial < end; ++partial) {
      if (*partial_lse(*partial, head) == -kInfinity) continue;
      const float weight = expf(*partial_lse(*partial, head) - base);
      sum += weight;
      const float* part = partial_out(*partial, head);
      const F32 factor = broadcast(weight);
      for (int i = 0; i < params_.head_dim; i += kLanes) {
        store(sums + i, narrow<float>(fma_add(load(part + i), factor, load(sums + i))));
      }
    }
    float& lse = params_.lse[row * params_.num_q_heads + head];
    lse = base + logf(sum);  // log(0) = -inf
    write_row(row, head, sums, sum == 0.0f ? 0.0f : sink_factor(head, lse) / sum);
  }

  const CollectiveAttentionParams& params_;
};

}  // namespace tokendance::TOKENDANCE_ISA
