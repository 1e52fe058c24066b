// Rows of q and k as codes, small whole numbers times a step: how they are made and multiplied.
//
// A row in the workspace is of bytes: kCodeWidth codes, which are the head's width and zeros beyond it, and 16 bytes of
// numbers. Where scores are computed in full, kCodeWidth codes of a second kind follow, which has 8 bits, or with
// kGiven the row as it is, kGivenWidth elements with zeros at the end. The numbers are the step of the first kind, and
// the second's or what else its policy knows of a row. Steps are NaN where a row has no codes.
//
// The extents have `workspace`, the bytes before the rows: those of q, those of k, then what else a policy has.
#pragma once
#include "cuda/attention/scores.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/row.cuh"

namespace attention {

constexpr float kSmallest = 0x1p-100f;  // what is below it is zero
constexpr float kTooLarge = 0x1p50f;    // what is not has no codes, so that no product of steps overflows
constexpr float kLargestByte = 127.0f;
constexpr int kRoundThreads = 128;

// All rows of q or k, and where they are to be written.
template <class S>
struct Rows {
  const Element<S>* rows;
  Strides of;
  int64_t heads, length, count;
  bool vectors;
  int8_t* to;
  int group;  // heads of q for one of k
  float scale, threshold;
  float* means;
  int* unsound;
  uint32_t* largest;
};

template <class S>
__device__ __forceinline__ float number_of(const int8_t* row, int i) {
  return reinterpret_cast<const float*>(row + S::kCodeWidth)[i];
}

// Where codes of the second kind begin, or the row as given.
template <class S>
constexpr int kSecond = S::kCodeWidth + 16;

// One row in the lanes of a warp, four neighbours each, and its largest magnitude, infinity where it is not finite or
// too large.
template <class S>
struct CodeRow {
  static constexpr int kParts = (S::kCodeWidth + 127) / 128;
  float x[kParts][4], largest;

  static __device__ __forceinline__ int column(int part, unsigned lane) { return 128 * part + 4 * int(lane); }

  __device__ __forceinline__ CodeRow(const Element<S>* row, bool vectors, unsigned lane) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) load_row(row, column(i, lane), S::kHeadDim, vectors, x[i]);
  }

  // each(x, column) of all elements of the head.
  template <class Each>
  __device__ __forceinline__ void each(unsigned lane, const Each& each) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column(i, lane) + e < S::kHeadDim) each(x[i][e], column(i, lane) + e);
  }

  // Magnitudes are compared as integers, whose order is theirs, with infinity and NaN on top.
  __device__ __forceinline__ void measure(unsigned lane) {
    uint32_t top = 0;
    each(lane, [&](float y, int) { top = max(top, __float_as_uint(fabsf(y))); });
    largest = __uint_as_float(warp_max(top));
    if (!(largest < kTooLarge)) largest = kInf;
  }

  // The codes whole(x), if there are any.
  template <class Whole>
  __device__ __forceinline__ void write(int8_t* to, bool used, unsigned lane, const Whole& whole) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) word |= (uint32_t(int(used ? whole(x[i][e]) : 0.0f)) & 255u) << 8 * e;
      if (const int c = column(i, lane); c < S::kCodeWidth) *reinterpret_cast<uint32_t*>(to + c) = word;
    }
  }

  // The row as given.
  __device__ __forceinline__ void copy(int8_t* to, unsigned lane) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      store_row(reinterpret_cast<Element<S>*>(to), column(i, lane), S::kGivenWidth, true, x[i]);
  }

  // Codes with `most` at the largest element. Returns the step.
  __device__ __forceinline__ float quantize(float most, int8_t* to, unsigned lane) const {
    const bool used = largest >= kSmallest && largest < kInf;
    const float factor = used ? __fdiv_rn(most, largest) : 0.0f;
    write(to, used, lane, [factor](float y) { return rintf(__fmul_rn(y, factor)); });
    return largest == kInf ? __int_as_float(0x7fc00000) : used ? __fdiv_rn(largest, most) : 0.0f;
  }
};

// The row of a warp, if there is one for it.
__device__ __forceinline__ int64_t row_number() {
  return int64_t(blockIdx.x) * (kRoundThreads / 32) + warp_id();
}
template <class S>
__device__ __forceinline__ const Element<S>* row_at(const Rows<S>& r, int64_t index) {
  const int64_t head = index / r.length;
  return r.rows + head / r.heads * r.of.batch + head % r.heads * r.of.head + index % r.length * r.of.row;
}

template <class S, bool kOfKeys>
__global__ void __launch_bounds__(kRoundThreads) round_rows(const Rows<S> r) {
  const int64_t index = row_number(), head = index / r.length;
  if (index >= r.count) return;
  const unsigned lane = lane_id();
  CodeRow<S> row(row_at(r, index), r.vectors, lane);
  int8_t* const to = r.to + index * S::kKeyWidth;
  const float2 numbers = S::Scores::template round<kOfKeys>(r, row, head, to, lane);
  if (lane == 0) *reinterpret_cast<float2*>(to + S::kCodeWidth) = numbers;
}

template <class S>
struct CodeQueries {
  uint32_t a[S::kQShared ? 1 : S::kCodeBytes / 32][4];
  float step[S::kLaneRows];  // times the scale

  // The bytes before those of product number k.
  static constexpr __device__ int place(int k) { return 32 * k + (32 * k < S::kCodeWidth ? 0 : 16); }

  __device__ __forceinline__ void load(const Problem<S>& p, const Place<S>& tile, const int4* members,
                                       const int (&row)[S::kLaneRows], unsigned lane) {
    if constexpr (!S::kQShared) {
      const Key<S>* first = row_of_member(p, tile, members[lane / 4]) + lane % 4 * 4;
      const Key<S>* second = row_of_member(p, tile, members[lane / 4 + 8]) + lane % 4 * 4;
#pragma unroll
      for (int k = 0; k < S::kCodeBytes / 32; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[k][i] = *reinterpret_cast<const uint32_t*>((i % 2 == 0 ? first : second) + place(k) + i / 2 * 16);
    }
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) step[r] = __fmul_rn(number(p, tile, row[r], 0), p.scale);
  }

  static __device__ __forceinline__ const Key<S>* row_of_member(const Problem<S>& p, const Place<S>& tile,
                                                                int4 member) {
    return tile.q + int64_t(max(member.x, 0)) * p.of_q.row;
  }

  static __device__ __forceinline__ float number(const Problem<S>& p, const Place<S>& tile, int row, int i) {
    return number_of<S>(tile.q + int64_t(max(row, 0)) * p.of_q.row, i);
  }

  __device__ __forceinline__ void fragment(uint32_t (&to)[4], const Key<S>* shared, int k, unsigned lane) const {
    if constexpr (S::kQShared) {
      ldmatrix(to, shared + lane % 16 * S::kKPitch + place(k) + lane / 16 * 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = a[k][i];
    }
  }
};

// A shape of rows as given, which lie behind codes.
template <class S>
struct GivenShape : S {
  static constexpr int kKeyWidth = S::kGivenWidth, kKPitch = S::kKeyBytes / int(sizeof(Element<S>));
};

template <class S>
__device__ __forceinline__ const Element<S>* given_of(const Key<S>* row) {
  return reinterpret_cast<const Element<S>*>(row + kSecond<S>);
}

// s = products of codes of kind kKind (0 or 1) in integers, times both steps. scratch is where kVector brings them into
// the order of its lanes.
template <class S, int kKind>
__device__ __forceinline__ void code_scores(float (&s)[S::kTiles][4], const CodeQueries<S>& q,
                                            const float (&step)[S::kLaneRows], const Key<S>* shared, const Key<S>* k,
                                            float* scratch, unsigned lane) {
  const Key<S>* at = k + (lane % 8 + lane / 16 * 8) * S::kKPitch + lane / 8 % 2 * 16;
  constexpr int kFirst = kKind * S::kCodeWidth / 32;
#pragma unroll
  for (int j = 0; j < S::kTiles; j += 2) {
    int sums[2][4] = {};
#pragma unroll
    for (int d = kFirst; d < kFirst + S::kCodeWidth / 32; ++d) {
      uint32_t a[4], b[4];
      q.fragment(a, shared, d, lane);
      ldmatrix(b, at + 8 * j * S::kKPitch + q.place(d));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma<int8_t>(sums[0], a, low);
      mma<int8_t>(sums[1], a, high);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j + i][e] = float(sums[i][e]);
  }
  if constexpr (S::kVector) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scratch[(lane / 4 + e / 2 * 8) * S::kPPitch + 8 * j + lane % 4 * 2 + e % 2] = s[j][e];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = scratch[row_of<S>(lane, e) * S::kPPitch + key_of<S>(lane, j, e)];
  }
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[j][e] = __fmul_rn(
          s[j][e], __fmul_rn(step[which_row<S>(e)], number_of<S>(k + key_of<S>(lane, j, e) * S::kKPitch, kKind)));
}

// The same of one row of q, whose step comes with the scale, and one of k, in all lanes.
template <class S, int kKind>
__device__ __forceinline__ float code_score(const Key<S>* q, float step, const Key<S>* k, unsigned lane) {
  int sum = 0;
  for (int c = 4 * lane; c < S::kCodeWidth; c += 128) {
    const int at = c + kKind * kSecond<S>;
    sum = __dp4a(*reinterpret_cast<const int*>(q + at), *reinterpret_cast<const int*>(k + at), sum);
  }
  return __fmul_rn(float(warp_sum(sum)), __fmul_rn(step, number_of<S>(k, kKind)));
}

// Where rows and what lies behind them are in the workspace.
template <class S>
struct CodeSpace {
  int64_t q_rows, k_rows;
  int8_t *q, *k, *end;

  explicit CodeSpace(const FuserArgs* args) {
    const auto& e = *static_cast<const typename S::Extents*>(args->extents);
    q_rows = e.batch * e.heads * e.q_len, k_rows = e.batch * e.key_heads * e.kv_len;
    q = static_cast<int8_t*>(args->workspace) + e.workspace;
    k = q + q_rows * S::kKeyWidth, end = k + k_rows * S::kKeyWidth;
  }
};

// Gives a problem of shape T the rows of shape S in the workspace.
template <class S, class T>
void bind_codes(const FuserArgs* args, Problem<T>& p) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  const CodeSpace<S> at(args);
  constexpr int64_t width = S::kKeyWidth;
  p.q = at.q, p.of_q = {e.heads * e.q_len * width, e.q_len * width, int(width)};
  p.k = at.k, p.of_k = {e.key_heads * e.kv_len * width, e.kv_len * width, int(width)};
}

// The rows of q or k.
template <class S>
Rows<S> rows_of(const FuserArgs* args, const Problem<S>& p, bool keys) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  const CodeSpace<S> at(args);
  Rows<S> r{};
  r.rows = keys ? p.given.k : p.given.q, r.of = keys ? p.given.of_k : p.given.of_q, r.to = keys ? at.k : at.q;
  r.heads = keys ? e.key_heads : e.heads, r.length = keys ? e.kv_len : e.q_len, r.count = keys ? at.k_rows : at.q_rows;
  r.vectors = vector_width(4, r.rows, r.of.batch | r.of.head | r.of.row, int(sizeof(Element<S>))) == 4;
  r.group = p.group, r.scale = p.scale;
  return r;
}

// Launches a kernel that has a warp for each row.
template <class S, class Kernel>
int launch_rows(Kernel kernel, const Rows<S>& r, void* stream) {
  const int64_t blocks = (r.count + kRoundThreads / 32 - 1) / (kRoundThreads / 32);
  return launch(kernel, dim3(unsigned(blocks)), dim3(kRoundThreads), 0, stream, r);
}

}  // namespace attention
