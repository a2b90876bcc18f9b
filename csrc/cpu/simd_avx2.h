// The lanes of simd.h on AVX2. Include simd.h instead.
#pragma once

#include "cpu/simd_types.h"

namespace tokendance::TOKENDANCE_ISA {

struct F32 {
  __m256 lo, hi;
};
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
  __m256i lo, hi;
};

TOKENDANCE_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
TOKENDANCE_INLINE F32 add(F32 a, F32 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
TOKENDANCE_INLINE F32 sub(F32 a, F32 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
TOKENDANCE_INLINE F32 mul(F32 a, F32 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
TOKENDANCE_INLINE F32 fma_add(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TOKENDANCE_INLINE F32 fma_sub(F32 a, F32 b, F32 c) {
  return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)};
}
TOKENDANCE_INLINE F32 abs(F32 a) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, magnitude), _mm256_and_ps(a.hi, magnitude)};
}
TOKENDANCE_INLINE F32 swap_pairs(F32 a) {
  return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
}
TOKENDANCE_INLINE bool all_less_equal(F32 a, F32 b) {
  return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ),
                                          _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ))) == 0xff;
}

TOKENDANCE_INLINE Packed<float> load_packed(const float* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p) {
  if constexpr (sizeof(T) == 1) {
    return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
  } else {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
}
template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p, int n) {
  alignas(64) T buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load_packed(static_cast<const T*>(buffer));
}
TOKENDANCE_INLINE void store(float* p, Packed<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a) {
  if constexpr (sizeof(T) == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
  }
}
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a, int n) {
  alignas(64) T buffer[kLanes];
  store(static_cast<T*>(buffer), a);
  memcpy(p, buffer, n * sizeof(T));
}
TOKENDANCE_INLINE void stream(float* p, Packed<float> a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
template <typename T>
TOKENDANCE_INLINE void stream(T* p, Packed<T> a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.v);
}

TOKENDANCE_INLINE F32 widen(Packed<float> a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
TOKENDANCE_INLINE F32 widen(Packed<Float16> a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a.v)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(a.v, 1))};
}
TOKENDANCE_INLINE F32 widen(Packed<BFloat16> a) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a.v));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a.v, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
// Eight e4m3 elements, spread over eight 16-bit lanes with their signs, by way of fp16, whose
// conversion takes subnormals as they are.
TOKENDANCE_INLINE __m256 widen_float8(__m128i spread) {
  __m128i half = _mm_and_si128(_mm_slli_epi16(spread, 7), _mm_set1_epi16(0xbfff - 0x10000));
  const __m128i ones = _mm_set1_epi16(kNan8 << 7);
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, ones), ones);
  half = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7fff)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(kFloat8Rebias));
}
TOKENDANCE_INLINE F32 widen(Packed<Float8> a) {
  return {widen_float8(_mm_cvtepi8_epi16(a.v)),
          widen_float8(_mm_cvtepi8_epi16(_mm_unpackhi_epi64(a.v, a.v)))};
}
TOKENDANCE_INLINE F32 widen(Packed<Int8> a) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a.v)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(a.v, a.v)))};
}

TOKENDANCE_INLINE __m256i nan_lanes(__m256 a) {
  return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
template <typename T>
Packed<T> narrow(F32 a);
template <>
TOKENDANCE_INLINE Packed<float> narrow<float>(F32 a) {
  const __m256i nan = _mm256_set1_epi32(kNan32);
  return {_mm256_blendv_epi8(_mm256_castps_si256(a.lo), nan, nan_lanes(a.lo)),
          _mm256_blendv_epi8(_mm256_castps_si256(a.hi), nan, nan_lanes(a.hi))};
}
template <>
TOKENDANCE_INLINE Packed<Float16> narrow<Float16>(F32 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m128i lo = _mm256_cvtps_ph(a.lo, kMode), hi = _mm256_cvtps_ph(a.hi, kMode);
  const __m256i nan =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(nan_lanes(a.lo), nan_lanes(a.hi)), 0xd8);
  return {_mm256_blendv_epi8(_mm256_set_m128i(hi, lo), _mm256_set1_epi16(kNan16), nan)};
}
TOKENDANCE_INLINE __m256i round_to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(kNan32), nan_lanes(a)),
                           16);
}
template <>
TOKENDANCE_INLINE Packed<BFloat16> narrow<BFloat16>(F32 a) {
  const __m256i halves = _mm256_packus_epi32(round_to_bfloat16(a.lo), round_to_bfloat16(a.hi));
  return {_mm256_permute4x64_epi64(halves, 0xd8)};
}
// The lower bytes of sixteen 32-bit lanes, which are -128 to 255.
TOKENDANCE_INLINE __m128i pack_bytes(__m256i lo, __m256i hi) {
  const __m256i low_byte = _mm256_set1_epi32(0xff);
  const __m256i halves = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(lo, low_byte), _mm256_and_si256(hi, low_byte)), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
TOKENDANCE_INLINE __m256i round_to_float8(__m256 a) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN));
  const __m256 magnitude = _mm256_min_ps(_mm256_andnot_ps(sign, a), _mm256_set1_ps(kLargestFloat8));
  // Three mantissa bits stay; the exponent's bias changes from 127 to 7.
  const __m256i bits = _mm256_castps_si256(magnitude);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  __m256i code = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff - (120 << 23)));
  code = _mm256_srli_epi32(_mm256_add_epi32(code, odd), 20);
  const __m256 steps = _mm256_set1_ps(kFloat8Steps);
  const __m256i small_code = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(magnitude, steps)),
                                              _mm256_castps_si256(steps));
  const __m256 small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(kSmallestNormalFloat8), _CMP_LT_OQ);
  code = _mm256_blendv_epi8(code, small_code, _mm256_castps_si256(small));
  const __m256i negative = _mm256_srli_epi32(_mm256_castps_si256(_mm256_and_ps(sign, a)), 24);
  return _mm256_blendv_epi8(_mm256_or_si256(code, negative), _mm256_set1_epi32(kNan8),
                            nan_lanes(a));
}
template <>
TOKENDANCE_INLINE Packed<Float8> narrow<Float8>(F32 a) {
  return {pack_bytes(round_to_float8(a.lo), round_to_float8(a.hi))};
}
TOKENDANCE_INLINE __m256i round_to_int8(__m256 a) {
  const __m256 limited =
      _mm256_max_ps(_mm256_min_ps(a, _mm256_set1_ps(kLargestInt8)), _mm256_set1_ps(-kLargestInt8));
  return _mm256_andnot_si256(nan_lanes(a), _mm256_cvtps_epi32(limited));
}
template <>
TOKENDANCE_INLINE Packed<Int8> narrow<Int8>(F32 a) {
  return {pack_bytes(round_to_int8(a.lo), round_to_int8(a.hi))};
}

TOKENDANCE_INLINE Packed<float> difference(Packed<float> a, Packed<float> b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> difference(Packed<T> a, Packed<T> b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
TOKENDANCE_INLINE Packed<float> either(Packed<float> a, Packed<float> b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
template <typename T>
TOKENDANCE_INLINE Packed<T> either(Packed<T> a, Packed<T> b) {
  return {_mm256_or_si256(a.v, b.v)};
}
TOKENDANCE_INLINE bool any(Packed<float> a) {
  const __m256i bits = _mm256_or_si256(a.lo, a.hi);
  return !_mm256_testz_si256(bits, bits);
}
template <typename T>
TOKENDANCE_INLINE bool any(Packed<T> a) {
  return !_mm256_testz_si256(a.v, a.v);
}

}  // namespace tokendance::TOKENDANCE_ISA
