// Checks and launch of diff_encode.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/check_round.h"
#include "ops/layers.h"
#include "ops/run.h"

namespace tokendance {
namespace {

RoundView read_only(const MutableRoundView& round) {
  RoundView view;
  make_round_view<const int32_t>(round.row_agent, round.extents, &view);
  return view;
}

void check_contents(const DiffEncodeParams& params, int64_t num_pages) {
  const RoundView round = read_only(params.round);
  check_round(round, num_pages, params.rope,
              {.masks = false, .own_rows = false, .own_pages = true, .query = false});
  for (int64_t u = 0; u < round.agent_use_indptr[round.extents.agents]; ++u) {
    if (round.use_delta[u] < 0)
      fail("round.use_delta[", u, "]: expected >= 0 to encode, got ", round.use_delta[u]);
  }
  const int64_t rows = std::min(params.in_k_layout.num_rows, params.in_v_layout.num_rows);
  for (int64_t agent = 0; agent < round.extents.agents; ++agent) {
    if (params.length[agent] < 0 || params.length[agent] > params.max_length)
      fail("length[", agent, "]: expected 0 to ", params.max_length, ", got ",
           params.length[agent]);
    for (int64_t position = 0; position < params.length[agent]; ++position) {
      const int64_t slot = params.slot_mapping[agent * params.slot_stride + position];
      if (slot < 0 || slot >= rows)
        fail("slot_mapping[", agent, ", ", position, "]: expected 0 to ", rows - 1, ", got ", slot);
    }
  }
}

void diff_encode(const std::vector<Tensor>& k_in, const std::vector<Tensor>& v_in,
                 const Tensor& slot_mapping, const Tensor& length,
                 const std::vector<Tensor>& k_pool, const std::vector<Tensor>& v_pool,
                 const Tensor& cos, const Tensor& sin, bool interleaved, const Tensor& round,
                 std::vector<int64_t> extents, double atol, double rtol,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  expect(!k_pool.empty(), "k_pool", "at least one layer", 0);
  const Tensor& like = k_pool[0];
  Dimensions dims;
  DiffEncodeParams params{};
  params.dtype = storage_dtype("k_pool[0]", like);
  const RoundExtents e = round_extents(extents);
  const LayerList pool = checked_layers("k_pool", k_pool, like, dims, true, e.block_size, true);
  params.pool_k_layout = pool.layout;
  params.pool_v_layout =
      checked_layers("v_pool", v_pool, like, dims, true, e.block_size, true).layout;
  params.num_layers = pool.num_layers;
  params.num_heads = static_cast<int32_t>(dims["heads"]);
  params.head_dim = checked_head_dim("k_pool[0]", dims["head_dim"]);
  params.in_k_layout = checked_layers("k_in", k_in, like, dims, false, 0, false).layout;
  params.in_v_layout = checked_layers("v_in", v_in, like, dims, false, 0, false).layout;
  params.rope = rope_tables(cos, sin, interleaved, like, params.head_dim);
  params.round = mutable_round_view(round, e, like);
  Argument("slot_mapping", slot_mapping)
      .device_of(like)
      .dtype(ScalarType::Long)
      .shape(dims, {e.agents, "T"})
      .innermost_stride_1();
  Argument("length", length)
      .device_of(like)
      .dtype(ScalarType::Int)
      .shape(dims, {e.agents})
      .contiguous();
  expect(atol >= 0, "atol", ">= 0", atol);
  expect(rtol >= 0, "rtol", ">= 0", rtol);
  params.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  params.slot_stride = slot_mapping.stride(0);
  params.max_length = checked_int32("slot_mapping", dims["T"]);
  params.length = static_cast<const int32_t*>(length.const_data_ptr());
  params.atol = static_cast<float>(atol);
  params.rtol = static_cast<float>(rtol);
  params.k_scale = checked_scales("k_scale", k_scale, "k_pool[0]", like, dims, {"layers", "heads"});
  params.v_scale = checked_scales("v_scale", v_scale, "k_pool[0]", like, dims, {"layers", "heads"});
  fill_pointers(k_in, params.in.k);
  fill_pointers(v_in, params.in.v);
  fill_pointers(k_pool, params.pool.k);
  fill_pointers(v_pool, params.pool.v);
  if (e.agents == 0) return;
  if (like.is_cpu()) {
    check_contents(params, dims["num_pages"]);
    return cpu_diff_encode(params, torch_parallel_for);
  }
#ifdef TOKENDANCE_CUDA_DIFF_ENCODE
  constexpr int64_t kMostAgents = 65535;  // of a grid's second dimension
  expect(e.agents <= kMostAgents, "extents", "at most 65535 agents", e.agents);
  run_cuda(cuda_diff_encode, params, like);
#endif
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("diff_encode", TORCH_BOX(&tokendance::diff_encode));
}

#ifdef TOKENDANCE_CUDA_DIFF_ENCODE
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("diff_encode", TORCH_BOX(&tokendance::diff_encode));
}
#endif
