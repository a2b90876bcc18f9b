// Checks and launch of encode_pages and decode_pages. What is below the device lies in host memory:
// the operators are the CPU's, of pools on a device the pages are copied first.
#include "tokendance/coded_pages.h"

#include <torch/csrc/stable/library.h>

#include "ops/check.h"
#include "ops/run.h"

namespace tokendance {
namespace {

constexpr int64_t kAlignment = 16;  // of coded pages

Code checked_code(const std::string& name) {
  if (name == "exact") return Code::kExact;
  if (name == "e4m3") return Code::kFloat8;
  if (name == "int8") return Code::kInt8;
  if (name == "int4") return Code::kInt4;
  fail("code: expected exact, e4m3, int8 or int4, got '", name, "'");
}

void check_numbers(const char* name, const int64_t* numbers, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] < 0 || numbers[i] >= limit)
      fail(name, "[", i, "]: expected 0 to ", limit - 1, ", got ", numbers[i]);
  }
}

void check_contents(const CodedPagesParams& params, int64_t num_slots) {
  const int64_t count = params.num_pages;
  check_numbers("page", params.page, count, params.layout.num_rows / params.layout.block_size);
  if (params.slot) {
    check_numbers("slot", params.slot, count, num_slots);
  } else if (count > num_slots) {
    fail("coded: expected at least ", count, " slots, got ", num_slots);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (params.rows[i] < 0 || params.rows[i] > params.layout.block_size)
      fail("rows[", i, "]: expected 0 to ", params.layout.block_size, ", got ", params.rows[i]);
  }
}

CodedPagesParams make_params(const Tensor& pool, const Tensor& page, const Tensor& rows,
                             const std::string& code, bool per_channel, const Tensor& coded,
                             const std::optional<Tensor>& slot) {
  Dimensions dims;
  CodedPagesParams params{};
  params.dtype = plain_dtype("pool", pool);
  params.layout =
      Argument("pool", pool).pages(dims, "num_pages", "block_size", "heads", "head_dim");
  params.num_heads = checked_int32("heads", dims["heads"]);
  params.head_dim = checked_head_dim("pool", dims["head_dim"]);
  params.code = checked_code(code);
  params.per_channel = per_channel;
  Argument("page", page).device_of(pool).dtype(ScalarType::Long).shape(dims, {"n"}).contiguous();
  Argument("rows", rows).device_of(pool).dtype(ScalarType::Int).shape(dims, {"n"}).contiguous();
  if (slot) {
    Argument("slot", *slot).device_of(pool).dtype(ScalarType::Long).shape(dims, {"n"}).contiguous();
  }
  Argument("coded", coded)
      .device_of(pool)
      .dtype(ScalarType::Byte)
      .shape(dims, {"slots", coded_page_bytes(params)})
      .innermost_stride_1();
  params.slot_stride = coded.stride(0);
  if (reinterpret_cast<uintptr_t>(coded.const_data_ptr()) % kAlignment != 0 ||
      (coded.size(0) > 1 && params.slot_stride % kAlignment != 0))
    fail("coded: expected slots at multiples of ", kAlignment, " bytes, got strides ",
         strides_text(coded));
  params.page = static_cast<const int64_t*>(page.const_data_ptr());
  params.rows = static_cast<const int32_t*>(rows.const_data_ptr());
  params.slot = data_or_null<int64_t>(slot);
  params.num_pages = dims["n"];
  check_contents(params, dims["slots"]);
  return params;
}

void encode_pages(const Tensor& pool, const Tensor& page, const Tensor& rows,
                  const std::string& code, bool per_channel, const Tensor& coded,
                  const std::optional<Tensor>& slot) {
  CodedPagesParams params = make_params(pool, page, rows, code, per_channel, coded, slot);
  Argument("coded", coded).not_expanded();
  params.pool = const_cast<void*>(pool.const_data_ptr());
  params.coded = static_cast<uint8_t*>(coded.mutable_data_ptr());
  if (params.num_pages > 0) cpu_encode_pages(params, torch_parallel_for);
}

void decode_pages(const Tensor& coded, const std::optional<Tensor>& slot, const Tensor& rows,
                  const std::string& code, bool per_channel, const Tensor& pool,
                  const Tensor& page) {
  CodedPagesParams params = make_params(pool, page, rows, code, per_channel, coded, slot);
  Argument("pool", pool).not_expanded();
  params.pool = pool.mutable_data_ptr();
  params.coded = const_cast<uint8_t*>(static_cast<const uint8_t*>(coded.const_data_ptr()));
  if (params.num_pages > 0) cpu_decode_pages(params, torch_parallel_for);
}

}  // namespace
}  // namespace tokendance

STABLE_TORCH_LIBRARY_IMPL(tokendance, CPU, m) {
  m.impl("encode_pages", TORCH_BOX(&tokendance::encode_pages));
  m.impl("decode_pages", TORCH_BOX(&tokendance::decode_pages));
}
