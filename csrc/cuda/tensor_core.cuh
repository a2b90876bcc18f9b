// Tensor core instructions on 16-bit types, and the layout of shared memory that feeds them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "cuda/vector_io.cuh"

namespace tokendance::cuda {

// Rows of kHeadDim elements in shared memory, without gaps, as pieces of 16 bytes whose order in a
// row depends on the row: the same piece of 8 adjacent rows, which a phase of ldmatrix reads, lies
// in 8 distinct groups of banks, and so do 8 pieces that are adjacent in memory, which a phase of
// cp.async writes. Rows of 2^n pieces would otherwise all start at the same bank.
template <typename T, int kHeadDim>
struct SwizzledRows {
  static constexpr uint32_t kPiece = 16 / sizeof(T);      // elements
  static constexpr uint32_t kPieces = kHeadDim / kPiece;  // of a row
  // Pieces change places within groups of the largest power of two, up to 8, that divides a row.
  // Rows of an odd number of pieces start at different banks anyhow.
  static constexpr uint32_t kGroup = kPieces % 8 == 0   ? 8
                                     : kPieces % 4 == 0 ? 4
                                     : kPieces % 2 == 0 ? 2
                                                        : 1;
  static_assert(kPieces % kGroup == 0, "rows consist of groups");

  // Elements from the start of row 0 to piece `index` of a row.
  static __device__ __forceinline__ uint32_t piece(uint32_t row, uint32_t index) {
    return (row * kPieces + index / kGroup * kGroup + (index % kGroup ^ order(row))) * kPiece;
  }
  // To piece 2 * pair + second: for constant pairs, few distinct addresses and constant distances.
  static __device__ __forceinline__ uint32_t piece(uint32_t row, uint32_t pair, uint32_t second) {
    const uint32_t index = 2 * pair;
    return (row * kPieces + (second ^ order(row) ^ index % kGroup)) * kPiece +
           index / kGroup * kGroup * kPiece;
  }
  static __device__ __forceinline__ uint32_t element(uint32_t row, uint32_t dim) {
    return piece(row, dim / kPiece) + dim % kPiece;
  }
  // What the places of a row's pieces in their group differ by from those of row 0.
  static __device__ __forceinline__ constexpr uint32_t order(uint32_t row) {
    return row % 8 / (8 / kGroup);
  }
};

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8,
// and gets elements 2 * (i % 4) and the next one of row i / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&matrix)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}

// sum [16, 8] += a [16, 16] * b [16, 8], in fp32. Lane i holds elements 2 * (i % 4) and the next
// one of rows i / 4 (sum[0], sum[1]) and i / 4 + 8 (sum[2], sum[3]).
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two fp16 operands of an mma.
struct HalfPairs {
  uint32_t even, odd;
};

// What e4m3 elements are multiplied with when they are widened to fp16: nothing, or a power of two
// that the arithmetic without a conversion leaves out.
__device__ __forceinline__ constexpr float widened_unit() {
#if TOKENDANCE_CONVERTS_FLOAT8
  return 1.0f;
#else
  return 256.0f;
#endif
}

// The even and the odd bytes of a word, each as fp16 over widened_unit(): exact, subnormals, too.
// Without a conversion, sign, exponent and mantissa move to their places in an fp16, whose bias is
// larger by 8; NaN becomes +-480 over the unit.
__device__ __forceinline__ HalfPairs widen(uint32_t word) {
#if TOKENDANCE_CONVERTS_FLOAT8
  const uint32_t sorted = __byte_perm(word, 0, 0x3120);
  HalfPairs pairs;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs.even) : "h"(static_cast<uint16_t>(sorted)));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs.odd) : "h"(static_cast<uint16_t>(sorted >> 16)));
  return pairs;
#else
  return {(word << 7 & 0x3f803f80) | (word << 8 & 0x80008000),
          (word >> 1 & 0x3f803f80) | (word & 0x80008000)};
#endif
}

// The same, with NaN as a number on every architecture: +-480 over the unit, or 480. So a value of
// no weight adds nothing, whatever it is.
__device__ __forceinline__ HalfPairs widen_to_numbers(uint32_t word) {
  HalfPairs pairs = widen(word);
#if TOKENDANCE_CONVERTS_FLOAT8
  constexpr uint32_t k480 = 0x5f805f80;
  asm("min.f16x2 %0, %0, %1;" : "+r"(pairs.even) : "r"(k480));
  asm("min.f16x2 %0, %0, %1;" : "+r"(pairs.odd) : "r"(k480));
#endif
  return pairs;
}

// Two elements of a register of an mma, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace tokendance::cuda
