// The two products of attention, of a warp's 16 query rows with a tile of keys or values.
//
// Scores and outputs stand in registers as an mma leaves them: lane i has, of rows i / 4 (elements
// 0 and 1) and i / 4 + 8 (elements 2 and 3), two adjacent columns of each group of 8. So the rows
// of a lane are known without its products, and a row's maximum is one over four lanes.
#pragma once

#include <string.h>

#include "cuda/ptx.cuh"
#include "cuda/tensor_core.cuh"

namespace tokendance::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Weights as operands of a product: rounded to T, and half of the registers that scores take.
template <typename T, int kKeys>
struct PackedWeights {
  uint32_t pairs[kKeys / 8][2];  // of adjacent keys, of rows lane / 4 and lane / 4 + 8

  __device__ __forceinline__ void operator=(const float (&scores)[kKeys / 8][4]) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        pairs[n][j] = pack_pair<T>(scores[n][2 * j], scores[n][2 * j + 1]);
      }
    }
  }
};

// On tensor cores. Sums are fp32.
template <typename T, int kHeadDim, int kKeys>
struct AttentionProducts {
  using Query = T;  // elements of the queries in shared memory
  using Rows = SwizzledRows<T, kHeadDim>;

  // Where a dim of the queries lies: in its place.
  static constexpr bool kPartsQueries = false;
  static __device__ __forceinline__ uint32_t query_place(uint32_t dim) { return dim; }

  // scores = queries [16, kHeadDim] * keys [kKeys, kHeadDim]^T
  static __device__ __forceinline__ void score(const T* queries, const T* keys, int32_t lane,
                                               float (&scores)[kKeys / 8][4]) {
    const uint32_t query_row = lane % 16, query_piece = lane / 16;
    const uint32_t key_row = lane / 16 * 8 + lane % 8, key_piece = lane / 8 % 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t query[4];
      load_matrices(query, shared_address(queries + Rows::piece(query_row, k, query_piece)));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t key[4];
        load_matrices(
            key, shared_address(keys + 16 * n * kHeadDim + Rows::piece(key_row, k, key_piece)));
        multiply_add<T>(scores[2 * n], query, key[0], key[1]);
        multiply_add<T>(scores[2 * n + 1], query, key[2], key[3]);
      }
    }
  }

  using Weights = PackedWeights<T, kKeys>;

  // sums [16, kHeadDim] += weights [16, kKeys] * values [kKeys, kHeadDim]
  static __device__ __forceinline__ void add_values(const Weights& weights, const T* values,
                                                    int32_t lane, float (&sums)[kHeadDim / 8][4]) {
    const uint32_t value_row = lane % 16, value_piece = lane / 16;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t weight[4] = {weights.pairs[2 * k][0], weights.pairs[2 * k][1],
                                  weights.pairs[2 * k + 1][0], weights.pairs[2 * k + 1][1]};
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t value[4];
        load_transposed_matrices(value, shared_address(values + 16 * k * kHeadDim +
                                                       Rows::piece(value_row, n, value_piece)));
        multiply_add<T>(sums[2 * n], weight, value[0], value[1]);
        multiply_add<T>(sums[2 * n + 1], weight, value[2], value[3]);
      }
    }
  }

  // The first of the two adjacent dims that sums[n] has.
  static __device__ __forceinline__ int32_t dim(int n, int32_t lane) {
    return n * 8 + lane % 4 * 2;
  }
};

// On tensor cores, of e4m3 keys and values with fp16 queries and weights. ldmatrix takes two bytes
// for one element: so a lane gets, of a key, 4 adjacent dims of each 16, and of values 2 adjacent
// dims of two keys. Either way the even and the odd bytes of a register make two operands
// (tensor_core.cuh). For the keys that is another order of the dims, in which the queries lie in
// shared memory, too; for the values the even dims of 16 are one product and the odd ones another.
template <int kHeadDim, int kKeys>
struct AttentionProducts<Float8, kHeadDim, kKeys> {
  using Query = __half;
  using Rows = SwizzledRows<Float8, kHeadDim>;
  using QueryRows = SwizzledRows<__half, kHeadDim>;

  // Where a dim of the queries lies among the 16, the even ones before the odd ones: those of a
  // lane's register are those of its keys.
  static constexpr bool kPartsQueries = true;
  static __device__ __forceinline__ uint32_t query_place(uint32_t dim) {
    return dim / 16 * 16 + dim % 2 * 8 + dim % 16 / 4 * 2 + dim % 4 / 2;
  }

  static __device__ __forceinline__ void score(const __half* queries, const Float8* keys,
                                               int32_t lane, float (&scores)[kKeys / 8][4]) {
    const uint32_t query_row = lane % 16, query_piece = lane / 16;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t query[4];
      load_matrices(query, shared_address(queries + QueryRows::piece(query_row, k, query_piece)));
#pragma unroll
      for (int n = 0; n < kKeys / 32; ++n) {
        uint32_t key[4];  // of 8 keys each
        load_matrices(key, shared_address(keys + 32 * n * kHeadDim + Rows::piece(lane, k)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const HalfPairs pairs = widen(key[i]);
          multiply_add<__half>(scores[4 * n + i], query, pairs.even, pairs.odd);
        }
      }
    }
  }

  using Weights = PackedWeights<__half, kKeys>;

  // sums[2 * n] are even dims of 16, sums[2 * n + 1] odd ones, until arrange().
  static __device__ __forceinline__ void add_values(const Weights& weights, const Float8* values,
                                                    int32_t lane, float (&sums)[kHeadDim / 8][4]) {
    if constexpr (kHeadDim == 256) {
      // 16 keys at a time, for the sums take half of the registers.
      const uint32_t value_row = lane % 16, value_piece = lane / 16;
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        const uint32_t weight[4] = {weights.pairs[2 * k][0], weights.pairs[2 * k][1],
                                    weights.pairs[2 * k + 1][0], weights.pairs[2 * k + 1][1]};
#pragma unroll
        for (int n = 0; n < kHeadDim / 32; ++n) {
          uint32_t value[4];  // of 8 keys each, twice 16 dims
          load_transposed_matrices(value, shared_address(values + 16 * k * kHeadDim +
                                                         Rows::piece(value_row, n, value_piece)));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs first = widen_to_numbers(value[2 * i]);
            const HalfPairs second = widen_to_numbers(value[2 * i + 1]);
            multiply_add<__half>(sums[4 * n + 2 * i], weight, first.even, second.even);
            multiply_add<__half>(sums[4 * n + 2 * i + 1], weight, first.odd, second.odd);
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kKeys / 32; ++k) {
        uint32_t weight[2][4];  // of 16 keys each
#pragma unroll
        for (int i = 0; i < 8; ++i) weight[i / 4][i % 4] = weights.pairs[4 * k + i / 2][i % 2];
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          uint32_t value[4];  // of 8 keys each
          load_transposed_matrices(
              value, shared_address(values + 32 * k * kHeadDim + Rows::piece(lane, n)));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs first = widen_to_numbers(value[2 * i]);
            const HalfPairs second = widen_to_numbers(value[2 * i + 1]);
            multiply_add<__half>(sums[2 * n], weight[i], first.even, second.even);
            multiply_add<__half>(sums[2 * n + 1], weight[i], first.odd, second.odd);
          }
        }
      }
    }
  }

  // Afterwards the sums of a lane are 4 adjacent dims of each 16, as in fp32.
  static __device__ __forceinline__ void arrange(float (&sums)[kHeadDim / 8][4]) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float third = sums[n][j + 1];
        sums[n][j + 1] = sums[n + 1][j];
        sums[n + 1][j] = third;
      }
    }
  }

  static __device__ __forceinline__ int32_t dim(int n, int32_t lane) {
    return n / 2 * 16 + lane % 4 * 4 + n % 2 * 2;
  }
};

// In fp32 on CUDA cores. The sums of a lane are 4 adjacent dims of each 16, for loads of 16 bytes.
template <int kHeadDim, int kKeys>
struct AttentionProducts<float, kHeadDim, kKeys> {
  using Query = float;
  using Rows = SwizzledRows<float, kHeadDim>;

  static constexpr bool kPartsQueries = false;
  static __device__ __forceinline__ uint32_t query_place(uint32_t dim) { return dim; }

  static __device__ __forceinline__ float4 load(const float* rows, int32_t row, int32_t piece) {
    return *reinterpret_cast<const float4*>(rows + Rows::piece(row, piece));
  }

  static __device__ __forceinline__ void score(const float* queries, const float* keys,
                                               int32_t lane, float (&scores)[kKeys / 8][4]) {
    const int32_t row = lane / 4, key_row = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
    }
#pragma unroll 2
    for (int piece = 0; piece < kHeadDim / 4; ++piece) {
      const float4 query[2] = {load(queries, row, piece), load(queries, row + 8, piece)};
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const float4 key = load(keys, i / 2 * 8 + key_row + i % 2, piece);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i / 2][2 * j + i % 2];
          score = fmaf(query[j].x, key.x, score);
          score = fmaf(query[j].y, key.y, score);
          score = fmaf(query[j].z, key.z, score);
          score = fmaf(query[j].w, key.w, score);
        }
      }
    }
  }

  struct Weights {
    float of[kKeys / 8][4];

    __device__ __forceinline__ void operator=(const float (&scores)[kKeys / 8][4]) {
      memcpy(of, scores, sizeof(of));
    }
  };

  static __device__ __forceinline__ void add_values(const Weights& weights, const float* values,
                                                    int32_t lane, float (&sums)[kHeadDim / 8][4]) {
    // The weights of a key are in one lane of the four that share its row.
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
#pragma unroll 1
      for (int32_t owner = 0; owner < 4; ++owner) {
        const float weight[2] = {
            __shfl_sync(kAllLanes, weights.of[i / 2][i % 2], lane / 4 * 4 + owner),
            __shfl_sync(kAllLanes, weights.of[i / 2][2 + i % 2], lane / 4 * 4 + owner)};
        const int32_t row = i / 2 * 8 + owner * 2 + i % 2;
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          const float4 value = load(values, row, n * 4 + lane % 4);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            sums[2 * n][2 * j] = fmaf(weight[j], value.x, sums[2 * n][2 * j]);
            sums[2 * n][2 * j + 1] = fmaf(weight[j], value.y, sums[2 * n][2 * j + 1]);
            sums[2 * n + 1][2 * j] = fmaf(weight[j], value.z, sums[2 * n + 1][2 * j]);
            sums[2 * n + 1][2 * j + 1] = fmaf(weight[j], value.w, sums[2 * n + 1][2 * j + 1]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ int32_t dim(int n, int32_t lane) {
    return n / 2 * 16 + lane % 4 * 4 + n % 2 * 2;
  }
};

}  // namespace tokendance::cuda
