// What a CUDA operator launches, decided apart from launching it.
//
// `plan_<op>(params)` of csrc/cuda/<op>_plan.h is a pure host function: it reads sizes, strides and
// the alignment of pointers, never what they point to. It compiles without CUDA, so that a test
// can execute exactly what the launcher would launch.
#pragma once

#include <stdint.h>

#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance {

// A number that is divided by, known on the host: five instructions instead of twenty-five
// (Granlund and Montgomery, Division by invariant integers using multiplication, 1994).
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t first_shift, second_shift;
};

// value >= 1. With l = ceil(log2(value)): multiplier = floor(2^32 (2^l - value) / value) + 1.
inline Divisor make_divisor(int64_t value) {
  uint32_t log = 0;
  while ((int64_t{1} << log) < value) ++log;
  const uint64_t rest = (uint64_t{1} << log) - static_cast<uint64_t>(value);
  return {static_cast<uint32_t>(value),
          static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(value) + 1), log > 0 ? 1u : 0u,
          log > 0 ? log - 1 : 0u};
}

TOKENDANCE_HOST_DEVICE uint32_t quotient(uint32_t number, const Divisor& by) {
  const auto high = static_cast<uint32_t>(uint64_t{number} * by.multiplier >> 32);
  return (high + ((number - high) >> by.first_shift)) >> by.second_shift;
}

// How a plan cuts an operator's work into blocks; every kernel takes one after its params. What the
// numbers count is stated where the plan sets them; 0 where a kernel does not ask.
struct Tile {
  int32_t rows;        // rows that a block handles
  int32_t heads;       // heads that a block handles
  int32_t agents;      // agents that a block handles
  int32_t layers;      // layers that a block handles
  Divisor in_page;     // rows of a page of what is read for each agent or row
  Divisor other_page;  // of what is written, or compared with
  Divisor head;        // shares of a head: what a thread moves of it (move.cuh)
};

struct KernelLaunch {
  const char* name;      // of the kernel, as it stands in the PTX
  int32_t kernel;        // index of the kernel in the operator's list of kernels
  uint32_t grid[3];      // blocks
  uint32_t block[3];     // threads
  int32_t shared_bytes;  // dynamic shared memory of a block
  Tile tile;
  // The kernel waits itself for the launch before it (ptx.cuh), and so may begin before that ends.
  bool waits;
};

constexpr int kMaxLaunches = 2;

// Launches in stream order; none when there is nothing to do.
struct LaunchPlan {
  int32_t num_launches;
  KernelLaunch launches[kMaxLaunches];
};

// Whether a kernel's name is `prefix` and `variant`: static_asserts hold lists of kernels to the
// order in which plans count them.
constexpr bool is_named(const char* name, const char* prefix, const char* variant) {
  for (; *prefix; ++prefix, ++name) {
    if (*name != *prefix) return false;
  }
  while (*name && *name == *variant) ++name, ++variant;
  return *name == *variant;
}

// Threads of a block; along x alone where one number is given.
struct Threads {
  int64_t x, y, z;
  Threads(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

inline void add_launch(LaunchPlan* plan, const char* name, int kernel, int64_t grid_x,
                       int64_t grid_y, int64_t grid_z, Threads threads, int64_t shared_bytes,
                       Tile tile) {
  plan->launches[plan->num_launches++] = {
      name,
      kernel,
      {static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y), static_cast<uint32_t>(grid_z)},
      {static_cast<uint32_t>(threads.x), static_cast<uint32_t>(threads.y),
       static_cast<uint32_t>(threads.z)},
      static_cast<int32_t>(shared_bytes),
      tile,
      false};
}

constexpr int kWarpSize = 32;
constexpr int64_t kVectorBytes = 16;  // the widest access of a thread
// Blocks of 86, 89 and 120 have no more dynamic shared memory than this.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
// A launch of fewer blocks leaves multiprocessors of an H100 (132) idle, at four blocks on each.
constexpr int64_t kWantedBlocks = 4 * 132;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t element_bytes(DType dtype) {
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
