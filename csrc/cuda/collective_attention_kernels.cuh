// Defines the kernels of one head dim: six to a source, so that compilers can share the work.
#pragma once

#include "cuda/collective_attention.cuh"

#define TOKENDANCE_DEFINE_ATTENTION(variant, T, head_dim, wide)            \
  extern "C" __global__ void __launch_bounds__(                            \
      tokendance::AttentionShape(sizeof(T), head_dim).threads,             \
      tokendance::AttentionShape(sizeof(T), head_dim).blocks)              \
      tokendance_collective_attention_##variant(                           \
          const __grid_constant__ tokendance::CollectiveAttentionParams p, \
          const __grid_constant__ tokendance::Tile) {                      \
    tokendance::cuda::collective_attention<T, head_dim, wide>(p);          \
  }
#define TOKENDANCE_DEFINE_ATTENTION_OF(head_dim) \
  TOKENDANCE_ATTENTION_KERNELS_OF(TOKENDANCE_DEFINE_ATTENTION, head_dim)
