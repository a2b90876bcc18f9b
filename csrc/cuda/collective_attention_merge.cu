#include "cuda/collective_attention_merge.cuh"

#define TOKENDANCE_DEFINE(variant, T)                                      \
  extern "C" __global__ void __launch_bounds__(tokendance::kMergeThreads)  \
      tokendance_collective_attention_merge_##variant(                     \
          const __grid_constant__ tokendance::CollectiveAttentionParams p, \
          const __grid_constant__ tokendance::Tile) {                      \
    tokendance::cuda::merge_partials<T>(p);                                \
  }
TOKENDANCE_ATTENTION_MERGE_KERNELS(TOKENDANCE_DEFINE)
