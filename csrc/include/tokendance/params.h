// One plain struct per operator: what its kernel reads, for the CPU and for CUDA alike.
//
// No torch here. The operators in csrc/ops check their arguments, fill such a struct and hand it to
// a launch function of launch.h; a C++ engine can do the same without torch. All strides count
// elements. In the CUDA launches the pointers are device pointers.
#pragma once

#include <stdint.h>

#include "tokendance/round.h"

namespace tokendance {

// The last two are quantized: an element stands for itself times the scale of its KV head. kFloat8
// is e4m3 (the finite kind: +-448 is the largest, 0x7f and 0xff are NaN).
enum class DType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat8 = 3,
  kInt8 = 4,  // on the CPU alone
};
constexpr bool is_quantized(DType dtype) {
  return dtype == DType::kFloat8 || dtype == DType::kInt8;
}

// Rows of shape [heads, head_dim] in a tensor [rows, heads, head_dim] (block_size 1) or in pages
// [pages, block_size, heads, head_dim]; innermost stride 1. Row r is row r % block_size of page
// r / block_size. Offsets must be computed in 64 bits.
struct RowLayout {
  int64_t num_rows;     // rows that may be addressed
  int64_t page_stride;  // elements between pages
  int64_t row_stride;   // elements between rows of a page
  int64_t head_stride;  // elements between heads of a row
  int32_t block_size;   // rows of a page
};

// cos and sin of position * inv_freq, fp32 [max_position, rotary_dim / 2]. Dims from rotary_dim on
// are not rotated; with rotary_dim 0 none are (NoPE).
struct RopeTables {
  const float* cos;
  const float* sin;
  int32_t max_position;
  int32_t rotary_dim;
  bool interleaved;  // pairs (2i, 2i+1) instead of (i, i + rotary_dim/2)
};

// Moves n rows: row row_in[i], which stands at position_from[i], to the rows row_out[i, j] at
// position_to[i, j] for each destination j.
struct RopeRotateParams {
  const void* x;
  void* out;  // may be x: then row i is read before it is written and no other row is touched
  RowLayout x_layout;
  RowLayout out_layout;
  const int64_t* row_in;   // [n], null = 0..n-1
  const int64_t* row_out;  // [n, destinations], null = 0..n-1 (then destinations == 1); -1 = skip
  const int32_t* position_from;  // [n], null = 0 (a fresh, un-rotated key)
  const int32_t* position_to;    // [n, destinations], null = rows are copied, not rotated
  int64_t num_rows;              // n
  int32_t destinations;
  int32_t num_heads;
  int32_t head_dim;
  float attention_factor;  // multiplies the rotary dims after the rotation (YaRN's attention
                           // factor), else 1
  RopeTables rope;
  const float* x_scale;    // [heads] of a quantized x, null = 1
  const float* out_scale;  // [heads] of a quantized out, null = 1
  DType dtype;             // of x
  DType out_dtype;         // equal, or one of the two is quantized
};

// deviation[t] = sum over agents a, heads and dims of
// (fresh key of (a, t), moved to the cached key's position, - cached key of t)^2, in fp32.
struct KeyDeviationParams {
  const void* fresh;
  const void* cached;
  RowLayout fresh_layout;
  RowLayout cached_layout;
  const int64_t* fresh_row;        // [agents, tokens], -1 = the agent lacks the token
  const int32_t* fresh_position;   // [agents, tokens], null = 0 (un-rotated keys)
  const int64_t* cached_row;       // [tokens]
  const int32_t* cached_position;  // [tokens]
  float* deviation;                // [tokens]
  int64_t num_tokens;
  int32_t num_agents;
  int32_t num_heads;
  int32_t head_dim;
  float attention_factor;  // multiplies the rotary dims of the fresh key (YaRN's attention factor),
                           // else 1
  RopeTables rope;
  DType dtype;
};

// Layers that one encode or restore serves; the deepest open models have 126.
constexpr int kMaxLayers = 128;

// One pointer per layer; all layers share layouts and tables.
struct LayerPointers {
  const void* k[kMaxLayers];
  const void* v[kMaxLayers];
};
struct MutableLayerPointers {
  void* k[kMaxLayers];
  void* v[kMaxLayers];
};

// Dense KV of agents against Masters -> override masks and own rows. Reads of the round: uses,
// Masters, own_page_indptr (the capacity) and own_pages. Writes: use_masks, own_length,
// own_position, and the own rows into the pools. own_length becomes the number of own rows that the
// agent needs; rows beyond the capacity of its own pages are not written, so own_length > capacity
// tells that the agent did not fit.
struct DiffEncodeParams {
  LayerPointers in;           // dense KV of the agents
  MutableLayerPointers pool;  // the Masters' pages (read) and the own pages (written)
  RowLayout in_k_layout, in_v_layout;
  RowLayout pool_k_layout, pool_v_layout;
  const int64_t* slot_mapping;  // [agents, slot_stride]: row of `in` for position p of agent a
  int64_t slot_stride;
  const int32_t* length;  // [agents] tokens of the agent, <= max_length
  MutableRoundView round;
  float atol,
      rtol;  // same: |in - moved| <= atol + rtol * |moved| for all dims of K and V; 0/0: same bits
  int32_t num_layers;
  int32_t num_heads;
  int32_t head_dim;
  int32_t max_length;  // columns of slot_mapping
  RopeTables rope;
  const float* k_scale;  // [layers, heads] of quantized keys, of both `in` and pool; null = 1
  const float* v_scale;  // the same of values; scales turn atol into units of the elements
  DType dtype;           // of `in` and pool
};

// Mirrors -> dense rows through a slot mapping. Reads of the round: uses, Masters, own rows.
struct DiffRestoreParams {
  LayerPointers pool;
  MutableLayerPointers out;
  RowLayout pool_k_layout, pool_v_layout;
  RowLayout out_k_layout, out_v_layout;
  const int64_t*
      slot_mapping;  // [agents, slot_stride]: row of `out` for position p of agent a; -1 = skip
  int64_t slot_stride;
  RoundView round;
  int32_t num_layers;
  int32_t num_heads;
  int32_t head_dim;
  int32_t max_length;  // columns of slot_mapping; positions beyond are skipped
  RopeTables rope;
  const float* k_scale;  // [layers, heads] of a quantized pool, null = 1; read if out is not
  const float* v_scale;
  DType dtype;      // of the pool
  DType out_dtype;  // equal, or the pool is quantized and out is not
};

struct CollectiveAttentionParams {
  const void* q;  // [R, Hq, D] before RoPE
  void* out;      // [R, Hq, D]
  float* lse;     // [R, Hq] natural log-sum-exp of the scaled, capped, masked scores, without sinks
  const void* k_pool;
  const void* v_pool;
  const float* sinks;  // [Hq] sink logits, null = none; they enter the output, not lse
  float* workspace;    // [P, Hq, D] partial outputs, then [P, Hq] partial LSEs
  int64_t q_row_stride, q_head_stride;
  int64_t out_row_stride, out_head_stride;
  RowLayout k_layout, v_layout;
  RoundView round;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t window;          // a row sees keys fewer than `window` positions back; 0 = all
  float softmax_scale;     // of the scores
  float soft_cap;          // cap * tanh(score / cap) after scaling; 0 = none
  float attention_factor;  // multiplies the rotary dims of q (YaRN's attention factor), else 1
  RopeTables rope;
  const float* k_scale;  // [Hk] of a quantized k_pool, null = 1
  const float* v_scale;
  DType dtype;       // of q and out, not quantized
  DType pool_dtype;  // equal, or quantized
};

// Combines K partial attention outputs by their LSE.
struct MergeStatesParams {
  const void* partial_out;   // [K, R, H, D] contiguous
  const float* partial_lse;  // [K, R, H] contiguous
  const float* sinks;        // [H], null = none; they enter the output, not lse
  void* out;                 // [R, H, D] contiguous
  float* lse;                // [R, H] contiguous
  int64_t num_partials;
  int64_t num_rows;
  int32_t num_heads;
  int32_t head_dim;
  DType dtype;
};

}  // namespace tokendance
