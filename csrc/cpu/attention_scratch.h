// What attention on a block of keys works on and in.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/rotation.h"

namespace tokendance::TOKENDANCE_ISA {

constexpr int kBlockKeys = 64;            // keys that are taken at a time, at most
constexpr int kMinFlatKeys = 16;          // the least where the dims stand in the lanes
constexpr int kFlatBlockBytes = 1 << 16;  // of keys that are taken at a time there, if so many fit
constexpr int kMaxQueries = 128;  // query rows (rows * G * KV heads) that a tile takes at a time
constexpr int kMinBlockSize = 8;
constexpr int kBlockPages = kBlockKeys / kMinBlockSize;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// A block of keys and values: where their rows stand, for the first head of the tile. Beyond
// `count` the last row stands again.
template <typename T>
struct Block {
  const T* keys[kBlockKeys];
  const T* values[kBlockKeys];
  int64_t first;  // row of the source
  int count;
};

// A query row of the item that sees a part of the chunk: source rows `low` to `high`.
struct ActiveRow {
  int slot;  // among the rows of the item
  int32_t low;
  int32_t high;
  int32_t position;
  int32_t shift;
  const int32_t* masks;  // override masks of its use, null for own rows
};

// Query rows of a work item, and heads, that are taken at a time.
struct AttentionTile {
  const int32_t* item;
  const int32_t* rows;
  int num_rows;
  int first_row;  // of the item
  int kv_head;    // the first
  int kv_heads;
  int first_head;  // of the group of each KV head
  int heads;
  int group;  // G

  int queries() const { return kv_heads * num_rows * heads; }
  // The place in work_uses of the use by which a row of the tile sees a chunk.
  int64_t use_at(int32_t chunk, int row) const {
    return item[5] + int64_t{chunk - item[2]} * item[6] + std::min(first_row + row, item[6] - 1);
  }
  // The query head g of the tile's KV head h.
  int q_head(int h, int g) const { return (kv_head + h) * group + first_head + g; }
};

// What a thread works in; its size is independent of the round.
struct Scratch {
  // Of the rows of the item: state of the softmax, in units of log2, and the sums of values.
  alignas(kCacheLine) float state_max[kMaxQueries];
  alignas(kCacheLine) float state_sum[kMaxQueries];
  alignas(kCacheLine) float out[kMaxQueries * kMaxHeadDim];
  // Of the rows that see the chunk, adjacent.
  ActiveRow active[kMaxQueries];
  int num_active;
  alignas(kCacheLine) float queries[kMaxQueries * kMaxHeadDim];  // [query][head_dim]
  // [head_dim][stride] in the tall form; in the flat one see interleave_queries.
  alignas(kCacheLine) float query_lanes[kMaxHeadDim * kMaxQueries];
  alignas(kCacheLine) float max[kMaxQueries];
  alignas(kCacheLine) float sum[kMaxQueries];
  alignas(kCacheLine) float rescale[kMaxQueries];
  alignas(kCacheLine) int32_t low[kMaxQueries];
  alignas(kCacheLine) int32_t high[kMaxQueries];
  alignas(kCacheLine) int32_t masks[kBlockPages][kMaxQueries];
  float* out_rows[kMaxQueries];
  // Of the block.
  alignas(kCacheLine) float weights[kBlockKeys * kMaxQueries];
  alignas(kCacheLine) float wide_keys[kBlockKeys * kMaxHeadDim];
  alignas(kCacheLine) float wide_values[kBlockKeys * kMaxHeadDim];
  const float* key_rows[kBlockKeys];
  const float* value_rows[kBlockKeys];
  bool seen[kBlockKeys];
  MoveAngles angles;
};

inline Scratch& thread_scratch() {
  thread_local std::unique_ptr<Scratch> scratch(new Scratch);
  return *scratch;
}

}  // namespace tokendance::TOKENDANCE_ISA
