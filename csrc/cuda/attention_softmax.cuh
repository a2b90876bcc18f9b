// The online softmax of a warp's query rows, in units of log2. Scores and sums lie in registers as
// products leave them (attention_products.cuh): a lane has parts of every eighth row, from row
// lane / 4 on.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_core.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// What the keys so far come to.
template <typename Block>
struct Weighted {
  static constexpr int kRows = Block::kWarpRows / 8;  // of a lane; row j is row lane / 4 + 8 * j
  typename Block::Products::Sums sums;                // weighted values
  float highest[kRows];                               // score
  float total[kRows];                                 // weight, of the lane's keys

  __device__ __forceinline__ Weighted() {
    clear<kRows / 2, Block::kHeadDim>(sums);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      highest[j] = -INFINITY;
      total[j] = 0.0f;
    }
  }
};

// Of e4m3 elements as they are widened.
__device__ __forceinline__ float scale_of_head(const float* scales, int32_t kv_head) {
  return (scales ? __ldg(scales + kv_head) : 1.0f) * widened_unit();
}

// What products of queries with keys, as they were multiplied, are multiplied by before the soft
// cap if there is one. One number, made ahead of the tiles: a division in their midst wants
// registers.
template <typename Block>
__device__ __forceinline__ float score_factor(const CollectiveAttentionParams& p,
                                              const Place& here) {
  float factor = p.softmax_scale;
  if constexpr (kIsQuantized<typename Block::Pool>) {
    factor *= scale_of_head(p.k_scale, here.kv_head);
  }
  if (p.soft_cap <= 0.0f) return factor * kLog2E;
  return sizeof(typename Block::T) == 4 ? factor / p.soft_cap
                                        : factor / p.soft_cap * (2.0f * kLog2E);
}

// Products become scores.
template <typename Block>
__device__ __forceinline__ void scale(float factor, float soft_cap,
                                      typename Block::Scores& scores) {
  const auto for_each = [&](auto&& change) {
#pragma unroll
    for (auto& of_rows : scores) {
#pragma unroll
      for (auto& fragment : of_rows) {
#pragma unroll
        for (float& score : fragment) change(score);
      }
    }
  };
  if (soft_cap > 0.0f) {
    const float cap = soft_cap * kLog2E;
    for_each([&](float& score) {
      if constexpr (sizeof(typename Block::T) == 4) {
        score = cap * tanhf(score * factor);
      } else {
        // tanh(x) = 1 - 2 / (1 + exp(2 * x)), to some units in the last place of 1: finer than
        // queries and keys of 16 bits.
        const float power = fast_exp2(score * factor);
        score = fmaf(-cap, __fdividef(2.0f, 1.0f + power), cap);
      }
    });
  } else {
    for_each([&](float& score) { score *= factor; });
  }
}

// Replaces scores of keys that their row does not see, if there are any; `visible` is of query row
// lane % Block::kWarpRows (visible_keys).
template <typename Block>
__device__ __forceinline__ void hide(uint32_t visible, const Place& here,
                                     typename Block::Scores& scores) {
  constexpr int kKeys = Block::kKeys;
  constexpr uint32_t kTile = kKeys < 32 ? (1u << kKeys % 32) - 1 : kAllLanes;
  if (__all_sync(kAllLanes, (visible & kTile) == kTile)) return;
#pragma unroll
  for (int j = 0; j < Block::kWarpRows / 8; ++j) {
#pragma unroll
    for (int word = 0; word < (kKeys > 32 ? 2 : 1); ++word) {
      // Shifted, so that the bits of the lane's keys are those of lane 0.
      const int32_t owner = word * Block::kWarpRows + j * 8 + here.lane / 4;
      const uint32_t bits = __shfl_sync(kAllLanes, visible, owner) >> here.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < (kKeys < 32 ? kKeys : 32) / 8; ++n) {
        float (&score)[4] = scores[j / 2][word * 4 + n];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((bits >> (n * 8 + i) & 1) == 0) score[j % 2 * 2 + i] = -INFINITY;
        }
      }
    }
  }
}

// Scores become weights, relative to the highest score so far.
template <typename Block>
__device__ __forceinline__ void soften(typename Block::Scores& scores, Weighted<Block>& state) {
  float rescale[state.kRows];
  bool rises = false;
#pragma unroll
  for (int j = 0; j < state.kRows; ++j) {
    auto& scores_of_row = scores[j / 2];
    const int first = j % 2 * 2;  // of four elements, this row has this one and the next
    float maximum = state.highest[j];
#pragma unroll
    for (int n = 0; n < Block::kKeys / 8; ++n) {
      maximum = fmaxf(maximum, fmaxf(scores_of_row[n][first], scores_of_row[n][first + 1]));
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
    // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    rescale[j] = maximum == state.highest[j] ? 1.0f : fast_exp2(state.highest[j] - base);
    state.highest[j] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < Block::kKeys / 8; ++n) {
#pragma unroll
      for (int i = first; i < first + 2; ++i) {
        float& score = scores_of_row[n][i];
        score = fast_exp2(score - base);
        sum += score;
      }
    }
    state.total[j] = fmaf(state.total[j], rescale[j], sum);
    rises = rises || rescale[j] != 1.0f;
  }
  if (__any_sync(kAllLanes, rises)) {
#pragma unroll
    for (int m = 0; m < state.kRows / 2; ++m) {
#pragma unroll
      for (int n = 0; n < Block::kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.sums[m][n][i] *= rescale[2 * m + i / 2];
      }
    }
  }
}

}  // namespace tokendance::cuda
