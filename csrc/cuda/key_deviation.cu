#include "cuda/key_deviation.cuh"
#include "cuda/key_deviation_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE(op, variant, T, V, interleaved)                              \
  extern "C" __global__ void __launch_bounds__(kDeviationThreads, 2)                   \
      tokendance_key_deviation_##variant(const __grid_constant__ KeyDeviationParams p, \
                                         const __grid_constant__ Tile) {               \
    cuda::key_deviation<T, V, interleaved>(p);                                         \
  }
TOKENDANCE_MOVING_KERNELS(TOKENDANCE_DEFINE, key_deviation)

#define TOKENDANCE_KERNEL(op, variant, ...) tokendance_key_deviation_##variant,

int cuda_key_deviation(const KeyDeviationParams& params, void* stream) {
  if (is_quantized(params.dtype)) return cudaErrorNotSupported;
  constexpr void (*kKernels[])(
      KeyDeviationParams, Tile) = {TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL, key_deviation)};
  return cuda::launch(plan_key_deviation(params), kKernels, params, stream);
}

}  // namespace tokendance
