#include "cuda/launch.cuh"
#include "cuda/rope_rotate.cuh"
#include "cuda/rope_rotate_plan.h"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE(op, variant, In, Out, V, interleaved)                                \
  extern "C" __global__ void __launch_bounds__(kRopeRotateThreads,                             \
                                               cuda::rope_rotate_blocks<In, Out>(interleaved)) \
      tokendance_rope_rotate_##variant(const __grid_constant__ RopeRotateParams p,             \
                                       const __grid_constant__ Tile tile) {                    \
    cuda::rope_rotate<In, Out, V, interleaved>(p, tile);                                       \
  }
using cuda::Float8;
TOKENDANCE_MOVING_KERNELS(TOKENDANCE_DEFINE_OF_ONE_TYPE, rope_rotate)
TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_DEFINE, rope_rotate)
TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_DEFINE, rope_rotate)
TOKENDANCE_QUANTIZING_KERNELS(TOKENDANCE_DEFINE, rope_rotate)

#define TOKENDANCE_KERNEL(op, variant, ...) tokendance_rope_rotate_##variant,

int cuda_rope_rotate(const RopeRotateParams& params, void* stream) {
  constexpr void (*kKernels[])(RopeRotateParams, Tile) = {
      TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL, rope_rotate)
          TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_KERNEL, rope_rotate)
              TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_KERNEL, rope_rotate)
                  TOKENDANCE_QUANTIZING_KERNELS(TOKENDANCE_KERNEL, rope_rotate)};
  if (!can_move(params.dtype, params.out_dtype)) return cudaErrorNotSupported;
  return cuda::launch(plan_rope_rotate(params), kKernels, params, stream);
}

}  // namespace tokendance
