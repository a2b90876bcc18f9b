// A thread's share of moving a row: two vectors of one head, so that both elements of every pair
// are in its registers.
#pragma once

#include "cuda/moving_kernels.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance::cuda {

// The shift between two positions; false where the tables have no row for it, and something
// rotates. In 32 bits: to widen a position that has just been asked for would be to wait for it.
__device__ __forceinline__ bool make_shift(const RopeTables& rope, int32_t to, int32_t from,
                                           int32_t* shift) {
  *shift = static_cast<int32_t>(static_cast<uint32_t>(to) - static_cast<uint32_t>(from));
  const bool overflows = ((to ^ from) & (to ^ *shift)) < 0;
  return rope.rotary_dim == 0 || (!overflows && in_tables(rope, *shift));
}

template <int N>
struct Angles {
  float cos[N];
  float sin[N];

  // Of a row of the tables: those of a shift of that magnitude. Apart from the load, which nothing
  // then has to wait for.
  __device__ __forceinline__ Angles of_shift(int32_t shift) const {
    Angles angles;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Angle angle = angle_of_shift(cos[i], sin[i], shift);
      angles.cos[i] = angle.cos;
      angles.sin[i] = angle.sin;
    }
    return angles;
  }
};

// Which dims of a head a thread holds: vectors of V elements at `first` and at `second`. Half-split
// pairs have one element in each vector. Interleaved ones lie within a vector (V > 1) or are the
// two vectors (V == 1). Neighbouring threads hold neighbouring vectors, so that a warp's accesses
// are contiguous but for the halves of the rotary dims.
template <int V, bool kInterleaved>
struct MoveTask {
  static constexpr bool kPairsInVector = kInterleaved && V > 1;

  int32_t first, second;
  bool rotates;  // both vectors consist of rotary dims; else of others

  static __device__ __forceinline__ MoveTask make(int32_t index, int32_t head_dim,
                                                  int32_t rotary_dim) {
    const int32_t rotations = rotary_dim / (2 * V);
    MoveTask task;
    task.rotates = index < rotations;
    if (!task.rotates) {
      task.first = rotary_dim + (index - rotations) * V;
      task.second = task.first + (head_dim - rotary_dim) / 2;
    } else if (kInterleaved && V == 1) {
      task.first = 2 * index;
      task.second = task.first + 1;
    } else {
      task.first = index * V;
      task.second = task.first + rotary_dim / 2;
    }
    return task;
  }

  // The first pair of a vector: the place of its angle in a row of the tables. With pairs in the
  // vectors each has V / 2 of them; otherwise both have the same V.
  __device__ __forceinline__ int32_t first_pair() const { return kInterleaved ? first / 2 : first; }
  __device__ __forceinline__ int32_t second_pair() const { return second / 2; }

  // Row `row` of the tables. Only if it rotates.
  __device__ __forceinline__ Angles<V> load_angles(const RopeTables& rope, int64_t row) const {
    Angles<V> angles;
    const float* const cos = rope.cos + row * (rope.rotary_dim / 2);
    const float* const sin = rope.sin + row * (rope.rotary_dim / 2);
    if constexpr (kPairsInVector) {
      load_floats<V / 2>(cos + first_pair(), angles.cos);
      load_floats<V / 2>(sin + first_pair(), angles.sin);
      load_floats<V / 2>(cos + second_pair(), angles.cos + V / 2);
      load_floats<V / 2>(sin + second_pair(), angles.sin + V / 2);
    } else {
      load_floats<V>(cos + first_pair(), angles.cos);
      load_floats<V>(sin + first_pair(), angles.sin);
    }
    return angles;
  }

  // Rotates x (at `first`) and y (at `second`). Only if it rotates.
  static __device__ __forceinline__ void rotate(const Angles<V>& angles, float (&x)[V],
                                                float (&y)[V]) {
    if constexpr (kPairsInVector) {
#pragma unroll
      for (int i = 0; i < V; i += 2) {
        const int j = i / 2, k = V / 2 + i / 2;
        rotate_pair({angles.cos[j], angles.sin[j]}, x[i], x[i + 1], &x[i], &x[i + 1]);
        rotate_pair({angles.cos[k], angles.sin[k]}, y[i], y[i + 1], &y[i], &y[i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        rotate_pair({angles.cos[i], angles.sin[i]}, x[i], y[i], &x[i], &y[i]);
      }
    }
  }

  // Each product is rounded to fp32.
  static __device__ __forceinline__ void multiply(float scale, float (&x)[V], float (&y)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = rounded_product(x[i], scale);
      y[i] = rounded_product(y[i], scale);
    }
  }

  // Moves both vectors, of rotary dims: one rotation in fp32, one rounding.
  template <typename T>
  static __device__ __forceinline__ void move(const Angles<V>& angles, Vector<T, V>* x,
                                              Vector<T, V>* y) {
    if constexpr (kIsQuantized<T> && V > 4) {
      // A word of either at a time: with all at once, there would be too few registers.
#pragma unroll
      for (int word = 0; word < V / 4; ++word) {
        Angles<4> angles_of_word;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // With pairs in the vectors, x has the first half of the angles and y the second.
          const int at = !kPairsInVector ? 4 * word + i : i / 2 * (V / 2) + 2 * word + i % 2;
          angles_of_word.cos[i] = angles.cos[at];
          angles_of_word.sin[i] = angles.sin[at];
        }
        Vector<T, 4> x_word = {x->words[word]}, y_word = {y->words[word]};
        MoveTask<4, kInterleaved>::move(angles_of_word, &x_word, &y_word);
        x->words[word] = x_word.words[0];
        y->words[word] = y_word.words[0];
      }
      return;
    }
    float x_values[V], y_values[V];
    unpack(*x, x_values);
    unpack(*y, y_values);
    rotate(angles, x_values, y_values);
    pack(x_values, x);
    pack(y_values, y);
  }
};

// Angles of one shift in shared memory: all cos, then all sin, laid out so that neighbouring
// threads that load theirs touch distinct banks.
template <int V, bool kInterleaved>
struct SharedAngles {
  static constexpr int kOfVector = MoveTask<V, kInterleaved>::kPairsInVector ? V / 2 : V;

  // Writes the angles; called by all lanes of a warp.
  static __device__ __forceinline__ void store(float* stored, const RopeTables& rope, int32_t shift,
                                               int32_t lane) {
    const int32_t half = rope.rotary_dim / 2;
    const int64_t row = int64_t{abs(shift)} * half;
#pragma unroll 1
    for (int32_t pair = lane; pair < half; pair += 32) {
      const Angle angle =
          angle_of_shift(__ldg(rope.cos + row + pair), __ldg(rope.sin + row + pair), shift);
      stored[slot(pair)] = angle.cos;
      stored[shared_angles_size(rope.rotary_dim) / 2 + slot(pair)] = angle.sin;
    }
  }

  // The angles of a task that rotates.
  static __device__ __forceinline__ Angles<V> load(const float* stored, int32_t rotary_dim,
                                                   const MoveTask<V, kInterleaved>& task) {
    const float* const cos = stored;
    const float* const sin = stored + shared_angles_size(rotary_dim) / 2;
    Angles<V> angles;
    load_vector(cos, task.first_pair(), angles.cos);
    load_vector(sin, task.first_pair(), angles.sin);
    if constexpr (MoveTask<V, kInterleaved>::kPairsInVector) {
      load_vector(cos, task.second_pair(), angles.cos + V / 2);
      load_vector(sin, task.second_pair(), angles.sin + V / 2);
    }
    return angles;
  }

 private:
  // Where the angle of a pair stands. Where a vector needs 8 angles, loads of 4 at a stride of 8
  // would meet in the same banks: so every other group of 8 loads has its neighbours swapped.
  static __device__ __forceinline__ int32_t slot(int32_t pair) {
    return kOfVector == 8 ? pair ^ (pair >> 5 & 1) << 2 : pair;
  }

  static __device__ __forceinline__ void load_vector(const float* base, int32_t pair,
                                                     float* value) {
    constexpr int kStep = kOfVector < 4 ? kOfVector : 4;
#pragma unroll
    for (int i = 0; i < kOfVector; i += kStep) {
      const float* const from = base + slot(pair + i);
      if constexpr (kStep == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        value[i] = four.x;
        value[i + 1] = four.y;
        value[i + 2] = four.z;
        value[i + 3] = four.w;
      } else if constexpr (kStep == 2) {
        const float2 two = *reinterpret_cast<const float2*>(from);
        value[i] = two.x;
        value[i + 1] = two.y;
      } else {
        value[i] = *from;
      }
    }
  }
};

}  // namespace tokendance::cuda
