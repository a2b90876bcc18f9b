#include "cuda/diff_restore.cuh"
#include "cuda/diff_restore_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE(op, variant, T, V, interleaved)                            \
  extern "C" __global__ void __launch_bounds__(kRestoreThreads, 3)                   \
      tokendance_diff_restore_##variant(const __grid_constant__ DiffRestoreParams p, \
                                        const __grid_constant__ Tile tile) {         \
    cuda::diff_restore<T, V, interleaved>(p, tile);                                  \
  }
TOKENDANCE_MOVING_KERNELS(TOKENDANCE_DEFINE, diff_restore)

#define TOKENDANCE_KERNEL(op, variant, ...) tokendance_diff_restore_##variant,

int cuda_diff_restore(const DiffRestoreParams& params, void* stream) {
  constexpr void (*kKernels[])(DiffRestoreParams,
                               Tile) = {TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL, diff_restore)};
  return cuda::launch(plan_diff_restore(params), kKernels, params, stream);
}

}  // namespace tokendance
