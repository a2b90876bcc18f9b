// Checks and launch of collective_attention and collective_attention_out.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "ops/check.h"
#include "ops/check_round.h"
#include "ops/run.h"

namespace tokendance {
namespace {

struct Call {
  CollectiveAttentionParams params;
  int64_t num_pages;

  int64_t workspace_size() const {
    return params.round.extents.partials * params.num_q_heads * (int64_t{params.head_dim} + 1);
  }
};

Call make_call(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& cos,
               const Tensor& sin, bool interleaved, const Tensor& round,
               const std::vector<int64_t>& extents, double softmax_scale, int64_t window,
               double soft_cap, const std::optional<Tensor>& sinks, double attention_factor,
               const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  Call call{};
  CollectiveAttentionParams& params = call.params;
  const RoundExtents e = round_extents(extents);
  Dimensions dims;
  params.dtype = plain_dtype("q", q);
  Argument("q", q).shape(dims, {e.rows, "q_heads", "head_dim"}).innermost_stride_1();
  params.head_dim = checked_head_dim("q", dims["head_dim"]);
  params.num_q_heads = static_cast<int32_t>(dims["q_heads"]);
  params.pool_dtype = paired_dtype("k_pool", k_pool, q, Quantized::kResult);
  if (!q.is_cpu() && is_quantized(params.pool_dtype) && params.dtype == DType::kFloat32) {
    fail("q: expected float16 or bfloat16 where k_pool is ", dtype_text(k_pool.scalar_type()),
         " on ", device_text(q), ", got float32");
  }
  params.k_layout = Argument("k_pool", k_pool)
                        .of_vectors()
                        .pages(dims, "num_pages", e.block_size, "kv_heads", params.head_dim);
  params.v_layout = Argument("v_pool", v_pool)
                        .like(k_pool)
                        .of_vectors()
                        .pages(dims, "num_pages", e.block_size, "kv_heads", params.head_dim);
  params.num_kv_heads = static_cast<int32_t>(dims["kv_heads"]);
  call.num_pages = dims["num_pages"];
  if (params.num_kv_heads == 0 || params.num_q_heads % params.num_kv_heads != 0) {
    fail("q: expected a multiple of the ", params.num_kv_heads, " heads of k_pool, got ",
         params.num_q_heads, " heads");
  }
  params.rope = rope_tables(cos, sin, interleaved, q, params.head_dim);
  params.round = round_view(round, e, q);
  expect(window >= 0 && window <= INT32_MAX, "window", "0 (none) to 2^31 - 1", window);
  expect(soft_cap >= 0 && std::isfinite(soft_cap), "soft_cap", "0 (none) or more", soft_cap);
  if (sinks) {
    Argument("sinks", *sinks)
        .device_of(q)
        .dtype(ScalarType::Float)
        .shape(dims, {"q_heads"})
        .contiguous();
  }
  params.k_scale = checked_scales("k_scale", k_scale, "k_pool", k_pool, dims, {"kv_heads"});
  params.v_scale = checked_scales("v_scale", v_scale, "k_pool", k_pool, dims, {"kv_heads"});
  params.q = q.const_data_ptr();
  params.q_row_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.k_pool = k_pool.const_data_ptr();
  params.v_pool = v_pool.const_data_ptr();
  params.sinks = data_or_null<float>(sinks);
  params.window = static_cast<int32_t>(window);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.soft_cap = static_cast<float>(soft_cap);
  params.attention_factor = static_cast<float>(attention_factor);
  return call;
}

void run(Call& call, const Tensor& workspace, const Tensor& out, const Tensor& lse) {
  CollectiveAttentionParams& params = call.params;
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  params.out = out.mutable_data_ptr();
  params.out_row_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (params.round.extents.rows == 0 || params.num_q_heads == 0) return;
  if (out.is_cpu()) {
    check_round(params.round, call.num_pages, params.rope,
                {.masks = true, .own_rows = true, .own_pages = false, .query = true});
    return cpu_collective_attention(params, torch_parallel_for);
  }
#ifdef TOKENDANCE_CUDA_COLLECTIVE_ATTENTION
  run_cuda(cuda_collective_attention, params, out);
#endif
}

std::tuple<Tensor, Tensor> collective_attention(
    const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& cos,
    const Tensor& sin, bool interleaved, const Tensor& round, std::vector<int64_t> extents,
    double softmax_scale, int64_t window, double soft_cap, const std::optional<Tensor>& sinks,
    double attention_factor, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  Call call = make_call(q, k_pool, v_pool, cos, sin, interleaved, round, extents, softmax_scale,
                        window, soft_cap, sinks, attention_factor, k_scale, v_scale);
  const int64_t rows = call.params.round.extents.rows;
  Tensor out = torch::stable::new_empty(q, {rows, call.params.num_q_heads, call.params.head_dim});
  Tensor lse = torch::stable::new_empty(q, {rows, call.params.num_q_heads}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(q, {call.workspace_size()}, ScalarType::Float);
  run(call, workspace, out, lse);
  return {out, lse};
}

void collective_attention_out(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool,
                              const Tensor& cos, const Tensor& sin, bool interleaved,
                              const Tensor& round, std::vector<int64_t> extents,
                              double softmax_scale, int64_t window, double soft_cap,
                              const std::optional<Tensor>& sinks, double attention_factor,
                              const Tensor& workspace, const Tensor& out, const Tensor& lse,
                              const std::optional<Tensor>& k_scale,
                              const std::optional<Tensor>& v_scale) {
  Call call = make_call(q, k_pool, v_pool, cos, sin, interleaved, round, extents, softmax_scale,
                        window, soft_cap, sinks, attention_factor, k_scale, v_scale);
  const CollectiveAttentionParams& params = call.params;
  const int64_t rows = params.round.extents.rows;
  Dimensions dims;
  Argument("workspace", workspace)
      .device_of(q)
      .dtype(ScalarType::Float)
      .shape(dims, {"size"})
      .contiguous()
      .aligned();
  expect(dims["size"] >= call.workspace_size(), "workspace",
         "at least " + std::to_string(call.workspace_size()) + " elements", dims["size"]);
  Argument("out", out)
      .like(q)
      .shape(dims, {rows, params.num_q_heads, params.head_dim})
      .innermost_stride_1()
      .of_vectors()
      .not_expanded();
  Argument("lse", lse)
      .device_of(q)
      .dtype(ScalarType::Float)
      .shape(dims, {rows, params.num_q_heads})
      .contiguous();
  run(call, workspace, out, lse);
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("collective_attention", TORCH_BOX(&tokendance::collective_attention));
  m.impl("collective_attention_out", TORCH_BOX(&tokendance::collective_attention_out));
}

#ifdef TOKENDANCE_CUDA_COLLECTIVE_ATTENTION
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("collective_attention", TORCH_BOX(&tokendance::collective_attention));
  m.impl("collective_attention_out", TORCH_BOX(&tokendance::collective_attention_out));
}
#endif
