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

#define TOKENDANCE_KERNEL_NAME(op, variant, ...) "tokendance_" #op "_" #variant,

namespace tokendance {

constexpr int kNumMovingKernels = 12;

inline int moving_kernel(DType dtype, bool interleaved, bool wide) {
  return static_cast<int>(dtype) * 4 + interleaved * 2 + !wide;
}

inline int32_t vector_elements(DType dtype, bool wide) {
  return wide ? static_cast<int32_t>(kVectorBytes / element_bytes(dtype)) : 1;
}

// A thread that moves part of a head holds two vectors of it (move.cuh). Heads are multiples of 32
// bytes, and so are rotary dims that wide accesses rotate: no vector is left over.
TOKENDANCE_HOST_DEVICE int32_t move_tasks_of_head(int32_t head_dim, int32_t vector) {
  return head_dim / (2 * vector);
}

// Floats that the angles of one shift take in shared memory (move.cuh): cos, then sin, each aligned
// to 16 bytes.
TOKENDANCE_HOST_DEVICE int32_t shared_angles_size(int32_t rotary_dim) {
  return (rotary_dim / 2 + 3) / 4 * 4 * 2;
}

}  // namespace tokendance
