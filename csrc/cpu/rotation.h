// The rotation of rope.h on vectors.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <type_traits>

#include "cpu/rows.h"
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

// Elements of a head between the places where its vectors are written: see choose_writing.
inline int64_t written_part(const RopeTables& rope) {
  return rope.interleaved ? rope.rotary_dim : rope.rotary_dim / 2;
}

// What moving a row needs besides its shift.
struct MoveContext {
  RopeTables rope;
  RowShape shape;
  float scale;  // multiplies the rotary dims, 1 = none
};

template <bool kInterleaved, bool kScaled, Writing kWriting, typename T>
TOKENDANCE_INLINE void move_head(T* out, const T* in, const MoveAngles& angles, F32 scale,
                                 int rotary_dim, int head_dim) {
  rotate_head<kInterleaved>(in, angles, rotary_dim, [&](int dim, F32 value, int n) {
    const Packed<T> packed = narrow<T>(kScaled ? mul(value, scale) : value);
    if (n < kLanes) {
      store(out + dim, packed, n);
    } else if constexpr (kWriting == Writing::kStream) {
      stream(out + dim, packed);
    } else {
      store(out + dim, packed);
    }
  });
  if (rotary_dim < head_dim && out != in) {
    constexpr Writing kRest = kWriting == Writing::kStream ? Writing::kStream : Writing::kStore;
    copy_elements<kRest>(out + rotary_dim, in + rotary_dim, head_dim - rotary_dim);
  }
}

// The rotary dims times `scale`, unrotated; the others as they are.
template <typename T>
inline void scale_head(T* out, const T* in, F32 scale, int rotary_dim, int head_dim) {
  int i = 0;
  for (; i + kLanes <= rotary_dim; i += kLanes) {
    store(out + i, narrow<T>(mul(load(in + i), scale)));
  }
  if (i < rotary_dim) {
    const int n = rotary_dim - i;
    store(out + i, narrow<T>(mul(load(in + i, n), scale)), n);
  }
  if (out != in) memcpy(out + rotary_dim, in + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
}

// Moves a row by `shift`, to where it may stand already.
template <bool kInterleaved, Writing kWriting, typename T>
TOKENDANCE_INLINE void move_row(T* out, const T* in, int64_t shift, const MoveContext& context,
                                MoveAngles& angles) {
  const RowShape& shape = context.shape;
  const int rotary_dim = context.rope.rotary_dim;
  const bool scaled = context.scale != 1.0f;
  const bool rotated = shift != 0 && rotary_dim > 0;
  if (!rotated && !scaled) {
    if (out != in) copy_row<kWriting>(out, in, shape);
    return;
  }
  if (rotated) angles.set(context.rope, shift);
  const F32 scale = broadcast(context.scale);
  const auto each_head = [&](auto&& move) {
    if constexpr (kWriting == Writing::kStage) {
      alignas(kCacheLine) T stage[kStageBytes / sizeof(T)];
      for (int32_t head = 0; head < shape.num_heads; ++head) {
        move(stage + head * shape.head_dim, in + head * shape.in_head_stride);
      }
      stream_lines(out, stage, int64_t{shape.num_heads} * shape.head_dim * sizeof(T));
    } else {
      for (int32_t head = 0; head < shape.num_heads; ++head) {
        move(out + head * shape.out_head_stride, in + head * shape.in_head_stride);
      }
    }
  };
  if (!rotated) {
    each_head(
        [&](T* to, const T* from) { scale_head(to, from, scale, rotary_dim, shape.head_dim); });
  } else if (scaled) {
    each_head([&](T* to, const T* from) {
      move_head<kInterleaved, true, kWriting>(to, from, angles, scale, rotary_dim, shape.head_dim);
    });
  } else {
    each_head([&](T* to, const T* from) {
      move_head<kInterleaved, false, kWriting>(to, from, angles, scale, rotary_dim, shape.head_dim);
    });
  }
}

// Calls visit(T{}, std::bool_constant<interleaved>{}) for the storage type and style.
template <typename Visit>
inline void with_types(DType dtype, bool interleaved, const Visit& visit) {
  const auto with_style = [&](auto element) {
    if (interleaved) {
      visit(element, std::true_type{});
    } else {
      visit(element, std::false_type{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_style(float{});
    case DType::kFloat16:
      return with_style(Float16{});
    case DType::kBFloat16:
      return with_style(BFloat16{});
  }
}

// Calls visit(std::integral_constant<Writing, ...>{}).
template <typename Visit>
inline void with_writing(Writing writing, const Visit& visit) {
  switch (writing) {
    case Writing::kStore:
      return visit(std::integral_constant<Writing, Writing::kStore>{});
    case Writing::kStream:
      return visit(std::integral_constant<Writing, Writing::kStream>{});
    case Writing::kStage:
      return visit(std::integral_constant<Writing, Writing::kStage>{});
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
