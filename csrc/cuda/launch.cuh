// Launches what a plan says.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "cuda/launch_plan.h"

namespace tokendance::cuda {

// Dynamic shared memory that every launch may have unasked.
constexpr int64_t kUnaskedSharedBytes = 48 * 1024;

// A kernel on a device: not looked at yet, or made ready, and whether it was compiled for an
// architecture on which it waits itself for the launch before it (KernelLaunch::waits).
enum class Ready : int8_t { kNot, kYes, kYesAndWaits };

// Allows a kernel all the shared memory that any plan asks for, on the current device. Whoever
// allowed what one launch needs could take it away from another thread's launch.
inline cudaError_t make_ready(const void* kernel, Ready* ready) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const int most = static_cast<int>(kMaxSharedBytes) - static_cast<int>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  *ready = attributes.ptxVersion >= 90 ? Ready::kYesAndWaits : Ready::kYes;
  return cudaSuccess;
}

// Kernels on the devices of a process. Threads that come first together make a kernel ready more
// than once, in the same way.
template <size_t N>
class ReadyKernels {
 public:
  cudaError_t get(const void* kernel, int index, Ready* ready) {
    int device;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device >= kDevices) return make_ready(kernel, ready);
    std::atomic<Ready>& known = ready_[device][index];
    *ready = known.load(std::memory_order_relaxed);
    if (*ready != Ready::kNot) return cudaSuccess;
    const cudaError_t made = make_ready(kernel, ready);
    if (made == cudaSuccess) known.store(*ready, std::memory_order_relaxed);
    return made;
  }

 private:
  static constexpr int kDevices = 64;  // of more, kernels are made ready at every launch
  std::atomic<Ready> ready_[kDevices][N] = {};
};

// `kernels`: an operator's kernels in the order that its plan counts them. On the current device;
// returns the first error.
template <typename Params, size_t N>
int launch(const LaunchPlan& plan, void (*const (&kernels)[N])(Params, Tile), const Params& params,
           void* stream) {
  static ReadyKernels<N> ready_kernels;  // of one operator: no two have the same params
  for (int i = 0; i < plan.num_launches; ++i) {
    const KernelLaunch& launch = plan.launches[i];
    const void* kernel = reinterpret_cast<const void*>(kernels[launch.kernel]);
    Ready ready = Ready::kYes;
    if (launch.shared_bytes > kUnaskedSharedBytes || launch.waits) {
      const cudaError_t error = ready_kernels.get(kernel, launch.kernel, &ready);
      if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute begins_early = {};
    begins_early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    begins_early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    config.blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &begins_early;
    config.numAttrs = launch.waits && ready == Ready::kYesAndWaits ? 1 : 0;
    Params params_copy = params;
    Tile tile = launch.tile;
    void* arguments[] = {&params_copy, &tile};
    const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace tokendance::cuda
