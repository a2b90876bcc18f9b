// What a CUDA operator launches, decided apart from launching it.
//
// `plan_<op>(params)` of csrc/cuda/<op>_plan.h is a pure host function: it reads sizes, strides and
// the alignment of pointers, never what they point to. It compiles without CUDA, so that a test
// can execute exactly what the launcher would launch.
#pragma once

#include <stdint.h>

#include "tokendance/params.h"

namespace tokendance {

// How a plan cuts an operator's work into blocks; every kernel takes one after its params. What the
// numbers count is stated where the plan sets them; 0 where a kernel does not ask.
struct Tile {
  int32_t rows;    // rows that a block handles
  int32_t heads;   // heads that a block handles
  int32_t agents;  // agents that a block handles
  int32_t layers;  // layers that a block handles
};

struct KernelLaunch {
  const char* name;      // of the kernel, as it stands in the PTX
  int32_t kernel;        // index of the kernel in the operator's list of kernels
  uint32_t grid[3];      // blocks
  uint32_t block[3];     // threads
  int32_t shared_bytes;  // dynamic shared memory of a block
  Tile tile;
};

constexpr int kMaxLaunches = 2;

// Launches in stream order; none when there is nothing to do.
struct LaunchPlan {
  int32_t num_launches;
  KernelLaunch launches[kMaxLaunches];
};

inline void add_launch(LaunchPlan* plan, const char* name, int kernel, int64_t grid_x,
                       int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared_bytes,
                       Tile tile) {
  plan->launches[plan->num_launches++] = {
      name,
      kernel,
      {static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y), static_cast<uint32_t>(grid_z)},
      {static_cast<uint32_t>(threads), 1, 1},
      static_cast<int32_t>(shared_bytes),
      tile};
}

constexpr int kWarpSize = 32;
constexpr int64_t kVectorBytes = 16;  // the widest access of a thread
// Blocks of 86, 89 and 120 have no more dynamic shared memory than this.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
// A launch of fewer blocks leaves multiprocessors of an H100 (132) idle, at four blocks on each.
constexpr int64_t kWantedBlocks = 4 * 132;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat8:
    case DType::kInt8:
      return 1;
    default:
      return 2;
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether every head of every row starts at a multiple of so many elements if row 0 does.
inline bool is_aligned(const RowLayout& layout, int64_t elements) {
  return layout.page_stride % elements == 0 && layout.row_stride % elements == 0 &&
         layout.head_stride % elements == 0;
}

inline bool is_aligned(const RowLayout& layout, DType dtype) {
  return is_aligned(layout, kVectorBytes / element_bytes(dtype));
}

// `Pointers`: LayerPointers or MutableLayerPointers.
template <typename Pointers>
bool are_aligned(const Pointers& pointers, int32_t num_layers, int64_t bytes = kVectorBytes) {
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    if (!is_aligned(pointers.k[layer], bytes) || !is_aligned(pointers.v[layer], bytes)) {
      return false;
    }
  }
  return true;
}

// Whether both halves of the rotary dims consist of vectors of so many elements, so that a thread
// may rotate whole ones. Their angles are then aligned in the tables, too.
inline bool is_aligned(const RopeTables& rope, int64_t elements) {
  return rope.rotary_dim / 2 % elements == 0 &&
         (rope.rotary_dim == 0 || (is_aligned(rope.cos) && is_aligned(rope.sin)));
}
inline bool is_aligned(const RopeTables& rope, DType dtype) {
  return is_aligned(rope, kVectorBytes / element_bytes(dtype));
}

}  // namespace tokendance
