// How collective_attention is launched: one launch over the work items, one that merges partials.
#pragma once

#include "cuda/launch_plan.h"
#include "cuda/merge_plan.h"
#include "tokendance/params.h"
#include "tokendance/rope.h"

// One kernel per head dim and dtype. Calls X(variant, element type, head dim) in the order of
// attention_kernel().
#define TOKENDANCE_ATTENTION_KERNELS_OF(X, head_dim) \
  X(f32_d##head_dim, float, head_dim)                \
  X(f16_d##head_dim, __half, head_dim)               \
  X(bf16_d##head_dim, __nv_bfloat16, head_dim)
// The same of e4m3 keys and values: X(variant, element type of queries and outputs, head dim).
#define TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, head_dim) \
  X(f16_e4m3_d##head_dim, __half, head_dim)               \
  X(bf16_e4m3_d##head_dim, __nv_bfloat16, head_dim)
#define TOKENDANCE_E4M3_ATTENTION_KERNELS(X)   \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, 64)  \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, 80)  \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, 96)  \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, 128) \
  TOKENDANCE_E4M3_ATTENTION_KERNELS_OF(X, 256)
#define TOKENDANCE_ATTENTION_KERNELS(X)   \
  TOKENDANCE_ATTENTION_KERNELS_OF(X, 64)  \
  TOKENDANCE_ATTENTION_KERNELS_OF(X, 80)  \
  TOKENDANCE_ATTENTION_KERNELS_OF(X, 96)  \
  TOKENDANCE_ATTENTION_KERNELS_OF(X, 128) \
  TOKENDANCE_ATTENTION_KERNELS_OF(X, 256)

// The kernels that merge; calls X(variant, element type) in the order of DType.
#define TOKENDANCE_ATTENTION_MERGE_KERNELS(X) \
  X(f32, float)                               \
  X(f16, __half)                              \
  X(bf16, __nv_bfloat16)

namespace tokendance {

#define TOKENDANCE_ATTENTION_NAME(variant, ...) "tokendance_collective_attention_" #variant,
#define TOKENDANCE_ATTENTION_MERGE_NAME(variant, ...) \
  "tokendance_collective_attention_merge_" #variant,
constexpr const char* kCollectiveAttentionKernels[] = {
    TOKENDANCE_ATTENTION_KERNELS(TOKENDANCE_ATTENTION_NAME)
        TOKENDANCE_E4M3_ATTENTION_KERNELS(TOKENDANCE_ATTENTION_NAME)
            TOKENDANCE_ATTENTION_MERGE_KERNELS(TOKENDANCE_ATTENTION_MERGE_NAME)};

constexpr int kAttentionHeadDims[] = {64, 80, 96, 128, 256};
constexpr int kFirstE4m3AttentionKernel = 5 * 3;
constexpr int kNumAttentionKernels = 5 * (3 + 2);
constexpr int kMmaRows = 16;         // query rows of an mma
constexpr int kAttentionStages = 3;  // tiles of keys or values: one in use, two on their way

constexpr int attention_kernel(DType dtype, DType pool_dtype, int32_t head_dim) {
  int dim = 0;
  while (kAttentionHeadDims[dim] != head_dim) ++dim;
  if (pool_dtype == DType::kFloat8) {
    return kFirstE4m3AttentionKernel + dim * 2 + (dtype == DType::kBFloat16);
  }
  return dim * 3 + static_cast<int>(dtype);
}
constexpr int attention_merge_kernel(DType dtype) {
  return kNumAttentionKernels + static_cast<int>(dtype);
}

constexpr bool is_attention_kernel(int kernel, const char* variant) {
  return is_named(kCollectiveAttentionKernels[kernel], "tokendance_collective_attention_", variant);
}
static_assert(is_attention_kernel(attention_kernel(DType::kFloat32, DType::kFloat32, 64),
                                  "f32_d64"));
static_assert(is_attention_kernel(attention_kernel(DType::kFloat16, DType::kFloat16, 80),
                                  "f16_d80"));
static_assert(is_attention_kernel(attention_kernel(DType::kBFloat16, DType::kBFloat16, 256),
                                  "bf16_d256"));
static_assert(is_attention_kernel(attention_kernel(DType::kFloat16, DType::kFloat8, 64),
                                  "f16_e4m3_d64"));
static_assert(is_attention_kernel(attention_kernel(DType::kBFloat16, DType::kFloat8, 256),
                                  "bf16_e4m3_d256"));
static_assert(is_attention_kernel(attention_merge_kernel(DType::kFloat32), "merge_f32"));
static_assert(is_attention_kernel(attention_merge_kernel(DType::kFloat16), "merge_f16"));
static_assert(is_attention_kernel(attention_merge_kernel(DType::kBFloat16), "merge_bf16"));

// Whether there is such a kernel. The products of e4m3 are those of 16-bit queries and weights.
// Keys and values are copied, and results written, 16 bytes at a time.
inline bool can_attend(const CollectiveAttentionParams& p) {
  const int64_t vector = kVectorBytes / element_bytes(p.dtype);
  return (p.dtype == p.pool_dtype ||
          (p.pool_dtype == DType::kFloat8 && p.dtype != DType::kFloat32)) &&
         is_aligned(p.k_pool) && is_aligned(p.v_pool) && is_aligned(p.k_layout, p.pool_dtype) &&
         is_aligned(p.v_layout, p.pool_dtype) && is_aligned(p.out) && is_aligned(p.workspace) &&
         p.out_row_stride % vector == 0 && p.out_head_stride % vector == 0;
}

// Whether an item of more query rows than a low tile has meets tall ones, in which a warp has twice
// the rows. At 80 and 96 dims that would cost the third block of a multiprocessor, at 256 and over
// e4m3 registers do not suffice, and in fp32 there is no fragment that two products could share.
TOKENDANCE_HOST_DEVICE constexpr bool has_tall_tiles(int32_t element_bytes, int32_t pool_bytes,
                                                     int32_t head_dim) {
  return element_bytes == 2 && pool_bytes == 2 && (head_dim == 64 || head_dim == 128);
}

// Sizes of a tile. A query row here is one row of the round and one head of the group.
struct AttentionShape {
  int32_t warps;
  int32_t rows;  // query rows that meet one tile of keys
  int32_t keys;  // keys of a tile: a stage is 16 KB, or less
  int32_t threads;
  int32_t blocks;  // on a multiprocessor, that registers are to suffice for without spills
  int32_t query_bytes;
  int32_t stage_bytes;
  int32_t row_bytes;  // of one of four things that are known of each query row
  int32_t shared_bytes;

  // `element_bytes` of queries and outputs, `pool_bytes` of keys and values. `warp_rows`: query
  // rows of a warp, those of one mma or, in a tall tile, of two. A tall tile has half of the keys,
  // and so no more scores in a warp's registers.
  TOKENDANCE_HOST_DEVICE constexpr AttentionShape(int32_t element_bytes, int32_t pool_bytes,
                                                  int32_t head_dim, int32_t warp_rows)
      : warps(head_dim * element_bytes > 512 ? 2 : 4),
        rows(warps * warp_rows),
        keys((head_dim > 128 ? 128 : 256) / element_bytes / 2 * kMmaRows / warp_rows),
        threads(warps * kWarpSize),
        blocks(head_dim * element_bytes <= (pool_bytes == element_bytes ? 192 : 128) ? 3
               : head_dim <= 128                                                     ? 2
                                                                                     : 1),
        query_bytes(rows * head_dim * element_bytes),
        stage_bytes(keys * head_dim * pool_bytes),
        row_bytes(rows * 4 * static_cast<int32_t>(sizeof(int32_t))),
        shared_bytes(query_bytes + kAttentionStages * stage_bytes + 4 * row_bytes +
                     2 * warps * 2 * static_cast<int32_t>(sizeof(int32_t))) {}
};

// So that a launch is the same for items of any height.
constexpr bool low_tiles_are_larger(int32_t head_dim) {
  const AttentionShape low(2, 2, head_dim, kMmaRows), tall(2, 2, head_dim, 2 * kMmaRows);
  return tall.threads == low.threads && tall.shared_bytes <= low.shared_bytes;
}
static_assert(low_tiles_are_larger(64) && low_tiles_are_larger(128));

inline LaunchPlan plan_collective_attention(const CollectiveAttentionParams& p) {
  LaunchPlan plan = {};
  const RoundExtents& e = p.round.extents;
  if (e.rows == 0 || p.num_q_heads == 0 || !can_attend(p)) return plan;
  if (e.work > 0) {
    const int kernel = attention_kernel(p.dtype, p.pool_dtype, p.head_dim);
    const AttentionShape shape(static_cast<int32_t>(element_bytes(p.dtype)),
                               static_cast<int32_t>(element_bytes(p.pool_dtype)), p.head_dim,
                               kMmaRows);
    // KV heads of an item are neighbours: they read the same pages.
    add_launch(&plan, kCollectiveAttentionKernels[kernel], kernel, e.work * p.num_kv_heads, 1, 1,
               shape.threads, shape.shared_bytes, {});
  }
  if (e.partials > 0) {
    const int kernel = attention_merge_kernel(p.dtype);
    const MergeShape shape =
        merge_shape(e.rows * p.num_q_heads, e.partials, p.head_dim, sizeof(float));
    add_launch(&plan, kCollectiveAttentionKernels[kernel], kernel, e.rows,
               ceil_div(p.num_q_heads, shape.heads), 1, shape.threads(), 0, {});
    plan.launches[plan.num_launches - 1].waits = e.work > 0;  // for the launch above alone
  }
  return plan;
}

}  // namespace tokendance
