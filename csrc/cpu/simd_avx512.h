// The lanes of simd.h on AVX-512. Include simd.h instead.
#pragma once

#include "cpu/simd_types.h"

namespace tokendance::TOKENDANCE_ISA {

struct F32 {
  __m512 v;
};
// Sixteen stored values: bits, not numbers.
template <typename T>
struct Packed {
  __m256i v;
};
template <>
struct Packed<Float8> {
  __m128i v;
};
template <>
struct Packed<Int8> {
  __m128i v;
};
template <>
struct Packed<float> {
  __m512i v;
};

TOKENDANCE_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
TOKENDANCE_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
TOKENDANCE_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
TOKENDANCE_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
// a * b + c and a * b - c, rounded once.
TOKENDANCE_INLINE F32 fma_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TOKENDANCE_INLINE F32 fma_sub(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
TOKENDANCE_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// (b, a, d, c, ...) of (a, b, c, d, ...).
TOKENDANCE_INLINE F32 swap_pairs(F32 a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// Whether a <= b in every lane; a NaN is not.
TOKENDANCE_INLINE bool all_less_equal(F32 a, F32 b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ) == 0xffff;
}

TOKENDANCE_INLINE Packed<float> load_packed(const float* p) { return {_mm512_loadu_si512(p)}; }
template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p) {
  if constexpr (sizeof(T) == 1) {
    return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
  } else {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
}
// The first n < 16 values; the other lanes are 0.
TOKENDANCE_INLINE Packed<float> load_packed(const float* p, int n) {
  return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p)};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p, int n) {
  return {_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)};
}
TOKENDANCE_INLINE void store(float* p, Packed<float> a) { _mm512_storeu_si512(p, a.v); }
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a) {
  if constexpr (sizeof(T) == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
  }
}
TOKENDANCE_INLINE void store(float* p, Packed<float> a, int n) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
// Past the caches; p aligned to the size of the pack.
TOKENDANCE_INLINE void stream(float* p, Packed<float> a) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.v);
}
template <typename T>
TOKENDANCE_INLINE void stream(T* p, Packed<T> a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.v);
}

TOKENDANCE_INLINE F32 widen(Packed<float> a) { return {_mm512_castsi512_ps(a.v)}; }
TOKENDANCE_INLINE F32 widen(Packed<Float16> a) { return {_mm512_cvtph_ps(a.v)}; }
TOKENDANCE_INLINE F32 widen(Packed<BFloat16> a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a.v), 16))};
}
// By way of fp16, whose conversion takes subnormals as they are.
TOKENDANCE_INLINE F32 widen(Packed<Float8> a) {
  const __m256i spread = _mm256_slli_epi16(_mm256_cvtepi8_epi16(a.v), 7);
  const __m256i half = _mm256_and_si256(spread, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m128i nan = _mm_set1_epi8(kNan8);
  const __mmask16 number = _mm_cmpneq_epi8_mask(_mm_and_si128(a.v, nan), nan);
  return {_mm512_mask_mul_ps(_mm512_castsi512_ps(_mm512_set1_epi32(kNan32)), number,
                             _mm512_cvtph_ps(half), _mm512_set1_ps(kFloat8Rebias))};
}
TOKENDANCE_INLINE F32 widen(Packed<Int8> a) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a.v))};
}

template <typename T>
Packed<T> narrow(F32 a);
template <>
TOKENDANCE_INLINE Packed<float> narrow<float>(F32 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_epi32(_mm512_castps_si512(a.v), nan, _mm512_set1_epi32(kNan32))};
}
template <>
TOKENDANCE_INLINE Packed<Float16> narrow<Float16>(F32 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m256i half = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(kNan16))};
}
template <>
TOKENDANCE_INLINE Packed<BFloat16> narrow<BFloat16>(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(kNan32));
  return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16))};
}
template <>
TOKENDANCE_INLINE Packed<Float8> narrow<Float8>(F32 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(a.v), _mm512_set1_ps(kLargestFloat8));
  // Three mantissa bits stay; the exponent's bias changes from 127 to 7.
  const __m512i bits = _mm512_castps_si512(magnitude);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 20));
  __m512i code = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff - (120 << 23)));
  code = _mm512_mask_add_epi32(code, odd, code, _mm512_set1_epi32(1));
  code = _mm512_srli_epi32(code, 20);
  const __m512 steps = _mm512_set1_ps(kFloat8Steps);
  const __mmask16 small =
      _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(kSmallestNormalFloat8), _CMP_LT_OQ);
  code = _mm512_mask_sub_epi32(code, small, _mm512_castps_si512(_mm512_add_ps(magnitude, steps)),
                               _mm512_castps_si512(steps));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(a.v));
  code = _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(0x80));
  return {_mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(kNan8)))};
}
template <>
TOKENDANCE_INLINE Packed<Int8> narrow<Int8>(F32 a) {
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512 limited = _mm512_max_ps(_mm512_min_ps(a.v, _mm512_set1_ps(kLargestInt8)),
                                       _mm512_set1_ps(-kLargestInt8));
  return {_mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(number, limited))};
}

// Bits in which packs differ, gathered with `either`.
TOKENDANCE_INLINE Packed<float> difference(Packed<float> a, Packed<float> b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> difference(Packed<T> a, Packed<T> b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
TOKENDANCE_INLINE Packed<float> either(Packed<float> a, Packed<float> b) {
  return {_mm512_or_si512(a.v, b.v)};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> either(Packed<T> a, Packed<T> b) {
  return {_mm256_or_si256(a.v, b.v)};
}
TOKENDANCE_INLINE bool any(Packed<float> a) { return _mm512_test_epi32_mask(a.v, a.v) != 0; }
template <typename T>
TOKENDANCE_INLINE bool any(Packed<T> a) {
  return !_mm256_testz_si256(a.v, a.v);
}

}  // namespace tokendance::TOKENDANCE_ISA
