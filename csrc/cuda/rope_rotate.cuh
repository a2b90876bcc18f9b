// rope_rotate: moves rows of a cache to other positions, gathered and scattered by row.
//
// Bytes: a row is read once and written once per destination; 2 * H * D * (1 + destinations) bytes
// a row at 16 bits, and its row of the tables, 4 * rotary_dim bytes, which all heads share through
// L1. FLOPs: 3 per element and destination. That is 0.75 FLOP/byte, against 9.6 (A100: 19.5 TFLOPS
// fp32, 2039 GB/s) and 20 (H100: 67 TFLOPS, 3350 GB/s; datasheets): memory bound by a factor of
// more than ten on both.
//
// A thread holds 32 bytes of a row: two accesses of 16 bytes, the two halves of its pairs. No
// shared memory and no barrier, so that the size of a block only sets how finely work is dealt out.
// 75 registers at most on sm_80 (e4m3 to 16 bits) and 72 on sm_90 (fp16, interleaved): three blocks
// of 256 threads on a multiprocessor at least, 24 of 64 warps, that is up to 24 KB of loads under
// way. With a latency of 700 ns (assumed) H100's share of 25 bytes/ns, half of it reads, needs 9
// KB: blocks may spend two thirds of their time waiting for row numbers, positions and angles.
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

// One thread moves one task (move.cuh) of one row to all destinations of the row. It reads its
// share of the row before it writes any, and no other thread reads or writes that share: so rows
// may be moved in place.
// Quantized rows are moved as the numbers that they stand for; without scales, as their elements.
template <typename In, typename Out, int V, bool kInterleaved>
__device__ __forceinline__ void rope_rotate(const RopeRotateParams& p, const Tile& tile) {
  const int32_t tasks_of_head = move_tasks_of_head(p.head_dim, V);
  const int32_t tasks_of_row = p.num_heads * tasks_of_head;
  const int32_t thread = static_cast<int32_t>(blockIdx.y * blockDim.x + threadIdx.x);
  const int32_t row_of_block = thread / tasks_of_row;
  const int32_t task_of_row = thread - row_of_block * tasks_of_row;
  const int64_t row = int64_t{blockIdx.x} * tile.rows + row_of_block;
  if (row_of_block >= tile.rows || row >= p.num_rows) return;
  const int64_t row_in = p.row_in ? __ldg(p.row_in + row) : row;
  const int64_t from = p.position_from ? __ldg(p.position_from + row) : 0;
  if (row_in < 0 || row_in >= p.x_layout.num_rows) return;
  const int32_t head = task_of_row / tasks_of_head;
  const auto task =
      MoveTask<V, kInterleaved>::make(task_of_row % tasks_of_head, p.head_dim, p.rope.rotary_dim);

  const In* source =
      static_cast<const In*>(p.x) + row_offset(p.x_layout, row_in) + head * p.x_layout.head_stride;
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
    const int64_t destination = row * p.destinations + j;
    const int64_t row_out = p.row_out ? __ldg(p.row_out + destination) : row;
    const int64_t shift = p.position_to ? __ldg(p.position_to + destination) - from : 0;
    if (row_out < 0 || row_out >= p.out_layout.num_rows || !has_angles(p.rope, shift)) continue;
    const bool turns = task.rotates && shift != 0;
    const bool multiplies = task.rotates && p.position_to && p.attention_factor != 1.0f;
    Vector<Out, V> x, y;
    bool changes = true;  // what does not keeps its bits
    if constexpr (std::is_same_v<In, Out>) {
      x = first;
      y = second;
      changes = turns || multiplies;
      if constexpr (kIsQuantized<In>) changes = changes || p.x_scale;
    }
    if (changes) {
      float x_values[V], y_values[V];
      unpack(first, x_values);
      unpack(second, y_values);
      if constexpr (kIsQuantized<In>) task.multiply(x_scale, x_values, y_values);
      if (turns) {
        const int64_t table_row = shift < 0 ? -shift : shift;
        task.rotate(task.load_angles(p.rope, table_row, shift < 0), x_values, y_values);
      }
      if (multiplies) task.multiply(p.attention_factor, x_values, y_values);
      if constexpr (kIsQuantized<Out>) task.multiply(out_factor, x_values, y_values);
      pack(x_values, &x);
      pack(y_values, &y);
    }
    Out* target = static_cast<Out*>(p.out) + row_offset(p.out_layout, row_out) +
                  head * p.out_layout.head_stride;
    store_vector<Out, V>(target + task.first, x);
    store_vector<Out, V>(target + task.second, y);
  }
}

}  // namespace tokendance::cuda
