// Weights times values.
#pragma once
#include "cuda/attention/tile.cuh"

namespace attention {

// o += p v, where p are the probabilities in s.
template <class S>
__device__ __forceinline__ void values(float (&o)[S::kOutTiles][4], float (&s)[S::kTiles][4], float* shared,
                                       const Element<S>* v, unsigned lane) {
  if constexpr (S::kHalf) {
    const Element<S>* at = v + lane % 16 * S::kVPitch + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < S::kTiles; j += 2) {
      const uint32_t a[4] = {pack<Element<S>>(s[j][0], s[j][1]), pack<Element<S>>(s[j][2], s[j][3]),
                             pack<Element<S>>(s[j + 1][0], s[j + 1][1]), pack<Element<S>>(s[j + 1][2], s[j + 1][3])};
#pragma unroll
      for (int n = 0; n < S::kOutTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_trans(b, at + 8 * j * S::kVPitch + 8 * n);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma<Element<S>>(o[n], a, low);
        mma<Element<S>>(o[n + 1], a, high);
      }
    }
  } else if constexpr (S::kTf32) {
    // The order of keys within a product is free: lane t's keys are 2t and 2t + 1, as in its scores.
    const Element<S>* at = v + 2 * (lane % 4) * S::kVPitch + lane / 4;
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      const uint32_t a[4] = {to_tf32(s[j][0]), to_tf32(s[j][2]), to_tf32(s[j][1]), to_tf32(s[j][3])};
#pragma unroll
      for (int n = 0; n < S::kOutTiles; ++n) {
        const Element<S>* from = at + 8 * j * S::kVPitch + 8 * n;
        const uint32_t b[2] = {to_tf32(from[0]), to_tf32(from[S::kVPitch])};
        mma<tf32>(o[n], a, b);
      }
    }
  } else {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) shared[(4 * (lane / 8) + i) * S::kPPitch + 8 * j + lane % 8] = s[j][i];
    __syncwarp();
#pragma unroll 2
    for (int c = 0; c < S::kKeys; c += 4) {
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = *reinterpret_cast<const float4*>(shared + (4 * (lane / 8) + i) * S::kPPitch + c);
#pragma unroll
      for (int u = 0; u < S::kValueWidth / 32; ++u)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float4 y = *reinterpret_cast<const float4*>(v + (c + t) * S::kVPitch + 32 * u + 4 * (lane % 8));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float w = t == 0 ? x[i].x : t == 1 ? x[i].y : t == 2 ? x[i].z : x[i].w;
            o[4 * u][i] = fmaf(w, y.x, o[4 * u][i]), o[4 * u + 1][i] = fmaf(w, y.y, o[4 * u + 1][i]);
            o[4 * u + 2][i] = fmaf(w, y.z, o[4 * u + 2][i]), o[4 * u + 3][i] = fmaf(w, y.w, o[4 * u + 3][i]);
          }
        }
    }
  }
}

}  // namespace attention
