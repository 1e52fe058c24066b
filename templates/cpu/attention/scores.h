// Score policies: how the scores of a block of keys are made, changed, and turned into weights.
//
// A policy has these hooks, in the order in which they are called; another one inherits from Products what it shares.
//   open(args, t, index)       once a head, which is number `index`: what the policy keeps of it, in t.scores
//   key_row(t, key), value_row where the rows of a key lie
//   queries(t, g, w)           once a group: brings its rows of q into w.q
//   sound(t, w)                whether no exact run is needed from the start
//   keys(t, w, n)              once a block: says in w.k_row where its n keys are
//   value_keys(t, w, n, exact) the same in w.v_row of their values
//   score<RV>(w, n, v, exact)  into w.s the scores of the block for RV vectors from v, and into w.peak the largest of
//                              them and of w.top. Returns how many keys it keeps, whose values are in value_rows(w)
//   score_few(w, n, rows)      the same for a group of few rows
//   kChanges, change(...)      whether scores are changed where no lane is masked, and what becomes of those of key j
//   weight(x, top)             e^(x - top), for scores x and the largest of their row so far
// It has what it keeps of a head and of a thread in OfHead and OfThread. kMasks says that its scores are masked by the plan
// already; kPrunes that they are changed, too, and that it keeps those keys alone that some row needs, all of them in an
// exact run; kSurveys that it must see all rows before the first is used, in survey(args, plan). With kByteValues it
// multiplies weights and values itself, but in an exact run: weigh_bytes<RV> and byte_values<RV> (bytes.h).
#pragma once
#include "abi.h"
#include "attention/scratch.h"

namespace attention {

// What score rules are written in.
using Number = vf;
using simd::exp;
using simd::tanh;

// Lambdas of inner loops, whose vectors must stay in registers.
#define FUSER_LAMBDA __attribute__((always_inline))

template <class C>
constexpr bool kRule = !std::is_void<typename C::Rule>::value;

// A row as products or weights take it: in place, or n elements as a copy.
FUSER_INLINE const float* row_as(const float* row, float*, int64_t) { return row; }
FUSER_INLINE const float* row_as(const bf16* row, float* copy, int64_t n) {
  for (int64_t i = 0; i < n; ++i) copy[i] = to_float(row[i]);
  return copy;
}
FUSER_INLINE const bf16x2* row_as(const bf16* row, bf16x2* copy, int64_t n) {
  if (n % 2 == 0) return reinterpret_cast<const bf16x2*>(row);
  copy[n / 2] = {};
  std::memcpy(copy, row, n * sizeof(bf16));
  return copy;
}

// sum + the products of the words of one lane with those of another.
FUSER_INLINE vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }
FUSER_INLINE vf multiply_add(vf sum, vf a, float b) { return sum + a * b; }
FUSER_INLINE vf multiply_add(vf sum, vi a, vi b) { return dot(sum, a, b); }
FUSER_INLINE vf multiply_add(vf sum, vi a, bf16x2 b) { return dot(sum, a, set1(b)); }

// The sums over i of add(sum, q[i][lane], k[j][i]), for RK keys and RV vectors of lanes, go to put(j, v, sum).
template <int64_t Words, int RV, int RK, class Sum, class W, class Add, class Put>
FUSER_INLINE void product_tile(const W* q, const W* const* k_row, int64_t pitch, const Add& add, const Put& put) {
  Sum acc[RK][RV] = {};
  const W* k[RK];
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j) k[j] = k_row[j];
#pragma GCC unroll 2
  for (int64_t i = 0; i < Words; ++i, q += pitch) {
    decltype(load(q)) x[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) x[v] = load(q + v * L);
#pragma GCC unroll 8
    for (int j = 0; j < RK; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) acc[j][v] = add(acc[j][v], x[v], k[j][i]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) put(j, v, acc[j][v]);
}

// s[j][lane] = the score of the rows in RV vectors of lanes and RK keys; `top` keeps the largest.
template <class C, int RV, int RK>
FUSER_INLINE void scores_tile(const Word<C>* q, const Word<C>* const* k_row, float scale, int64_t pitch, float* s, vf* top) {
  product_tile<kWordsOfRow<C>, RV, RK, vf>(
      q, k_row, pitch, [](vf sum, auto a, auto b) FUSER_LAMBDA { return multiply_add(sum, a, b); },
      [&](int j, int v, vf sum) FUSER_LAMBDA {
        const vf x = kPairs<C> ? sum * scale : sum;
        store(s + j * pitch + v * L, x), top[v] = max_fast(x, top[v]);
      });
}

// x[i] += the products of words of `row` and those of k[i].
template <int64_t Words, class W>
FUSER_INLINE void products_of_row(const W* row, const W* const* k, vf* x) {
  int64_t d = 0;
  for (; d + L <= Words; d += L)
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] = multiply_add(x[i], load(row + d), load(k[i] + d));
  if constexpr (Words % L != 0)
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] = multiply_add(x[i], load_n(row + d, Words % L), load_n(k[i] + d, Words % L));
}

// Asks for the next tile's keys and this one's values, since rows may lie on pages of their own.
template <int RK, class C>
FUSER_INLINE void announce_rows(const Scratch<C>& w, int64_t j, int64_t n) {
  constexpr int64_t line = 64 / sizeof(Word<C>), value_line = 64 / sizeof(Value<C>);
  for (int64_t i = j; i < j + RK && i < n; ++i) {
    for (int64_t d = 0; !kCopyKeys<C> && d < kWordsOfRow<C>; d += line) __builtin_prefetch(w.k_row[i + RK] + d, 0, 3);
    for (int64_t d = 0; !kCopyValues<C> && d < C::kValueDim; d += value_line) __builtin_prefetch(w.v_row[i] + d, 0, 2);
  }
}

// rule(scale * q k^T) + mask.
template <class C>
struct Products {
  static constexpr int64_t D = C::kHeadDim;
  static constexpr int64_t kWords = kWordsOfRow<C>;
  static constexpr bool kChanges = kBiased<C> || kRule<C>, kMasks = false, kPrunes = false, kSurveys = false;
  static constexpr bool kByteValues = false;
  static constexpr bool kPairValues = kPairs<C>;
  struct OfHead {};
  struct OfThread {};

  FUSER_INLINE void open(const FuserArgs*, Head<C>&, int64_t) {}
  FUSER_INLINE auto key_row(const Head<C>& t, int64_t key) { return t.k + key * t.k_row; }
  FUSER_INLINE auto value_row(const Head<C>& t, int64_t key) { return t.v + key * t.v_row; }

  FUSER_INLINE bool sound(const Head<C>&, const Scratch<C>&) { return true; }

  // Rows lie in lanes; few of them one after another.
  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    const int64_t last = g.count - 1;
    const auto row = [&](int64_t r) { return t.q + g.row[r < last ? r : last] * t.q_row; };
    w.scale = t.scale;
    if constexpr (kPairs<C>) {
      bf16x2 copy[kWords];
      const auto pairs = [&](int64_t r) { return row_as(row(r), copy, D); };
      if (g.count <= C::kFewRows)
        for (int64_t r = 0; r <= last; ++r) std::memcpy(w.q + r * kWords, pairs(r), sizeof(copy));
      else
        rows_to_lanes<bf16x2>(w.q, w.pitch, kWords, 1.0f, pairs);
    } else if (g.count <= C::kFewRows) {
      for (int64_t r = 0; r <= last; ++r)
        for (int64_t d = 0; d < D; ++d) w.q[r * D + d] = t.scale * to_float(row(r)[d]);
    } else {
      rows_to_lanes<typename C::Element>(w.q, w.pitch, D, t.scale, row);
    }
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      w.k_row[j] = row_as(C::Scores::key_row(t, w.key[j]), w.k + (kCopyKeys<C> ? j * kWords : 0), D);
    // Tiles read rows of keys beyond n as well.
    for (int64_t j = n; j < n + kRepeated; ++j) w.k_row[j] = w.k_row[n - 1];
  }

  FUSER_INLINE void value_keys(const Head<C>& t, Scratch<C>& w, int64_t n, bool) {
    for (int64_t j = 0; j < n; ++j) {
      const typename C::Element* const row = C::Scores::value_row(t, w.key[j]);
      if constexpr (kCopyValues<C>)
        w.v_row[j] = row_as(row, w.v + j * C::kValueDim, C::kValueDim);
      else
        w.v_row[j] = row;
    }
  }

  FUSER_INLINE auto value_rows(const Scratch<C>& w) { return w.v_row; }

  template <int RV>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v, bool) {
    constexpr int64_t RK = kAccumulators / RV < kMostKeys ? kAccumulators / RV : kMostKeys;
    vf top[RV];
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) top[i] = load(w.top + (v + i) * L);
    for (int64_t j = 0; j < n; j += RK) {
      w.ahead.announce();
      announce_rows<RK>(w, j, n);
      scores_tile<C, RV, RK>(w.q + v * L, w.k_row + j, w.scale, w.pitch, w.s + j * w.pitch + v * L, top);
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
        products_of_row<kWords>(w.q + r * kWords, w.k_row + j, x);
        const vf sums = reduce_add_each(x);
        float score[L];
        store(score, kPairs<C> ? sums * w.scale : sums);
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
    if constexpr (kBiased<C>) {
      const vf b = row_bias ? load(w.bias + j * w.pitch + v * L) : set1(w.bias[j]);
      x = select((vi)(b == lowest), lowest, x + b);
    }
    return select_bits(w.lanes[j] >> v * L, x, lowest);
  }

  // Scores themselves are not multiplied with log2(e): large ones would lose the digits in which they differ.
  FUSER_INLINE vf weight(vf x, vf top) { return exp2_nonpositive((x - top) * kLog2e); }
};

}  // namespace attention
