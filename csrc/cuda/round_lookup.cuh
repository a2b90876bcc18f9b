// Lookups in the packed round.
#pragma once

#include <stdint.h>

namespace tokendance::cuda {

// The i with indptr[i] <= value < indptr[i + 1], 0 <= i < count, or -1. The same for all threads
// that ask for the same value, so that its loads are broadcasts.
__device__ __forceinline__ int32_t range_of(const int32_t* indptr, int32_t count, int32_t value) {
  if (count == 0 || value >= __ldg(indptr + count)) return -1;
  int32_t low = 0, high = count;  // indptr[low] <= value < indptr[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (__ldg(indptr + middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace tokendance::cuda
