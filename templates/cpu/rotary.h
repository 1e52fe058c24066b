// Rotary embedding of one row.
//
// A configuration C:
//   X, Table, Out                 types of the row, of cos and sin, and of the result
//   kColumns, kStart, kWidth      columns of the row, and which of them are rotated: kWidth from kStart on
//   kInterleaved                  whether pairs are neighbours; otherwise they are half a width apart
//   kPaired                       whether cos and sin have one number for each pair, not for each column
#pragma once
#include "simd.h"

namespace rotary {
using namespace simd;

template <class T>
FUSER_INLINE vf load_part(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T>
FUSER_INLINE void store_part(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store_n(p, v, n);
}

// Lane i of the result is lane index(i) of v.
template <class Index>
FUSER_INLINE vf shuffled(vf v, const Index& index) {
  vi lanes;
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = int32_t(index(i));
  return __builtin_shuffle(v, lanes);
}

// Two lanes for each of the n / 2 numbers at p, or one for each of n.
template <class C>
FUSER_INLINE vf of_neighbours(const typename C::Table* p, int64_t n) {
  if constexpr (!C::kPaired) return load_part(p, n);
  return shuffled(load_n(p, n / 2), [](int64_t i) { return i / 2; });
}

// `to` may not overlap with `x`.
template <class C>
FUSER_INLINE void rotate(const typename C::X* x, const typename C::Table* cos, const typename C::Table* sin,
                         typename C::Out* to) {
  constexpr int64_t half = C::kWidth / 2, end = C::kStart + C::kWidth;
  const auto copy = [&](int64_t from, int64_t to_) {
    for (int64_t i = from; i < to_; i += kLanes) {
      const int64_t n = to_ - i < kLanes ? to_ - i : kLanes;
      store_part(to + i, load_part(x + i, n), n);
    }
  };
  copy(0, C::kStart);
  if constexpr (C::kInterleaved) {
    vf sign;
    for (int64_t i = 0; i < kLanes; ++i) sign[i] = i % 2 ? 1.0f : -1.0f;
    for (int64_t i = 0; i < C::kWidth; i += kLanes) {
      const int64_t n = C::kWidth - i < kLanes ? C::kWidth - i : kLanes, at = C::kPaired ? i / 2 : i;
      const vf own = load_part(x + C::kStart + i, n);
      const vf partner = shuffled(own, [](int64_t lane) { return lane ^ 1; }) * sign;
      store_part(to + C::kStart + i, own * of_neighbours<C>(cos + at, n) + partner * of_neighbours<C>(sin + at, n), n);
    }
  } else {
    constexpr int64_t second = C::kPaired ? 0 : half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t n = half - i < kLanes ? half - i : kLanes;
      const vf a = load_part(x + C::kStart + i, n), b = load_part(x + C::kStart + half + i, n);
      const vf first = a * load_part(cos + i, n) - b * load_part(sin + i, n);
      const vf other = b * load_part(cos + second + i, n) + a * load_part(sin + second + i, n);
      store_part(to + C::kStart + i, first, n);
      store_part(to + C::kStart + half + i, other, n);
    }
  }
  copy(end, C::kColumns);
}

}  // namespace rotary
