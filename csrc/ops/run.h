// How an operator runs its launch function on the device of its tensors.
#pragma once

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

// Launches on the current stream of the device of `tensor`.
template <typename Params>
void run_cuda(int (*launch)(const Params&, void*), const Params& params, const Tensor& tensor) {
  namespace accelerator = torch::stable::accelerator;
  const accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle();
  const int error = launch(params, stream);
  if (error != 0) fail("CUDA error ", error, ": ", cuda_error_string(error));
}

}  // namespace tokendance
