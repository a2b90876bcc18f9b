#include "ops/check.h"

#include <torch/csrc/stable/device.h>

#include <cmath>

namespace tokendance {
namespace {

template <typename Sizes>
std::string list_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

bool is_one_of(int64_t value, std::initializer_list<int64_t> values) {
  for (int64_t candidate : values) {
    if (value == candidate) return true;
  }
  return false;
}

std::optional<DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8;
    case ScalarType::Char:
      return DType::kInt8;
    default:
      return std::nullopt;
  }
}

// The quantized dtypes on the device of `tensor`, as the end of a list.
const char* quantized_text(const Tensor& tensor) {
  return tensor.is_cpu() ? ", float8_e4m3fn or int8" : " or float8_e4m3fn";
}

}  // namespace

const int64_t* Dimensions::find(std::string_view name) const {
  for (const auto& entry : bound_) {
    if (entry.first == name) return &entry.second;
  }
  return nullptr;
}

int64_t Dimensions::operator[](std::string_view name) const {
  const int64_t* size = find(name);
  if (!size) fail("dimension ", name, ": used before any argument gives it");
  return *size;
}

bool Dimensions::match(const Tensor& tensor, std::initializer_list<Dimension> shape) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size()) return false;
  size_t axis = 0;
  for (const Dimension& wanted : shape) {
    const int64_t size = sizes[axis++];
    if (wanted.name_) {
      const int64_t* bound = find(wanted.name_);
      if (bound && *bound != size) return false;
    } else if (wanted.is_bound_ ? size > wanted.size_ : size != wanted.size_) {
      return false;
    }
  }
  axis = 0;
  for (const Dimension& wanted : shape) {
    const int64_t size = sizes[axis++];
    if (!wanted.name_) continue;
    const int64_t* bound = find(wanted.name_);
    if (!bound) {
      bound_.emplace_back(wanted.name_, size);
    } else if (*bound != size) {  // one name twice in a shape
      return false;
    }
  }
  return true;
}

std::string Dimensions::describe(std::initializer_list<Dimension> shape) const {
  std::ostringstream text;
  text << "[";
  bool first = true;
  for (const Dimension& wanted : shape) {
    text << (first ? "" : ", ");
    first = false;
    const int64_t* bound = wanted.name_ ? find(wanted.name_) : &wanted.size_;
    if (wanted.is_bound_) text << "<= ";
    if (bound) {
      text << *bound;
    } else {
      text << wanted.name_;
    }
  }
  text << "]";
  return text.str();
}

const Argument& Argument::device_of(const Tensor& other) const {
  const auto device = tensor_.device();
  const auto wanted = other.device();
  expect(device.type() == wanted.type() && device.index() == wanted.index(), name_,
         device_text(other), device_text(tensor_));
  return *this;
}

const Argument& Argument::dtype(ScalarType wanted) const {
  expect(tensor_.scalar_type() == wanted, name_, dtype_text(wanted),
         dtype_text(tensor_.scalar_type()));
  return *this;
}

const Argument& Argument::like(const Tensor& other) const {
  return device_of(other).dtype(other.scalar_type());
}

const Argument& Argument::shape(Dimensions& dims, std::initializer_list<Dimension> shape) const {
  if (!dims.match(tensor_, shape)) {
    fail(name_, ": expected ", dims.describe(shape), ", got ", shape_text(tensor_));
  }
  return *this;
}

const Argument& Argument::contiguous() const {
  if (!tensor_.is_contiguous()) {
    fail(name_, ": expected a contiguous tensor, got strides ", strides_text(tensor_));
  }
  return *this;
}

const Argument& Argument::innermost_stride_1() const {
  const int64_t last = tensor_.dim() - 1;
  if (last >= 0 && tensor_.size(last) > 1 && tensor_.stride(last) != 1) {
    fail(name_, ": expected innermost stride 1, got strides ", strides_text(tensor_));
  }
  return *this;
}

const Argument& Argument::not_expanded() const {
  const auto sizes = tensor_.sizes();
  const auto strides = tensor_.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] > 1 && strides[axis] == 0) {
      fail(name_, ": expected memory of its own for every element, got strides ",
           strides_text(tensor_));
    }
  }
  return *this;
}

const Argument& Argument::aligned() const {
  const auto address = reinterpret_cast<uintptr_t>(tensor_.const_data_ptr());
  if (!tensor_.is_cpu() && address % 16 != 0) {
    fail(name_, ": expected memory at a multiple of 16 bytes, got ", address % 16,
         " bytes behind one");
  }
  return *this;
}

const Argument& Argument::of_vectors() const {
  aligned();
  if (tensor_.is_cpu()) return *this;
  const int64_t elements = 16 / static_cast<int64_t>(tensor_.element_size());
  for (int64_t axis = 0; axis + 1 < tensor_.dim(); ++axis) {
    if (tensor_.stride(axis) % elements != 0) {
      fail(name_, ": expected strides that are multiples of 16 bytes, ", elements,
           " elements, got ", strides_text(tensor_));
    }
  }
  return *this;
}

RowLayout Argument::rows(Dimensions& dims, Dimension heads, Dimension head_dim) const {
  if (tensor_.dim() == 3) {
    shape(dims, {tensor_.size(0), heads, head_dim}).innermost_stride_1();
    return {tensor_.size(0), tensor_.stride(0), 0, tensor_.stride(1), 1};
  }
  if (tensor_.dim() != 4) {
    fail(name_, ": expected ", dims.describe({"rows", heads, head_dim}), " or ",
         dims.describe({"pages", "block_size", heads, head_dim}), ", got ", shape_text(tensor_));
  }
  return pages(dims, tensor_.size(0), tensor_.size(1), heads, head_dim);
}

RowLayout Argument::pages(Dimensions& dims, Dimension pages, Dimension block_size, Dimension heads,
                          Dimension head_dim) const {
  shape(dims, {pages, block_size, heads, head_dim}).innermost_stride_1();
  const int64_t rows_of_page = tensor_.size(1);
  expect(rows_of_page > 0 && rows_of_page <= INT32_MAX, name_, "block_size of at least 1",
         shape_text(tensor_));
  return {tensor_.size(0) * rows_of_page, tensor_.stride(0), tensor_.stride(1), tensor_.stride(2),
          static_cast<int32_t>(rows_of_page)};
}

DType plain_dtype(std::string_view name, const Tensor& tensor) {
  const std::optional<DType> dtype = dtype_of(tensor);
  if (!dtype || is_quantized(*dtype)) {
    fail(name, ": expected float32, float16 or bfloat16, got ", dtype_text(tensor.scalar_type()));
  }
  return *dtype;
}

DType storage_dtype(std::string_view name, const Tensor& tensor) {
  const std::optional<DType> dtype = dtype_of(tensor);
  if (!dtype || (*dtype == DType::kInt8 && !tensor.is_cpu())) {
    fail(name, ": expected float32, float16, bfloat16", quantized_text(tensor), ", got ",
         dtype_text(tensor.scalar_type()));
  }
  return *dtype;
}

DType paired_dtype(std::string_view name, const Tensor& tensor, const Tensor& source,
                   Quantized may) {
  Argument(std::string(name), tensor).device_of(source);
  const DType from = *dtype_of(source);
  const std::optional<DType> to = dtype_of(tensor);
  const bool to_quantized = is_quantized(from) && may != Quantized::kResult;
  const bool to_plain = !is_quantized(from) && may != Quantized::kSource;
  if (to && *to == from) return from;
  if (to && to_quantized && !is_quantized(*to)) return *to;
  if (to && to_plain && is_quantized(*to) && (*to != DType::kInt8 || tensor.is_cpu())) return *to;
  std::string wanted = dtype_text(source.scalar_type());
  if (to_quantized) wanted += ", float32, float16 or bfloat16";
  if (to_plain) wanted += quantized_text(tensor);
  fail(name, ": expected ", wanted, ", got ", dtype_text(tensor.scalar_type()));
}

const float* checked_scales(const char* name, const std::optional<Tensor>& scales,
                            std::string_view of, const Tensor& quantized, Dimensions& dims,
                            std::initializer_list<Dimension> shape) {
  if (!scales) return nullptr;
  if (!is_quantized(*dtype_of(quantized))) {
    fail(name, ": expected None where ", of, " is ", dtype_text(quantized.scalar_type()),
         ", got a tensor");
  }
  Argument(name, *scales)
      .device_of(quantized)
      .dtype(ScalarType::Float)
      .shape(dims, shape)
      .contiguous();
  const float* values = static_cast<const float*>(scales->const_data_ptr());
  for (int64_t i = 0; scales->is_cpu() && i < scales->numel(); ++i) {
    if (!(values[i] > 0.0f) || !std::isfinite(values[i])) {
      fail(name, ": expected positive, finite scales, got ", values[i]);
    }
  }
  return values;
}

int32_t checked_head_dim(std::string_view name, int64_t head_dim) {
  expect(is_one_of(head_dim, {64, 80, 96, 128, 256}), name, "head_dim 64, 80, 96, 128 or 256",
         head_dim);
  return static_cast<int32_t>(head_dim);
}

int32_t checked_int32(std::string_view name, int64_t size) {
  expect(size <= INT32_MAX, name, "a size below 2^31", size);
  return static_cast<int32_t>(size);
}

RopeTables rope_tables(const Tensor& cos, const Tensor& sin, bool interleaved, const Tensor& other,
                       int32_t head_dim) {
  Dimensions dims;
  for (const auto& [name, table] :
       {std::pair<const char*, const Tensor&>("cos", cos), {"sin", sin}}) {
    if (table.dim() == 2 && table.size(1) > head_dim / 2) {
      fail(name, ": expected [max_position, <= ", head_dim / 2, "], got ", shape_text(table));
    }
    Argument(name, table)
        .device_of(other)
        .dtype(ScalarType::Float)
        .shape(dims, {"max_position", "rotary_dim / 2"})
        .contiguous();
  }
  return {static_cast<const float*>(cos.const_data_ptr()),
          static_cast<const float*>(sin.const_data_ptr()), checked_int32("cos", cos.size(0)),
          static_cast<int32_t>(2 * cos.size(1)), interleaved};
}

std::string layer_name(std::string_view name, size_t layer) {
  return std::string(name) + "[" + std::to_string(layer) + "]";
}

std::string shape_text(const Tensor& tensor) { return list_text(tensor.sizes()); }

std::string strides_text(const Tensor& tensor) { return list_text(tensor.strides()); }

std::string device_text(const Tensor& tensor) {
  const auto device = tensor.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU:
      return "device cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "device cuda:" + std::to_string(device.index());
    default:
      return "device type " + std::to_string(static_cast<int>(device.type()));
  }
}

const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

}  // namespace tokendance
