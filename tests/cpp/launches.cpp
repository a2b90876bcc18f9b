// Runs every CPU launch function on small ragged rounds, on several threads, in buffers of exactly
// the size that the contract asks for, and the planner on random prompts: what AddressSanitizer,
// UBSan and ThreadSanitizer are to watch.
//
// What the results must be is for the Python tests to say; here a round trip is checked: what
// restore writes, encode finds equal to the Masters, and attention's output lies within the values'
// range.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <random>
#include <thread>
#include <vector>

#include "planner/decide.h"
#include "planner/work_list.h"
#include "tokendance/coded_pages.h"
#include "tokendance/launch.h"

namespace {

using namespace tokendance;

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

constexpr int kThreads = 4;

void threaded(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
              void* context) {
  const int64_t step = std::max<int64_t>(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; at += step)
    threads.emplace_back([=] { body(at, std::min(at + step, end), context); });
  for (std::thread& thread : threads) thread.join();
}

int bytes_of(DType dtype) { return is_quantized(dtype) ? 1 : dtype == DType::kFloat32 ? 4 : 2; }

// Values between 0.25 and 2 in magnitude, of either sign, as bits of the dtype; of a quantized one
// any elements but NaN and the int8 that is never made.
std::vector<uint8_t> random_values(std::mt19937& rng, int64_t count, DType dtype) {
  const int size = bytes_of(dtype);
  std::vector<uint8_t> bytes(count * size);
  if (is_quantized(dtype)) {
    const uint8_t never = dtype == DType::kInt8 ? 0x80 : 0xff;
    for (uint8_t& byte : bytes) {
      byte = static_cast<uint8_t>(rng());
      if (byte == never || (byte == 0x7f && never == 0xff)) byte = 0x28;
    }
    return bytes;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float value = (rng() % 2 ? 1.f : -1.f) * (0.25f + 1.75f * (rng() % 1000) / 1000.f);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (dtype == DType::kBFloat16) bits >>= 16;
    if (dtype == DType::kFloat16)
      bits = (bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff);
    memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

struct Use {
  int agent, master, delta, length;
};

// `dtype` of keys and values; queries, and what quantized rows are read out as, are `plain`.
void run(DType dtype, DType plain, int head_dim, int rotary_dim, bool interleaved, int block_size,
         int window, uint32_t seed) {
  std::mt19937 rng(seed);
  constexpr int kAgents = 3, kHeads = 2, kGroup = 3, kLayers = 2, kMaxPosition = 160;
  const int element = bytes_of(dtype);
  const std::vector<int> master_rows = {37, 1, 22}, origins = {5, 40, 60};
  const std::vector<int> lengths = {90, 71, 0};
  // Agent 0 uses Master 0 and Master 2, agent 1 Master 2, 1 and 0; agent 2 is empty.
  const std::vector<Use> uses = {
      {0, 0, 3, 37}, {0, 2, 50, 22}, {1, 2, 0, 22}, {1, 1, 22, 1}, {1, 0, 30, 36}};
  auto pages_of = [&](int rows) { return (rows + block_size - 1) / block_size; };

  RoundExtents e = {};
  e.agents = kAgents;
  e.masters = 3;
  e.uses = uses.size() + 1;  // the last slot is padding
  e.block_size = block_size;
  for (const Use& use : uses) e.use_pages += pages_of(use.length);
  for (int rows : master_rows) e.master_pages += pages_of(rows);
  std::vector<int> own_rows(kAgents);
  for (int a = 0; a < kAgents; ++a) {
    own_rows[a] = lengths[a];
    for (const Use& use : uses)
      if (use.agent == a) own_rows[a] -= use.length;
    e.own_pages += pages_of(own_rows[a]);
  }
  const int decode_rows = 2;
  e.rows = 2 * decode_rows;

  // Without the work list first: its sizes follow from the rest.
  MutableRoundView view;
  std::vector<int32_t> buffer(make_round_view<int32_t>(nullptr, e, &view));
  make_round_view(buffer.data(), e, &view);
  int32_t page = 0;
  for (int m = 0; m < 3; ++m) {
    for (int p = 0; p < pages_of(master_rows[m]); ++p) view.master_pages[page + p] = page + p;
    page += pages_of(master_rows[m]);
    view.master_page_indptr[m + 1] = page;
  }
  view.use_agent[uses.size()] = -1;
  for (size_t u = 0; u < uses.size(); ++u) {
    view.use_agent[u] = uses[u].agent;
    view.use_master[u] = uses[u].master;
    view.use_delta[u] = uses[u].delta;
    view.use_shift[u] = uses[u].delta - origins[uses[u].master];
    view.use_length[u] = uses[u].length;
    view.use_page_indptr[u + 1] = view.use_page_indptr[u] + pages_of(uses[u].length);
    view.agent_use[kAgentUseFields * u] = uses[u].master;
    view.agent_use[kAgentUseFields * u + 1] = u;
    for (int a = uses[u].agent; a < kAgents; ++a) view.agent_use_indptr[a + 1] = u + 1;
  }
  view.use_page_indptr[uses.size() + 1] = view.use_page_indptr[uses.size()];
  int32_t own_page = 0;
  for (int a = 0; a < kAgents; ++a) {
    int n = 0;
    for (int position = 0; position < lengths[a]; ++position) {
      bool used = false;
      for (const Use& use : uses)
        used |= use.agent == a && position >= use.delta && position < use.delta + use.length;
      if (!used) view.own_position[own_page * block_size + n++] = position;
    }
    CHECK(n == own_rows[a]);
    view.own_length[a] = n;
    for (int p = 0; p < pages_of(n); ++p) view.own_pages[own_page + p] = page++;
    own_page += pages_of(n);
    view.own_page_indptr[a + 1] = own_page;
  }
  for (int r = 0; r < e.rows; ++r) {
    const int agent = r / decode_rows;
    view.row_agent[r] = agent;
    view.row_position[r] = lengths[agent] - decode_rows + r % decode_rows;
  }
  const WorkList list = plan_work({
      .num_rows = e.rows,
      .row_agent = view.row_agent,
      .row_position = view.row_position,
      .row_position_bound = nullptr,
      .num_uses = e.uses,
      .use_agent = view.use_agent,
      .use_master = view.use_master,
      .use_delta = view.use_delta,
      .use_length = view.use_length,
      .num_masters = e.masters,
      .master_page_indptr = view.master_page_indptr,
      .num_agents = e.agents,
      .own_length = view.own_length,
      .own_page_indptr = view.own_page_indptr,
      .own_position = view.own_position,
      .own_position_bound = nullptr,
      .block_size = block_size,
      .window = window,
      .max_tile_rows = 16,
      .read_bound_rows = 4,
      .target_items = 6,
      .max_splits = 4,
  });
  RoundExtents full = e;
  full.work = list.work.size() / kWorkFields;
  full.work_rows = list.work_rows.size();
  full.work_chunks = list.work_chunks.size() / kChunkFields;
  full.work_uses = list.work_uses.size();
  full.partials = list.row_partials.size();
  MutableRoundView whole;
  std::vector<int32_t> packed(make_round_view<int32_t>(nullptr, full, &whole));
  make_round_view(packed.data(), full, &whole);
  std::copy(buffer.data(), view.work,
            packed.data());  // the fields before `work` have the same places
  std::copy(list.work.begin(), list.work.end(), whole.work);
  std::copy(list.work_rows.begin(), list.work_rows.end(), whole.work_rows);
  std::copy(list.work_chunks.begin(), list.work_chunks.end(), whole.work_chunks);
  std::copy(list.work_uses.begin(), list.work_uses.end(), whole.work_uses);
  std::copy(list.row_partial_indptr.begin(), list.row_partial_indptr.end(),
            whole.row_partial_indptr);
  std::copy(list.row_partials.begin(), list.row_partials.end(), whole.row_partials);
  RoundView round;
  make_round_view<const int32_t>(packed.data(), full, &round);

  std::vector<float> cos(kMaxPosition * rotary_dim / 2), sin(cos.size());
  for (int p = 0; p < kMaxPosition; ++p)
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = p * pow(10000.0, -2.0 * i / rotary_dim);
      cos[p * rotary_dim / 2 + i] = ::cos(angle);
      sin[p * rotary_dim / 2 + i] = ::sin(angle);
    }
  const RopeTables rope = {cos.data(), sin.data(), kMaxPosition, rotary_dim, interleaved};
  const int64_t row = kHeads * head_dim;
  const RowLayout pool = {page * block_size, block_size * row, row, head_dim, block_size};
  const int max_length = 90;
  const RowLayout dense = {kAgents * max_length, row, row, head_dim, 1};
  std::vector<std::vector<uint8_t>> pools, caches;
  for (int i = 0; i < 2 * kLayers; ++i) {
    pools.push_back(random_values(rng, pool.num_rows * row, dtype));
    caches.push_back(random_values(rng, dense.num_rows * row, dtype));
  }
  std::vector<int64_t> slots(kAgents * max_length);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i;

  DiffRestoreParams restore = {};
  DiffEncodeParams encode = {};
  for (int layer = 0; layer < kLayers; ++layer) {
    restore.pool.k[layer] = encode.pool.k[layer] = pools[2 * layer].data();
    restore.pool.v[layer] = encode.pool.v[layer] = pools[2 * layer + 1].data();
    encode.in.k[layer] = restore.out.k[layer] = caches[2 * layer].data();
    encode.in.v[layer] = restore.out.v[layer] = caches[2 * layer + 1].data();
  }
  restore.pool_k_layout = restore.pool_v_layout = pool;
  restore.out_k_layout = restore.out_v_layout = dense;
  restore.slot_mapping = slots.data();
  restore.slot_stride = max_length;
  restore.round = round;
  restore.num_layers = kLayers;
  restore.num_heads = kHeads;
  restore.head_dim = head_dim;
  restore.max_length = max_length;
  restore.rope = rope;
  restore.dtype = restore.out_dtype = dtype;
  cpu_diff_restore(restore, threaded);

  const std::vector<uint8_t> before = pools[0];
  encode.in_k_layout = encode.in_v_layout = dense;
  encode.pool_k_layout = encode.pool_v_layout = pool;
  encode.slot_mapping = slots.data();
  encode.slot_stride = max_length;
  const std::vector<int32_t> length(lengths.begin(), lengths.end());
  encode.length = length.data();
  encode.round = whole;
  encode.num_layers = kLayers;
  encode.num_heads = kHeads;
  encode.head_dim = head_dim;
  encode.max_length = max_length;
  encode.rope = rope;
  encode.dtype = dtype;
  cpu_diff_encode(encode, threaded);
  for (int64_t i = 0; i < e.use_pages; ++i) CHECK(whole.use_masks[i] == 0);
  for (int a = 0; a < kAgents; ++a) CHECK(whole.own_length[a] == own_rows[a]);
  CHECK(before == pools[0]);  // the own rows came back to where they were

  const int64_t q_row = kHeads * kGroup * head_dim;
  const std::vector<uint8_t> q = random_values(rng, e.rows * q_row, plain);
  std::vector<uint8_t> out(q.size());
  std::vector<float> lse(e.rows * kHeads * kGroup), sinks(kHeads * kGroup, 0.5f);
  std::vector<float> workspace(full.partials * kHeads * kGroup * (head_dim + 1));
  CollectiveAttentionParams attention = {};
  attention.q = q.data();
  attention.out = out.data();
  attention.lse = lse.data();
  attention.k_pool = pools[0].data();
  attention.v_pool = pools[1].data();
  attention.sinks = sinks.data();
  attention.workspace = workspace.data();
  attention.q_row_stride = attention.out_row_stride = q_row;
  attention.q_head_stride = attention.out_head_stride = head_dim;
  attention.k_layout = attention.v_layout = pool;
  attention.round = round;
  attention.num_q_heads = kHeads * kGroup;
  attention.num_kv_heads = kHeads;
  attention.head_dim = head_dim;
  attention.window = window;
  attention.softmax_scale = 0.1f;
  attention.soft_cap = 20.f;
  attention.attention_factor = 1.f;
  attention.rope = rope;
  attention.dtype = plain;
  attention.pool_dtype = dtype;
  const std::vector<float> scales(kLayers * kHeads, 0.004f);
  if (is_quantized(dtype)) attention.k_scale = attention.v_scale = scales.data();
  cpu_collective_attention(attention, threaded);
  for (float value : lse) CHECK(isfinite(value));
  if (plain == DType::kFloat32) {
    std::vector<float> values(out.size() / 4);
    memcpy(values.data(), out.data(), out.size());
    for (float value : values) CHECK(fabsf(value) <= 2.01f);
  }

  const int64_t moved = 11;
  std::vector<int64_t> row_in(moved), row_out(2 * moved);
  std::vector<int32_t> from(moved), to(2 * moved);
  for (int64_t i = 0; i < moved; ++i) {
    row_in[i] = rng() % pool.num_rows;
    from[i] = rng() % kMaxPosition;
    for (int j = 0; j < 2; ++j) {
      row_out[2 * i + j] = j && i % 3 == 0 ? -1 : 2 * i + j;
      to[2 * i + j] = rng() % kMaxPosition;
    }
  }
  std::vector<uint8_t> rotated(2 * moved * row * element);
  RopeRotateParams rotate = {};
  rotate.x = pools[0].data();
  rotate.out = rotated.data();
  rotate.x_layout = pool;
  rotate.out_layout = {2 * moved, row, row, head_dim, 1};
  rotate.row_in = row_in.data();
  rotate.row_out = row_out.data();
  rotate.position_from = from.data();
  rotate.position_to = to.data();
  rotate.num_rows = moved;
  rotate.destinations = 2;
  rotate.num_heads = kHeads;
  rotate.head_dim = head_dim;
  rotate.attention_factor = 1.f;
  rotate.rope = rope;
  rotate.dtype = rotate.out_dtype = dtype;
  cpu_rope_rotate(rotate, threaded);
  if (is_quantized(dtype)) {
    // Read out, and quantized again: by the scales of their heads, and then by half of them.
    std::vector<uint8_t> read(2 * moved * row * bytes_of(plain));
    rotate.out = read.data();
    rotate.out_dtype = plain;
    rotate.x_scale = scales.data();
    cpu_rope_rotate(rotate, threaded);
    const std::vector<float> halves(kHeads, 0.002f);
    RopeRotateParams back = rotate;
    back.x = read.data();
    back.x_layout = rotate.out_layout;
    back.row_in = nullptr;
    back.row_out = nullptr;
    back.position_from = back.position_to = nullptr;
    back.num_rows = 2 * moved;
    back.destinations = 1;
    back.out = rotated.data();
    back.dtype = plain;
    back.out_dtype = dtype;
    back.x_scale = nullptr;
    back.out_scale = halves.data();
    cpu_rope_rotate(back, threaded);
    rotate.out = rotated.data();
    rotate.out_dtype = dtype;
    rotate.out_scale = halves.data();
    cpu_rope_rotate(rotate, threaded);
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int part : {0, 1})
        caches[2 * layer + part].resize(dense.num_rows * row * bytes_of(plain));
      restore.out.k[layer] = caches[2 * layer].data();
      restore.out.v[layer] = caches[2 * layer + 1].data();
    }
    restore.out_dtype = plain;
    restore.k_scale = restore.v_scale = scales.data();
    cpu_diff_restore(restore, threaded);
    return;
  }

  // Fresh keys that are the cached ones: no deviation.
  std::vector<int64_t> fresh_row(2 * moved);
  for (int64_t i = 0; i < moved; ++i) fresh_row[i] = fresh_row[moved + i] = row_in[i];
  std::vector<int32_t> fresh_position(2 * moved);
  for (int64_t i = 0; i < 2 * moved; ++i) fresh_position[i] = from[i % moved];
  fresh_row[3] = -1;
  std::vector<float> deviation(moved);
  KeyDeviationParams key_deviation = {};
  key_deviation.fresh = key_deviation.cached = pools[0].data();
  key_deviation.fresh_layout = key_deviation.cached_layout = pool;
  key_deviation.fresh_row = fresh_row.data();
  key_deviation.fresh_position = fresh_position.data();
  key_deviation.cached_row = row_in.data();
  key_deviation.cached_position = from.data();
  key_deviation.deviation = deviation.data();
  key_deviation.num_tokens = moved;
  key_deviation.num_agents = 2;
  key_deviation.num_heads = kHeads;
  key_deviation.head_dim = head_dim;
  key_deviation.attention_factor = 1.f;
  key_deviation.rope = rope;
  key_deviation.dtype = dtype;
  cpu_key_deviation(key_deviation, threaded);
  for (float value : deviation) CHECK(value == 0.f);

  const int64_t partials = 3;
  const std::vector<uint8_t> parts = random_values(rng, partials * e.rows * q_row, dtype);
  std::vector<float> part_lse(partials * lse.size(), 0.25f);
  MergeStatesParams merge = {parts.data(), part_lse.data(), nullptr,         out.data(), lse.data(),
                             partials,     e.rows,          kHeads * kGroup, head_dim,   dtype};
  cpu_merge_states(merge, threaded);
  for (float value : lse) CHECK(fabsf(value - (0.25f + logf(3.f))) < 1e-5f);
}

// Pages to slots in another order and back: the largest element of a scale keeps its bits, and what
// is coded twice is the same.
void code(DType dtype, Code code, bool per_channel, int head_dim, int block_size, uint32_t seed) {
  std::mt19937 rng(seed);
  const int heads = 3;
  const int64_t pages = 9, elements = int64_t{block_size} * heads * head_dim;
  std::vector<uint8_t> pool = random_values(rng, pages * elements, dtype);
  std::vector<int64_t> page, slot;
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < pages; ++i) {
    page.push_back((i + 4) % pages);
    slot.push_back(pages - 1 - i);
    rows.push_back(static_cast<int32_t>(rng() % (block_size + 1)));
  }
  CodedPagesParams params{};
  params.layout = {pages * block_size, elements, int64_t{heads} * head_dim, head_dim, block_size};
  params.page = page.data();
  params.slot = slot.data();
  params.rows = rows.data();
  params.num_pages = pages;
  params.num_heads = heads;
  params.head_dim = head_dim;
  params.code = code;
  params.per_channel = per_channel;
  params.dtype = dtype;
  params.slot_stride = coded_page_bytes(params);
  std::vector<uint8_t> coded(pages * params.slot_stride), again(coded.size());
  std::vector<uint8_t> found(pool.size());
  params.pool = pool.data();
  params.coded = coded.data();
  cpu_encode_pages(params, threaded);
  params.pool = found.data();
  cpu_decode_pages(params, threaded);
  params.coded = again.data();
  cpu_encode_pages(params, threaded);
  CHECK(again == coded);
}

// A round of random prompts, laid out: spans tile each prompt, and each row that is not computed
// stands in one use.
void lay_out(uint32_t seed) {
  std::mt19937 rng(seed);
  const auto below = [&](uint32_t bound) { return static_cast<int32_t>(rng() % bound); };
  const int32_t segments = 1 + below(9), agents = 1 + below(6), masters = below(4);
  const int32_t block_size = 8 << below(3);
  std::vector<int32_t> length, place_indptr = {0}, segment, prefix, exact_prefix, tokens;
  std::vector<uint8_t> is_shared;
  for (int32_t s = 0; s < segments; ++s) length.push_back(1 + below(70));
  for (int32_t a = 0; a < agents; ++a) {
    tokens.push_back(0);
    for (int32_t places = below(8); places > 0; --places) {
      segment.push_back(below(segments));
      is_shared.push_back(below(5) > 0);
      tokens.back() += length[segment.back()];
    }
    place_indptr.push_back(static_cast<int32_t>(segment.size()));
    prefix.push_back(tokens.back() > 1 && below(3) == 0 ? below(tokens.back()) : 0);
    exact_prefix.push_back(prefix.back() > 0 ? below(prefix.back() + 1) : 0);
  }
  std::vector<int32_t> stored(segments, -1), stored_rows(segments, 0), earlier(segment.size(), -1);
  std::vector<int32_t> contexts;
  std::vector<uint8_t> is_exact, has_seen, agent_computes, segment_computes, alone, came_before,
      replaceable;
  for (int32_t m = 0; m < masters; ++m) {
    const int32_t of = below(segments);
    stored[of] = m;
    stored_rows[of] = std::max(1, length[of] - below(2));
    contexts.push_back(below(5));
    is_exact.push_back(below(2));
    for (int32_t s = 0; s < segments; ++s) has_seen.push_back(below(2));
  }
  for (int32_t a = 0; a < agents; ++a) agent_computes.push_back(below(6) == 0);
  for (int32_t s = 0; s < segments; ++s) segment_computes.push_back(below(6) == 0);
  const int32_t alone_of_three = below(4);
  for (int32_t s = 0; s < segments; ++s) {
    alone.push_back(below(3) < alone_of_three);
    came_before.push_back(below(3) > 0);
    replaceable.push_back(below(2));
  }
  std::map<std::pair<int32_t, int32_t>, int32_t> known;
  MatchInput input = {};
  input.prompts = {agents,           segments,      place_indptr.data(), segment.data(),
                   is_shared.data(), length.data(), prefix.data()};
  input.exact_prefix = exact_prefix.data();
  input.earlier_context = earlier.data();
  input.agent_computes = agent_computes.data();
  input.segment_computes = segment_computes.data();
  input.num_masters = masters;
  input.stored = stored.data();
  input.stored_rows = stored_rows.data();
  input.master_context = contexts.data();
  input.master_is_exact = is_exact.data();
  input.master_has_seen = has_seen.data();
  input.known = came_before.data();
  input.replaceable = replaceable.data();
  input.shortest = block_size / 2;
  input.alone = alone.data();
  input.informed = below(2);
  input.lone = below(2);
  input.chain = [&](int32_t context, int32_t next) {
    return known.try_emplace({context, next}, static_cast<int32_t>(known.size()) + 5).first->second;
  };
  const Match match = match_round(input);
  CHECK(match.order.size() == static_cast<size_t>(agents));
  std::vector<int32_t> repaired(segment.size());
  for (int32_t& rows : repaired) rows = below(12);
  const Tiling tiling = tile_round(input.prompts, match, repaired.data(), block_size);
  const int64_t all_masters = masters + static_cast<int64_t>(match.made.size());
  for (int32_t a = 0; a < agents; ++a) {
    int32_t end = 0;
    std::vector<int> rows(tokens[a], 0);
    for (int32_t i = tiling.span_indptr[a]; i < tiling.span_indptr[a + 1]; ++i) {
      CHECK(tiling.span_end[i] > end);
      end = tiling.span_end[i];
    }
    CHECK(end == tokens[a] && match.exact_length[a] <= tokens[a]);
    for (int32_t i = tiling.own_indptr[a]; i < tiling.own_indptr[a + 1]; ++i) ++rows[tiling.own[i]];
    size_t page = tiling.mask_indptr[a];
    for (int32_t u = tiling.use_indptr[a]; u < tiling.use_indptr[a + 1]; ++u) {
      CHECK(tiling.use_master[u] >= 0 && tiling.use_master[u] < all_masters);
      for (int32_t row = 0; row < tiling.use_length[u]; ++row) {
        const uint32_t mask = tiling.masks[page + row / block_size];
        rows[tiling.use_delta[u] + row] += (mask >> row % block_size & 1) == 0;
      }
      page += (tiling.use_length[u] + block_size - 1) / block_size;
    }
    CHECK(page == static_cast<size_t>(tiling.mask_indptr[a + 1]));
    for (int32_t row = prefix[a]; row < tokens[a]; ++row) CHECK(rows[row] == 1);
    for (int32_t row = 0; row < prefix[a]; ++row) CHECK(rows[row] == 0);
  }
}

}  // namespace

int main() {
  uint32_t seed = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    run(dtype, dtype, 64, 64, false, 8, 0, seed++);
    run(dtype, dtype, 80, 32, true, 16, 9, seed++);
    run(dtype, dtype, 96, 96, true, 32, 0, seed++);
    run(dtype, dtype, 128, 0, false, 8, 20, seed++);
    run(dtype, dtype, 256, 128, false, 16, 0, seed++);
  }
  for (DType dtype : {DType::kFloat8, DType::kInt8}) {
    run(dtype, DType::kFloat32, 64, 64, false, 8, 0, seed++);
    run(dtype, DType::kBFloat16, 80, 32, true, 16, 9, seed++);
    run(dtype, DType::kFloat16, 96, 96, true, 32, 0, seed++);
    run(dtype, DType::kBFloat16, 128, 0, false, 8, 20, seed++);
    run(dtype, DType::kFloat32, 256, 128, false, 16, 0, seed++);
  }
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (Code one : {Code::kExact, Code::kFloat8, Code::kInt8, Code::kInt4}) {
      code(dtype, one, true, 80, 8, seed++);
      code(dtype, one, false, 256, 16, seed++);
    }
  }
  for (uint32_t round = 0; round < 300; ++round) lay_out(round);
  printf("%u rounds on %s: no failure\n", seed, cpu_isa());
  return 0;
}
