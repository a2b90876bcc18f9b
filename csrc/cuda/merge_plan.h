// How partial results are merged: threads of a block, in three dimensions so that none divides.
#pragma once

#include "cuda/launch_plan.h"

namespace tokendance {

constexpr int kMergeThreads = 256;

// x: vectors of 16 bytes of a partial's head; y: groups, which take partials in turn; z: heads.
struct MergeShape {
  int32_t vectors;
  int32_t groups;
  int32_t heads;

  Threads threads() const { return {vectors, groups, heads}; }
};

// For so many heads of all rows, each with so many partials at most. As few groups as make enough
// blocks: groups shorten what a head waits for, and then have to be put together.
inline MergeShape merge_shape(int64_t heads, int64_t partials, int64_t head_dim,
                              int64_t partial_bytes) {
  const int64_t vectors = head_dim * partial_bytes / kVectorBytes;
  int64_t groups = 1;
  while (2 * groups * vectors <= kMergeThreads && groups < partials &&
         heads < kWantedBlocks * (kMergeThreads / (groups * vectors))) {
    groups *= 2;
  }
  return {static_cast<int32_t>(vectors), static_cast<int32_t>(groups),
          static_cast<int32_t>(kMergeThreads / (groups * vectors))};
}

}  // namespace tokendance
