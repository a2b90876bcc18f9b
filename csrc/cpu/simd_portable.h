// The lanes of simd.h on plain C++. Include simd.h instead.
#pragma once

#include "cpu/simd_types.h"

namespace tokendance::TOKENDANCE_ISA {

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

}  // namespace tokendance::TOKENDANCE_ISA
