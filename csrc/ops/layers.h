// Arguments that are lists with one tensor per layer.
#pragma once

#include <vector>

#include "ops/check.h"

namespace tokendance {

// What the tensors of all layers share.
struct LayerList {
  RowLayout layout;
  int32_t num_layers;
};

// `layers` are row tensors of the device and dtype of `like`, with `heads` heads of `head_dim`, all
// of one shape and with the same strides. `paged`: only [num_pages, block_size, heads, head_dim].
LayerList checked_layers(const char* name, const std::vector<Tensor>& layers, const Tensor& like,
                         Dimensions& dims, bool paged, Dimension block_size, bool written);

// The data pointers of the layers.
void fill_pointers(const std::vector<Tensor>& layers, const void* (&pointers)[kMaxLayers]);
void fill_pointers(const std::vector<Tensor>& layers, void* (&pointers)[kMaxLayers]);

}  // namespace tokendance
