// Vectors of fp32 lanes as wide as the instruction set has them, for kernels that are bound by
// arithmetic and block their loops by the number of registers.
//
// simd.h has sixteen lanes everywhere, so that results agree bit for bit; here the width, and with
// it the order of sums, is the machine's.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/dtypes.h"

namespace tokendance::TOKENDANCE_ISA {

template <int kWidth>
struct Lanes {
  static constexpr int kCount = kWidth;
  typedef float Floats __attribute__((vector_size(kWidth * 4)));
  typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
  Floats v;
};

// Lanes of a full vector, half of one where halves are worth having (else 0), and registers.
#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
constexpr int kFullLanes = 16;
constexpr int kHalfLanes = 8;
constexpr int kVectorRegisters = 32;
#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2
constexpr int kFullLanes = 8;
constexpr int kHalfLanes = 0;
constexpr int kVectorRegisters = 16;
#else
constexpr int kFullLanes = 4;
constexpr int kHalfLanes = 0;
constexpr int kVectorRegisters = 16;
#endif
using Full = Lanes<kFullLanes>;

template <typename V>
TOKENDANCE_INLINE V load_lanes(const float* p) {
  V a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
template <typename V>
TOKENDANCE_INLINE void store_lanes(float* p, V a) {
  memcpy(p, &a.v, sizeof a.v);
}
template <typename V>
TOKENDANCE_INLINE V repeat(float a) {
  return {a - typename V::Floats{}};
}
template <typename V>
TOKENDANCE_INLINE V repeat(const float* p) {
  return repeat<V>(*p);
}
template <int W>
TOKENDANCE_INLINE Lanes<W> operator+(Lanes<W> a, Lanes<W> b) {
  return {a.v + b.v};
}
template <int W>
TOKENDANCE_INLINE Lanes<W> operator-(Lanes<W> a, Lanes<W> b) {
  return {a.v - b.v};
}
template <int W>
TOKENDANCE_INLINE Lanes<W> operator*(Lanes<W> a, Lanes<W> b) {
  return {a.v * b.v};
}
template <int W>
TOKENDANCE_INLINE Lanes<W> operator/(Lanes<W> a, Lanes<W> b) {
  return {a.v / b.v};
}

// a * b + c, fused where that is one instruction.
template <int W>
TOKENDANCE_INLINE Lanes<W> multiply_add(Lanes<W> a, Lanes<W> b, Lanes<W> c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < W; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return {a.v * b.v + c.v};
#endif
}
// b if either is NaN.
template <int W>
TOKENDANCE_INLINE Lanes<W> larger(Lanes<W> a, Lanes<W> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <int W>
TOKENDANCE_INLINE Lanes<W> smaller(Lanes<W> a, Lanes<W> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <int W>
TOKENDANCE_INLINE float largest_lane(Lanes<W> a) {
  float result = a.v[0];
  for (int i = 1; i < W; ++i) result = a.v[i] > result ? a.v[i] : result;
  return result;
}
template <int W>
TOKENDANCE_INLINE float lane_sum(Lanes<W> a) {
  float result = 0.0f;
  for (int i = 0; i < W; ++i) result += a.v[i];
  return result;
}

// The first kFullLanes of stored elements, as fp32.
TOKENDANCE_INLINE Full load_full(const float* p) { return load_lanes<Full>(p); }

#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512

TOKENDANCE_INLINE Lanes<16> multiply_add(Lanes<16> a, Lanes<16> b, Lanes<16> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
TOKENDANCE_INLINE Lanes<8> multiply_add(Lanes<8> a, Lanes<8> b, Lanes<8> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
TOKENDANCE_INLINE Lanes<16> larger(Lanes<16> a, Lanes<16> b) { return {_mm512_max_ps(a.v, b.v)}; }
TOKENDANCE_INLINE Lanes<8> larger(Lanes<8> a, Lanes<8> b) { return {_mm256_max_ps(a.v, b.v)}; }
TOKENDANCE_INLINE float largest_lane(Lanes<16> a) { return _mm512_reduce_max_ps(a.v); }
TOKENDANCE_INLINE float lane_sum(Lanes<16> a) { return _mm512_reduce_add_ps(a.v); }
TOKENDANCE_INLINE Lanes<8> lower_half(Lanes<16> a) { return {_mm512_castps512_ps256(a.v)}; }
template <typename T>
TOKENDANCE_INLINE Full load_full(const T* p) {
  return {load(p).v};
}

#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2

TOKENDANCE_INLINE Lanes<8> multiply_add(Lanes<8> a, Lanes<8> b, Lanes<8> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
TOKENDANCE_INLINE Lanes<8> larger(Lanes<8> a, Lanes<8> b) { return {_mm256_max_ps(a.v, b.v)}; }
TOKENDANCE_INLINE Full load_full(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
TOKENDANCE_INLINE Full load_full(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
TOKENDANCE_INLINE Full load_full(const Float8* p) {
  return {widen_float8(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
TOKENDANCE_INLINE Full load_full(const Int8* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}

#else

TOKENDANCE_INLINE Full load_full(const Float16* p) {
  Full a;
  for (int i = 0; i < kFullLanes; ++i) a.v[i] = widen_float16(p[i].bits);
  return a;
}
TOKENDANCE_INLINE Full load_full(const BFloat16* p) {
  Full::Ints bits;
  for (int i = 0; i < kFullLanes; ++i) bits[i] = static_cast<int32_t>(uint32_t{p[i].bits} << 16);
  return {reinterpret_cast<Full::Floats>(bits)};
}
TOKENDANCE_INLINE Full load_full(const Float8* p) {
  Full a;
  for (int i = 0; i < kFullLanes; ++i) a.v[i] = widen_float8(p[i].bits);
  return a;
}
TOKENDANCE_INLINE Full load_full(const Int8* p) {
  Full a;
  for (int i = 0; i < kFullLanes; ++i) a.v[i] = static_cast<float>(p[i].bits);
  return a;
}

#endif

// The polynomial with these coefficients, that of the highest power first.
template <int W, typename... Floats>
TOKENDANCE_INLINE Lanes<W> polynomial(Lanes<W> x, float highest, Floats... others) {
  Lanes<W> p = repeat<Lanes<W>>(highest);
  ((p = multiply_add(p, x, repeat<Lanes<W>>(others))), ...);
  return p;
}

// 2^x for x <= 127, to 1.7e-7 relative; 0 below -126.5, so that no subnormal slows what follows.
template <int W>
TOKENDANCE_INLINE Lanes<W> exp2(Lanes<W> x) {
  using V = Lanes<W>;
  // x = n + f with n a whole number and |f| <= 1/2: adding 1.5 * 2^23 leaves n in the low bits.
  const V magic = repeat<V>(12582912.0f);
  x = larger(repeat<V>(-127.0f), x);
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  // Minimax polynomial of 2^f - 1 without constant term.
  const V p = polynomial(f, 0.0013264727f, 0.0096715130f, 0.0555073358f, 0.2402224243f,
                         0.6931470037f, 1.0f);
  using Ints = typename V::Ints;
  const Ints exponent = (reinterpret_cast<Ints>(shifted.v) + 127) << 23;
  return {p.v * reinterpret_cast<typename V::Floats>(exponent)};
}

#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
// The same in eight instructions instead of twelve, 0 below -126: x = floor(x) + f.
TOKENDANCE_INLINE Full exp2(Full x) {
  const Full f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  // Minimax polynomial of 2^f - 1 on [0, 1) without constant term.
  const Full p = polynomial(f, 0.0018671302f, 0.0090170298f, 0.0557999127f, 0.2401644439f,
                            0.6931512952f, 1.0f);
  const __mmask16 counts = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(counts, p.v, x.v)};
}
#endif

// tanh(x) to about 4e-7 absolute and relative: the rational approximation of Eigen's ptanh.
template <int W>
TOKENDANCE_INLINE Lanes<W> tanh(Lanes<W> x) {
  using V = Lanes<W>;
  const V limit = repeat<V>(7.90531110763549805f);
  x = smaller(limit, larger(repeat<V>(0.0f) - limit, x));
  const V square = x * x;
  const V p = polynomial(square, -2.76076847742355e-16f, 2.00018790482477e-13f,
                         -8.60467152213735e-11f, 5.12229709037114e-08f, 1.48572235717979e-05f,
                         6.37261928875436e-04f, 4.89352455891786e-03f);
  const V q = polynomial(square, 1.19825839466702e-06f, 1.18534705686654e-04f,
                         2.26843463243900e-03f, 4.89352518554385e-03f);
  return x * p / q;
}

}  // namespace tokendance::TOKENDANCE_ISA
