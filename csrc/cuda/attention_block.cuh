// A block of collective_attention: its types, and what lies where in its shared memory.
//
// Every warp has 16 query rows for itself, or 32 in a tall tile, from the rotation to the result:
// warps share nothing but the stages, and what each of them sees of a chunk.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda/attention_products.cuh"
#include "cuda/collective_attention_plan.h"
#include "cuda/ptx.cuh"
#include "tokendance/params.h"

namespace tokendance::cuda {

// A query row: a row of the round and a query head.
struct QueryRow {
  int32_t row;
  int32_t head;
  int32_t agent;  // or one of the following
  int32_t slot;   // of the row, in its item
};
constexpr int32_t kBlind = -1;  // the row sees nothing: it has no angle, or no such agent
constexpr int32_t kNoRow = -2;  // there is none, the tile is not full

// What a query row sees of a chunk.
struct Sight {
  int32_t low, high;  // rows of the source; low > high: none
  int32_t masks;      // where the override masks of its use begin, -1 = none
  int32_t shift;      // to which its query is to be turned, 0 for own rows; or kNoShift
};

// How a query row stands in shared memory.
struct Turn {
  uint32_t offset[2];  // of the query in q, in bytes: lower and upper half
  int32_t position;
  int32_t shift;  // for which it is turned, or kNoShift
};
constexpr int32_t kNoShift = -2147483647 - 1;  // the query may be as it is

// Reads such a struct of shared memory whole: parts of adjacent ones would meet in the same banks.
template <typename Struct>
__device__ __forceinline__ Struct load_whole(const Struct* pointer) {
  static_assert(sizeof(Struct) == sizeof(int4), "one access");
  const int4 words = load_shared_16(pointer);
  Struct loaded;
  memcpy(&loaded, &words, sizeof(loaded));
  return loaded;
}

// A thread's place in the block, and the block's.
struct Place {
  int32_t lane;
  int32_t warp;
  int32_t kv_head;
  int32_t page_shift;  // log2 of the rows of a page

  __device__ __forceinline__ explicit Place(const CollectiveAttentionParams& p)
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        kv_head(blockIdx.x % static_cast<uint32_t>(p.num_kv_heads)),
        page_shift(3 + (p.round.extents.block_size > 8) + (p.round.extents.block_size > 16)) {}
};

// `kRowsOfWarp`: query rows of a warp, one or two times those of an mma.
template <typename Element, typename PoolElement, int kDims, int kRowsOfWarp>
struct AttentionBlock {
  using T = Element;         // of queries and outputs
  using Pool = PoolElement;  // of keys and values
  static constexpr int kHeadDim = kDims;
  static constexpr int kWarpRows = kRowsOfWarp;
  static constexpr AttentionShape kShape{sizeof(T), sizeof(Pool), kHeadDim, kWarpRows};
  static constexpr int kKeys = kShape.keys;
  // None are left for addresses, or for all of a vector's angles at once.
  static constexpr bool kHasFewRegisters = kHeadDim == 256 || kWarpRows > kMmaRows;
  using Products = AttentionProducts<Pool, kHeadDim, kKeys, kWarpRows / kMmaRows>;
  using Scores = typename Products::Scores;
  using Query = typename Products::Query;
  using QueryRows = SwizzledRows<T, kHeadDim>;  // of outputs, too
  static_assert(sizeof(Query) == sizeof(T), "outputs take the place of queries");

  // Of a warp.
  template <typename As = Query>
  static __device__ __forceinline__ As* queries(int32_t warp) {
    return shared_at<As>(warp * kWarpRows * kHeadDim * static_cast<int32_t>(sizeof(As)));
  }
  static __device__ __forceinline__ Pool* stage(int32_t index) {
    return shared_at<Pool>(kShape.query_bytes + index * kShape.stage_bytes);
  }
  static __device__ __forceinline__ QueryRow* query_rows(int32_t warp) {
    return shared_at<QueryRow>(kRowsAt) + warp * kWarpRows;
  }
  static __device__ __forceinline__ Turn* turns(int32_t warp) {
    return shared_at<Turn>(kRowsAt + kShape.row_bytes) + warp * kWarpRows;
  }
  // Of the tile that is multiplied and of the one that is copied: their chunks may be two.
  static __device__ __forceinline__ Sight* sights(int32_t set, int32_t warp) {
    return shared_at<Sight>(kRowsAt + (2 + set) * kShape.row_bytes) + warp * kWarpRows;
  }
  // What each warp sees of a chunk.
  static __device__ __forceinline__ int2* ranges(int32_t set) {
    return shared_at<int2>(kRowsAt + 4 * kShape.row_bytes) + set * kShape.warps;
  }

 private:
  static constexpr int32_t kRowsAt = kShape.query_bytes + kAttentionStages * kShape.stage_bytes;

  template <typename As>
  static __device__ __forceinline__ As* shared_at(int32_t offset) {
    extern __shared__ __align__(16) unsigned char shared[];
    return reinterpret_cast<As*>(shared + offset);
  }
};

}  // namespace tokendance::cuda
