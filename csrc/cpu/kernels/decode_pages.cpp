// Coded pages back into keys or values, on their way to a pool.
//
// Reads half the bytes of the rows or less and writes them once: bound by writing beyond the
// caches. An element is its code over the largest code, times the scale: that order gives the
// largest element its own bits.
#include "cpu/codes.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

template <typename T, typename C>
void decode_page(const CodedPagesParams& params, const CodedPage& page) {
  T* out = static_cast<T*>(params.pool) + page.first;
  const T* scales = reinterpret_cast<const T*>(page.scales);
  const uint8_t* codes = page.codes;
  const F32 fraction = broadcast(1.0f / kLargestCode<C>);
  for (int32_t row = 0; row < page.rows; ++row) {
    for (int32_t head = 0; head < params.num_heads; ++head) {
      T* elements = out + row * params.layout.row_stride + head * params.layout.head_stride;
      const T* of_channels = scales + int64_t{head} * params.head_dim;
      Packed<T> own = {};
      if (!params.per_channel) {
        memcpy(&own, scales + int64_t{row} * params.num_heads + head, sizeof(T));
      }
      float lanes[kLanes];
      store(lanes, narrow<float>(widen(own)));
      const F32 of_row = broadcast(lanes[0]);
      for (int32_t dim = 0; dim < params.head_dim; dim += kLanes) {
        const F32 scale = params.per_channel ? load(of_channels + dim) : of_row;
        store(elements + dim, narrow<T>(mul(mul(load_codes<C>(codes), fraction), scale)));
        codes += bytes_of_codes<C>(kLanes);
      }
    }
  }
}

template <typename T>
void copy_page(const CodedPagesParams& params, const CodedPage& page) {
  const T* in = reinterpret_cast<const T*>(page.codes);
  T* out = static_cast<T*>(params.pool) + page.first;
  const RowShape shape{params.num_heads, params.head_dim, params.head_dim,
                       params.layout.head_stride};
  for (int32_t row = 0; row < page.rows; ++row) {
    copy_row<Writing::kStore>(out + row * params.layout.row_stride,
                              in + int64_t{row} * params.num_heads * params.head_dim, shape);
  }
}

}  // namespace

void decode_pages(const CodedPagesParams& params, ParallelFor parallel_for) {
  each_coded_page(params, parallel_for, [&](const CodedPage& page) {
    with_element(params.dtype, [&](auto element) {
      using T = decltype(element);
      if (params.code == Code::kExact) return copy_page<T>(params, page);
      with_code(params.code, [&](auto code) { decode_page<T, decltype(code)>(params, page); });
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
