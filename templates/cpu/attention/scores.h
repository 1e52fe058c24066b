// Score policies: how the scores of a block of keys are made, changed, and turned into weights.
//
// A policy has these hooks, in the order in which they are called; another one inherits from Products what it shares.
//   queries(t, g, w)           once a group: brings its rows of q into w.q
//   keys(t, w, n)              once a block: says in w.k_row where its n keys are
//   score<RV, kExact>(w, n, v) into w.s the scores of the block for RV vectors from v, and into w.peak the largest of
//                              them and of w.top. Returns how many keys it keeps, whose values are in value_rows(w)
//   score_few(w, n, rows)      the same for a group of few rows
//   kChanges, change(...)      whether scores are changed where no lane is masked, and what becomes of those of key j
//   weight(x, top)             e^(x - top), for scores x and the largest of their row so far
// It has what it keeps of a head and of a thread in OfHead and OfThread. kPrunes says that its scores are changed and
// masked already, and that it keeps those keys alone that some row needs, all of them in an exact run; kSurveys that it
// must see all scores before the first is used (predicted.h).
#pragma once
#include "attention/scratch.h"

namespace attention {

// What score rules are written in.
using Number = vf;
using simd::exp;
using simd::tanh;

template <class C>
constexpr bool kRule = !std::is_void<typename C::Rule>::value;

FUSER_INLINE const float* fp32_row(const float* row, float*, int64_t) { return row; }
FUSER_INLINE const float* fp32_row(const bf16* row, float* copy, int64_t n) {
  for (int64_t i = 0; i < n; ++i) copy[i] = to_float(row[i]);
  return copy;
}

// s[j][lane] = sum over d of q[d][lane] k[j][d], for RK keys and RV vectors of lanes; `top` keeps the largest.
template <int64_t D, int RV, int RK>
FUSER_INLINE void scores_tile(const float* q, const float* const* k_row, int64_t pitch, float* s, vf* top) {
  vf acc[RK][RV] = {};
  const float* k[RK];
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j) k[j] = k_row[j];
#pragma GCC unroll 2
  for (int64_t d = 0; d < D; ++d, q += pitch) {
    vf x[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) x[v] = load(q + v * L);
#pragma GCC unroll 8
    for (int j = 0; j < RK; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) acc[j][v] += x[v] * k[j][d];
  }
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j, s += pitch)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) store(s + v * L, acc[j][v]), top[v] = max_fast(acc[j][v], top[v]);
}

// x[i] += the product of vectors of `row` and of the same elements of k[i], for all D elements.
template <int64_t D>
FUSER_INLINE void products_of_row(const float* row, const float* const* k, vf* x) {
  int64_t d = 0;
  for (; d + L <= D; d += L)
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] += load(row + d) * load(k[i] + d);
  if constexpr (D % L != 0)
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] += load_n(row + d, D % L) * load_n(k[i] + d, D % L);
}

// Asks for the next tile's keys and this one's values, since rows may lie on pages of their own.
template <int RK, class C>
FUSER_INLINE void announce_rows(const Scratch<C>& w, int64_t j, int64_t n) {
  for (int64_t i = j; !kConvert<C> && i < j + RK && i < n; ++i) {
    for (int64_t d = 0; d < C::kHeadDim; d += 16) __builtin_prefetch(w.k_row[i + RK] + d, 0, 3);
    for (int64_t d = 0; d < C::kValueDim; d += 16) __builtin_prefetch(w.v_row[i] + d, 0, 2);
  }
}

// rule(scale * q k^T) + mask.
template <class C>
struct Products {
  static constexpr int64_t D = C::kHeadDim;
  static constexpr bool kChanges = C::kBias || kRule<C>, kPrunes = false, kSurveys = false;
  struct OfHead {};
  struct OfThread {};

  // Rows lie in lanes; few of them one after another.
  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    using Element = typename C::Element;
    const int64_t last = g.count - 1;
    if (g.count <= C::kFewRows) {
      for (int64_t r = 0; r <= last; ++r)
        for (int64_t d = 0; d < D; ++d) w.q[r * D + d] = t.scale * to_float(t.q[g.row[r] * t.q_row + d]);
    } else {
      rows_to_lanes<Element>(w.q, w.pitch, D, t.scale,
                             [&](int64_t r) { return t.q + g.row[r < last ? r : last] * t.q_row; });
    }
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      w.k_row[j] = fp32_row(t.k + w.key[j] * t.k_row, w.k + (kConvert<C> ? j * D : 0), D);
    // Tiles read rows of keys beyond n as well.
    for (int64_t j = n; j < n + kRepeated; ++j) w.k_row[j] = w.k_row[n - 1];
  }

  FUSER_INLINE const float* const* value_rows(const Scratch<C>& w) { return w.v_row; }

  template <int RV, bool kExact>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v) {
    constexpr int64_t RK = kAccumulators / RV < kMostKeys ? kAccumulators / RV : kMostKeys;
    vf top[RV];
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) top[i] = load(w.top + (v + i) * L);
    for (int64_t j = 0; j < n; j += RK) {
      w.ahead.announce();
      announce_rows<RK>(w, j, n);
      scores_tile<D, RV, RK>(w.q + v * L, w.k_row + j, w.pitch, w.s + j * w.pitch + v * L, top);
    }
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) store(w.peak + (v + i) * L, top[i]);
    return n;
  }

  // Idle lanes are zero.
  static __attribute__((noinline)) void score_few(Scratch<C>& w, int64_t n, int64_t rows) {
    vf top = load(w.top);
    for (int64_t j = 0; j < n; j += L) {
      announce_rows<L>(w, j, n);
      const int64_t size = n - j < L ? n - j : L;
      float* const s = w.s + j * w.pitch;
      for (int64_t i = 0; i < size; ++i) store(s + i * w.pitch, vf{});
      for (int64_t r = 0; r < rows; ++r) {
        vf x[L] = {};
        products_of_row<D>(w.q + r * D, w.k_row + j, x);
        transpose(x);
#pragma GCC unroll 4
        for (int64_t width = L / 2; width > 0; width /= 2)
#pragma GCC unroll 8
          for (int64_t i = 0; i < width; ++i) x[i] += x[i + width];
        float score[L];
        store(score, x[0]);
        for (int64_t i = 0; i < size; ++i) s[i * w.pitch + r] = score[i];
      }
      for (int64_t i = 0; i < size; ++i) top = max_fast(load(s + i * w.pitch), top);
    }
    store(w.peak, top);
  }

  // The scores x of key j in vector v: the rule, the bias, by rows or one for all, and the lanes that the plan or a mask
  // forbids.
  FUSER_INLINE vf change(const Scratch<C>& w, vf x, int64_t j, int64_t v, bool row_bias) {
    const vf lowest = set1(-kInf);
    if constexpr (kRule<C>) x = C::Rule::apply(x);
    if constexpr (C::kBias) {
      const vf b = row_bias ? load(w.bias + j * w.pitch + v * L) : set1(w.bias[j]);
      x = select((vi)(b == lowest), lowest, x + b);
    }
    return select_bits(w.lanes[j] >> v * L, x, lowest);
  }

  // Scores themselves are not multiplied with log2(e): large ones would lose the digits in which they differ.
  FUSER_INLINE vf weight(vf x, vf top) { return exp2_nonpositive((x - top) * kLog2e); }
};

}  // namespace attention
