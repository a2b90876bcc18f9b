// Checks of the packed round (tokendance/round.h).
#pragma once

#include <vector>

#include "ops/check.h"
#include "tokendance/round.h"

namespace tokendance {

// `extents` as a struct: kNumExtents entries, none negative, block_size 8, 16 or 32.
RoundExtents round_extents(const std::vector<int64_t>& extents);

// `round`: int32, contiguous, of the length that the extents give, on the device of `other`.
RoundView round_view(const Tensor& round, const RoundExtents& extents, const Tensor& other);
MutableRoundView mutable_round_view(const Tensor& round, const RoundExtents& extents,
                                    const Tensor& other);

// What an operator reads of a round, and so what check_round verifies besides the uses and Masters.
struct RoundReads {
  bool masks;      // use_masks
  bool own_rows;   // own_length, own_position and the pages that these fill
  bool own_pages;  // all pages of own rows, to be written
  bool query;      // row_* and the work list
};

// Verifies the contents of a round in host memory: ranges ascend and stay within their fields,
// every page id is below num_pages, every index names what is there, uses of one agent are
// disjoint, rows before position 0 are hidden, shifts and positions are within the tables, no own
// row stands where a use shows a row. O(length of the round). The errors name the field:
// "round.use_length[3]: ...".
void check_round(const RoundView& round, int64_t num_pages, const RopeTables& rope,
                 const RoundReads& reads);

}  // namespace tokendance
