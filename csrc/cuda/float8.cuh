// e4m3 in registers: a sign, four bits of exponent (bias 7) and three of mantissa. +-448 are the
// largest numbers, 0x7f and 0xff are NaN, there is no infinity.
//
// From sm_89 on there are instructions that convert; before, it is arithmetic, to the same bits.
// Words hold four elements, the first in the lowest byte.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

#include "tokendance/rope.h"

namespace tokendance::cuda {

struct Float8 {
  uint8_t bits;
};

template <typename T>
constexpr bool kIsQuantized = false;
template <>
inline constexpr bool kIsQuantized<Float8> = true;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define TOKENDANCE_CONVERTS_FLOAT8 1
#else
#define TOKENDANCE_CONVERTS_FLOAT8 0
#endif

// The number that the low byte is.
__device__ __forceinline__ float float8_to_float(uint32_t code) {
#if TOKENDANCE_CONVERTS_FLOAT8
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(code & 0xff)));
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
#else
  // As bits of an fp32 the magnitude is that of the number times 2^-120, subnormal or not: by so
  // much the biases of the exponents differ.
  // A selected factor, for a selected result would become a branch.
  const uint32_t magnitude = code & 0x7f;
  const float factor = magnitude == 0x7f ? __uint_as_float(0x7fffffff) : 0x1p120f;
  const float value = rounded_product(__uint_as_float(magnitude << 20), factor);
  return __uint_as_float(__float_as_uint(value) | (code & 0x80) << 24);
#endif
}

// Two of them, in the low bytes.
__device__ __forceinline__ void float8_to_floats(uint32_t codes, float* first, float* second) {
#if TOKENDANCE_CONVERTS_FLOAT8
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
  *first = __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
  *second = __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
#else
  *first = float8_to_float(codes);
  *second = float8_to_float(codes >> 8);
#endif
}

// The nearest e4m3, ties to even, of a number limited to +-448; of NaN 0x7f.
__device__ __forceinline__ uint32_t float_to_float8(float x) {
#if TOKENDANCE_CONVERTS_FLOAT8
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return pair;
#else
  const float magnitude = fminf(fabsf(x), 448.0f);
  // The sum with 2^20 times the power of two that is not above the number (not below 2^-6, as for
  // subnormals) ends where the e4m3 ends: the adder rounds. Its last bits count eighths.
  const uint32_t power = __float_as_uint(fmaxf(magnitude, 0x1p-6f)) & 0x7f800000;
  const uint32_t base = power + (20u << 23);
  const float sum = __fadd_rn(magnitude, __uint_as_float(base));
  const uint32_t eighths = __float_as_uint(sum) - base;
  const uint32_t code = (power >> 20) + eighths - (121u << 3);  // 2^-6 has the exponent 121
  return isnan(x) ? 0x7f : code | (__float_as_uint(x) >> 24 & 0x80);
#endif
}

// Of two numbers, in the low bytes.
__device__ __forceinline__ uint32_t floats_to_float8(float first, float second) {
#if TOKENDANCE_CONVERTS_FLOAT8
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return float_to_float8(first) | float_to_float8(second) << 8;
#endif
}

}  // namespace tokendance::cuda
