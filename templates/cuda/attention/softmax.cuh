// The online softmax over steps of keys.
#pragma once
#include "cuda/attention/scores.cuh"
#include "cuda/attention/tile.cuh"

namespace attention {

// Weights may exceed one by this power of two before they are taken relative to a new maximum.
constexpr float kSlack = 8.0f;

// Turns the scores s of a step into weights, adds them to sum, and brings the results o to what they are relative to.
template <class S>
__device__ __forceinline__ void softmax(const Problem<S>& p, float (&s)[S::kTiles][4], float (&o)[S::kOutTiles][4],
                                        float (&top)[S::kLaneRows], float (&sum)[S::kLaneRows]) {
  using Scores = typename S::Scores;
  float most[S::kLaneRows], shift[S::kLaneRows];
  bool grows = false;
#pragma unroll
  for (int r = 0; r < S::kLaneRows; ++r) {
    most[r] = top[r];
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (which_row<S>(e) == r) most[r] = fmaxf(most[r], s[j][e]);
    most[r] = warp_max(most[r], S::kLanes);
    grows |= (most[r] - top[r]) * p.unit > kSlack;
  }
  // Any shift near the maximum will do, so results are rescaled only when it has grown by more than a little.
  if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) {
      const float decay = Scores::decay(top[r], most[r], p.unit);
      top[r] = most[r], sum[r] *= decay;
#pragma unroll
      for (int j = 0; j < S::kOutTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (which_row<S>(e) == r) o[j][e] *= decay;
    }
  }
#pragma unroll
  for (int r = 0; r < S::kLaneRows; ++r) shift[r] = Scores::shift(top[r], p.unit);
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = Scores::weight(s[j][e], shift[which_row<S>(e)], p.unit);
      sum[which_row<S>(e)] += s[j][e];
    }
}

}  // namespace attention
