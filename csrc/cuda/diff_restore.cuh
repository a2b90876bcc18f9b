// diff_restore: Mirrors become dense rows, for many agents and layers and both K and V at once.
//
// A block restores one page of the pool: a Master page for up to 16 agents, or an own page for its
// agent. It looks up once which rows go where (position, override mask, slot), then walks through
// its layers, K and V in turn: page to shared memory by cp.async, one item ahead; each agent's rows
// rotated by the agent's shift and written. Rows that no agent of the block needs are not read. Own
// rows are pages of blocks of their own, not patched into Master pages: either way they are read
// once and written once, and so no row has to be looked for, and no two blocks write one row.
//
// A thread copies to shared memory what it will use itself, both elements of every pair it rotates;
// so there is no barrier in the main loop, and accesses of shared memory are contiguous over a warp
// for every head dim.
//
// Bytes of N agents with S shared and P private tokens, in rows of 4 * L * Hk * D bytes at 16 bits:
// S * ceil(N / 16) + N * P read, N * (S + P) written; beside them 8 bytes of slot mapping per row
// and block of layers. FLOPs: 3 per element of K that moves: below 0.75 FLOP/byte, against 9.6
// (A100: 19.5 TFLOPS fp32, 2039 GB/s) and 14 (H200: 67 TFLOPS, 4800 GB/s; datasheets): bound by
// memory, and with many agents by its writes.
//
// Why 16 agents: reading a Master page is then a seventeenth of the bytes that it costs, and more
// agents would take the angles' shared memory from the stages. Why two stages of 16 KB: a block has
// one under way while it writes the other to all of its agents, and three blocks' 48 KB are more
// than the 25 KB that an H200's share of 36 bytes/ns, half of it writes, holds under way for a
// latency of 700 ns (assumed). A head of a page may be more than a stage is to hold (fp32, D = 256,
// pages of 32 rows): then fewer blocks fit.
//
// Of e4m3 a thread has 8 elements at a time, 4 where they become fp32: cp.async of 8 or 4 bytes, by
// way of L1. Values of e4m3 are copied, and keys that do not move; those that do are bound by their
// conversions before sm_89, as rope_rotate is.
#pragma once

#include <type_traits>

#include "cuda/diff_restore_plan.h"
#include "cuda/move.cuh"
#include "cuda/ptx.cuh"
#include "cuda/round_lookup.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// The page that a block restores, and for whom.
struct RestoreSource {
  int32_t page;         // page id in the pool
  int32_t master;       // Master of the round; -1: an own page
  int32_t first_row;    // row of the Master, or of the agent's own rows, that row 0 of the page is
  int32_t first_agent;  // agents first_agent .. first_agent + num_agents
  int32_t num_agents;   // 0: the block has nothing to do
};

// Blocks along x: (Master page, tile of agents), then own pages. Neighbouring blocks share a page,
// which the second of them finds in L2.
__device__ __forceinline__ RestoreSource restore_source(const DiffRestoreParams& p,
                                                        const Tile& tile) {
  const RoundView& round = p.round;
  const int32_t block_size = static_cast<int32_t>(round.extents.block_size);
  const int32_t num_agents = static_cast<int32_t>(round.extents.agents);
  const int32_t agent_tiles = (num_agents + tile.agents - 1) / tile.agents;
  const int32_t master_blocks = static_cast<int32_t>(round.extents.master_pages) * agent_tiles;
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  RestoreSource source = {};
  if (index < master_blocks) {
    const int32_t page = index / agent_tiles;
    source.master =
        range_of(round.master_page_indptr, static_cast<int32_t>(round.extents.masters), page);
    if (source.master < 0) return source;
    source.page = __ldg(round.master_pages + page);
    source.first_row = (page - __ldg(round.master_page_indptr + source.master)) * block_size;
    source.first_agent = index % agent_tiles * tile.agents;
    source.num_agents = min(tile.agents, num_agents - source.first_agent);
  } else {
    const int32_t page = index - master_blocks;
    source.master = -1;
    source.first_agent = range_of(round.own_page_indptr, num_agents, page);
    if (source.first_agent < 0) return source;
    source.page = __ldg(round.own_pages + page);
    source.first_row = (page - __ldg(round.own_page_indptr + source.first_agent)) * block_size;
    source.num_agents = 1;
  }
  return source;
}

// Where row `row` of the page goes for an agent and its use of the Master, if it is one's: a row of
// the output, or -1. `shift` becomes the shift by which its key is to be moved.
__device__ __forceinline__ int64_t restore_target(const DiffRestoreParams& p,
                                                  const RestoreSource& source, int32_t agent,
                                                  int32_t use, int32_t row, int32_t* shift) {
  const RoundView& round = p.round;
  const int32_t index = source.first_row + row;
  int32_t position;
  *shift = 0;
  if (source.master < 0) {
    if (index >= __ldg(round.own_length + agent)) return -1;
    const int64_t first = int64_t{__ldg(round.own_page_indptr + agent)} * round.extents.block_size;
    position = __ldg(round.own_position + first + index);
  } else {
    if (use < 0 || index >= __ldg(round.use_length + use)) return -1;
    const int32_t page_of_use = source.first_row / static_cast<int32_t>(round.extents.block_size);
    const int32_t mask = __ldg(round.use_masks + __ldg(round.use_page_indptr + use) + page_of_use);
    if (static_cast<uint32_t>(mask) >> row & 1) return -1;
    *shift = __ldg(round.use_shift + use);
    if (!has_angles(p.rope, *shift)) return -1;
    position = __ldg(round.use_delta + use) + index;
  }
  if (position < 0 || position >= p.max_length) return -1;
  const int64_t slot = __ldg(p.slot_mapping + agent * p.slot_stride + position);
  return slot < min(p.out_k_layout.num_rows, p.out_v_layout.num_rows) ? slot : -1;
}

// What a thread handles of a row: two vectors, whose heads count from the block's first.
struct RestoreShare {
  int32_t first_head, first_dim;
  int32_t second_head, second_dim;

  __device__ __forceinline__ int64_t first_offset(const RowLayout& layout) const {
    return first_head * layout.head_stride + first_dim;
  }
  __device__ __forceinline__ int64_t second_offset(const RowLayout& layout) const {
    return second_head * layout.head_stride + second_dim;
  }
};

template <typename In, typename Out, int V, bool kInterleaved>
__device__ __forceinline__ void diff_restore(const DiffRestoreParams& p, const Tile& tile) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int32_t block_size = static_cast<int32_t>(p.round.extents.block_size);
  const int32_t tasks_of_head = move_tasks_of_head(p.head_dim, V);
  const RestoreShape shape(tile.heads, tasks_of_head, block_size);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t threads = static_cast<int32_t>(blockDim.x);
  constexpr int kStages = kRestoreStages;
  constexpr bool kReadsOut = !std::is_same_v<In, Out>;
  using Unit = Vector<In, V>;

  In* const stages = reinterpret_cast<In*>(shared);
  int64_t* const k_target = reinterpret_cast<int64_t*>(
      shared + kStages * shape.stage_bytes(V * static_cast<int32_t>(sizeof(In))));
  int64_t* const v_target = k_target + tile.agents * block_size;
  const int32_t angle_stride = shared_angles_size(p.rope.rotary_dim);
  float* const angles = reinterpret_cast<float*>(v_target + tile.agents * block_size);
  int32_t* const shifts = reinterpret_cast<int32_t*>(angles + tile.agents * angle_stride);
  int32_t* const uses = shifts + tile.agents;
  uint32_t* const rows = reinterpret_cast<uint32_t*>(uses + tile.agents);

  // Look up, once for all layers: which rows of the page go where, for each agent.
  const RestoreSource source = restore_source(p, tile);
  const int64_t end_of_page = (int64_t{source.page} + 1) * block_size;
  if (source.num_agents == 0 || source.page < 0 || end_of_page > p.pool_k_layout.num_rows ||
      end_of_page > p.pool_v_layout.num_rows) {
    return;
  }
  if (thread < source.num_agents) {  // a tile has fewer agents than a warp lanes
    rows[thread] = 0;
    uses[thread] =
        source.master < 0 ? -1 : use_of_master(p.round, source.first_agent + thread, source.master);
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = thread; i < source.num_agents * block_size; i += threads) {
    const int32_t agent = i / block_size, row = i % block_size;
    int32_t shift;
    const int64_t target =
        restore_target(p, source, source.first_agent + agent, uses[agent], row, &shift);
    if (target < 0) continue;
    k_target[i] = row_offset(p.out_k_layout, target);
    v_target[i] = row_offset(p.out_v_layout, target);
    atomicOr(rows + agent, 1u << row);
    shifts[agent] = shift;  // the same from every row
  }
  __syncthreads();
  uint32_t needed = 0;
#pragma unroll 1
  for (int32_t agent = 0; agent < source.num_agents; ++agent) needed |= rows[agent];
  if (needed == 0) return;
  if (source.master >= 0) {
#pragma unroll 1
    for (int32_t agent = thread / kWarpSize; agent < source.num_agents;
         agent += threads / kWarpSize) {
      if (rows[agent] == 0 || shifts[agent] == 0) continue;
      SharedAngles<V, kInterleaved>::store(angles + agent * angle_stride, p.rope, shifts[agent],
                                           thread % kWarpSize);
    }
    __syncthreads();
  }

  // From here on a thread reads only what it copied to shared memory itself: no barriers.
  const int32_t task_of_row = thread % shape.tasks_of_row;
  const int32_t first_row = thread / shape.tasks_of_row;
  const int32_t first_head = static_cast<int32_t>(blockIdx.y) * tile.heads;
  const int32_t num_heads = min(tile.heads, p.num_heads - first_head);
  const int32_t tasks_of_row = num_heads * tasks_of_head;  // fewer in the last group of heads
  if (first_row >= shape.rows_of_pass || task_of_row >= tasks_of_row) return;

  // Keys that move: both vectors of pairs. All else: the vectors of a row in two halves, so that a
  // warp's accesses are contiguous.
  const auto task =
      MoveTask<V, kInterleaved>::make(task_of_row % tasks_of_head, p.head_dim, p.rope.rotary_dim);
  RestoreShare moving, copied;
  moving.first_head = moving.second_head = task_of_row / tasks_of_head;
  moving.first_dim = task.first;
  moving.second_dim = task.second;
  const int32_t vectors = p.head_dim / V;
  const int32_t second = task_of_row + tasks_of_row;
  copied.first_head = task_of_row / vectors;
  copied.first_dim = task_of_row % vectors * V;
  copied.second_head = second / vectors;
  copied.second_dim = second % vectors * V;

  const int32_t first_layer = static_cast<int32_t>(blockIdx.z) * tile.layers;
  const int32_t items = 2 * min(tile.layers, p.num_layers - first_layer);  // K and V of each layer
  auto slot = [&](int32_t item, int32_t pass, int32_t i) {
    return stages + (((item % kStages * shape.passes + pass) * 2 + i) * threads + thread) * V;
  };
  auto choose = [&](bool moves) {  // member by member: a reference to either would live in memory
    RestoreShare share;
    share.first_head = moves ? moving.first_head : copied.first_head;
    share.first_dim = moves ? moving.first_dim : copied.first_dim;
    share.second_head = moves ? moving.second_head : copied.second_head;
    share.second_dim = moves ? moving.second_dim : copied.second_dim;
    return share;
  };
  auto copy = [](In* to, const In* from) {
    if constexpr (Unit::kBytes == 16) {
      cp_async_16(to, from);
    } else if constexpr (kIsQuantized<In> && V > 1) {
      cp_async_through_l1<Unit::kBytes>(to, from);
    } else {
      *to = *from;
    }
  };
  auto load = [&](int32_t item) {
    const int32_t layer = first_layer + item / 2;
    const bool is_key = item % 2 == 0;
    const RowLayout& layout = is_key ? p.pool_k_layout : p.pool_v_layout;
    const RestoreShare share = choose(is_key && source.master >= 0);
    const In* const base = static_cast<const In*>(is_key ? p.pool.k[layer] : p.pool.v[layer]) +
                           source.page * layout.page_stride + first_head * layout.head_stride;
    const In* const first = base + share.first_offset(layout);
    const In* const second = base + share.second_offset(layout);
#pragma unroll 1
    for (int32_t pass = 0; pass < shape.passes; ++pass) {
      const int32_t row = first_row + pass * shape.rows_of_pass;
      if (row >= block_size || !(needed >> row & 1)) continue;
      copy(slot(item, pass, 0), first + row * layout.row_stride);
      copy(slot(item, pass, 1), second + row * layout.row_stride);
    }
  };

  for (int32_t item = 0; item < kStages - 1; ++item) {
    if (item < items) load(item);
    cp_async_commit();
  }
#pragma unroll 1
  for (int32_t item = 0; item < items; ++item) {
    if (item + kStages - 1 < items) load(item + kStages - 1);
    cp_async_commit();
    cp_async_wait<kStages - 1>();
    const int32_t layer = first_layer + item / 2;
    const bool is_key = item % 2 == 0;
    const bool moves = is_key && source.master >= 0;
    const RowLayout& layout = is_key ? p.out_k_layout : p.out_v_layout;
    const int64_t* const targets = is_key ? k_target : v_target;
    const RestoreShare share = choose(moves);
    Out* const base = static_cast<Out*>(is_key ? p.out.k[layer] : p.out.v[layer]) +
                      first_head * layout.head_stride;
    Out* const first = base + share.first_offset(layout);
    Out* const second = base + share.second_offset(layout);
    // What the elements of either vector are multiplied with to be read out.
    float first_scale = 1.0f, second_scale = 1.0f;
    if constexpr (kReadsOut) {
      const float* const scales = is_key ? p.k_scale : p.v_scale;
      if (scales) {
        const float* const of_block = scales + layer * p.num_heads + first_head;
        first_scale = __ldg(of_block + share.first_head);
        second_scale = __ldg(of_block + share.second_head);
      }
    }
#pragma unroll 1
    for (int32_t agent = 0; agent < source.num_agents; ++agent) {
      const uint32_t rows_of_agent = rows[agent];
      if (rows_of_agent == 0) continue;
      const bool rotates = moves && task.rotates && shifts[agent] != 0;
      Angles<V> angle = {};
      if (rotates) {
        angle = SharedAngles<V, kInterleaved>::load(angles + agent * angle_stride,
                                                    p.rope.rotary_dim, task);
      }
#pragma unroll 1
      for (int32_t pass = 0; pass < shape.passes; ++pass) {
        const int32_t row = first_row + pass * shape.rows_of_pass;
        if (row >= block_size || !(rows_of_agent >> row & 1)) continue;
        Unit x = load_vector<In, V>(slot(item, pass, 0));
        Unit y = load_vector<In, V>(slot(item, pass, 1));
        if constexpr (kReadsOut) {
          float x_values[V], y_values[V];
          unpack(x, x_values);
          unpack(y, y_values);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            x_values[i] = rounded_product(x_values[i], first_scale);
            y_values[i] = rounded_product(y_values[i], second_scale);
          }
          if (rotates) task.rotate(angle, x_values, y_values);
          Vector<Out, V> x_out, y_out;
          pack(x_values, &x_out);
          pack(y_values, &y_out);
          const int64_t target = targets[agent * block_size + row];
          store_vector<Out, V>(first + target, x_out);
          store_vector<Out, V>(second + target, y_out);
        } else {
          if (rotates) task.move(angle, &x, &y);
          const int64_t target = targets[agent * block_size + row];
          store_vector<In, V>(first + target, x);
          store_vector<In, V>(second + target, y);
        }
      }
    }
  }
}

}  // namespace tokendance::cuda
