// Rows of keys or values: where they stand, and copying them.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/cache.h"
#include "cpu/lines.h"
#include "tokendance/params.h"

namespace tokendance::TOKENDANCE_ISA {

TOKENDANCE_INLINE int64_t row_offset(const RowLayout& layout, int64_t row) {
  if (layout.block_size == 1) return row * layout.page_stride;
  const int64_t page = row / layout.block_size;
  return page * layout.page_stride + (row - page * layout.block_size) * layout.row_stride;
}

// How many rows before its use a row is fetched that is compared with another; 0 = it is not. In 16
// bits and less arithmetic leaves memory idle between rows; in fp32 the hardware's own prefetch
// does better alone, and what is in the caches needs none.
template <typename T>
inline int64_t rows_to_fetch_ahead(int64_t row_bytes, int64_t total_bytes) {
  constexpr int64_t kBytesAhead = 4096;
  if (sizeof(T) > 2 || total_bytes < last_level_cache_bytes()) return 0;
  return row_bytes < kBytesAhead ? kBytesAhead / row_bytes : 1;
}

template <typename T>
TOKENDANCE_INLINE void fetch_head(const T* head, int head_dim) {
  for (int i = 0; i < head_dim; i += kLineElements<T>) prefetch_far(head + i);
}

// The shape of a row and how its heads stand in two tensors.
struct RowShape {
  int32_t num_heads;
  int32_t head_dim;
  int64_t in_head_stride;
  int64_t out_head_stride;

  bool in_is_contiguous() const { return num_heads == 1 || in_head_stride == head_dim; }
  bool out_is_contiguous() const { return num_heads == 1 || out_head_stride == head_dim; }
};

// How rows are written. A row that will not be read again soon is streamed past the caches: that
// saves the read of each line that an ordinary store makes, a third of the traffic of a copy.
// In descending order of what they demand of the rows.
enum class Writing {
  kStream,  // straight from registers: every vector of a head is aligned and fills whole lines
  kStage,   // by way of a buffer in the first-level cache: rows are whole lines, heads are not
  kStore,
};
constexpr int64_t kStageBytes = 16384;  // longest row that is staged

TOKENDANCE_INLINE bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

// `part` is the number of elements between the vectors of a head that are written side by side.
template <typename T>
inline Writing choose_writing(const void* out, const RowLayout& layout, const RowShape& shape,
                              int64_t part, int64_t total_bytes) {
  constexpr int64_t kElements = kCacheLine / static_cast<int64_t>(sizeof(T));
  if (total_bytes < last_level_cache_bytes()) return Writing::kStore;
  if (!is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)), kCacheLine) ||
      !is_multiple(layout.page_stride, kElements) || !is_multiple(layout.row_stride, kElements)) {
    return Writing::kStore;
  }
  if (is_multiple(shape.head_dim, kElements) && is_multiple(part, kElements) &&
      (shape.num_heads == 1 || is_multiple(shape.out_head_stride, kElements))) {
    return Writing::kStream;
  }
  const int64_t row_elements = int64_t{shape.num_heads} * shape.head_dim;
  if (shape.out_is_contiguous() && is_multiple(row_elements, kElements) &&
      row_elements * static_cast<int64_t>(sizeof(T)) <= kStageBytes) {
    return Writing::kStage;
  }
  return Writing::kStore;
}

// `bytes` is a multiple of the cache line, `out` aligned to it.
TOKENDANCE_INLINE void stream_lines(void* out, const void* in, int64_t bytes) {
  float* to = static_cast<float*>(out);
  const float* from = static_cast<const float*>(in);
  for (int64_t i = 0; i < bytes / 4; i += kLanes) stream_line(to + i, load_line(from + i));
}

// Copies `count` elements; streams them if they are whole aligned lines.
template <Writing kWriting, typename T>
TOKENDANCE_INLINE void copy_elements(T* out, const T* in, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if constexpr (kWriting == Writing::kStore) {
    memcpy(out, in, bytes);
  } else {
    stream_lines(out, in, bytes);
  }
}

// Copies a row bit for bit.
template <Writing kWriting, typename T>
TOKENDANCE_INLINE void copy_row(T* out, const T* in, const RowShape& shape) {
  if (shape.in_is_contiguous() && shape.out_is_contiguous()) {
    return copy_elements<kWriting>(out, in, int64_t{shape.num_heads} * shape.head_dim);
  }
  if constexpr (kWriting == Writing::kStage) {
    alignas(kCacheLine) T stage[kStageBytes / sizeof(T)];
    for (int32_t head = 0; head < shape.num_heads; ++head) {
      memcpy(stage + head * shape.head_dim, in + head * shape.in_head_stride,
             shape.head_dim * sizeof(T));
    }
    return copy_elements<kWriting>(out, static_cast<const T*>(stage),
                                   int64_t{shape.num_heads} * shape.head_dim);
  }
  for (int32_t head = 0; head < shape.num_heads; ++head) {
    copy_elements<kWriting>(out + head * shape.out_head_stride, in + head * shape.in_head_stride,
                            shape.head_dim);
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
