// Products of tiles in shared memory. A tile holds rows of kDepth elements along K in chunks of 16 bytes, swizzled so that
// eight rows read at one chunk, as ldmatrix does, fall into different banks.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/row.cuh"

namespace tile {
using namespace device;

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // elements of a chunk

// Where a chunk of a row begins, in elements. Rows that are a multiple of eight apart have the same swizzle.
template <class T, int kDepth>
__device__ __forceinline__ int place(int row, int chunk) {
  constexpr int kChunks = kDepth / kVector<T>;
  static_assert(kChunks == 4 || kChunks % 8 == 0, "rows fill halves or multiples of 128 bytes");
  return row * kDepth + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8)) * kVector<T>;
}

// Copies kRows rows of `source` from `row`, columns from k, into a tile, asynchronously where rows start at multiples of
// 16 bytes (`vectors`). Beyond `rows` and `columns` there are zeros. Elements of another type are converted on the way,
// which is not asynchronous.
template <int kRows, int kDepth, int kThreads, class T, class Source>
__device__ __forceinline__ void load(
    T* tile, const Source* source, int64_t stride, int64_t row, int64_t rows, int64_t k, int64_t columns, bool vectors) {
  constexpr int kChunks = kDepth / kVector<T>, kAcross = kChunks < 8 ? kChunks : 8, kDown = kThreads / kAcross;
  // All rows of a thread have one swizzle: its copies are constants apart, and cost no registers for addresses.
  static_assert(kDown % 8 == 0, "a thread's rows are a multiple of eight apart");
  const int down = int(threadIdx.x) / kAcross, across = int(threadIdx.x) % kAcross;
  const int height = int(rows - row < kRows ? rows - row : kRows) - down;
  const int width = int(columns - k < kDepth ? columns - k : kDepth) - across * kVector<T>;
  const Source* from = source + (row + down) * stride + k + across * kVector<T>;
  T* const to = tile + place<T, kDepth>(down, across);
  const auto copy = [&](int i, auto each) {
    if (kRows % kDown != 0 && down + i >= kRows) return;
#pragma unroll
    for (int j = 0; j < kChunks; j += kAcross) {
      const int left = i < height ? width - j * kVector<T> : 0;
      each(to + i * kDepth + j * kVector<T>, from + j * kVector<T>, left < 0 ? 0 : left < kVector<T> ? left : kVector<T>);
    }
    from += kDown * stride;
  };
  if constexpr (!std::is_same_v<T, Source>) {
#pragma unroll
    for (int i = 0; i < kRows; i += kDown)
      copy(i, [&](T* q, const Source* p, int count) {
        float x[kVector<T>];
        load_row(p, 0, count, vectors, x);
        store_row(q, 0, kVector<T>, true, x);
      });
  } else if (vectors) {
#pragma unroll
    for (int i = 0; i < kRows; i += kDown)
      copy(i, [](T* q, const T* p, int count) { cp_async<16>(q, p, count * int(sizeof(T))); });
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows; i += kDown)
      copy(i, [](T* q, const T* p, int count) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) q[e] = e < count ? p[e] : T{};
      });
  }
}

// Fragments of A (from `row`) and of W (from `column`), two chunks deep.
template <class Product, int kDepth, int kTilesM, int kTilesN>
struct Fragments {
  uint32_t a[kTilesM][4], w[kTilesN][2];

  template <class T>
  __device__ __forceinline__ void load(const T* tile_a, int row, const T* tile_w, int column, int step) {
    static_assert(kTilesN % 2 == 0, "fragments of W are loaded in pairs");
    const int lane = lane_id();
    const T* const from_a = tile_a + place<T, kDepth>(row + lane % 16, 2 * step + lane / 16);
    const T* const from_w = tile_w + place<T, kDepth>(column + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ldmatrix(a[i], from_a + 16 * i * kDepth);
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t pair[4];
      ldmatrix(pair, from_w + 8 * j * kDepth);
      w[j][0] = pair[0], w[j][1] = pair[1], w[j + 1][0] = pair[2], w[j + 1][1] = pair[3];
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = to_tf32(__uint_as_float(a[i][e]));
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) w[j][e] = to_tf32(__uint_as_float(w[j][e]));
    }
  }
};

// Whether tensor cores sum in fewer bits than fp32 has (13 of mantissa: SageAttention2, arXiv:2411.10958), so that only
// sums of one instruction are theirs.
template <class Product>
constexpr bool kPromotes = std::is_same_v<Product, e4m3>;

// sums += a * b
template <class Product, class Sum>
__device__ __forceinline__ void add_product(Sum (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kPromotes<Product>) {
    float part[4] = {};
    mma<Product>(part, a, b);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += part[e];
  } else {
    mma<Product>(sums, a, b);
  }
}

// Sums of a warp's tile on the tensor cores: fragments of 16 x 8, spread over the lanes as mma.sync does.
template <class Product, int kTilesM, int kTilesN>
struct Sums {
  using Sum = std::conditional_t<std::is_same_v<Product, int8_t>, int, float>;
  Sum value[kTilesM][kTilesN][4] = {};

  // With kAhead = 1, fragments are loaded a step ahead, at the price of registers for two. Sums that are promoted take
  // these, and would take those of all steps if the loop were unrolled.
  template <int kDepth, int kAhead = !kPromotes<Product>, class T>
  __device__ __forceinline__ void multiply(const T* tile_a, int row, const T* tile_w, int column) {
    constexpr int kSteps = kDepth / kVector<T> / 2;
    Fragments<Product, kDepth, kTilesM, kTilesN> fragments[kAhead + 1];
    if (kAhead) fragments[0].load(tile_a, row, tile_w, column, 0);
#pragma unroll (kPromotes<Product> ? 1 : kSteps)
    for (int step = 0; step < kSteps; ++step) {
      const int next = step + kAhead;
      if (next < kSteps) fragments[next % (kAhead + 1)].load(tile_a, row, tile_w, column, next);
      const auto& f = fragments[step % (kAhead + 1)];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) add_product<Product>(value[i][j], f.a[i], f.w[j]);
    }
  }

  // Calls visit(row, column, x, y) with the sums x and y of two neighbours, counted within the warp's tile.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const Sum(&x)[4] = value[i][j];
        visit(row + 16 * i, column + 8 * j, x[0], x[1]);
        visit(row + 16 * i + 8, column + 8 * j, x[2], x[3]);
      }
  }
};

// Sums of a warp's tile in fp32 by fused multiply-adds; a lane has every fourth row and every eighth column.
template <int kTilesM, int kTilesN>
struct ExactSums {
  float value[kTilesM][kTilesN] = {};

  template <int kDepth>
  __device__ __forceinline__ void multiply(const float* tile_a, int row, const float* tile_w, int column) {
    row += lane_id() / 8, column += lane_id() % 8;
#pragma unroll 1
    for (int chunk = 0; chunk < kDepth / 4; ++chunk) {
      const float* const from_w = tile_w + place<float, kDepth>(column, chunk);
      const float* const from_a[2] = {tile_a + place<float, kDepth>(row, chunk),
                                      tile_a + place<float, kDepth>(row + 4, chunk)};
      float4 w[kTilesN];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) w[j] = *reinterpret_cast<const float4*>(from_w + 8 * j * kDepth);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(from_a[i % 2] + i / 2 * 8 * kDepth);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) value[i][j] = fmaf(a.x, w[j].x, value[i][j]);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) value[i][j] = fmaf(a.y, w[j].y, value[i][j]);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) value[i][j] = fmaf(a.z, w[j].z, value[i][j]);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) value[i][j] = fmaf(a.w, w[j].w, value[i][j]);
      }
    }
  }

  // Calls visit(row, column, x) with every sum, counted within the warp's tile.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int row = lane_id() / 8, column = lane_id() % 8;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) visit(row + 4 * i, column + 8 * j, value[i][j]);
  }
};

// Whether rows of `stride` elements from `p` all start at multiples of 16 bytes.
template <class T>
bool aligned(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
}
}  // namespace tile
