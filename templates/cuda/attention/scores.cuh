// Score policies: how the scores of a tile are made, changed, and turned into weights.
//
// A policy has these hooks, in the order in which they are called; one inherits from Changes what others share.
//   Queries                        the rows of q that a warp keeps: load(...) once a tile
//   score(s, ...)                  the scores of a step's keys, in units of `scale` unless kNats
//   change(p, s, queries, mask)    what becomes of them: the scale's sign, a bias, keys that the run-time mask forbids
//   forbid(s, word)                the same for pairs that the plan does not list
//   Row                            one row of q: score(p, place, key, y, ...) is what becomes of its score under the
//                                  value y of the run-time mask, -inf where kPrunes and the pair is left out
//   unit(scale)                    binary exponents in one unit of a score
//   shift(top, unit)               the exponent that weights are relative to where top is the largest score of a row
//   weight(x, shift, unit)         2^(unit * x - shift)
//   decay(old, top, unit)          2^(shift(old) - shift(top)), zero for a row that has seen no key yet
#pragma once
#include <type_traits>

#include "cuda/attention/tile.cuh"

#define FUSER_INLINE static __device__ __forceinline__

namespace attention {

// What score rules are written in.
using Number = float;
__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }

// Two neighbours of a row of q as the 32 bits of a fragment; columns beyond the head are zero.
template <class S>
__device__ __forceinline__ uint32_t pair_of(const Element<S>* row, int c, bool pairs) {
  if (S::kHeadDim % 2 == 0 && pairs) return c < S::kHeadDim ? *reinterpret_cast<const uint32_t*>(row + c) : 0u;
  return (c < S::kHeadDim ? uint32_t(row[c].bits) : 0u) | (c + 1 < S::kHeadDim ? uint32_t(row[c + 1].bits) << 16 : 0u);
}

template <class S>
struct Queries {
  uint32_t a[S::kQShared ? 1 : S::kHalf ? S::kKeyWidth / 16 : S::kKeyWidth / 8][4];

  __device__ __forceinline__ void load(const Problem<S>& p, const Place<S>& place, const int4*,
                                       const int (&row)[S::kLaneRows], unsigned lane) {
    if constexpr (!S::kQShared) {
      const int64_t stride = p.of_q.row;
      load(place.q + (row[0] < 0 ? 0 : row[0]) * stride, place.q + (row[1] < 0 ? 0 : row[1]) * stride, lane, p.pairs);
    }
  }

  __device__ __forceinline__ void load(const Element<S>* first, const Element<S>* second, unsigned lane, bool pairs) {
    if constexpr (!S::kQShared) {
#pragma unroll
      for (int k = 0; k < int(sizeof(a) / sizeof(a[0])); ++k) {
        if constexpr (S::kHalf) {
          const int c = 16 * k + 2 * (lane % 4);
          a[k][0] = pair_of<S>(first, c, pairs), a[k][1] = pair_of<S>(second, c, pairs);
          a[k][2] = pair_of<S>(first, c + 8, pairs), a[k][3] = pair_of<S>(second, c + 8, pairs);
        } else {
          const int c = 8 * k + lane % 4;
          a[k][0] = c < S::kHeadDim ? to_tf32(first[c]) : 0u, a[k][1] = c < S::kHeadDim ? to_tf32(second[c]) : 0u;
          a[k][2] = c + 4 < S::kHeadDim ? to_tf32(first[c + 4]) : 0u;
          a[k][3] = c + 4 < S::kHeadDim ? to_tf32(second[c + 4]) : 0u;
        }
      }
    }
  }

  __device__ __forceinline__ void fragment(uint32_t (&to)[4], const Element<S>* shared, int k, unsigned lane) const {
    if constexpr (!S::kQShared) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = a[k][i];
    } else {
      if constexpr (S::kHalf) {
        ldmatrix(to, shared + lane % 16 * S::kKPitch + 16 * k + lane / 16 * 8);
      } else {
        const Element<S>* at = shared + lane / 4 * S::kKPitch + 8 * k + lane % 4;
        to[0] = to_tf32(at[0]), to[1] = to_tf32(at[8 * S::kKPitch]);
        to[2] = to_tf32(at[4]), to[3] = to_tf32(at[8 * S::kKPitch + 4]);
      }
    }
  }
};

// s = q k^T for the 16 rows of a warp, whose q is in registers or at ``shared``.
template <class S>
__device__ __forceinline__ void products(float (&s)[S::kTiles][4], const Queries<S>& q, const Element<S>* shared,
                                         const Element<S>* k, unsigned lane) {
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
  if constexpr (S::kHalf) {
    const Element<S>* at = k + (lane % 8 + lane / 16 * 8) * S::kKPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < S::kKeyWidth / 16; ++d) {
      uint32_t a[4];
      q.fragment(a, shared, d, lane);
#pragma unroll
      for (int j = 0; j < S::kTiles; j += 2) {
        uint32_t b[4];
        ldmatrix(b, at + 8 * j * S::kKPitch + 16 * d);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma<Element<S>>(s[j], a, low);
        mma<Element<S>>(s[j + 1], a, high);
      }
    }
  } else if constexpr (S::kTf32) {
    const Element<S>* at = k + lane / 4 * S::kKPitch + lane % 4;
#pragma unroll
    for (int d = 0; d < S::kKeyWidth / 8; ++d) {
      uint32_t a[4];
      q.fragment(a, shared, d, lane);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const Element<S>* from = at + 8 * j * S::kKPitch + 8 * d;
        const uint32_t b[2] = {to_tf32(from[0]), to_tf32(from[4])};
        mma<tf32>(s[j], a, b);
      }
    }
  } else {
#pragma unroll 2
    for (int d = 0; d < S::kKeyWidth; d += 4) {
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = *reinterpret_cast<const float4*>(shared + (4 * (lane / 8) + i) * S::kKPitch + d);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const float4 y = *reinterpret_cast<const float4*>(k + (8 * j + lane % 8) * S::kKPitch + d);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[j][i] = fmaf(x[i].w, y.w, fmaf(x[i].z, y.z, fmaf(x[i].y, y.y, fmaf(x[i].x, y.x, s[j][i]))));
      }
    }
  }
}

// A row that has seen no key yet must not subtract -inf from -inf.
__device__ __forceinline__ float finite_shift(float top) {
  return top == -kInf ? 0.0f : top;
}

template <class S>
constexpr bool kRule = !std::is_void<typename S::Rule>::value;

// The scores of q k^T that neither rule nor mask has changed. With kScaled they have their scale, in which case no
// rounding of theirs is left out.
template <class S, bool kScaled>
struct Changes {
  static constexpr bool kNats = kScaled || S::kBias || kRule<S>, kPrunes = false;

  static __device__ __forceinline__ float in_nats(const Problem<S>& p, float x, float y) {
    if constexpr (kScaled && kRule<S>)
      return __fadd_rn(S::Rule::apply(x), y);
    else if constexpr (kScaled)
      return __fadd_rn(x, y);
    else if constexpr (kRule<S>)
      return S::Rule::apply(x * p.scale) + y;
    else
      return fmaf(x, p.scale, y);
  }

  // mask(j, e) is the value of the run-time mask. Returns whether any is very low, but not -inf.
  template <class Queries, class Mask>
  static __device__ __forceinline__ bool change(const Problem<S>& p, float (&s)[S::kTiles][4], const Queries&,
                                                const Mask& mask) {
    bool low = false;
    if constexpr (S::kMask || S::kDistances) {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = mask(j, e);
          low |= x <= kNever && x != -kInf;
          s[j][e] = x <= kNever ? -kInf : kNats ? in_nats(p, s[j][e], x) : s[j][e];
        }
    } else if constexpr (kRule<S>) {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = in_nats(p, s[j][e], 0.0f);
    }
    if (!kNats && p.negative) {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = s[j][e] == -kInf && S::kMask ? -kInf : -s[j][e];
    }
    return low;
  }

  // Lanes that the plan's word of bits does not list.
  static __device__ __forceinline__ void forbid(float (&s)[S::kTiles][4], uint32_t word) {
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = word >> (4 * j + e) & 1 ? s[j][e] : -kInf;
  }

  // A scale of zero must not meet the infinity of a masked score.
  static float unit(float scale) { return kNats ? kLog2e : fmaxf(fabsf(scale) * kLog2e, 1e-30f); }

  // A bias may be as low as floats go, so that its product with the unit would overflow; and rows of codes make scores
  // of up to 2^100, whose product with it has no digits of a weight.
  static constexpr bool kDifferences = kScaled || S::kBias;
  static __device__ __forceinline__ float shift(float top, float unit) {
    return kDifferences ? finite_shift(top) : finite_shift(top) * unit;
  }
  static __device__ __forceinline__ float weight(float x, float shift, float unit) {
    return device::exp2(kDifferences ? (x - shift) * unit : fmaf(x, unit, -shift));
  }
  // Weights are relative to a rounded product, so what becomes of them must be as well.
  static __device__ __forceinline__ float decay(float old, float top, float unit) {
    const float to = finite_shift(top);
    return device::exp2(kDifferences ? (old - to) * unit : __fmul_rn(old, unit) - __fmul_rn(to, unit));
  }
};

// The product of a row of q and one of k as they are given, in all lanes.
template <class S>
__device__ __forceinline__ float product_of_rows(const Element<S>* q, const Element<S>* k, unsigned lane) {
  float x = 0.0f;
  for (int d = lane; d < S::kHeadDim; d += 32) x = fmaf(float(q[d]), float(k[d]), x);
  return warp_sum(x);
}

// rule(scale * q k^T) + mask. Without rule and bias scores are q k^T, and the scale comes with the exponent.
template <class S>
struct Products : Changes<S, false> {
  using Base = Changes<S, false>;
  using Queries = attention::Queries<S>;

  static __device__ __forceinline__ void score(float (&s)[S::kTiles][4], const Queries& q, const Element<S>* shared,
                                               const Element<S>* k, float*, unsigned lane) {
    products<S>(s, q, shared, k, lane);
  }

  struct Row {
    const Element<S>* q;

    __device__ __forceinline__ Row(const Problem<S>& p, const Place<S>& place, int4 member)
        : q(place.q + int64_t(member.x) * p.of_q.row) {}

    __device__ __forceinline__ float score(const Problem<S>& p, const Place<S>& place, int64_t key, float y,
                                           unsigned lane) const {
      const float x = product_of_rows<S>(q, place.k + key * p.of_k.row, lane);
      return Base::kNats ? Base::in_nats(p, x, y) : p.negative ? -x : x;
    }
  };
};

}  // namespace attention
