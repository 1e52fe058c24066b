// Products of rows of small whole numbers, four of them in each 32-bit lane: bytes of `a` times those of `b`, summed.
//
// CodeProducts<Bits> is for numbers from -L to L, L = 2^(Bits - 1) - 1. Bytes of a hold them plus kOffset, those of b as
// they are. No sum of up to 64 steps, that is of 256 numbers, overflows or saturates:
//   VNNI     64 * 4 * 255 * 127 < 2^31
//   AVX2, AVX-512 up to 4 bits    a pair is at most 2 * 15 * 7, so 64 of them stay below 2^15
//   otherwise 16-bit or 32-bit products in 32-bit sums
#pragma once
#include <cstring>

#include "abi.h"
#include "attention/scores.h"
#include "attention/scratch.h"

namespace attention {

constexpr float kSmallest = 0x1p-100f;  // what is below it is zero
constexpr float kTooLarge = 0x1p50f;    // what is not has no codes, so that no product of steps overflows

#if defined(FUSER_DOT_BYTES)  // a test's
#elif defined(__AVX512VNNI__) && FUSER_VECTOR_BYTES == 64
#define FUSER_DOT_BYTES(sum, a, b) (vi) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#elif defined(__AVXVNNI__) && FUSER_VECTOR_BYTES == 32
#define FUSER_DOT_BYTES(sum, a, b) (vi) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(a), (__m256i)(b))
#endif
#if defined(__AVX512BW__) && FUSER_VECTOR_BYTES == 64
#define FUSER_X86(name, ...) (vi) _mm512_##name(__VA_ARGS__)
#define FUSER_X86_VECTOR __m512i
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
#define FUSER_X86(name, ...) (vi) _mm256_##name(__VA_ARGS__)
#define FUSER_X86_VECTOR __m256i
#endif

#if defined(FUSER_DOT_BYTES)
template <int Bits>
struct CodeProducts {
  static constexpr int32_t kOffset = 1 << (Bits - 1);
  static constexpr bool kFused = true;
  FUSER_INLINE vi add(vi sum, vi a, vi b) { return FUSER_DOT_BYTES(sum, a, b); }
  FUSER_INLINE vi total(vi sum) { return sum; }
};
#elif defined(FUSER_X86)
template <int Bits, bool kNarrow = (Bits <= 4)>
struct CodeProducts {
  using X = FUSER_X86_VECTOR;
  static constexpr int32_t kOffset = 1 << (Bits - 1);
  static constexpr bool kFused = false;
  FUSER_INLINE vi add(vi sum, vi a, vi b) { return FUSER_X86(add_epi16, (X)sum, (X)FUSER_X86(maddubs_epi16, (X)a, (X)b)); }
  FUSER_INLINE vi total(vi sum) { return FUSER_X86(madd_epi16, (X)sum, (X)set1(int32_t(0x00010001))); }
};
// Even and odd bytes as 16-bit numbers.
template <int Bits>
struct CodeProducts<Bits, false> {
  using X = FUSER_X86_VECTOR;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kFused = false;
  FUSER_INLINE vi even(vi x) { return FUSER_X86(srai_epi16, (X)FUSER_X86(slli_epi16, (X)x, 8), 8); }
  FUSER_INLINE vi odd(vi x) { return FUSER_X86(srai_epi16, (X)x, 8); }
  FUSER_INLINE vi add(vi sum, vi a, vi b) {
    return sum + FUSER_X86(madd_epi16, (X)even(a), (X)even(b)) + FUSER_X86(madd_epi16, (X)odd(a), (X)odd(b));
  }
  FUSER_INLINE vi total(vi sum) { return sum; }
};
#else
template <int Bits>
struct CodeProducts {
  static constexpr int32_t kOffset = 0;
  static constexpr bool kFused = false;
  FUSER_INLINE vi add(vi sum, vi a, vi b) {
#pragma GCC unroll 4
    for (int i = 0; i < 32; i += 8) sum += ((vi)((vu)a << i) >> 24) * ((vi)((vu)b << i) >> 24);
    return sum;
  }
  FUSER_INLINE vi total(vi sum) { return sum; }
};
#endif

// Words of four codes in a row.
template <class C>
constexpr int64_t kCodeWords = (C::kHeadDim + 3) / 4;

template <class C>
const typename C::Extents& extents(const FuserArgs* args) {
  return *static_cast<const typename C::Extents*>(args->extents);
}

// A row of k (tensor 1) or v (2), of head number `head` of all samples.
template <class C, class Strides>
const typename C::Element* row_of(const FuserArgs* args, int tensor, const Strides& s, int64_t head, int64_t row) {
  const int64_t heads = extents<C>(args).key_heads;
  return static_cast<const typename C::Element*>(args->tensors[tensor]) + head / heads * s.batch + head % heads * s.head +
         row * s.row;
}

// A vector of a row of N elements, zeros beyond them.
template <int64_t N, class T>
FUSER_INLINE vf part_of(const T* row, int64_t d) {
  if constexpr (N % L == 0) return load(row + d);
  return N - d < L ? load_n(row + d, N - d) : load(row + d);
}

// The largest of magnitudes, which are compared as integers, whose order is theirs, with infinity and NaN on top.
FUSER_INLINE float largest_of(vi magnitudes) {
  const int32_t bits = reduce_max(magnitudes);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

// A row of q or k, less `mean` if it is centred, with zeros up to whole vectors, and its largest magnitude, infinity where
// it is not finite or too large.
template <class C>
struct CodeRow {
  using Element = typename C::Element;
  static constexpr int64_t D = C::kHeadDim, kWords = kCodeWords<C>, kVectors = (D + L - 1) / L;
  vf x[kVectors];
  float largest;

  explicit CodeRow(const Element* row) : CodeRow(row, nullptr, std::false_type()) {}

  template <bool kCentred>
  CodeRow(const Element* row, const float* mean, std::bool_constant<kCentred>) {
    vi top = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVectors; ++i) {
      x[i] = part_of<D>(row, i * L);
      if constexpr (kCentred) x[i] -= part_of<D>(mean, i * L);
      top = larger(top, (vi)abs(x[i]));
    }
    largest = largest_of(top);
    if (!(largest < kTooLarge)) largest = kInf;
  }

  // The words of codes whole(x) plus `offset`. Returns the sum of codes.
  template <class Whole>
  int32_t write(int32_t offset, int32_t* to, const Whole& whole) const {
    typedef int8_t Bytes __attribute__((vector_size(L)));
    alignas(64) int8_t code[kVectors * L < 4 * kWords ? 4 * kWords : kVectors * L];
    vi total = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVectors; ++i) {
      const vi codes = whole(x[i]);
      const Bytes bytes = __builtin_convertvector(codes + offset, Bytes);
      std::memcpy(code + i * L, &bytes, L);
      total += codes;
    }
    std::memcpy(to, code, 4 * kWords);
    return reduce_add(total);
  }

  // Codes with `most` at the largest element: their sum, and the step, NaN where the row is not finite.
  int32_t quantize(float most, int32_t offset, int32_t* to, float* step) const {
    const bool used = largest >= kSmallest && largest < kInf;
    const float factor = used ? most / largest : 0.0f;
    *step = largest == kInf ? __builtin_nanf("") : used ? largest / most : 0.0f;
    return write(offset, to, [&](vf part) FUSER_LAMBDA { return used ? to_int(part * factor) : vi{}; });
  }
};

// Codes of the rows of one head of k, what their products start with, and their steps.
struct KeyCodes {
  const int32_t *code, *start;
  const float* step;
};

// Codes of a group's rows of q, as rows and then in lanes, their steps, and where those of a block of keys are.
template <class C>
struct BlockCodes {
  static constexpr int64_t kWords = kCodeWords<C>, kKeys = C::kKeyBlock + kRepeated;
  static_assert(kWords <= 64);
  int32_t q[kWords * kGroup], rows[kWords * kGroup];
  float q_step[kGroup], step[kKeys];
  const int32_t* code[kKeys];
  int32_t start[kKeys];

  int32_t* row(int64_t lane) { return rows + lane * kWords; }

  void to_lanes(int64_t pitch) {
    rows_to_lanes<int32_t>(q, pitch, kWords, 1.0f, [this](int64_t lane) { return row(lane); });
  }

  // Tiles read rows of keys beyond n as well.
  void find(const KeyCodes& all, const int32_t* keys, int64_t n) {
    for (int64_t j = 0; j < n + kMostKeys; ++j) {
      const int64_t key = keys[j < n ? j : n - 1];
      code[j] = all.code + key * kWords;
      start[j] = all.start[key], step[j] = all.step[key];
    }
  }
};

}  // namespace attention
