// Attention by a plan: out = softmax(scores) v over the (query, key) pairs that the plan's tiles list.
//
// A block takes tiles of gathered query rows, 16 a warp. Keys and values are gathered row by row into a ring of stages
// in shared memory; the softmax is online; every lane reads one word of mask bits a step.
#pragma once
#include "cuda/attention/finish.cuh"
#include "cuda/attention/gather.cuh"
#include "cuda/attention/scores.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/attention/values.cuh"

namespace attention {

constexpr int kUnsupported = 2;
constexpr int64_t kLongestRow = (1ll << 31) / 8;  // elements between rows, so that bytes are a 32-bit number

// What a block does.
template <class S>
__device__ __forceinline__ void attend_tiles(const Problem<S>& p) {
  using Scores = typename S::Scores;
  SharedAllocator allocator;
  Shared<S> w{};
  w.k = allocator.take<Key<S>>(S::kStages * S::kKeys * S::kKPitch);
  if constexpr (!S::kSurvey) w.v = allocator.take<Element<S>>(S::kStages * S::kKeys * S::kVPitch);
  if constexpr (S::kQShared) w.q = allocator.take<Key<S>>(S::kRows * S::kKPitch);
  if constexpr (S::kVector) w.p = allocator.take<float>(S::kRows * S::kPPitch);
  w.infos = allocator.take<int2>(S::kSlots);
  w.keys = allocator.take<int>(S::kSlots * S::kKeys);
  if constexpr (S::kMask) w.bias = allocator.take<float>(S::kSlots * S::kKeys);
  w.work = allocator.take<int4>(1);

  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  while (true) {
    if (thread == 0) *w.work = next_work(p);
    __syncthreads();
    if (w.work->x < 0) return;
    const Place<S> place(p, *w.work);
    const Copier<S, Key<S>, S::kKeyColumns, S::kKeyWidth, S::kKPitch> copy_keys(place.k, thread);
    const Copier<S, Element<S>, S::kValueDim, S::kValueWidth, S::kVPitch> copy_values(place.v, thread);
    const MaskElement<S>* mask = place.mask;
    const bool row_mask = S::kDistances || (S::kMask && p.of_mask.row != 0);
    const int steps = place.item.y * S::kParts;
    const int4* members = place.members + warp * 16;

    int row[S::kLaneRows];
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) row[r] = members[row_of<S>(lane, r)].x;

    Cursor<S> cursor(p.records + place.item.x);
    int key = 0;
    float key_bias = 0.0f;
    const auto fetch = [&](int step) {
      cursor.advance();
      if (thread == 0) w.infos[step % S::kSlots] = cursor.info();
      key = cursor.key(p.lists, thread);
      if constexpr (S::kMask) {
        if (!row_mask) {
          key_bias = to_float<S>(mask[key * p.of_mask.key]);
          // Of keys that nobody sees one and the same row is read.
          if (key_bias <= kNever) key = 0;
        }
      }
    };
    const auto publish = [&](int step) {
      const int slot = step % S::kSlots;
      w.keys[slot * S::kKeys + thread] = key;
      if constexpr (S::kMask) w.bias[slot * S::kKeys + thread] = key_bias;
    };
    const auto copy = [&](int step) {
      const int* keys = w.keys + step % S::kSlots * S::kKeys;
      const int stage = step % S::kStages;
      copy_keys(w.k + stage * S::kKeys * S::kKPitch, keys, p.of_k.row, S::kCodes != 0 || p.vectors, thread);
      if constexpr (!S::kSurvey)
        copy_values(w.v + stage * S::kKeys * S::kVPitch, keys, p.of_v.row, p.vectors, thread);
    };

    if (thread < S::kKeys)
      for (int i = 0; i < S::kStages && i < steps; ++i) fetch(i), publish(i);
    if constexpr (S::kQShared) {
      const auto at = [members](unsigned i) { return max(members[i].x, 0); };
      gather<16, S::kKeyColumns, S::kKeyWidth, S::kKPitch, 32>(w.q + warp * 16 * S::kKPitch, place.q, p.of_q.row,
                                                               S::kCodes != 0 || p.vectors, lane, at);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (i < steps) copy(i);
      cp_async_commit();
    }
    typename Scores::Queries queries;
    queries.load(p, place, members, row, lane);

    float o[S::kSurvey ? 1 : S::kOutTiles][4], top[S::kLaneRows], sum[S::kLaneRows];
#pragma unroll
    for (int j = 0; j < (S::kSurvey ? 1 : S::kOutTiles); ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < S::kLaneRows; ++r) top[r] = -kInf, sum[r] = 0.0f;
    bool low = false;

    for (int i = 0; i < steps; ++i) {
      cp_async_wait<S::kStages - 2>();
      __syncthreads();
      if (i + S::kStages - 1 < steps) copy(i + S::kStages - 1);
      cp_async_commit();
      const bool more = thread < S::kKeys && i + S::kStages < steps;
      if (more) fetch(i + S::kStages);
      const int slot = i % S::kSlots, stage = i % S::kStages;
      const int2 step = w.infos[slot];
      const int kind = step.x >> 2 * warp & 3;
      if (kind != 0) {
        uint32_t word = ~0u;
        if (kind == 1) word = p.words[(step.y * S::kWarps + warp) * 32 + lane] >> (step.x >> 16) * (S::kTiles * 4 % 32);
        float s[S::kTiles][4];
        float* const scratch = S::kVector ? w.p + warp * 16 * S::kPPitch : nullptr;
        Scores::score(s, queries, S::kQShared ? w.q + warp * 16 * S::kKPitch : nullptr,
                      w.k + stage * S::kKeys * S::kKPitch, scratch, lane);
        const auto by_row = [&](int j, int e) {
          const int c = w.keys[slot * S::kKeys + key_of<S>(lane, j, e)], r = row[which_row<S>(e)];
          return place.added(p, max(r, 0), c);
        };
        const auto by_key = [&](int j, int e) { return w.bias[slot * S::kKeys + key_of<S>(lane, j, e)]; };
        low |= row_mask ? Scores::change(p, s, queries, by_row) : Scores::change(p, s, queries, by_key);
        if (kind == 1) Scores::forbid(s, word);
        if constexpr (S::kSurvey) {
          Scores::know(s, top, sum);
        } else {
          softmax(p, s, o, top, sum);
          values<S>(o, s, scratch, w.v + stage * S::kKeys * S::kVPitch, lane);
        }
      }
      if (more) publish(i + S::kStages);
    }

    if constexpr (S::kSurvey)
      Scores::leave(place, members, top, sum, lane);
    else
      finish(p, *w.work, o, top, sum, low, lane, warp);
    if (p.next == nullptr) return;
    // Shared memory is free for the next tile when all warps are here.
    __syncthreads();
    if (p.states != 0 && thread == 0) atomic_add_release(p.done + w.work->y, 1);
  }
}

// tensors: q, k, v, mask (if kMask), distances (if kDistances), tiles (see kernels/attention_tiles.py), out, lse (if kLse)
// extents: CudaAttentionExtents of kernels/attention_cuda.py. Heads of q, k, v and out are contiguous; lse is (batch,
//   heads, queries).
// A unit is a (batch, head), or a batch where heads have tiles of their own. Tiles are taken longest first from a few
// units at a time. workspace (see workspace_bytes): the number of the next tile (int64), the tiles done of every unit
// and, for the units in flight, how many parts of a row have arrived (int32), then result, and maximum and sum, of every
// state.
// A row without a key gives zeros and -inf.

// The problem that arguments pose, but for rows of codes. Returns whether the kernel takes it.
template <class S>
bool bind(const FuserArgs* args, Problem<S>& p) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  void* const* const after_masks = args->tensors + 3 + S::kMask + S::kDistances;
  const auto aligned = [](const void* address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  const int4* tiles = static_cast<const int4*>(after_masks[0]);
  p.v = static_cast<const Element<S>*>(args->tensors[2]);
  if (S::kMask) p.mask = static_cast<const MaskElement<S>*>(args->tensors[3]);
  if (S::kDistances) {
    p.distances = static_cast<const DistanceElement<S>*>(after_masks[-1]) + e.distances.first;
    p.distance_head = e.distances.head, p.distance_step = int(e.distances.step);
  }
  p.out = static_cast<Element<S>*>(after_masks[1]);
  if (S::kLse) p.lse = static_cast<float*>(after_masks[2]);
  p.rows = e.q_len, p.heads = int(e.heads), p.group = int(e.heads / e.key_heads);
  p.tiles = e.items, p.states = e.states, p.per_head = e.per_head != 0, p.in_flight = e.in_flight;
  p.units = p.per_head ? e.batch : e.batch * e.heads;
  p.items = tiles, p.members = tiles + e.members_at / 4, p.records = tiles + e.records_at / 4;
  p.lists = reinterpret_cast<const int*>(tiles) + e.lists_at;
  p.words = reinterpret_cast<const uint32_t*>(tiles) + e.words_at;
  bool fits = true;
  const auto narrowed = [&fits](const auto& strides) {
    fits = fits && strides.row >= 0 && strides.row <= kLongestRow;
    return Strides{strides.batch, strides.head, int(strides.row)};
  };
  const auto* q = static_cast<const Element<S>*>(args->tensors[0]);
  const auto* k = static_cast<const Element<S>*>(args->tensors[1]);
  if constexpr (S::kCodes == 0)
    p.q = q, p.k = k, p.of_q = narrowed(e.q), p.of_k = narrowed(e.k);
  else
    p.given.q = q, p.given.k = k, p.given.of_q = narrowed(e.q), p.given.of_k = narrowed(e.k);
  p.of_v = narrowed(e.v), p.of_out = narrowed(e.out);
  if (S::kLse) p.of_lse = narrowed(e.lse);
  p.of_mask = {e.mask.batch, e.mask.head, e.mask.row, e.mask.key};
  p.scale = float(e.scale);
  p.negative = e.scale < 0;
  p.unit = S::Scores::unit(p.scale);
  const auto whole = [&](const Strides& s, int64_t bytes) {
    const int64_t n = bytes / int64_t(sizeof(Element<S>));
    return n == 0 || (s.batch % n == 0 && s.head % n == 0 && s.row % n == 0);
  };
  p.vectors = aligned(p.v, 16) && whole(p.of_v, 16);
  p.pairs = aligned(p.out, 4) && whole(p.of_out, 4);
  if constexpr (S::kCodes == 0) {
    p.vectors = p.vectors && aligned(p.k, 16) && whole(p.of_k, 16) &&
                (!S::kQShared || (aligned(p.q, 16) && whole(p.of_q, 16)));
    p.pairs = p.pairs && aligned(p.q, 4) && whole(p.of_q, 4);
  }
  return fits;
}

template <class S, class Kernel>
int start(const FuserArgs* args, void* stream, Problem<S>& p, Kernel attend) {
  const auto& e = *static_cast<const typename S::Extents*>(args->extents);
  const int64_t total = p.units * p.tiles, flying = p.in_flight < p.units ? p.in_flight : p.units;
  if (total == 0) return 0;
  const int64_t resident = e.multiprocessors * resident_blocks(attend, S::kThreads, S::kSharedBytes);
  const bool counted = total > resident || (p.states != 0 && p.units > p.in_flight);
  if (counted || p.states != 0) {
    auto* words = static_cast<int*>(args->workspace);
    p.next = counted ? reinterpret_cast<unsigned long long*>(words) : nullptr;
    p.done = words + 2, p.arrived = p.done + p.units;
    const int64_t counters = (2 + p.units + flying * p.states + 3) / 4 * 4;
    p.state = reinterpret_cast<float*>(words + counters);
    p.state_sum = reinterpret_cast<float2*>(p.state + flying * p.states * S::kValueWidth);
    if (const int status = clear(words, size_t(counters) * 4, stream)) return status;
  }
  const int64_t blocks = counted ? (total < resident ? total : resident) : total;
  return launch(attend, dim3(unsigned(blocks)), dim3(S::kThreads), size_t(S::kSharedBytes), stream, p);
}

template <class S, class Kernel>
int run(const FuserArgs* args, void* stream, Kernel attend) {
  Problem<S> p{};
  return bind(args, p) ? start(args, stream, p, attend) : kUnsupported;
}

}  // namespace attention
