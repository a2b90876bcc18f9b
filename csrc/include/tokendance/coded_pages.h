// Pages of keys or values in fewer bits: how they lie in host memory and in files.
//
// A coded page is what shares scales: a scale for each head and dim of a page of keys, for each row
// and head of a page of values (KIVI, arXiv 2402.02750: a few channels of the keys are far larger
// than the others, in all rows, and the values have no such). A scale is the largest magnitude of
// its elements, so that the rows' dtype holds it exactly and the element that has it comes back bit
// for bit: what was decoded is coded again to the same elements. Codes are fractions of the scale.
// A scale below kSmallestScale is 0, as are its elements; of one that is not finite, none is.
//
//   scales   dtype of the rows, [heads, head_dim] or [block_size, heads]; none where code is kExact
//   codes    [block_size, heads, head_dim]
//
// The codes of a page's first rows are a prefix, so that a page that is not full may be cut behind
// them. Padding rows are coded as zeros.
#pragma once

#include <stdint.h>

#include "tokendance/launch.h"
#include "tokendance/params.h"

namespace tokendance {

constexpr float kSmallestScale = 0x1p-100f;

enum class Code : int32_t {
  kExact = 0,   // the elements as they are
  kFloat8 = 1,  // e4m3 of element / scale * 448
  kInt8 = 2,    // element / scale * 127, rounded to even
  kInt4 = 3,  // element / scale * 7, rounded to even, plus 8; of 16 elements eight bytes: element i
              // in the lower half of byte i, element i + 8 in the upper half
};

// Between pages of a pool and coded ones: the first rows[i] rows of page[i] are those of slot[i].
struct CodedPagesParams {
  void* pool;           // read by encode, written by decode
  RowLayout layout;     // of the pool
  uint8_t* coded;       // written by encode, read by decode
  int64_t slot_stride;  // bytes between coded pages
  const int64_t* page;  // [n]
  const int64_t* slot;  // [n], null = 0..n-1
  const int32_t* rows;  // [n], at most block_size
  int64_t num_pages;    // n
  int32_t num_heads;
  int32_t head_dim;
  Code code;
  bool per_channel;  // scales of heads and dims, as of keys, instead of rows and heads
  DType dtype;       // of the pool, not quantized
};

constexpr int64_t code_bytes(Code code, DType dtype, int64_t elements) {
  switch (code) {
    case Code::kExact:
      return elements * (dtype == DType::kFloat32 ? 4 : 2);
    case Code::kFloat8:
    case Code::kInt8:
      return elements;
    case Code::kInt4:
      return elements / 2;
  }
  return 0;
}
// Bytes of a coded page, and in front of its codes those of its scales.
constexpr int64_t scale_bytes(const CodedPagesParams& params) {
  if (params.code == Code::kExact) return 0;
  const int64_t scales =
      int64_t{params.num_heads} * (params.per_channel ? params.head_dim : params.layout.block_size);
  return scales * (params.dtype == DType::kFloat32 ? 4 : 2);
}
constexpr int64_t coded_page_bytes(const CodedPagesParams& params) {
  const int64_t elements = int64_t{params.layout.block_size} * params.num_heads * params.head_dim;
  return scale_bytes(params) + code_bytes(params.code, params.dtype, elements);
}

void cpu_encode_pages(const CodedPagesParams& params, ParallelFor parallel_for);
void cpu_decode_pages(const CodedPagesParams& params, ParallelFor parallel_for);

}  // namespace tokendance
