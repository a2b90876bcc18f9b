#include "cuda/collective_attention_kernels.cuh"

TOKENDANCE_DEFINE_ATTENTION_OF(96)
