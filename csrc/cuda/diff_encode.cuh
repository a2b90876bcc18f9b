// diff_encode: dense KV of agents becomes override masks and own rows, in two launches.
//
// The comparison makes the masks. A block has one Master page and a tile of agents, for all layers,
// so that it alone writes their mask words; it moves the Master's rows on the fly and rounds them
// as restore would. The compaction copies own rows. Each of its blocks derives from the masks where
// its rows go, so that blocks neither wait for each other nor share memory that they write; rows
// beyond the capacity of the own pages are counted and not written.
//
// Bytes of N agents with S shared tokens, in rows of 4 * L * Hk * D bytes at 16 bits, where every
// row is the Master's: S * (tiles + N) read by the comparison; a row that differs is read up to the
// layer that shows it, and read and written once by the compaction. FLOPs: 3 per element of a key
// and agent: below 0.75 FLOP/byte, against 9.6 (A100: 19.5 TFLOPS fp32, 2039 GB/s) and 14 (H200: 67
// TFLOPS, 4800 GB/s; datasheets): bound by memory.
//
// A tile has up to 16 agents, fewer where there would be less than four blocks for each of 132
// multiprocessors: then a Master page is read again out of L2. With 16 the Master's rows are a
// seventeenth of what is read. In the comparison a thread has 64 bytes of each of two agents' K and
// V under way, 64 KB in two blocks of 256 threads. With a latency of 700 ns (assumed) an H200's
// share of 36 bytes/ns needs 25 KB. In the compaction a thread has up to four accesses of 16 bytes.
//
// e4m3 rows are compared 8 bytes at a time and copied 16: a thread has as many elements as of
// 16-bit types, and so as many registers or fewer.
#pragma once

#include "cuda/diff_encode_plan.h"
#include "cuda/move.cuh"
#include "cuda/round_lookup.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// Whether an element of `in` is not what restore would write, `moved`. `atol` is in units of the
// elements.
template <typename T, int V>
__device__ __forceinline__ bool differs(const Vector<T, V>& in, const Vector<T, V>& moved,
                                        float atol, float rtol) {
  if (atol == 0.0f && rtol == 0.0f) return in != moved;
  float in_values[V], moved_values[V];
  unpack(in, in_values);
  unpack(moved, moved_values);
  bool same = true;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float allowed = atol + rounded_product(rtol, fabsf(moved_values[i]));
    same = same && fabsf(in_values[i] - moved_values[i]) <= allowed;  // false for NaN
  }
  return !same;
}

// The tolerance in units of the quantized elements of a head.
__device__ __forceinline__ float atol_of(const DiffEncodeParams& p, const float* scales,
                                         int32_t layer, int32_t head) {
  if (!scales || p.atol == 0.0f) return p.atol;
  return __fdiv_rn(p.atol, __ldg(scales + layer * p.num_heads + head));
}

// Row of the agent's dense KV that row `index` of a use stands for. kNotCompared: at no position of
// the agent; kDiffers: nothing that could be compared.
constexpr int64_t kNotCompared = -1, kDiffers = -2;

__device__ __forceinline__ int64_t encode_source(const DiffEncodeParams& p, int32_t agent,
                                                 int32_t use, int32_t index) {
  if (use < 0 || index >= p.round.use_length[use]) return kNotCompared;
  const int32_t position = p.round.use_delta[use] + index;
  if (position < 0 || position >= min(__ldg(p.length + agent), p.max_length)) return kNotCompared;
  if (!has_angles(p.rope, p.round.use_shift[use])) return kDiffers;
  const int64_t slot = __ldg(p.slot_mapping + agent * p.slot_stride + position);
  const bool exists = slot >= 0 && slot < min(p.in_k_layout.num_rows, p.in_v_layout.num_rows);
  return exists ? slot : kDiffers;
}

// Rows of agents that are under way. Each has registers of its own: to hand a row from one to the
// next would be to wait for it.
constexpr int kRowsAhead = 2;

// A lane's share of an agent's row in a layer. Agent -1: none.
template <typename T, int V>
struct AgentRow {
  int32_t agent;
  Vector<T, V> k_x, k_y, v_x, v_y;
};

// A block has one Master page and a tile of agents; a warp has rows of the page, holds a share of
// the Master row in registers and compares it with each agent's row, while the next ones are under
// way. An agent whose row differs is left out of the layers that follow.
template <typename T, int V, bool kInterleaved>
__device__ __forceinline__ void diff_encode_compare(const DiffEncodeParams& p, const Tile& tile) {
  extern __shared__ __align__(16) unsigned char shared[];
  const MutableRoundView& round = p.round;
  const int32_t block_size = static_cast<int32_t>(round.extents.block_size);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread % kWarpSize;

  int64_t* const k_in = reinterpret_cast<int64_t*>(shared);
  int64_t* const v_in = k_in + tile.agents * block_size;
  const int32_t angle_stride = shared_angles_size(p.rope.rotary_dim);
  float* const angles = reinterpret_cast<float*>(v_in + tile.agents * block_size);
  int32_t* const shifts = reinterpret_cast<int32_t*>(angles + tile.agents * angle_stride);
  int32_t* const uses = shifts + tile.agents;
  uint32_t* const compared = reinterpret_cast<uint32_t*>(uses + tile.agents);  // per row, agents
  uint32_t* const different = compared + block_size;

  const int32_t all_agents = static_cast<int32_t>(round.extents.agents);
  const int32_t agent_tiles = (all_agents + tile.agents - 1) / tile.agents;
  const int32_t page_of_masters = static_cast<int32_t>(blockIdx.x) / agent_tiles;
  const int32_t master = range_of(round.master_page_indptr,
                                  static_cast<int32_t>(round.extents.masters), page_of_masters);
  if (master < 0) return;
  const int32_t page_of_master = page_of_masters - round.master_page_indptr[master];
  const int32_t first_row = page_of_master * block_size;
  const int32_t first_agent = static_cast<int32_t>(blockIdx.x) % agent_tiles * tile.agents;
  const int32_t num_agents = min(tile.agents, all_agents - first_agent);

  if (thread < block_size) compared[thread] = different[thread] = 0;
  if (thread < num_agents) {
    const int32_t use = use_of_master(round, first_agent + thread, master);
    uses[thread] = use;
    const int32_t shift = use < 0 ? 0 : round.use_shift[use];
    shifts[thread] = in_tables(p.rope, shift) ? shift : 0;  // without angles nothing is compared
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = thread; i < num_agents * block_size; i += kEncodeThreads) {
    const int32_t agent = i / block_size, row = i % block_size;
    const int64_t source = encode_source(p, first_agent + agent, uses[agent], first_row + row);
    if (source == kDiffers) atomicOr(different + row, 1u << agent);
    if (source < 0) continue;
    atomicOr(compared + row, 1u << agent);
    k_in[i] = row_offset(p.in_k_layout, source);
    v_in[i] = row_offset(p.in_v_layout, source);
  }
#pragma unroll 1
  for (int32_t agent = thread / kWarpSize; agent < num_agents;
       agent += kEncodeThreads / kWarpSize) {
    if (shifts[agent] == 0) continue;
    SharedAngles<V, kInterleaved>::store(angles + agent * angle_stride, p.rope, shifts[agent],
                                         lane);
  }
  __syncthreads();

  const int64_t page = round.master_pages[page_of_masters];
  const int64_t end_of_page = (page + 1) * block_size;
  const bool page_exists = page >= 0 && end_of_page <= p.pool_k_layout.num_rows &&
                           end_of_page <= p.pool_v_layout.num_rows;
  const auto tasks_of_head = static_cast<int32_t>(tile.head.value);
  const int32_t tasks = p.num_heads * tasks_of_head;
  const int32_t vectors = 2 * tasks_of_head;
#pragma unroll 1
  for (int32_t row = thread / kWarpSize; row < block_size; row += kEncodeThreads / kWarpSize) {
    // Agents whose row is the Master's so far; none where there is no Master.
    uint32_t live = page_exists ? compared[row] : 0;
    const int64_t k_row = page * p.pool_k_layout.page_stride + row * p.pool_k_layout.row_stride;
    const int64_t v_row = page * p.pool_v_layout.page_stride + row * p.pool_v_layout.row_stride;
#pragma unroll 1
    for (int32_t layer = 0; layer < p.num_layers && live != 0; ++layer) {
      uint32_t found = 0;  // agents for whom this lane finds a difference
#pragma unroll 1
      for (int32_t index = lane; index < tasks; index += kWarpSize) {
        // Keys: both vectors of pairs. Values: the vectors of the row in two halves.
        const int32_t second = index + tasks;
        const auto head = static_cast<int32_t>(quotient(static_cast<uint32_t>(index), tile.head));
        const auto task = MoveTask<V, kInterleaved>::make(index - head * tasks_of_head, p.head_dim,
                                                          p.rope.rotary_dim);
        const int32_t first_head = head / 2;  // a head has twice as many vectors as tasks
        const int32_t first_dim = (index - first_head * vectors) * V;
        const int32_t second_head =
            static_cast<int32_t>(quotient(static_cast<uint32_t>(second), tile.head)) / 2;
        const int32_t second_dim = (second - second_head * vectors) * V;

        const T* const k_pool =
            static_cast<const T*>(p.pool.k[layer]) + k_row + head * p.pool_k_layout.head_stride;
        const T* const v_pool = static_cast<const T*>(p.pool.v[layer]) + v_row;
        const int64_t v_stride = p.pool_v_layout.head_stride;
        const Vector<T, V> key_x = load_vector<T, V>(k_pool + task.first);
        const Vector<T, V> key_y = load_vector<T, V>(k_pool + task.second);
        const auto value_x = load_vector<T, V>(v_pool + first_head * v_stride + first_dim);
        const auto value_y = load_vector<T, V>(v_pool + second_head * v_stride + second_dim);

        uint32_t rest = live;  // whose rows have not been asked for
        auto load_next = [&]() {
          AgentRow<T, V> next;
          next.agent = __ffs(static_cast<int>(rest)) - 1;
          if (rest == 0) return next;
          rest &= rest - 1;
          const T* const k = static_cast<const T*>(p.in.k[layer]) +
                             k_in[next.agent * block_size + row] + head * p.in_k_layout.head_stride;
          const T* const v =
              static_cast<const T*>(p.in.v[layer]) + v_in[next.agent * block_size + row];
          const int64_t stride = p.in_v_layout.head_stride;
          next.k_x = load_vector<T, V>(k + task.first);
          next.k_y = load_vector<T, V>(k + task.second);
          next.v_x = load_vector<T, V>(v + first_head * stride + first_dim);
          next.v_y = load_vector<T, V>(v + second_head * stride + second_dim);
          return next;
        };
        AgentRow<T, V> ahead[kRowsAhead];
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) ahead[i] = load_next();
#pragma unroll 1
        do {  // there is an agent
#pragma unroll
          for (int i = 0; i < kRowsAhead; ++i) {
            const AgentRow<T, V>& in = ahead[i];
            if (i > 0 && in.agent < 0) break;
            Vector<T, V> x = key_x, y = key_y;
            if (task.rotates && shifts[in.agent] != 0) {
              const float* const stored = angles + in.agent * angle_stride;
              task.move(SharedAngles<V, kInterleaved>::load(stored, p.rope.rotary_dim, task), &x,
                        &y);
            }
            float k_atol = p.atol, first_atol = p.atol, second_atol = p.atol;
            if constexpr (kIsQuantized<T>) {
              k_atol = atol_of(p, p.k_scale, layer, head);
              first_atol = atol_of(p, p.v_scale, layer, first_head);
              second_atol = atol_of(p, p.v_scale, layer, second_head);
            }
            if (differs(in.k_x, x, k_atol, p.rtol) || differs(in.k_y, y, k_atol, p.rtol) ||
                differs(in.v_x, value_x, first_atol, p.rtol) ||
                differs(in.v_y, value_y, second_atol, p.rtol)) {
              found |= 1u << in.agent;
            }
            ahead[i] = load_next();
          }
        } while (ahead[0].agent >= 0);
      }
      live &= ~__reduce_or_sync(0xffffffffu, found);
    }
    if (lane == 0) different[row] |= compared[row] & ~live;
  }
  __syncthreads();

  // One word per agent: a lane has the bit of its row.
#pragma unroll 1
  for (int32_t agent = thread / kWarpSize; agent < num_agents;
       agent += kEncodeThreads / kWarpSize) {
    const bool hidden = lane < block_size && (different[lane] >> agent & 1);
    const uint32_t mask = __ballot_sync(0xffffffffu, hidden);
    const int32_t use = uses[agent];
    if (lane == 0 && use >= 0 && first_row < round.use_length[use]) {
      round.use_masks[round.use_page_indptr[use] + page_of_master] = static_cast<int32_t>(mask);
    }
  }
}

// Rows of the agent before position `limit` that stay with a Master, counted by the whole block
// from the masks: warps have uses, lanes have words.
__device__ __forceinline__ int32_t shared_rows_before(const MutableRoundView& round, int32_t agent,
                                                      int32_t limit) {
  __shared__ int32_t counts[kEncodeThreads / kWarpSize];
  const int32_t block_size = static_cast<int32_t>(round.extents.block_size);
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  const int32_t end = __ldg(round.agent_use_indptr + agent + 1);
  int32_t count = 0;
#pragma unroll 1
  for (int32_t use = __ldg(round.agent_use_indptr + agent) + warp; use < end;
       use += kEncodeThreads / kWarpSize) {
    const int32_t delta = __ldg(round.use_delta + use);
    const int32_t first = max(0, -delta);
    const int32_t last = min(__ldg(round.use_length + use), limit - delta);
    const int32_t* const masks = round.use_masks + __ldg(round.use_page_indptr + use);
#pragma unroll 1
    for (int32_t word = first / block_size + lane; word * block_size < last; word += kWarpSize) {
      const int32_t low = max(first - word * block_size, 0);
      const int32_t high = min(last - word * block_size, block_size);
      const uint32_t rows = (0xffffffffu >> (32 - high)) & (0xffffffffu << low);
      count += __popc(rows & ~static_cast<uint32_t>(__ldg(masks + word)));
    }
  }
  count = __reduce_add_sync(0xffffffffu, count);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  count = 0;
  for (int32_t i = 0; i < kEncodeThreads / kWarpSize; ++i) count += counts[i];
  return count;
}

// Whether the agent has to keep the row at `position` itself.
__device__ __forceinline__ bool is_own_row(const MutableRoundView& round, int32_t agent,
                                           int32_t position) {
  const int32_t begin = __ldg(round.agent_use_indptr + agent);
  int32_t low = begin, high = __ldg(round.agent_use_indptr + agent + 1);
  while (low < high) {  // to the first use that begins after `position`
    const int32_t middle = (low + high) / 2;
    if (__ldg(round.use_delta + middle) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  // The one before covers it, if any does; uses of no rows may stand between.
  int32_t use = low - 1;
  while (use >= begin && __ldg(round.use_length + use) == 0) --use;
  if (use < begin) return true;
  const int32_t block_size = static_cast<int32_t>(round.extents.block_size);
  const int32_t index = position - __ldg(round.use_delta + use);
  if (index >= __ldg(round.use_length + use)) return true;
  const int32_t mask =
      __ldg(round.use_masks + __ldg(round.use_page_indptr + use) + index / block_size);
  return static_cast<uint32_t>(mask) >> (index % block_size) & 1;
}

// A block has kEncodeThreads positions of an agent and some layers. Where its own rows go follows
// from the masks alone: the number of own rows before its first position.
template <typename T, int V>
__device__ __forceinline__ void diff_encode_compact(const DiffEncodeParams& p, const Tile& tile) {
  constexpr int kWarps = kEncodeThreads / kWarpSize;
  constexpr int kAtOnce = 4;  // loads of a thread that are under way together
  __shared__ int64_t k_in[kEncodeThreads], v_in[kEncodeThreads];
  __shared__ int64_t k_pool[kEncodeThreads], v_pool[kEncodeThreads];
  __shared__ int32_t own_of_warp[kWarps];
  const MutableRoundView& round = p.round;
  const int32_t block_size = static_cast<int32_t>(round.extents.block_size);
  const int32_t agent = static_cast<int32_t>(blockIdx.y);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int32_t length = min(__ldg(p.length + agent), p.max_length);
  const int32_t first_position = static_cast<int32_t>(blockIdx.x) * kEncodeThreads;
  const int32_t position = first_position + thread;

  const bool own = position < length && is_own_row(round, agent, position);
  const uint32_t ballot = __ballot_sync(0xffffffffu, own);
  if (lane == 0) own_of_warp[warp] = __popc(ballot);
  __syncthreads();
  int32_t rank = __popc(ballot & ((1u << lane) - 1)), own_rows = 0;
  for (int32_t i = 0; i < kWarps; ++i) {
    if (i < warp) rank += own_of_warp[i];
    own_rows += own_of_warp[i];
  }
  const bool is_last = blockIdx.x == gridDim.x - 1;
  if (own_rows == 0 && !is_last) return;
  const int32_t limit = min(first_position, length);
  const int32_t before = limit - shared_rows_before(round, agent, limit);
  const bool writes_round = blockIdx.z == 0;
  if (is_last && writes_round && thread == 0) round.own_length[agent] = before + own_rows;

  const int32_t first_page = __ldg(round.own_page_indptr + agent);
  const int32_t capacity = (__ldg(round.own_page_indptr + agent + 1) - first_page) * block_size;
  const int32_t index = before + rank;
  if (own && index < capacity) {
    const int64_t page = __ldg(round.own_pages + first_page + index / block_size);
    const int64_t row = page * block_size + index % block_size;
    const int64_t slot = __ldg(p.slot_mapping + agent * p.slot_stride + position);
    const bool exists = slot >= 0 && slot < min(p.in_k_layout.num_rows, p.in_v_layout.num_rows) &&
                        row >= 0 && row < min(p.pool_k_layout.num_rows, p.pool_v_layout.num_rows);
    k_in[rank] = exists ? row_offset(p.in_k_layout, slot) : -1;
    v_in[rank] = exists ? row_offset(p.in_v_layout, slot) : -1;
    k_pool[rank] = row_offset(p.pool_k_layout, row);
    v_pool[rank] = row_offset(p.pool_v_layout, row);
    if (writes_round) round.own_position[first_page * block_size + index] = position;
  }
  __syncthreads();

  // Copy the rows: threads have vectors of a row, several rows at once.
  const int32_t stored = min(own_rows, capacity - before);
  const int32_t vectors_of_head = p.head_dim / V;
  const int32_t vectors = p.num_heads * vectors_of_head;
  const int32_t columns = min(vectors, kEncodeThreads);
  const int32_t rows_at_once = kEncodeThreads / columns;
  const int32_t first_row = thread / columns;
  if (first_row >= rows_at_once) return;
  const int32_t first_layer = static_cast<int32_t>(blockIdx.z) * tile.layers;
  const int32_t end_layer = min(first_layer + tile.layers, p.num_layers);
#pragma unroll 1
  for (int32_t vector = thread % columns; vector < vectors; vector += columns) {
    const int32_t head = vector / vectors_of_head, dim = vector % vectors_of_head * V;
#pragma unroll 1
    for (int32_t item = 2 * first_layer; item < 2 * end_layer; ++item) {
      const bool is_key = item % 2 == 0;
      const int64_t from_head = is_key ? p.in_k_layout.head_stride : p.in_v_layout.head_stride;
      const int64_t to_head = is_key ? p.pool_k_layout.head_stride : p.pool_v_layout.head_stride;
      const int64_t* const from_row = is_key ? k_in : v_in;
      const int64_t* const to_row = is_key ? k_pool : v_pool;
      const T* const from = static_cast<const T*>(is_key ? p.in.k[item / 2] : p.in.v[item / 2]) +
                            head * from_head + dim;
      T* const to =
          static_cast<T*>(is_key ? p.pool.k[item / 2] : p.pool.v[item / 2]) + head * to_head + dim;
#pragma unroll 1
      for (int32_t row = first_row; row < stored; row += kAtOnce * rows_at_once) {
        Vector<T, V> copy[kAtOnce];
        int64_t source[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t r = row + i * rows_at_once;
          source[i] = i == 0 || r < stored ? from_row[r] : -1;
          if (source[i] >= 0) copy[i] = load_vector<T, V>(from + source[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (source[i] >= 0) store_vector<T, V>(to + to_row[row + i * rows_at_once], copy[i]);
        }
      }
    }
  }
}

}  // namespace tokendance::cuda
