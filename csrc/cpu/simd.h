// Sixteen fp32 lanes, and the storage types in packs of sixteen, on AVX-512, AVX2 or plain C++.
//
// Kernels are written once against these and compiled once per instruction set. Sixteen lanes on
// every one of them fix the order of reductions, and every operation is exactly rounded, so that
// the results agree bit for bit. A NaN that an arithmetic result rounds to is the one that CUDA's
// conversions give (all payload bits set), whatever NaN went in: x86's depends on operand order.
//
// simd_avx512.h, simd_avx2.h and simd_portable.h have the same names; here stands what is made of
// them. Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/simd_types.h"

#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
#include "cpu/simd_avx512.h"
#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_portable.h"
#endif

namespace tokendance::TOKENDANCE_ISA {

template <typename T>
TOKENDANCE_INLINE F32 load(const T* p) {
  return widen(load_packed(p));
}
template <typename T>
TOKENDANCE_INLINE F32 load(const T* p, int n) {
  return widen(load_packed(p, n));
}

// Adds the lanes up, always in the same order.
TOKENDANCE_INLINE float sum_of_lanes(F32 a) {
  alignas(64) float lanes[kLanes];
  memcpy(lanes, &a, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

TOKENDANCE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache, which has more misses in flight than the first.
TOKENDANCE_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// Makes streamed values visible to other threads.
TOKENDANCE_INLINE void finish_streaming() {
#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
  _mm_sfence();
#endif
}

}  // namespace tokendance::TOKENDANCE_ISA
