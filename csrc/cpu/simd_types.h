// What simd.h has on every instruction set: its macros, and the storage types.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define TOKENDANCE_LEVEL_portable 0
#define TOKENDANCE_LEVEL_avx2 1
#define TOKENDANCE_LEVEL_avx512 2
#define TOKENDANCE_JOIN(a, b) a##b
#define TOKENDANCE_LEVEL_OF(isa) TOKENDANCE_JOIN(TOKENDANCE_LEVEL_, isa)
#define TOKENDANCE_LEVEL TOKENDANCE_LEVEL_OF(TOKENDANCE_ISA)

#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
#include <immintrin.h>
#endif

#define TOKENDANCE_INLINE inline __attribute__((always_inline))
#define TOKENDANCE_UNROLL _Pragma("GCC unroll 32")

namespace tokendance::TOKENDANCE_ISA {

constexpr int kLanes = 16;
constexpr int64_t kCacheLine = 64;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// The quantized types. Widening gives the element as a number, narrowing limits to the largest
// ones and takes NaN to NaN (e4m3) or to 0 (int8); scales are for others to apply.
struct Float8 {
  uint8_t bits;
};
struct Int8 {
  int8_t bits;
};
constexpr float kLargestFloat8 = 448.0f;
constexpr float kLargestInt8 = 127.0f;
// e4m3 in the upper bits of fp16 has the exponent bias 15 instead of 7: it is too small by this.
constexpr float kFloat8Rebias = 256.0f;
// Below it e4m3 is subnormal: steps of 2^-9. 2^14, added to a magnitude, has that last bit.
constexpr float kSmallestNormalFloat8 = 0x1p-6f;
constexpr float kFloat8Steps = 0x1p14f;
constexpr uint8_t kNan8 = 0x7f;

constexpr uint32_t kNan32 = 0x7fffffff;
constexpr uint16_t kNan16 = 0x7fff;  // fp16 and bf16 alike

}  // namespace tokendance::TOKENDANCE_ISA
