// What policies with codes of 8 bits share: those of rows of q and k, and values as bytes, where one instruction multiplies
// those.
//
// A row of q, k or v has a step of its own, so that no row depends on others. The steps of values are factors of weights,
// which become bytes relative to the largest in their row and block of keys, so that what lies far below the row's largest
// keeps its digits, and dithered. So scores have the logarithm of their value's step added, their maxima and sums are
// those of such scores, and each weight enters the row's sum without that step, and not rounded. Values that are not
// finite take their head to an exact run, as do rows of q and k that have no codes.
//
// The extents have `workspace`, the bytes before what lies here.
#pragma once
#include <algorithm>
#include <type_traits>

#include "abi.h"
#include "attention/codes.h"
#include "attention/scores.h"

namespace attention {

// With kBytes values are multiplied as bytes, if the CPU does so.
template <class C, bool kBytes>
struct Bytes : Products<C> {
  using Base = Products<C>;
  using Element = typename C::Element;
  using Codes = CodeProducts<8>;
  static constexpr float kLargest = 127.0f;
  static constexpr int64_t D = C::kHeadDim, DV = C::kValueDim, kWords = kCodeWords<C>;
  // Values of four keys, a byte each, to a word.
  static constexpr int64_t kQuadRow = (DV + L - 1) / L * L, kQuads = (C::kKeyBlock + 3) / 4;
  static constexpr bool kSurveys = true, kByteValues = kBytes && Codes::kFused;
  static constexpr bool kPairValues = !kByteValues && Base::kPairValues;

  struct OfHead {
    KeyCodes k;
    const int32_t* quad;
    const float *value_log, *value_inverse;
    int32_t state;
  };
  struct OfThread {
    BlockCodes<C> codes;
    float block[kGroup], factor[kGroup];
    // Of the keys of a block the logarithms of their values' steps, zeros in an exact run, and the inverses.
    float value_log[C::kKeyBlock + kRepeated], value_inverse[C::kKeyBlock];
    const int32_t* quad[kQuads];
    int32_t made[kByteValues ? kQuads * kQuadRow : 1];
  };

  // What lies in the workspace, in this order, of every head of keys: see byte_words in kernels/attention_int8.py.
  struct Shared {
    int64_t keys, heads;
    float *largest, *step, *value_log, *value_inverse;  // the largest magnitude of a head's values
    int32_t *state, *start, *code, *quad;  // state: 1 if some value is not finite, 2 if some key has no codes
    void* end;

    explicit Shared(const FuserArgs* args) {
      const auto& e = extents<C>(args);
      heads = e.batch * e.key_heads, keys = heads * e.kv_len;
      largest = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + e.workspace);
      step = largest + heads, value_log = step + keys, value_inverse = value_log + keys;
      state = reinterpret_cast<int32_t*>(value_inverse + keys), start = state + heads;
      code = start + keys, quad = code + keys * kWords;
      end = quad + heads * ((e.kv_len + 3) / 4) * DV;
    }
  };

  static void open(const FuserArgs* args, Head<C>& t, int64_t index) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const int64_t head = index / e.heads * e.key_heads + index % e.heads / (e.heads / e.key_heads);
    const int64_t at = head * e.kv_len, quads = (e.kv_len + 3) / 4;
    OfHead& to = t.scores;
    to.k = {all.code + at * kWords, all.start + at, all.step + at};
    to.quad = all.quad + head * quads * DV, to.value_log = all.value_log + at, to.value_inverse = all.value_inverse + at;
    to.state = all.state[head];
  }

  // Asks for row `ahead` of rows of N elements, which may lie on pages of their own.
  template <int64_t N>
  FUSER_INLINE void announce(const Element* ahead) {
    for (int64_t byte = 0; byte < N * int64_t(sizeof(Element)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
  }
  static constexpr int64_t kRowsAhead = 16;

  // The largest magnitude of a head's values, and whether all are finite.
  static void measure_values(const FuserArgs* args, const Shared& all, int64_t head) {
    const auto& e = extents<C>(args);
    vi top = {};
    const Element* v = row_of<C>(args, 2, e.v, head, 0);
    for (int64_t i = 0; i < e.kv_len; ++i, v += e.v.row) {
      announce<DV>(v + kRowsAhead * e.v.row);
#pragma GCC unroll 16
      for (int64_t d = 0; d < DV; d += L) top = larger(top, (vi)abs(part_of<DV>(v, d)));
    }
    all.largest[head] = largest_of(top);
    all.state[head] = !(all.largest[head] < kInf);
  }

  // Four rows of values, of which `size` are there, as bytes of words; their steps, no smaller than `least`.
  static void code_values(const Element* v, int64_t row, int64_t size, float least, float* steps, int32_t* quad) {
    vf factor[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      factor[i] = vf{};
      if (i >= size) continue;
      vi top = {};
#pragma GCC unroll 16
      for (int64_t d = 0; d < DV; d += L) top = larger(top, (vi)abs(part_of<DV>(v + i * row, d)));
      const float step = largest_of(top) / kLargest;
      steps[i] = step < least ? least : step;
      factor[i] = set1(1.0f / steps[i]);
    }
#pragma GCC unroll 16
    for (int64_t d = 0; d < DV; d += L) {
      vu word = {};
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i)
        if (i < size) word |= ((vu)to_int(part_of<DV>(v + i * row, d) * factor[i]) & 255u) << uint32_t(8 * i);
      store_n(reinterpret_cast<float*>(quad + d), (vf)word, DV - d < L ? DV - d : L);
    }
  }

  // What all keys of a head lose.
  struct OneMean {
    static constexpr bool kInOrder = false;  // whether they have to be asked for one behind the other, from 0
    const float* mean;
    const float* operator()(int64_t) const { return mean; }
  };

  // The codes of a head's keys, less what mean(key) says if they are centred, and its values, four keys at a time. Rows of
  // k go to each(row, number), too.
  template <class Mean, bool kCentred, class Each>
  static void code_rows(const FuserArgs* args, const Shared& all, int64_t head, int64_t first, int64_t last, Mean mean,
                        std::bool_constant<kCentred> centred, const Each& each) {
    const auto& e = extents<C>(args);
    const Element *k = row_of<C>(args, 1, e.k, head, first), *v = row_of<C>(args, 2, e.v, head, first);
    const int64_t begin = head * e.kv_len;
    // Logarithms of steps must not be so far apart that the weight of a value of zero gets lost.
    const float part = all.largest[head] * (0x1p-60f / kLargest), least = part > kSmallest ? part : kSmallest;
    bool sound = true;
    int32_t* quad = all.quad + (head * ((e.kv_len + 3) / 4) + first / 4) * DV;
    for (int64_t next = first; next < last; next += 4, quad += DV) {
      const int64_t size = last - next < 4 ? last - next : 4;
      for (int64_t at = begin + next; at < begin + next + size; ++at, k += e.k.row) {
        announce<D>(k + kRowsAhead * e.k.row);
        const CodeRow<C> row(k, mean(at - begin), centred);
        all.start[at] = -Codes::kOffset * row.quantize(kLargest, 0, all.code + at * kWords, all.step + at);
        sound &= row.largest < kInf;
        each(row, at);
      }
      if constexpr (kByteValues) {
        for (int64_t i = 0; i < size; ++i) announce<DV>(v + (kRowsAhead + i) * e.v.row);
        code_values(v, e.v.row, size, least, all.value_log + begin + next, quad);
        v += 4 * e.v.row;
      }
    }
    if (kByteValues)
      for (int64_t i = first; i < last; i += L) {
        const int64_t size = last - i < L ? last - i : L;
        float *const logs = all.value_log + begin + i, *const inverses = all.value_inverse + begin + i;
        const vf steps = size == L ? load(logs) : load_n(logs, size), inverse = 1.0f / steps;
        size == L ? store(logs, log(steps)) : store_n(logs, log(steps), size);
        size == L ? store(inverses, inverse) : store_n(inverses, inverse, size);
      }
    if (!sound) __atomic_fetch_or(all.state + head, 2, __ATOMIC_RELAXED);
  }

  // Codes of all rows of k, less the means that mean(head) says if they are centred, and of all values. A head is
  // prepared first, and is coded while it is in a cache, unless there are threads to share it.
  template <class Means, bool kCentred, class Prepare, class Each>
  static void survey_rows(const FuserArgs* args, const Means& mean, std::bool_constant<kCentred> centred,
                          const Prepare& prepare, const Each& each) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const int64_t part = 256, parts = (e.kv_len + part - 1) / part;
    const bool whole = decltype(mean(0))::kInOrder || all.heads >= args->threads;
#pragma omp parallel for num_threads(args->threads)
    for (int64_t head = 0; head < all.heads; ++head) {
      prepare(head);
      measure_values(args, all, head);
      if (whole) code_rows(args, all, head, 0, e.kv_len, mean(head), centred, each);
    }
    if (whole) return;
#pragma omp parallel for num_threads(args->threads)
    for (int64_t i = 0; i < all.heads * parts; ++i) {
      const int64_t first = i % parts * part, last = first + part < e.kv_len ? first + part : e.kv_len;
      code_rows(args, all, i / parts, first, last, mean(i / parts), centred, each);
    }
  }

  // Codes of a row of q in lane r, and its step times the scale.
  static void code_query(const CodeRow<C>& row, const Head<C>& t, Scratch<C>& w, int64_t r) {
    BlockCodes<C>& to = w.scores.codes;
    row.quantize(kLargest, Codes::kOffset, to.row(r), to.q_step + r);
    to.q_step[r] *= t.scale;
  }

  // Keys of a tile of products for RV vectors.
  template <int RV>
  static constexpr int64_t kTileKeys = []() constexpr {
    constexpr int64_t most = (Codes::kFused ? kAccumulators : kAccumulators * 2 / 3) / RV;
    return most < kMostKeys ? most : kMostKeys;
  }();

  // The scores x of a tile of keys from j0 and RV vectors from v0, by codes, go to put(j, v, x).
  template <int RV, class Put>
  FUSER_INLINE void code_scores(Scratch<C>& w, int64_t j0, int64_t v0, const Put& put) {
    const BlockCodes<C>& own = w.scores.codes;
    product_tile<kWords, RV, kTileKeys<RV>, vi>(
        own.q + v0 * L, own.code + j0, w.pitch,
        [](vi sum, vi a, int32_t b) FUSER_LAMBDA { return Codes::add(sum, a, set1(b)); },
        [&](int j, int v, vi sum) FUSER_LAMBDA {
          const vf steps = load(own.q_step + (v0 + v) * L) * own.step[j0 + j];
          put(j, v, to_float(Codes::total(sum) + own.start[j0 + j]) * steps);
        });
  }

  // Scores of n keys and RV vectors from v0, a tile of keys at a time: tile(j0, put) gives each score x to put(j, v, x).
  // Unless they are still to be changed, the logarithms of steps are added. The largest of the block are left for bytes,
  // and in w.peak with those of the blocks before it.
  template <int RV, class Tile>
  FUSER_INLINE void store_scores(Scratch<C>& w, int64_t n, int64_t v0, const Tile& tile) {
    const int64_t pitch = w.pitch;  // a copy, which what is stored cannot change
    vf top[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) top[v] = set1(-kInf);
    for (int64_t j0 = 0; j0 < n; j0 += kTileKeys<RV>) {
      w.ahead.announce();
      float* const s = w.s + j0 * pitch + v0 * L;
      tile(j0, [&](int j, int v, vf x) FUSER_LAMBDA {
        if constexpr (kByteValues && !Base::kChanges) x += w.scores.value_log[j0 + j];
        top[v] = max_fast(x, top[v]);
        store(s + j * pitch + v * L, x);
      });
    }
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      store(w.scores.block + (v0 + v) * L, top[v]);
      store(w.peak + (v0 + v) * L, max_fast(top[v], load(w.top + (v0 + v) * L)));
    }
  }

  static __attribute__((noinline)) void value_keys(const Head<C>& t, Scratch<C>& w, int64_t n, bool exact) {
    OfThread& own = w.scores;
    if (!kByteValues || exact) {
      std::fill(own.value_log, own.value_log + n + kMostKeys, 0.0f);
      return Base::value_keys(t, w, n, exact);
    }
    // Tiles read numbers of keys beyond n as well.
    for (int64_t j = 0; j < n + kMostKeys; ++j) own.value_log[j] = t.scores.value_log[w.key[j < n ? j : n - 1]];
    for (int64_t j = 0; j < n; ++j) own.value_inverse[j] = t.scores.value_inverse[w.key[j]];
    for (int64_t j = 0; j < n; j += 4) {
      const int32_t* const key = w.key + j;
      const int64_t size = n - j < 4 ? n - j : 4;
      bool whole = key[0] % 4 == 0;
      for (int64_t i = 1; i < size; ++i) whole &= key[i] == key[0] + i;
      if (whole) {
        own.quad[j / 4] = t.scores.quad + key[0] / 4 * DV;
        continue;
      }
      int32_t* const to = own.made + j / 4 * kQuadRow;
      for (int64_t d = 0; d < DV; d += L) {
        vu word = {};
        for (int64_t i = 0; i < size; ++i) {
          const vu four = (vu)part_of<DV>(reinterpret_cast<const float*>(t.scores.quad + key[i] / 4 * DV), d);
          word |= (four >> uint32_t(8 * (key[i] % 4)) & 255u) << uint32_t(8 * i);
        }
        store(to + d, (vi)word);
      }
      own.quad[j / 4] = to;
    }
  }

  // Changes the scores of n keys in RV vectors from v0, if they are to be changed, and turns them into weights from 0 to
  // 255, relative to the largest of their row in this block, the bytes of four keys to a word. Scores that only masks
  // change have the logarithms of steps already.
  template <int RV>
  static __attribute__((noinline)) void weigh_bytes(Scratch<C>& w, int64_t n, int64_t v0, bool changes, bool row_bias) {
    auto& own = w.scores;
    const int64_t pitch = w.pitch;
    const vf lowest = set1(-kInf);
    float* const s = w.s + v0 * L;
    if (changes) {
      vf top[RV];
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) top[v] = lowest;
      for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) {
          vf x = Base::change(w, load(s + j * pitch + v * L), j, v0 + v, row_bias);
          if constexpr (Base::kChanges) x += own.value_log[j];
          store(s + j * pitch + v * L, x);
          top[v] = max_fast(x, top[v]);
        }
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) store(own.block + (v0 + v) * L, top[v]);
    }
    vf shift[RV], sum[RV] = {};
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      // A row that sees no key of the block must not subtract -inf from -inf.
      const vf block = load(own.block + (v0 + v) * L);
      shift[v] = select((vi)(block == lowest), vf{}, block);
    }
    // Four thresholds in turn, so that of many small weights some become one, rather than all none.
    constexpr float kDither[4] = {-0.375f, 0.125f, 0.375f, -0.125f};
    const auto weigh = [&](int64_t j, int v, int i) __attribute__((always_inline)) {
      const vf weight = Base::weight(load(s + j * pitch + v * L), shift[v]);
      sum[v] += weight * own.value_inverse[j];
      return weight * 255.0f + kDither[i];
    };
    auto* to = reinterpret_cast<int32_t*>(s);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, to += pitch)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v)
        store(to + v * L, to_quads(weigh(j, v, 0), weigh(j + 1, v, 1), weigh(j + 2, v, 2), weigh(j + 3, v, 3)));
    for (int v = 0; v < RV && j < n; ++v) {
      vf rest[4] = {};
      for (int64_t i = j; i < n; ++i) rest[i - j] = weigh(i, v, i - j);
      store(to + v * L, to_quads(rest[0], rest[1], rest[2], rest[3]));
    }
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      const int64_t at = (v0 + v) * L;
      const vf old = load(w.top + at), top = max_fast(load(own.block + at), old);
      const vf base = select((vi)(top == lowest), vf{}, top);
      const vf decay = Base::weight(old, base), factor = Base::weight(load(own.block + at), base);
      store(w.top + at, top), store(w.decay + at, decay), store(own.factor + at, factor * (1.0f / 255.0f));
      store(w.sum + at, load(w.sum + at) * decay + sum[v] * factor);
    }
  }

  // Adds the products of n keys' weights and values to the results w.o, as values.h says.
  template <int RV>
  static __attribute__((noinline)) void byte_values(Scratch<C>& w, int64_t n, int64_t v, bool first) {
    constexpr int RD = kAccumulators / RV;
    for (int64_t d = 0; d + RD <= DV; d += RD) {
      w.ahead.announce();
      bytes_tile<RV, RD>(w, (n + 3) / 4, v, d, first);
    }
    if constexpr (DV % RD != 0) bytes_tile<RV, DV % RD>(w, (n + 3) / 4, v, DV - DV % RD, first);
  }

  template <int RV, int RD>
  FUSER_INLINE void bytes_tile(Scratch<C>& w, int64_t quads, int64_t v0, int64_t d, bool first) {
    const int64_t pitch = w.pitch;
    const int32_t* p = reinterpret_cast<const int32_t*>(w.s + v0 * L);
    vi acc[RD][RV] = {};
    for (int64_t j = 0; j < quads; ++j, p += pitch) {
      const int32_t* const value = w.scores.quad[j] + d;
      vi x[RV];
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) x[v] = load(p + v * L);
#pragma GCC unroll 24
      for (int i = 0; i < RD; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) acc[i][v] = Codes::add(acc[i][v], x[v], set1(value[i]));
    }
    float* o = w.o + d * pitch + v0 * L;
#pragma GCC unroll 24
    for (int i = 0; i < RD; ++i, o += pitch)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        const vf sum = to_float(acc[i][v]) * load(w.scores.factor + (v0 + v) * L);
        store(o + v * L, first ? sum : load(o + v * L) * load(w.decay + (v0 + v) * L) + sum);
      }
  }
};

}  // namespace attention
