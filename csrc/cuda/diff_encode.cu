#include "cuda/diff_encode.cuh"
#include "cuda/diff_encode_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE_COMPARE(op, variant, T, V, interleaved)                          \
  extern "C" __global__ void __launch_bounds__(kEncodeThreads, 2)                          \
      tokendance_diff_encode_compare_##variant(const __grid_constant__ DiffEncodeParams p, \
                                               const __grid_constant__ Tile tile) {        \
    cuda::diff_encode_compare<T, V, interleaved>(p, tile);                                 \
  }
#define TOKENDANCE_DEFINE_QUANTIZED(op, variant, T, Out, V, interleaved) \
  TOKENDANCE_DEFINE_COMPARE(op, variant, T, V, interleaved)
using cuda::Float8;
TOKENDANCE_MOVING_KERNELS(TOKENDANCE_DEFINE_COMPARE, diff_encode_compare)
TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_DEFINE_QUANTIZED, diff_encode_compare)

#define TOKENDANCE_DEFINE_COMPACT(variant, T, V)                                           \
  extern "C" __global__ void __launch_bounds__(kEncodeThreads, 2)                          \
      tokendance_diff_encode_compact_##variant(const __grid_constant__ DiffEncodeParams p, \
                                               const __grid_constant__ Tile tile) {        \
    cuda::diff_encode_compact<T, V>(p, tile);                                              \
  }
TOKENDANCE_COMPACT_KERNELS(TOKENDANCE_DEFINE_COMPACT)

#define TOKENDANCE_COMPARE_KERNEL(op, variant, ...) tokendance_diff_encode_compare_##variant,
#define TOKENDANCE_COMPACT_KERNEL(variant, ...) tokendance_diff_encode_compact_##variant,

int cuda_diff_encode(const DiffEncodeParams& params, void* stream) {
  constexpr void (*kKernels[])(DiffEncodeParams, Tile) = {
      TOKENDANCE_MOVING_KERNELS(TOKENDANCE_COMPARE_KERNEL, diff_encode_compare)
          TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_COMPARE_KERNEL, diff_encode_compare)
              TOKENDANCE_COMPACT_KERNELS(TOKENDANCE_COMPACT_KERNEL)};
  if (!can_move(params.dtype, params.dtype)) return cudaErrorNotSupported;
  return cuda::launch(plan_diff_encode(params), kKernels, params, stream);
}

}  // namespace tokendance
