// The two products of attention, of a warp's query rows with a tile of keys or values.
//
// Scores and outputs stand in registers as an mma leaves them: of each 16 rows lane i has, of rows
// i / 4 (elements 0 and 1) and i / 4 + 8 (elements 2 and 3), two adjacent columns of each group of
// 8. So the rows of a lane are known without its products, and a row's maximum is one over four
// lanes.
//
// A fragment of keys or values, once it is read from shared memory, and widened, meets all rows of
// the warp, 16 at a time.
#pragma once

#include <string.h>

#include "cuda/collective_attention_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/tensor_core.cuh"

namespace tokendance::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Results of a product, of so many times 16 rows and so many columns.
template <int kMmas, int kColumns>
using Fragments = float[kMmas][kColumns / 8][4];

template <int kMmas, int kColumns>
__device__ __forceinline__ void clear(Fragments<kMmas, kColumns>& fragments) {
#pragma unroll
  for (auto& of_rows : fragments) {
#pragma unroll
    for (auto& fragment : of_rows) {
      fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0.0f;
    }
  }
}

// Weights as operands of a product: rounded to T, and half of the registers that scores take.
template <typename T, int kKeys, int kMmas>
struct PackedWeights {
  uint32_t pairs[kMmas][kKeys / 8][2];  // of adjacent keys, of rows lane / 4 and lane / 4 + 8

  __device__ __forceinline__ void operator=(const Fragments<kMmas, kKeys>& scores) {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          pairs[m][n][j] = pack_pair<T>(scores[m][n][2 * j], scores[m][n][2 * j + 1]);
        }
      }
    }
  }

  // The operand of 16 keys, from 16 * k on.
  __device__ __forceinline__ void load(int m, int k, uint32_t (&weight)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[i] = pairs[m][2 * k + i / 2][i % 2];
  }
};

// On tensor cores. Sums are fp32. A warp has kMmas times 16 query rows.
template <typename T, int kHeadDim, int kKeys, int kMmas>
struct AttentionProducts {
  using Scores = Fragments<kMmas, kKeys>;
  using Sums = Fragments<kMmas, kHeadDim>;
  using Weights = PackedWeights<T, kKeys, kMmas>;
  using Query = T;  // elements of the queries in shared memory
  using Rows = SwizzledRows<T, kHeadDim>;

  // Where a dim of the queries lies: in its place.
  static constexpr bool kPartsQueries = false;
  static __device__ __forceinline__ uint32_t query_place(uint32_t dim) { return dim; }

  // scores = queries [rows, kHeadDim] * keys [kKeys, kHeadDim]^T
  static __device__ __forceinline__ void score(const T* queries, const T* keys, int32_t lane,
                                               Scores& scores) {
    const uint32_t query_row = lane % 16, query_piece = lane / 16;
    const uint32_t key_row = lane / 16 * 8 + lane % 8, key_piece = lane / 8 % 2;
    clear<kMmas, kKeys>(scores);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t query[kMmas][4];
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
        load_matrices(query[m], shared_address(queries + kMmaRows * m * kHeadDim +
                                               Rows::piece(query_row, k, query_piece)));
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t key[4];
        load_matrices(
            key, shared_address(keys + 16 * n * kHeadDim + Rows::piece(key_row, k, key_piece)));
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          multiply_add<T>(scores[m][2 * n], query[m], key[0], key[1]);
          multiply_add<T>(scores[m][2 * n + 1], query[m], key[2], key[3]);
        }
      }
    }
  }

  // sums [rows, kHeadDim] += weights [rows, kKeys] * values [kKeys, kHeadDim]
  static __device__ __forceinline__ void add_values(const Weights& weights, const T* values,
                                                    int32_t lane, Sums& sums) {
    const uint32_t value_row = lane % 16, value_piece = lane / 16;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t weight[kMmas][4];
#pragma unroll
      for (int m = 0; m < kMmas; ++m) weights.load(m, k, weight[m]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t value[4];
        load_transposed_matrices(value, shared_address(values + 16 * k * kHeadDim +
                                                       Rows::piece(value_row, n, value_piece)));
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          multiply_add<T>(sums[m][2 * n], weight[m], value[0], value[1]);
          multiply_add<T>(sums[m][2 * n + 1], weight[m], value[2], value[3]);
        }
      }
    }
  }

  // The first of the two adjacent dims that sums[m][n] has.
  static __device__ __forceinline__ int32_t dim(int n, int32_t lane) {
    return n * 8 + lane % 4 * 2;
  }
};

// On tensor cores, of e4m3 keys and values with fp16 queries and weights. ldmatrix takes two bytes
// for one element: so a lane gets, of a key, 4 adjacent dims of each 16, and of values 2 adjacent
// dims of two keys. Either way the even and the odd bytes of a register make two operands
// (tensor_core.cuh). For the keys that is another order of the dims, in which the queries lie in
// shared memory, too; for the values the even dims of 16 are one product and the odd ones another.
template <int kHeadDim, int kKeys, int kMmas>
struct AttentionProducts<Float8, kHeadDim, kKeys, kMmas> {
  using Scores = Fragments<kMmas, kKeys>;
  using Sums = Fragments<kMmas, kHeadDim>;
  using Weights = PackedWeights<__half, kKeys, kMmas>;
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
                                               int32_t lane, Scores& scores) {
    const uint32_t query_row = lane % 16, query_piece = lane / 16;
    clear<kMmas, kKeys>(scores);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t query[kMmas][4];
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
        load_matrices(query[m], shared_address(queries + kMmaRows * m * kHeadDim +
                                               QueryRows::piece(query_row, k, query_piece)));
      }
#pragma unroll
      for (int n = 0; n < kKeys / 32; ++n) {
        uint32_t key[4];  // of 8 keys each
        load_matrices(key, shared_address(keys + 32 * n * kHeadDim + Rows::piece(lane, k)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const HalfPairs pairs = widen(key[i]);
#pragma unroll
          for (int m = 0; m < kMmas; ++m) {
            multiply_add<__half>(scores[m][4 * n + i], query[m], pairs.even, pairs.odd);
          }
        }
      }
    }
  }

  // sums[m][2 * n] are even dims of 16, sums[m][2 * n + 1] odd ones, until arrange().
  static __device__ __forceinline__ void add_values(const Weights& weights, const Float8* values,
                                                    int32_t lane, Sums& sums) {
    if constexpr (kHeadDim == 256) {
      // 16 keys at a time, for the sums take half of the registers.
      const uint32_t value_row = lane % 16, value_piece = lane / 16;
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        uint32_t weight[kMmas][4];
#pragma unroll
        for (int m = 0; m < kMmas; ++m) weights.load(m, k, weight[m]);
#pragma unroll
        for (int n = 0; n < kHeadDim / 32; ++n) {
          uint32_t value[4];  // of 8 keys each, twice 16 dims
          load_transposed_matrices(value, shared_address(values + 16 * k * kHeadDim +
                                                         Rows::piece(value_row, n, value_piece)));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs first = widen_to_numbers(value[2 * i]);
            const HalfPairs second = widen_to_numbers(value[2 * i + 1]);
#pragma unroll
            for (int m = 0; m < kMmas; ++m) {
              multiply_add<__half>(sums[m][4 * n + 2 * i], weight[m], first.even, second.even);
              multiply_add<__half>(sums[m][4 * n + 2 * i + 1], weight[m], first.odd, second.odd);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kKeys / 32; ++k) {
        uint32_t weight[kMmas][2][4];  // of 16 keys each
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          weights.load(m, 2 * k, weight[m][0]);
          weights.load(m, 2 * k + 1, weight[m][1]);
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) {
          uint32_t value[4];  // of 8 keys each
          load_transposed_matrices(
              value, shared_address(values + 32 * k * kHeadDim + Rows::piece(lane, n)));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs first = widen_to_numbers(value[2 * i]);
            const HalfPairs second = widen_to_numbers(value[2 * i + 1]);
#pragma unroll
            for (int m = 0; m < kMmas; ++m) {
              multiply_add<__half>(sums[m][2 * n], weight[m][i], first.even, second.even);
              multiply_add<__half>(sums[m][2 * n + 1], weight[m][i], first.odd, second.odd);
            }
          }
        }
      }
    }
  }

  // Afterwards the sums of a lane are 4 adjacent dims of each 16, as in fp32.
  static __device__ __forceinline__ void arrange(Sums& sums) {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float third = sums[m][n][j + 1];
          sums[m][n][j + 1] = sums[m][n + 1][j];
          sums[m][n + 1][j] = third;
        }
      }
    }
  }

  static __device__ __forceinline__ int32_t dim(int n, int32_t lane) {
    return n / 2 * 16 + lane % 4 * 4 + n % 2 * 2;
  }
};

// In fp32 on CUDA cores, of 16 query rows. The sums of a lane are 4 adjacent dims of each 16, for
// loads of 16 bytes.
template <int kHeadDim, int kKeys>
struct AttentionProducts<float, kHeadDim, kKeys, 1> {
  using Scores = Fragments<1, kKeys>;
  using Sums = Fragments<1, kHeadDim>;
  using Query = float;
  using Rows = SwizzledRows<float, kHeadDim>;

  static constexpr bool kPartsQueries = false;
  static __device__ __forceinline__ uint32_t query_place(uint32_t dim) { return dim; }

  static __device__ __forceinline__ float4 load(const float* rows, int32_t row, int32_t piece) {
    return *reinterpret_cast<const float4*>(rows + Rows::piece(row, piece));
  }

  static __device__ __forceinline__ void score(const float* queries, const float* keys,
                                               int32_t lane, Scores& all) {
    auto& scores = all[0];
    const int32_t row = lane / 4, key_row = lane % 4 * 2;
    clear<1, kKeys>(all);
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

    __device__ __forceinline__ void operator=(const Scores& scores) {
      memcpy(of, scores[0], sizeof(of));
    }
  };

  static __device__ __forceinline__ void add_values(const Weights& weights, const float* values,
                                                    int32_t lane, Sums& all) {
    auto& sums = all[0];
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
