// Launches what a plan says.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch_plan.h"

namespace tokendance::cuda {

// `kernels`: an operator's kernels in the order that its plan counts them. On the current device;
// returns the first error.
template <typename Params, size_t N>
int launch(const LaunchPlan& plan, void (*const (&kernels)[N])(Params, Tile), const Params& params,
           void* stream) {
  for (int i = 0; i < plan.num_launches; ++i) {
    const KernelLaunch& launch = plan.launches[i];
    const void* kernel = reinterpret_cast<const void*>(kernels[launch.kernel]);
    if (launch.shared_bytes > 48 * 1024) {  // more has to be asked for, on each device
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
      if (error != cudaSuccess) return error;
    }
    Params params_copy = params;
    Tile tile = launch.tile;
    void* arguments[] = {&params_copy, &tile};
    const cudaError_t error = cudaLaunchKernel(
        kernel, dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
        dim3(launch.block[0], launch.block[1], launch.block[2]), arguments,
        static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace tokendance::cuda
