// rope_rotate: moves rows of a cache to other positions, gathered and scattered by row.
//
// Bytes: a row is read once and written once per destination; 2 * H * D * (1 + destinations) bytes
// a row at 16 bits, and its row of the tables, 4 * rotary_dim bytes, which all heads share through
// L1. FLOPs: 3 per element and destination. That is 0.75 FLOP/byte, against 9.6 (A100: 19.5 TFLOPS
// fp32, 2039 GB/s) and 14 (H200: 67 TFLOPS, 4800 GB/s; datasheets): memory bound by a factor of
// more than ten on both.
//
// A thread holds 32 bytes of a row: two accesses of 16 bytes, the two halves of its pairs. No
// shared memory and no barrier, so that the size of a block only sets how finely work is dealt out.
// What a thread waits for is short: numbers, then the row with its angles. Heads, tasks and rows
// are the three dimensions of a block, and pages are divided by what the host has prepared, so that
// kernels need not be compiled for each head dim to be without divisions.
//
// e4m3 rows have half the bytes for the same FLOPs. In kernels built for sm_89 and later a
// conversion is an instruction for two elements; before, some 10 for each, either way, 26 PTX
// instructions per byte in all (bench.traffic): more than an A100 issues at its bandwidth, so that
// these bound it there.
//
// Half-split heads of 160 bytes (D = 80 at 16 bits) have halves of 2.5 sectors: a warp's request
// touches 3 there, the neighbouring request the other half of the same sector.
#pragma once

#include <type_traits>

#include "cuda/launch_plan.h"
#include "cuda/move.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// Blocks of a multiprocessor that registers are to suffice for: one more would spill where pairs
// lie within a vector, where elements become quantized ones, and from sm_100 on.
template <typename In, typename Out>
constexpr int rope_rotate_blocks(bool interleaved) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return 3;
#else
  return interleaved || (kIsQuantized<Out> && !kIsQuantized<In>) ? 3 : 4;
#endif
}

// Where a row goes, and by how much it is turned.
struct Destination {
  int64_t row;
  int32_t position;  // of a row that is turned
};

__device__ __forceinline__ Destination load_destination(const RopeRotateParams& p, int64_t row,
                                                        int32_t index) {
  const int64_t at = row * p.destinations + index;
  return {p.row_out ? __ldg(p.row_out + at) : row, p.position_to ? __ldg(p.position_to + at) : 0};
}

// One thread moves one task (move.cuh) of one row to all destinations of the row: threads are a
// head's tasks along x, heads along y, rows along z. It reads its share of the row before it writes
// any, and no other thread reads or writes that share: so rows may be moved in place.
//
// Where the row comes from and where it goes first are asked for together, then the row and its
// angles: two trips to memory, whatever has to be looked up.
// Quantized rows are moved as the numbers that they stand for; without scales, as their elements.
template <typename In, typename Out, int V, bool kInterleaved>
__device__ __forceinline__ void rope_rotate(const RopeRotateParams& p, const Tile& tile) {
  const int32_t head = static_cast<int32_t>(blockIdx.y * blockDim.y + threadIdx.y);
  const int64_t row = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  if (head >= p.num_heads || row >= p.num_rows) return;
  const int64_t row_in = p.row_in ? __ldg(p.row_in + row) : row;
  const int32_t from = p.position_from ? __ldg(p.position_from + row) : 0;
  Destination next = load_destination(p, row, 0);
  if (row_in < 0 || row_in >= p.x_layout.num_rows) return;
  const auto task = MoveTask<V, kInterleaved>::make(static_cast<int32_t>(threadIdx.x), p.head_dim,
                                                    p.rope.rotary_dim);

  const In* source = static_cast<const In*>(p.x) + row_offset(p.x_layout, tile.in_page, row_in) +
                     head * p.x_layout.head_stride;
  const Vector<In, V> first = load_vector<In, V>(source + task.first);
  const Vector<In, V> second = load_vector<In, V>(source + task.second);

  // What quantized elements are multiplied with to be numbers, and numbers to be elements.
  float x_scale = 1.0f, out_factor = 1.0f;
  if constexpr (kIsQuantized<In>) {
    if (p.x_scale) x_scale = __ldg(p.x_scale + head);
  }
  if constexpr (kIsQuantized<Out>) {
    if (p.out_scale) out_factor = __frcp_rn(__ldg(p.out_scale + head));
  }

#pragma unroll 1
  for (int32_t j = 0; j < p.destinations; ++j) {
    const int64_t row_out = next.row;
    int32_t shift = 0;
    const bool has_angles = !p.position_to || make_shift(p.rope, next.position, from, &shift);
    if (j + 1 < p.destinations) next = load_destination(p, row, j + 1);
    if (row_out < 0 || row_out >= p.out_layout.num_rows || !has_angles) continue;
    const bool turns = task.rotates && shift != 0;
    const bool multiplies = task.rotates && p.position_to && p.attention_factor != 1.0f;
    Out* const target = static_cast<Out*>(p.out) +
                        row_offset(p.out_layout, tile.other_page, row_out) +
                        head * p.out_layout.head_stride;
    if constexpr (std::is_same_v<In, Out>) {  // what does not change keeps its bits
      bool changes = turns || multiplies;
      if constexpr (kIsQuantized<In>) changes = changes || p.x_scale;
      if (!changes) {
        store_vector<Out, V>(target + task.first, first);
        store_vector<Out, V>(target + task.second, second);
        continue;
      }
    }
    Angles<V> angles = {};
    if (turns) angles = task.load_angles(p.rope, abs(shift));
    float x_values[V], y_values[V];
    unpack(first, x_values);
    unpack(second, y_values);
    if constexpr (kIsQuantized<In>) task.multiply(x_scale, x_values, y_values);
    if (turns) task.rotate(angles.of_shift(shift), x_values, y_values);
    if (multiplies) task.multiply(p.attention_factor, x_values, y_values);
    if constexpr (kIsQuantized<Out>) task.multiply(out_factor, x_values, y_values);
    Vector<Out, V> x, y;
    pack(x_values, &x);
    pack(y_values, &y);
    store_vector<Out, V>(target + task.first, x);
    store_vector<Out, V>(target + task.second, y);
  }
}

}  // namespace tokendance::cuda
