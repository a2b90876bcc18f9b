// The codes of a coded page, sixteen at a time.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "tokendance/coded_pages.h"

namespace tokendance::TOKENDANCE_ISA {

struct Int4 {};

// What the largest magnitude of a scale's elements is coded as.
template <typename C>
constexpr float kLargestCode = 7.0f;
template <>
inline constexpr float kLargestCode<Float8> = kLargestFloat8;
template <>
inline constexpr float kLargestCode<Int8> = kLargestInt8;

// Bytes of `elements` codes.
template <typename C>
TOKENDANCE_INLINE int64_t bytes_of_codes(int64_t elements) {
  return std::is_same_v<C, Int4> ? elements / 2 : elements;
}

// The larger of magnitudes, by their bits: a NaN is larger than all numbers.
TOKENDANCE_INLINE F32 larger(F32 a, F32 b) {
#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
  return {
      _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2
  const auto of_half = [](__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
  };
  return {of_half(a.lo, b.lo), of_half(a.hi, b.hi)};
#else
  return per_lane([&](int i) { return bits_of(a.v[i]) > bits_of(b.v[i]) ? a.v[i] : b.v[i]; });
#endif
}
TOKENDANCE_INLINE float largest_lane(F32 a) {
  uint32_t lanes[kLanes];
  memcpy(lanes, &a, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
    }
  }
  float largest;
  memcpy(&largest, lanes, sizeof largest);
  return largest;
}

constexpr uint64_t kLowHalves = 0x0f0f0f0f0f0f0f0f;
constexpr uint64_t kEights = 0x0808080808080808;

// Sixteen codes as their lower and their upper eight.
struct Halves {
  uint64_t lower, upper;
};
TOKENDANCE_INLINE Halves halves_of(Packed<Int8> codes) {
  Halves halves;
#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
  halves.lower = static_cast<uint64_t>(_mm_cvtsi128_si64(codes.v));
  halves.upper = static_cast<uint64_t>(_mm_extract_epi64(codes.v, 1));
#else
  memcpy(&halves, &codes, sizeof halves);
#endif
  return halves;
}
TOKENDANCE_INLINE Packed<Int8> codes_of(const Halves& halves) {
#if TOKENDANCE_LEVEL > TOKENDANCE_LEVEL_portable
  return {_mm_set_epi64x(static_cast<int64_t>(halves.upper), static_cast<int64_t>(halves.lower))};
#else
  Packed<Int8> codes;
  memcpy(&codes, &halves, sizeof codes);
  return codes;
#endif
}

template <typename C>
TOKENDANCE_INLINE void store_codes(uint8_t* to, F32 a) {
  if constexpr (std::is_same_v<C, Int4>) {
    const Halves halves = halves_of(narrow<Int8>(a));
    const uint64_t lower = (halves.lower & kLowHalves) ^ kEights;  // plus 8
    const uint64_t upper = (halves.upper & kLowHalves) ^ kEights;
    const uint64_t both = lower | upper << 4;
    memcpy(to, &both, sizeof both);
  } else {
    store(reinterpret_cast<C*>(to), narrow<C>(a));
  }
}

template <typename C>
TOKENDANCE_INLINE F32 load_codes(const uint8_t* from) {
  if constexpr (std::is_same_v<C, Int4>) {
    uint64_t both;
    memcpy(&both, from, sizeof both);
    const Packed<Int8> whole = codes_of({both & kLowHalves, both >> 4 & kLowHalves});
    return sub(widen(whole), broadcast(8.0f));
  } else {
    return load(reinterpret_cast<const C*>(from));
  }
}

// Calls visit(C{}) for a code that is not exact.
template <typename Visit>
inline void with_code(Code code, const Visit& visit) {
  switch (code) {
    case Code::kExact:
      return;
    case Code::kFloat8:
      return visit(Float8{});
    case Code::kInt8:
      return visit(Int8{});
    case Code::kInt4:
      return visit(Int4{});
  }
}

// A page of a pool and its coded form, each row's heads side by side in the latter.
struct CodedPage {
  uint8_t* scales;
  uint8_t* codes;
  int64_t first;  // element of the pool
  int32_t rows;
};
inline CodedPage coded_page(const CodedPagesParams& params, int64_t i) {
  uint8_t* slot = params.coded + (params.slot ? params.slot[i] : i) * params.slot_stride;
  return {slot, slot + scale_bytes(params), params.page[i] * params.layout.page_stride,
          params.rows[i]};
}

// body(page) for every page.
template <typename Body>
inline void each_coded_page(const CodedPagesParams& params, ParallelFor parallel_for,
                            const Body& body) {
  constexpr int64_t kElementsOfRange = 1 << 15;  // what is worth waking a thread for
  const int64_t elements = int64_t{params.layout.block_size} * params.num_heads * params.head_dim;
  parallel_ranges(parallel_for, params.num_pages, kElementsOfRange / elements,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) body(coded_page(params, i));
                  });
}

}  // namespace tokendance::TOKENDANCE_ISA
