// Rows that change their dtype or their scales on the way: fresh keys and values into a quantized
// pool, and quantized ones read out.
//
// A head passes through fp32 in the first-level cache: widened and times its scale, turned, over
// the scale it gets and narrowed. So each dtype has one function at either end, and not each pair
// of them one of its own.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/dtypes.h"
#include "cpu/rotation.h"
#include "cpu/rows.h"

namespace tokendance::TOKENDANCE_ISA {

// `n` is a multiple of kLanes, as all head dims are.
template <typename T>
void widen_head(float* to, const void* from, int n, float factor) {
  const T* elements = static_cast<const T*>(from);
  const F32 factors = broadcast(factor);
  for (int i = 0; i < n; i += kLanes) {
    store(to + i, narrow<float>(mul(load(elements + i), factors)));
  }
}
template <typename T>
void narrow_head(void* to, const float* from, int n, float factor) {
  T* elements = static_cast<T*>(to);
  const F32 factors = broadcast(factor);
  for (int i = 0; i < n; i += kLanes) {
    store(elements + i, narrow<T>(mul(load(from + i), factors)));
  }
}

// Scales of the heads; null = 1.
struct HeadScales {
  const float* in;
  const float* out;
};

class RowConversion {
 public:
  RowConversion(DType in, DType out, const RopeTables& rope, const RowShape& shape, float scale)
      : in_bytes_(bytes_of(in)),
        out_bytes_(bytes_of(out)),
        rope_(rope),
        shape_(shape),
        scale_(scale) {
    with_stored_element(in, [&](auto element) { widen_ = widen_head<decltype(element)>; });
    with_stored_element(out, [&](auto element) { narrow_ = narrow_head<decltype(element)>; });
  }

  const void* in_row(const void* x, int64_t offset) const {
    return static_cast<const char*>(x) + offset * in_bytes_;
  }
  void* out_row(void* out, int64_t offset) const {
    return static_cast<char*>(out) + offset * out_bytes_;
  }

  // A row moved by `shift`, its rotary dims times the scale.
  void move(void* out, const void* in, int64_t shift, const HeadScales& scales,
            MoveAngles& angles) const {
    const bool rotated = shift != 0 && rope_.rotary_dim > 0;
    if (rotated) angles.set(rope_, shift);
    each_head(out, in, scales, [&](float* head) {
      if (rotated && rope_.interleaved) {
        turn<true>(head, angles);
      } else if (rotated) {
        turn<false>(head, angles);
      } else if (scale_ != 1.0f) {
        for (int i = 0; i < rope_.rotary_dim; ++i) head[i] *= scale_;
      }
    });
  }
  // A row that is not rotated.
  void copy(void* out, const void* in, const HeadScales& scales) const {
    each_head(out, in, scales, [](float*) {});
  }

 private:
  template <typename Change>
  void each_head(void* out, const void* in, const HeadScales& scales, const Change& change) const {
    alignas(kCacheLine) float head[kMaxHeadDim];
    for (int32_t h = 0; h < shape_.num_heads; ++h) {
      widen_(head, in_row(in, h * shape_.in_head_stride), shape_.head_dim,
             scales.in ? scales.in[h] : 1.0f);
      change(head);
      narrow_(out_row(out, h * shape_.out_head_stride), head, shape_.head_dim,
              scales.out ? 1.0f / scales.out[h] : 1.0f);
    }
  }

  template <bool kInterleaved>
  void turn(float* head, const MoveAngles& angles) const {
    const F32 scale = broadcast(scale_);
    rotate_head<kInterleaved>(head, angles, rope_.rotary_dim, [&](int dim, F32 value, int n) {
      const Packed<float> turned = narrow<float>(mul(value, scale));
      n == kLanes ? store(head + dim, turned) : store(head + dim, turned, n);
    });
  }

  int64_t in_bytes_, out_bytes_;
  RopeTables rope_;
  RowShape shape_;
  float scale_;
  void (*widen_)(float*, const void*, int, float) = nullptr;
  void (*narrow_)(void*, const float*, int, float) = nullptr;
};

}  // namespace tokendance::TOKENDANCE_ISA
