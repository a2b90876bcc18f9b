// The kernels are in collective_attention_d<head dim>.cu and collective_attention_merge.cu.
#include "cuda/collective_attention_plan.h"
#include "cuda/launch.cuh"
#include "tokendance/launch.h"

#define TOKENDANCE_DECLARE(variant, ...)                                \
  extern "C" __global__ void tokendance_collective_attention_##variant( \
      const __grid_constant__ tokendance::CollectiveAttentionParams,    \
      const __grid_constant__ tokendance::Tile);
#define TOKENDANCE_DECLARE_MERGE(variant, ...) TOKENDANCE_DECLARE(merge_##variant)
TOKENDANCE_ATTENTION_KERNELS(TOKENDANCE_DECLARE)
TOKENDANCE_E4M3_ATTENTION_KERNELS(TOKENDANCE_DECLARE)
TOKENDANCE_ATTENTION_MERGE_KERNELS(TOKENDANCE_DECLARE_MERGE)

namespace tokendance {

#define TOKENDANCE_KERNEL(variant, ...) tokendance_collective_attention_##variant,
#define TOKENDANCE_MERGE_KERNEL(variant, ...) tokendance_collective_attention_merge_##variant,

int cuda_collective_attention(const CollectiveAttentionParams& params, void* stream) {
  constexpr void (*kKernels[])(CollectiveAttentionParams, Tile) = {
      TOKENDANCE_ATTENTION_KERNELS(TOKENDANCE_KERNEL)
          TOKENDANCE_E4M3_ATTENTION_KERNELS(TOKENDANCE_KERNEL)
              TOKENDANCE_ATTENTION_MERGE_KERNELS(TOKENDANCE_MERGE_KERNEL)};
  if (!can_attend(params)) return cudaErrorNotSupported;
  return cuda::launch(plan_collective_attention(params), kKernels, params, stream);
}

}  // namespace tokendance
