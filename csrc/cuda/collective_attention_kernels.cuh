// Defines the kernels of one head dim: five to a source, so that compilers can share the work.
//
// What merges may begin as soon as every block of this launch has: it waits for them itself.
#pragma once

#include "cuda/collective_attention.cuh"
#include "cuda/ptx.cuh"

#define TOKENDANCE_DEFINE_ATTENTION(variant, T, Pool, head_dim)                                    \
  extern "C" __global__ void __launch_bounds__(                                                    \
      tokendance::AttentionShape(sizeof(T), sizeof(Pool), head_dim, tokendance::kMmaRows).threads, \
      tokendance::AttentionShape(sizeof(T), sizeof(Pool), head_dim, tokendance::kMmaRows).blocks)  \
      tokendance_collective_attention_##variant(                                                   \
          const __grid_constant__ tokendance::CollectiveAttentionParams p,                         \
          const __grid_constant__ tokendance::Tile) {                                              \
    tokendance::cuda::let_next_launch_begin();                                                     \
    tokendance::cuda::collective_attention<T, Pool, head_dim>(p);                                  \
  }
#define TOKENDANCE_DEFINE_ATTENTION_OF_ONE_TYPE(variant, T, head_dim) \
  TOKENDANCE_DEFINE_ATTENTION(variant, T, T, head_dim)
#define TOKENDANCE_DEFINE_E4M3_ATTENTION(variant, T, head_dim) \
  TOKENDANCE_DEFINE_ATTENTION(variant, T, tokendance::cuda::Float8, head_dim)
#define TOKENDANCE_DEFINE_ATTENTION_OF(head_dim)                                     \
  TOKENDANCE_ATTENTION_KERNELS_OF(TOKENDANCE_DEFINE_ATTENTION_OF_ONE_TYPE, head_dim) \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(TOKENDANCE_DEFINE_E4M3_ATTENTION, head_dim)
