// Checks and launch of merge_states and merge_states_out.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/check.h"
#include "ops/run.h"

namespace tokendance {
namespace {

MergeStatesParams make_params(const Tensor& partial_out, const Tensor& partial_lse,
                              const std::optional<Tensor>& sinks) {
  Dimensions dims;
  MergeStatesParams params{};
  params.dtype = plain_dtype("partial_out", partial_out);
  Argument("partial_out", partial_out)
      .shape(dims, {"partials", "rows", "heads", "head_dim"})
      .contiguous()
      .aligned();
  params.num_partials = dims["partials"];
  params.num_rows = dims["rows"];
  params.num_heads = static_cast<int32_t>(dims["heads"]);
  params.head_dim = checked_head_dim("partial_out", dims["head_dim"]);
  Argument("partial_lse", partial_lse)
      .device_of(partial_out)
      .dtype(ScalarType::Float)
      .shape(dims, {"partials", "rows", "heads"})
      .contiguous();
  if (sinks) {
    Argument("sinks", *sinks)
        .device_of(partial_out)
        .dtype(ScalarType::Float)
        .shape(dims, {"heads"})
        .contiguous();
  }
  params.partial_out = partial_out.const_data_ptr();
  params.partial_lse = static_cast<const float*>(partial_lse.const_data_ptr());
  params.sinks = data_or_null<float>(sinks);
  return params;
}

void run(MergeStatesParams& params, const Tensor& out, const Tensor& lse) {
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (params.num_rows == 0 || params.num_heads == 0) return;
  if (out.is_cpu()) return cpu_merge_states(params, torch_parallel_for);
#ifdef TOKENDANCE_CUDA_MERGE_STATES
  run_cuda(cuda_merge_states, params, out);
#endif
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& partial_out, const Tensor& partial_lse,
                                        const std::optional<Tensor>& sinks) {
  MergeStatesParams params = make_params(partial_out, partial_lse, sinks);
  Tensor out =
      torch::stable::new_empty(partial_out, {params.num_rows, params.num_heads, params.head_dim});
  Tensor lse =
      torch::stable::new_empty(partial_out, {params.num_rows, params.num_heads}, ScalarType::Float);
  run(params, out, lse);
  return {out, lse};
}

// Other threads still read partials while results are written.
void check_apart(const char* name, const Tensor& result, const Tensor& partials) {
  const auto begin = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  };
  const auto end = [&](const Tensor& tensor) {
    return begin(tensor) + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  };
  if (begin(result) < end(partials) && begin(partials) < end(result)) {
    fail(name, ": expected memory apart from that of the partials");
  }
}

void merge_states_out(const Tensor& partial_out, const Tensor& partial_lse,
                      const std::optional<Tensor>& sinks, const Tensor& out, const Tensor& lse) {
  MergeStatesParams params = make_params(partial_out, partial_lse, sinks);
  Dimensions dims;
  Argument("out", out)
      .like(partial_out)
      .shape(dims, {params.num_rows, params.num_heads, params.head_dim})
      .contiguous();
  Argument("lse", lse)
      .device_of(partial_out)
      .dtype(ScalarType::Float)
      .shape(dims, {params.num_rows, params.num_heads})
      .contiguous();
  check_apart("out", out, partial_out);
  check_apart("lse", lse, partial_lse);
  run(params, out, lse);
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&tokendance::merge_states));
  m.impl("merge_states_out", TORCH_BOX(&tokendance::merge_states_out));
}

#ifdef TOKENDANCE_CUDA_MERGE_STATES
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("merge_states", TORCH_BOX(&tokendance::merge_states));
  m.impl("merge_states_out", TORCH_BOX(&tokendance::merge_states_out));
}
#endif
