// Weights times values: every function adds a block of n keys to the results w.o of the rows in its lanes, after the
// results so far are multiplied with w.decay.
#pragma once
#include "attention/scores.h"

namespace attention {

// o[d][lane] = decay[lane] * o[d][lane] + sum over keys of p[j][lane] v[j][d], for RD values of d; o counts as 0 if
// first. A block is summed by itself, so that rounding errors grow with the number of blocks rather than of keys. With
// pairs, a "key" is two of them.
template <int RV, int RD, class W>
FUSER_INLINE void values_tile(const W* p, const W* const* v_row, int64_t n, int64_t d, const float* decay, bool first,
                              int64_t pitch, float* o) {
  vf acc[RD][RV] = {};
  for (int64_t j = 0; j < n; ++j, p += pitch) {
    const W* value = v_row[j] + d;
    decltype(load(p)) x[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) x[v] = load(p + v * L);
#pragma GCC unroll 24
    for (int i = 0; i < RD; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) acc[i][v] = multiply_add(acc[i][v], x[v], value[i]);
  }
  o += d * pitch;
#pragma GCC unroll 24
  for (int i = 0; i < RD; ++i, o += pitch)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v)
      store(o + v * L, first ? acc[i][v] : load(o + v * L) * load(decay + v * L) + acc[i][v]);
}

// n keys, or pairs of them, of RV vectors from v.
template <int RV, class W, class C>
__attribute__((noinline)) void values(Scratch<C>& w, const W* const* v_row, int64_t n, int64_t v, bool first) {
  constexpr int64_t DV = C::kValueDim;
  constexpr int RD = kAccumulators / RV;
  const W* const p = reinterpret_cast<const W*>(w.s + v * L);
  for (int64_t d = 0; d + RD <= DV; d += RD) {
    w.ahead.announce();
    values_tile<RV, RD>(p, v_row, n, d, w.decay + v * L, first, w.pitch, w.o + v * L);
  }
  if constexpr (DV % RD != 0)
    values_tile<RV, DV % RD>(p, v_row, n, DV - DV % RD, w.decay + v * L, first, w.pitch, w.o + v * L);
}

// Pairs of the bf16 numbers that a and b hold.
FUSER_INLINE vi pairs_of(vf a, vf b) { return (vi)((vu)a >> 16 | (vu)b); }

// Brings together the values of two keys each in w.pair_row, zeros beside an odd last one.
template <class C>
__attribute__((noinline)) void pair_values(Scratch<C>& w, const bf16* const* v_row, int64_t n) {
  constexpr int64_t DV = C::kValueDim;
  alignas(64) static constexpr bf16 zero[kPairRow<C>] = {};
  for (int64_t j = 0; j < n; j += 2) {
    const bf16 *const a = v_row[j], *const b = j + 1 < n ? v_row[j + 1] : zero;
    bf16x2* const to = w.pairs + j / 2 * kPairRow<C>;
    int64_t d = 0;
    for (; d + L <= DV; d += L) store(to + d, pairs_of(load(a + d), load(b + d)));
    if constexpr (DV % L != 0) store(to + d, pairs_of(load_n(a + d, DV % L), load_n(b + d, DV % L)));
    w.pair_row[j / 2] = to;
  }
}

// The same for one row r and the `size` elements from d that M vectors hold.
template <int M, class C>
FUSER_INLINE void values_of_row(Scratch<C>& w, int64_t n, int64_t r, int64_t d, int64_t size) {
  vf acc[M] = {};
  for (int64_t j = 0; j < n; ++j) {
    const float p = w.s[j * w.pitch + r];
    const Value<C>* value = w.v_row[j] + d;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] += p * (size == M * L ? load(value + m * L) : load_n(value, size));
  }
  float sum[M * L];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(sum + m * L, acc[m]);
  float* const o = w.o + d * w.pitch + r;
  for (int64_t i = 0; i < size; ++i) o[i * w.pitch] = o[i * w.pitch] * w.decay[r] + sum[i];
}

template <class C>
__attribute__((noinline)) void values_of_few(Scratch<C>& w, int64_t n, int64_t rows) {
  constexpr int64_t DV = C::kValueDim;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + 8 * L <= DV; d += 8 * L) values_of_row<8>(w, n, r, d, 8 * L);
    for (; d + 4 * L <= DV; d += 4 * L) values_of_row<4>(w, n, r, d, 4 * L);
    for (; d + L <= DV; d += L) values_of_row<1>(w, n, r, d, L);
    if constexpr (DV % L != 0) values_of_row<1>(w, n, r, d, DV % L);
  }
}

// The same where masked weights, marked -0, must not multiply a value that is not finite.
template <class C>
void values_exact(Scratch<C>& w, int64_t n, Range range, bool first) {
  for (int64_t v = range.first; v < range.last; ++v)
    for (int64_t d = 0; d < C::kValueDim; ++d) {
      float* o = w.o + d * w.pitch + v * L;
      vf acc = vf{};
      for (int64_t j = 0; j < n; ++j) {
        const vf p = load(w.s + j * w.pitch + v * L);
        acc = select((vi)p == INT32_MIN, acc, acc + p * to_float(w.v_row[j][d]));
      }
      store(o, first ? acc : load(o) * load(w.decay + v * L) + acc);
    }
}

}  // namespace attention
