// The two products of attention on a block of keys: scores, and weights times values.
//
// Two forms. Tall: many query rows, which stand side by side in the lanes; keys are broadcast
// straight from where they lie in the pool, so that nothing is transposed or packed. Flat: few
// query rows; the dims stand in the lanes, and sixteen sums at a time are folded into one vector.
// Values always stand with their dims in the lanes.
//
// Include only from csrc/cpu/kernels: everything stands in the namespace TOKENDANCE_ISA.
#pragma once

#include <algorithm>

#include "cpu/attention_scratch.h"
#include "cpu/lanes.h"

namespace tokendance::TOKENDANCE_ISA {

constexpr int kKeyGroup = 8;        // keys that the tall form takes at a time
constexpr int kMaxFlatQueries = 8;  // query rows that the flat form takes at most

// Keys per group of the tall form's inner loop, so that the sums of three vectors fit the
// registers.
constexpr int kTallKeys = kVectorRegisters >= 32 ? 8 : 4;
constexpr int kStepDims = 16;  // of a step; head dims are a multiple

// The next block's rows, whose cache lines are fetched while a block is multiplied.
//
// Evenly over the steps of a product: a core can wait for some lines at a time, and asking for more
// stops it or is forgotten. In the order of their addresses, so that the hardware's own prefetch
// goes along.
class Ahead {
 public:
  Ahead() = default;
  // `lines` cache lines of each of `count` rows, from `offset` bytes into the row.
  Ahead(const void* const* rows, int count, int lines, int64_t offset)
      : row_(rows), end_(rows + count), lines_(lines), offset_(offset) {}

  int lines() const { return static_cast<int>(end_ - row_) * lines_; }

  // The next `steps` steps fetch `lines` lines.
  void begin(int lines, int steps) {
    due_ = 0;
    per_step_ = lines;
    steps_ = steps;
  }
  TOKENDANCE_INLINE void step() {
    for (due_ += per_step_; due_ >= steps_; due_ -= steps_) fetch();
  }

 private:
  TOKENDANCE_INLINE void fetch() {
    if (next_ == row_end_) {
      if (row_ == end_) return;
      next_ = static_cast<const char*>(*row_++) + offset_;
      row_end_ = next_ + lines_ * kCacheLine;
    }
    prefetch_far(next_);
    next_ += kCacheLine;
  }

  const void* const* row_ = nullptr;  // the next
  const void* const* end_ = nullptr;
  int lines_ = 0;
  int64_t offset_ = 0;
  const char* next_ = nullptr;  // to be fetched, of the row before
  const char* row_end_ = nullptr;
  int due_ = 0;  // lines, in units of 1 / steps_ of one
  int per_step_ = 0;
  int steps_ = 1;
};

// So many of its lines, which a product fetches.
struct Share {
  Ahead* ahead;
  int lines;
};

// score[key][query] for kTallKeys keys and kVectors full vectors (and half of one) of queries.
// queries: [head_dim][stride], the query rows in the lanes; score: [keys][stride].
template <int kVectors, bool kHalf>
TOKENDANCE_INLINE void tall_scores(const float* queries, int64_t stride, const float* const* keys,
                                   int head_dim, float* score, Ahead& ahead) {
#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
  using Half = Lanes<8>;
#else
  using Half = Full;
#endif
  constexpr int kFull = kVectors > 0 ? kVectors : 1;
  Full sum[kTallKeys][kFull];
  Half half_sum[kTallKeys];
  const float* key[kTallKeys];
  TOKENDANCE_UNROLL
  for (int k = 0; k < kTallKeys; ++k) {
    key[k] = keys[k];
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) sum[k][i] = repeat<Full>(0.0f);
    if constexpr (kHalf) half_sum[k] = repeat<Half>(0.0f);
  }
  for (int dim = 0; dim < head_dim; dim += kStepDims) {
    ahead.step();
    for (int d = dim; d < dim + kStepDims; ++d) {
      Full query[kFull];
      Half half_query;
      TOKENDANCE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        query[i] = load_lanes<Full>(queries + d * stride + i * kFullLanes);
      }
      if constexpr (kHalf) {
        half_query = load_lanes<Half>(queries + d * stride + kVectors * kFullLanes);
      }
      TOKENDANCE_UNROLL
      for (int k = 0; k < kTallKeys; ++k) {
        if constexpr (kVectors > 0) {
          const Full element = repeat<Full>(key[k] + d);
          TOKENDANCE_UNROLL
          for (int i = 0; i < kVectors; ++i) {
            sum[k][i] = multiply_add(query[i], element, sum[k][i]);
          }
        }
        if constexpr (kHalf) {
          half_sum[k] = multiply_add(half_query, repeat<Half>(key[k] + d), half_sum[k]);
        }
      }
    }
  }
  TOKENDANCE_UNROLL
  for (int k = 0; k < kTallKeys; ++k) {
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      store_lanes(score + k * stride + i * kFullLanes, sum[k][i]);
    }
    if constexpr (kHalf) store_lanes(score + k * stride + kVectors * kFullLanes, half_sum[k]);
  }
}

// The lanes of one piece of a tile's rows.
struct Piece {
  int vectors;
  bool half;
  int lanes() const { return vectors * kFullLanes + (half ? kHalfLanes : 0); }
};

// Three vectors use the registers best, but 4 is better cut into 2 + 2 than into 3 + 1; half a
// vector goes with at most two.
inline Piece next_piece(int lanes) {
  int vectors = lanes / kFullLanes;
  const int rest = lanes % kFullLanes;
  const bool half = kHalfLanes > 0 && rest > 0 && rest <= kHalfLanes;
  if (rest > 0 && !half) ++vectors;
  if (vectors <= 2) return {vectors, half};
  if (vectors == 4 || (vectors == 3 && half)) return {2, false};
  return {3, false};
}

template <int kVectors, bool kHalf>
inline void tall_piece(const float* queries, int64_t stride, const float* const* keys, int groups,
                       int head_dim, float* score, Ahead& ahead) {
  for (int k = 0; k < groups * kKeyGroup; k += kTallKeys) {
    tall_scores<kVectors, kHalf>(queries, stride, keys + k, head_dim, score + k * stride, ahead);
  }
}

// Scores of `groups` groups of kKeyGroup keys for the query lanes [begin, end). Both products write
// whole vectors: `stride` is a multiple of 16.
inline void tall_block(const float* queries, int64_t stride, const float* const* keys, int groups,
                       int head_dim, int begin, int end, float* score, Share share) {
  int pieces = 0;
  for (int lane = begin; lane < end; ++pieces) lane += next_piece(end - lane).lanes();
  share.ahead->begin(share.lines,
                     pieces * (groups * kKeyGroup / kTallKeys) * (head_dim / kStepDims));
  for (int lane = begin; lane < end;) {
    const Piece piece = next_piece(end - lane);
    const float* q = queries + lane;
    float* s = score + lane;
    switch (piece.vectors * 2 + piece.half) {
      case 1:
        tall_piece<0, true>(q, stride, keys, groups, head_dim, s, *share.ahead);
        break;
      case 2:
        tall_piece<1, false>(q, stride, keys, groups, head_dim, s, *share.ahead);
        break;
      case 3:
        tall_piece<1, true>(q, stride, keys, groups, head_dim, s, *share.ahead);
        break;
      case 4:
        tall_piece<2, false>(q, stride, keys, groups, head_dim, s, *share.ahead);
        break;
      case 5:
        tall_piece<2, true>(q, stride, keys, groups, head_dim, s, *share.ahead);
        break;
      default:
        tall_piece<3, false>(q, stride, keys, groups, head_dim, s, *share.ahead);
    }
    lane += piece.lanes();
  }
}

// Lane i is the sum of the lanes of sums[i].
#if TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx512
TOKENDANCE_INLINE Full fold(const Full (&sums)[16]) {
  __m512 quarter[4];
  TOKENDANCE_UNROLL
  for (int k = 0; k < 4; ++k) {
    const __m512 a = sums[k].v, b = sums[4 + k].v, c = sums[8 + k].v, d = sums[12 + k].v;
    const __m512 ab =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd =
        _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    quarter[k] =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const __m512 left = pairs(quarter[0], quarter[1]), right = pairs(quarter[2], quarter[3]);
  return {
      _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x88), _mm512_shuffle_ps(left, right, 0xdd))};
}
#elif TOKENDANCE_LEVEL == TOKENDANCE_LEVEL_avx2
TOKENDANCE_INLINE Full fold(const Full (&sums)[8]) {
  __m256 half[4];
  TOKENDANCE_UNROLL
  for (int k = 0; k < 4; ++k) {
    const __m256 a = sums[k].v, b = sums[4 + k].v;
    half[k] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  const auto pairs = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  const __m256 left = pairs(half[0], half[1]), right = pairs(half[2], half[3]);
  return {
      _mm256_add_ps(_mm256_shuffle_ps(left, right, 0x88), _mm256_shuffle_ps(left, right, 0xdd))};
}
#else
TOKENDANCE_INLINE Full fold(const Full (&sums)[kFullLanes]) {
  Full result;
  for (int i = 0; i < kFullLanes; ++i) result.v[i] = lane_sum(sums[i]);
  return result;
}
#endif

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
// Keys whose sums of kQueries rows fit one folded vector.
template <int kQueries>
constexpr int kFlatKeys = std::max(1, kFullLanes / power_of_two(kQueries));

// score[query][key], keys up to a multiple of sixteen. queries: [head_dim / kFullLanes][kQueries]
// [kFullLanes]; a key starts `offset` elements into its row.
template <int kQueries, typename T>
inline void flat_scores(const float* queries, const T* const* keys, int64_t offset, int num_keys,
                        int head_dim, float* score, int64_t score_stride, Share share) {
  constexpr int kKeys = kFlatKeys<kQueries>;
  constexpr int kRows = std::min(kQueries, kFullLanes);
  static_assert(kKeyGroup % kKeys == 0 || kKeys % kKeyGroup == 0);
  share.ahead->begin(share.lines, (num_keys + kKeys - 1) / kKeys);
  for (int k0 = 0; k0 < num_keys; k0 += kKeys) {
    share.ahead->step();
    for (int first = 0; first < kQueries; first += kRows) {
      Full sums[kFullLanes];
      TOKENDANCE_UNROLL
      for (int i = 0; i < kFullLanes; ++i) sums[i] = repeat<Full>(0.0f);
      const float* query_of = queries + first * kFullLanes;
      for (int dim = 0; dim < head_dim; dim += kFullLanes, query_of += kQueries * kFullLanes) {
        Full key[kKeys];
        TOKENDANCE_UNROLL
        for (int k = 0; k < kKeys; ++k) key[k] = load_full(keys[k0 + k] + offset + dim);
        TOKENDANCE_UNROLL
        for (int q = 0; q < kRows; ++q) {
          const Full query = load_lanes<Full>(query_of + q * kFullLanes);
          TOKENDANCE_UNROLL
          for (int k = 0; k < kKeys; ++k) {
            sums[q * kKeys + k] = multiply_add(query, key[k], sums[q * kKeys + k]);
          }
        }
      }
      alignas(kCacheLine) float folded[kFullLanes];
      store_lanes(folded, fold(sums));
      TOKENDANCE_UNROLL
      for (int q = 0; q < kRows; ++q) {
        memcpy(score + (first + q) * score_stride + k0, folded + q * kKeys, kKeys * sizeof(float));
      }
    }
  }
}

// Vectors of dims that one pass of add_values takes, and the most rows whose sums then fit.
template <int kVectors>
constexpr int kValueRows = kVectorRegisters < 32 ? 6
                           : kVectors == 2 ? 8
                                           : std::min(6, (kVectorRegisters - 2) / kVectors - 1);

// Weights of the rows in the tall form: of adjacent rows adjacent, `stride` from key to key.
struct TallWeights {
  const float* at;
  int64_t stride;
  static constexpr int64_t row_stride() { return 1; }
  int64_t key_stride() const { return stride; }
};

// In the flat form: of adjacent keys adjacent, kBlockKeys from row to row.
struct FlatWeights {
  const float* at;
  static constexpr int64_t row_stride() { return kBlockKeys; }
  static constexpr int64_t key_stride() { return 1; }
};

// out[r] = out[r] * rescale[r] + sum over keys of weight * values[key], for kRows rows and kVectors
// vectors of dims from `dim` on; a value starts `offset` elements into its row.
template <int kRows, int kVectors, typename T, typename Weights>
TOKENDANCE_INLINE void add_values(float* const* out, const float* rescale, Weights weights,
                                  const T* const* values, int64_t offset, int num_keys, int dim,
                                  Ahead& ahead) {
  Full sum[kRows][kVectors];
  TOKENDANCE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Full factor = repeat<Full>(rescale + r);
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      sum[r][i] = load_lanes<Full>(out[r] + dim + i * kFullLanes) * factor;
    }
  }
  const float* weight = weights.at;
  for (int k = 0; k < num_keys; ++k) {
    if (k % kKeyGroup == 0) ahead.step();
    const T* row = values[k] + offset + dim;
    Full value[kVectors];
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) value[i] = load_full(row + i * kFullLanes);
    TOKENDANCE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Full factor = repeat<Full>(weight + r * weights.row_stride());
      TOKENDANCE_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[r][i] = multiply_add(factor, value[i], sum[r][i]);
    }
    weight += weights.key_stride();
  }
  TOKENDANCE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    TOKENDANCE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      store_lanes(out[r] + dim + i * kFullLanes, sum[r][i]);
    }
  }
}

template <int kRows, int kVectors, typename T, typename Weights>
inline void add_values_of(int rows, float* const* out, const float* rescale, Weights weights,
                          const T* const* values, int64_t offset, int num_keys, int dim,
                          Ahead& ahead) {
  if (rows == kRows) {
    add_values<kRows, kVectors>(out, rescale, weights, values, offset, num_keys, dim, ahead);
  } else if constexpr (kRows > 1) {
    add_values_of<kRows - 1, kVectors>(rows, out, rescale, weights, values, offset, num_keys, dim,
                                       ahead);
  }
}

// Cuts the rows into balanced parts: 7 rows are 4 + 3, not 6 + 1.
template <int kVectors, typename T, typename Weights>
inline void add_values_rows(int rows, float* const* out, const float* rescale, Weights weights,
                            const T* const* values, int64_t offset, int num_keys, int dim,
                            Ahead& ahead) {
  constexpr int kMost = kValueRows<kVectors>;
  const int parts = (rows + kMost - 1) / kMost;
  for (int part = 0, begin = 0; part < parts; ++part) {
    const int end = rows * (part + 1) / parts;
    Weights some = weights;
    some.at += begin * weights.row_stride();
    add_values_of<kMost, kVectors>(end - begin, out + begin, rescale + begin, some, values, offset,
                                   num_keys, dim, ahead);
    begin = end;
  }
}

template <int kVectors, typename T, typename Weights>
inline void add_values_passes(int rows, float* const* out, const float* rescale, Weights weights,
                              const T* const* values, int64_t offset, int num_keys, int head_dim,
                              Share share) {
  constexpr int kDims = kVectors * kFullLanes;
  const int parts = (rows + kValueRows<kVectors> - 1) / kValueRows<kVectors>;
  share.ahead->begin(share.lines,
                     head_dim / kDims * parts * ((num_keys + kKeyGroup - 1) / kKeyGroup));
  for (int dim = 0; dim < head_dim; dim += kDims) {
    add_values_rows<kVectors>(rows, out, rescale, weights, values, offset, num_keys, dim,
                              *share.ahead);
  }
}

template <typename T, typename Weights>
inline void add_values_block(int rows, float* const* out, const float* rescale, Weights weights,
                             const T* const* values, int64_t offset, int num_keys, int head_dim,
                             Share share) {
  const auto passes = [&](auto vectors) {
    add_values_passes<decltype(vectors)::value>(rows, out, rescale, weights, values, offset,
                                                num_keys, head_dim, share);
  };
  if constexpr (kFullLanes < 16) {
    passes(std::integral_constant<int, 2>{});
  } else if (head_dim == 80) {
    passes(std::integral_constant<int, 5>{});
  } else if (head_dim == 96) {
    passes(std::integral_constant<int, 6>{});
  } else {
    if constexpr (!std::is_same_v<T, float>) {
      // Widened once for all rows.
      if (rows > kValueRows<4>) return passes(std::integral_constant<int, 2>{});
    }
    passes(std::integral_constant<int, 4>{});
  }
}

}  // namespace tokendance::TOKENDANCE_ISA
