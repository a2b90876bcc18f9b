// The rotation of rope.h on vectors.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/simd.h"
#include "tokendance/params.h"

namespace tokendance::TOKENDANCE_ISA {

constexpr int kMaxHeadDim = 256;

// cos and sin of one shift as the vectors of a head meet them: in style "interleaved" each value
// twice, with the sign that its element of the pair needs. Made once while the shift stays.
class MoveAngles {
 public:
  void set(const RopeTables& rope, int64_t shift) {
    if (shift == shift_) return;
    shift_ = shift;
    const int half = rope.rotary_dim / 2;
    const int64_t row = (shift < 0 ? -shift : shift) * half;
    const float* cos_row = rope.cos + row;
    const float* sin_row = rope.sin + row;
    const float sign = shift < 0 ? -1.0f : 1.0f;
    if (rope.interleaved) {
      for (int i = 0; i < half; ++i) {
        cos[2 * i] = cos[2 * i + 1] = cos_row[i];
        sin[2 * i + 1] = sign * sin_row[i];
        sin[2 * i] = -sin[2 * i + 1];
      }
    } else {
      for (int i = 0; i < half; ++i) {
        cos[i] = cos_row[i];
        sin[i] = sign * sin_row[i];
      }
    }
  }

  alignas(kCacheLine) float cos[kMaxHeadDim];
  alignas(kCacheLine) float sin[kMaxHeadDim];

 private:
  int64_t shift_ = 0;  // of 0 there is no rotation
};

// Rotates the rotary dims of a head; emit(dim, value, n) takes the first n lanes of `value` as the
// elements from `dim` on. The elements of a vector are loaded before any of them is emitted.
template <bool kInterleaved, typename T, typename Emit>
TOKENDANCE_INLINE void rotate_head(const T* in, const MoveAngles& angles, int rotary_dim,
                                   const Emit& emit) {
  if constexpr (kInterleaved) {
    // (x, y) -> (fma(x, cos, -(y sin)), fma(y, cos, x sin)); the sign stands in `angles.sin`, and
    // the negation of a product is the product with a negated factor.
    const auto rotate = [](F32 value, F32 cos, F32 sin) {
      return fma_add(value, cos, mul(swap_pairs(value), sin));
    };
    int i = 0;
    for (; i + kLanes <= rotary_dim; i += kLanes) {
      emit(i, rotate(load(in + i), load(angles.cos + i), load(angles.sin + i)), kLanes);
    }
    if (i < rotary_dim) {
      const int n = rotary_dim - i;
      emit(i, rotate(load(in + i, n), load(angles.cos + i, n), load(angles.sin + i, n)), n);
    }
  } else {
    const int half = rotary_dim / 2;
    const auto rotate = [&](int i, F32 x, F32 y, F32 cos, F32 sin, int n) {
      emit(i, fma_sub(x, cos, mul(y, sin)), n);
      emit(half + i, fma_add(y, cos, mul(x, sin)), n);
    };
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      rotate(i, load(in + i), load(in + half + i), load(angles.cos + i), load(angles.sin + i),
             kLanes);
    }
    if (i < half) {
      const int n = half - i;
      rotate(i, load(in + i, n), load(in + half + i, n), load(angles.cos + i, n),
             load(angles.sin + i, n), n);
    }
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
