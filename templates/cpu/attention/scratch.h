// What one thread has at hand while it computes a group of rows, and how rows lie in the lanes of vectors.
//
// A kernel is instantiated with a configuration C:
//   Extents                       the struct of run-time sizes
//   Element, MaskElement          types of q, k, v and out, and of the run-time mask (uint8_t where there is none)
//   kHeadDim, kValueDim           widths of the heads of q and k, and of v and out
//   kKeyBlock                     keys that are scored before their weights meet the values
//   kFewRows                      rows for which a product over lanes is less work than a vector of rows
//   DistanceElement               type of the bias by distance (float where there is none)
//   kMask, kBias, kLse            whether there is a run-time mask, it is added to scores, lse is wanted
//   kDistances                    whether there is a bias by distance
//   Rule                          what changes a scaled score before masks do (such as soft_cap.h), or void
//   Scores                        the score policy (scores.h)
#pragma once
#include <cstdint>
#include <type_traits>

#include "attention/plan.h"
#include "simd.h"

namespace attention {
using namespace simd;

constexpr int64_t L = kLanes, kGroup = 64;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kAccumulators = 24, kTileVectors = 4;
#else
constexpr int64_t kAccumulators = 12, kTileVectors = 2;
#endif
constexpr int64_t kMostKeys = 8;
constexpr int64_t kMostAhead = 192;  // keys of a group for which reading ahead is worth its instructions
constexpr int64_t kRepeated = 2 * (kMostKeys > L ? kMostKeys : L);  // how often the last key of a block is repeated
constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504f;
// A bias this low counts as masked as long as its row has another key.
constexpr float kNever = -1e30f;

// Whether rows of bf16 are multiplied in pairs of neighbours; all others are in fp32. A word is what one lane multiplies.
template <class C>
constexpr bool kPairs = kDotsBf16 && std::is_same<typename C::Element, bf16>::value;
template <class C>
using Word = std::conditional_t<kPairs<C>, bf16x2, float>;
template <class C>
constexpr int64_t kWordsOfRow = kPairs<C> ? (C::kHeadDim + 1) / 2 : C::kHeadDim;
// Whether weights and values become bf16 for their product; else both are in fp32.
template <class C>
using Value = std::conditional_t<C::Scores::kPairValues, bf16, float>;
// Keys and values that cannot be read in place are copied.
template <class C>
constexpr bool kCopyKeys = kPairs<C> ? C::kHeadDim % 2 != 0 : sizeof(typename C::Element) != 4;
template <class C>
constexpr bool kCopyValues = sizeof(Value<C>) > sizeof(typename C::Element);
// Pairs of values from one pair of keys to the next.
template <class C>
constexpr int64_t kPairRow = (C::kValueDim + L - 1) / L * L;
// Whether numbers are added to scores.
template <class C>
constexpr bool kBiased = C::kBias || C::kDistances;
// Floats from one row of partial results to the next.
template <class C>
constexpr int64_t kStateRow = (C::kValueDim + 15) / 16 * 16;

// One (batch, head) of the problem.
template <class C>
struct Head {
  const typename C::Element *q, *k, *v;
  const typename C::MaskElement* mask;
  const typename C::DistanceElement* distances;  // of row 0 and key 0
  typename C::Element* out;
  float *lse, *state, *state_top, *state_sum;
  int64_t q_row, k_row, v_row, out_row, lse_row, mask_row, mask_key, distance_step;
  float scale;
  typename C::Scores::OfHead scores;
};

// Rows to bring into L2 while tiles are at work, `pace` of them with each, so that memory is read evenly.
template <class C>
struct Ahead {
  const void* row[2 * kGroup + 2 * kMostAhead];
  int64_t size, next, pace;

  void add(const void* address) { row[size++] = address; }
  void announce() {
    const int64_t end = next + pace < size ? next + pace : size;
    for (; next < end; ++next)
      for (int64_t byte = 0; byte < C::kHeadDim * int64_t(sizeof(typename C::Element)); byte += 64)
        __builtin_prefetch(static_cast<const char*>(row[next]) + byte, 0, 2);
  }
};

template <class C>
struct alignas(64) Scratch {
  static constexpr int64_t kBlock = C::kKeyBlock;
  static constexpr int64_t kPaired = C::Scores::kPairValues ? (kBlock + 1) / 2 : 1;
  Word<C> q[kWordsOfRow<C> * kGroup];
  float o[C::kValueDim * kGroup];
  float s[(kBlock + kMostKeys) * kGroup];  // scores, then weights, then perhaps pairs of them
  bf16x2 pairs[kPaired * kPairRow<C>];  // the values of two keys
  float top[kGroup], peak[kGroup], sum[kGroup], decay[kGroup], zero[kStateRow<C>];
  float bias[kBiased<C> ? (kBlock + L) * kGroup : 1];
  Word<C> k[kCopyKeys<C> ? kBlock * kWordsOfRow<C> : 1];
  float v[kCopyValues<C> ? kBlock * C::kValueDim : 1];
  const Word<C>* k_row[kBlock + kRepeated];
  const Value<C>* v_row[kBlock];
  const bf16x2* pair_row[kPaired];
  uint64_t lanes[kBlock + kGroup];
  int32_t key[kBlock + kGroup];
  Ahead<C> ahead;
  typename C::Scores::OfThread scores;
  float scale;    // of pairs' products
  int64_t pitch;  // floats from one key, or one element of a row, to the next: the lanes of all vectors in use
};

// Vectors of lanes, from `first` to before `last`.
struct Range {
  int64_t first, last;
  bool operator==(const Range& other) const { return first == other.first && last == other.last; }
};

// The vectors that have a lane in a word that is not zero.
FUSER_INLINE Range vectors_of(uint64_t lanes) {
  return {__builtin_ctzll(lanes) / L, 64 / L - __builtin_clzll(lanes) / L};
}

// Calls f(size, v) for the vectors v ... v + size of each tile of a range; size is a constant.
template <class F>
FUSER_INLINE void by_tiles(Range range, const F& f) {
  int64_t v = range.first;
  if constexpr (kTileVectors == 4)
    for (; v + 4 <= range.last; v += 4) f(std::integral_constant<int, 4>(), v);
  for (; v + 2 <= range.last; v += 2) f(std::integral_constant<int, 2>(), v);
  if (v < range.last) f(std::integral_constant<int, 1>(), v);
}

// to[i][lane] = factor * from(lane)[i] for i < n, `pitch` apart; from gives the address of a lane's row. Words that are no
// numbers, but pairs or codes, are moved as they are.
template <class T, class To, class From>
FUSER_INLINE void rows_to_lanes(To* to, int64_t pitch, int64_t n, float factor, const From& from) {
  for (int64_t c = 0; c < pitch / L; ++c)
    for (int64_t i = 0; i < n; i += L) {
      const int64_t size = n - i < L ? n - i : L;
      vf x[L];
      for (int64_t r = 0; r < L; ++r) {
        const T* row = from(c * L + r) + i;
        x[r] = (vf)(size == L ? load(row) : load_n(row, size));
      }
      transpose(x);
      for (int64_t r = 0; r < size; ++r) {
        if constexpr (std::is_same<T, bf16x2>::value || std::is_same<T, int32_t>::value)
          store(to + (i + r) * pitch + c * L, (vi)x[r]);
        else
          store(to + (i + r) * pitch + c * L, x[r] * factor);
      }
    }
}

}  // namespace attention
