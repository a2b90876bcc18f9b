// Walking through the pages of a round.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include "cpu/simd.h"
#include "tokendance/round.h"

namespace tokendance::TOKENDANCE_ISA {

// The list that entry `at` of a ragged array stands in: indptr[list] <= at < indptr[list + 1].
inline int64_t list_of(const int32_t* indptr, int64_t lists, int64_t at) {
  int64_t low = 0, high = lists;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (middle < lists && indptr[middle] <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The part of a use that lies in one page of its Master.
struct UsePage {
  int64_t agent;
  int64_t shift;
  int64_t position;    // of the page's first row in the agent's prompt
  int64_t mask_index;  // in use_masks
  int32_t rows;        // rows of the page that the use spans, from its first
};

// The part of use `use` (-1: none) of an agent in page `page` of its Master; no rows if it has
// none.
template <typename Round>
TOKENDANCE_INLINE UsePage use_page(const Round& round, int64_t agent, int64_t use, int64_t page) {
  const int64_t block_size = round.extents.block_size;
  const int64_t left = use < 0 ? 0 : round.use_length[use] - page * block_size;
  if (left <= 0) return {agent, 0, 0, 0, 0};
  return {agent, round.use_shift[use], round.use_delta[use] + page * block_size,
          round.use_page_indptr[use] + page,
          static_cast<int32_t>(left < block_size ? left : block_size)};
}

// Calls visit(UsePage) for each agent that uses page `page` of Master `master`, in order.
template <typename Round, typename Visit>
inline void for_each_use_of_page(const Round& round, int64_t master, int64_t page,
                                 const Visit& visit) {
  for (int64_t agent = 0; agent < round.extents.agents; ++agent) {
    const int64_t use = round.agent_use[agent * round.extents.masters + master];
    const UsePage part = use_page(round, agent, use, page);
    if (part.rows > 0) visit(part);
  }
}

// Bits [begin, end) of a page's rows.
TOKENDANCE_INLINE uint32_t row_bits(int64_t begin, int64_t end) {
  if (end <= begin) return 0;
  return static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1));
}

}  // namespace tokendance::TOKENDANCE_ISA
