// Rows moved to other positions, gathered and scattered.
//
// Each row is read once and written once per destination: bound by memory as soon as rows come from
// it. cos and sin are fetched when the shift changes, which for whole segments is once.
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/move.h"
#include "cpu/parallel.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

constexpr int64_t kRowsAhead = 4;
constexpr int64_t kLinesAhead = 2;
constexpr int64_t kGrainBytes = 32768;

// Enough of a gathered row to start the hardware's prefetch of the rest. All of it at once would
// take every miss buffer from the row that is being read.
template <typename T>
TOKENDANCE_INLINE void prefetch_start(const T* row) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t line = 0; line < kLinesAhead; ++line) prefetch(at + line * kCacheLine);
}

// A table is larger than the caches near the core, and rows with positions of their own jump in it.
inline void prefetch_angles(const RopeTables& rope, int64_t shift) {
  const int64_t half = rope.rotary_dim / 2;
  const int64_t row = (shift < 0 ? -shift : shift) * half;
  for (int64_t i = 0; i < half; i += kLanes) {
    prefetch(rope.cos + row + i);
    prefetch(rope.sin + row + i);
  }
}

template <bool kInterleaved, Writing kWriting, typename T>
void rotate_rows(const RopeRotateParams& params, const MoveContext& context, int64_t begin,
                 int64_t end) {
  const T* x = static_cast<const T*>(params.x);
  T* out = static_cast<T*>(params.out);
  const auto row_in = [&](int64_t i) {
    return x + row_offset(params.x_layout, params.row_in ? params.row_in[i] : i);
  };
  const auto shift_of = [&](int64_t i, int32_t j) {
    return int64_t{params.position_to[i * params.destinations + j]} -
           (params.position_from ? params.position_from[i] : 0);
  };
  LineAngles<T, kInterleaved> angles;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t ahead = i + kRowsAhead;
    if (ahead < end) {
      if (params.row_in) prefetch_start(row_in(ahead));
      if (params.position_to && shift_of(ahead, 0) != shift_of(ahead - 1, 0)) {
        prefetch_angles(params.rope, shift_of(ahead, 0));
      }
    }
    const T* in = row_in(i);
    for (int32_t j = 0; j < params.destinations; ++j) {
      const int64_t entry = i * params.destinations + j;
      const int64_t row = params.row_out ? params.row_out[entry] : i;
      if (row < 0) continue;
      T* to = out + row_offset(params.out_layout, row);
      if (!params.position_to) {
        if (to != in) copy_row<kWriting>(to, in, context.shape);
        continue;
      }
      move_row<kWriting>(to, in, shift_of(i, j), context, angles);
    }
  }
  if constexpr (kWriting != Writing::kStore) finish_streaming();
}

void convert_rows(const RopeRotateParams& params, const RowConversion& conversion, int64_t begin,
                  int64_t end) {
  const HeadScales scales = {params.x_scale, params.out_scale};
  MoveAngles angles;
  for (int64_t i = begin; i < end; ++i) {
    const void* in = conversion.in_row(
        params.x, row_offset(params.x_layout, params.row_in ? params.row_in[i] : i));
    for (int32_t j = 0; j < params.destinations; ++j) {
      const int64_t entry = i * params.destinations + j;
      const int64_t row = params.row_out ? params.row_out[entry] : i;
      if (row < 0) continue;
      void* to = conversion.out_row(params.out, row_offset(params.out_layout, row));
      if (params.position_to) {
        const int64_t from = params.position_from ? params.position_from[i] : 0;
        conversion.move(to, in, params.position_to[entry] - from, scales, angles);
      } else {
        conversion.copy(to, in, scales);
      }
    }
  }
}

}  // namespace

void rope_rotate(const RopeRotateParams& params, ParallelFor parallel_for) {
  const MoveContext context = {params.rope,
                               {params.num_heads, params.head_dim, params.x_layout.head_stride,
                                params.out_layout.head_stride},
                               params.attention_factor};
  if (params.dtype != params.out_dtype || params.x_scale || params.out_scale) {
    const RowConversion conversion(params.dtype, params.out_dtype, params.rope, context.shape,
                                   params.attention_factor);
    const int64_t row_bytes = int64_t{params.num_heads} * params.head_dim *
                              (bytes_of(params.dtype) + bytes_of(params.out_dtype));
    return parallel_ranges(
        parallel_for, params.num_rows, 2 * kGrainBytes / row_bytes,
        [&](int64_t begin, int64_t end) { convert_rows(params, conversion, begin, end); });
  }
  with_stored_types(params.dtype, params.rope.interleaved, [&](auto element, auto interleaved) {
    using T = decltype(element);
    const int64_t row_bytes =
        int64_t{params.num_heads} * params.head_dim * static_cast<int64_t>(sizeof(T));
    const Writing writing =
        choose_writing<T>(params.out, params.out_layout, context.shape, written_part(params.rope),
                          row_bytes * params.num_rows * (1 + params.destinations));
    with_writing(writing, [&](auto how) {
      parallel_ranges(parallel_for, params.num_rows, kGrainBytes / row_bytes,
                      [&](int64_t begin, int64_t end) {
                        rotate_rows<decltype(interleaved)::value, decltype(how)::value, T>(
                            params, context, begin, end);
                      });
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
