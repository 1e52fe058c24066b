// Scores in 8 bits: fuser/ir/int8_attention.py says what. Rows of k lose their mean before they become codes.
//
// The configuration adds nothing. The extents add `workspace` and `smooth`. Behind the rows (codes.cuh) lie the mean of
// every head of k, and whether it has rows without codes, in which case all of it is computed as given.
#pragma once
#include "cuda/attention/codes.cuh"
#include "cuda/attention/kernel.cuh"

namespace attention {

constexpr int kMeanThreads = 512;

// A block for each head.
template <class S>
__global__ void __launch_bounds__(kMeanThreads) mean_rows(const Rows<S> r, bool smooth) {
  __shared__ double sums[kMeanThreads];
  constexpr int kShare = kMeanThreads / S::kCodeWidth;  // threads of a column
  const int64_t head = blockIdx.x;
  const int column = threadIdx.x % S::kCodeWidth, first = threadIdx.x / S::kCodeWidth;
  const Element<S>* from = r.rows + head / r.heads * r.of.batch + head % r.heads * r.of.head + column;
  double sum = 0.0;
  if (smooth && column < S::kHeadDim && first < kShare)
    for (int64_t i = first; i < r.length; i += kShare) sum += double(float(from[i * r.of.row]));
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) r.unsound[head] = 0;
  if (threadIdx.x >= S::kHeadDim) return;
  for (int i = 1; i < kShare; ++i) sum += sums[i * S::kCodeWidth + column];
  r.means[head * S::kHeadDim + column] = float(sum / double(r.length));
}

template <class S>
struct Int8 : Changes<S, true> {
  using Base = Changes<S, true>;
  // What depends on the mean of k is the same for all keys of a row.
  static constexpr bool kShifts = kRule<S> || S::kLse;

  template <bool kOfKeys>
  static __device__ __forceinline__ float2 round(const Rows<S>& r, CodeRow<S>& row, int64_t head, int8_t* to,
                                                 unsigned lane) {
    float shift = 0.0f;
    if constexpr (kOfKeys) {
      const float* mean = r.means + head * S::kHeadDim;
      row.each(lane, [mean](float& x, int c) { x -= mean[c]; });
    } else if constexpr (kShifts) {
      const float* mean = r.means + head / r.group * S::kHeadDim;
      row.each(lane, [&](float x, int c) { shift = fmaf(x * r.scale, mean[c], shift); });
      shift = warp_sum(shift);
    }
    row.measure(lane);
    if (kOfKeys && row.largest == kInf && lane == 0) atomicOr(r.unsound + head, 1);
    return make_float2(row.quantize(kLargestByte, to, lane), shift);
  }

  struct Queries : CodeQueries<S> {
    float shift[S::kLaneRows];

    __device__ __forceinline__ void load(const Problem<S>& p, const Place<S>& place, const int4* members,
                                         const int (&row)[S::kLaneRows], unsigned lane) {
      CodeQueries<S>::load(p, place, members, row, lane);
      const bool unsound = *place.unsound != 0;
#pragma unroll
      for (int r = 0; r < S::kLaneRows; ++r) {
        if (unsound) this->step[r] = __int_as_float(0x7fc00000);
        if constexpr (kShifts) shift[r] = this->number(p, place, row[r], 1);
      }
    }
  };

  static __device__ __forceinline__ void score(float (&s)[S::kTiles][4], const Queries& q, const Key<S>* shared,
                                               const Key<S>* k, float* scratch, unsigned lane) {
    code_scores<S, 0>(s, q, q.step, shared, k, scratch, lane);
    if constexpr (kShifts)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = __fadd_rn(s[j][e], q.shift[which_row<S>(e)]);
  }

  struct Row {
    const Key<S>* codes;
    const Element<S>* given;
    float step, shift;
    bool sound;

    __device__ __forceinline__ Row(const Problem<S>& p, const Place<S>& place, int4 member)
        : codes(place.q + int64_t(member.x) * p.of_q.row),
          given(place.given_q + int64_t(member.x) * p.given.of_q.row),
          step(__fmul_rn(number_of<S>(codes, 0), p.scale)),
          shift(number_of<S>(codes, 1)),
          sound(step == step && *place.unsound == 0) {}

    __device__ __forceinline__ float score(const Problem<S>& p, const Place<S>& place, int64_t key, float y,
                                           unsigned lane) const {
      float x;
      if (sound)
        x = __fadd_rn(code_score<S, 0>(codes, step, place.k + key * p.of_k.row, lane), shift);
      else
        x = product_of_rows<S>(given, place.given_k + key * p.given.of_k.row, lane) * p.scale;
      return Base::in_nats(p, x, y);
    }
  };
};

template <class S, class Kernel>
int run_int8(const FuserArgs* args, void* stream, Kernel attend) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  Problem<S> p{};
  if (!bind(args, p)) return kUnsupported;
  if (p.units * p.tiles == 0) return 0;
  bind_codes<S>(args, p);
  Rows<S> q = rows_of(args, p, false), k = rows_of(args, p, true);
  q.means = k.means = reinterpret_cast<float*>(CodeSpace<S>(args).end);
  k.unsound = reinterpret_cast<int*>(k.means + e.batch * e.key_heads * S::kHeadDim);
  p.given.unsound = k.unsound;
  const dim3 heads(unsigned(e.batch * e.key_heads));
  if (const int status = launch(mean_rows<S>, heads, dim3(kMeanThreads), 0, stream, k, e.smooth != 0)) return status;
  if (const int status = launch_rows(round_rows<S, true>, k, stream)) return status;
  if (const int status = launch_rows(round_rows<S, false>, q, stream)) return status;
  return start(args, stream, p, attend);
}

}  // namespace attention
