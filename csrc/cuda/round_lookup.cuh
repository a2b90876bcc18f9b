// Lookups in the packed round.
#pragma once

#include <stdint.h>

#include "tokendance/round.h"

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

// The agent's use of a Master, or -1. Its entries are a line or two: after the first step of the
// search the others mostly find them in L1.
template <typename Int>
__device__ __forceinline__ int32_t use_of_master(const BasicRoundView<Int>& round, int32_t agent,
                                                 int32_t master) {
  const int2* const entries = reinterpret_cast<const int2*>(round.agent_use);
  int32_t low = __ldg(round.agent_use_indptr + agent);
  int32_t high = __ldg(round.agent_use_indptr + agent + 1);
#pragma unroll 1
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const int2 entry = __ldg(entries + middle);
    if (entry.x == master) return entry.y;
    if (entry.x < master) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return -1;
}

}  // namespace tokendance::cuda
