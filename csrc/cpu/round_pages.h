// Walking through the pages of a round.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <numeric>
#include <span>
#include <vector>

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

// The uses of each Master, ascending by agent: whoever walks through Masters meets only the agents
// that use them.
class MasterUses {
 public:
  template <typename Round>
  explicit MasterUses(const Round& round) : end_(round.extents.masters) {
    uses_.resize(round.agent_use_indptr[round.extents.agents]);
    for (size_t use = 0; use < uses_.size(); ++use) ++end_[round.use_master[use]];
    std::exclusive_scan(end_.begin(), end_.end(), end_.begin(), 0);
    for (size_t use = 0; use < uses_.size(); ++use) {
      uses_[end_[round.use_master[use]]++] = static_cast<int32_t>(use);
    }
  }

  std::span<const int32_t> of(int64_t master) const {
    const int32_t begin = master > 0 ? end_[master - 1] : 0;
    return std::span(uses_).subspan(begin, end_[master] - begin);
  }

 private:
  std::vector<int32_t> end_;  // of the range in uses_ of each Master
  std::vector<int32_t> uses_;
};

// The part of a use that lies in one page of its Master.
struct UsePage {
  int64_t agent;
  int64_t shift;
  int64_t position;    // of the page's first row in the agent's prompt
  int64_t mask_index;  // in use_masks
  int32_t rows;        // rows of the page that the use spans, from its first
};

// The part of a use in page `page` of its Master; no rows if it has none.
template <typename Round>
TOKENDANCE_INLINE UsePage use_page(const Round& round, int64_t use, int64_t page) {
  const int64_t block_size = round.extents.block_size;
  const int64_t left = round.use_length[use] - page * block_size;
  if (left <= 0) return {round.use_agent[use], 0, 0, 0, 0};
  return {round.use_agent[use], round.use_shift[use], round.use_delta[use] + page * block_size,
          round.use_page_indptr[use] + page,
          static_cast<int32_t>(left < block_size ? left : block_size)};
}

// Bits [begin, end) of a page's rows.
TOKENDANCE_INLINE uint32_t row_bits(int64_t begin, int64_t end) {
  if (end <= begin) return 0;
  return static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1));
}

}  // namespace tokendance::TOKENDANCE_ISA
