// Vectors of FUSER_VECTOR_BYTES bytes by the same names on every instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FUSER_INLINE static inline __attribute__((always_inline))

namespace simd {

constexpr int64_t kLanes = FUSER_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(FUSER_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FUSER_VECTOR_BYTES)));
typedef float vfu __attribute__((vector_size(FUSER_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(FUSER_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(FUSER_VECTOR_BYTES / 2)));
typedef int16_t vs __attribute__((vector_size(FUSER_VECTOR_BYTES / 2)));
typedef uint32_t vu __attribute__((vector_size(FUSER_VECTOR_BYTES)));

struct bf16 {
  uint16_t bits;
};
struct bf16x2 {
  bf16 half[2];
};

FUSER_INLINE float to_float(float x) { return x; }
FUSER_INLINE float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FUSER_INLINE float to_float(uint8_t x) { return x; }
FUSER_INLINE void from_float(float* p, float x) { *p = x; }
FUSER_INLINE void from_float(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  // Round to nearest even; a NaN keeps its high bits and stays quiet.
  p->bits = uint16_t(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Subtracting zero is free of arithmetic; adding it is not, because -0 + 0 is +0.
FUSER_INLINE vf set1(float x) { return x - vf{}; }

FUSER_INLINE vi set1(int32_t x) { return vi{} + x; }
FUSER_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const viu*>(p); }
FUSER_INLINE void store(int32_t* p, vi v) { *reinterpret_cast<viu*>(p) = v; }
// Said by instructions: GCC takes such vectors apart, half by half.
FUSER_INLINE vi load(const int16_t* p) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vs v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vi);
#endif
}
FUSER_INLINE void store(int16_t* p, vi v) {
  const vs narrow = __builtin_convertvector(v, vs);
  std::memcpy(p, &narrow, sizeof(narrow));
}
// Integers from -128 to 127.
typedef int8_t vb __attribute__((vector_size(kLanes)));
FUSER_INLINE vb to_bytes(vf v) { return __builtin_convertvector(__builtin_convertvector(v, vi), vb); }
FUSER_INLINE void store(int8_t* p, vf v) {
  const vb bytes = to_bytes(v);
  std::memcpy(p, &bytes, sizeof(bytes));
}
FUSER_INLINE void store(int8_t* p, vf a, vf b) { store(p, a), store(p + kLanes, b); }
FUSER_INLINE void store_n(int8_t* p, vf v, int64_t n) {
  const vb bytes = to_bytes(v);
  std::memcpy(p, &bytes, n);
}
FUSER_INLINE vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
FUSER_INLINE void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }

FUSER_INLINE vi load(const bf16x2* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FUSER_INLINE void store(bf16x2* p, vi v) { std::memcpy(p, &v, sizeof(v)); }
FUSER_INLINE vi set1(bf16x2 x) {
  int32_t word;
  std::memcpy(&word, &x, sizeof(word));
  return set1(word);
}

FUSER_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
// The bits of the nearest bf16 number in the low half of every lane.
FUSER_INLINE vu bf16_bits(vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu nan = (u >> 16) | 0x40;
  const vi is_nan = (vi)(v != v);
  return (vu)((is_nan & (vi)nan) | (~is_nan & (vi)rounded));
}
FUSER_INLINE void store(float* p, vf a, vf b) { store(p, a), store(p + kLanes, b); }
FUSER_INLINE void store_bits(bf16* p, vf v) {
  const vh h = __builtin_convertvector(bf16_bits(v), vh);
  std::memcpy(p, &h, sizeof(h));
}
#if defined(__AVX512BF16__) && FUSER_VECTOR_BYTES == 64
// The instructions take subnormal numbers for zero.
FUSER_INLINE __mmask16 subnormal(vf v) { return _mm512_fpclass_ps_mask((__m512)v, 0x20); }
FUSER_INLINE void store(bf16* p, vf v) {
  if (__builtin_expect(subnormal(v) != 0, 0)) return store_bits(p, v);
  const __m256bh nearest = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &nearest, sizeof(nearest));
}
FUSER_INLINE void store(bf16* p, vf a, vf b) {
  if (__builtin_expect(!_kortestz_mask16_u8(subnormal(a), subnormal(b)), 0)) {
    store_bits(p, a), store_bits(p + kLanes, b);
    return;
  }
  const __m512bh nearest = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  std::memcpy(p, &nearest, sizeof(nearest));
}
#else
FUSER_INLINE void store(bf16* p, vf v) { store_bits(p, v); }
FUSER_INLINE void store(bf16* p, vf a, vf b) { store_bits(p, a), store_bits(p + kLanes, b); }
#endif
FUSER_INLINE vf to_bf16(vf v) { return (vf)(bf16_bits(v) << 16); }

#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
#define FUSER_VECTOR_REGISTER "+v"
#elif (defined(__AVX2__) && FUSER_VECTOR_BYTES == 32) || (defined(__SSE2__) && FUSER_VECTOR_BYTES == 16)
#define FUSER_VECTOR_REGISTER "+x"
#elif defined(__aarch64__) && FUSER_VECTOR_BYTES == 16
#define FUSER_VECTOR_REGISTER "+w"
#else
#define FUSER_VECTOR_REGISTER "+m"
#endif
// The product rounded to fp32: what adds it cannot become a fused multiply-add.
FUSER_INLINE vf mul_rounded(vf a, vf b) {
  vf product = a * b;
  asm("" : FUSER_VECTOR_REGISTER(product));
  return product;
}

// The first n (0 < n < kLanes) elements; the others read as zero and are not touched.
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
FUSER_INLINE vf load_n(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
FUSER_INLINE void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v); }
#else
FUSER_INLINE vf load_n(const float* p, int64_t n) {
  float t[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
FUSER_INLINE void store_n(float* p, vf v, int64_t n) {
  float t[kLanes];
  store(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
#endif
FUSER_INLINE vi load_n(const bf16x2* p, int64_t n) {
  bf16x2 t[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
FUSER_INLINE vi load_n(const int32_t* p, int64_t n) {
  int32_t t[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
FUSER_INLINE vf load_n(const bf16* p, int64_t n) {
  bf16 t[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
FUSER_INLINE void store_n(bf16* p, vf v, int64_t n) {
  bf16 t[kLanes];
  store(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}

// All ones in the first n lanes.
FUSER_INLINE vi first(int64_t n) {
  vi lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = int32_t(i);
  return (vi)(lane < int32_t(n));
}

FUSER_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FUSER_INLINE vf less(vf a, vf b) { return select((vi)(a < b), set1(1.0f), vf{}); }
FUSER_INLINE vf where(vf condition, vf a, vf b) { return select((vi)(condition != 0.0f), a, b); }

// Both keep a NaN of either operand, and of two zeros the first, as PyTorch's clamp does.
FUSER_INLINE vf maximum(vf a, vf b) { return select((vi)(a != a), a, select((vi)(a >= b), a, b)); }
FUSER_INLINE vf minimum(vf a, vf b) { return select((vi)(a != a), a, select((vi)(a <= b), a, b)); }
// One instruction on x86; the second operand wins when either is NaN.
// Said by instructions: GCC compares and masks instead where it sees what an operand is made of.
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
FUSER_INLINE vf max_fast(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FUSER_INLINE vf min_fast(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
FUSER_INLINE vf max_fast(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FUSER_INLINE vf min_fast(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FUSER_INLINE vf max_fast(vf a, vf b) { return select((vi)(a > b), a, b); }
FUSER_INLINE vf min_fast(vf a, vf b) { return select((vi)(a < b), a, b); }
#endif

#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
FUSER_INLINE float reduce_add(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#else
FUSER_INLINE float reduce_add(vf v) {
  float t[kLanes], s = 0;
  store(t, v);
  for (int64_t w = kLanes / 2; w > 0; w /= 2)
    for (int64_t i = 0; i < w; ++i) t[i] += t[i + w];
  s = t[0];
  return s;
}
#endif
FUSER_INLINE float reduce_max(vf v) {
  float t[kLanes];
  store(t, v);
  for (int64_t w = kLanes / 2; w > 0; w /= 2)
    for (int64_t i = 0; i < w; ++i) t[i] = t[i] != t[i] || t[i] > t[i + w] ? t[i] : t[i + w];
  return t[0];
}

FUSER_INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
FUSER_INLINE vf larger_bits(vf a, vf b) { return (vf)larger((vi)a, (vi)b); }
FUSER_INLINE int32_t reduce_max(vi v) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}
FUSER_INLINE float reduce_larger_bits(vf v) {
  const int32_t top = reduce_max((vi)v);
  float x;
  std::memcpy(&x, &top, 4);
  return x;
}
// Bits of magnitudes of bf16, whose order is theirs, two to a lane.
typedef int16_t halves __attribute__((vector_size(FUSER_VECTOR_BYTES)));
FUSER_INLINE halves larger(halves a, halves b) { return a > b ? a : b; }
FUSER_INLINE halves magnitudes(const bf16* p) {
  halves x;
  std::memcpy(&x, p, sizeof(x));
  return x & int16_t(0x7fff);
}
FUSER_INLINE int32_t reduce_add(vi v) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}
// Sums of integers wrap around, so that what is off by a constant can be put right afterwards.
FUSER_INLINE vi add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
FUSER_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
// Said by instructions: GCC takes such a vector apart, byte by byte.
FUSER_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return to_float((vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return to_float((vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t vb __attribute__((vector_size(kLanes)));
  vb v;
  std::memcpy(&v, p, sizeof(v));
  return to_float(__builtin_convertvector(v, vi));
#endif
}
FUSER_INLINE vf load(const uint8_t* p) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return to_float((vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return to_float((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  vb v;
  std::memcpy(&v, p, sizeof(v));
  return to_float(__builtin_convertvector(v, vi));
#endif
}
FUSER_INLINE vf load_n(const uint8_t* p, int64_t n) {
  uint8_t t[kLanes] = {};
  std::memcpy(t, p, n);
  return load(t);
}
// The nearest integers, halves to even.
FUSER_INLINE vi to_int(vf x) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  vi r;
  for (int64_t i = 0; i < kLanes; ++i) r[i] = x[i] != x[i] ? 0 : int32_t(std::nearbyint(x[i]));
  return r;
#endif
}

// The nearest integers to four numbers of every lane, from -0.5 to 255.5, as the bytes of a word; NaN is zero or 255.
FUSER_INLINE vi to_quads(vf a, vf b, vf c, vf d) {
#if defined(__AVX512BW__) && FUSER_VECTOR_BYTES == 64
  const __m512i words = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)to_int(a), (__m512i)to_int(b)),
                                            _mm512_packs_epi32((__m512i)to_int(c), (__m512i)to_int(d)));
  return (vi)_mm512_shuffle_epi8(words, _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  const __m256i words = _mm256_packus_epi16(_mm256_packs_epi32((__m256i)to_int(a), (__m256i)to_int(b)),
                                            _mm256_packs_epi32((__m256i)to_int(c), (__m256i)to_int(d)));
  const __m128i order = _mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  return (vi)_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
#else
  const auto byte = [](vf x) {
    const vi i = to_int(x);
    return (vu)(i < 0 ? vi{} : i > 255 ? set1(255) : i);
  };
  return (vi)(byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24);
#endif
}

// Four vectors of integers from 0 to 255 as bytes, one vector behind the other.
FUSER_INLINE void store_bytes(uint8_t* to, vi a, vi b, vi c, vi d) {
#if defined(__AVX512BW__) && FUSER_VECTOR_BYTES == 64
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b), _mm512_packs_epi32((__m512i)c, (__m512i)d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b), _mm256_packs_epi32((__m256i)c, (__m256i)d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
#else
  const vi parts[4] = {a, b, c, d};
  for (int64_t i = 0; i < 4 * kLanes; ++i) to[i] = uint8_t(parts[i / kLanes][i % kLanes]);
#endif
}

// Two int8 numbers for every lane, as int16.
FUSER_INLINE vi load_pairs(const int16_t* p) {
#if defined(__AVX512BW__) && FUSER_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  int8_t from[2 * kLanes];
  int16_t to[2 * kLanes];
  std::memcpy(from, p, sizeof(from));
  for (int64_t i = 0; i < 2 * kLanes; ++i) to[i] = from[i];
  vi v;
  std::memcpy(&v, to, sizeof(v));
  return v;
#endif
}
// sum + the scalar product of the two int16 numbers in every lane of a and b, whose magnitudes are those of int8.
FUSER_INLINE vi dot_pairs(vi sum, vi a, vi b) {
#if defined(__AVX512BW__) && FUSER_VECTOR_BYTES == 64
  // Said in place: GCC gives sums of the inner loop a second register each, and then stores them.
  const vi products = (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
  asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
  return sum;
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  const vi products = (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  return sum;
#else
  int16_t x[2 * kLanes], y[2 * kLanes];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(y, &b, sizeof(y));
  for (int64_t i = 0; i < kLanes; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
#endif
}
// sum + the scalar product of the four uint8 numbers in every lane of a and the four int8 numbers in that of b.
FUSER_INLINE vi dot_quads(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__) && FUSER_VECTOR_BYTES == 64
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // as in dot_pairs
  return sum;
#elif defined(__AVXVNNI__) && FUSER_VECTOR_BYTES == 32
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  uint8_t x[4 * kLanes];
  int8_t y[4 * kLanes];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(y, &b, sizeof(y));
  vi products = {};
  for (int64_t i = 0; i < 4 * kLanes; ++i) products[i / 4] += int32_t(x[i]) * y[i];
  return add(sum, products);
#endif
}

// Pairs of bf16 numbers in 32-bit lanes, the first in the low half: `dot` is sum + the scalar products of those of a and
// b, and bf16_pairs brings together the nearest ones of `first` and `second`.
#if defined(__AVX512BF16__) && FUSER_VECTOR_BYTES == 64
constexpr bool kDotsBf16 = true;
FUSER_INLINE vf dot(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
FUSER_INLINE vi bf16_pairs(vf first, vf second) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  vu from;
  for (int i = 0; i < kLanes; ++i) from[i] = (16 + i) << 16 | i;
  return (vi)_mm512_permutexvar_epi16((__m512i)from, halves);
}
#else
#if defined(FUSER_DOTS_BF16)  // a test's
constexpr bool kDotsBf16 = true;
#else
constexpr bool kDotsBf16 = false;
#endif
FUSER_INLINE vf dot(vf sum, vi a, vi b) {
  sum += (vf)(a & int32_t(0xffff0000)) * (vf)(b & int32_t(0xffff0000));
  return sum + (vf)((vu)a << 16) * (vf)((vu)b << 16);
}
FUSER_INLINE vi bf16_pairs(vf first, vf second) { return (vi)(bf16_bits(first) | bf16_bits(second) << 16); }
#endif

FUSER_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
FUSER_INLINE vf neg(vf x) { return -x; }
FUSER_INLINE vf copysign(vf magnitude, vf sign) {
  return (vf)(((vi)magnitude & 0x7fffffff) | ((vi)sign & int32_t(0x80000000)));
}

#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
FUSER_INLINE vf sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
FUSER_INLINE vf round_even(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n, with correct overflow and underflow.
FUSER_INLINE vf scale_by_power(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
#if defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
FUSER_INLINE vf sqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
FUSER_INLINE vf round_even(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
FUSER_INLINE vf sqrt(vf x) {
  vf r;
  for (int64_t i = 0; i < kLanes; ++i) r[i] = std::sqrt(x[i]);
  return r;
}
FUSER_INLINE vf round_even(vf x) {
  vf r;
  for (int64_t i = 0; i < kLanes; ++i) r[i] = std::nearbyint(x[i]);
  return r;
}
#endif
FUSER_INLINE vf scale_by_power(vf x, vf n) {
  // Two steps, so that results below the normal range underflow gradually instead of wrapping.
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  const vf a = (vf)((half + 127) << 23), b = (vf)((k - half + 127) << 23);
  return x * a * b;
}
#endif
FUSER_INLINE vf rsqrt(vf x) { return 1.0f / sqrt(x); }
FUSER_INLINE vf reciprocal(vf x) { return 1.0f / x; }

// e^x, within 2 ulp; 0 below -104, inf above 88.73, NaN stays NaN.
FUSER_INLINE vf exp(vf x) {
  // The order of operands keeps NaN.
  vf c = min_fast(set1(89.0f), x);
  c = max_fast(set1(-104.5f), c);
  const vf n = round_even(c * 1.44269504088896341f);
  vf r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return scale_by_power(p, n);
}

// 2^x for x <= 0, within 2 ulp; exactly 0 below -126 and for -inf, so that no denormal is made; NaN stays NaN.
FUSER_INLINE vf exp2_nonpositive(vf x) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = set1(1.86713028e-3f);
  p = p * r + 9.01702978e-3f;
  p = p * r + 5.57999127e-2f;
  p = p * r + 2.40164444e-1f;
  p = p * r + 6.93151295e-1f;
  p = p * r + 1.0f;
  // The scaling takes the floor of its exponent itself.
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p, (__m512)x);
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const vf c = max_fast(set1(-127.0f), x), t = c + 12582912.0f, r = c - (t - 12582912.0f);
  vf p = set1(1.32647273e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  const vi scaled = ((vi)p + ((vi)t << 23)) & ~(vi)(x < -126.0f);
  return select((vi)(x == x), (vf)scaled, x);
#endif
}

// a in the lanes whose bit is set, b elsewhere.
FUSER_INLINE vf select_bits(uint64_t bits, vf a, vf b) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return (vf)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b, (__m512)a);
#else
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  return select((vi)(((vi{} + int32_t(bits & ((1 << kLanes) - 1))) & lane) != 0), a, b);
#endif
}

// Whether any lane of a comparison is set.
FUSER_INLINE bool any(vi mask) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= mask[i];
  return r != 0;
#endif
}

// One bit for every lane of a comparison that is set.
FUSER_INLINE uint64_t to_bits(vi mask) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__) && FUSER_VECTOR_BYTES == 32
  return uint64_t(uint32_t(_mm256_movemask_ps((__m256)mask)));
#else
  uint64_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= uint64_t(mask[i] != 0) << i;
  return r;
#endif
}

// One bit for every lane of x that is not at most, or not above, the limit; NaN is neither.
FUSER_INLINE uint64_t not_at_most(vf x, vf limit) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_NLE_UQ);
#else
  return to_bits(~(vi)(x <= limit));
#endif
}
FUSER_INLINE uint64_t not_above(vf x, vf limit) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_NGT_UQ);
#else
  return to_bits(~(vi)(x > limit));
#endif
}

// One bit for every byte that is not zero; 0 < n <= 64, no other byte is touched.
FUSER_INLINE uint64_t load_bits(const uint8_t* p, int64_t n) {
#if defined(__AVX512BW__)
  const __m512i x = _mm512_maskz_loadu_epi8(~0ull >> (64 - n), p);
  return _mm512_test_epi8_mask(x, x);
#else
  uint64_t r = 0;
  for (int64_t i = 0; i < n; ++i) r |= uint64_t(p[i] != 0) << i;
  return r;
#endif
}

#if defined(__AVX2__) && FUSER_VECTOR_BYTES >= 32
#if FUSER_VECTOR_BYTES == 64
#define FUSER_UNPACK(name, type, a, b) (vf) _mm512_unpack##name##_##type((__m512)(a), (__m512)(b))
#define FUSER_UNPACK_PAIRS(name, a, b) (vf) _mm512_unpack##name##_pd((__m512d)(a), (__m512d)(b))
#define FUSER_QUARTERS(a, b, which) (vf) _mm512_shuffle_f32x4((__m512)(a), (__m512)(b), which)
#else
#define FUSER_UNPACK(name, type, a, b) (vf) _mm256_unpack##name##_##type((__m256)(a), (__m256)(b))
#define FUSER_UNPACK_PAIRS(name, a, b) (vf) _mm256_unpack##name##_pd((__m256d)(a), (__m256d)(b))
#endif
#endif
// Transposes kLanes vectors in place.
FUSER_INLINE void transpose(vf* v) {
#if defined(__AVX2__) && FUSER_VECTOR_BYTES >= 32
  // 4 x 4 inside every 128-bit part, then the parts.
  vf w[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const vf a = FUSER_UNPACK(lo, ps, v[i], v[i + 1]), b = FUSER_UNPACK(hi, ps, v[i], v[i + 1]);
    const vf c = FUSER_UNPACK(lo, ps, v[i + 2], v[i + 3]), d = FUSER_UNPACK(hi, ps, v[i + 2], v[i + 3]);
    w[i] = FUSER_UNPACK_PAIRS(lo, a, c), w[i + 1] = FUSER_UNPACK_PAIRS(hi, a, c);
    w[i + 2] = FUSER_UNPACK_PAIRS(lo, b, d), w[i + 3] = FUSER_UNPACK_PAIRS(hi, b, d);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
#if FUSER_VECTOR_BYTES == 64
    const __m512 a = _mm512_shuffle_f32x4((__m512)w[k], (__m512)w[k + 4], 0x44);
    const __m512 b = _mm512_shuffle_f32x4((__m512)w[k], (__m512)w[k + 4], 0xee);
    const __m512 c = _mm512_shuffle_f32x4((__m512)w[k + 8], (__m512)w[k + 12], 0x44);
    const __m512 d = _mm512_shuffle_f32x4((__m512)w[k + 8], (__m512)w[k + 12], 0xee);
    v[k] = (vf)_mm512_shuffle_f32x4(a, c, 0x88), v[k + 4] = (vf)_mm512_shuffle_f32x4(a, c, 0xdd);
    v[k + 8] = (vf)_mm512_shuffle_f32x4(b, d, 0x88), v[k + 12] = (vf)_mm512_shuffle_f32x4(b, d, 0xdd);
#else
    v[k] = (vf)_mm256_permute2f128_ps((__m256)w[k], (__m256)w[k + 4], 0x20);
    v[k + 4] = (vf)_mm256_permute2f128_ps((__m256)w[k], (__m256)w[k + 4], 0x31);
#endif
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = t;
    }
#endif
}

// In lane i the sum of the lanes of v[i], for kLanes vectors.
FUSER_INLINE vf reduce_add_each(const vf* v) {
#if defined(__AVX2__) && FUSER_VECTOR_BYTES >= 32
  vf w[kLanes / 4];  // sums inside every 128-bit part
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const vf a = FUSER_UNPACK(lo, ps, v[4 * i], v[4 * i + 1]) + FUSER_UNPACK(hi, ps, v[4 * i], v[4 * i + 1]);
    const vf b = FUSER_UNPACK(lo, ps, v[4 * i + 2], v[4 * i + 3]) + FUSER_UNPACK(hi, ps, v[4 * i + 2], v[4 * i + 3]);
    w[i] = FUSER_UNPACK_PAIRS(lo, a, b) + FUSER_UNPACK_PAIRS(hi, a, b);
  }
#if FUSER_VECTOR_BYTES == 64
  const vf a = FUSER_QUARTERS(w[0], w[1], 0x44) + FUSER_QUARTERS(w[0], w[1], 0xee);
  const vf b = FUSER_QUARTERS(w[2], w[3], 0x44) + FUSER_QUARTERS(w[2], w[3], 0xee);
  return FUSER_QUARTERS(a, b, 0x88) + FUSER_QUARTERS(a, b, 0xdd);
#else
  return (vf)_mm256_permute2f128_ps((__m256)w[0], (__m256)w[1], 0x20) +
         (vf)_mm256_permute2f128_ps((__m256)w[0], (__m256)w[1], 0x31);
#endif
#else
  vf sums;
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = reduce_add(v[i]);
  return sums;
#endif
}

// log(x), within 2 ulp: x = 2^n m with m around 1, and log(m) by the series of atanh(f / (2 + f)), f = m - 1.
FUSER_INLINE vf log(vf x) {
  const vi tiny = (vi)(x < 0x1p-126f);
  const vi bits = (vi)select(tiny, x * 0x1p25f, x) - 0x3f3504f3;
  const vf n = to_float((bits >> 23) - (tiny & 25));
  const vf f = (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const vf s = f / (f + 2.0f), z = s * s, w = z * z;
  const vf r = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const vf half = 0.5f * f * f;
  const vf y = n * 0.69313812256f - ((half - (s * (half + r) + n * 9.0580006145e-06f)) - f);
  const vf special = select((vi)(x == 0.0f), set1(-__builtin_inff()), select((vi)(x < 0.0f), set1(__builtin_nanf("")), x));
  return select((vi)(x > 0.0f) & (vi)(x < __builtin_inff()), y, special);
}

FUSER_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// tanh: odd polynomial near zero (no cancellation), exponential elsewhere.
FUSER_INLINE vf tanh(vf x) {
  const vf a = abs(x), s = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  p = p * s * x + x;
  const vf e = exp(2.0f * a);
  const vf q = copysign(1.0f - 2.0f / (e + 1.0f), x);
  // NaN compares false and takes the exponential branch, which keeps it.
  return select((vi)(a < 0.625f), p, select((vi)(a == a), q, x));
}

FUSER_INLINE vf relu(vf x) { return max_fast(set1(0.0f), x); }

// erf: below 0.93 x + x r(x^2), above 1 - exp(q(x)); both polynomials are weighted minimax fits, error below 1e-7.
FUSER_INLINE vf erf(vf x) {
  const vf a = abs(x), s = x * x, t = min_fast(set1(4.0f), a);
  vf r = set1(-0.000595373916439712f);
  r = r * s + 0.0049859401769936085f;
  r = r * s - 0.026761719956994057f;
  r = r * s + 0.11281682550907135f;
  r = r * s - 0.3761247992515564f;
  r = r * s + 0.12837915122509003f;
  vf q = set1(-2.1161911718081683e-05f);
  q = q * t + 0.0004352189425844699f;
  q = q * t - 0.004174643196165562f;
  q = q * t + 0.025128625333309174f;
  q = q * t - 0.10829395055770874f;
  q = q * t - 0.6333346366882324f;
  q = q * t - 1.1295207738876343f;
  q = q * t + 0.0001758746220730245f;
  const vf tail = copysign(1.0f - exp(q), x);
  return select((vi)(a < 0.93f), x + x * r, select((vi)(a == a), tail, x));
}
// gelu(x) = max(x, 0) - |x| Q(|x|), Q the upper tail of the normal distribution, 2 Q(t) = 2^P(t) with a weighted minimax
// fit of P on [0, 9]: half the work of going through erf, and no cancellation for negative x.
FUSER_INLINE vf gelu(vf x) {
  const vf h = 0.5f * x, t = min_fast(set1(9.0f), abs(x));
  // Even and odd powers apart: two chains of half the length keep more multipliers busy.
  const vf u = t * t;
  vf p = u * -1.3150684097240628e-08f - 7.32170838091406e-06f;
  p = p * u - 0.00022393067774828523f;
  p = p * u + 0.0070506734773516655f;
  p = p * u - 0.4592039883136749f;
  vf o = u * 4.835939648728527e-07f + 5.773787779617123e-05f;
  o = o * u - 9.909803338814527e-05f;
  o = o * u - 0.052501481026411057f;
  o = o * u - 1.1511057615280151f;
  p = (p * t + o) * t;
  const vf n = round_even(p), f = p - n, g = f * f;
  vf q = g * 0.00015353361959569156f + 0.00961843691766262f;
  q = q * g + 0.24022647738456726f;
  q = q * g + 1.0f;
  vf r = g * 0.0013398873852565885f + 0.055503323674201965f;
  r = r * g + 0.6931471824645996f;
  q = r * f + q;
  // h + |h| is max(x, 0), but NaN for -inf as in PyTorch.
  return h + abs(h) - 0.5f * t * scale_by_power(q, n);
}
// x * sigmoid(2u) equals 0.5 x (1 + tanh(u)) without the cancellation.
FUSER_INLINE vf gelu_tanh(vf x) {
  const vf u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-2.0f * u));
}
FUSER_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// Functions of what is rounded to bf16 afterwards, by up to 2^-8 of it: shorter, with relative errors far below that.
namespace rough {

// 2^x, relative error below 1.1e-4; exact at zero.
FUSER_INLINE vf exp2(vf x) {
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vf p = ((f * 0.07826797f + 0.22630768f) * f + 0.69542435f) * f + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const vf c = max_fast(set1(-151.0f), min_fast(set1(129.0f), x)), n = round_even(c), f = c - n;
  const vf p = ((f * 0.05500895f + 0.24221101f) * f + 0.69328293f) * f + 1.0f;
  return scale_by_power(p, n);
#endif
}
FUSER_INLINE vf exp(vf x) { return exp2(x * 1.44269504088896341f); }
// 1 / (1 + 2^-x)
FUSER_INLINE vf sigmoid2(vf x) {
  const vf divisor = 1.0f + exp2(-x);
#if defined(__AVX512F__) && FUSER_VECTOR_BYTES == 64
  return (vf)_mm512_rcp14_ps((__m512)divisor);
#else
  return 1.0f / divisor;
#endif
}
FUSER_INLINE vf sigmoid(vf x) { return sigmoid2(x * 1.44269504088896341f); }
FUSER_INLINE vf silu(vf x) { return x * sigmoid(x); }
FUSER_INLINE vf gelu_tanh(vf x) { return x * sigmoid2(x * (x * x * 0.10294324f + 2.3022082f)); }
// As in simd, but Q = 2^P itself; relative error below 3e-4 up to t = 4.5, and below 4e-3 beyond, where gelu(-t) is less
// than 2e-5.
FUSER_INLINE vf gelu(vf x) {
  const vf a = abs(x), t = min_fast(set1(9.0f), a);
  vf p = t * 1.4603039744542912e-05f - 0.0004642886633519083f;
  p = p * t + 0.00625599455088377f;
  p = p * t - 0.04850691184401512f;
  p = p * t - 0.46450746059417725f;
  p = p * t - 1.1490154266357422f;
  return (0.5f * x + 0.5f * a) - t * exp2(p * t - 1.0f);
}
}  // namespace rough

}  // namespace simd
