// The operators' schemas: the public contract (CHANGELOG.md says when one changes).
//
// Fake implementations stand in tokendance/device/operators.py, since the stable ABI has none.
#include <torch/csrc/stable/library.h>

// The fields of `Tensor round` and `SymInt[] extents` are those of tokendance/round.h.
STABLE_TORCH_LIBRARY(tokendance, m) {
  m.def(
      "rope_rotate(Tensor x, Tensor? row_in, Tensor? position_from, Tensor? position_to, "
      "Tensor cos, Tensor sin, bool interleaved=False, float attention_factor=1.0) -> Tensor");
  m.def(
      "rope_rotate_out(Tensor x, Tensor? row_in, Tensor? row_out, Tensor? position_from, "
      "Tensor? position_to, Tensor cos, Tensor sin, bool interleaved, float attention_factor, "
      "Tensor(a!) out, Tensor? x_scale=None, Tensor? out_scale=None) -> ()");
  m.def(
      "rope_rotate_(Tensor(a!) x, Tensor? rows, Tensor? position_from, Tensor? position_to, "
      "Tensor cos, Tensor sin, bool interleaved=False, float attention_factor=1.0) -> ()");
  m.def(
      "key_deviation(Tensor fresh, Tensor fresh_row, Tensor? fresh_position, Tensor cached, "
      "Tensor cached_row, Tensor cached_position, Tensor cos, Tensor sin, "
      "bool interleaved=False, float attention_factor=1.0) -> Tensor");
  m.def(
      "key_deviation_out(Tensor fresh, Tensor fresh_row, Tensor? fresh_position, Tensor cached, "
      "Tensor cached_row, Tensor cached_position, Tensor cos, Tensor sin, bool interleaved, "
      "float attention_factor, Tensor(a!) out) -> ()");
  m.def(
      "diff_encode(Tensor[] k_in, Tensor[] v_in, Tensor slot_mapping, Tensor length, "
      "Tensor(a!)[] k_pool, Tensor(b!)[] v_pool, Tensor cos, Tensor sin, bool interleaved, "
      "Tensor(c!) round, SymInt[] extents, float atol=0.0, float rtol=0.0, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> ()");
  m.def(
      "diff_restore(Tensor[] k_pool, Tensor[] v_pool, Tensor cos, Tensor sin, bool interleaved, "
      "Tensor round, SymInt[] extents, Tensor slot_mapping, Tensor(a!)[] k_out, Tensor(b!)[] "
      "v_out, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
  m.def(
      "collective_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor cos, Tensor sin, "
      "bool interleaved, Tensor round, SymInt[] extents, float softmax_scale, int window=0, "
      "float soft_cap=0.0, Tensor? sinks=None, float attention_factor=1.0, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> (Tensor, Tensor)");
  m.def(
      "collective_attention_out(Tensor q, Tensor k_pool, Tensor v_pool, Tensor cos, Tensor sin, "
      "bool interleaved, Tensor round, SymInt[] extents, float softmax_scale, int window, float "
      "soft_cap, "
      "Tensor? sinks, float attention_factor, Tensor(a!) workspace, Tensor(b!) out, Tensor(c!) "
      "lse, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
  m.def(
      "merge_states(Tensor partial_out, Tensor partial_lse, Tensor? sinks=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "merge_states_out(Tensor partial_out, Tensor partial_lse, Tensor? sinks, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
  m.def(
      "encode_pages(Tensor pool, Tensor page, Tensor rows, str code, bool per_channel, "
      "Tensor(a!) coded, Tensor? slot=None) -> ()");
  m.def(
      "decode_pages(Tensor coded, Tensor? slot, Tensor rows, str code, bool per_channel, "
      "Tensor(a!) pool, Tensor page) -> ()");
}
