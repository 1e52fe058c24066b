// Copies of gathered rows from global to shared memory.
#pragma once
#include "cuda/attention/tile.cuh"

namespace attention {

// Copies rows of kWidth columns, padded with zeros to kPadded.
template <int kCount, int kWidth, int kPadded, int kPitch, int kTeam, class T, class Row>
__device__ __forceinline__ void gather(T* to, const T* from, int stride, bool vectors, unsigned thread,
                                       const Row& row) {
  constexpr unsigned kChunk = 16 / sizeof(T), kChunks = kPadded / kChunk, kCopies = kCount * kChunks;
  if (kWidth % kChunk == 0 && vectors) {
#pragma unroll
    for (unsigned n = 0; n < (kCopies + kTeam - 1) / kTeam; ++n) {
      const unsigned index = n * kTeam + thread;
      if (kCopies % kTeam != 0 && index >= kCopies) break;
      const unsigned i = index / kChunks, c = index % kChunks * kChunk;
      const bool real = kWidth == kPadded || c < kWidth;
      cp_async<16>(to + i * kPitch + c, from + (int64_t(row(i)) * stride + (real ? c : 0)), real ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (unsigned index = thread; index < kCount * kPadded; index += kTeam) {
      const unsigned i = index / kPadded, c = index % kPadded;
      to[i * kPitch + c] = c < kWidth ? from[int64_t(row(i)) * stride + c] : T(0.0f);
    }
  }
}

// Copies the rows of a step's keys (or values). Where the shape allows, a thread has one column of neighbouring rows,
// so that all it needs for a copy is a product of row and stride.
template <class S, class T, int kWidth, int kPadded, int kPitch>
struct Copier {
  static constexpr unsigned kChunk = 16 / sizeof(T), kChunks = kPadded / kChunk;
  static constexpr bool kEven =
      kWidth == kPadded && S::kThreads % kChunks == 0 && S::kKeys * kChunks % S::kThreads == 0;
  static constexpr unsigned kEach = kEven ? S::kKeys * kChunks / S::kThreads : 1;
  const char* column;
  unsigned at;

  __device__ __forceinline__ Copier(const T* from, unsigned thread)
      : column(reinterpret_cast<const char*>(from + (kEven ? thread % kChunks * kChunk : 0))),
        at(thread / kChunks * kEach * kPitch + thread % kChunks * kChunk) {}

  __device__ __forceinline__ void operator()(T* to, const int* keys, int stride, bool vectors,
                                             unsigned thread) const {
    if (kEven && vectors) {
      const int* own = keys + thread / kChunks * kEach;
      int row[kEach];
      if constexpr (kEach % 4 == 0) {
#pragma unroll
        for (unsigned n = 0; n < kEach; n += 4) {
          const int4 four = *reinterpret_cast<const int4*>(own + n);
          row[n] = four.x, row[n + 1] = four.y, row[n + 2] = four.z, row[n + 3] = four.w;
        }
      } else {
#pragma unroll
        for (unsigned n = 0; n < kEach; ++n) row[n] = own[n];
      }
      stride *= int(sizeof(T));
#pragma unroll
      for (unsigned n = 0; n < kEach; ++n) cp_async<16>(to + at + n * kPitch, column + int64_t(row[n]) * stride);
    } else {
      const T* from = reinterpret_cast<const T*>(column) - (kEven ? thread % kChunks * kChunk : 0);
      gather<S::kKeys, kWidth, kPadded, kPitch, S::kThreads>(to, from, stride, vectors, thread,
                                                             [keys](unsigned i) { return keys[i]; });
    }
  }
};

}  // namespace attention
