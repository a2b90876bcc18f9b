// What a warp writes of its query rows: rows of the output, or partials that another launch merges.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/attention_sight.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/ptx.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A lane's part of a row: whole sectors, together with its three neighbours.
template <typename Block>
__device__ __forceinline__ void write_partial(const Weighted<Block>& state, int j, float factor,
                                              int32_t lane, float* to) {
  using Products = typename Block::Products;
  const auto& sums = state.sums[j / 2];
  const int i = j % 2 * 2;
  if constexpr (sizeof(typename Block::T) == 4 || kIsQuantized<typename Block::Pool>) {
#pragma unroll
    for (int n = 0; n < Block::kHeadDim / 8; n += 2) {
      *reinterpret_cast<float4*>(to + Products::dim(n, lane)) =
          make_float4(sums[n][i] * factor, sums[n][i + 1] * factor, sums[n + 1][i] * factor,
                      sums[n + 1][i + 1] * factor);
    }
  } else {
#pragma unroll
    for (int n = 0; n < Block::kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + Products::dim(n, lane)) =
          make_float2(sums[n][i] * factor, sums[n][i + 1] * factor);
    }
  }
}

// By way of the shared memory of the warp's queries, for stores of whole rows.
template <typename Block>
__device__ __forceinline__ void write_output(const CollectiveAttentionParams& p,
                                             const Weighted<Block>& state,
                                             const float (&factor)[Weighted<Block>::kRows],
                                             int32_t lane, int32_t warp) {
  using T = typename Block::T;
  using Rows = typename Block::QueryRows;
  T* const rows = Block::template queries<T>(warp);
  __syncwarp();  // all lanes are done with the queries
#pragma unroll
  for (int n = 0; n < Block::kHeadDim / 8; ++n) {
#pragma unroll
    for (int j = 0; j < state.kRows; ++j) {
      T* const to = rows + Rows::element(lane / 4 + 8 * j, Block::Products::dim(n, lane));
      const auto& sums = state.sums[j / 2][n];
      const float x = sums[j % 2 * 2] * factor[j], y = sums[j % 2 * 2 + 1] * factor[j];
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(to) = make_float2(x, y);
      } else {
        *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(x, y);
      }
    }
  }
  __syncwarp();
  constexpr int kVectors = Block::kHeadDim / Rows::kPiece;  // of a row
#pragma unroll 4
  for (int i = 0; i < Block::kWarpRows * kVectors / kWarpSize; ++i) {
    const int32_t index = i * kWarpSize + lane;
    const int32_t query = index / kVectors, dim = index % kVectors * Rows::kPiece;
    const QueryRow written = Block::query_rows(warp)[query];
    if (written.agent == kNoRow) continue;
    T* const to = static_cast<T*>(p.out) + written.row * p.out_row_stride +
                  written.head * p.out_head_stride + dim;
    const T* const from = rows + Rows::element(query, dim);
    store_global_16(to, load_shared_16(from));
  }
}

// Divides by the weights and writes; rows that have seen nothing become zeros, with an LSE of -inf.
template <typename Block>
__device__ __forceinline__ void write_results(const CollectiveAttentionParams& p, const Place& here,
                                              Weighted<Block>& state) {
  const int32_t lane = recomputed<kWarpSize>(here.lane);
  const int32_t partial_begin = item_of_block(p).partial_begin;
  float factor[state.kRows], lses[state.kRows];
  float value_scale = 1.0f;
  if constexpr (kIsQuantized<typename Block::Pool>) {
    value_scale = scale_of_head(p.v_scale, here.kv_head);
    Block::Products::arrange(state.sums);
  }
#pragma unroll
  for (int j = 0; j < state.kRows; ++j) {
    float sum = state.total[j];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    lses[j] = sum == 0.0f ? -INFINITY : fmaf(state.highest[j], kLn2, logf(sum));
    factor[j] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if constexpr (kIsQuantized<typename Block::Pool>) factor[j] *= value_scale;
  }
#pragma unroll
  for (int j = 0; j < state.kRows; ++j) {
    const int32_t index = lane / 4 + 8 * j;
    const QueryRow query = load_whole(Block::query_rows(here.warp) + index);
    if (query.agent == kNoRow) continue;
    if (partial_begin >= 0) {
      const int64_t at = int64_t{partial_begin + query.slot} * p.num_q_heads + query.head;
      write_partial<Block>(state, j, factor[j], lane, p.workspace + at * Block::kHeadDim);
      float* const partial_lse =
          p.workspace + p.round.extents.partials * p.num_q_heads * Block::kHeadDim;
      if (lane % 4 == 0) partial_lse[at] = lses[j];
    } else {
      if (p.sinks && factor[j] != 0.0f) {
        factor[j] /= 1.0f + expf(__ldg(p.sinks + query.head) - lses[j]);
      }
      if (lane % 4 == 0) p.lse[int64_t{query.row} * p.num_q_heads + query.head] = lses[j];
    }
  }
  if (partial_begin < 0) write_output<Block>(p, state, factor, lane, here.warp);
}

}  // namespace tokendance::cuda
