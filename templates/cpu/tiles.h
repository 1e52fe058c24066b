// Matrix tiles of 16 rows of 64 bytes: AMX where the target has it, else a model of it in plain C++, by which kernels are
// tested elsewhere. Intel SDM, TDPBUSD and TDPBF16PS: c += a · b for a tile of a's rows and one of b whose row k has, for
// every column, the numbers that go with the k-th 32 bits of a's rows.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tiles {
constexpr int kTileRows = 16, kTileBytes = 64, kTiles = 8;

// What `ldtilecfg` reads.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(__AMX_TILE__) && (defined(__AMX_INT8__) || defined(__AMX_BF16__))
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { asm volatile("tilerelease"); }
template <int T>
inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Unsigned bytes of A times signed ones of B.
template <int C, int A, int B>
inline void multiply_bytes() { asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
inline void multiply_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
#else
struct Tile {
  uint8_t row[kTileRows][kTileBytes];
};
inline thread_local Config configured;
inline thread_local Tile tile[kTiles];

inline void configure(const Config& config) {
  configured = config;
  std::memset(tile, 0, sizeof(tile));
}
inline void release() { configured = Config(); }
template <int T>
inline void zero() { std::memset(&tile[T], 0, sizeof(Tile)); }
template <int T>
inline void load(const void* from, int64_t stride) {
  zero<T>();
  for (int r = 0; r < configured.rows[T]; ++r)
    std::memcpy(tile[T].row[r], static_cast<const char*>(from) + r * stride, configured.bytes[T]);
}
template <int T>
inline void store(void* to, int64_t stride) {
  for (int r = 0; r < configured.rows[T]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile[T].row[r], configured.bytes[T]);
}
// Calls add(sum, words of A and B that meet) for all of a product.
template <class Sum, int C, int A, int B, class Add>
inline void each(Add add) {
  for (int r = 0; r < configured.rows[C]; ++r)
    for (int k = 0; k < configured.bytes[A] / 4; ++k)
      for (int c = 0; c < configured.bytes[C] / 4; ++c) {
        Sum sum;
        std::memcpy(&sum, &tile[C].row[r][4 * c], 4);
        sum = add(sum, &tile[A].row[r][4 * k], &tile[B].row[k][4 * c]);
        std::memcpy(&tile[C].row[r][4 * c], &sum, 4);
      }
}
template <int C, int A, int B>
inline void multiply_bytes() {
  each<uint32_t, C, A, B>([](uint32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum += uint32_t(int32_t(a[i]) * int8_t(b[i]));
    return sum;
  });
}
template <int C, int A, int B>
inline void multiply_bf16() {
  each<float, C, A, B>([](float sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; i += 2) {
      float x[2] = {};
      std::memcpy(reinterpret_cast<char*>(&x[0]) + 2, a + i, 2);
      std::memcpy(reinterpret_cast<char*>(&x[1]) + 2, b + i, 2);
      sum += x[0] * x[1];
    }
    return sum;
  });
}
#endif
}  // namespace tiles
