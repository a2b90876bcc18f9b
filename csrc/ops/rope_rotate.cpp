// Checks and launch of rope_rotate, rope_rotate_out and rope_rotate_.
#include <torch/csrc/stable/library.h>

#include "ops/check.h"
#include "ops/run.h"

namespace tokendance {
namespace {

// The positions of row i of a move, in host memory.
void check_shift(const RopeTables& rope, const int32_t* from, const int32_t* to, int64_t row,
                 int64_t entry) {
  const int64_t shift = int64_t{to[entry]} - (from ? from[row] : 0);
  if (shift <= -rope.max_position || shift >= rope.max_position) {
    fail("position_to: expected a distance below max_position = ", rope.max_position,
         " from position_from, got ", to[entry], " from ", from ? from[row] : 0, " in row ", row);
  }
}

void check_contents(const RopeRotateParams& params) {
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (params.row_in && (params.row_in[row] < 0 || params.row_in[row] >= params.x_layout.num_rows))
      fail("row_in[", row, "]: expected 0 to ", params.x_layout.num_rows - 1, ", got ",
           params.row_in[row]);
    for (int32_t j = 0; j < params.destinations; ++j) {
      const int64_t entry = row * params.destinations + j;
      if (params.row_out) {
        if (params.row_out[entry] >= params.out_layout.num_rows)
          fail("row_out[", row, "]: expected at most ", params.out_layout.num_rows - 1, ", got ",
               params.row_out[entry]);
        if (params.row_out[entry] < 0) continue;
      }
      if (params.position_to && params.rope.rotary_dim > 0)
        check_shift(params.rope, params.position_from, params.position_to, row, entry);
    }
  }
}

void run(RopeRotateParams params, const Tensor& x) {
  // Rows that are copied need no tables, whatever they are like.
  if (!params.position_to) params.rope.rotary_dim = 0;
  if (params.num_rows == 0 || params.destinations == 0 || params.num_heads == 0) return;
  if (x.is_cpu()) {
    check_contents(params);
    return cpu_rope_rotate(params, torch_parallel_for);
  }
#ifdef TOKENDANCE_CUDA_ROPE_ROTATE
  run_cuda(cuda_rope_rotate, params, x);
#endif
}

const int32_t* checked_positions(const char* name, const std::optional<Tensor>& positions,
                                 Dimensions& dims, std::initializer_list<Dimension> shape,
                                 const Tensor& x) {
  if (!positions) return nullptr;
  Argument(name, *positions).device_of(x).dtype(ScalarType::Int).shape(dims, shape).contiguous();
  return data_or_null<int32_t>(positions);
}

const int64_t* checked_rows(const char* name, const std::optional<Tensor>& rows, Dimensions& dims,
                            std::initializer_list<Dimension> shape, const Tensor& x) {
  if (!rows) return nullptr;
  Argument(name, *rows).device_of(x).dtype(ScalarType::Long).shape(dims, shape).contiguous();
  return data_or_null<int64_t>(rows);
}

// All but out and its rows. `rows_name` is what the operator calls row_in.
RopeRotateParams common_params(const Tensor& x, const char* rows_name,
                               const std::optional<Tensor>& row_in,
                               const std::optional<Tensor>& position_from,
                               const std::optional<Tensor>& position_to, const Tensor& cos,
                               const Tensor& sin, bool interleaved, double attention_factor,
                               Dimensions& dims) {
  RopeRotateParams params{};
  params.dtype = params.out_dtype = storage_dtype("x", x);
  params.x_layout = Argument("x", x).rows(dims, "heads", "head_dim");
  params.num_heads = static_cast<int32_t>(dims["heads"]);
  params.head_dim = checked_head_dim("x", dims["head_dim"]);
  params.rope = rope_tables(cos, sin, interleaved, x, params.head_dim);
  params.attention_factor = static_cast<float>(attention_factor);
  params.x = x.const_data_ptr();
  params.row_in = checked_rows(rows_name, row_in, dims, {"n"}, x);
  if (!row_in) dims.bind("n", params.x_layout.num_rows);
  params.num_rows = dims["n"];
  params.destinations = 1;
  if (position_from && !position_to) {
    fail("position_from: expected None where position_to is None, got a tensor");
  }
  params.position_from = checked_positions("position_from", position_from, dims, {"n"}, x);
  return params;
}

Tensor rope_rotate(const Tensor& x, const std::optional<Tensor>& row_in,
                   const std::optional<Tensor>& position_from,
                   const std::optional<Tensor>& position_to, const Tensor& cos, const Tensor& sin,
                   bool interleaved, double attention_factor) {
  Dimensions dims;
  RopeRotateParams params = common_params(x, "row_in", row_in, position_from, position_to, cos, sin,
                                          interleaved, attention_factor, dims);
  params.position_to = checked_positions("position_to", position_to, dims, {"n"}, x);
  const int64_t heads = params.num_heads, head_dim = params.head_dim;
  Tensor out = torch::stable::new_empty(x, {params.num_rows, heads, head_dim});
  params.out = out.mutable_data_ptr();
  params.out_layout = {params.num_rows, heads * head_dim, 0, head_dim, 1};
  run(params, x);
  return out;
}

void rope_rotate_out(const Tensor& x, const std::optional<Tensor>& row_in,
                     const std::optional<Tensor>& row_out,
                     const std::optional<Tensor>& position_from,
                     const std::optional<Tensor>& position_to, const Tensor& cos, const Tensor& sin,
                     bool interleaved, double attention_factor, const Tensor& out,
                     const std::optional<Tensor>& x_scale, const std::optional<Tensor>& out_scale) {
  Dimensions dims;
  RopeRotateParams params = common_params(x, "row_in", row_in, position_from, position_to, cos, sin,
                                          interleaved, attention_factor, dims);
  params.out_dtype = paired_dtype("out", out, x, Quantized::kEither);
  params.out_layout = Argument("out", out).not_expanded().rows(dims, "heads", params.head_dim);
  params.out = out.mutable_data_ptr();
  params.x_scale = checked_scales("x_scale", x_scale, "x", x, dims, {"heads"});
  params.out_scale = checked_scales("out_scale", out_scale, "out", out, dims, {"heads"});
  if (params.out_dtype == params.dtype && x_scale.has_value() != out_scale.has_value()) {
    fail(x_scale ? "out_scale" : "x_scale", ": expected scales as for ", x_scale ? "x" : "out",
         ", got None");
  }
  // One set of scales cancels, so that a row that stays keeps its bits.
  if (params.x_scale == params.out_scale) params.x_scale = params.out_scale = nullptr;
  if (row_out && row_out->dim() == 2) {
    params.row_out = checked_rows("row_out", row_out, dims, {"n", "destinations"}, x);
    params.destinations = static_cast<int32_t>(dims["destinations"]);
    params.position_to =
        checked_positions("position_to", position_to, dims, {"n", "destinations"}, x);
  } else {
    params.row_out = checked_rows("row_out", row_out, dims, {"n"}, x);
    params.position_to = checked_positions("position_to", position_to, dims, {"n"}, x);
  }
  if (!row_out) {
    expect(params.num_rows <= params.out_layout.num_rows, "out",
           "at least " + std::to_string(params.num_rows) + " rows", params.out_layout.num_rows);
  }
  run(params, x);
}

void rope_rotate_(const Tensor& x, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& position_from,
                  const std::optional<Tensor>& position_to, const Tensor& cos, const Tensor& sin,
                  bool interleaved, double attention_factor) {
  Dimensions dims;
  RopeRotateParams params = common_params(x, "rows", rows, position_from, position_to, cos, sin,
                                          interleaved, attention_factor, dims);
  Argument("x", x).not_expanded();
  params.position_to = checked_positions("position_to", position_to, dims, {"n"}, x);
  params.out = x.mutable_data_ptr();
  params.out_layout = params.x_layout;
  params.row_out = params.row_in;
  run(params, x);
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("rope_rotate", TORCH_BOX(&tokendance::rope_rotate));
  m.impl("rope_rotate_out", TORCH_BOX(&tokendance::rope_rotate_out));
  m.impl("rope_rotate_", TORCH_BOX(&tokendance::rope_rotate_));
}

#ifdef TOKENDANCE_CUDA_ROPE_ROTATE
STABLE_TORCH_LIBRARY_IMPL(tokendance, CUDA, m) {
  m.impl("rope_rotate", TORCH_BOX(&tokendance::rope_rotate));
  m.impl("rope_rotate_out", TORCH_BOX(&tokendance::rope_rotate_out));
  m.impl("rope_rotate_", TORCH_BOX(&tokendance::rope_rotate_));
}
#endif
