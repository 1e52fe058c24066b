// What becomes of the results of a tile.
#pragma once
#include "cuda/attention/scores.cuh"
#include "cuda/attention/tile.cuh"

namespace attention {

// The log-sum-exp in natural units.
template <class S>
__device__ __forceinline__ float log_sum(const Problem<S>& p, float top, float sum) {
  return sum == 0.0f ? -kInf : fmaf(top, p.unit / kLog2e, logf(sum));
}

// Writes the results of a warp's 16 rows, or leaves them as states and merges rows whose last part this was.
template <class S>
__device__ __forceinline__ void finish(const Problem<S>& p, int4 work, float (&o)[S::kOutTiles][4],
                                       float (&top)[S::kLaneRows], float (&sum)[S::kLaneRows], bool low, unsigned lane,
                                       unsigned warp) {
  const Place<S> place(p, work);
  const int4* members = place.members + warp * 16;
  const int64_t states = work.y % p.in_flight * p.states;
  const bool masked = S::kMask || S::kCodes != 0 || (place.item.w >> warp & 1) != 0;
  int row[S::kLaneRows];
#pragma unroll
  for (int r = 0; r < S::kLaneRows; ++r) row[r] = members[row_of<S>(lane, r)].x;
  // Results of this lane's rows. Where masks were at work, a result that is not finite may come from a value that the
  // row does not see (0 * inf), and a row without a maximum may have keys with a very low bias: both are computed
  // again, as are rows with scores that have no codes, which are NaN.
  bool again[S::kLaneRows];
#pragma unroll
  for (int r = 0; r < S::kLaneRows; ++r) {
    float poison = 0.0f;
#pragma unroll
    for (int j = 0; j < S::kOutTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (which_row<S>(e) == r) poison = fmaf(o[j][e], 0.0f, poison);
    again[r] = (poison != 0.0f && masked) || (S::kBias && low && top[r] == -kInf);
#pragma unroll
    for (int far = 1; far < S::kLanes; far *= 2) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], far);
      again[r] |= bool(__shfl_xor_sync(0xffffffffu, int(again[r]), far));
    }
    again[r] &= row[r] >= 0;
  }
  if (p.states != 0 && work.y >= p.in_flight) {
    // The places of an earlier unit's states are free when all its tiles are done; they were taken before this one.
    if (lane == 0)
      while (load_acquire(p.done + work.y - p.in_flight) < int(p.tiles)) {
      }
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < S::kLaneRows; ++r) {
    if (row[r] < 0 || again[r]) continue;
    const int4 member = members[row_of<S>(lane, r)];
    if (member.w == 1) {
      const float factor = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
      Element<S>* out = place.out + int64_t(row[r]) * p.of_out.row;
#pragma unroll
      for (int j = 0; j < S::kOutTiles; ++j) {
        if constexpr (S::kHalf) {
          const int c = column_of<S>(lane, j, 0);
          const uint32_t two = pack<Element<S>>(o[j][2 * r] * factor, o[j][2 * r + 1] * factor);
          if (S::kHeadDim % 2 == 0 && S::kValueDim % 2 == 0 && p.pairs) {
            if (c < S::kValueDim) *reinterpret_cast<uint32_t*>(out + c) = two;
          } else {
            if (c < S::kValueDim) out[c] = Element<S>(o[j][2 * r] * factor);
            if (c + 1 < S::kValueDim) out[c + 1] = Element<S>(o[j][2 * r + 1] * factor);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (const int c = column_of<S>(lane, j, e); which_row<S>(e) == r && c < S::kValueDim)
              out[c] = Element<S>(o[j][e] * factor);
        }
      }
      if (S::kLse && lane % S::kLanes == 0) place.lse[int64_t(row[r]) * p.of_lse.row] = log_sum(p, top[r], sum[r]);
    } else {
      const int64_t state = states + member.y + member.z;
#pragma unroll
      for (int j = 0; j < S::kOutTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (which_row<S>(e) == r) p.state[state * S::kValueWidth + column_of<S>(lane, j, e)] = o[j][e];
      if (lane % S::kLanes == 0) p.state_sum[state] = make_float2(top[r], sum[r]);
    }
  }

  // The rows of this warp that must be computed key by key, and then those whose last part this was.
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) {
      if (p.states == 0) break;
      __threadfence();
      __syncwarp();
    }
    uint32_t rows = 0;
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) {
      bool chosen = again[r];
      if (pass == 1) {
        chosen = false;
        if (lane % S::kLanes == 0 && row[r] >= 0) {
          const int4 member = members[row_of<S>(lane, r)];
          if (member.w > 1) {
            int* arrived = p.arrived + states + member.y;
            chosen = atomicAdd(arrived, 1) == member.w - 1;
            if (chosen) *arrived = 0;
          }
        }
      }
      const uint32_t votes = __ballot_sync(0xffffffffu, chosen && lane % S::kLanes == 0);
#pragma unroll
      for (int from = 0; from < 32; from += S::kLanes) rows |= (votes >> from & 1) << row_of<S>(from, r);
    }
    if (pass == 1 && rows != 0) __threadfence();
#pragma unroll 1
    for (; rows != 0; rows &= rows - 1) {
      const int local = __ffs(int(rows)) - 1;
      const int4 member = members[local];
      float result[S::kValueWidth / 32 + 1], most = -kInf, all = 0.0f;
#pragma unroll
      for (int c = 0; c < S::kValueWidth / 32 + 1; ++c) result[c] = 0.0f;
      if (pass == 1) {
        const int64_t first = states + member.y;
        for (int part = 0; part < member.w; ++part) most = fmaxf(most, __ldcg(p.state_sum + first + part).x);
        for (int part = 0; part < member.w; ++part) {
          const float2 state = __ldcg(p.state_sum + first + part);
          const float weight = S::Scores::decay(state.x, most, p.unit);
          // A weight of zero must not meet a result that is not finite, unless it is the row's own.
          if (state.x == -kInf && state.y == 0.0f) continue;
          all = fmaf(state.y, weight, all);
#pragma unroll
          for (int c = 0; c < S::kValueWidth / 32 + 1; ++c)
            if (const int d = 32 * c + lane; d < S::kValueWidth)
              result[c] = fmaf(__ldcg(p.state + (first + part) * S::kValueWidth + d), weight, result[c]);
        }
      } else {
        const typename S::Scores::Row query(p, place, member);
        Cursor<S> step(p.records + place.item.x);
        for (int i = 0; i < place.item.y * S::kParts; ++i) {
          step.advance();
          const int kind = step.record.z >> 2 * warp & 3;
          if (kind == 0) continue;
          const uint32_t* words = p.words + (step.record.w * S::kWarps + warp) * 32;
          for (int n = 0; n < S::kKeys; ++n) {
            const int64_t c = step.key(p.lists, n);
            if (kind == 1 && !bit_of<S>(words, local, step.info().x / 65536 * S::kKeys + n)) continue;
            const float y = place.added(p, member.x, c);
            if (y == -kInf) continue;
            const float x = query.score(p, place, c, y, lane);
            if (S::Scores::kPrunes && x == -kInf) continue;
            const float before = most;
            most = fmaxf(most, x);
            const float decay = S::Scores::decay(before, most, p.unit);
            const float weight = S::Scores::weight(x, S::Scores::shift(most, p.unit), p.unit);
            all = fmaf(all, decay, weight);
#pragma unroll
            for (int t = 0; t < S::kValueWidth / 32 + 1; ++t)
              if (const int d = 32 * t + lane; d < S::kValueDim)
                result[t] = fmaf(result[t], decay, weight * float(place.v[c * p.of_v.row + d]));
          }
        }
      }
      if (pass == 0 && member.w > 1) {
        const int64_t state = states + member.y + member.z;
#pragma unroll
        for (int c = 0; c < S::kValueWidth / 32 + 1; ++c)
          if (const int d = 32 * c + lane; d < S::kValueWidth) p.state[state * S::kValueWidth + d] = result[c];
        if (lane == 0) p.state_sum[state] = make_float2(most, all);
      } else {
        Element<S>* out = place.out + int64_t(member.x) * p.of_out.row;
        const float factor = all == 0.0f ? 0.0f : 1.0f / all;
#pragma unroll
        for (int c = 0; c < S::kValueWidth / 32 + 1; ++c)
          if (const int d = 32 * c + lane; d < S::kValueDim) out[d] = Element<S>(result[c] * factor);
        if (S::kLse && lane == 0) place.lse[int64_t(member.x) * p.of_lse.row] = log_sum(p, most, all);
      }
    }
  }
}

}  // namespace attention
