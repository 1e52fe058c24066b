// Attention by a plan: out = softmax(scores) v over the (query, key) pairs that the plan lists.
//
// A group of up to 64 query rows is transposed once, so that rows lie in vector lanes; every key is broadcast against
// them. Rows and keys are index lists, so gathered ones cost what contiguous ones do, and a mask is a word of lanes.
// A block of keys is computed for the vectors of lanes that some of its keys concern. A group of very few rows, such as
// the one row of a decoding step, would leave most lanes idle: there the elements of a row lie in lanes.
//
// Everything is computed in fp32. But where an instruction multiplies pairs of bf16 numbers, scores of bf16 rows are fp32
// sums of its products, which are exact, and weights are rounded to bf16 before they meet the values, as in PyTorch's
// fused kernel; softmax and its sums stay in fp32, and a group of few rows keeps its weights in fp32, too.
#pragma once
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstring>

#include "abi.h"
#include "attention/block.h"
#include "attention/plan.h"
#include "attention/scores.h"
#include "attention/scratch.h"
#include "attention/softmax.h"
#include "attention/values.h"

namespace attention {

// Brings the state of rows that an earlier phase has begun into w. Returns whether there was any.
template <class C>
FUSER_INLINE bool resume(const Head<C>& t, const Group& g, Scratch<C>& w) {
  for (int64_t v = 0; v < w.pitch / L; ++v) {
    store(w.top + v * L, set1(-kInf));
    store(w.sum + v * L, vf{});
  }
  if (g.resume == 0) return false;
  const auto state = [&](int64_t r) {
    const bool begun = r < g.count && g.resume >> r & 1;
    return begun ? t.state + g.slot[r] * kStateRow<C> : static_cast<const float*>(w.zero);
  };
  rows_to_lanes<float>(w.o, w.pitch, C::kValueDim, 1.0f, state);
  for (int64_t r = 0; r < g.count; ++r)
    if (g.resume >> r & 1) w.top[r] = t.state_top[g.slot[r]], w.sum[r] = t.state_sum[g.slot[r]];
  return true;
}

// Rows that are done are divided by their sums; the others leave their state for a later phase.
template <class C>
FUSER_INLINE void finish(const Head<C>& t, const Group& g, Scratch<C>& w) {
  using Element = typename C::Element;
  constexpr int64_t DV = C::kValueDim;
  const int64_t last = g.count - 1, pitch = w.pitch, vectors = pitch / L;
  const uint64_t done = g.finish;
  for (int64_t v = 0; v < vectors; ++v) {
    const vf sum = load(w.sum + v * L), inverse = select((vi)(sum == vf{}), vf{}, 1.0f / sum);
    store(w.decay + v * L, select_bits(done >> v * L, inverse, set1(1.0f)));
  }
  for (int64_t r = 0; r <= last; ++r) {
    if (!(done >> r & 1)) {
      t.state_top[g.slot[r]] = w.top[r], t.state_sum[g.slot[r]] = w.sum[r];
    } else if (C::kLse) {
      t.lse[g.row[r] * t.lse_row] = w.sum[r] == 0.0f ? -kInf : w.top[r] + std::log(w.sum[r]);
    }
  }
  for (int64_t c = 0; c < vectors; ++c) {
    const int64_t lanes = last + 1 - c * L < L ? last + 1 - c * L : L;
    const vf factor = load(w.decay + c * L);
    for (int64_t d = 0; d < DV; d += L) {
      const int64_t size = DV % L == 0 || DV - d >= L ? L : DV - d;
      vf x[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) x[i] = load(w.o + (d + i < DV ? d + i : DV - 1) * pitch + c * L) * factor;
      transpose(x);
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t r = c * L + i;
        if (done >> r & 1) {
          Element* out = t.out + g.row[r] * t.out_row + d;
          size == L ? store(out, x[i]) : store_n(out, x[i], size);
        } else {
          // Slots have whole vectors, so the tail may be written, too.
          store(t.state + g.slot[r] * kStateRow<C> + d, x[i]);
        }
      }
    }
  }
}

// The softmax of either kind of run, of which an exact one leaves weights unpaired.
template <int RV, bool kPaired, class C>
FUSER_INLINE void weigh(Scratch<C>& w, int64_t n, int64_t v, bool changes, bool row_bias, bool exact) {
  if (exact)
    softmax<RV, true, false>(w, n, v, changes, row_bias);
  else
    softmax<RV, false, kPaired>(w, n, v, changes, row_bias);
}

// Runs one group. Returns false when the result may be wrong and only an exact run can tell: a bias below kNever was
// taken as masked and some row has no other key, or a value that a masked row may not see is not finite. Both kinds of
// runs share their code, most of what a kernel has, since compilers need seconds for it.
template <class C>
__attribute__((noinline)) bool attend(const Head<C>& t, const Group& g, Scratch<C>& w, bool exact) {
  using Scores = typename C::Scores;
  constexpr int64_t DV = C::kValueDim;
  const int64_t vectors = (g.count + L - 1) / L, pitch = w.pitch = vectors * L;
  const bool few = g.count <= C::kFewRows;
  Scores::queries(t, g, w);
  if (!exact && !Scores::sound(t, w)) return false;
  bool first = !resume(t, g, w);

  Block<C> block{t, g, w, exact};
  bool masked = false;
  while (block.fill()) {
    const int64_t n = block.n;
    Scores::keys(t, w, n);
    Scores::value_keys(t, w, n, exact);
    if (first && (few || !(block.range == block.every))) {
      std::memset(w.o, 0, DV * pitch * sizeof(float));
      first = false;
    }
    const bool changes = Scores::kChanges || (block.masked && !Scores::kMasks);
    if (few) {
      Scores::score_few(w, n, g.count);
      weigh<1, false>(w, n, 0, changes, block.row_bias, exact);
      if (!exact) values_of_few(w, n, g.count);
    } else {
      by_tiles(block.range, [&](auto size, int64_t v) {
        const int64_t kept = Scores::template score<size()>(w, n, v, exact);
        if (kept == 0 && !first && !exact) return;
        if constexpr (Scores::kByteValues)
          if (!exact) {
            Scores::template weigh_bytes<size()>(w, kept, v, changes, block.row_bias);
            Scores::template byte_values<size()>(w, kept, v, first);
            return;
          }
        weigh<size(), Scores::kPairValues>(w, kept, v, changes, block.row_bias, exact);
        if (exact) return;
        if constexpr (Scores::kPairValues) {
          if (Scores::kPrunes || v == block.range.first) pair_values(w, Scores::value_rows(w), kept);
          values<size()>(w, w.pair_row, (kept + 1) / 2, v, first);
        } else {
          values<size()>(w, Scores::value_rows(w), kept, v, first);
        }
      });
    }
    if (exact) values_exact(w, n, block.range, first);
    masked |= block.masked || kBiased<C> || Scores::kPrunes;
    first = false;
  }
  if (first) std::memset(w.o, 0, DV * pitch * sizeof(float));

  if (!exact) {
    if (block.skipped)
      for (int64_t r = 0; r < g.count; ++r)
        if (!(w.top[r] > kNever / 2)) return false;
    if (masked) {
      vf poison = vf{};
      for (int64_t i = 0; i < DV * vectors; ++i) poison += load(w.o + i * L) * 0.0f;
      if (reduce_add(poison) != 0.0f) return false;
    }
  }
  finish(t, g, w);
  return true;
}

// What will be needed soon: the rows that group g, number i of the plan, writes, and all of the group at `following`.
template <class C>
void look_ahead(const Plan& plan, const Head<C>& t, const Group& g, int64_t i, int64_t following, Ahead<C>& ahead) {
  ahead.size = ahead.next = 0;
  for (int64_t r = 0; r < g.count; ++r)
    g.finish >> r & 1 ? ahead.add(t.out + g.row[r] * t.out_row) : ahead.add(t.state + g.slot[r] * kStateRow<C>);
  if (following < plan.groups) {
    for (int64_t r = plan.row_ptr[following]; r < plan.row_ptr[following + 1]; ++r)
      ahead.add(t.q + plan.row[r] * t.q_row);
    if (plan.keys_of(following) <= kMostAhead)
      plan.each_key(following, [&](int64_t key) {
        ahead.add(C::Scores::key_row(t, key)), ahead.add(C::Scores::value_row(t, key));
      });
  }
  constexpr int64_t step = kAccumulators / kTileVectors;
  const int64_t keys = plan.keys_of(i), blocks = (keys + C::kKeyBlock - 1) / C::kKeyBlock;
  const int64_t tiles = keys / step + blocks * (C::kValueDim / step) + 1;
  ahead.pace = (ahead.size + tiles - 1) / tiles;
}

// Another thread is at work on what we wait for, since items are taken in order.
static inline void wait_until(const std::atomic<int64_t>& counter, int64_t count) {
  for (int spins = 0; counter.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) sched_yield();
}

template <class C>
constexpr int kFirstAfterMasks = 3 + C::kMask + C::kDistances;

// Calls f(t, g, w, i, index) for every group g, number i of the plan, of every head t, which is number `index`, with the
// scratch w of a thread.
template <class C, class F>
FUSER_INLINE void each_group(const FuserArgs* args, const Plan& plan, const F& f) {
  using Element = typename C::Element;
  using MaskElement = typename C::MaskElement;
  const auto& e = *static_cast<const typename C::Extents*>(args->extents);
  const int64_t batch = e.batch, heads = e.heads, in_flight = e.in_flight;
  void* const* const after_masks = args->tensors + kFirstAfterMasks<C>;
  const int64_t items = (plan.heads ? batch : batch * heads) * plan.groups;
  std::atomic<int64_t> next{0};
  auto* done = static_cast<std::atomic<int64_t>*>(args->workspace);
  float* state = nullptr;
  const int64_t state_size = (plan.slots * (kStateRow<C> + 2) + 15) / 16 * 16;
  if (plan.phases > 1) {
    for (int64_t i = 0; i < batch * heads * plan.phases; ++i) done[i].store(0, std::memory_order_relaxed);
    state = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + (batch * heads * plan.phases + 7) / 8 * 64);
  }

#pragma omp parallel num_threads(args->threads) if (items > 1)
  {
    Scratch<C> w;
    std::memset(w.zero, 0, sizeof(w.zero));
    // Items are in the order (batch, head, phase, longest first). A phase starts when the one before it is done, so the
    // parts of a row are summed in the order of the plan whatever the threads do.
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const int64_t i = item % plan.groups, phase = plan.phase[i];
      const int64_t b = plan.heads ? item / plan.groups : item / plan.groups / heads;
      const int64_t h = plan.heads ? plan.head[i] : item / plan.groups % heads;
      const int64_t kv = h / (heads / e.key_heads), index = b * heads + h;
      if (plan.phases > 1) {
        if (phase > 0) {
          for (int64_t p = 0; p < phase; ++p) wait_until(done[index * plan.phases + p], plan.groups_of(h)[p]);
        } else if (index >= in_flight) {
          const int64_t before = index - in_flight;
          const int32_t* last = plan.groups_of(before % heads);
          for (int64_t p = 0; p < plan.phases; ++p) wait_until(done[before * plan.phases + p], last[p]);
        }
      }
      Head<C> t;
      t.q = static_cast<const Element*>(args->tensors[0]) + b * e.q.batch + h * e.q.head;
      t.k = static_cast<const Element*>(args->tensors[1]) + b * e.k.batch + kv * e.k.head;
      t.v = static_cast<const Element*>(args->tensors[2]) + b * e.v.batch + kv * e.v.head;
      t.mask = static_cast<const MaskElement*>(args->tensors[3]) + b * e.mask.batch + h * e.mask.head;
      if constexpr (C::kDistances) {
        t.distances = static_cast<const typename C::DistanceElement*>(after_masks[-1]) + h * e.distances.head;
        t.distances += e.distances.first, t.distance_step = e.distances.step;
      }
      t.out = static_cast<Element*>(after_masks[1]) + b * e.out.batch + h * e.out.head;
      t.lse = C::kLse ? static_cast<float*>(after_masks[C::kValueDim ? 2 : 1]) + b * e.lse.batch + h * e.lse.head : nullptr;
      t.state = state + (plan.phases > 1 ? index % in_flight * state_size : 0);
      t.state_top = t.state + plan.slots * kStateRow<C>, t.state_sum = t.state_top + plan.slots;
      t.q_row = e.q.row, t.k_row = e.k.row, t.v_row = e.v.row, t.out_row = e.out.row;
      t.lse_row = e.lse.row;
      t.mask_row = e.mask.row, t.mask_key = e.mask.key;
      t.scale = float(e.scale);
      const Group g(plan, i);
      f(t, g, w, i, index);
      if (plan.phases > 1) done[index * plan.phases + phase].fetch_add(1, std::memory_order_release);
    }
  }
}

// tensors: q, k, v, mask (if kMask), distances (if kDistances), plan (plan.h), out, lse (if kLse), then what the score policy reads. Without values
//   (kValueDim 0) there is no out, and v is not read.
// extents: AttentionExtents of kernels/attention.py. Heads of q, k, v and out are contiguous; lse is (batch, heads,
//   queries).
// workspace (64-byte aligned, see workspace_bytes): a 64-bit counter for every (batch, head, phase), then for every head
//   in flight the partial results, maxima and sums of its slots; unused when the plan has one phase. After it, what the
//   score policy needs.
// A row without a key gives zeros and -inf. Returns 1 when the plan is not for these lengths and heads.
template <class C>
FUSER_INLINE int run(const FuserArgs* args) {
  using Scores = typename C::Scores;
  const auto& e = *static_cast<const typename C::Extents*>(args->extents);
  const Plan plan(static_cast<const int64_t*>(args->tensors[kFirstAfterMasks<C>]));
  if (plan.format != kPlanFormat || plan.q_len != e.q_len || plan.kv_len != e.kv_len) return 1;
  if (plan.heads != 0 && plan.heads != e.heads) return 1;
  if constexpr (Scores::kSurveys) Scores::survey(args, plan);
  each_group<C>(args, plan, [&](Head<C>& t, const Group& g, Scratch<C>& w, int64_t i, int64_t index) {
    Scores::open(args, t, index);
    // Groups are taken in turn, so this thread is likely to get the one that is as many on as there are threads.
    look_ahead(plan, t, g, i, i + args->threads, w.ahead);
    if (!attend(t, g, w, false)) attend(t, g, w, true);
  });
  return 0;
}

}  // namespace attention
