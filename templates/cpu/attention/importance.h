// Scores of queries for proposals, plus a bias that follows from how close the query is to each of as many landmarks:
// fuser/ir/importance.py says what, in PyTorch. All proposals must be one block of keys.
//
// More tensors: landmarks, sums, heuristic, offset, in fp32; and the extents `landmarks`, `sums`, `heuristic`, `offset`
// (elements between batch entries, heads and proposals) and `coefficient`.
#pragma once
#include "attention/scores.h"

namespace attention {

template <class C>
struct Importance : Products<C> {
  using Base = Products<C>;
  static_assert(std::is_same<typename C::Element, float>::value && !C::kMask && !C::kDistances && !kRule<C>);
  struct OfHead {
    const float *landmark, *sum, *heuristic, *offset;
    int64_t landmark_row, sum_row, heuristic_row, offset_row;
    float coefficient;
  };
  struct OfThread {
    float close[(C::kKeyBlock + kMostKeys) * kGroup];
    const float* row[C::kKeyBlock + kRepeated];
    float sum[C::kKeyBlock], heuristic[C::kKeyBlock], offset[C::kKeyBlock], coefficient;
  };

  FUSER_INLINE void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = *static_cast<const typename C::Extents*>(args->extents);
    const int64_t b = index / e.heads, h = index % e.heads;
    const auto of = [&](int i, const auto& strides) {
      return static_cast<const float*>(args->tensors[5 + C::kLse + i]) + b * strides.batch + h * strides.head;
    };
    t.scores = {of(0, e.landmarks), of(1, e.sums),      of(2, e.heuristic), of(3, e.offset),     e.landmarks.row,
                e.sums.row,         e.heuristic.row,    e.offset.row,       float(e.coefficient)};
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    Base::keys(t, w, n);
    const auto& from = t.scores;
    auto& to = w.scores;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t c = w.key[j];
      to.row[j] = from.landmark + c * from.landmark_row;
      to.sum[j] = from.sum[c * from.sum_row];
      to.heuristic[j] = from.heuristic[c * from.heuristic_row];
      to.offset[j] = from.offset[c * from.offset_row];
    }
    for (int64_t j = n; j < n + kRepeated; ++j) to.row[j] = to.row[n - 1];
    to.coefficient = from.coefficient;
  }

  template <int RV>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v, bool) {
    constexpr int64_t RK = kAccumulators / RV < kMostKeys ? kAccumulators / RV : kMostKeys;
    const int64_t pitch = w.pitch;
    const auto& of = w.scores;
    float *const s = w.s + v * L, *const close = w.scores.close + v * L;
    vf top[RV] = {}, mean[RV] = {};
    for (int64_t j = 0; j < n; j += RK) {
      w.ahead.announce();
      scores_tile<C, RV, RK>(w.q + v * L, w.k_row + j, w.scale, pitch, s + j * pitch, top);
      scores_tile<C, RV, RK>(w.q + v * L, of.row + j, w.scale, pitch, close + j * pitch, top);
    }
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < RV; ++i) {
        const vf x = exp(load(close + j * pitch + i * L) - of.sum[j]);
        store(close + j * pitch + i * L, x), mean[i] += x;
      }
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) mean[i] = mean[i] / float(n), top[i] = load(w.top + (v + i) * L);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < RV; ++i) {
        const vf alpha = of.heuristic[j] + of.coefficient * (load(close + j * pitch + i * L) - mean[i]);
        const vf x = load(s + j * pitch + i * L) + (log(maximum(alpha, set1(C::kLeastWeight))) + of.offset[j]);
        store(s + j * pitch + i * L, x), top[i] = max_fast(x, top[i]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) store(w.peak + (v + i) * L, top[i]);
    return n;
  }
};

}  // namespace attention
