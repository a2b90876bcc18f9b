// How an operator runs its launch function on the device of its tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "ops/check.h"
#include "tokendance/launch.h"

namespace tokendance {

// The ParallelFor that torch.set_num_threads governs.
inline void torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                               void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t from, int64_t to) { body(from, to, context); });
}

// The current stream of a CUDA device. Stream::nativeHandle() of the stable ABI needs torch 2.13;
// this function of AOTInductor's C ABI is older, but in libtorch_cuda. It is looked up there, not
// linked to, since this library also loads beside a torch for CPUs alone.
inline void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const Function function = [] {
    void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // loaded: a tensor is there
    return cuda ? reinterpret_cast<Function>(dlsym(cuda, "aoti_torch_get_current_cuda_stream"))
                : nullptr;
  }();
  if (!function) fail("libtorch_cuda: expected aoti_torch_get_current_cuda_stream, got nothing");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Launches on the current stream of the device of `tensor`.
template <typename Params>
void run_cuda(int (*launch)(const Params&, void*), const Params& params, const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(params, current_cuda_stream(device));
  if (error != 0) fail("CUDA error ", error, ": ", cuda_error_string(error));
}

}  // namespace tokendance
