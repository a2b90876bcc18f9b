// Vectors of a storage type: accessed whole, computed with in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "cuda/float8.cuh"
#include "cuda/launch_plan.h"
#include "tokendance/params.h"

namespace tokendance::cuda {

// N elements of T in registers: 16 bytes, one element (then N is 1), or as many as elements of
// another, larger type make 16 bytes.
template <typename T, int N>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static_assert(kBytes == 16 || N == 1 || N == 8 || N == 4,
                "a vector is 16 bytes, one element, or goes with 16 bytes");
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;

  uint32_t words[kWords];  // a single small element fills the low bits

  __device__ __forceinline__ bool operator!=(const Vector& other) const {
    uint32_t difference = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) difference |= words[i] ^ other.words[i];
    return difference != 0;
  }
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* pointer) {
  Vector<T, N> vector;
  if constexpr (Vector<T, N>::kBytes == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(pointer);
    vector.words[0] = words.x;
    vector.words[1] = words.y;
    vector.words[2] = words.z;
    vector.words[3] = words.w;
  } else if constexpr (Vector<T, N>::kBytes == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(pointer);
    vector.words[0] = words.x;
    vector.words[1] = words.y;
  } else if constexpr (Vector<T, N>::kBytes == 4) {
    vector.words[0] = *reinterpret_cast<const uint32_t*>(pointer);
  } else if constexpr (Vector<T, N>::kBytes == 2) {
    vector.words[0] = *reinterpret_cast<const uint16_t*>(pointer);
  } else {
    vector.words[0] = *reinterpret_cast<const uint8_t*>(pointer);
  }
  return vector;
}

template <typename T, int N>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, N>& vector) {
  if constexpr (Vector<T, N>::kBytes == 16) {
    *reinterpret_cast<uint4*>(pointer) =
        make_uint4(vector.words[0], vector.words[1], vector.words[2], vector.words[3]);
  } else if constexpr (Vector<T, N>::kBytes == 8) {
    *reinterpret_cast<uint2*>(pointer) = make_uint2(vector.words[0], vector.words[1]);
  } else if constexpr (Vector<T, N>::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(pointer) = vector.words[0];
  } else if constexpr (Vector<T, N>::kBytes == 2) {
    *reinterpret_cast<uint16_t*>(pointer) = static_cast<uint16_t>(vector.words[0]);
  } else {
    *reinterpret_cast<uint8_t*>(pointer) = static_cast<uint8_t>(vector.words[0]);
  }
}

template <int N>
__device__ __forceinline__ void unpack(const Vector<float, N>& vector, float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = __uint_as_float(vector.words[i]);
}

template <int N>
__device__ __forceinline__ void unpack(const Vector<__half, N>& vector, float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t bits = vector.words[i / 2] >> (16 * (i % 2));
    value[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }
}

template <int N>
__device__ __forceinline__ void unpack(const Vector<__nv_bfloat16, N>& vector, float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t word = vector.words[i / 2];
    value[i] = __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
}

template <int N>
__device__ __forceinline__ void unpack(const Vector<Float8, N>& vector, float (&value)[N]) {
  if constexpr (N == 1) {
    value[0] = float8_to_float(vector.words[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float8_to_floats(vector.words[i / 4] >> (8 * (i % 4)), &value[i], &value[i + 1]);
    }
  }
}

// Rounded to nearest, ties to even, as everywhere.
template <int N>
__device__ __forceinline__ void pack(const float (&value)[N], Vector<float, N>* vector) {
#pragma unroll
  for (int i = 0; i < N; ++i) vector->words[i] = __float_as_uint(value[i]);
}

template <int N>
__device__ __forceinline__ void pack(const float (&value)[N], Vector<__half, N>* vector) {
  if constexpr (N == 1) {
    vector->words[0] = __half_as_ushort(__float2half_rn(value[0]));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const __half2 pair = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
      vector->words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
}

template <int N>
__device__ __forceinline__ void pack(const float (&value)[N], Vector<__nv_bfloat16, N>* vector) {
  if constexpr (N == 1) {
    vector->words[0] = __bfloat16_as_ushort(__float2bfloat16_rn(value[0]));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
      vector->words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
}

// Of numbers beyond the largest, that one.
template <int N>
__device__ __forceinline__ void pack(const float (&value)[N], Vector<Float8, N>* vector) {
  if constexpr (N == 1) {
    vector->words[0] = float_to_float8(value[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      vector->words[i / 4] = floats_to_float8(value[i], value[i + 1]) |
                             floats_to_float8(value[i + 2], value[i + 3]) << 16;
    }
  }
}

// Reads N floats that start at a multiple of N, through the read-only cache.
template <int N>
__device__ __forceinline__ void load_floats(const float* pointer, float* value) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(pointer + i));
      value[i] = four.x;
      value[i + 1] = four.y;
      value[i + 2] = four.z;
      value[i + 3] = four.w;
    }
  } else if constexpr (N == 2) {
    const float2 two = __ldg(reinterpret_cast<const float2*>(pointer));
    value[0] = two.x;
    value[1] = two.y;
  } else {
    static_assert(N == 1, "1, 2 or a multiple of 4");
    value[0] = __ldg(pointer);
  }
}

// Elements from the start of a tensor to head 0 of a row; `page` divides by the block size. Rows
// are counted in 32 bits: 2^32 of the smallest (one head of 64 bytes) are 256 GiB.
__device__ __forceinline__ int64_t row_offset(const RowLayout& layout, const Divisor& page,
                                              int64_t row) {
  const uint32_t number = quotient(static_cast<uint32_t>(row), page);
  const uint32_t row_of_page = static_cast<uint32_t>(row) - number * page.value;
  return number * layout.page_stride + row_of_page * layout.row_stride;
}

// The same where the division is not on the way to what matters.
__device__ __forceinline__ int64_t row_offset(const RowLayout& layout, int64_t row) {
  const uint32_t size = static_cast<uint32_t>(layout.block_size);
  const uint32_t page = static_cast<uint32_t>(row) / size;
  const uint32_t row_of_page = static_cast<uint32_t>(row) % size;
  return page * layout.page_stride + row_of_page * layout.row_stride;
}

}  // namespace tokendance::cuda
