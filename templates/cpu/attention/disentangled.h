// Scores of queries for keys, plus those of queries for the positions of keys and of keys for the positions of queries,
// which are read from tables by distance: DisentangledBias of fuser/ir/operators/attention.py says what, in PyTorch.
//
// More tensors, of the queries if kOfQueries, then of the keys if kOfKeys: products with all positions in fp32, and which
// position a distance has, int32; and the extents `queries`, `keys` (elements between batch entries, heads and rows of
// the products), `query_factor` and `key_factor`.
#pragma once
#include "attention/scores.h"

namespace attention {

template <class C>
struct Disentangled : Products<C> {
  using Base = Products<C>;
  static_assert(std::is_same<typename C::Element, float>::value && !kRule<C>);
  // The products of one head, and the positions by distance of row 0 and key 0.
  struct Part {
    const float* product;
    const int32_t* position;
    int64_t row;
    float factor;
  };
  struct OfHead {
    Part queries, keys;
  };
  struct OfThread {
    const float* query[kGroup];
    int64_t row[kGroup];
    const float* key[C::kKeyBlock];
    Part queries, keys;
  };

  FUSER_INLINE void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = *static_cast<const typename C::Extents*>(args->extents);
    const int64_t b = index / e.heads, h = index % e.heads;
    void* const* const more = args->tensors + kFirstAfterMasks<C> + 2 + C::kLse;
    const auto of = [&](int i, const auto& strides, double factor) {
      const auto* const product = static_cast<const float*>(more[i]) + b * strides.batch + h * strides.head;
      return Part{product, static_cast<const int32_t*>(more[i + 1]) + e.kv_len - 1, strides.row, float(factor)};
    };
    if constexpr (C::kOfQueries) t.scores.queries = of(0, e.queries, e.query_factor);
    if constexpr (C::kOfKeys) t.scores.keys = of(2 * C::kOfQueries, e.keys, e.key_factor);
  }

  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    Base::queries(t, g, w);
    w.scores.queries = t.scores.queries, w.scores.keys = t.scores.keys;
    for (int64_t r = 0; r < w.pitch; ++r) {
      const int64_t row = w.scores.row[r] = g.row[r < g.count ? r : g.count - 1];
      if constexpr (C::kOfQueries) w.scores.query[r] = t.scores.queries.product + row * t.scores.queries.row;
    }
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    Base::keys(t, w, n);
    if constexpr (C::kOfKeys)
      for (int64_t j = 0; j < n; ++j) w.scores.key[j] = t.scores.keys.product + w.key[j] * t.scores.keys.row;
  }

  template <int RV>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v, bool) {
    constexpr int64_t RK = kAccumulators / RV < kMostKeys ? kAccumulators / RV : kMostKeys;
    const auto& of = w.scores;
    float* const s = w.s + v * L;
    vf top[RV] = {};
    for (int64_t j = 0; j < n; j += RK) {
      w.ahead.announce();
      announce_rows<RK>(w, j, n);
      scores_tile<C, RV, RK>(w.q + v * L, w.k_row + j, w.scale, w.pitch, s + j * w.pitch, top);
    }
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) top[i] = load(w.top + (v + i) * L);
    for (int64_t j = 0; j < n; ++j) {
      const int32_t *const of_query = of.queries.position - w.key[j], *const of_key = of.keys.position - w.key[j];
#pragma GCC unroll 8
      for (int i = 0; i < RV; ++i) {
        alignas(64) float lane[L];
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) {
          const int64_t r = (v + i) * L + l, row = of.row[r];
          float x = 0.0f;
          if constexpr (C::kOfQueries) x = of.queries.factor * of.query[r][of_query[row]];
          if constexpr (C::kOfKeys) x += of.keys.factor * of.key[j][of_key[row]];
          lane[l] = x;
        }
        const vf x = load(s + j * w.pitch + i * L) + load(lane);
        store(s + j * w.pitch + i * L, x), top[i] = max_fast(x, top[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) store(w.peak + (v + i) * L, top[i]);
    return n;
  }
};

}  // namespace attention
