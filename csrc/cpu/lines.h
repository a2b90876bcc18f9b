// Cache lines of keys and values, and their elements in fp32.
//
// Kernels that are bound by memory read and write whole lines of 64 bytes: 16 fp32, 32 16-bit or 64
// 8-bit elements. In fp32 the latter fill two or four vectors, in the order that is cheapest to
// make: bf16 the even and the odd elements, which are the halves of 32-bit words, the others one
// sixteen after the other. Whoever meets these with values of another source (angles) puts those in
// the same order.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/simd.h"

namespace tokendance::TOKENDANCE_ISA {

template <typename T>
constexpr int kLineElements = static_cast<int>(kCacheLine / sizeof(T));
template <typename T>
constexpr int kLineVectors = kLineElements<T> / kLanes;

// The elements of a line of T as fp32.
template <typename T>
struct Wide {
  F32 v[kLineVectors<T>];
};

template <typename T, typename Operation>
TOKENDANCE_INLINE Wide<T> per_vector(const Operation& operation) {
  Wide<T> result;
  for (int i = 0; i < kLineVectors<T>; ++i) result.v[i] = operation(i);
  return result;
}

#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512

template <typename T>
struct Line {
  __m512i bits;
};

template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p) {
  return {_mm512_loadu_si512(p)};
}
// The first n < kLineElements<T> elements; the others are 0.
template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p, int n) {
  if constexpr (sizeof(T) == 4) {
    return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p)};
  } else if constexpr (sizeof(T) == 1) {
    return {_mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p)};
  } else {
    return {_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p)};
  }
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a) {
  _mm512_storeu_si512(p, a.bits);
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a, int n) {
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), a.bits);
  } else if constexpr (sizeof(T) == 1) {
    _mm512_mask_storeu_epi8(p, (__mmask64{1} << n) - 1, a.bits);
  } else {
    _mm512_mask_storeu_epi16(p, (__mmask32{1} << n) - 1, a.bits);
  }
}
// Past the caches; p aligned to the line.
template <typename T>
TOKENDANCE_INLINE void stream_line(T* p, Line<T> a) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.bits);
}

// NaN lanes become `nan`, in one instruction: of the eight classes of numbers that it tells apart
// the two kinds of NaN keep the first operand and the others take the second.
TOKENDANCE_INLINE __m512 with_nan(F32 a, uint32_t nan) {
  return _mm512_fixupimm_ps(_mm512_castsi512_ps(_mm512_set1_epi32(nan)), a.v,
                            _mm512_set1_epi32(0x11111100), 0);
}
// bf16 in the upper halves of the lanes, rounded to nearest even.
TOKENDANCE_INLINE __m512i rounded_to_bfloat16(F32 a) {
  const __m512i bits = _mm512_castps_si512(with_nan(a, kNan16 << 16));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
}

TOKENDANCE_INLINE Wide<float> widen(Line<float> a) { return {{{_mm512_castsi512_ps(a.bits)}}}; }
TOKENDANCE_INLINE Wide<Float16> widen(Line<Float16> a) {
  return {{{_mm512_cvtph_ps(_mm512_castsi512_si256(a.bits))},
           {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(a.bits, 1))}}};
}
TOKENDANCE_INLINE Wide<BFloat16> widen(Line<BFloat16> a) {
  return {{{_mm512_castsi512_ps(_mm512_slli_epi32(a.bits, 16))},
           {_mm512_castsi512_ps(
               _mm512_and_si512(a.bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}}};
}
TOKENDANCE_INLINE Line<float> narrow(Wide<float> a) {
  return {_mm512_castps_si512(with_nan(a.v[0], kNan32))};
}
TOKENDANCE_INLINE Line<Float16> narrow(Wide<Float16> a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(with_nan(a.v[0], kNan32), kMode)),
                         _mm512_cvtps_ph(with_nan(a.v[1], kNan32), kMode), 1)};
}
TOKENDANCE_INLINE Line<BFloat16> narrow(Wide<BFloat16> a) {
  const __m512i even = _mm512_srli_epi32(rounded_to_bfloat16(a.v[0]), 16);
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded_to_bfloat16(a.v[1]))};
}
template <typename T>
TOKENDANCE_INLINE Wide<T> widen_bytes(Line<T> a) {
  return {{widen(Packed<T>{_mm512_castsi512_si128(a.bits)}),
           widen(Packed<T>{_mm512_extracti32x4_epi32(a.bits, 1)}),
           widen(Packed<T>{_mm512_extracti32x4_epi32(a.bits, 2)}),
           widen(Packed<T>{_mm512_extracti32x4_epi32(a.bits, 3)})}};
}
template <typename T>
TOKENDANCE_INLINE Line<T> narrow_bytes(const Wide<T>& a) {
  __m512i bits = _mm512_castsi128_si512(narrow<T>(a.v[0]).v);
  bits = _mm512_inserti32x4(bits, narrow<T>(a.v[1]).v, 1);
  bits = _mm512_inserti32x4(bits, narrow<T>(a.v[2]).v, 2);
  return {_mm512_inserti32x4(bits, narrow<T>(a.v[3]).v, 3)};
}

template <typename T>
TOKENDANCE_INLINE Line<T> difference(Line<T> a, Line<T> b) {
  return {_mm512_xor_si512(a.bits, b.bits)};
}
template <typename T>
TOKENDANCE_INLINE Line<T> either(Line<T> a, Line<T> b) {
  return {_mm512_or_si512(a.bits, b.bits)};
}
template <typename T>
TOKENDANCE_INLINE bool any(Line<T> a) {
  return _mm512_test_epi32_mask(a.bits, a.bits) != 0;
}

// The even and the odd ones of the 32 values a, b.
TOKENDANCE_INLINE Wide<BFloat16> even_and_odd(F32 a, F32 b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {{{_mm512_permutex2var_ps(a.v, even, b.v)}, {_mm512_permutex2var_ps(a.v, odd, b.v)}}};
}

#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2

template <typename T>
struct Line {
  __m256i lo, hi;
};

template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p) {
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p, int n) {
  alignas(kCacheLine) T buffer[kLineElements<T>] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load_line(static_cast<const T*>(buffer));
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a) {
  __m256i* words = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(words, a.lo);
  _mm256_storeu_si256(words + 1, a.hi);
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a, int n) {
  alignas(kCacheLine) T buffer[kLineElements<T>];
  store_line(static_cast<T*>(buffer), a);
  memcpy(p, buffer, n * sizeof(T));
}
template <typename T>
TOKENDANCE_INLINE void stream_line(T* p, Line<T> a) {
  __m256i* words = reinterpret_cast<__m256i*>(p);
  _mm256_stream_si256(words, a.lo);
  _mm256_stream_si256(words + 1, a.hi);
}

TOKENDANCE_INLINE __m256i with_nan(__m256 a, uint32_t nan) {
  return _mm256_blendv_epi8(_mm256_castps_si256(a), _mm256_set1_epi32(nan), nan_lanes(a));
}
// bf16 in the upper halves of the lanes, rounded to nearest even.
TOKENDANCE_INLINE __m256i rounded_to_bfloat16(__m256 a) {
  const __m256i bits = with_nan(a, kNan16 << 16);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

TOKENDANCE_INLINE Wide<float> widen(Line<float> a) {
  return {{{_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}}};
}
TOKENDANCE_INLINE Wide<Float16> widen(Line<Float16> a) {
  return {{{_mm256_cvtph_ps(_mm256_castsi256_si128(a.lo)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(a.lo, 1))},
           {_mm256_cvtph_ps(_mm256_castsi256_si128(a.hi)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(a.hi, 1))}}};
}
TOKENDANCE_INLINE Wide<BFloat16> widen(Line<BFloat16> a) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {{{_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))},
           {_mm256_castsi256_ps(_mm256_and_si256(a.lo, upper)),
            _mm256_castsi256_ps(_mm256_and_si256(a.hi, upper))}}};
}
TOKENDANCE_INLINE Line<float> narrow(Wide<float> a) {
  return {with_nan(a.v[0].lo, kNan32), with_nan(a.v[0].hi, kNan32)};
}
TOKENDANCE_INLINE __m256i to_float16(F32 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_castsi256_ps(with_nan(a.hi, kNan32)), kMode),
                          _mm256_cvtps_ph(_mm256_castsi256_ps(with_nan(a.lo, kNan32)), kMode));
}
TOKENDANCE_INLINE Line<Float16> narrow(Wide<Float16> a) {
  return {to_float16(a.v[0]), to_float16(a.v[1])};
}
TOKENDANCE_INLINE Line<BFloat16> narrow(Wide<BFloat16> a) {
  const auto merge = [](__m256 even, __m256 odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded_to_bfloat16(even), 16),
                              rounded_to_bfloat16(odd), 0xaa);
  };
  return {merge(a.v[0].lo, a.v[1].lo), merge(a.v[0].hi, a.v[1].hi)};
}
template <typename T>
TOKENDANCE_INLINE Wide<T> widen_bytes(Line<T> a) {
  return {{widen(Packed<T>{_mm256_castsi256_si128(a.lo)}),
           widen(Packed<T>{_mm256_extracti128_si256(a.lo, 1)}),
           widen(Packed<T>{_mm256_castsi256_si128(a.hi)}),
           widen(Packed<T>{_mm256_extracti128_si256(a.hi, 1)})}};
}
template <typename T>
TOKENDANCE_INLINE Line<T> narrow_bytes(const Wide<T>& a) {
  return {_mm256_set_m128i(narrow<T>(a.v[1]).v, narrow<T>(a.v[0]).v),
          _mm256_set_m128i(narrow<T>(a.v[3]).v, narrow<T>(a.v[2]).v)};
}

template <typename T>
TOKENDANCE_INLINE Line<T> difference(Line<T> a, Line<T> b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <typename T>
TOKENDANCE_INLINE Line<T> either(Line<T> a, Line<T> b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
template <typename T>
TOKENDANCE_INLINE bool any(Line<T> a) {
  const __m256i bits = _mm256_or_si256(a.lo, a.hi);
  return !_mm256_testz_si256(bits, bits);
}

TOKENDANCE_INLINE Wide<BFloat16> even_and_odd(F32 a, F32 b) {
  const auto pick = [](__m256 lo, __m256 hi, auto which) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(
        _mm256_castps_pd(_mm256_shuffle_ps(lo, hi, decltype(which)::value)), 0xd8));
  };
  constexpr std::integral_constant<int, 0x88> kEven;
  constexpr std::integral_constant<int, 0xdd> kOdd;
  return {{{pick(a.lo, a.hi, kEven), pick(b.lo, b.hi, kEven)},
           {pick(a.lo, a.hi, kOdd), pick(b.lo, b.hi, kOdd)}}};
}

#else  // portable

template <typename T>
struct Line {
  T elements[kLineElements<T>];
};

template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p) {
  Line<T> a;
  memcpy(a.elements, p, sizeof a.elements);
  return a;
}
template <typename T>
TOKENDANCE_INLINE Line<T> load_line(const T* p, int n) {
  Line<T> a = {};
  memcpy(a.elements, p, n * sizeof(T));
  return a;
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a) {
  memcpy(p, a.elements, sizeof a.elements);
}
template <typename T>
TOKENDANCE_INLINE void store_line(T* p, Line<T> a, int n) {
  memcpy(p, a.elements, n * sizeof(T));
}
template <typename T>
TOKENDANCE_INLINE void stream_line(T* p, Line<T> a) {
  store_line(p, a);
}

TOKENDANCE_INLINE Wide<float> widen(Line<float> a) {
  return {{per_lane([&](int i) { return a.elements[i]; })}};
}
TOKENDANCE_INLINE Wide<Float16> widen(Line<Float16> a) {
  return per_vector<Float16>([&](int v) {
    return per_lane([&](int i) { return widen_float16(a.elements[v * kLanes + i].bits); });
  });
}
TOKENDANCE_INLINE Wide<BFloat16> widen(Line<BFloat16> a) {
  return per_vector<BFloat16>([&](int v) {
    return per_lane(
        [&](int i) { return float_of(static_cast<uint32_t>(a.elements[2 * i + v].bits) << 16); });
  });
}
TOKENDANCE_INLINE Line<float> narrow(Wide<float> a) {
  Line<float> line;
  store(line.elements, narrow<float>(a.v[0]));
  return line;
}
TOKENDANCE_INLINE Line<Float16> narrow(Wide<Float16> a) {
  Line<Float16> line;
  for (int i = 0; i < kLineElements<Float16>; ++i) {
    line.elements[i] = {narrow_to_float16(a.v[i / kLanes].v[i % kLanes])};
  }
  return line;
}
TOKENDANCE_INLINE Line<BFloat16> narrow(Wide<BFloat16> a) {
  Line<BFloat16> line;
  for (int i = 0; i < kLineElements<BFloat16>; ++i) {
    line.elements[i] = {narrow_to_bfloat16(a.v[i % 2].v[i / 2])};
  }
  return line;
}
template <typename T>
TOKENDANCE_INLINE Wide<T> widen_bytes(Line<T> a) {
  return per_vector<T>([&](int v) { return load(a.elements + v * kLanes); });
}
template <typename T>
TOKENDANCE_INLINE Line<T> narrow_bytes(const Wide<T>& a) {
  Line<T> line;
  for (int v = 0; v < kLineVectors<T>; ++v) store(line.elements + v * kLanes, narrow<T>(a.v[v]));
  return line;
}

// Lines are compared word by word, whatever their elements are.
template <typename T, typename Operation>
TOKENDANCE_INLINE Line<T> per_word(Line<T> a, Line<T> b, const Operation& operation) {
  uint64_t x[kCacheLine / 8], y[kCacheLine / 8];
  memcpy(x, a.elements, sizeof x);
  memcpy(y, b.elements, sizeof y);
  for (int64_t i = 0; i < kCacheLine / 8; ++i) x[i] = operation(x[i], y[i]);
  memcpy(a.elements, x, sizeof x);
  return a;
}
template <typename T>
TOKENDANCE_INLINE Line<T> difference(Line<T> a, Line<T> b) {
  return per_word(a, b, [](uint64_t x, uint64_t y) { return x ^ y; });
}
template <typename T>
TOKENDANCE_INLINE Line<T> either(Line<T> a, Line<T> b) {
  return per_word(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
template <typename T>
TOKENDANCE_INLINE bool any(Line<T> a) {
  uint64_t words[kCacheLine / 8], bits = 0;
  memcpy(words, a.elements, sizeof words);
  for (uint64_t word : words) bits |= word;
  return bits != 0;
}

TOKENDANCE_INLINE Wide<BFloat16> even_and_odd(F32 a, F32 b) {
  return per_vector<BFloat16>([&](int v) {
    return per_lane(
        [&](int i) { return i < kLanes / 2 ? a.v[2 * i + v] : b.v[2 * i + v - kLanes]; });
  });
}

#endif

TOKENDANCE_INLINE Wide<Float8> widen(Line<Float8> a) { return widen_bytes(a); }
TOKENDANCE_INLINE Wide<Int8> widen(Line<Int8> a) { return widen_bytes(a); }
TOKENDANCE_INLINE Line<Float8> narrow(const Wide<Float8>& a) { return narrow_bytes(a); }
TOKENDANCE_INLINE Line<Int8> narrow(const Wide<Int8>& a) { return narrow_bytes(a); }

}  // namespace tokendance::TOKENDANCE_ISA
