// From a DType to the type that a kernel is a template of.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "tokendance/params.h"

namespace tokendance::TOKENDANCE_ISA {

template <typename T>
constexpr bool kIsQuantized = std::is_same_v<T, Float8> || std::is_same_v<T, Int8>;

inline int64_t bytes_of(DType dtype) {
  if (is_quantized(dtype)) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Calls visit(T{}) for a dtype that is not quantized.
template <typename Visit>
inline void with_element(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kFloat16:
      return visit(Float16{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat8:
    case DType::kInt8:
      return;
  }
}

// Calls visit(T{}) for a dtype of stored keys and values.
template <typename Visit>
inline void with_stored_element(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat8:
      return visit(Float8{});
    case DType::kInt8:
      return visit(Int8{});
    default:
      return with_element(dtype, visit);
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
