// Sixteen fp32 lanes, and the storage types in packs of sixteen, on AVX-512, AVX2 or plain C++.
//
// Kernels are written once against these and compiled once per instruction set. Sixteen lanes on
// every one of them fix the order of reductions, and every operation is exactly rounded, so that
// the results agree bit for bit. A NaN that an arithmetic result rounds to is the one that CUDA's
// conversions give (all payload bits set), whatever NaN went in: x86's depends on operand order.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define TOKENDANCE_LEVEL_portable 0
#define TOKENDANCE_LEVEL_avx2 1
#define TOKENDANCE_LEVEL_avx512 2
#define TOKENDANCE_JOIN(a, b) a##b
#define TOKENDANCE_LEVEL_OF(isa) TOKENDANCE_JOIN(TOKENDANCE_LEVEL_, isa)
#define TOKENDANCE_LEVEL TOKENDANCE_LEVEL_OF(TOKENDANCE_ISA)

#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
#include <immintrin.h>
#endif

#define TOKENDANCE_INLINE inline __attribute__((always_inline))
#define TOKENDANCE_UNROLL _Pragma("GCC unroll 32")

namespace tokendance::TOKENDANCE_ISA {

constexpr int kLanes = 16;
constexpr int64_t kCacheLine = 64;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// The quantized types. Widening gives the element as a number, narrowing limits to the largest
// ones and takes NaN to NaN (e4m3) or to 0 (int8); scales are for others to apply.
struct Float8 {
  uint8_t bits;
};
struct Int8 {
  int8_t bits;
};
constexpr float kLargestFloat8 = 448.0f;
constexpr float kLargestInt8 = 127.0f;
// e4m3 in the upper bits of fp16 has the exponent bias 15 instead of 7: it is too small by this.
constexpr float kFloat8Rebias = 256.0f;
// Below it e4m3 is subnormal: steps of 2^-9. 2^14, added to a magnitude, has that last bit.
constexpr float kSmallestNormalFloat8 = 0x1p-6f;
constexpr float kFloat8Steps = 0x1p14f;
constexpr uint8_t kNan8 = 0x7f;

constexpr uint32_t kNan32 = 0x7fffffff;
constexpr uint16_t kNan16 = 0x7fff;  // fp16 and bf16 alike

#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512

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

#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2

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

#else  // portable

struct F32 {
  float v[kLanes];
};
template <typename T>
struct Packed {
  std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t> v[kLanes];
};
template <>
struct Packed<float> {
  uint32_t v[kLanes];
};

TOKENDANCE_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits;
}
TOKENDANCE_INLINE float float_of(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof a);
  return a;
}

template <typename Operation>
TOKENDANCE_INLINE F32 per_lane(Operation&& operation) {
  F32 result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = operation(i);
  return result;
}
template <typename P, typename Operation>
TOKENDANCE_INLINE P per_packed_lane(Operation&& operation) {
  P result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = operation(i);
  return result;
}

TOKENDANCE_INLINE F32 broadcast(float a) {
  return per_lane([&](int) { return a; });
}
TOKENDANCE_INLINE F32 add(F32 a, F32 b) {
  return per_lane([&](int i) { return a.v[i] + b.v[i]; });
}
TOKENDANCE_INLINE F32 sub(F32 a, F32 b) {
  return per_lane([&](int i) { return a.v[i] - b.v[i]; });
}
TOKENDANCE_INLINE F32 mul(F32 a, F32 b) {
  return per_lane([&](int i) { return a.v[i] * b.v[i]; });
}
TOKENDANCE_INLINE F32 fma_add(F32 a, F32 b, F32 c) {
  return per_lane([&](int i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
TOKENDANCE_INLINE F32 fma_sub(F32 a, F32 b, F32 c) {
  return per_lane([&](int i) { return fmaf(a.v[i], b.v[i], -c.v[i]); });
}
TOKENDANCE_INLINE F32 abs(F32 a) {
  return per_lane([&](int i) { return fabsf(a.v[i]); });
}
TOKENDANCE_INLINE F32 swap_pairs(F32 a) {
  return per_lane([&](int i) { return a.v[i ^ 1]; });
}
TOKENDANCE_INLINE bool all_less_equal(F32 a, F32 b) {
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= a.v[i] <= b.v[i];
  return all;
}

template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p) {
  Packed<T> result;
  memcpy(result.v, p, sizeof result.v);
  return result;
}
template <typename T>
TOKENDANCE_INLINE Packed<T> load_packed(const T* p, int n) {
  Packed<T> result = {};
  memcpy(result.v, p, n * sizeof(T));
  return result;
}
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a) {
  memcpy(p, a.v, sizeof a.v);
}
template <typename T>
TOKENDANCE_INLINE void store(T* p, Packed<T> a, int n) {
  memcpy(p, a.v, n * sizeof(T));
}
template <typename T>
TOKENDANCE_INLINE void stream(T* p, Packed<T> a) {
  store(p, a);
}

TOKENDANCE_INLINE float widen_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  // Subnormal, or zero: mantissa * 2^-24 is exact.
  return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
}
TOKENDANCE_INLINE uint16_t narrow_to_float16(float a) {
  const uint32_t bits = bits_of(a);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return kNan16;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and beyond
  if (magnitude < 0x38800000) {
    // Below the normal range 2^-14: the sum with 0.5 has the wanted bits at its end, rounded.
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}
TOKENDANCE_INLINE uint16_t narrow_to_bfloat16(float a) {
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffff) > 0x7f800000) return kNan16;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
TOKENDANCE_INLINE float widen_float8(uint8_t element) {
  const uint32_t sign = static_cast<uint32_t>(element & 0x80) << 24;
  const uint32_t magnitude = element & 0x7f;
  if (magnitude == kNan8) return float_of(kNan32);
  if (magnitude >= 8) return float_of(sign | ((magnitude << 20) + (120u << 23)));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
}
TOKENDANCE_INLINE uint8_t narrow_to_float8(float a) {
  if (a != a) return kNan8;
  const uint32_t sign = bits_of(a) >> 24 & 0x80;
  const float magnitude = fminf(fabsf(a), kLargestFloat8);
  if (magnitude < kSmallestNormalFloat8) {
    return static_cast<uint8_t>(sign | (bits_of(magnitude + kFloat8Steps) - bits_of(kFloat8Steps)));
  }
  const uint32_t bits = bits_of(magnitude) - (120u << 23);
  return static_cast<uint8_t>(sign | (bits + 0x7ffff + (bits >> 20 & 1)) >> 20);
}
TOKENDANCE_INLINE int8_t narrow_to_int8(float a) {
  if (a != a) return 0;
  const float limited = fmaxf(fminf(a, kLargestInt8), -kLargestInt8);
  return static_cast<int8_t>(nearbyintf(limited));
}

TOKENDANCE_INLINE F32 widen(Packed<float> a) {
  return per_lane([&](int i) { return float_of(a.v[i]); });
}
TOKENDANCE_INLINE F32 widen(Packed<Float16> a) {
  return per_lane([&](int i) { return widen_float16(a.v[i]); });
}
TOKENDANCE_INLINE F32 widen(Packed<BFloat16> a) {
  return per_lane([&](int i) { return float_of(static_cast<uint32_t>(a.v[i]) << 16); });
}
TOKENDANCE_INLINE F32 widen(Packed<Float8> a) {
  return per_lane([&](int i) { return widen_float8(a.v[i]); });
}
TOKENDANCE_INLINE F32 widen(Packed<Int8> a) {
  return per_lane([&](int i) { return static_cast<float>(static_cast<int8_t>(a.v[i])); });
}
template <typename T>
Packed<T> narrow(F32 a);
template <>
TOKENDANCE_INLINE Packed<float> narrow<float>(F32 a) {
  return per_packed_lane<Packed<float> >(
      [&](int i) { return a.v[i] != a.v[i] ? kNan32 : bits_of(a.v[i]); });
}
template <>
TOKENDANCE_INLINE Packed<Float16> narrow<Float16>(F32 a) {
  return per_packed_lane<Packed<Float16> >([&](int i) { return narrow_to_float16(a.v[i]); });
}
template <>
TOKENDANCE_INLINE Packed<BFloat16> narrow<BFloat16>(F32 a) {
  return per_packed_lane<Packed<BFloat16> >([&](int i) { return narrow_to_bfloat16(a.v[i]); });
}
template <>
TOKENDANCE_INLINE Packed<Float8> narrow<Float8>(F32 a) {
  return per_packed_lane<Packed<Float8> >([&](int i) { return narrow_to_float8(a.v[i]); });
}
template <>
TOKENDANCE_INLINE Packed<Int8> narrow<Int8>(F32 a) {
  return per_packed_lane<Packed<Int8> >(
      [&](int i) { return static_cast<uint8_t>(narrow_to_int8(a.v[i])); });
}

template <typename T>
TOKENDANCE_INLINE Packed<T> difference(Packed<T> a, Packed<T> b) {
  return per_packed_lane<Packed<T> >([&](int i) { return a.v[i] ^ b.v[i]; });
}
template <typename T>
TOKENDANCE_INLINE Packed<T> either(Packed<T> a, Packed<T> b) {
  return per_packed_lane<Packed<T> >([&](int i) { return a.v[i] | b.v[i]; });
}
template <typename T>
TOKENDANCE_INLINE bool any(Packed<T> a) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= a.v[i];
  return bits != 0;
}

#endif

template <typename T>
TOKENDANCE_INLINE F32 load(const T* p) {
  return widen(load_packed(p));
}
template <typename T>
TOKENDANCE_INLINE F32 load(const T* p, int n) {
  return widen(load_packed(p, n));
}

// Adds the lanes up, always in the same order.
TOKENDANCE_INLINE float sum_of_lanes(F32 a) {
  alignas(64) float lanes[kLanes];
  memcpy(lanes, &a, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

TOKENDANCE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache, which has more misses in flight than the first.
TOKENDANCE_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// Makes streamed values visible to other threads.
TOKENDANCE_INLINE void finish_streaming() {
#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
  _mm_sfence();
#endif
}

}  // namespace tokendance::TOKENDANCE_ISA
