// The shape of a tile and of the problem: how rows, keys and columns lie among the lanes of a warp, and who computes
// what.
//
// A kernel is instantiated with a shape S, which is Shape of a configuration:
//   Extents                           the struct of run-time sizes
//   Element, MaskElement              types of q, k, v and out, and of the run-time mask (uint8_t where there is none)
//   kHeadDim, kValueDim               widths of the heads of q and k, and of v and out
//   kRows, kKeys, kStages             query rows of a tile, keys that travel together, buffers that they travel through
//   DistanceElement                   type of the bias by distance (float where there is none)
//   kMask, kDistances, kBias, kLse    whether there is a run-time mask, or a bias by distance, numbers are added to
//                                     scores, lse is wanted
//   kTf32                             whether fp32 is rounded for tensor cores
//   kCodes                            kinds of codes that a row of q or k has (codes.cuh), 0 where it is as given
//   kGiven                            whether rows of codes have those of q or k as given behind them
//   kSurvey                           whether the kernel only finds what is known of rows of scores (predicted.cuh)
//   Rule                              what changes a scaled score before masks do (such as soft_cap.h), or void
//   Scores                            the score policy (scores.cuh)
#pragma once
#include <type_traits>

#include "cuda/device.cuh"

namespace attention {
using namespace device;

constexpr int kStep = 64;  // keys of a step of the plan
constexpr float kInf = __builtin_huge_valf();
constexpr float kLog2e = 1.44269504f;
// A bias this low counts as masked as long as its row has another key.
constexpr float kNever = -1e30f;

constexpr int round_up(int n, int to) {
  return (n + to - 1) / to * to;
}

// A configuration and what follows from it.
template <class C>
struct Shape : C {
  using Element = typename C::Element;
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr bool kVector =
      !kHalf && !C::kTf32;  // fp32 in the order of fused multiply-adds, without tensor cores
  static constexpr int kParts = kStep / C::kKeys;
  static constexpr int kWarps = C::kRows / 16, kThreads = 32 * kWarps;
  static constexpr int kSlots = C::kStages + 1 <= 4 ? 4 : 8;  // steps whose keys are known, at least kStages + 1
  static constexpr int kChunk = 16 / int(sizeof(Element));
  static constexpr int kGivenWidth = round_up(C::kHeadDim, kHalf ? 16 : 8);
  // What tiles read of q and k: rows as given, or of bytes (codes.cuh).
  using Key = std::conditional_t<C::kCodes == 0, Element, int8_t>;
  static constexpr int kCodeWidth = round_up(C::kHeadDim, 32), kCodeBytes = C::kCodes * kCodeWidth;
  static constexpr int kKeyWidth =
      C::kCodes == 0 ? kGivenWidth : kCodeBytes + 16 + (C::kGiven ? kGivenWidth * int(sizeof(Element)) : 0);
  static constexpr int kKeyColumns = C::kCodes != 0 ? kKeyWidth : C::kHeadDim;
  static constexpr int kValueWidth = round_up(C::kValueDim, kVector ? 32 : 16);
  // An odd number of 16-byte chunks a row lets eight rows start in different banks.
  static constexpr int kKPitch = C::kCodes != 0 ? kKeyWidth : kKeyWidth + kChunk, kVPitch = kValueWidth + kChunk;
  static constexpr bool kQShared =
      C::kCodes != 0 ? kCodeWidth > 128 || (C::kGiven && kVector) : kVector || kKeyWidth > (kHalf ? 128 : 64);
  static constexpr int kPPitch = C::kKeys + 4;
  // Scores of a lane: kKeys / 8 columns of tiles with four each, of kLaneRows rows; kLanes lanes share a row.
  static constexpr int kTiles = C::kKeys / 8, kOutTiles = kValueWidth / 8;
  static constexpr int kLaneRows = kVector ? 4 : 2, kLanes = kVector ? 8 : 4;
  static constexpr int kKeyBytes = kKPitch * int(sizeof(Key)), kValueBytes = kVPitch * int(sizeof(Element));
  static constexpr int kSharedBytes = C::kStages * C::kKeys * (kKeyBytes + (C::kSurvey ? 0 : kValueBytes)) +
                                      (kQShared ? C::kRows * kKeyBytes : 0) +
                                      (kVector ? C::kRows * kPPitch * 4 : 0) + kSlots * (C::kKeys * 4 + 16) +
                                      (C::kMask ? kSlots * C::kKeys * 4 : 0) + 16;
};

template <class S>
using Element = typename S::Element;
template <class S>
using Key = typename S::Key;
template <class S>
using MaskElement = typename S::MaskElement;
template <class S>
using DistanceElement = typename S::DistanceElement;

struct Strides {
  int64_t batch, head;
  int row;
};
struct MaskStrides {
  int64_t batch, head, row, key;
};

// What kernels with codes have beside those of q and k: both as given, whether a head of k has rows without codes, and
// of every row of scores, and of every part of one, the largest predicted score and the sum of weights, and what is the
// largest of rows that share a limit (order_of).
template <class S>
struct Given {
  const Element<S>*q, *k;
  Strides of_q, of_k;
  const int* unsound;
  float2 *of_rows, *of_parts;
  uint32_t* peaks;
  float limit;
};

template <class S>
struct Problem {
  const Key<S>*q, *k;
  const Element<S>* v;
  const MaskElement<S>* mask;
  const DistanceElement<S>* distances;  // of row 0 and key 0
  Element<S>* out;
  float* lse;
  const int4 *items, *members, *records;
  const int* lists;
  const uint32_t* words;
  Strides of_q, of_k, of_v, of_out, of_lse;
  MaskStrides of_mask;
  int64_t units, in_flight, tiles, states, distance_head;
  int heads, group, distance_step;
  // The exponents of scores are taken after a multiplication with unit.
  float scale, unit;
  bool negative, per_head, vectors, pairs;
  unsigned long long* next;  // null where every block takes the tile of its own number
  int* done;
  int* arrived;
  float2* state_sum;
  float* state;
  int64_t rows;  // of a head of q
  Given<S> given;
};

template <class S>
struct Shared {
  Key<S>*k, *q;
  Element<S>* v;
  float *p, *bias;
  int* keys;
  int2* infos;
  int4* work;
};

// Where the scores s[j][e] and results o[j][e] of a lane lie among the 16 rows of its warp.
template <class S>
__device__ __forceinline__ int row_of(unsigned lane, int r) {
  return S::kVector ? 4 * (lane / 8) + r : lane / 4 + 8 * r;
}
template <class S>
constexpr __device__ int which_row(int e) {
  return S::kVector ? e : e / 2;
}
template <class S>
__device__ __forceinline__ int key_of(unsigned lane, int j, int e) {
  return S::kVector ? 8 * j + lane % 8 : 8 * j + 2 * (lane % 4) + e % 2;
}
template <class S>
__device__ __forceinline__ int column_of(unsigned lane, int j, int e) {
  return S::kVector ? j / 4 * 32 + 4 * (lane % 8) + j % 4 : 8 * j + 2 * (lane % 4) + e % 2;
}
// The bit of row r and key c among the words of a warp.
template <class S>
__device__ __forceinline__ bool bit_of(const uint32_t* words, int r, int c) {
  return S::kVector ? words[r / 4 * 8 + c % 8] >> (c / 8 * 4 + r % 4) & 1
                    : words[r % 8 * 4 + c % 8 / 2] >> (c / 8 * 4 + r / 8 * 2 + c % 2) & 1;
}

// The steps of a tile in parts of kKeys keys.
template <class S>
struct Cursor {
  const int4* next;
  int4 record;
  int at, end;  // parts of the record

  __device__ __forceinline__ explicit Cursor(const int4* records) : next(records), record(), at(0), end(0) {}
  __device__ __forceinline__ void advance() {
    if (at == end) record = *next++, at = 0, end = (record.z >> 16) * S::kParts;
    ++at;
  }
  __device__ __forceinline__ int key(const int* lists, int i) const {
    const int n = (at - 1) * S::kKeys + i;
    return record.y ? record.x + n * record.y : lists[record.x + n];
  }
  __device__ __forceinline__ int2 info() const {
    return make_int2((record.z & 0xffff) | (at - 1) % S::kParts << 16, record.w);
  }
};

// The next tile for this block: its number in the plan, unit, batch and head; a negative number when there is none.
template <class S>
__device__ __forceinline__ int4 next_work(const Problem<S>& p) {
  const int64_t number = p.next == nullptr ? blockIdx.x : int64_t(atomicAdd(p.next, 1ull));
  if (number >= p.units * p.tiles) return make_int4(-1, 0, 0, 0);
  // Tiles of the units in flight together, longest first.
  const int64_t wave = number / (p.in_flight * p.tiles), inside = number % (p.in_flight * p.tiles);
  const int64_t left = p.units - wave * p.in_flight, together = left < p.in_flight ? left : p.in_flight;
  const int tile = int(inside / together), unit = int(wave * p.in_flight + inside % together);
  return make_int4(tile, unit, p.per_head ? unit : unit / p.heads, p.per_head ? p.items[tile].z : unit % p.heads);
}

template <class S>
__device__ __forceinline__ float to_float(MaskElement<S> x) {
  if constexpr (!std::is_same<MaskElement<S>, uint8_t>::value)
    return float(x);
  else
    return x ? 0.0f : -kInf;
}

// Where a tile's operands are.
template <class S>
struct Place {
  const Key<S>*q, *k;
  const Element<S>*v, *given_q, *given_k;
  const MaskElement<S>* mask;
  const DistanceElement<S>* distances;
  Element<S>* out;
  float* lse;
  const int* unsound;
  float2 *of_rows, *of_parts;
  int64_t head;  // of all of q
  const int4* members;
  int4 item;

  __device__ __forceinline__ Place(const Problem<S>& p, int4 work) {
    const int64_t b = work.z, h = work.w, kv = work.w / p.group;
    q = p.q + b * p.of_q.batch + h * p.of_q.head;
    k = p.k + b * p.of_k.batch + kv * p.of_k.head;
    v = p.v + b * p.of_v.batch + kv * p.of_v.head;
    mask = p.mask + b * p.of_mask.batch + h * p.of_mask.head;
    distances = p.distances + h * p.distance_head;
    out = p.out + b * p.of_out.batch + h * p.of_out.head;
    lse = p.lse + b * p.of_lse.batch + h * p.of_lse.head;
    if constexpr (S::kCodes != 0) {
      given_q = p.given.q + b * p.given.of_q.batch + h * p.given.of_q.head;
      given_k = p.given.k + b * p.given.of_k.batch + kv * p.given.of_k.head;
      unsound = p.given.unsound + b * (p.heads / p.group) + kv;
      head = b * p.heads + h;
      of_rows = p.given.of_rows + head * p.rows, of_parts = p.given.of_parts + work.y * p.states;
    }
    members = p.members + int64_t(work.x) * S::kRows;
    item = p.items[work.x];
  }

  // What is added to the score of a row and a key.
  __device__ __forceinline__ float added(const Problem<S>& p, int64_t row, int64_t key) const {
    float x = 0.0f;
    if constexpr (S::kMask) x = to_float<S>(mask[row * p.of_mask.row + key * p.of_mask.key]);
    if constexpr (S::kDistances) x += float(distances[row + key * p.distance_step]);
    return x;
  }
};

}  // namespace attention
