// The online softmax of a warp's 16 query rows, in units of log2. Scores and sums lie in registers
// as products leave them (attention_products.cuh): a lane has parts of rows lane / 4 and
// lane / 4 + 8.
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
template <int kHeadDim>
struct Weighted {
  float sums[kHeadDim / 8][4];  // weighted values
  float highest[2];             // score
  float total[2];               // weight, of the lane's keys

  __device__ __forceinline__ Weighted() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    }
    highest[0] = highest[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }
};

// Of e4m3 elements as they are widened.
__device__ __forceinline__ float scale_of_head(const float* scales, int32_t kv_head) {
  return (scales ? __ldg(scales + kv_head) : 1.0f) * widened_unit();
}

// Of products of queries with keys as they were multiplied.
template <typename Block>
__device__ __forceinline__ float score_scale(const CollectiveAttentionParams& p,
                                             const Place& here) {
  if constexpr (kIsQuantized<typename Block::Pool>) {
    return p.softmax_scale * scale_of_head(p.k_scale, here.kv_head);
  } else {
    return p.softmax_scale;
  }
}

// Products become scores.
template <typename Block>
__device__ __forceinline__ void scale(const CollectiveAttentionParams& p, const Place& here,
                                      float (&scores)[Block::kKeys / 8][4]) {
  if (p.soft_cap > 0.0f) {
    const float cap = p.soft_cap * kLog2E;
    const float factor = score_scale<Block>(p, here) / p.soft_cap;
#pragma unroll
    for (int n = 0; n < Block::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[n][i];
        if constexpr (sizeof(typename Block::T) == 4) {
          score = cap * tanhf(score * factor);
        } else {
          // tanh(x) = 1 - 2 / (1 + exp(2 * x)), to some units in the last place of 1: finer than
          // queries and keys of 16 bits.
          const float power = fast_exp2(score * (factor * 2.0f * kLog2E));
          score = fmaf(-cap, __fdividef(2.0f, 1.0f + power), cap);
        }
      }
    }
  } else {
    const float factor = score_scale<Block>(p, here) * kLog2E;
#pragma unroll
    for (int n = 0; n < Block::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= factor;
    }
  }
}

// Replaces scores of keys that their row does not see, if there are any; `visible` is of query row
// lane % 16 (visible_keys).
template <typename Block>
__device__ __forceinline__ void hide(uint32_t visible, const Place& here,
                                     float (&scores)[Block::kKeys / 8][4]) {
  constexpr int kKeys = Block::kKeys;
  constexpr uint32_t kTile = kKeys < 32 ? (1u << kKeys % 32) - 1 : kAllLanes;
  if (__all_sync(kAllLanes, (visible & kTile) == kTile)) return;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int word = 0; word < (kKeys > 32 ? 2 : 1); ++word) {
      // Shifted, so that the bits of the lane's keys are those of lane 0.
      const uint32_t bits =
          __shfl_sync(kAllLanes, visible, word * 16 + j * 8 + here.lane / 4) >> here.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < (kKeys < 32 ? kKeys : 32) / 8; ++n) {
        float (&score)[4] = scores[word * 4 + n];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((bits >> (n * 8 + i) & 1) == 0) score[2 * j + i] = -INFINITY;
        }
      }
    }
  }
}

// Scores become weights, relative to the highest score so far.
template <typename Block>
__device__ __forceinline__ void soften(float (&scores)[Block::kKeys / 8][4],
                                       Weighted<Block::kHeadDim>& state) {
  float rescale[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float maximum = state.highest[j];
#pragma unroll
    for (int n = 0; n < Block::kKeys / 8; ++n) {
      maximum = fmaxf(maximum, fmaxf(scores[n][2 * j], scores[n][2 * j + 1]));
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
      for (int i = 2 * j; i < 2 * j + 2; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] - base);
        sum += scores[n][i];
      }
    }
    state.total[j] = fmaf(state.total[j], rescale[j], sum);
  }
  if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
    for (int n = 0; n < Block::kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.sums[n][i] *= rescale[i / 2];
    }
  }
}

}  // namespace tokendance::cuda
