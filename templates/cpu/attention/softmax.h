// The online softmax over blocks of keys.
#pragma once
#include "attention/scratch.h"

namespace attention {

// Changes the scores of n keys in RV vectors from v0 as the policy says, if they are to be changed, and turns them into
// weights relative to the new maximum of every row. For an exact run masked weights are marked -0. With kPaired weights
// of two keys each, rounded to bf16, take the place of the first half of them, zero beside an odd last one.
template <int RV, bool kExact, bool kPaired, class C>
__attribute__((noinline)) void softmax(Scratch<C>& w, int64_t n, int64_t v0, bool changes, bool row_bias) {
  using Scores = typename C::Scores;
  const vf lowest = set1(-kInf);
  const int64_t pitch = w.pitch;
  float* const s = w.s + v0 * L;
  vf old[RV], top[RV], sum[RV], shift[RV];
#pragma GCC unroll 8
  for (int v = 0; v < RV; ++v) top[v] = old[v] = load(w.top + (v0 + v) * L);
  if (changes) {
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        const vf x = Scores::change(w, load(s + j * pitch + v * L), j, v0 + v, row_bias);
        store(s + j * pitch + v * L, x);
        top[v] = max_fast(x, top[v]);
      }
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) top[v] = load(w.peak + (v0 + v) * L);
  }
#pragma GCC unroll 8
  for (int v = 0; v < RV; ++v) {
    // A row that has seen no key yet must not subtract -inf from -inf.
    shift[v] = select((vi)(top[v] == lowest), vf{}, top[v]);
    const vf decay = Scores::weight(old[v], shift[v]);
    store(w.top + (v0 + v) * L, top[v]);
    store(w.decay + (v0 + v) * L, decay);
    sum[v] = vf{};
  }
  const auto weigh = [&](int64_t j, int v) __attribute__((always_inline)) {
    const vf x = load(s + j * pitch + v * L);
    vf p = Scores::weight(x, shift[v]);
    sum[v] += p;
    if constexpr (kExact && Scores::kPairValues) p = to_bf16(p);
    if constexpr (kExact) p = select((vi)(x == lowest), set1(-0.0f), p);
    return p;
  };
  if constexpr (kPaired) {
    auto* to = reinterpret_cast<bf16x2*>(s);
    int64_t j = 0;
    for (; j + 2 <= n; j += 2, to += pitch)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        const vf p = weigh(j, v), next = weigh(j + 1, v);
        store(to + v * L, bf16_pairs(p, next));
      }
    for (int v = 0; v < RV && j < n; ++v) store(to + v * L, bf16_pairs(weigh(j, v), vf{}));
  } else {
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) store(s + j * pitch + v * L, weigh(j, v));
  }
#pragma GCC unroll 8
  for (int v = 0; v < RV; ++v) {
    float* to = w.sum + (v0 + v) * L;
    store(to, load(to) * load(w.decay + (v0 + v) * L) + sum[v]);
  }
}

}  // namespace attention
