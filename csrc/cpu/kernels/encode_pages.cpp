// Pages of keys or values into fewer bits, on their way to host memory or a file.
//
// Reads every row of the pages once from memory and writes a half or less of its bytes: bound by
// reading where pages are not in the caches, by widening and rounding inside them. A page is read
// twice, for its scales and for its codes; the second time it is in the first- or second-level
// cache. Of keys a head is taken over all rows of the page, its scales in the first-level cache.
#include "cpu/codes.h"
#include "cpu/rotation.h"

namespace tokendance::TOKENDANCE_ISA {
namespace {

// Makes a scale of the largest magnitude, and gives what elements are multiplied by.
template <typename C>
TOKENDANCE_INLINE float factor_of(float& largest) {
  if (largest < kSmallestScale) largest = 0.0f;
  return largest == 0.0f ? 0.0f : kLargestCode<C> / largest;
}

template <typename C>
TOKENDANCE_INLINE F32 factors_of(F32& largest) {
  float scales[kLanes], factors[kLanes];
  store(scales, narrow<float>(largest));
  for (int i = 0; i < kLanes; ++i) factors[i] = factor_of<C>(scales[i]);
  largest = load(scales);
  return load(factors);
}

template <typename T, typename C>
void encode_per_channel(const CodedPagesParams& params, const CodedPage& page) {
  const int64_t row_codes = bytes_of_codes<C>(int64_t{params.num_heads} * params.head_dim);
  const int32_t vectors = params.head_dim / kLanes;
  for (int32_t head = 0; head < params.num_heads; ++head) {
    const T* in =
        static_cast<const T*>(params.pool) + page.first + head * params.layout.head_stride;
    const int64_t channel = int64_t{head} * params.head_dim;
    F32 of_channels[kMaxHeadDim / kLanes];
    for (int32_t i = 0; i < vectors; ++i) of_channels[i] = broadcast(0.0f);
    for (int32_t row = 0; row < page.rows; ++row) {
      const T* elements = in + row * params.layout.row_stride;
      for (int32_t i = 0; i < vectors; ++i) {
        of_channels[i] = larger(of_channels[i], abs(load(elements + i * kLanes)));
      }
    }
    T* scales = reinterpret_cast<T*>(page.scales) + channel;
    for (int32_t i = 0; i < vectors; ++i) {
      const F32 factor = factors_of<C>(of_channels[i]);
      store(scales + i * kLanes, narrow<T>(of_channels[i]));
      of_channels[i] = factor;
    }
    for (int32_t row = 0; row < page.rows; ++row) {
      const T* elements = in + row * params.layout.row_stride;
      uint8_t* codes = page.codes + row * row_codes + bytes_of_codes<C>(channel);
      for (int32_t i = 0; i < vectors; ++i) {
        store_codes<C>(codes, mul(load(elements + i * kLanes), of_channels[i]));
        codes += bytes_of_codes<C>(kLanes);
      }
    }
  }
}

template <typename T, typename C>
void encode_per_row(const CodedPagesParams& params, const CodedPage& page) {
  const T* in = static_cast<const T*>(params.pool) + page.first;
  T* scales = reinterpret_cast<T*>(page.scales);
  uint8_t* codes = page.codes;
  for (int32_t row = 0; row < page.rows; ++row) {
    for (int32_t head = 0; head < params.num_heads; ++head) {
      const T* elements = in + row * params.layout.row_stride + head * params.layout.head_stride;
      F32 largest = broadcast(0.0f);
      for (int32_t dim = 0; dim < params.head_dim; dim += kLanes) {
        largest = larger(largest, abs(load(elements + dim)));
      }
      float scale = largest_lane(largest);
      const F32 factor = broadcast(factor_of<C>(scale));
      const Packed<T> rounded = narrow<T>(broadcast(scale));
      memcpy(scales++, &rounded, sizeof(T));
      for (int32_t dim = 0; dim < params.head_dim; dim += kLanes) {
        store_codes<C>(codes, mul(load(elements + dim), factor));
        codes += bytes_of_codes<C>(kLanes);
      }
    }
  }
  const int64_t left = int64_t{params.layout.block_size - page.rows} * params.num_heads;
  memset(scales, 0, left * sizeof(T));
}

// Zeros in place of the rows that the page does not have.
template <typename C>
void encode_padding(const CodedPagesParams& params, const CodedPage& page) {
  const int64_t row_elements = int64_t{params.num_heads} * params.head_dim;
  const F32 zeros = broadcast(0.0f);
  for (int64_t i = page.rows * row_elements; i < params.layout.block_size * row_elements;
       i += kLanes) {
    store_codes<C>(page.codes + bytes_of_codes<C>(i), zeros);
  }
}

template <typename T>
void copy_page(const CodedPagesParams& params, const CodedPage& page) {
  const T* in = static_cast<const T*>(params.pool) + page.first;
  T* out = reinterpret_cast<T*>(page.codes);
  const RowShape shape{params.num_heads, params.head_dim, params.layout.head_stride,
                       params.head_dim};
  const int64_t row_elements = int64_t{params.num_heads} * params.head_dim;
  for (int32_t row = 0; row < page.rows; ++row) {
    copy_row<Writing::kStore>(out + row * row_elements, in + row * params.layout.row_stride, shape);
  }
  memset(out + page.rows * row_elements, 0,
         (params.layout.block_size - page.rows) * row_elements * sizeof(T));
}

}  // namespace

void encode_pages(const CodedPagesParams& params, ParallelFor parallel_for) {
  each_coded_page(params, parallel_for, [&](const CodedPage& page) {
    with_element(params.dtype, [&](auto element) {
      using T = decltype(element);
      if (params.code == Code::kExact) return copy_page<T>(params, page);
      with_code(params.code, [&](auto code) {
        using C = decltype(code);
        if (params.per_channel) {
          encode_per_channel<T, C>(params, page);
        } else {
          encode_per_row<T, C>(params, page);
        }
        encode_padding<C>(params, page);
      });
    });
  });
}

}  // namespace tokendance::TOKENDANCE_ISA
