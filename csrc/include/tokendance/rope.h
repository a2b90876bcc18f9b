// The rotation, defined once, with an explicit order of fused multiply-adds.
//
// Every backend computes exactly these expressions on fp32 values, so that AVX2, AVX-512, portable
// and CUDA results agree bit for bit. Host files that include this header are compiled with
// -ffp-contract=off; on the device every product outside an fma is an explicit __fmul_rn.
#pragma once

#include <math.h>
#include <stdint.h>

#include "tokendance/params.h"

#if defined(__CUDACC__)
#define TOKENDANCE_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the same header is compiled for several instruction sets, and a shared copy would
// be one that not every machine can run.
#define TOKENDANCE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace tokendance {

TOKENDANCE_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TOKENDANCE_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}

struct Angle {
  float cos;
  float sin;
};

// Whether the tables have a row for a shift. `Int`: int32_t or int64_t.
template <typename Int>
TOKENDANCE_HOST_DEVICE bool in_tables(const RopeTables& rope, Int shift) {
  return shift < rope.max_position && shift > -rope.max_position;
}

// The same, or nothing is rotated, and no angle is needed.
template <typename Int>
TOKENDANCE_HOST_DEVICE bool has_angles(const RopeTables& rope, Int shift) {
  return rope.rotary_dim == 0 || in_tables(rope, shift);
}

// R(shift) from the table row |shift|: cos is even, sin is odd.
TOKENDANCE_HOST_DEVICE Angle angle_of_shift(float cos_row, float sin_row, int32_t shift) {
  return {cos_row, shift < 0 ? -sin_row : sin_row};
}

// R(p) R(-shift), both given as angles.
TOKENDANCE_HOST_DEVICE Angle counter_rotation(Angle p, Angle shift) {
  return {fused_multiply_add(p.cos, shift.cos, rounded_product(p.sin, shift.sin)),
          fused_multiply_add(p.sin, shift.cos, -rounded_product(p.cos, shift.sin))};
}

// Rotates the pair (x, y).
TOKENDANCE_HOST_DEVICE void rotate_pair(Angle a, float x, float y, float* out_x, float* out_y) {
  *out_x = fused_multiply_add(x, a.cos, -rounded_product(y, a.sin));
  *out_y = fused_multiply_add(y, a.cos, rounded_product(x, a.sin));
}

}  // namespace tokendance
