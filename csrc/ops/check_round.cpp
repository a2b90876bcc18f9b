#include "ops/check_round.h"

#include <algorithm>

namespace tokendance {
namespace {

int64_t pages_of(int64_t rows, int64_t block_size) { return (rows + block_size - 1) / block_size; }

[[noreturn]] void fail_field(const char* field, int64_t index, const std::string& expected,
                             int64_t got) {
  fail("round.", field, "[", index, "]: expected ", expected, ", got ", got);
}

std::string between(int64_t low, int64_t high) {
  return std::to_string(low) + " to " + std::to_string(high);
}

// The text is only made for the failure: these stand in loops over every entry.
void expect_range(const char* field, int64_t index, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail_field(field, index, between(low, high), value);
}

// Starts at 0, ascends, ends within the capacity.
void check_indptr(const char* field, const int32_t* indptr, int64_t count, int64_t capacity) {
  if (indptr[0] != 0) fail_field(field, 0, "0", indptr[0]);
  for (int64_t i = 0; i < count; ++i) {
    expect_range(field, i + 1, indptr[i + 1], indptr[i], capacity);
  }
}

void check_page_ids(const char* field, const int32_t* pages, int64_t begin, int64_t end,
                    int64_t num_pages) {
  for (int64_t i = begin; i < end; ++i) expect_range(field, i, pages[i], 0, num_pages - 1);
}

void check_use(const RoundView& round, int64_t u, int64_t agent, const RopeTables& rope) {
  const RoundExtents& e = round.extents;
  if (round.use_agent[u] != agent) {
    fail_field("use_agent", u, std::to_string(agent) + " by agent_use_indptr", round.use_agent[u]);
  }
  expect_range("use_master", u, round.use_master[u], 0, e.masters - 1);
  const int32_t master = round.use_master[u];
  const int64_t master_rows =
      (round.master_page_indptr[master + 1] - round.master_page_indptr[master]) * e.block_size;
  expect_range("use_length", u, round.use_length[u], 0, master_rows);
  const int64_t pages = round.use_page_indptr[u + 1] - round.use_page_indptr[u];
  if (pages != pages_of(round.use_length[u], e.block_size)) {
    fail_field("use_page_indptr", u + 1,
               "ceil(use_length / block_size) = " +
                   std::to_string(pages_of(round.use_length[u], e.block_size)) + " pages",
               pages);
  }
  if (rope.rotary_dim > 0) {
    expect_range("use_shift", u, round.use_shift[u], 1 - static_cast<int64_t>(rope.max_position),
                 static_cast<int64_t>(rope.max_position) - 1);
  }
  const int64_t end = static_cast<int64_t>(round.use_delta[u]) + round.use_length[u];
  if (end > INT32_MAX) fail_field("use_delta", u, "an end below 2^31", round.use_delta[u]);
}

// As many different Masters as uses, each of a use of its own: every use has its entry, then.
void check_agent_use(const RoundView& round, int64_t agent) {
  const int64_t begin = round.agent_use_indptr[agent], end = round.agent_use_indptr[agent + 1];
  int64_t previous = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * kAgentUseFields;
    const int32_t master = round.agent_use[at], use = round.agent_use[at + 1];
    expect_range("agent_use", at, master, previous + 1, round.extents.masters - 1);
    expect_range("agent_use", at + 1, use, begin, end - 1);
    if (round.use_master[use] != master) {
      fail_field("agent_use", at + 1, "a use of Master " + std::to_string(master), use);
    }
    previous = master;
  }
}

void check_uses(const RoundView& round, const RopeTables& rope) {
  const RoundExtents& e = round.extents;
  check_indptr("use_page_indptr", round.use_page_indptr, e.uses, e.use_pages);
  check_indptr("agent_use_indptr", round.agent_use_indptr, e.agents, e.uses);
  for (int64_t agent = 0; agent < e.agents; ++agent) {
    int64_t previous_end = INT64_MIN;
    for (int64_t u = round.agent_use_indptr[agent]; u < round.agent_use_indptr[agent + 1]; ++u) {
      check_use(round, u, agent, rope);
      if (round.use_delta[u] < previous_end) {
        fail_field("use_delta", u,
                   ">= " + std::to_string(previous_end) + ", the end of the use before it",
                   round.use_delta[u]);
      }
      previous_end = static_cast<int64_t>(round.use_delta[u]) + round.use_length[u];
    }
    check_agent_use(round, agent);
  }
  const int64_t filled = round.agent_use_indptr[e.agents];
  for (int64_t u = filled; u < e.uses; ++u) {
    if (round.use_agent[u] != -1) fail_field("use_agent", u, "-1", round.use_agent[u]);
  }
}

void check_masks(const RoundView& round) {
  const int64_t block_size = round.extents.block_size;
  const int64_t uses = round.agent_use_indptr[round.extents.agents];
  for (int64_t u = 0; u < uses; ++u) {
    const int64_t begin = round.use_page_indptr[u];
    const int64_t pages = round.use_page_indptr[u + 1] - begin;
    const int64_t length = round.use_length[u];
    const int64_t before_start = -static_cast<int64_t>(round.use_delta[u]);
    for (int64_t page = 0; page < pages; ++page) {
      const uint32_t mask = static_cast<uint32_t>(round.use_masks[begin + page]);
      const int64_t rows = std::min(length - page * block_size, block_size);
      const uint32_t used = static_cast<uint32_t>((uint64_t{1} << rows) - 1);
      if (mask & ~used) {
        fail("round.use_masks[", begin + page, "]: expected bits of the ", rows,
             " rows that the use has in this page, got ", mask);
      }
      const int64_t outside = std::min(before_start - page * block_size, rows);
      if (outside <= 0) continue;
      const uint32_t needed = static_cast<uint32_t>((uint64_t{1} << outside) - 1);
      if (needed & ~mask) {
        fail("round.use_masks[", begin + page, "]: expected the ", outside,
             " rows before position 0 to be hidden, got ", mask);
      }
    }
  }
}

void check_own_rows(const RoundView& round, bool masks, const RopeTables& rope) {
  const RoundExtents& e = round.extents;
  const int64_t positions = rope.rotary_dim > 0 ? rope.max_position : int64_t{INT32_MAX};
  for (int64_t agent = 0; agent < e.agents; ++agent) {
    const int64_t page_begin = round.own_page_indptr[agent];
    const int64_t capacity = (round.own_page_indptr[agent + 1] - page_begin) * e.block_size;
    const int64_t length = round.own_length[agent];
    expect_range("own_length", agent, length, 0, capacity);
    const int64_t begin = page_begin * e.block_size;
    int64_t previous = -1;
    for (int64_t i = begin; i < begin + length; ++i) {
      expect_range("own_position", i, round.own_position[i], previous + 1, positions - 1);
      previous = round.own_position[i];
    }
    if (!masks) continue;
    int64_t i = begin;
    for (int64_t u = round.agent_use_indptr[agent]; u < round.agent_use_indptr[agent + 1]; ++u) {
      const int64_t delta = round.use_delta[u];
      const int64_t end = delta + round.use_length[u];
      while (i < begin + length && round.own_position[i] < delta) ++i;
      for (; i < begin + length && round.own_position[i] < end; ++i) {
        const int64_t row = round.own_position[i] - delta;
        const uint32_t mask =
            static_cast<uint32_t>(round.use_masks[round.use_page_indptr[u] + row / e.block_size]);
        if (!(mask >> (row % e.block_size) & 1)) {
          fail("round.own_position[", i, "]: expected a position where no use shows a row, got ",
               round.own_position[i], ", which use ", u, " shows");
        }
      }
    }
  }
}

void check_query_rows(const RoundView& round, const RopeTables& rope) {
  const RoundExtents& e = round.extents;
  const int64_t positions = rope.rotary_dim > 0 ? rope.max_position : int64_t{INT32_MAX};
  for (int64_t row = 0; row < e.rows; ++row) {
    const int32_t agent = round.row_agent[row];
    expect_range("row_agent", row, agent, -1, e.agents - 1);
    if (agent >= 0) expect_range("row_position", row, round.row_position[row], 0, positions - 1);
  }
  check_indptr("row_partial_indptr", round.row_partial_indptr, e.rows, e.partials);
  const int64_t merged = round.row_partial_indptr[e.rows];
  for (int64_t i = 0; i < merged; ++i) {
    expect_range("row_partials", i, round.row_partials[i], 0, e.partials - 1);
  }
}

void check_chunk(const RoundView& round, int64_t chunk) {
  const RoundExtents& e = round.extents;
  const int32_t* fields = round.work_chunks + chunk * kChunkFields;
  const int32_t source = fields[0];
  expect_range("work_chunks", chunk * kChunkFields, source, -e.agents, e.masters - 1);
  const int32_t* indptr = source >= 0 ? round.master_page_indptr : round.own_page_indptr;
  const int64_t list = source >= 0 ? source : -1 - static_cast<int64_t>(source);
  const int64_t rows =
      source >= 0 ? (indptr[list + 1] - indptr[list]) * e.block_size : round.own_length[list];
  expect_range("work_chunks", chunk * kChunkFields + 2, fields[2], 0, rows);
  expect_range("work_chunks", chunk * kChunkFields + 1, fields[1], 0, fields[2]);
  if (fields[3] != indptr[list]) {
    fail_field("work_chunks", chunk * kChunkFields + 3,
               "the beginning of the source's page list, " + std::to_string(indptr[list]),
               fields[3]);
  }
}

// Uses by which the rows of an item see a chunk of a Master.
void check_uses_of_chunk(const RoundView& round, const int32_t* item, int64_t chunk) {
  const int32_t master = round.work_chunks[chunk * kChunkFields];
  if (master < 0) return;
  const int64_t begin = item[5] + (chunk - item[2]) * item[6];
  for (int64_t i = 0; i < item[1] - item[0]; ++i) {
    const int64_t at = begin + std::min<int64_t>(i, item[6] - 1);
    const int32_t use = round.work_uses[at];
    if (use == -1) continue;
    expect_range("work_uses", at, use, 0, round.extents.uses - 1);
    const int32_t agent = round.row_agent[round.work_rows[item[0] + i]];
    if (round.use_agent[use] != agent || round.use_master[use] != master) {
      fail_field("work_uses", at,
                 "agent " + std::to_string(agent) + "'s use of Master " + std::to_string(master),
                 use);
    }
  }
}

void check_work(const RoundView& round) {
  const RoundExtents& e = round.extents;
  for (int64_t item = 0; item < e.work; ++item) {
    const int32_t* fields = round.work + item * kWorkFields;
    const int64_t at = item * kWorkFields;
    expect_range("work", at + 1, fields[1], 0, e.work_rows);
    expect_range("work", at, fields[0], 0, fields[1]);
    if (fields[0] == fields[1]) continue;
    expect_range("work", at + 3, fields[3], 0, e.work_chunks);
    expect_range("work", at + 2, fields[2], 0, fields[3]);
    // Negative: the item writes output, no partials.
    expect_range("work", at + 4, fields[4], INT32_MIN,
                 std::max<int64_t>(-1, e.partials - (fields[1] - fields[0])));
    int64_t previous = -1;
    for (int64_t i = fields[0]; i < fields[1]; ++i) {
      expect_range("work_rows", i, round.work_rows[i], previous + 1, e.rows - 1);
      previous = round.work_rows[i];
      if (round.row_agent[previous] < 0) {
        fail_field("work_rows", i, "a row that is not padding", previous);
      }
    }
    if (fields[2] == fields[3]) continue;
    const int64_t rows = fields[1] - fields[0];
    if (fields[6] != 1) expect_range("work", at + 6, fields[6], rows, rows);
    expect_range("work", at + 5, fields[5], 0,
                 e.work_uses - static_cast<int64_t>(fields[3] - fields[2]) * fields[6]);
    for (int64_t chunk = fields[2]; chunk < fields[3]; ++chunk) {
      check_chunk(round, chunk);
      check_uses_of_chunk(round, fields, chunk);
    }
  }
}

const char* const kExtentNames[kNumExtents] = {
    "rows", "uses",      "use_pages",   "agents",    "masters",  "master_pages", "own_pages",
    "work", "work_rows", "work_chunks", "work_uses", "partials", "block_size"};

template <typename Int>
BasicRoundView<Int> checked_view(Int* base, const Tensor& round, const RoundExtents& extents,
                                 const Tensor& other) {
  BasicRoundView<Int> view;
  const int64_t length = make_round_view<Int>(base, extents, &view);
  Dimensions dims;
  Argument("round", round)
      .device_of(other)
      .dtype(ScalarType::Int)
      .shape(dims, {length})
      .contiguous();
  if (reinterpret_cast<uintptr_t>(base) % (kFieldAlignment * sizeof(Int)) != 0) {
    fail("round: expected memory aligned to 16 bytes, got ", static_cast<const void*>(base));
  }
  return view;
}

}  // namespace

RoundExtents round_extents(const std::vector<int64_t>& extents) {
  expect(extents.size() == kNumExtents, "extents",
         std::to_string(kNumExtents) + " entries of round version " + std::to_string(kRoundVersion),
         extents.size());
  for (int i = 0; i < kNumExtents; ++i) {
    // Below 2^31, no product of two extents overflows.
    if (extents[i] < 0 || extents[i] > INT32_MAX) {
      fail("extents (", kExtentNames[i], "): expected 0 to ", INT32_MAX, ", got ", extents[i]);
    }
  }
  const int64_t block_size = extents[kNumExtents - 1];
  expect(block_size == 8 || block_size == 16 || block_size == 32, "extents (block_size)",
         "8, 16 or 32", block_size);
  return {extents[0], extents[1], extents[2], extents[3],  extents[4],  extents[5], extents[6],
          extents[7], extents[8], extents[9], extents[10], extents[11], extents[12]};
}

RoundView round_view(const Tensor& round, const RoundExtents& extents, const Tensor& other) {
  return checked_view(static_cast<const int32_t*>(round.const_data_ptr()), round, extents, other);
}

MutableRoundView mutable_round_view(const Tensor& round, const RoundExtents& extents,
                                    const Tensor& other) {
  return checked_view(static_cast<int32_t*>(round.mutable_data_ptr()), round, extents, other);
}

void check_round(const RoundView& round, int64_t num_pages, const RopeTables& rope,
                 const RoundReads& reads) {
  const RoundExtents& e = round.extents;
  check_indptr("master_page_indptr", round.master_page_indptr, e.masters, e.master_pages);
  check_page_ids("master_pages", round.master_pages, 0, round.master_page_indptr[e.masters],
                 num_pages);
  check_indptr("own_page_indptr", round.own_page_indptr, e.agents, e.own_pages);
  check_uses(round, rope);
  if (reads.masks) check_masks(round);
  if (reads.own_rows) {
    check_own_rows(round, reads.masks, rope);
    for (int64_t agent = 0; agent < e.agents; ++agent) {
      const int64_t begin = round.own_page_indptr[agent];
      check_page_ids("own_pages", round.own_pages, begin,
                     begin + pages_of(round.own_length[agent], e.block_size), num_pages);
    }
  }
  if (reads.own_pages) {
    check_page_ids("own_pages", round.own_pages, 0, round.own_page_indptr[e.agents], num_pages);
  }
  if (reads.query) {
    check_query_rows(round, rope);
    check_work(round);
  }
}

}  // namespace tokendance
