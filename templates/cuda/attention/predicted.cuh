// Scores predicted with few bits, some of which are computed with more: fuser/ir/prediction.py says what, in PyTorch.
//
// A first kernel, the survey, leaves of every row of scores, or of every part of one that several tiles share, the
// largest predicted score and the sum of weights. A tile makes these its rows' limits, and then computes both scores.
// Codes, predicted scores and limits that follow from maxima have the bits of the PyTorch code.
//
// The configuration adds:
//   kBits                          width of codes
//   kGiven                         whether scores above their limit are of q and k as given, not of codes of 8 bits
//   kPerRow, kDynamic, kNormalize  where the largest code stands: see Prediction.calibration
//   kSums                          whether limits follow from sums of weights, too
//   kBefore                        whether scores are compared, not probabilities
//   kOverRows, kOverHeads          what a maximum is of, beyond a row
//   kInverse                       whether scores are computed in full that are not above their limit
//   kPrune                         whether all others are left out
//   kBestOfEmpty, kAllOfEmpty      what is computed in full of a row that has nothing above its limit
// and the extents `workspace`, `limit`, `q_threshold` and `k_threshold`. Behind the rows (codes.cuh) lie the two
// numbers of every row of scores, then those of the parts of every unit's rows; the largest elements of q and of k, and
// of every head of q the largest of its rows.
#pragma once
#include "cuda/attention/codes.cuh"
#include "cuda/attention/kernel.cuh"

namespace attention {

struct Empty {};

// Numbers as integers of their order, in which every number is above zero.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of_order(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// What the survey left of a row: its largest score and sum of weights.
template <class S>
__device__ __forceinline__ float2 known_of(const Place<S>& place, int4 member) {
  const float2* known = member.w == 1 ? place.of_rows + member.x : place.of_parts + member.y;
  float top = -kInf, sum = 0.0f;
  for (int i = 0; i < member.w; ++i) top = fmaxf(top, known[i].x);
  if constexpr (S::kSums)
    for (int i = 0; i < member.w; ++i) sum += known[i].y * expf(known[i].x - finite_shift(top));
  return make_float2(top, sum);
}

// Where the largest of the rows is that share a limit.
template <class S>
__device__ __forceinline__ uint32_t* peak_of(const Problem<S>& p, const Place<S>& place) {
  return p.given.peaks + (S::kOverHeads ? place.head / p.heads : place.head);
}

// Finds these; a block for each tile.
template <class S>
__global__ void __launch_bounds__(S::kThreads) find_peaks(const Problem<S> p) {
  const Place<S> place(p, next_work(p));
  for (int i = threadIdx.x; i < S::kRows; i += S::kThreads) {
    const int4 member = place.members[i];
    if (member.x < 0 || member.z != 0) continue;
    const float2 known = known_of(place, member);
    atomicMax(peak_of(p, place), order_of(S::kBefore ? known.x : known.y > 0.0f ? -logf(known.y) : -kInf));
  }
}

// What the survey makes of predicted scores.
template <class S>
struct Survey : Changes<S, true> {
  using Base = Changes<S, true>;
  using Queries = CodeQueries<S>;

  static __device__ __forceinline__ void score(float (&s)[S::kTiles][4], const Queries& q, const Key<S>* shared,
                                               const Key<S>* k, float* scratch, unsigned lane) {
    code_scores<S, 0>(s, q, q.step, shared, k, scratch, lane);
  }

  // A very low bias counts here: rows that have nothing else have a limit, too.
  template <class Mask>
  static __device__ __forceinline__ bool change(const Problem<S>& p, float (&s)[S::kTiles][4], const Queries&,
                                                const Mask& mask) {
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float y = S::kMask || S::kDistances ? mask(j, e) : 0.0f;
        s[j][e] = y <= kNever ? y : Base::in_nats(p, s[j][e], y);
      }
    return false;
  }

  // Adds scores to what a lane knows of its rows. NaN sets no maximum.
  static __device__ __forceinline__ void know(const float (&s)[S::kTiles][4], float (&top)[S::kLaneRows],
                                              float (&sum)[S::kLaneRows]) {
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) {
      const float before = top[r];
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (which_row<S>(e) == r) top[r] = fmaxf(top[r], s[j][e]);
      if constexpr (S::kSums) {
        const float shift = Base::shift(top[r], kLog2e);
        sum[r] *= Base::decay(before, top[r], kLog2e);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (which_row<S>(e) == r) sum[r] += Base::weight(s[j][e], shift, kLog2e);
      }
    }
  }

  // Leaves what the lanes of a row know.
  static __device__ __forceinline__ void leave(const Place<S>& place, const int4* members, float (&top)[S::kLaneRows],
                                               float (&sum)[S::kLaneRows], unsigned lane) {
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) {
      const float all = warp_max(top[r], S::kLanes);
      if constexpr (S::kSums) sum[r] = warp_sum(sum[r] * Base::decay(top[r], all, kLog2e), S::kLanes);
      const int4 member = members[row_of<S>(lane, r)];
      if (member.x < 0 || lane % S::kLanes != 0) continue;
      (member.w == 1 ? place.of_rows[member.x] : place.of_parts[member.y + member.z]) = make_float2(all, sum[r]);
    }
  }
};

template <class S>
struct Predicted : Changes<S, true> {
  using Base = Changes<S, true>;
  static constexpr float kLargest = float((1 << (S::kBits - 1)) - 1);
  static constexpr bool kPrunes = S::kPrune;

  // What elements of a row are divided by before they meet thresholds: its length, or one.
  static __device__ __forceinline__ float size_of(CodeRow<S>& row, unsigned lane) {
    if constexpr (!S::kNormalize) return 1.0f;
    double squares = 0.0;
    row.each(lane, [&](float x, int) { squares += double(x) * double(x); });
    return float(sqrt(warp_sum(squares)));
  }
  static __device__ __forceinline__ bool is_used(const CodeRow<S>& row, float size) {
    return row.largest >= kSmallest && row.largest < kInf && size < kInf;
  }

  // Codes of the first kind, of elements divided by their row's size and a step. Returns the step.
  static __device__ __forceinline__ float quantize(const Rows<S>& r, CodeRow<S>& row, int8_t* to, unsigned lane) {
    if constexpr (S::kPerRow) return row.quantize(kLargest, to, lane);
    float threshold = r.threshold;
    if constexpr (S::kDynamic) {
      threshold = __uint_as_float(*r.largest);
      if (threshold < kSmallest) threshold = 1.0f;
    }
    const float size = size_of(row, lane), factor = __fdiv_rn(kLargest, threshold);
    const bool used = is_used(row, size);
    row.write(to, used, lane, [&](float x) {
      return fminf(fmaxf(rintf(__fmul_rn(__fdiv_rn(x, size), factor)), -kLargest), kLargest);
    });
    return used ? __fdiv_rn(size, factor) : row.largest < kSmallest ? 0.0f : __int_as_float(0x7fc00000);
  }

  template <bool kOfKeys>
  static __device__ __forceinline__ float2 round(const Rows<S>& r, CodeRow<S>& row, int64_t, int8_t* to,
                                                 unsigned lane) {
    row.measure(lane);
    if constexpr (S::kGiven) {
      row.copy(to + kSecond<S>, lane);
      return make_float2(quantize(r, row, to, lane), 0.0f);
    } else {
      return make_float2(quantize(r, row, to, lane), row.quantize(kLargestByte, to + kSecond<S>, lane));
    }
  }

  static __device__ __forceinline__ float limit_of(const Problem<S>& p, const Place<S>& place, int4 member) {
    const float2 known = known_of(place, member);
    const float top = known.x, peak = S::kOverRows ? number_of_order(*peak_of(p, place)) : S::kBefore ? top : 0.0f;
    float limit;
    if constexpr (S::kBefore)
      limit = __fmul_rn(p.given.limit, peak);
    else
      limit = __fadd_rn(__fadd_rn(S::kSums ? __fadd_rn(top, logf(known.y)) : top, p.given.limit), peak);
    if (!(top > limit)) {
      if constexpr (S::kBestOfEmpty) limit = top == 0.0f ? -kSmallest : nextafterf(top, -kInf);
      if constexpr (S::kAllOfEmpty) limit = -kInf;
    }
    return limit;
  }

  // Whether a score is to be computed in full; NaN is.
  static __device__ __forceinline__ bool is_chosen(float x, float limit) {
    return S::kInverse ? !(x > limit) : !(x <= limit);
  }

  struct Queries : CodeQueries<S> {
    std::conditional_t<S::kGiven, attention::Queries<GivenShape<S>>, Empty> given;
    float high_step[S::kLaneRows], limit[S::kLaneRows], high[S::kTiles][4];

    __device__ __forceinline__ void load(const Problem<S>& p, const Place<S>& place, const int4* members,
                                         const int (&row)[S::kLaneRows], unsigned lane) {
      CodeQueries<S>::load(p, place, members, row, lane);
      if constexpr (S::kGiven && !S::kQShared)
        given.load(given_of<S>(this->row_of_member(p, place, members[lane / 4])),
                   given_of<S>(this->row_of_member(p, place, members[lane / 4 + 8])), lane, true);
#pragma unroll
      for (int r = 0; r < S::kLaneRows; ++r) {
        high_step[r] = __fmul_rn(this->number(p, place, row[r], 1), p.scale);
        limit[r] = row[r] < 0 ? 0.0f : limit_of(p, place, members[row_of<S>(lane, r)]);
      }
    }
  };

  static __device__ __forceinline__ void score(float (&s)[S::kTiles][4], Queries& q, const Key<S>* shared,
                                               const Key<S>* k, float* scratch, unsigned lane) {
    code_scores<S, 0>(s, q, q.step, shared, k, scratch, lane);
    if constexpr (S::kGiven)
      products<GivenShape<S>>(q.high, q.given, S::kQShared ? given_of<S>(shared) : nullptr, given_of<S>(k), lane);
    else
      code_scores<S, 1>(q.high, q, q.high_step, shared, k, scratch, lane);
  }

  template <class Mask>
  static __device__ __forceinline__ bool change(const Problem<S>& p, float (&s)[S::kTiles][4], const Queries& q,
                                                const Mask& mask) {
    bool low = false;
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float y = S::kMask || S::kDistances ? mask(j, e) : 0.0f;
        low |= y <= kNever && y != -kInf;
        const float full = S::kGiven ? __fmul_rn(q.high[j][e], p.scale) : q.high[j][e];
        const float x = Base::in_nats(p, s[j][e], y), high = Base::in_nats(p, full, y);
        s[j][e] = y <= kNever ? -kInf : is_chosen(x, q.limit[which_row<S>(e)]) ? high : S::kPrune ? -kInf : x;
      }
    return low;
  }

  struct Row {
    const Key<S>* codes;
    const Element<S>* given;
    float step, high_step, limit;

    __device__ __forceinline__ Row(const Problem<S>& p, const Place<S>& place, int4 member)
        : codes(place.q + int64_t(member.x) * p.of_q.row),
          given(place.given_q + int64_t(member.x) * p.given.of_q.row),
          step(__fmul_rn(number_of<S>(codes, 0), p.scale)),
          high_step(__fmul_rn(number_of<S>(codes, 1), p.scale)),
          limit(limit_of(p, place, member)) {}

    __device__ __forceinline__ float score(const Problem<S>& p, const Place<S>& place, int64_t key, float y,
                                           unsigned lane) const {
      const Key<S>* const k = place.k + key * p.of_k.row;
      const float x = Base::in_nats(p, code_score<S, 0>(codes, step, k, lane), y);
      if (!is_chosen(x, limit)) return S::kPrune ? -kInf : x;
      float high = __int_as_float(0x7fc00000);
      if constexpr (!S::kGiven) high = code_score<S, 1>(codes, high_step, k, lane);
      if (high != high) high = product_of_rows<S>(given, place.given_k + key * p.given.of_k.row, lane) * p.scale;
      return Base::in_nats(p, high, y);
    }
  };
};

// The largest element of all rows, each divided by its size.
template <class S>
__global__ void __launch_bounds__(kRoundThreads) measure_rows(const Rows<S> r) {
  const int64_t index = row_number();
  if (index >= r.count) return;
  const unsigned lane = lane_id();
  CodeRow<S> row(row_at(r, index), r.vectors, lane);
  row.measure(lane);
  const float size = S::Scores::size_of(row, lane);
  if (lane == 0 && S::Scores::is_used(row, size)) atomicMax(r.largest, __float_as_uint(__fdiv_rn(row.largest, size)));
}

// T is the shape of the survey.
template <class S, class T, class Attend, class Find>
int run_predicted(const FuserArgs* args, void* stream, Attend attend, Find find) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  Problem<S> p{};
  Problem<T> q{};
  if (!bind(args, p) || !bind(args, q)) return kUnsupported;
  const int64_t tiles = p.units * p.tiles;
  if (tiles == 0) return 0;
  bind_codes<S>(args, p), bind_codes<S>(args, q);
  const CodeSpace<S> at(args);
  p.given.of_rows = q.given.of_rows = reinterpret_cast<float2*>(at.end);
  p.given.of_parts = q.given.of_parts = p.given.of_rows + at.q_rows;
  Rows<S> queries = rows_of(args, p, false), keys = rows_of(args, p, true);
  queries.threshold = float(e.q_threshold), keys.threshold = float(e.k_threshold);
  queries.largest = reinterpret_cast<uint32_t*>(p.given.of_parts + p.units * p.states);
  keys.largest = queries.largest + 1, p.given.peaks = queries.largest + 2;
  p.given.limit = float(e.limit);
  if constexpr (S::kDynamic || S::kOverRows) {
    if (const int status = clear(queries.largest, size_t(2 + e.batch * e.heads) * 4, stream)) return status;
  }
  if constexpr (S::kDynamic) {
    if (const int status = launch_rows(measure_rows<S>, queries, stream)) return status;
    if (const int status = launch_rows(measure_rows<S>, keys, stream)) return status;
  }
  if (const int status = launch_rows(round_rows<S, true>, keys, stream)) return status;
  if (const int status = launch_rows(round_rows<S, false>, queries, stream)) return status;
  // A block for each tile.
  const dim3 blocks = dim3(unsigned(tiles)), threads = dim3(T::kThreads);
  if (const int status = launch(find, blocks, threads, size_t(T::kSharedBytes), stream, q)) return status;
  if constexpr (S::kOverRows) {
    if (const int status = launch(find_peaks<S>, blocks, threads, 0, stream, p)) return status;
  }
  return start(args, stream, p, attend);
}

}  // namespace attention
