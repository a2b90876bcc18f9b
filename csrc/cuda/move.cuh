// A thread's share of moving a row: two vectors of one head, so that both elements of every pair
// are in its registers.
#pragma once

#include "cuda/moving_kernels.h"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance::cuda {

template <int N>
struct Angles {
  float cos[N];
  float sin[N];
};

// Which dims of a head a thread holds: vectors of V elements at `first` and at `second`. Half-split
// pairs have one element in each vector. Interleaved ones lie within a vector (V > 1) or are the
// two vectors (V == 1). Neighbouring threads hold neighbouring vectors, so that a warp's accesses
// are contiguous but for the halves of a head.
template <int V, bool kInterleaved>
struct MoveTask {
  int32_t first, second;
  bool rotates_first, rotates_second;

  static __device__ __forceinline__ MoveTask make(int32_t index, int32_t head_dim,
                                                  int32_t rotary_dim) {
    MoveTask task;
    if constexpr (kInterleaved) {
      task.first = V > 1 ? index * V : 2 * index;
      task.second = V > 1 ? task.first + head_dim / 2 : task.first + 1;
      task.rotates_first = task.first < rotary_dim;
      task.rotates_second = task.second < rotary_dim;
    } else {
      const int32_t rotations = rotary_dim / (2 * V);
      task.rotates_first = task.rotates_second = index < rotations;
      if (index < rotations) {
        task.first = index * V;
        task.second = task.first + rotary_dim / 2;
      } else {
        task.first = rotary_dim + (index - rotations) * V;
        task.second = task.first + (head_dim - rotary_dim) / 2;
      }
    }
    return task;
  }

  // The angles of row `row` of the tables, with sin negated for a negative shift.
  __device__ __forceinline__ Angles<V> load_angles(const RopeTables& rope, int64_t row,
                                                   bool negative) const {
    Angles<V> angles = {};
    const int64_t start = row * (rope.rotary_dim / 2);
    if constexpr (kInterleaved && V > 1) {
      float cos[V / 2], sin[V / 2];
      if (rotates_first) {
        load_floats(rope.cos + start + first / 2, cos);
        load_floats(rope.sin + start + first / 2, sin);
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
          angles.cos[i] = cos[i];
          angles.sin[i] = sin[i];
        }
      }
      if (rotates_second) {
        load_floats(rope.cos + start + second / 2, cos);
        load_floats(rope.sin + start + second / 2, sin);
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
          angles.cos[V / 2 + i] = cos[i];
          angles.sin[V / 2 + i] = sin[i];
        }
      }
    } else if (rotates_first) {
      const int32_t pair = kInterleaved ? first / 2 : first;
      load_floats(rope.cos + start + pair, angles.cos);
      load_floats(rope.sin + start + pair, angles.sin);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Angle angle = angle_of_shift(angles.cos[i], angles.sin[i], negative ? -1 : 1);
      angles.sin[i] = angle.sin;
    }
    return angles;
  }

  // Rotates the rotary dims of x (at `first`) and y (at `second`).
  __device__ __forceinline__ void rotate(const Angles<V>& angles, float (&x)[V],
                                         float (&y)[V]) const {
    if constexpr (kInterleaved && V > 1) {
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        if (rotates_first) {
          rotate_pair({angles.cos[i], angles.sin[i]}, x[2 * i], x[2 * i + 1], &x[2 * i],
                      &x[2 * i + 1]);
        }
        if (rotates_second) {
          rotate_pair({angles.cos[V / 2 + i], angles.sin[V / 2 + i]}, y[2 * i], y[2 * i + 1],
                      &y[2 * i], &y[2 * i + 1]);
        }
      }
    } else if (rotates_first) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        rotate_pair({angles.cos[i], angles.sin[i]}, x[i], y[i], &x[i], &y[i]);
      }
    }
  }

  // Multiplies the rotary dims, each product rounded to fp32.
  __device__ __forceinline__ void multiply(float scale, float (&x)[V], float (&y)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (rotates_first) x[i] = rounded_product(x[i], scale);
      if (rotates_second) y[i] = rounded_product(y[i], scale);
    }
  }

  // Moves both vectors: one rotation in fp32, one rounding. Dims that are not rotated, and all of
  // them when nothing moves, keep their bits.
  template <typename T>
  __device__ __forceinline__ void move(const Angles<V>& angles, bool rotated, float scale,
                                       Vector<T, V>* x, Vector<T, V>* y) const {
    if (!rotated && scale == 1.0f) return;
    float first_values[V], second_values[V];
    unpack(*x, first_values);
    unpack(*y, second_values);
    if (rotated) rotate(angles, first_values, second_values);
    if (scale != 1.0f) multiply(scale, first_values, second_values);
    if (rotates_first) pack(first_values, x);
    if (rotates_second) pack(second_values, y);
  }
};

// Angles of one shift in shared memory: all cos, then all sin, laid out so that neighbouring
// threads that load theirs touch distinct banks.
template <int V, bool kInterleaved>
struct SharedAngles {
  static constexpr int kOfVector = kInterleaved && V > 1 ? V / 2 : V;

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

  // The angles that a task needs.
  static __device__ __forceinline__ Angles<V> load(const float* stored, int32_t rotary_dim,
                                                   const MoveTask<V, kInterleaved>& task) {
    const float* const cos = stored;
    const float* const sin = stored + shared_angles_size(rotary_dim) / 2;
    Angles<V> angles = {};
    if (task.rotates_first) {
      const int32_t pair = kInterleaved ? task.first / 2 : task.first;
      load_vector(cos, pair, angles.cos);
      load_vector(sin, pair, angles.sin);
    }
    if constexpr (kInterleaved && V > 1) {
      if (task.rotates_second) {
        load_vector(cos, task.second / 2, angles.cos + V / 2);
        load_vector(sin, task.second / 2, angles.sin + V / 2);
      }
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
