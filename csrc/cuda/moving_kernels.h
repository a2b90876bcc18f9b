// The kernels of the operators that move rows, and how many threads a row keeps busy.
#pragma once

#include <stdint.h>

#include "cuda/launch_plan.h"
#include "tokendance/params.h"
#include "tokendance/rope.h"

// One kernel per dtype, style of pairs and width of accesses: the wide ones access 16 bytes at a
// time, the narrow ones one element, for tensors or rotary dims that are not aligned. Calls
// X(op, variant, element type, elements of a vector, interleaved) in the order of moving_kernel().
#define TOKENDANCE_MOVING_KERNELS(X, op)               \
  X(op, f32_half_wide, float, 4, false)                \
  X(op, f32_half_narrow, float, 1, false)              \
  X(op, f32_interleaved_wide, float, 4, true)          \
  X(op, f32_interleaved_narrow, float, 1, true)        \
  X(op, f16_half_wide, __half, 8, false)               \
  X(op, f16_half_narrow, __half, 1, false)             \
  X(op, f16_interleaved_wide, __half, 8, true)         \
  X(op, f16_interleaved_narrow, __half, 1, true)       \
  X(op, bf16_half_wide, __nv_bfloat16, 8, false)       \
  X(op, bf16_half_narrow, __nv_bfloat16, 1, false)     \
  X(op, bf16_interleaved_wide, __nv_bfloat16, 8, true) \
  X(op, bf16_interleaved_narrow, __nv_bfloat16, 1, true)

// The same of quantized rows, which stay so, are read out, or are made. A vector has as many
// elements as 16 bytes of the type that is not quantized, and half as many of e4m3: so heads of
// every head dim consist of them. Calls X(op, variant, element type of the rows that are read, of
// those that are written, elements of a vector, interleaved) in the order of moving_kernel().
#define TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, types, In, Out, V) \
  X(op, types##_half_wide, In, Out, V, false)                     \
  X(op, types##_half_narrow, In, Out, 1, false)                   \
  X(op, types##_interleaved_wide, In, Out, V, true)               \
  X(op, types##_interleaved_narrow, In, Out, 1, true)
#define TOKENDANCE_QUANTIZED_KERNELS(X, op) \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, e4m3, Float8, Float8, 8)
#define TOKENDANCE_DEQUANTIZING_KERNELS(X, op)                           \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, e4m3_to_f32, Float8, float, 4)  \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, e4m3_to_f16, Float8, __half, 8) \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, e4m3_to_bf16, Float8, __nv_bfloat16, 8)
#define TOKENDANCE_QUANTIZING_KERNELS(X, op)                             \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, f32_to_e4m3, float, Float8, 4)  \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, f16_to_e4m3, __half, Float8, 8) \
  TOKENDANCE_QUANTIZED_KERNELS_OF(X, op, bf16_to_e4m3, __nv_bfloat16, Float8, 8)

// Defines a kernel of the first list where the operator's TOKENDANCE_DEFINE takes two types, as the
// others do.
#define TOKENDANCE_DEFINE_OF_ONE_TYPE(op, variant, T, V, interleaved) \
  TOKENDANCE_DEFINE(op, variant, T, T, V, interleaved)

#define TOKENDANCE_KERNEL_NAME(op, variant, ...) "tokendance_" #op "_" #variant,

namespace tokendance {

constexpr int kNumMovingKernels = 12;

// Of rows of one dtype that become rows of another, or of the same: which kernel of an operator
// that has all of them, in the order above.
constexpr int moving_kernel(DType from, DType to, bool interleaved, bool wide) {
  int types = static_cast<int>(from);
  if (from == DType::kFloat8) types = to == DType::kFloat8 ? 3 : 4 + static_cast<int>(to);
  if (from != DType::kFloat8 && to == DType::kFloat8) types = 7 + static_cast<int>(from);
  return types * 4 + interleaved * 2 + !wide;
}

// Whether the first kernels of a list, or all, are in the order of moving_kernel(): those of rows
// that stay what they are, then those that become another dtype, if there are any.
constexpr bool are_in_order(const char* const* kernels, const char* prefix, bool reads_out,
                            bool quantizes) {
  constexpr DType kF32 = DType::kFloat32, kBf16 = DType::kBFloat16, kE4m3 = DType::kFloat8;
  auto is = [=](DType from, DType to, bool interleaved, bool wide, const char* variant) {
    return is_named(kernels[moving_kernel(from, to, interleaved, wide)], prefix, variant);
  };
  bool right = is(kF32, kF32, false, true, "f32_half_wide") &&
               is(kF32, kF32, true, false, "f32_interleaved_narrow") &&
               is(DType::kFloat16, DType::kFloat16, true, true, "f16_interleaved_wide") &&
               is(kBf16, kBf16, false, false, "bf16_half_narrow");
  if (reads_out) {
    right = right && is(kE4m3, kE4m3, true, true, "e4m3_interleaved_wide") &&
            is(kE4m3, kF32, false, true, "e4m3_to_f32_half_wide") &&
            is(kE4m3, kBf16, true, false, "e4m3_to_bf16_interleaved_narrow");
  }
  if (quantizes) {
    right = right && is(kF32, kE4m3, false, true, "f32_to_e4m3_half_wide") &&
            is(kBf16, kE4m3, true, false, "bf16_to_e4m3_interleaved_narrow");
  }
  return right;
}

// Whether there is such a kernel.
inline bool can_move(DType from, DType to) {
  if (from == DType::kInt8 || to == DType::kInt8) return false;
  return from == to || from == DType::kFloat8 || to == DType::kFloat8;
}

inline int32_t vector_elements(DType from, DType to, bool wide) {
  if (!wide) return 1;
  return from == DType::kFloat32 || to == DType::kFloat32 ? 4 : 8;
}

// A thread that moves part of a head holds two vectors of it (move.cuh). Heads are multiples of 16
// elements, and rotary dims that wide accesses rotate are of two vectors: none is left over.
TOKENDANCE_HOST_DEVICE int32_t move_tasks_of_head(int32_t head_dim, int32_t vector) {
  return head_dim / (2 * vector);
}

// Floats that the angles of one shift take in shared memory (move.cuh): cos, then sin, each aligned
// to 16 bytes.
TOKENDANCE_HOST_DEVICE int32_t shared_angles_size(int32_t rotary_dim) {
  return (rotary_dim / 2 + 3) / 4 * 4 * 2;
}

}  // namespace tokendance
