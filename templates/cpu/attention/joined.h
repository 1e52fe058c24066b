// Keys and values of two sources: tokens, then summaries of chunks, as if they lay in one list (fuser/ir/windows.py).
//
// More tensors: keys and values of summaries; and the extents `far_k`, `far_v` (elements between batch entries, heads and
// summaries), `tokens` (keys before this one are tokens), and `step`, `near_first` and `far_first`: key j is the token
// near_first + step * j, or the summary far_first + step * j. Keys of neither kind are in no plan.
#pragma once
#include "attention/scores.h"

namespace attention {

template <class C>
struct Joined : Products<C> {
  using Element = typename C::Element;
  struct OfHead {
    const Element *far_k, *far_v;
    int64_t far_k_row, far_v_row, tokens, step, near_first, far_first;
  };

  FUSER_INLINE void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = *static_cast<const typename C::Extents*>(args->extents);
    const int64_t b = index / e.heads, kv = index % e.heads / (e.heads / e.key_heads);
    void* const* const more = args->tensors + kFirstAfterMasks<C> + 2 + C::kLse;
    const auto* const k = static_cast<const Element*>(more[0]) + b * e.far_k.batch + kv * e.far_k.head;
    const auto* const v = static_cast<const Element*>(more[1]) + b * e.far_v.batch + kv * e.far_v.head;
    t.scores = {k, v, e.far_k.row, e.far_v.row, e.tokens, e.step, e.near_first, e.far_first};
  }

  FUSER_INLINE const Element* key_row(const Head<C>& t, int64_t key) {
    const OfHead& of = t.scores;
    return key < of.tokens ? t.k + (of.near_first + of.step * key) * t.k_row
                           : of.far_k + (of.far_first + of.step * key) * of.far_k_row;
  }
  FUSER_INLINE const Element* value_row(const Head<C>& t, int64_t key) {
    const OfHead& of = t.scores;
    return key < of.tokens ? t.v + (of.near_first + of.step * key) * t.v_row
                           : of.far_v + (of.far_first + of.step * key) * of.far_v_row;
  }
};

}  // namespace attention
