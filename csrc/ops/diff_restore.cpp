// Checks and launch of diff_restore.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/check_round.h"
#include "ops/layers.h"
#include "ops/run.h"

namespace tokendance {
namespace {

void check_slots(const DiffRestoreParams& params) {
  const int64_t rows = std::min(params.out_k_layout.num_rows, params.out_v_layout.num_rows);
  for (int64_t agent = 0; agent < params.round.extents.agents; ++agent) {
    for (int64_t position = 0; position < params.max_length; ++position) {
      const int64_t slot = params.slot_mapping[agent * params.slot_stride + position];
      if (slot >= rows)
        fail("slot_mapping[", agent, ", ", position, "]: expected at most ", rows - 1, ", got ",
             slot);
    }
  }
}

void diff_restore(const std::vector<Tensor>& k_pool, const std::vector<Tensor>& v_pool,
                  const Tensor& cos, const Tensor& sin, bool interleaved, const Tensor& round,
                  std::vector<int64_t> extents, const Tensor& slot_mapping,
                  const std::vector<Tensor>& k_out, const std::vector<Tensor>& v_out,
                  const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  expect(!k_pool.empty(), "k_pool", "at least one layer", 0);
  const Tensor& like = k_pool[0];
  Dimensions dims;
  DiffRestoreParams params{};
  params.dtype = storage_dtype("k_pool[0]", like);
  const RoundExtents e = round_extents(extents);
  const LayerList pool = checked_layers("k_pool", k_pool, like, dims, true, e.block_size, false);
  params.pool_k_layout = pool.layout;
  params.pool_v_layout =
      checked_layers("v_pool", v_pool, like, dims, true, e.block_size, false).layout;
  params.num_layers = pool.num_layers;
  params.num_heads = static_cast<int32_t>(dims["heads"]);
  params.head_dim = checked_head_dim("k_pool[0]", dims["head_dim"]);
  const Tensor& out = k_out.empty() ? like : k_out[0];
  params.out_dtype = paired_dtype("k_out[0]", out, like, Quantized::kSource);
  params.out_k_layout = checked_layers("k_out", k_out, out, dims, false, 0, true).layout;
  params.out_v_layout = checked_layers("v_out", v_out, out, dims, false, 0, true).layout;
  params.k_scale = checked_scales("k_scale", k_scale, "k_pool[0]", like, dims, {"layers", "heads"});
  params.v_scale = checked_scales("v_scale", v_scale, "k_pool[0]", like, dims, {"layers", "heads"});
  params.rope = rope_tables(cos, sin, interleaved, like, params.head_dim);
  params.round = round_view(round, e, like);
  Argument("slot_mapping", slot_mapping)
      .device_of(like)
      .dtype(ScalarType::Long)
      .shape(dims, {e.agents, "T"})
      .innermost_stride_1();
  params.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  params.slot_stride = slot_mapping.stride(0);
  params.max_length = checked_int32("slot_mapping", dims["T"]);
  fill_pointers(k_pool, params.pool.k);
  fill_pointers(v_pool, params.pool.v);
  fill_pointers(k_out, params.out.k);
  fill_pointers(v_out, params.out.v);
  if (e.agents == 0 || params.max_length == 0 || params.num_heads == 0) return;
  if (like.is_cpu()) {
    check_round(params.round, dims["num_pages"], params.rope,
                {.masks = true, .own_rows = true, .own_pages = false, .query = false});
    check_slots(params);
    return cpu_diff_restore(params, torch_parallel_for);
  }
#ifdef TOKENDANCE_CUDA_DIFF_RESTORE
  run_cuda(cuda_diff_restore, params, like);
#endif
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("diff_restore", TORCH_BOX(&tokendance::diff_restore));
}

#ifdef TOKENDANCE_CUDA_DIFF_RESTORE
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("diff_restore", TORCH_BOX(&tokendance::diff_restore));
}
#endif
