// Moving rows of keys: the rotation of rope.h on whole cache lines.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/lines.h"
#include "cpu/rows.h"
#include "tokendance/params.h"

namespace tokendance::TOKENDANCE_ISA {

// cos and sin of one shift in the order in which the lines of a head hold the elements of a pair;
// made once while the shift stays.
//
// Half-split: the lines of first and of second elements have one order. Interleaved bf16: the even
// elements are the first ones, the odd ones the second. Interleaved fp32 and fp16: each value
// stands twice, the sine with the sign that its element needs.
template <typename T, bool kInterleaved>
class LineAngles {
 public:
  static constexpr bool kWholePairs = kInterleaved && !std::is_same_v<T, BFloat16>;

  void set(const RopeTables& rope, int64_t shift) {
    if (shift == shift_) return;
    shift_ = shift;
    const int half = rope.rotary_dim / 2;
    const int64_t row = (shift < 0 ? -shift : shift) * half;
    const F32 sign = broadcast(shift < 0 ? -1.0f : 1.0f);
    for (int i = 0; i < half; i += kRead) {
      const Wide<T> cosines = read(rope.cos + row + i, half - i);
      const Wide<T> sines = read(rope.sin + row + i, half - i);
      for (int v = 0; v < kLineVectors<T>; ++v) {
        put(cos_, i + v * kLanes, cosines.v[v]);
        put_sine(i + v * kLanes, mul(sines.v[v], sign));
      }
    }
  }

  // Of the vector at element `at` of the angles.
  TOKENDANCE_INLINE F32 cos(int at) const { return load(cos_ + at); }
  TOKENDANCE_INLINE F32 sin(int at) const { return load(sin_ + at); }

 private:
  static constexpr int kMaxElements = 256 + kLineElements<T>;
  static constexpr int kRead = kLineElements<T>;

  // Values in the order of a line's vectors.
  static Wide<T> read(const float* values, int left) {
    alignas(kCacheLine) float padded[kRead] = {};
    if (left < kRead) {
      memcpy(padded, values, left * sizeof(float));
      values = padded;
    }
    if constexpr (std::is_same_v<T, BFloat16> && !kInterleaved) {
      return even_and_odd(load(values), load(values + kLanes));
    } else {
      return per_vector<T>([&](int v) { return load(values + v * kLanes); });
    }
  }

  void put(float* to, int at, F32 value) {
    if constexpr (kWholePairs) {
      alignas(kCacheLine) float lanes[kLanes];
      store(lanes, narrow<float>(value));
      for (int i = 0; i < kLanes; ++i) to[2 * (at + i)] = to[2 * (at + i) + 1] = lanes[i];
    } else {
      store(to + at, narrow<float>(value));
    }
  }
  void put_sine(int at, F32 value) {
    put(sin_, at, value);
    if constexpr (kWholePairs) {
      for (int i = 0; i < kLanes; ++i) sin_[2 * (at + i)] = -sin_[2 * (at + i)];
    }
  }

  int64_t shift_ = 0;  // of 0 there is no rotation
  alignas(kCacheLine) float cos_[kMaxElements];
  alignas(kCacheLine) float sin_[kMaxElements];
};

// The same angles in registers, for heads whose halves are kHalfLines lines and nothing else: a
// loop over heads that writes nothing in between then loads them once.
template <typename T, int kHalfLines>
class RegisterAngles {
 public:
  static constexpr int kHalf = kHalfLines * kLineElements<T>;

  TOKENDANCE_INLINE explicit RegisterAngles(const LineAngles<T, false>& angles) {
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      cos_[i] = angles.cos(i * kLanes);
      sin_[i] = angles.sin(i * kLanes);
    }
  }
  TOKENDANCE_INLINE F32 cos(int at) const { return cos_[at / kLanes]; }
  TOKENDANCE_INLINE F32 sin(int at) const { return sin_[at / kLanes]; }

 private:
  static constexpr int kVectors = kHalf / kLanes;
  F32 cos_[kVectors], sin_[kVectors];
};

// A pair of lines of a half-split head: elements i of the first and of the second half.
template <typename T, typename Angles>
TOKENDANCE_INLINE void rotate_pair(const Wide<T>& x, const Wide<T>& y, const Angles& angles, int i,
                                   Wide<T>& first, Wide<T>& second) {
  for (int v = 0; v < kLineVectors<T>; ++v) {
    const F32 cos = angles.cos(i + v * kLanes), sin = angles.sin(i + v * kLanes);
    first.v[v] = fma_sub(x.v[v], cos, mul(y.v[v], sin));
    second.v[v] = fma_add(y.v[v], cos, mul(x.v[v], sin));
  }
}

template <typename T, int kHalfLines, typename Emit>
TOKENDANCE_INLINE void rotate_lines(const T* in, const RegisterAngles<T, kHalfLines>& angles,
                                    const Emit& emit) {
  constexpr int kHalf = RegisterAngles<T, kHalfLines>::kHalf;
  TOKENDANCE_UNROLL
  for (int i = 0; i < kHalf; i += kLineElements<T>) {
    Wide<T> first, second;
    rotate_pair(widen(load_line(in + i)), widen(load_line(in + kHalf + i)), angles, i, first,
                second);
    emit(i, first, kLineElements<T>);
    emit(kHalf + i, second, kLineElements<T>);
  }
}

// Rotates the rotary dims of a head; emit(dim, value, n) takes the first n elements of `value`, in
// the order of lines, as those from `dim` on. What lies in a pair is loaded before either is
// emitted, so that emit may write over it.
template <typename T, bool kInterleaved, typename Emit>
TOKENDANCE_INLINE void rotate_lines(const T* in, const LineAngles<T, kInterleaved>& angles,
                                    int rotary_dim, const Emit& emit) {
  constexpr int kElements = kLineElements<T>;
  const auto load_part = [](const T* p, int n) {
    return widen(n == kElements ? load_line(p) : load_line(p, n));
  };
  if constexpr (kInterleaved && LineAngles<T, kInterleaved>::kWholePairs) {
    // (x, y) -> (fma(x, cos, -(y sin)), fma(y, cos, x sin)): the negation of a product is the
    // product with a negated factor.
    const auto rotate = [&](int i, int n) {
      const Wide<T> value = load_part(in + i, n);
      emit(i, per_vector<T>([&](int v) {
             return fma_add(value.v[v], angles.cos(i + v * kLanes),
                            mul(swap_pairs(value.v[v]), angles.sin(i + v * kLanes)));
           }),
           n);
    };
    int i = 0;
    for (; i + kElements <= rotary_dim; i += kElements) rotate(i, kElements);
    if (i < rotary_dim) rotate(i, rotary_dim - i);
  } else if constexpr (kInterleaved) {
    const auto rotate = [&](int i, int n) {
      const Wide<T> pair = load_part(in + i, n);
      const F32 cos = angles.cos(i / 2), sin = angles.sin(i / 2);
      emit(i,
           Wide<T>{{fma_sub(pair.v[0], cos, mul(pair.v[1], sin)),
                    fma_add(pair.v[1], cos, mul(pair.v[0], sin))}},
           n);
    };
    int i = 0;
    for (; i + kElements <= rotary_dim; i += kElements) rotate(i, kElements);
    if (i < rotary_dim) rotate(i, rotary_dim - i);
  } else {
    const int half = rotary_dim / 2;
    const auto rotate = [&](int i, int n) {
      const Wide<T> x = load_part(in + i, n), y = load_part(in + half + i, n);
      Wide<T> first, second;
      rotate_pair(x, y, angles, i, first, second);
      emit(i, first, n);
      emit(half + i, second, n);
    };
    int i = 0;
    for (; i + kElements <= half; i += kElements) rotate(i, kElements);
    if (i < half) rotate(i, half - i);
  }
}

// Elements of a head between the places where its lines are written: see choose_writing.
inline int64_t written_part(const RopeTables& rope) {
  return rope.interleaved ? rope.rotary_dim : rope.rotary_dim / 2;
}

// What moving a row needs besides its shift.
struct MoveContext {
  RopeTables rope;
  RowShape shape;
  float scale;  // multiplies the rotary dims, 1 = none
};

// Writes the first n elements of a line.
template <Writing kWriting, typename T>
TOKENDANCE_INLINE void write_line(T* out, Line<T> line, int n) {
  if (n < kLineElements<T>) {
    store_line(out, line, n);
  } else if constexpr (kWriting == Writing::kStream) {
    stream_line(out, line);
  } else {
    store_line(out, line);
  }
}

// The dims of a head that are not rotated.
template <Writing kWriting, typename T>
TOKENDANCE_INLINE void copy_rest(T* out, const T* in, int rotary_dim, int head_dim) {
  if (rotary_dim == head_dim || out == in) return;
  constexpr Writing kRest = kWriting == Writing::kStream ? Writing::kStream : Writing::kStore;
  copy_elements<kRest>(out + rotary_dim, in + rotary_dim, head_dim - rotary_dim);
}

template <bool kScaled, Writing kWriting, typename T, bool kInterleaved>
TOKENDANCE_INLINE void move_head(T* out, const T* in, const LineAngles<T, kInterleaved>& angles,
                                 F32 scale, int rotary_dim, int head_dim) {
  rotate_lines(in, angles, rotary_dim, [&](int dim, const Wide<T>& value, int n) {
    const Wide<T> scaled =
        kScaled ? per_vector<T>([&](int v) { return mul(value.v[v], scale); }) : value;
    write_line<kWriting>(out + dim, narrow(scaled), n);
  });
  copy_rest<kWriting>(out, in, rotary_dim, head_dim);
}

// The rotary dims times `scale`, unrotated; the others as they are.
template <Writing kWriting, typename T>
inline void scale_head(T* out, const T* in, F32 scale, int rotary_dim, int head_dim) {
  for (int i = 0; i < rotary_dim; i += kLineElements<T>) {
    const int n = rotary_dim - i < kLineElements<T> ? rotary_dim - i : kLineElements<T>;
    const Wide<T> value = widen(n < kLineElements<T> ? load_line(in + i, n) : load_line(in + i));
    const Wide<T> scaled = per_vector<T>([&](int v) { return mul(value.v[v], scale); });
    write_line<kWriting>(out + i, narrow(scaled), n);
  }
  copy_rest<kWriting>(out, in, rotary_dim, head_dim);
}

// Moves a row by `shift`, to where it may stand already.
template <Writing kWriting, typename T, bool kInterleaved>
TOKENDANCE_INLINE void move_row(T* out, const T* in, int64_t shift, const MoveContext& context,
                                LineAngles<T, kInterleaved>& angles) {
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
    each_head([&](T* to, const T* from) {
      scale_head<kWriting>(to, from, scale, rotary_dim, shape.head_dim);
    });
  } else if (scaled) {
    each_head([&](T* to, const T* from) {
      move_head<true, kWriting>(to, from, angles, scale, rotary_dim, shape.head_dim);
    });
  } else {
    each_head([&](T* to, const T* from) {
      move_head<false, kWriting>(to, from, angles, scale, rotary_dim, shape.head_dim);
    });
  }
}

// Calls visit(T{}, std::bool_constant<interleaved>{}) for a dtype that is not quantized.
template <typename Visit>
inline void with_types(DType dtype, bool interleaved, const Visit& visit) {
  with_element(dtype, [&](auto element) {
    if (interleaved) {
      visit(element, std::true_type{});
    } else {
      visit(element, std::false_type{});
    }
  });
}

// The same for a dtype of stored keys and values.
template <typename Visit>
inline void with_stored_types(DType dtype, bool interleaved, const Visit& visit) {
  with_stored_element(dtype, [&](auto element) {
    if (interleaved) {
      visit(element, std::true_type{});
    } else {
      visit(element, std::false_type{});
    }
  });
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
