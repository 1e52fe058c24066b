// Scores in 8 bits, and values, too, where one instruction multiplies bytes: fuser/ir/int8_attention.py says what.
//
// Rows of k, less their mean, and values become codes once, rows of q whenever a group is at work (bytes.h). A block in
// which no row has a score that matters is left out.
//
// The configuration adds kDocuments, whether keys lose the mean of their document; then the tensors add `rows` (keys) and
// `length` (1), both int64: key i is of document rows[i] / length. The extents add `workspace` (bytes before what lies
// here), `smooth`, and `skip`, the part of a row's probability that may be left out.
#pragma once
#include <cmath>

#include "attention/bytes.h"

namespace attention {

template <class C>
struct Int8 : Bytes<C, true> {
  using Base = Bytes<C, true>;
  using Element = typename C::Element;
  static constexpr int64_t D = C::kHeadDim, kVectors = CodeRow<C>::kVectors;
  // What depends on the mean of k is the same for all keys of a row.
  static constexpr bool kShifts = kRule<C> || C::kLse;
  static_assert(!kShifts || !C::kDocuments);

  struct OfHead : Base::OfHead {
    const float* mean;
    float skip;
  };
  struct OfThread : Base::OfThread {
    float shift[kGroup], met[kGroup];  // the largest score of a row so far, without what belongs to values
    float skip;
    bool full;  // whether rows are multiplied as they are given
  };

  // What lies in the workspace: the mean of every head of keys, behind what bytes.h has there.
  static float* means(const FuserArgs* args) { return static_cast<float*>(typename Base::Shared(args).end); }

  static void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = extents<C>(args);
    Base::open(args, t, index);
    t.scores.mean = means(args) + (index / e.heads * e.key_heads + index % e.heads / (e.heads / e.key_heads)) * D;
    // As many keys as there are, so far below the largest, are no more than the part of its row that may be left out.
    t.scores.skip = e.skip > 0.0 ? float(std::log(double(e.kv_len) / e.skip)) : kInf;
  }

  // Twice as wide sums of a column of vectors.
  struct Wide {
    typedef double Half __attribute__((vector_size(FUSER_VECTOR_BYTES)));
    typedef float Narrow __attribute__((vector_size(FUSER_VECTOR_BYTES / 2)));
    Half sum[2] = {};

    void add(vf x) {
      Narrow half[2];
      std::memcpy(half, &x, sizeof(x));
      for (int i = 0; i < 2; ++i) sum[i] += __builtin_convertvector(half[i], Half);
    }
    vf mean(double count) const {
      Narrow half[2];
      for (int i = 0; i < 2; ++i) half[i] = __builtin_convertvector(sum[i] / count, Narrow);
      vf x;
      std::memcpy(&x, half, sizeof(x));
      return x;
    }
  };

  // The mean of keys first to last of a head, zeros of none. One that is not finite leaves no row that is.
  static void find_mean(const FuserArgs* args, int64_t head, int64_t first, int64_t last, float* mean) {
    const auto& e = extents<C>(args);
    Wide sum[kVectors];
    const Element* k = row_of<C>(args, 1, e.k, head, first);
    for (int64_t i = first; i < last; ++i, k += e.k.row) {
      Base::template announce<D>(k + Base::kRowsAhead * e.k.row);
#pragma GCC unroll 16
      for (int64_t d = 0; d < D; d += L) sum[d / L].add(part_of<D>(k, d));
    }
    const double count = last > first ? double(last - first) : 1.0;
    for (int64_t d = 0; d < D; d += L) store_n(mean + d, sum[d / L].mean(count), D - d < L ? D - d : L);
  }

  // The mean of the document of each key of a head.
  struct DocumentMeans {
    static constexpr bool kInOrder = true;
    const FuserArgs* args;
    int64_t head, end = 0;
    float mean[D] = {};

    const float* operator()(int64_t key) {
      if (key < end) return mean;
      void* const* const more = args->tensors + kFirstAfterMasks<C> + 2;
      const int64_t *const rows = static_cast<const int64_t*>(more[0]), length = *static_cast<const int64_t*>(more[1]);
      while (end < extents<C>(args).kv_len && rows[end] / length == rows[key] / length) ++end;
      find_mean(args, head, key, end, mean);
      return mean;
    }
  };

  static void survey(const FuserArgs* args, const Plan&) {
    const auto& e = extents<C>(args);
    const auto nothing = [](const CodeRow<C>&, int64_t) {};
    if constexpr (C::kDocuments) {
      const auto of = [&](int64_t head) { return DocumentMeans{args, head}; };
      return Base::survey_rows(args, of, std::true_type(), [](int64_t) {}, nothing);
    } else {
      float* const all = means(args);
      const auto of = [&](int64_t head) { return typename Base::OneMean{all + head * D}; };
      const auto find = [&](int64_t head) { find_mean(args, head, 0, e.smooth ? e.kv_len : 0, all + head * D); };
      Base::survey_rows(args, of, std::true_type(), find, nothing);
    }
  }

  FUSER_INLINE bool sound(const Head<C>& t, const Scratch<C>& w) { return t.scores.state == 0 && !w.scores.full; }

  // Where a key has no codes, its head is multiplied as it is given, where a query has none, its group.
  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    w.scores.skip = t.scores.skip;
    w.scores.full = (t.scores.state & 2) != 0 || !own_queries(t, g, w);
    if (w.scores.full) Base::queries(t, g, w);
  }

  // Returns whether all rows have codes.
  static __attribute__((noinline)) bool own_queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    OfThread& own = w.scores;
    bool all = true;
    for (int64_t r = 0; r < w.pitch; ++r) {
      const CodeRow<C> row(t.q + g.row[r < g.count ? r : g.count - 1] * t.q_row);
      Base::code_query(row, t, w, r);
      own.met[r] = -kInf, all &= row.largest < kInf;
      if constexpr (kShifts) {
        vf sum = {};
        for (int64_t d = 0; d < D; d += L) sum += row.x[d / L] * part_of<D>(t.scores.mean, d);
        own.shift[r] = reduce_add(sum) * t.scale;
      }
    }
    own.codes.to_lanes(w.pitch);
    return all;
  }

  static __attribute__((noinline)) void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    if (w.scores.full) return Base::keys(t, w, n);
    w.scores.codes.find(t.scores.k, w.key, n);
  }

  template <int RV>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v0, bool exact) {
    if (w.scores.full) return Base::template score<RV>(w, n, v0, exact);
    OfThread& own = w.scores;
    vf top[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) top[v] = set1(-kInf);
    Base::template store_scores<RV>(w, n, v0, [&](int64_t j0, const auto& put) FUSER_LAMBDA {
      Base::template code_scores<RV>(w, j0, v0, [&](int j, int v, vf x) FUSER_LAMBDA {
        if constexpr (kShifts) x += load(own.shift + (v0 + v) * L);
        top[v] = max_fast(x, top[v]);
        put(j, v, x);
      });
    });
    vi matters = {};
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      const vf before = load(own.met + (v0 + v) * L);
      matters |= ~(vi)(top[v] < before - own.skip);
      store(own.met + (v0 + v) * L, max_fast(top[v], before));
    }
    return Base::kChanges || exact || any(matters) ? n : 0;
  }
};

}  // namespace attention
