#include "ops/layers.h"

namespace tokendance {
namespace {

bool same_sizes(const Tensor& a, const Tensor& b, bool strides) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if ((strides ? a.stride(axis) : a.size(axis)) != (strides ? b.stride(axis) : b.size(axis)))
      return false;
  }
  return true;
}

}  // namespace

LayerList checked_layers(const char* name, const std::vector<Tensor>& layers, const Tensor& like,
                         Dimensions& dims, bool paged, Dimension block_size, bool written) {
  const int64_t count = static_cast<int64_t>(layers.size());
  expect(count <= kMaxLayers, name, "at most " + std::to_string(kMaxLayers) + " layers", count);
  if (!dims.has("layers")) dims.bind("layers", count);
  expect(count == dims["layers"], name, std::to_string(dims["layers"]) + " layers", count);
  LayerList list{};
  list.num_layers = static_cast<int32_t>(count);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Argument argument(layer_name(name, i), layers[i]);
    argument.like(like);
    if (written) argument.not_expanded();
    if (i == 0) {
      list.layout = paged ? argument.pages(dims, "num_pages", block_size, "heads", "head_dim")
                          : argument.rows(dims, "heads", "head_dim");
      continue;
    }
    expect(same_sizes(layers[i], layers[0], false), layer_name(name, i),
           shape_text(layers[0]) + " as in layer 0", shape_text(layers[i]));
    expect(same_sizes(layers[i], layers[0], true), layer_name(name, i),
           "strides " + strides_text(layers[0]) + " as in layer 0", strides_text(layers[i]));
  }
  return list;
}

void fill_pointers(const std::vector<Tensor>& layers, const void* (&pointers)[kMaxLayers]) {
  for (size_t i = 0; i < layers.size(); ++i) pointers[i] = layers[i].const_data_ptr();
}

void fill_pointers(const std::vector<Tensor>& layers, void* (&pointers)[kMaxLayers]) {
  for (size_t i = 0; i < layers.size(); ++i) pointers[i] = layers[i].mutable_data_ptr();
}

}  // namespace tokendance
