// Checks of an operator's arguments. An error names the argument, what was expected and what came:
//
//   k_pool: expected [num_pages, 32, 4, 128], got [10, 16, 4, 128]
//
// A dimension given by name is bound by the first argument that has it and verified after:
//
//   Dimensions dims;
//   Argument("k_pool", k_pool).like(q).shape(dims, {"num_pages", "block_size", "heads", head_dim});
//   Argument("v_pool", v_pool).like(q).shape(dims, {"num_pages", "block_size", "heads", head_dim});
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokendance/params.h"

namespace tokendance {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error, which reaches Python as RuntimeError, with the concatenated parts.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// "name: expected ..., got ..." unless `condition`.
template <typename Expected, typename Got>
void expect(bool condition, std::string_view name, const Expected& expected, const Got& got) {
  if (!condition) fail(name, ": expected ", expected, ", got ", got);
}

// One expected dimension: a size, a name, or an upper bound.
class Dimension {
 public:
  Dimension(const char* name) : name_(name) {}
  Dimension(int64_t size) : size_(size) {}
  Dimension(int32_t size) : size_(size) {}
  static Dimension at_most(int64_t size) {
    Dimension dimension(size);
    dimension.is_bound_ = true;
    return dimension;
  }

 private:
  friend class Dimensions;
  const char* name_ = nullptr;
  int64_t size_ = -1;
  bool is_bound_ = false;
};

// The named dimensions of one call.
class Dimensions {
 public:
  // The size of a dimension that an earlier shape bound.
  int64_t operator[](std::string_view name) const;
  bool has(std::string_view name) const { return find(name) != nullptr; }
  void bind(const char* name, int64_t size) { bound_.emplace_back(name, size); }

  // Whether `tensor` has this shape; binds its names if so.
  bool match(const Tensor& tensor, std::initializer_list<Dimension> shape);
  // The shape as an error shows it: bound names as their sizes.
  std::string describe(std::initializer_list<Dimension> shape) const;

 private:
  const int64_t* find(std::string_view name) const;
  std::vector<std::pair<std::string_view, int64_t>> bound_;
};

// An argument under its name. Each check returns the argument, or throws.
class Argument {
 public:
  Argument(std::string name, const Tensor& tensor) : name_(std::move(name)), tensor_(tensor) {}

  const Argument& device_of(const Tensor& other) const;
  const Argument& dtype(ScalarType wanted) const;
  // Device and dtype of another argument.
  const Argument& like(const Tensor& other) const;
  const Argument& shape(Dimensions& dims, std::initializer_list<Dimension> shape) const;
  const Argument& contiguous() const;
  // Stride 1 in the last dimension, so that rows can be read as vectors.
  const Argument& innermost_stride_1() const;
  // No two elements in the same place, as in an expanded tensor: required of what is written.
  const Argument& not_expanded() const;
  // At a multiple of 16 bytes on CUDA, whose kernels read whole vectors of it.
  const Argument& aligned() const;
  // The same of everything along each axis but the innermost.
  const Argument& of_vectors() const;
  // Rows as operators take them: [rows, heads, head_dim] (then block_size 1) or
  // [pages, block_size, heads, head_dim]; innermost stride 1.
  RowLayout rows(Dimensions& dims, Dimension heads, Dimension head_dim) const;
  // Pages as operators take them: [pages, block_size, heads, head_dim]; innermost stride 1.
  RowLayout pages(Dimensions& dims, Dimension pages, Dimension block_size, Dimension heads,
                  Dimension head_dim) const;

 private:
  std::string name_;
  const Tensor& tensor_;
};

// The dtype of queries, and of keys and values that may not be quantized: fp32, fp16 or bf16.
DType plain_dtype(std::string_view name, const Tensor& tensor);
// The dtype of stored keys and values: fp32, fp16, bf16 or e4m3, or on the CPU int8.
DType storage_dtype(std::string_view name, const Tensor& tensor);

// Which of a source and what is made of it may be quantized while the other is not.
enum class Quantized { kSource, kResult, kEither };
// The dtype of `tensor`, made of (or multiplied with) a tensor of dtype `source`: the same, or as
// `may` says one of the two is quantized. The devices agree.
DType paired_dtype(std::string_view name, const Tensor& tensor, const Tensor& source,
                   Quantized may);

// The scales of the heads of a quantized tensor, fp32 contiguous of this shape; null = 1. On the
// CPU their values are looked at.
const float* checked_scales(const char* name, const std::optional<Tensor>& scales,
                            std::string_view of, const Tensor& quantized, Dimensions& dims,
                            std::initializer_list<Dimension> shape);
// head_dim must be one that the kernels are made for.
int32_t checked_head_dim(std::string_view name, int64_t head_dim);

// A size that the kernels hold in 32 bits.
int32_t checked_int32(std::string_view name, int64_t size);

// cos and sin: fp32 contiguous [max_position, rotary_dim / 2] on the device of `other`.
RopeTables rope_tables(const Tensor& cos, const Tensor& sin, bool interleaved, const Tensor& other,
                       int32_t head_dim);

// `name`[layer], for the arguments that are lists of tensors.
std::string layer_name(std::string_view name, size_t layer);

// Shape, dtype name and strides as errors show them.
std::string shape_text(const Tensor& tensor);
std::string strides_text(const Tensor& tensor);
std::string device_text(const Tensor& tensor);
const char* dtype_text(ScalarType dtype);

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace tokendance
