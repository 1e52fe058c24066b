// What policies with codes of 8 bits share: those of rows of q and k, and values as bytes, where one instruction multiplies
// those.
//
// A row of q or k has a step, an element of values one for all keys. Weights are relative to the largest in their row and
// block of keys, so that what lies far below the row's largest keeps its digits, and dithered; sums are those of rounded
// weights. Keys or values that are not finite take their head to an exact run.
//
// The extents have `workspace`, the bytes before what lies here.
#pragma once
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
    const float* value_step;
    int32_t state;
  };
  struct OfThread {
    BlockCodes<C> codes;
    float fault[kGroup], block[kGroup], factor[kGroup];
    const int32_t* quad[kQuads];
    int32_t made[kByteValues ? kQuads * kQuadRow : 1];
  };

  // What lies in the workspace, in this order, of every head of keys: see byte_words in kernels/attention_int8.py.
  struct Shared {
    int64_t keys, heads;
    float *value_step, *step;
    int32_t *state, *start, *code, *quad;  // state: 1 if some value is not finite, 2 if some key is not
    void* end;

    explicit Shared(const FuserArgs* args) {
      const auto& e = extents<C>(args);
      heads = e.batch * e.key_heads, keys = heads * e.kv_len;
      value_step = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + e.workspace);
      step = value_step + heads * DV;
      state = reinterpret_cast<int32_t*>(step + keys), start = state + heads;
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
    to.quad = all.quad + head * quads * DV, to.value_step = all.value_step + head * DV, to.state = all.state[head];
  }

  // Asks for row `ahead` of rows of N elements, which may lie on pages of their own.
  template <int64_t N>
  FUSER_INLINE void announce(const Element* ahead) {
    for (int64_t byte = 0; byte < N * int64_t(sizeof(Element)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
  }
  static constexpr int64_t kRowsAhead = 16;

  // The steps of a head's values, and whether all are finite.
  static void measure_values(const FuserArgs* args, const Shared& all, int64_t head) {
    const auto& e = extents<C>(args);
    vi size[kQuadRow / L] = {};
    const Element* v = row_of<C>(args, 2, e.v, head, 0);
    for (int64_t i = 0; i < e.kv_len; ++i, v += e.v.row) {
      announce<DV>(v + kRowsAhead * e.v.row);
#pragma GCC unroll 16
      for (int64_t d = 0; d < kQuadRow; d += L) size[d / L] = larger(size[d / L], (vi)abs(part_of<DV>(v, d)));
    }
    vi poison = {};
    for (int64_t d = 0; d < DV; d += L) {
      const vf largest = (vf)size[d / L];
      poison |= ~(vi)(largest < kInf);
      const vf step = select((vi)(largest < kSmallest), vf{}, largest * (1.0f / 127.0f));
      store_n(all.value_step + head * DV + d, step, DV - d < L ? DV - d : L);
    }
    all.state[head] = any(poison);
  }

  // The codes of a head's keys, less their mean if they are centred, and its values, four keys at a time. Rows of k go to
  // each(row, number), too.
  template <bool kCentred, class Each>
  static void code_rows(const FuserArgs* args, const Shared& all, int64_t head, int64_t first, int64_t last,
                        const float* mean, std::bool_constant<kCentred> centred, const Each& each) {
    const auto& e = extents<C>(args);
    const Element *k = row_of<C>(args, 1, e.k, head, first), *v = row_of<C>(args, 2, e.v, head, first);
    int64_t at = head * e.kv_len + first;
    bool finite = true;
    vf factor[kQuadRow / L];
    for (int64_t d = 0; kByteValues && d < DV; d += L) {
      const vf step = part_of<DV>(all.value_step + head * DV, d);
      factor[d / L] = select((vi)(step == vf{}), vf{}, 1.0f / step);
    }
    int32_t* quad = all.quad + (head * ((e.kv_len + 3) / 4) + first / 4) * DV;
    for (int64_t next = first; next < last; next += 4, quad += DV) {
      const int64_t size = last - next < 4 ? last - next : 4;
      for (int64_t i = 0; i < size; ++i, k += e.k.row, ++at) {
        announce<D>(k + kRowsAhead * e.k.row);
        const CodeRow<C> row(k, mean, centred);
        all.start[at] = -Codes::kOffset * row.quantize(kLargest, 0, all.code + at * kWords, all.step + at);
        finite &= row.largest < kInf;
        each(row, at);
      }
      if constexpr (kByteValues) {
        for (int64_t i = 0; i < size; ++i) announce<DV>(v + (kRowsAhead + i) * e.v.row);
#pragma GCC unroll 16
        for (int64_t d = 0; d < DV; d += L) {
          vu word = {};
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i)
            if (i < size) word |= ((vu)to_int(part_of<DV>(v + i * e.v.row, d) * factor[d / L]) & 255u) << uint32_t(8 * i);
          store_n(reinterpret_cast<float*>(quad + d), (vf)word, DV - d < L ? DV - d : L);
        }
        v += 4 * e.v.row;
      }
    }
    if (!finite) __atomic_fetch_or(all.state + head, 2, __ATOMIC_RELAXED);
  }

  // Codes of all rows of k, less their head's `mean` (heads, D) if they are centred, and of all values. A head is
  // prepared first, and is coded while it is in a cache, unless there are threads to share it.
  template <bool kCentred, class Prepare, class Each>
  static void survey_rows(const FuserArgs* args, const float* means, std::bool_constant<kCentred> centred,
                          const Prepare& prepare, const Each& each) {
    const auto& e = extents<C>(args);
    const Shared all(args);
    const int64_t part = 256, parts = (e.kv_len + part - 1) / part;
    const bool whole = all.heads >= args->threads;
    const auto mean = [&](int64_t head) { return kCentred ? means + head * D : nullptr; };
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

  static __attribute__((noinline)) void value_keys(const Head<C>& t, Scratch<C>& w, int64_t n, bool exact) {
    if (!kByteValues || exact) return Base::value_keys(t, w, n, exact);
    OfThread& own = w.scores;
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
  // 255, relative to the largest of their row in this block, the bytes of four keys to a word.
  template <int RV>
  static __attribute__((noinline)) void weigh_bytes(Scratch<C>& w, int64_t n, int64_t v0, bool changes, bool row_bias) {
    OfThread& own = w.scores;
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
          const vf x = Base::change(w, load(s + j * pitch + v * L), j, v0 + v, row_bias);
          store(s + j * pitch + v * L, x);
          top[v] = max_fast(x, top[v]);
        }
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) store(own.block + (v0 + v) * L, top[v]);
    }
    vf shift[RV];
    vi sum[RV] = {};
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      // A row that sees no key of the block must not subtract -inf from -inf.
      const vf block = load(own.block + (v0 + v) * L);
      shift[v] = select((vi)(block == lowest), vf{}, block);
    }
    // The low bits of a number this large are its integer part, nearest to even; what else there is comes off at the end.
    constexpr float kWhole = 12582912.0f;
    constexpr uint32_t kBits = 0x4b400000u;
    // Four thresholds in turn, so that of many small weights some become one, rather than all none.
    constexpr float kDither[4] = {-0.375f, 0.125f, 0.375f, -0.125f};
    const auto weigh = [&](int64_t j, int v, int i) __attribute__((always_inline)) {
      return (vu)(Base::weight(load(s + j * pitch + v * L), shift[v]) * 255.0f + kDither[i] + kWhole);
    };
    auto* to = reinterpret_cast<int32_t*>(s);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, to += pitch)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        const vu word = weigh(j, v, 0) + (weigh(j + 1, v, 1) << 8) + (weigh(j + 2, v, 2) << 16) + (weigh(j + 3, v, 3) << 24) -
                        kBits * 0x01010101u;
        store(to + v * L, (vi)word);
        sum[v] = Codes::add(sum[v], (vi)word, set1(int32_t(0x01010101)));
      }
    if (j < n)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        vu word = {};
        for (int64_t i = j; i < n; ++i) word += (weigh(i, v, i - j) - kBits) << uint32_t(8 * (i - j));
        store(to + v * L, (vi)word);
        sum[v] = Codes::add(sum[v], (vi)word, set1(int32_t(0x01010101)));
      }
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      const int64_t at = (v0 + v) * L;
      const vf old = load(w.top + at), top = max_fast(load(own.block + at), old);
      const vf base = select((vi)(top == lowest), vf{}, top);
      const vf decay = Base::weight(old, base), factor = Base::weight(load(own.block + at), base) * (1.0f / 255.0f);
      store(w.top + at, top), store(w.decay + at, decay), store(own.factor + at, factor);
      store(w.sum + at, load(w.sum + at) * decay + to_float(sum[v]) * factor + load(own.fault + at));
    }
  }

  // Adds the products of n keys' weights and values to the results w.o, as values.h says.
  template <int RV>
  static __attribute__((noinline)) void byte_values(const Head<C>& t, Scratch<C>& w, int64_t n, int64_t v, bool first) {
    constexpr int RD = kAccumulators / RV;
    for (int64_t d = 0; d + RD <= DV; d += RD) {
      w.ahead.announce();
      bytes_tile<RV, RD>(t, w, (n + 3) / 4, v, d, first);
    }
    if constexpr (DV % RD != 0) bytes_tile<RV, DV % RD>(t, w, (n + 3) / 4, v, DV - DV % RD, first);
  }

  template <int RV, int RD>
  FUSER_INLINE void bytes_tile(const Head<C>& t, Scratch<C>& w, int64_t quads, int64_t v0, int64_t d, bool first) {
    const int32_t* p = reinterpret_cast<const int32_t*>(w.s + v0 * L);
    vi acc[RD][RV] = {};
    for (int64_t j = 0; j < quads; ++j, p += w.pitch) {
      const int32_t* const value = w.scores.quad[j] + d;
      vi x[RV];
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) x[v] = load(p + v * L);
#pragma GCC unroll 24
      for (int i = 0; i < RD; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < RV; ++v) acc[i][v] = Codes::add(acc[i][v], x[v], set1(value[i]));
    }
    float* o = w.o + d * w.pitch + v0 * L;
#pragma GCC unroll 24
    for (int i = 0; i < RD; ++i, o += w.pitch)
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) {
        const vf sum = to_float(acc[i][v]) * (load(w.scores.factor + (v0 + v) * L) * t.scores.value_step[d + i]);
        store(o + v * L, first ? sum : load(o + v * L) * load(w.decay + (v0 + v) * L) + sum);
      }
  }
};

}  // namespace attention
