// Launch functions, one per operator and device. They read a params struct, allocate nothing on the
// device, and return without waiting for it.
#pragma once

#include <stdint.h>

#include "tokendance/params.h"

namespace tokendance {

// CPU --------------------------------------------------------------------------------------------

// Calls body(begin, end, context) on ranges that cover [begin, end), possibly on several threads.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t, int64_t, void*), void* context);

void cpu_rope_rotate(const RopeRotateParams& params, ParallelFor parallel_for);
void cpu_key_deviation(const KeyDeviationParams& params, ParallelFor parallel_for);
void cpu_diff_encode(const DiffEncodeParams& params, ParallelFor parallel_for);
void cpu_diff_restore(const DiffRestoreParams& params, ParallelFor parallel_for);
void cpu_collective_attention(const CollectiveAttentionParams& params, ParallelFor parallel_for);
void cpu_merge_states(const MergeStatesParams& params, ParallelFor parallel_for);

// The instruction set that the CPU launches use: "avx512", "avx2" or "portable". The best that the
// machine has, or the one that the environment variable TOKENDANCE_CPU_ISA names, read once.
const char* cpu_isa();

// CUDA -------------------------------------------------------------------------------------------
// `stream` is a cudaStream_t of the current device. Each returns a cudaError_t as int, 0 = success.

int cuda_rope_rotate(const RopeRotateParams& params, void* stream);
int cuda_key_deviation(const KeyDeviationParams& params, void* stream);
int cuda_diff_encode(const DiffEncodeParams& params, void* stream);
int cuda_diff_restore(const DiffRestoreParams& params, void* stream);
int cuda_collective_attention(const CollectiveAttentionParams& params, void* stream);
int cuda_merge_states(const MergeStatesParams& params, void* stream);

const char* cuda_error_string(int error);

}  // namespace tokendance
