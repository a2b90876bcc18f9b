#include "cuda/diff_restore.cuh"
#include "cuda/diff_restore_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE(op, variant, In, Out, V, interleaved)                      \
  extern "C" __global__ void __launch_bounds__(kRestoreThreads, 3)                   \
      tokendance_diff_restore_##variant(const __grid_constant__ DiffRestoreParams p, \
                                        const __grid_constant__ Tile tile) {         \
    cuda::diff_restore<In, Out, V, interleaved>(p, tile);                            \
  }
using cuda::Float8;
TOKENDANCE_MOVING_KERNELS(TOKENDANCE_DEFINE_OF_ONE_TYPE, diff_restore)
TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_DEFINE, diff_restore)
TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_DEFINE, diff_restore)

#define TOKENDANCE_KERNEL(op, variant, ...) tokendance_diff_restore_##variant,

int cuda_diff_restore(const DiffRestoreParams& params, void* stream) {
  constexpr void (*kKernels[])(DiffRestoreParams, Tile) = {
      TOKENDANCE_MOVING_KERNELS(TOKENDANCE_KERNEL, diff_restore)
          TOKENDANCE_QUANTIZED_KERNELS(TOKENDANCE_KERNEL, diff_restore)
              TOKENDANCE_DEQUANTIZING_KERNELS(TOKENDANCE_KERNEL, diff_restore)};
  const bool reads_out = params.dtype == DType::kFloat8 || params.dtype == params.out_dtype;
  if (!reads_out || !can_move(params.dtype, params.out_dtype)) return cudaErrorNotSupported;
  return cuda::launch(plan_diff_restore(params), kKernels, params, stream);
}

}  // namespace tokendance
