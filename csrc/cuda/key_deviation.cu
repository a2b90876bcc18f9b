#include "cuda/key_deviation.cuh"
#include "cuda/key_deviation_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

namespace tokendance {

// Blocks of a multiprocessor that registers are to suffice for. From sm_100 on, whose products are
// of pairs of registers, two blocks would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kDeviationBlocks = 1;
#else
constexpr int kDeviationBlocks = 2;
#endif

#define TOKENDANCE_DEFINE(op, variant, T, V, interleaved)                              \
  extern "C" __global__ void __launch_bounds__(kDeviationThreads, kDeviationBlocks)    \
      tokendance_key_deviation_##variant(const __grid_constant__ KeyDeviationParams p, \
                                         const __grid_constant__ Tile tile) {          \
    cuda::key_deviation<T, V, interleaved>(p, tile);                                   \
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
