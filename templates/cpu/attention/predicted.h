// Scores predicted with few bits, some of which are computed with more: fuser/ir/prediction.py says what, in PyTorch.
//
// Rows of k become codes (whole numbers) once, rows of q whenever a group is at work. A first walk over the plan leaves
// for every row the largest predicted score, and the sum of weights where limits need it. These become limits, and the
// second walk computes in full what is above them. Codes, predicted scores and limits that follow from maxima have the
// bits of the PyTorch code.
//
// Where a limit depends on one row alone, whose keys no two phases share, one group's products are kept from its first
// walk to its second, 16 bits each.
//
// The configuration adds:
//   kBits                                width of codes
//   kHighBits                            8 if scores above their limit are products of codes of 8 bits, and weights and
//                                        values bytes (bytes.h) unless some are left out; 0 if q and k are taken as given
//   kPerRow, kDynamic, kNormalize        where the largest code stands: see Prediction.calibration
//   kSums                                whether limits follow from sums of weights, too
//   kProbability, kBefore                what is compared
//   kOverRows, kOverHeads                what a maximum is of, beyond a row
//   kInverse                             whether scores are computed in full that are not above their limit
//   kPrune                               whether all others are left out
//   kBestOfEmpty, kAllOfEmpty            what is computed in full of a row that has nothing above its limit
// and the extents `workspace` (bytes before what lies here), `sums` (products that every thread has room for, 0 where none
// are kept), `limit` and `q_threshold`, `k_threshold`.
#pragma once
#include <omp.h>

#include <cmath>

#include "abi.h"
#include "attention/block.h"
#include "attention/bytes.h"
#include "attention/codes.h"
#include "attention/scores.h"
#include "attention/softmax.h"

namespace attention {

template <class C, class F>
FUSER_INLINE void each_group(const FuserArgs* args, const Plan& plan, const F& f);

// Products of codes are made, or made and kept, or those that were kept are read.
enum class Sums { kMade, kKept, kRead };

template <class C>
struct Predicted : std::conditional_t<C::kHighBits == 8, Bytes<C, !C::kPrune>, Products<C>> {
  static constexpr bool kHigh = C::kHighBits == 8;
  using Base = std::conditional_t<kHigh, Bytes<C, !C::kPrune>, Products<C>>;
  using Element = typename C::Element;
  using Codes = CodeProducts<C::kBits>;
  static constexpr int64_t D = C::kHeadDim, kWords = kCodeWords<C>;
  static constexpr int64_t kRow = (kWordsOfRow<C> + L - 1) / L * L;  // words
  static constexpr int32_t kLargest = (1 << (C::kBits - 1)) - 1;
  static constexpr bool kChanges = Base::kChanges && !C::kPrune, kPrunes = C::kPrune, kSurveys = true;
  // The plan's masks are applied to predicted scores, and no others are chosen; rules and biases only to final ones.
  static constexpr bool kMasks = C::kPrune || !Base::kChanges;
  static constexpr bool kPairValues = !Base::kByteValues && kDotsBf16;
  // Whether limits of rows depend on nothing else, so that one thread may find them and use the same products again.
  static constexpr bool kOnce = !C::kMask && !C::kOverRows && C::kBits <= 4;
  static_assert(!kOnce || kLargest * kLargest * D < 1 << 15);

  // Rows of one head: codes of k; largest score and sum of weights of rows of q, where the first becomes the limit.
  struct OfHead : Base::OfHead {
    KeyCodes low;
    float *top, *sum;
    float factor;
    const bf16* value;  // side by side, if they are multiplied as bf16
    int16_t* sums;      // of a thread: room for the products of all keys of a group, if they are made once
    float limit;
  };
  struct OfThread : Base::OfThread {
    BlockCodes<C> low;
    float limit[kGroup];
    uint64_t chosen[C::kKeyBlock + kMostKeys];  // lanes whose score of a key is above its limit
    alignas(64) Word<C> row[kGroup * kRow];  // of q, side by side, since rows of heads far apart share few sets of L1
    const Value<C>* v_row[C::kKeyBlock];
    float scale;
    int16_t *sums, *next;  // of this block and of the one after it
    bool row_bias, masked;  // whether some lane may not see some key of the block
    bool finite, given;     // whether all rows of q have codes of 8 bits, and whether rows are there as they are given
  };

  // What lies in the workspace, in this order: see PredictedKernel.launch.
  struct Shared {
    float *factor, *top, *sum, *step;
    int32_t *start, *code;
    bf16* value;
    int16_t* sums;

    explicit Shared(const FuserArgs* args) {
      const auto& e = extents<C>(args);
      const int64_t rows = e.batch * e.heads * e.q_len, keys = e.batch * e.key_heads * e.kv_len;
      if constexpr (kHigh)
        factor = static_cast<float*>(typename Base::Shared(args).end);
      else
        factor = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + e.workspace);
      top = factor + 16, sum = top + rows, step = sum + rows;
      start = reinterpret_cast<int32_t*>(step + keys), code = start + keys;
      value = reinterpret_cast<bf16*>(code + keys * kWords);
      const int64_t values = kPairValues ? (keys * C::kValueDim + 1) / 2 * 2 : 0;
      sums = reinterpret_cast<int16_t*>(value + values);
    }
  };

  // What a row's elements are divided by before they meet thresholds, NaN where they predict nothing, 0 for zeros.
  static float size_of(const CodeRow<C>& row) {
    if (row.largest == kInf) return __builtin_nanf("");
    if (row.largest < kSmallest) return 0.0f;
    if constexpr (C::kPerRow) return row.largest;
    if constexpr (!C::kNormalize) return 1.0f;
    float x[CodeRow<C>::kVectors * L];
    std::memcpy(x, row.x, sizeof(x));
    double squares = 0.0;
    for (int64_t d = 0; d < D; ++d) squares += double(x[d]) * double(x[d]);
    const float length = float(std::sqrt(squares));
    return length < kInf ? length : __builtin_nanf("");
  }

  // Codes of a row plus `offset`: their sum, and the step.
  static int32_t quantize(const CodeRow<C>& row, float factor, int32_t offset, int32_t* to, float* step) {
    if constexpr (C::kPerRow) return row.quantize(factor, offset, to, step);
    const float size = size_of(row);
    const bool sound = size > 0.0f;
    *step = sound ? size / factor : size;
    return row.write(offset, to, [&](vf x) FUSER_LAMBDA {
      const vf exact = x / (sound ? size : 1.0f) * factor;
      const vf whole = max_fast(set1(float(-kLargest)), min_fast(set1(float(kLargest)), round_even(exact)));
      return sound ? __builtin_convertvector(whole, vi) : vi{};
    });
  }

  // The largest element of all rows of a tensor, each divided by its size.
  template <class Strides>
  static float largest(const void* tensor, const Strides& s, int64_t batch, int64_t heads, int64_t rows, int threads) {
    float top = 0.0f;
#pragma omp parallel for num_threads(threads) reduction(max : top)
    for (int64_t i = 0; i < batch * heads * rows; ++i) {
      const Element* head = static_cast<const Element*>(tensor) + i / rows / heads * s.batch + i / rows % heads * s.head;
      const CodeRow<C> row(head + i % rows * s.row);
      const float size = size_of(row), own = size > 0.0f ? row.largest / size : 0.0f;
      top = own > top ? own : top;
    }
    return top < kSmallest ? 1.0f : top;
  }

  static void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const int64_t at = (index / e.heads * e.key_heads + index % e.heads / (e.heads / e.key_heads)) * e.kv_len;
    Base::open(args, t, index);
    OfHead& to = t.scores;
    to.low = {all.code + at * kWords, all.start + at, all.step + at};
    to.top = all.top + index * e.q_len, to.sum = all.sum + index * e.q_len, to.factor = all.factor[0];
    to.value = all.value + at * C::kValueDim, to.limit = float(e.limit);
    to.sums = e.sums == 0 ? nullptr : all.sums + omp_get_thread_num() * e.sums;
  }

  static void survey(const FuserArgs* args, const Plan& plan) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const int64_t rows = e.batch * e.heads * e.q_len, keys = e.batch * e.key_heads * e.kv_len;
    float q_factor = kLargest, k_factor = kLargest;
    if constexpr (C::kDynamic) {
      q_factor /= largest(args->tensors[0], e.q, e.batch, e.heads, e.q_len, args->threads);
      k_factor /= largest(args->tensors[1], e.k, e.batch, e.key_heads, e.kv_len, args->threads);
    } else if constexpr (!C::kPerRow) {
      q_factor /= float(e.q_threshold), k_factor /= float(e.k_threshold);
    }
    all.factor[0] = q_factor;
    const auto code_key = [&](const CodeRow<C>& row, int64_t i) {
      all.start[i] = -Codes::kOffset * quantize(row, k_factor, 0, all.code + i * kWords, all.step + i);
    };
    if constexpr (kHigh) {
      const auto none = [](int64_t) { return typename Base::OneMean{nullptr}; };
      Base::survey_rows(args, none, std::false_type(), [](int64_t) {}, code_key);
    } else {
#pragma omp parallel for num_threads(args->threads)
      for (int64_t i = 0; i < keys; ++i)
        code_key(CodeRow<C>(row_of<C>(args, 1, e.k, i / e.kv_len, i % e.kv_len)), i);
    }
    if constexpr (kPairValues)
#pragma omp parallel for num_threads(args->threads)
      for (int64_t i = 0; i < keys; ++i) {
        const Element* const value = row_of<C>(args, 2, e.v, i / e.kv_len, i % e.kv_len);
        for (int64_t d = 0; d < C::kValueDim; ++d) from_float(all.value + i * C::kValueDim + d, to_float(value[d]));
      }
    if (e.sums != 0) return;
    for (int64_t i = 0; i < rows; ++i) all.top[i] = -kInf, all.sum[i] = 0.0f;
    each_group<C>(args, plan, [&](Head<C>& t, const Group& g, Scratch<C>& w, int64_t, int64_t index) {
      open(args, t, index);
      visit(t, g, w);
    });
    limits(args);
  }

  // Adds the scores of a group to what is known of its rows.
  static void visit(const Head<C>& t, const Group& g, Scratch<C>& w) {
    w.pitch = (g.count + L - 1) / L * L;
    for (int64_t r = 0; r < w.pitch; ++r) {
      const bool begun = r < g.count;
      w.top[r] = begun ? t.scores.top[g.row[r]] : -kInf;
      w.sum[r] = begun ? t.scores.sum[g.row[r]] : 0.0f;
    }
    own_queries(t, g, w);
    walk<Sums::kMade>(t, g, w);
    for (int64_t r = 0; r < g.count; ++r) t.scores.top[g.row[r]] = w.top[r], t.scores.sum[g.row[r]] = w.sum[r];
  }

  template <Sums kSums>
  static void walk(const Head<C>& t, const Group& g, Scratch<C>& w) {
    Block<C> block{t, g, w, true};
    while (block.fill()) {
      own_keys(t, w, block.n);
      by_tiles(block.range, [&](auto size, int64_t v) {
        predict<size(), kSums, C::kSums || Base::kChanges, false>(w, block.n, v);
        if constexpr (C::kSums)
          softmax<size(), false, false>(w, block.n, v, Base::kChanges, block.row_mask);
        else if constexpr (Base::kChanges)
          changed_tops<size()>(w, block.n, v);
        else
          for (int64_t i = v; i < v + size(); ++i) store(w.top + i * L, load(w.peak + i * L));
      });
    }
  }

  template <int RV>
  static void changed_tops(Scratch<C>& w, int64_t n, int64_t v0) {
    for (int64_t v = v0; v < v0 + RV; ++v) {
      vf top = load(w.top + v * L);
      for (int64_t j = 0; j < n; ++j)
        top = max_fast(Base::change(w, load(w.s + j * w.pitch + v * L), j, v, w.scores.row_bias), top);
      store(w.top + v * L, top);
    }
  }

  // Turns what is known of all rows into their limits.
  static void limits(const FuserArgs* args) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const float number = float(e.limit);
    const int64_t rows = e.q_len * (C::kOverHeads ? e.heads : 1);
#pragma omp parallel for num_threads(args->threads)
    for (int64_t unit = 0; unit < e.batch * (C::kOverHeads ? 1 : e.heads); ++unit) {
      float* const top = all.top + unit * rows;
      const float* const sum = all.sum + unit * rows;
      float peak = -kInf;
      if constexpr (C::kOverRows)
        for (int64_t i = 0; i < rows; ++i) {
          const float own = C::kBefore ? top[i] : sum[i] > 0.0f ? -std::log(sum[i]) : -kInf;
          peak = own > peak ? own : peak;
        }
      for (int64_t i = 0; i < rows; ++i) top[i] = limit_of(top[i], sum[i], number, peak);
    }
  }

  // The limit of a row from the specification's number, and the peak of the rows it is compared with.
  static float limit_of(float top, float sum, float number, float peak) {
    float limit;
    if constexpr (C::kBefore)
      limit = number * (C::kOverRows ? peak : top);
    else if constexpr (!C::kSums)
      limit = top + number;
    else
      limit = top + std::log(sum) + number + (C::kOverRows ? peak : 0.0f);
    if (!(top > limit)) {
      if constexpr (C::kBestOfEmpty) limit = top == 0.0f ? -kSmallest : std::nextafter(top, -kInf);
      if constexpr (C::kAllOfEmpty) limit = -kInf;
    }
    return limit;
  }

  static __attribute__((noinline)) void own_queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    OfThread& own = w.scores;
    own.finite = true, own.scale = t.scale, own.next = t.scores.sums;
    own.row_bias = C::kDistances || (C::kMask && t.mask_row != 0);
    for (int64_t r = 0; r < w.pitch; ++r) {
      const bool used = r < g.count;
      const int64_t row = g.row[used ? r : g.count - 1];
      const CodeRow<C> given(t.q + row * t.q_row);
      quantize(given, t.scores.factor, Codes::kOffset, own.low.row(r), own.low.q_step + r);
      own.low.q_step[r] *= t.scale;
      if constexpr (kHigh) {
        Base::code_query(given, t, w, r);
        own.finite &= own.codes.q_step[r] < kInf;
      }
      // Nothing of an idle lane is computed in full.
      own.limit[r] = used ? t.scores.top[row] : C::kInverse ? -kInf : kInf;
    }
    own.low.to_lanes(w.pitch);
    if constexpr (kHigh) own.codes.to_lanes(w.pitch);
    own.given = !kHigh || !sound(t, w);
    if (!own.given) return;
    for (int64_t r = 0; r < w.pitch; ++r) {
      Word<C>* const copy = own.row + r * kRow;
      const Word<C>* const words = row_as(t.q + g.row[r < g.count ? r : g.count - 1] * t.q_row, copy, D);
      if (words != copy) std::memcpy(copy, words, kWordsOfRow<C> * sizeof(Word<C>));
    }
  }

  // Rows that are not finite have no codes of 8 bits; an exact run multiplies them as they are given.
  FUSER_INLINE bool sound(const Head<C>& t, const Scratch<C>& w) {
    if constexpr (kHigh) return t.scores.state == 0 && w.scores.finite;
    return true;
  }

  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    own_queries(t, g, w);
    if constexpr (kOnce)
      if (t.scores.sums != nullptr) {
        for (int64_t r = 0; r < w.pitch; ++r) w.top[r] = -kInf, w.sum[r] = 0.0f;
        walk<Sums::kKept>(t, g, w);
        w.scores.next = t.scores.sums;
        for (int64_t r = 0; r < g.count; ++r) w.scores.limit[r] = limit_of(w.top[r], w.sum[r], t.scores.limit, 0.0f);
      }
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    if (w.scores.given) Base::keys(t, w, n);
    if constexpr (kHigh) w.scores.codes.find(t.scores.k, w.key, n);
    own_keys(t, w, n);
  }

  FUSER_INLINE void value_keys(const Head<C>& t, Scratch<C>& w, int64_t n, bool exact) {
    if constexpr (kPairValues)
      for (int64_t j = 0; j < n; ++j) w.v_row[j] = t.scores.value + w.key[j] * int64_t(C::kValueDim);
    else
      Base::value_keys(t, w, n, exact);
  }

  static __attribute__((noinline)) void own_keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    w.scores.sums = w.scores.next;
    if (kOnce && w.scores.sums != nullptr) w.scores.next += n * w.pitch;
    uint64_t lanes = ~0ull;
    for (int64_t j = 0; j < n; ++j) lanes &= w.lanes[j];
    w.scores.masked = lanes != ~0ull;
    // Tiles read lanes of keys beyond n as well.
    for (int64_t j = n; j < n + kMostKeys; ++j) w.lanes[j] = w.lanes[n - 1];
    w.scores.low.find(t.scores.low, w.key, n);
  }

  // Predicts the scores of RV vectors from v, and their largest into w.peak. With kStore they go to w.s, and with kChoose
  // those above their limits into `chosen`.
  template <int RV, Sums kSums, bool kStore, bool kChoose>
  FUSER_INLINE void predict(Scratch<C>& w, int64_t n, int64_t v) {
    if (!Base::kChanges && w.scores.masked)
      predict_block<RV, kSums, kStore, kChoose, !Base::kChanges>(w, n, v);
    else
      predict_block<RV, kSums, kStore, kChoose, false>(w, n, v);
  }

  template <int RV, Sums kSums, bool kStore, bool kChoose, bool kMasked>
  static __attribute__((noinline)) void predict_block(Scratch<C>& w, int64_t n, int64_t v0) {
    // Unless one instruction multiplies and adds, products need registers of their own.
    constexpr int64_t most = Codes::kFused ? kAccumulators : kAccumulators * 2 / 3;
    constexpr int64_t RK = most / RV < kMostKeys ? most / RV : kMostKeys;
    const int64_t pitch = w.pitch;  // a copy, which what is stored cannot change
    OfThread& own = w.scores;
    vf top[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) top[v] = load(w.top + (v0 + v) * L);
    for (int64_t j0 = 0; j0 < n; j0 += RK) {
      float* const s = w.s + j0 * pitch + v0 * L;
      uint64_t chosen[RK] = {};
      if constexpr (kStore && !kHigh) announce_rows<RK>(w, j0, n);
      int16_t* const sums = own.sums + j0 * pitch + v0 * L;
      const auto put = [&](int j, int v, vi sum) FUSER_LAMBDA {
        vf x = to_float(sum) * (load(own.low.q_step + (v0 + v) * L) * own.low.step[j0 + j]);
        if constexpr (kMasked) x = select_bits(w.lanes[j0 + j] >> (v0 + v) * L, x, set1(-kInf));
        top[v] = max_fast(x, top[v]);
        if constexpr (kStore) store(s + j * pitch + v * L, x);
        if constexpr (kChoose) chosen[j] |= above_limit(x, own, v0 + v) << (v0 + v) * L;
      };
      if constexpr (kSums == Sums::kRead) {
        // Beyond the last key are the products of another block.
#pragma GCC unroll 8
        for (int j = 0; j < RK; ++j) {
          const int16_t* const kept = sums + (j0 + j < n ? j : n - 1 - j0) * pitch;
#pragma GCC unroll 8
          for (int v = 0; v < RV; ++v) put(j, v, load(kept + v * L));
        }
      } else {
        product_tile<kWords, RV, RK, vi>(
            own.low.q + v0 * L, own.low.code + j0, pitch,
            [](vi sum, vi a, int32_t b) FUSER_LAMBDA { return Codes::add(sum, a, set1(b)); },
            [&](int j, int v, vi sum) FUSER_LAMBDA {
              const vi whole = Codes::total(sum) + own.low.start[j0 + j];
              if constexpr (kSums == Sums::kKept) store(sums + j * pitch + v * L, whole);
              put(j, v, whole);
            });
      }
      if constexpr (kChoose)
        for (int j = 0; j < RK; ++j) own.chosen[j0 + j] = kMasked ? chosen[j] & w.lanes[j0 + j] : chosen[j];
    }
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) store(w.peak + (v0 + v) * L, top[v]);
  }

  // The lanes of vector v whose scores x are to be computed in full, NaN among them.
  FUSER_INLINE uint64_t above_limit(vf x, const OfThread& own, int64_t v) {
    const vf limit = load(own.limit + v * L);
    return C::kInverse ? not_above(x, limit) : not_at_most(x, limit);
  }

  FUSER_INLINE auto value_rows(const Scratch<C>& w) { return C::kPrune ? w.scores.v_row : w.v_row; }

  template <int RV>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v0, bool exact) {
    if constexpr (kOnce && kHigh && !Base::kChanges && !C::kPrune)
      if (w.scores.sums != nullptr && !exact) {
        w.scores.masked ? raise_kept<RV, true>(w, n, v0) : raise_kept<RV, false>(w, n, v0);
        return n;
      }
    if (kOnce && w.scores.sums != nullptr)
      predict_chosen<RV, kOnce ? Sums::kRead : Sums::kMade>(w, n, v0);
    else
      predict_chosen<RV, Sums::kMade>(w, n, v0);
    bool refined = false;
    if constexpr (kHigh) {
      raise<RV>(w, n, v0);
      uint64_t poison[C::kKeyBlock];
      if (exact && w.scores.given) refined = find_poison<RV>(w, n, v0, poison) && refine(w, n, poison);
    } else {
      refined = refine(w, n, w.scores.chosen);
    }
    if constexpr (C::kPrune) return keep<RV>(w, n, v0, exact);
    if (refined && !Base::kChanges)
      for (int64_t v = v0; v < v0 + RV; ++v) {
        vf top = load(w.top + v * L);
        for (int64_t j = 0; j < n; ++j) top = max_fast(load(w.s + j * w.pitch + v * L), top);
        store(w.peak + v * L, top);
      }
    return n;
  }

  // Scores that were chosen become those of codes of 8 bits, a tile at a time where it has any. The largest of the block
  // are left for bytes.
  template <int RV>
  static __attribute__((noinline)) void raise(Scratch<C>& w, int64_t n, int64_t v0) {
    constexpr int64_t RK = Base::template kTileKeys<RV>;
    const OfThread& own = w.scores;
    Base::template store_scores<RV>(w, n, v0, [&](int64_t j0, const auto& put) FUSER_LAMBDA {
      const float* const s = w.s + j0 * w.pitch + v0 * L;
      uint64_t any = 0;
      for (int j = 0; j < RK; ++j) any |= own.chosen[j0 + j];
      if (any != 0) {
        Base::template code_scores<RV>(w, j0, v0, [&](int j, int v, vf high) FUSER_LAMBDA {
          put(j, v, select_bits(own.chosen[j0 + j] >> (v0 + v) * L, high, load(s + j * w.pitch + v * L)));
        });
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < RK; ++j)
#pragma GCC unroll 8
          for (int v = 0; v < RV; ++v) put(j, v, load(s + j * w.pitch + v * L));
      }
    });
  }

  // What predicts, chooses and raises scores in one, where products are kept and all of a tile but few have some.
  template <int RV, bool kMasked>
  static __attribute__((noinline)) void raise_kept(Scratch<C>& w, int64_t n, int64_t v0) {
    constexpr int64_t RK = Base::template kTileKeys<RV>;
    const OfThread& own = w.scores;
    const int64_t pitch = w.pitch;
    const int16_t* const sums = own.sums + v0 * L;
    Base::template store_scores<RV>(w, n, v0, [&](int64_t j0, const auto& put) FUSER_LAMBDA {
      // Beyond the last key are the products of another block.
      const int16_t* kept[RK];
#pragma GCC unroll 8
      for (int j = 0; j < RK; ++j) kept[j] = sums + (j0 + j < n ? j0 + j : n - 1) * pitch;
      Base::template code_scores<RV>(w, j0, v0, [&](int j, int v, vf high) FUSER_LAMBDA {
        const vf steps = load(own.low.q_step + (v0 + v) * L) * own.low.step[j0 + j];
        const vf low = to_float(load(kept[j] + v * L)) * steps;
        const vf limit = load(own.limit + (v0 + v) * L);
        vf x = select(C::kInverse ? (vi)(low > limit) : (vi)(low <= limit), low, high);
        if constexpr (kMasked) x = select_bits(w.lanes[j0 + j] >> (v0 + v) * L, x, set1(-kInf));
        put(j, v, x);
      });
    });
  }

  // The lanes of chosen scores that are NaN, since their rows have no codes. Returns whether there are any.
  template <int RV>
  static bool find_poison(const Scratch<C>& w, int64_t n, int64_t v0, uint64_t* poison) {
    uint64_t any = 0;
    for (int64_t j = 0; j < n; ++j) {
      uint64_t lanes = 0;
      for (int64_t v = v0; v < v0 + RV; ++v)
        lanes |= not_at_most(load(w.s + j * w.pitch + v * L), set1(kInf)) << v * L;
      any |= poison[j] = w.scores.chosen[j] & lanes;
    }
    return any != 0;
  }

  template <int RV, Sums kSums>
  FUSER_INLINE void predict_chosen(Scratch<C>& w, int64_t n, int64_t v0) {
    if constexpr (Base::kChanges) {
      predict<RV, kSums, true, false>(w, n, v0);
      choose_changed<RV>(w, n, v0);
    } else {
      predict<RV, kSums, true, true>(w, n, v0);
    }
  }

  // Scores that are -inf may not be seen.
  template <int RV>
  static void choose_changed(Scratch<C>& w, int64_t n, int64_t v0) {
    for (int64_t j = 0; j < n; ++j) {
      uint64_t chosen = 0;
#pragma GCC unroll 8
      for (int64_t v = v0; v < v0 + RV; ++v) {
        const vf x = Base::change(w, load(w.s + j * w.pitch + v * L), j, v, w.scores.row_bias);
        chosen |= (above_limit(x, w.scores, v) & not_at_most(x, set1(-kInf))) << v * L;
      }
      w.scores.chosen[j] = chosen;
    }
  }

  // Computes the scores of `chosen` lanes in full, an element at a time: they are few, and far between. Returns whether
  // there was any.
  static __attribute__((noinline)) bool refine(Scratch<C>& w, int64_t n, const uint64_t* chosen) {
    constexpr int64_t kVectors = kWordsOfRow<C> / L, kRest = kWordsOfRow<C> % L;
    OfThread& own = w.scores;
    vf x[L] = {};
    volatile float* to[L];  // a scatter of vectors is slower than stores one by one
    int64_t count = 0;
    bool any = false;
    const auto put = [&] {
      float full[L];
      store(full, reduce_add_each(x) * own.scale);
      for (int64_t i = 0; i < count; ++i) *to[i] = full[i];
      count = 0;
    };
    for (int64_t j = 0; j < n; ++j) {
      uint64_t lanes = chosen[j];
      if (lanes == 0) continue;
      any = true;
      const Word<C>* const k = w.k_row[j];
      decltype(load(k)) key[kVectors + 1];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kVectors; ++i) key[i] = load(k + i * L);
      if constexpr (kRest != 0) key[kVectors] = load_n(k + kVectors * L, kRest);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t lane = __builtin_ctzll(lanes);
        const Word<C>* const q = own.row + lane * kRow;
        vf sum = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < kVectors; ++i) sum = multiply_add(sum, load(q + i * L), key[i]);
        if constexpr (kRest != 0) sum = multiply_add(sum, load_n(q + kVectors * L, kRest), key[kVectors]);
        x[count] = sum, to[count] = w.s + j * w.pitch + lane;
        if (++count == L) put();
      }
    }
    if (count != 0) put();
    return any;
  }

  // Brings together the keys that some row in RV vectors needs, their scores changed, and -inf where they were not
  // chosen. An exact run keeps all. Returns how many.
  template <int RV>
  FUSER_INLINE int64_t keep(Scratch<C>& w, int64_t n, int64_t v0, bool exact) {
    OfThread& own = w.scores;
    int64_t kept = 0;
    vf top[RV];
    for (int v = 0; v < RV; ++v) top[v] = load(w.top + (v0 + v) * L);
    for (int64_t j = 0; j < n; ++j) {
      const uint64_t lanes = own.chosen[j];
      if (!exact && lanes == 0) continue;
      for (int v = 0; v < RV; ++v) {
        vf x = load(w.s + j * w.pitch + (v0 + v) * L);
        if constexpr (Base::kChanges) x = Base::change(w, x, j, v0 + v, own.row_bias);
        x = select_bits(lanes >> (v0 + v) * L, x, set1(-kInf));
        top[v] = max_fast(x, top[v]);
        store(w.s + kept * w.pitch + (v0 + v) * L, x);
      }
      own.v_row[kept++] = w.v_row[j];
    }
    for (int v = 0; v < RV; ++v) store(w.peak + (v0 + v) * L, top[v]);
    return kept;
  }
};

}  // namespace attention
