#include <cuda_runtime.h>

#include "tokendance/launch.h"

namespace tokendance {

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace tokendance
