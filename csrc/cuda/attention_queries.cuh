// A warp's queries, turned towards the rows of a source: R(p) R(-shift), rounded once, into shared
// memory.
//
// A key of row j stands rotated by R(origin + j), and its reader at position p wants it rotated by
// R(delta + j), which is R(shift) further. So the query is turned back instead: one product of 16
// query rows with all keys of the source, however their readers moved it.
//
// Heads of a row of the round turn alike. So a lane has the same pairs of dims of some adjacent
// query rows: it looks up and combines angles where position or shift change from one row to the
// next, once for all of them where a group has as many heads. Queries go by cp.async to where they
// will stand, and are turned there: so all of their loads and those of the first angles, 16 bytes
// each, are under way at once, and no registers wait for them but those of the angles.
#pragma once

#include <stdint.h>

#include "cuda/attention_block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vector_io.cuh"
#include "tokendance/params.h"
#include "tokendance/rope.h"

namespace tokendance::cuda {

// Of 16 query rows of a block's warp.
template <typename Block>
class QueryTurn {
 public:
  using Products = typename Block::Products;
  using Query = typename Block::Query;
  using T = typename Block::T;

  // Row i turns where bit i of `turning` is set.
  static __device__ __forceinline__ void run(const CollectiveAttentionParams& p, const Turn* turns,
                                             uint32_t turning, Query* queries, uint32_t lane) {
    if (are_vectors(p)) {
      turn_vectors(p, turns, turning, queries, lane);
    } else {
      turn_elements(p, turns, turning, queries, lane);
    }
  }

 private:
  static constexpr int kHeadDim = Block::kHeadDim;
  using Rows = SwizzledRows<Query, kHeadDim>;
  static constexpr uint32_t kVector = 16 / sizeof(T);

  // Two vectors of a row, whose elements make pairs, are a lane's; a pass has some of them.
  static constexpr uint32_t kColumns = kHeadDim / 2 / kVector;
  static constexpr uint32_t kPasses = (kColumns + 7) / 8;
  static constexpr uint32_t kColumnsOfPass = kColumns / kPasses;
  static_assert(kColumnsOfPass * kPasses == kColumns && kColumnsOfPass >= 4, "passes are alike");
  // 8 lanes store 16 bytes each at a time, to 8 distinct groups of banks: to one row, or to halves
  // of two rows that differ by 4.
  static constexpr uint32_t kLanes = kColumnsOfPass > 4 ? 8 : 4;    // that share a row
  static constexpr uint32_t kRows = kMmaRows * kLanes / kWarpSize;  // of a lane

  // Sums and queries of these dims leave registers for half of a vector's angles at a time.
  static constexpr bool kFewRegisters = kHeadDim == 96 || Block::kHasFewRegisters;

  // The rows of a group of lanes are first ^ i. Where even and odd dims lie apart 16 lanes store 8
  // bytes each: to two rows that are not both even or odd, for one group begins at its last row.
  struct RowsOfGroup {
    uint32_t first;
    uint32_t wanted;  // bit i: the i-th turns
  };
  static __device__ __forceinline__ RowsOfGroup rows_of(uint32_t lane, uint32_t turning) {
    const uint32_t group = lane / kLanes;
    const uint32_t lowest =
        kLanes == 8 ? group * kRows : group / 4 * 8 + group % 2 * 4 + group / 2 % 2 * 2;
    // Lanes without columns have no rows.
    if (kColumnsOfPass < kLanes && lane % kLanes >= kColumnsOfPass) turning = 0;
    if (Products::kPartsQueries && (kLanes == 8 ? group : group / 2) % 2) {
      const uint32_t last = lowest + kRows - 1;
      return {last, __brev(turning) >> (31 - last)};
    }
    return {lowest, turning >> lowest};
  }

  // Whether queries and tables consist of aligned vectors.
  static __device__ __forceinline__ bool are_vectors(const CollectiveAttentionParams& p) {
    const uint64_t addresses = reinterpret_cast<uint64_t>(p.q) |
                               reinterpret_cast<uint64_t>(p.rope.cos) |
                               reinterpret_cast<uint64_t>(p.rope.sin);
    const int64_t elements = p.q_row_stride | p.q_head_stride | p.rope.rotary_dim / 2;
    return addresses % 16 == 0 && elements % kVector == 0;
  }

  static __device__ __forceinline__ const T* query(const void* q, const Turn& turn) {
    uint64_t offset;
    asm("mov.b64 %0, {%1, %2};" : "=l"(offset) : "r"(turn.offset[0]), "r"(turn.offset[1]));
    return reinterpret_cast<const T*>(static_cast<const char*>(q) + offset);
  }

  // By vectors ----------------------------------------------------------------------------------

  // The two vectors of a row that a lane has, and the pairs whose angles it needs. Interleaved
  // pairs, and dims that stay as they are, make them adjacent.
  struct Share {
    uint32_t x, y;  // vectors of the row
    uint32_t pair;
    bool rotates;
  };
  static __device__ __forceinline__ Share share_of(const RopeTables& rope, uint32_t pass,
                                                   uint32_t lane) {
    const uint32_t half = static_cast<uint32_t>(rope.rotary_dim) / 2;
    const uint32_t column = pass * kColumnsOfPass + lane % kLanes;
    const bool rotates = column * kVector < half;
    const bool adjacent = rope.interleaved || !rotates;
    return {adjacent ? 2 * column : column, adjacent ? 2 * column + 1 : column + half / kVector,
            column * kVector, rotates};
  }

  // Where piece `index` of a group's i-th row stands: in the place of the first row's, but for the
  // row and the order of its pieces, both of which are numbers of bits.
  static __device__ __forceinline__ Query* place(Query* queries, uint32_t first, uint32_t i,
                                                 uint32_t index) {
    constexpr uint32_t kRow = kHeadDim * sizeof(Query);
    const uint32_t of_first = Rows::piece(first, index) * static_cast<uint32_t>(sizeof(Query));
    uint32_t offset;
    if constexpr ((kRow & (kRow - 1)) == 0) {
      offset = of_first ^ (i * kRow + Rows::order(i) * 16);
    } else {
      offset = (of_first ^ Rows::order(i) * 16) + ((first ^ i) - first) * kRow;
    }
    return reinterpret_cast<Query*>(reinterpret_cast<char*>(queries) + offset);
  }

  static __device__ __forceinline__ void turn_vectors(const CollectiveAttentionParams& p,
                                                      const Turn* turns, uint32_t turning,
                                                      Query* queries, uint32_t lane) {
    const RowsOfGroup rows = rows_of(lane, turning);
    Share share = share_of(p.rope, 0, lane);
#pragma unroll 1
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      if (pass > 0) share = share_of(p.rope, pass, lane);
      start_copies(p.q, turns, queries, rows, share);
    }
    if (kPasses > 1) share = share_of(p.rope, 0, lane);
#pragma unroll 1
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      if (pass > 0) share = share_of(p.rope, pass, lane);
      turn_rows(p, turns, queries, rows, share);
    }
  }

  static __device__ __forceinline__ void start_copies(const void* q, const Turn* turns,
                                                      Query* queries, const RowsOfGroup& rows,
                                                      const Share& share) {
    const T* const x = static_cast<const T*>(q) + share.x * kVector;
    const T* const y = static_cast<const T*>(q) + share.y * kVector;
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      const Turn turn = load_whole(turns + (rows.first ^ i));
      if ((rows.wanted >> i & 1) == 0) continue;
      cp_async_16(place(queries, rows.first, i, share.x), query(x, turn));
      cp_async_16(place(queries, rows.first, i, share.y), query(y, turn));
    }
    cp_async_commit();
  }

  // R(p) R(-shift), times the attention factor, for a vector of pairs.
  struct Angles {
    float cos[kVector], sin[kVector];
  };
  static __device__ __forceinline__ void find_angles(const CollectiveAttentionParams& p,
                                                     const Turn& turn, uint32_t pair,
                                                     Angles& angles) {
    const uint64_t half = static_cast<uint32_t>(p.rope.rotary_dim) / 2;
    const uint64_t at = half * static_cast<uint32_t>(turn.position) + pair;
    const uint64_t back_at = half * static_cast<uint32_t>(abs(turn.shift)) + pair;
    const float sign = turn.shift < 0 ? -1.0f : 1.0f;
    constexpr uint32_t kStep = kFewRegisters ? 4 : kVector;
#pragma unroll
    for (uint32_t first = 0; first < kVector; first += kStep) {
      float cos[kStep], sin[kStep], back_cos[kStep], back_sin[kStep];
      load_floats<kStep>(p.rope.cos + at + first, cos);
      load_floats<kStep>(p.rope.sin + at + first, sin);
      load_floats<kStep>(p.rope.cos + back_at + first, back_cos);
      load_floats<kStep>(p.rope.sin + back_at + first, back_sin);
#pragma unroll
      for (uint32_t i = 0; i < kStep; ++i) {
        const Angle back = {back_cos[i], rounded_product(back_sin[i], sign)};
        const Angle angle = counter_rotation({cos[i], sin[i]}, back);
        angles.cos[first + i] = angle.cos;
        angles.sin[first + i] = angle.sin;
      }
    }
    if (p.attention_factor == 1.0f) return;
#pragma unroll
    for (uint32_t i = 0; i < kVector; ++i) {
      angles.cos[i] = rounded_product(angles.cos[i], p.attention_factor);
      angles.sin[i] = rounded_product(angles.sin[i], p.attention_factor);
    }
  }

  // One row after the other, as soon as the copies are there. Others' dims that stay as they are
  // are in their places already, but for their type and their parts.
  static __device__ __forceinline__ void turn_rows(const CollectiveAttentionParams& p,
                                                   const Turn* turns, Query* queries,
                                                   const RowsOfGroup& rows, const Share& share) {
    Angles angles;
    int32_t position = -1, shift = kNoShift;  // that these are of
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      const Turn turn = load_whole(turns + (rows.first ^ i));
      const bool turns_row = rows.wanted >> i & 1;
      if (turns_row && share.rotates && (turn.position != position || turn.shift != shift)) {
        position = turn.position;
        shift = turn.shift;
        find_angles(p, turn, share.pair, angles);
      }
      cp_async_wait<0>();
      turn_row(p.rope.interleaved, angles, queries, rows.first, i, share, turns_row);
    }
  }

  static __device__ __forceinline__ void turn_row(bool interleaved, const Angles& angles,
                                                  Query* queries, uint32_t first, uint32_t i,
                                                  const Share& share, bool turns) {
    float values[2][kVector];
    if constexpr (Products::kPartsQueries) {
      if (turns) {
        load(place(queries, first, i, share.x), values[0]);
        load(place(queries, first, i, share.y), values[1]);
      }
      __syncwarp();  // neighbours have their shares: parts of this one's go there
      if (!turns) return;
      if (share.rotates) rotate(interleaved, angles, values);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t vector = j == 0 ? share.x : share.y;
        store_parted(place(queries, first, i, vector & ~1u), place(queries, first, i, vector | 1),
                     vector % 2 * 4, values[j]);
      }
    } else if (turns && share.rotates) {
      Query* const x = place(queries, first, i, share.x);
      Query* const y = place(queries, first, i, share.y);
      load(x, values[0]);
      load(y, values[1]);
      rotate(interleaved, angles, values);
      store(x, values[0]);
      store(y, values[1]);
    }
  }

  static __device__ __forceinline__ void rotate(bool interleaved, const Angles& angles,
                                                float (&values)[2][kVector]) {
    constexpr uint32_t kHalf = kVector / 2;
    if (interleaved) {
#pragma unroll
      for (uint32_t i = 0; i < kVector; ++i) {
        float& x = values[i / kHalf][i % kHalf * 2];
        float& y = values[i / kHalf][i % kHalf * 2 + 1];
        rotate_pair({angles.cos[i], angles.sin[i]}, x, y, &x, &y);
      }
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kVector; ++i) {
        float &x = values[0][i], &y = values[1][i];
        rotate_pair({angles.cos[i], angles.sin[i]}, x, y, &x, &y);
      }
    }
  }

  static __device__ __forceinline__ void load(const Query* from, float (&values)[kVector]) {
    unpack(load_vector<T, kVector>(reinterpret_cast<const T*>(from)), values);
  }

  static __device__ __forceinline__ void store(Query* to, const float (&values)[kVector]) {
    Vector<Query, kVector> rounded;
    pack(values, &rounded);
    store_vector<Query, kVector>(to, rounded);
  }

  // Of 8 adjacent dims the even ones and the odd ones, to halves of two pieces.
  static __device__ __forceinline__ void store_parted(Query* even, Query* odd, uint32_t at,
                                                      const float (&values)[kVector]) {
    *reinterpret_cast<uint2*>(even + at) =
        make_uint2(pack_pair<Query>(values[0], values[2]), pack_pair<Query>(values[4], values[6]));
    *reinterpret_cast<uint2*>(odd + at) =
        make_uint2(pack_pair<Query>(values[1], values[3]), pack_pair<Query>(values[5], values[7]));
  }

  // Element by element --------------------------------------------------------------------------

  // Where something is not aligned, or half the rotary dims are not whole vectors.
  static __device__ __forceinline__ void turn_elements(const CollectiveAttentionParams& p,
                                                       const Turn* turns, uint32_t turning,
                                                       Query* queries, uint32_t lane) {
    const uint32_t half = static_cast<uint32_t>(p.rope.rotary_dim) / 2;
#pragma unroll 1
    for (uint32_t index = lane; index < kMmaRows * kHeadDim / 2; index += kWarpSize) {
      const uint32_t row = index / (kHeadDim / 2), pair = index % (kHeadDim / 2);
      if ((turning >> row & 1) == 0) continue;
      const Turn turn = load_whole(turns + row);
      // Dims that stay as they are make pairs of neighbours.
      const bool rotates = pair < half;
      const bool adjacent = p.rope.interleaved || !rotates;
      const uint32_t x_dim = adjacent ? 2 * pair : pair;
      const uint32_t y_dim = adjacent ? 2 * pair + 1 : pair + half;
      float x[1], y[1];
      unpack(load_vector<T, 1>(query(p.q, turn) + x_dim), x);
      unpack(load_vector<T, 1>(query(p.q, turn) + y_dim), y);
      if (rotates) {
        const int64_t at = int64_t{turn.position} * half + pair;
        const int64_t back_at = int64_t{abs(turn.shift)} * half + pair;
        const Angle angle = {__ldg(p.rope.cos + at), __ldg(p.rope.sin + at)};
        const Angle back =
            angle_of_shift(__ldg(p.rope.cos + back_at), __ldg(p.rope.sin + back_at), turn.shift);
        rotate_pair(counter_rotation(angle, back), x[0], y[0], &x[0], &y[0]);
        x[0] = rounded_product(x[0], p.attention_factor);
        y[0] = rounded_product(y[0], p.attention_factor);
      }
      store_element(queries, row, x_dim, x);
      store_element(queries, row, y_dim, y);
    }
  }

  static __device__ __forceinline__ void store_element(Query* queries, uint32_t row, uint32_t dim,
                                                       const float (&value)[1]) {
    Vector<Query, 1> rounded;
    pack(value, &rounded);
    store_vector<Query, 1>(queries + Rows::element(row, Products::query_place(dim)), rounded);
  }
};

// Turns the warp's queries to the source of a chunk, whose sights are a set. Those that stand so
// already, and those that do not see it, stay.
template <typename Block>
__device__ __forceinline__ void turn_queries(const CollectiveAttentionParams& p, int32_t set,
                                             const Place& here) {
  const int32_t row = here.lane % Block::kWarpRows;
  Turn* const turns = Block::turns(here.warp);
  const int32_t shift = load_whole(Block::sights(set, here.warp) + row).shift;
  Turn stands = load_whole(turns + row);
  const bool turn = shift != kNoShift && shift != stands.shift;
  const uint32_t turning = __ballot_sync(kAllLanes, turn);
  if (turning == 0) return;
  __syncwarp();  // all lanes have compared
  stands.shift = shift;
  if (turn && here.lane < Block::kWarpRows) turns[row] = stands;
  __syncwarp();  // all lanes see how, and are done with the queries
#pragma unroll 1
  for (int32_t first = 0; first < Block::kWarpRows; first += kMmaRows) {
    const uint32_t of_these = turning >> first & 0xffff;
    if (Block::kWarpRows > kMmaRows && of_these == 0) continue;
    QueryTurn<Block>::run(p, turns + first, of_these,
                          Block::queries(here.warp) + first * Block::kHeadDim,
                          recomputed<kWarpSize>(here.lane));
  }
  __syncwarp();  // all lanes see the queries
}

}  // namespace tokendance::cuda
