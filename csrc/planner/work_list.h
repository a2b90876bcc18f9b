// The work list of collective attention: which query rows meet which pages in one work item.
//
// An item is a tile of query rows, possibly of many agents, and a list of page ranges (chunks) that
// all of them meet, each with the uses by which they do. The softmax state of a row stays in the
// item over all its chunks, so a row has one partial result per item that it is in, never one per
// use.
//
// - An agent whose rows nearly fill a tile (prefill) has tiles of its own: adjacent rows, all their
//   Masters and own rows in one item, nothing to merge. Such work is bound by arithmetic, which
//   other agents' rows in the tile could not save. Pages that no row of the tile sees are left out.
// - Agents with fewer rows (decode) are put together, those that share the most Master pages first,
//   and their rows cut into tiles of equal height. Masters that two or more agents of a tile see
//   are met by the whole tile at once: the shared item, read once for all. Masters that only one of
//   them sees go with its own rows into an item of its own. A row then has one partial of each.
// - An item that costs more than its share of the step is split into page ranges of equal length.
//
// Items are in descending order of cost, so that the last to start are the shortest; those of one
// cost in the order of the pages that they read, so that several tiles' items that read the same
// ones run together. Everything is deterministic and takes time proportional to rows + uses +
// chunks and their uses, and to the square of the number of agents that are put together.
#pragma once

#include <stdint.h>

#include <vector>

namespace tokendance {

// Arrays as in round.h. Positions may be known only as bounds (rows that a device selects later):
// row_position and own_position are then lower bounds, the arrays of upper bounds are given beside
// them, and all of them ascend within an agent.
struct WorkListInput {
  int64_t num_rows;
  const int32_t* row_agent;           // [R] -1 = padding
  const int32_t* row_position;        // [R]
  const int32_t* row_position_bound;  // [R] null = row_position is exact
  int64_t num_uses;
  const int32_t* use_agent;  // [U] -1 = padding
  const int32_t* use_master;
  const int32_t* use_delta;
  const int32_t* use_length;
  int64_t num_masters;
  const int32_t* master_page_indptr;  // [M+1]
  int64_t num_agents;
  const int32_t* own_length;          // [N]
  const int32_t* own_page_indptr;     // [N+1]
  const int32_t* own_position;        // [own_page_indptr[N] * block_size]
  const int32_t* own_position_bound;  // the same shape; null = own_position is exact
  int32_t block_size;
  int32_t window;           // 0 = none
  int32_t max_tile_rows;    // query rows of an item: as high as the kernels' tallest tiles
  int32_t read_bound_rows;  // up to so many query rows an item takes as long as reading its pages
  int32_t target_items;     // items that keep the device busy, for one KV head
  int32_t max_splits;       // items that one tile's shared part, or own part, is split into
};

struct WorkList {
  std::vector<int32_t> work;  // [W, kWorkFields]
  std::vector<int32_t> work_rows;
  std::vector<int32_t> work_chunks;         // [WC, kChunkFields]
  std::vector<int32_t> work_uses;           // [WU]
  std::vector<int32_t> row_partial_indptr;  // [R+1]
  std::vector<int32_t> row_partials;        // [P]
};

// Throws std::invalid_argument, naming the array, for an index that is out of range or rows of an
// agent that are not adjacent or do not ascend.
WorkList plan_work(const WorkListInput& input);

// Sizes that no work list exceeds, whatever the positions and Masters of the round are.
struct WorkCapacity {
  int64_t work;
  int64_t work_rows;
  int64_t work_chunks;
  int64_t work_uses;
  int64_t partials;
};
WorkCapacity work_capacity(int64_t agents, int64_t rows, int64_t uses, int64_t masters,
                           int64_t max_tile_rows, int64_t target_items, int64_t max_splits);

}  // namespace tokendance
