#include "cuda/launch.cuh"
#include "cuda/merge_states.cuh"
#include "cuda/merge_states_plan.h"
#include "tokendance/launch.h"

namespace tokendance {

#define TOKENDANCE_DEFINE(variant, T)                                                            \
  extern "C" __global__ void __launch_bounds__(kMergeThreads) tokendance_merge_states_##variant( \
      const __grid_constant__ MergeStatesParams p, const __grid_constant__ Tile) {               \
    cuda::merge_states<T>(p);                                                                    \
  }
TOKENDANCE_MERGE_STATES_KERNELS(TOKENDANCE_DEFINE)

#define TOKENDANCE_KERNEL(variant, T) tokendance_merge_states_##variant,

int cuda_merge_states(const MergeStatesParams& params, void* stream) {
  if (!can_merge_states(params)) return cudaErrorNotSupported;
  constexpr void (*kKernels[])(MergeStatesParams,
                               Tile) = {TOKENDANCE_MERGE_STATES_KERNELS(TOKENDANCE_KERNEL)};
  return cuda::launch(plan_merge_states(params), kKernels, params, stream);
}

}  // namespace tokendance
