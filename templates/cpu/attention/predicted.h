// Scores predicted with few bits, some of which are computed in full: fuser/ir/prediction.py says what, in PyTorch.
//
// Rows of k become codes (whole numbers) once, rows of q whenever a group is at work. A first walk over the plan leaves
// for every row the largest predicted score, and the sum of weights where limits need it. These become limits, and the
// second walk computes in full what is above them. Codes, predicted scores and limits that follow from maxima have the
// bits of the PyTorch code.
//
// The configuration adds:
//   kBits                                width of codes
//   kPerRow, kDynamic, kNormalize        where the largest code stands: see Prediction.calibration
//   kSums                                whether limits follow from sums of weights, too
//   kProbability, kBefore                what is compared
//   kOverRows, kOverHeads                what a maximum is of, beyond a row
//   kInverse                             whether scores are computed in full that are not above their limit
//   kPrune                               whether all others are left out
//   kBestOfEmpty, kAllOfEmpty            what is computed in full of a row that has nothing above its limit
// and the extents `workspace` (bytes before what lies here), `limit` and `q_threshold`, `k_threshold`.
#pragma once
#include <cmath>

#include "abi.h"
#include "attention/block.h"
#include "attention/codes.h"
#include "attention/scores.h"
#include "attention/softmax.h"

namespace attention {

template <class C, class F>
FUSER_INLINE void each_group(const FuserArgs* args, const Plan& plan, const F& f);

constexpr float kSmallest = 0x1p-100f;  // rows below it are zero

// s[j][lane] = codes of a row in lanes times those of key j, times the steps of both; `top` keeps the largest.
template <int Bits, int64_t Words, int RV, int RK>
FUSER_INLINE void predicted_tile(const int32_t* q, const float* q_step, const int32_t* const* k_row,
                                 const float* k_step, const int32_t* k_start, int64_t pitch, float* s, vf* top) {
  using Products = CodeProducts<Bits>;
  vi acc[RK][RV] = {};
  const int32_t* k[RK];
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j) k[j] = k_row[j];
#pragma GCC unroll 2
  for (int64_t i = 0; i < Words; ++i, q += pitch) {
    vi x[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) x[v] = load(q + v * L);
#pragma GCC unroll 8
    for (int j = 0; j < RK; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) acc[j][v] = Products::add(acc[j][v], x[v], set1(k[j][i]));
  }
#pragma GCC unroll 8
  for (int j = 0; j < RK; ++j, s += pitch)
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      const vi sum = Products::total(acc[j][v]) + k_start[j];
      const vf x = __builtin_convertvector(sum, vf) * (load(q_step + v * L) * k_step[j]);
      store(s + v * L, x), top[v] = max_fast(x, top[v]);
    }
}

template <class C>
struct Predicted : Products<C> {
  using Base = Products<C>;
  using Element = typename C::Element;
  using Codes = CodeProducts<C::kBits>;
  static constexpr int64_t D = C::kHeadDim, kWords = (D + 3) / 4;
  static_assert(kWords <= 64);
  static constexpr int32_t kLargest = (1 << (C::kBits - 1)) - 1;
  static constexpr bool kChanges = Base::kChanges && !C::kPrune, kPrunes = C::kPrune, kSurveys = true;

  // Rows of one head: codes of k, their steps, and what their products start with; largest score and sum of weights of
  // rows of q, where the first becomes the limit.
  struct OfHead {
    const int32_t *code, *start;
    const float* step;
    float *top, *sum;
    float factor;
  };
  struct OfThread {
    int32_t q[kWords * kGroup];
    float q_step[kGroup], limit[kGroup];
    const int32_t* code[C::kKeyBlock + kRepeated];
    int32_t start[C::kKeyBlock + kRepeated];
    float step[C::kKeyBlock + kRepeated];
    float full[kMostKeys * kGroup];
    int32_t chosen[C::kKeyBlock + kMostKeys];
    uint64_t bits[C::kKeyBlock + kMostKeys];
    const Value<C>* v_row[C::kKeyBlock];
    const Element* k;
    int64_t k_row;
    bool row_bias, changes;  // whether the block's scores are changed, by masks or else
  };

  // What lies in the workspace, in this order: see PredictedKernel.launch.
  struct Shared {
    float *factor, *top, *sum, *step;
    int32_t *start, *code;

    explicit Shared(const FuserArgs* args) {
      const auto& e = extents(args);
      const int64_t rows = e.batch * e.heads * e.q_len, keys = e.batch * e.key_heads * e.kv_len;
      factor = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + e.workspace);
      top = factor + 16, sum = top + rows, step = sum + rows;
      start = reinterpret_cast<int32_t*>(step + keys), code = start + keys;
    }
  };

  static const typename C::Extents& extents(const FuserArgs* args) {
    return *static_cast<const typename C::Extents*>(args->extents);
  }

  // A row in fp32 with zeros up to whole vectors.
  struct alignas(64) Row {
    static constexpr int64_t kPadded = (D + L - 1) / L * L;
    float x[kPadded];

    explicit Row(const Element* row) {
      for (int64_t d = 0; d < D; ++d) x[d] = to_float(row[d]);
      for (int64_t d = D; d < kPadded; ++d) x[d] = 0.0f;
    }

    // What the elements are divided by before they meet thresholds, NaN where they predict nothing, 0 for zeros.
    float size() const {
      vf top = {}, poison = {};
      for (int64_t d = 0; d < kPadded; d += L) {
        const vf part = load(x + d);
        top = max_fast(abs(part), top);
        poison += part * 0.0f;
      }
      if (reduce_add(poison) != 0.0f) return __builtin_nanf("");
      const float largest = reduce_max(top);
      if (largest < kSmallest) return 0.0f;
      if constexpr (C::kPerRow) return largest;
      if constexpr (!C::kNormalize) return 1.0f;
      double squares = 0.0;
      for (int64_t d = 0; d < D; ++d) squares += double(x[d]) * double(x[d]);
      const float length = float(std::sqrt(squares));
      return length < kInf ? length : __builtin_nanf("");
    }
  };

  // Codes of a row plus `offset`, and its step.
  static float quantize(const Element* given, float factor, int32_t offset, int32_t* to) {
    typedef int8_t Bytes __attribute__((vector_size(L)));
    alignas(64) int8_t code[Row::kPadded < 4 * kWords ? 4 * kWords : Row::kPadded];
    const Row row(given);
    const float size = row.size();
    const bool sound = size > 0.0f;
    for (int64_t d = 0; d < Row::kPadded; d += L) {
      const vf exact = load(row.x + d) / (sound ? size : 1.0f) * factor;
      const vf whole = max_fast(set1(float(-kLargest)), min_fast(set1(float(kLargest)), round_even(exact)));
      const vi codes = (sound ? __builtin_convertvector(whole, vi) : vi{}) + offset;
      const Bytes bytes = __builtin_convertvector(codes, Bytes);
      std::memcpy(code + d, &bytes, L);
    }
    std::memcpy(to, code, 4 * kWords);
    return sound ? size / factor : size;
  }

  // The largest element of all rows of a tensor, each divided by its size.
  template <class Strides>
  static float largest(const void* tensor, const Strides& s, int64_t batch, int64_t heads, int64_t rows, int threads) {
    float top = 0.0f;
#pragma omp parallel for num_threads(threads) reduction(max : top)
    for (int64_t i = 0; i < batch * heads * rows; ++i) {
      const Element* head = static_cast<const Element*>(tensor) + i / rows / heads * s.batch + i / rows % heads * s.head;
      const Row row(head + i % rows * s.row);
      const float size = row.size();
      vf own = {};
      for (int64_t d = 0; size > 0.0f && d < Row::kPadded; d += L) own = max_fast(abs(load(row.x + d) / size), own);
      const float largest = reduce_max(own);
      top = largest > top ? largest : top;
    }
    return top < kSmallest ? 1.0f : top;
  }

  static void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = extents(args);
    const Shared all(args);
    const int64_t at = (index / e.heads * e.key_heads + index % e.heads / (e.heads / e.key_heads)) * e.kv_len;
    t.scores = {all.code + at * kWords,       all.start + at,           all.step + at,
                all.top + index * e.q_len,    all.sum + index * e.q_len, all.factor[0]};
  }

  static void survey(const FuserArgs* args, const Plan& plan) {
    const auto& e = extents(args);
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
#pragma omp parallel for num_threads(args->threads)
    for (int64_t i = 0; i < keys; ++i) {
      const Element* row = static_cast<const Element*>(args->tensors[1]) + i / e.kv_len / e.key_heads * e.k.batch +
                           i / e.kv_len % e.key_heads * e.k.head + i % e.kv_len * e.k.row;
      all.step[i] = quantize(row, k_factor, 0, all.code + i * kWords);
      const auto* const code = reinterpret_cast<const int8_t*>(all.code + i * kWords);
      int32_t sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += code[d];
      all.start[i] = -Codes::kOffset * sum;
    }
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
    Block<C> block{t, g, w, true};
    while (block.fill()) {
      keys(t, w, block.n);
      by_tiles(block.range, [&](auto size, int64_t v) {
        predict<size()>(w, block.n, v);
        if constexpr (C::kSums)
          softmax<size(), false, false>(w, block.n, v, w.scores.changes, block.row_mask);
        else
          tops<size()>(w, block.n, v);
      });
    }
    for (int64_t r = 0; r < g.count; ++r) t.scores.top[g.row[r]] = w.top[r], t.scores.sum[g.row[r]] = w.sum[r];
  }

  template <int RV>
  static void tops(Scratch<C>& w, int64_t n, int64_t v0) {
    for (int64_t v = v0; v < v0 + RV; ++v) {
      vf top = load(w.top + v * L);
      if (w.scores.changes)
        for (int64_t j = 0; j < n; ++j)
          top = max_fast(Base::change(w, load(w.s + j * w.pitch + v * L), j, v, w.scores.row_bias), top);
      else
        top = load(w.peak + v * L);
      store(w.top + v * L, top);
    }
  }

  // Turns what is known of all rows into their limits.
  static void limits(const FuserArgs* args) {
    const auto& e = extents(args);
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
      for (int64_t i = 0; i < rows; ++i) {
        float limit;
        if constexpr (C::kBefore)
          limit = number * (C::kOverRows ? peak : top[i]);
        else if constexpr (!C::kSums)
          limit = top[i] + number;
        else
          limit = top[i] + std::log(sum[i]) + number + (C::kOverRows ? peak : 0.0f);
        if (!(top[i] > limit)) {
          if constexpr (C::kBestOfEmpty) limit = top[i] == 0.0f ? -kSmallest : std::nextafter(top[i], -kInf);
          if constexpr (C::kAllOfEmpty) limit = -kInf;
        }
        top[i] = limit;
      }
    }
  }

  FUSER_INLINE void own_queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    w.scores.k = t.k, w.scores.k_row = t.k_row, w.scores.row_bias = C::kMask && t.mask_row != 0;
    for (int64_t r = 0; r < w.pitch; ++r) {
      int32_t code[kWords];
      const int64_t row = g.row[r < g.count ? r : g.count - 1];
      w.scores.q_step[r] = quantize(t.q + row * t.q_row, t.scores.factor, Codes::kOffset, code) * t.scale;
      w.scores.limit[r] = t.scores.top[row];
      for (int64_t i = 0; i < kWords; ++i) w.scores.q[i * w.pitch + r] = code[i];
    }
  }

  FUSER_INLINE void queries(const Head<C>& t, const Group& g, Scratch<C>& w) {
    Base::queries(t, g, w);
    own_queries(t, g, w);
  }

  FUSER_INLINE void keys(const Head<C>& t, Scratch<C>& w, int64_t n) {
    uint64_t lanes = ~0ull;
    for (int64_t j = 0; j < n; ++j) lanes &= w.lanes[j];
    w.scores.changes = Base::kChanges || lanes != ~0ull;
    // Tiles read rows of keys beyond n as well.
    for (int64_t j = 0; j < n + kMostKeys; ++j) {
      const int64_t key = w.key[j < n ? j : n - 1];
      w.scores.code[j] = t.scores.code + key * kWords;
      w.scores.start[j] = t.scores.start[key], w.scores.step[j] = t.scores.step[key];
    }
  }

  template <int RV>
  static __attribute__((noinline)) void predict(Scratch<C>& w, int64_t n, int64_t v) {
    // Unless one instruction multiplies and adds, products need registers of their own.
    constexpr int64_t most = Codes::kFused ? kAccumulators : kAccumulators * 2 / 3;
    constexpr int64_t RK = most / RV < kMostKeys ? most / RV : kMostKeys;
    const OfThread& own = w.scores;
    vf top[RV];
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) top[i] = load(w.top + (v + i) * L);
    for (int64_t j = 0; j < n; j += RK)
      predicted_tile<C::kBits, kWords, RV, RK>(own.q + v * L, own.q_step + v * L, own.code + j, own.step + j,
                                               own.start + j, w.pitch, w.s + j * w.pitch + v * L, top);
#pragma GCC unroll 8
    for (int i = 0; i < RV; ++i) store(w.peak + (v + i) * L, top[i]);
  }

  FUSER_INLINE auto value_rows(const Scratch<C>& w) { return C::kPrune ? w.scores.v_row : w.v_row; }

  template <int RV, bool kExact>
  static __attribute__((noinline)) int64_t score(Scratch<C>& w, int64_t n, int64_t v0) {
    predict<RV>(w, n, v0);
    for (int64_t v = v0; v < v0 + RV; ++v) {
      const int64_t chosen = w.scores.changes ? choose<true>(w, n, v) : choose<false>(w, n, v);
      if (chosen != 0) refine(w, chosen, v);
      if constexpr (C::kPrune) {
        prune(w, n, chosen, v);
      } else if (chosen != 0) {
        vf top = load(w.top + v * L);
        for (int64_t j = 0; j < n; ++j) top = max_fast(load(w.s + j * w.pitch + v * L), top);
        store(w.peak + v * L, top);
      }
    }
    if constexpr (C::kPrune) return kExact ? n : keep<RV>(w, n, v0);
    return n;
  }

  // Lists the keys of which some score in vector v is to be computed in full. Returns how many.
  template <bool kChanged>
  FUSER_INLINE int64_t choose(Scratch<C>& w, int64_t n, int64_t v) {
    OfThread& own = w.scores;
    const vf limit = load(own.limit + v * L);
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      const vf s = load(w.s + j * w.pitch + v * L), x = kChanged ? Base::change(w, s, j, v, own.row_bias) : s;
      // Scores that are NaN are chosen, those that are -inf may not be seen.
      vi chosen = ~(C::kInverse ? (vi)(x > limit) : (vi)(x <= limit));
      if constexpr (kChanged) chosen &= ~(vi)(x == set1(-kInf));
      const uint64_t bits = to_bits(chosen);
      own.chosen[count] = int32_t(j), own.bits[count] = bits;
      count += bits != 0;
    }
    return count;
  }

  // Leaves out what was not chosen of the scores in vector v, and changes the others.
  FUSER_INLINE void prune(Scratch<C>& w, int64_t n, int64_t count, int64_t v) {
    const OfThread& own = w.scores;
    const vf lowest = set1(-kInf);
    vf top = load(w.top + v * L);
    int64_t i = 0;
    for (int64_t j = 0; j < n; ++j) {
      float* const s = w.s + j * w.pitch + v * L;
      vf x = lowest;
      if (i < count && own.chosen[i] == j) {
        x = own.changes ? Base::change(w, load(s), j, v, own.row_bias) : load(s);
        x = select_bits(own.bits[i++], x, lowest);
        top = max_fast(x, top);
      }
      store(s, x);
    }
    store(w.peak + v * L, top);
  }

  // Brings together the scores in RV vectors of keys that some row needs, and their values. Returns how many.
  template <int RV>
  FUSER_INLINE int64_t keep(Scratch<C>& w, int64_t n, int64_t v) {
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
      vi out = (vi)(load(w.s + j * w.pitch + v * L) == set1(-kInf));
      for (int i = 0; i < RV; ++i) {
        const vf x = load(w.s + j * w.pitch + (v + i) * L);
        out &= (vi)(x == set1(-kInf));
        store(w.s + kept * w.pitch + (v + i) * L, x);
      }
      w.scores.v_row[kept] = w.v_row[j];
      kept += any(~out);
    }
    return kept;
  }

  // Computes what was chosen.
  FUSER_INLINE void refine(Scratch<C>& w, int64_t count, int64_t v) {
    OfThread& own = w.scores;
    for (int64_t i = 0; i < count; i += kMostKeys) {
      const Word<C>* row[kMostKeys];
      for (int64_t c = 0; c < kMostKeys; ++c) {
        const int64_t j = own.chosen[i + c < count ? i + c : count - 1];
        row[c] = row_as(own.k + w.key[j] * own.k_row, w.k + (kCopyKeys<C> ? c * Base::kWords : 0), D);
      }
      vf unused = set1(-kInf);
      scores_tile<C, 1, kMostKeys>(w.q + v * L, row, w.scale, w.pitch, own.full, &unused);
      for (int64_t c = 0; c < kMostKeys && i + c < count; ++c) {
        float* const s = w.s + own.chosen[i + c] * w.pitch + v * L;
        store(s, select_bits(own.bits[i + c], load(own.full + c * w.pitch), load(s)));
      }
    }
  }
};

}  // namespace attention
