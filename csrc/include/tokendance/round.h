// The round as the operators see it: one packed int32 buffer of named fields.
//
// Every operator that reads a round takes this buffer and the capacities of its fields. One buffer
// means one host-to-device copy per step and one stable address for a CUDA graph; fields are padded
// to their capacities, so that a launch does not depend on how full a round is.
//
// Terms: docs/index.md. A *Master of the round* is a page list that uses refer to; a Master that
// one prompt uses twice stands twice in the list, so (agent, Master) names at most one use.
#pragma once

#include <stdint.h>

namespace tokendance {

// Capacities of the packed fields, in the order in which operators take them as `SymInt[] extents`.
struct RoundExtents {
  int64_t rows;          // R: query rows of the step
  int64_t uses;          // U: uses
  int64_t use_pages;     // UP: override masks, one per use and page
  int64_t agents;        // N
  int64_t masters;       // M: Masters of the round
  int64_t master_pages;  // MP: pages of all Masters
  int64_t own_pages;     // OP: pages of own rows of all agents
  int64_t work;          // W: work items of collective attention
  int64_t work_rows;     // WR: query rows of all work items
  int64_t work_chunks;   // WC: ranges of stored rows of all work items
  int64_t work_uses;     // WU: uses by which work items' rows see their chunks
  int64_t partials;      // P: partial results that the last pass merges
  int64_t block_size;    // rows of a page: 8, 16 or 32
};
constexpr int kNumExtents = 13;

// Of the fields and extents below; a change of either counts it up (CHANGELOG.md).
constexpr int kRoundVersion = 2;

constexpr int kAgentUseFields = 2;  // ints per entry, see BasicRoundView::agent_use
constexpr int kWorkFields = 8;      // ints per work item, see BasicRoundView::work
constexpr int kChunkFields = 4;     // ints per chunk, see BasicRoundView::work_chunks

// Pointers into the packed buffer. The order of the members is the order of the fields; each field
// starts at a multiple of kFieldAlignment ints, so that vector loads are aligned. An empty slot
// beyond the filled part holds: agent -1, length 0, indptr = the last value, work 0.
template <typename Int>
struct BasicRoundView {
  RoundExtents extents;

  // Query rows of the step. The rows of one agent are adjacent and ascend by position.
  Int* row_agent;     // [R] agent of the row, -1 = padding
  Int* row_position;  // [R] absolute position of the row in its prompt

  // Uses, ascending by (agent, delta). Uses of one agent do not overlap.
  Int* use_agent;        // [U] -1 = padding
  Int* use_master;       // [U] index into the Masters of the round
  Int* use_delta;        // [U] position of Master row 0 in the prompt
  Int* use_shift;        // [U] delta - origin, signed; |shift| < max_position
  Int* use_length;       // [U] rows of the Master that the use spans (a prefix of the Master)
  Int* use_page_indptr;  // [U+1] range of the use in use_masks; its pages are the first
                         // ceil(use_length / block_size) of the Master
  Int* use_masks;        // [UP] override masks: bit i set = row i of that page is hidden and an own
                         // row stands at its position; bits beyond use_length are 0

  Int* agent_use_indptr;  // [N+1] range of the agent's uses, and of their entries in agent_use
  Int* agent_use;         // [U, kAgentUseFields] {Master, the agent's use of it}, ascending by
                          // Master within an agent; -1 = padding

  Int* master_page_indptr;  // [M+1]
  Int* master_pages;        // [MP] page ids; row j of a Master is row j % block_size of its page
                            // j / block_size

  // Own rows of agent a stand, ascending by position, in the pages own_pages[own_page_indptr[a] ..
  // own_page_indptr[a+1]); row i has position own_position[own_page_indptr[a] * block_size + i].
  Int* own_length;       // [N] own rows
  Int* own_page_indptr;  // [N+1]
  Int* own_pages;        // [OP] page ids
  Int* own_position;     // [OP * block_size] absolute positions

  // Work items of collective attention, kWorkFields ints each: {row_begin, row_end (range in
  // work_rows), chunk_begin, chunk_end (range in work_chunks), partial_begin, use_begin,
  // uses_of_chunk, 0}.
  // The item's query rows attend to the item's chunks. partial_begin < 0: the item is the only one
  // of its rows and writes their output; otherwise its i-th row writes partial partial_begin + i.
  // Of each chunk uses_of_chunk entries stand in work_uses, from use_begin on: one per row of the
  // item, or a single one for all of them. So whoever has the item has the addresses of its rows,
  // its chunks and their uses, and asks for them together.
  // An item with row_begin == row_end does nothing; one without chunks gives the result of a row
  // that sees nothing.
  Int* work;       // [W, kWorkFields]
  Int* work_rows;  // [WR] query row ids, ascending within an item
  // {source, row_begin, row_end, page_list}. source m >= 0: rows row_begin .. row_end of Master m,
  // which a row sees through its agent's use of m. source -1 - a: own rows of agent a, which only
  // rows of agent a see. page_list is where the page list of the source begins in master_pages or
  // own_pages: what its indptr says, for the chunk's row j stands in page j / block_size from
  // there.
  Int* work_chunks;         // [WC, kChunkFields]
  Int* work_uses;           // [WU] uses of chunks of Masters; -1 = the row's agent has none. Of own
                            // rows -1
  Int* row_partial_indptr;  // [R+1] range in row_partials; empty = no merge for this row
  Int* row_partials;        // [P] partials of a row, in the order in which they are merged
};
using RoundView = BasicRoundView<const int32_t>;
using MutableRoundView = BasicRoundView<int32_t>;

constexpr int64_t kFieldAlignment = 4;

// Lays the fields out from `base`; returns the length of the buffer in ints. `base` may be null
// when only the length is wanted.
template <typename Int>
inline int64_t make_round_view(Int* base, const RoundExtents& e, BasicRoundView<Int>* view) {
  int64_t at = 0;
  auto take = [&](int64_t count) {
    Int* field = base ? base + at : nullptr;
    at += (count + kFieldAlignment - 1) / kFieldAlignment * kFieldAlignment;
    return field;
  };
  view->extents = e;
  view->row_agent = take(e.rows);
  view->row_position = take(e.rows);
  view->use_agent = take(e.uses);
  view->use_master = take(e.uses);
  view->use_delta = take(e.uses);
  view->use_shift = take(e.uses);
  view->use_length = take(e.uses);
  view->use_page_indptr = take(e.uses + 1);
  view->use_masks = take(e.use_pages);
  view->agent_use_indptr = take(e.agents + 1);
  view->agent_use = take(e.uses * kAgentUseFields);
  view->master_page_indptr = take(e.masters + 1);
  view->master_pages = take(e.master_pages);
  view->own_length = take(e.agents);
  view->own_page_indptr = take(e.agents + 1);
  view->own_pages = take(e.own_pages);
  view->own_position = take(e.own_pages * e.block_size);
  view->work = take(e.work * kWorkFields);
  view->work_rows = take(e.work_rows);
  view->work_chunks = take(e.work_chunks * kChunkFields);
  view->work_uses = take(e.work_uses);
  view->row_partial_indptr = take(e.rows + 1);
  view->row_partials = take(e.partials);
  return at;
}

}  // namespace tokendance
