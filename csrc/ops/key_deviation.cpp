// Checks and launch of key_deviation and key_deviation_out.
#include <torch/csrc/stable/library.h>

#include "ops/check.h"
#include "ops/run.h"

namespace tokendance {
namespace {

void check_contents(const KeyDeviationParams& params) {
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t cached = params.cached_row[token];
    if (cached < 0 || cached >= params.cached_layout.num_rows)
      fail("cached_row[", token, "]: expected 0 to ", params.cached_layout.num_rows - 1, ", got ",
           cached);
    for (int64_t agent = 0; agent < params.num_agents; ++agent) {
      const int64_t entry = agent * params.num_tokens + token;
      const int64_t fresh = params.fresh_row[entry];
      if (fresh >= params.fresh_layout.num_rows)
        fail("fresh_row[", agent, ", ", token, "]: expected at most ",
             params.fresh_layout.num_rows - 1, ", got ", fresh);
      if (fresh < 0 || params.rope.rotary_dim == 0) continue;
      const int64_t from = params.fresh_position ? params.fresh_position[entry] : 0;
      const int64_t shift = params.cached_position[token] - from;
      if (shift <= -params.rope.max_position || shift >= params.rope.max_position)
        fail("cached_position[", token,
             "]: expected a distance below max_position = ", params.rope.max_position,
             " from fresh_position, got ", params.cached_position[token], " from ", from,
             " of agent ", agent);
    }
  }
}

KeyDeviationParams make_params(const Tensor& fresh, const Tensor& fresh_row,
                               const std::optional<Tensor>& fresh_position, const Tensor& cached,
                               const Tensor& cached_row, const Tensor& cached_position,
                               const Tensor& cos, const Tensor& sin, bool interleaved,
                               double attention_factor) {
  Dimensions dims;
  KeyDeviationParams params{};
  params.dtype = plain_dtype("fresh", fresh);
  params.fresh_layout = Argument("fresh", fresh).rows(dims, "heads", "head_dim");
  params.num_heads = static_cast<int32_t>(dims["heads"]);
  params.head_dim = checked_head_dim("fresh", dims["head_dim"]);
  params.cached_layout =
      Argument("cached", cached).like(fresh).rows(dims, "heads", params.head_dim);
  params.rope = rope_tables(cos, sin, interleaved, fresh, params.head_dim);
  params.attention_factor = static_cast<float>(attention_factor);
  Argument("fresh_row", fresh_row)
      .device_of(fresh)
      .dtype(ScalarType::Long)
      .shape(dims, {"agents", "tokens"})
      .contiguous();
  if (fresh_position) {
    Argument("fresh_position", *fresh_position)
        .device_of(fresh)
        .dtype(ScalarType::Int)
        .shape(dims, {"agents", "tokens"})
        .contiguous();
  }
  Argument("cached_row", cached_row)
      .device_of(fresh)
      .dtype(ScalarType::Long)
      .shape(dims, {"tokens"})
      .contiguous();
  Argument("cached_position", cached_position)
      .device_of(fresh)
      .dtype(ScalarType::Int)
      .shape(dims, {"tokens"})
      .contiguous();
  params.fresh = fresh.const_data_ptr();
  params.cached = cached.const_data_ptr();
  params.fresh_row = static_cast<const int64_t*>(fresh_row.const_data_ptr());
  params.fresh_position = data_or_null<int32_t>(fresh_position);
  params.cached_row = static_cast<const int64_t*>(cached_row.const_data_ptr());
  params.cached_position = static_cast<const int32_t*>(cached_position.const_data_ptr());
  params.num_tokens = dims["tokens"];
  params.num_agents = static_cast<int32_t>(dims["agents"]);
  return params;
}

void run(const KeyDeviationParams& params, const Tensor& fresh) {
  if (params.num_tokens == 0) return;
  if (fresh.is_cpu()) {
    check_contents(params);
    return cpu_key_deviation(params, torch_parallel_for);
  }
#ifdef TOKENDANCE_CUDA_KEY_DEVIATION
  run_cuda(cuda_key_deviation, params, fresh);
#endif
}

Tensor key_deviation(const Tensor& fresh, const Tensor& fresh_row,
                     const std::optional<Tensor>& fresh_position, const Tensor& cached,
                     const Tensor& cached_row, const Tensor& cached_position, const Tensor& cos,
                     const Tensor& sin, bool interleaved, double attention_factor) {
  KeyDeviationParams params = make_params(fresh, fresh_row, fresh_position, cached, cached_row,
                                          cached_position, cos, sin, interleaved, attention_factor);
  Tensor out = torch::stable::new_empty(fresh, {params.num_tokens}, ScalarType::Float);
  params.deviation = static_cast<float*>(out.mutable_data_ptr());
  run(params, fresh);
  return out;
}

void key_deviation_out(const Tensor& fresh, const Tensor& fresh_row,
                       const std::optional<Tensor>& fresh_position, const Tensor& cached,
                       const Tensor& cached_row, const Tensor& cached_position, const Tensor& cos,
                       const Tensor& sin, bool interleaved, double attention_factor,
                       const Tensor& out) {
  KeyDeviationParams params = make_params(fresh, fresh_row, fresh_position, cached, cached_row,
                                          cached_position, cos, sin, interleaved, attention_factor);
  Dimensions dims;
  Argument("out", out)
      .device_of(fresh)
      .dtype(ScalarType::Float)
      .shape(dims, {params.num_tokens})
      .contiguous();
  params.deviation = static_cast<float*>(out.mutable_data_ptr());
  run(params, fresh);
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("key_deviation", TORCH_BOX(&tokendance::key_deviation));
  m.impl("key_deviation_out", TORCH_BOX(&tokendance::key_deviation_out));
}

#ifdef TOKENDANCE_CUDA_KEY_DEVIATION
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("key_deviation", TORCH_BOX(&tokendance::key_deviation));
  m.impl("key_deviation_out", TORCH_BOX(&tokendance::key_deviation_out));
}
#endif
