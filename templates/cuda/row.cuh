// Row expressions on a GPU: their instructions on one number, groups of threads that share a row, and rows in memory.
#pragma once

#include "device.cuh"

// What a kernel returns for extents that it was not built for.
#define FUSER_UNSUPPORTED 2

namespace device {

// The instructions of row expressions. All as accurate as PyTorch's: approximations belong where an error can be bounded.
namespace math {

__device__ __forceinline__ float neg(float x) { return -x; }
__device__ __forceinline__ float abs(float x) { return fabsf(x); }
__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ float log(float x) { return logf(x); }
__device__ __forceinline__ float sqrt(float x) { return sqrtf(x); }
__device__ __forceinline__ float rsqrt(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ float reciprocal(float x) { return 1.0f / x; }
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }
__device__ __forceinline__ float erf(float x) { return erff(x); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
// These keep a NaN, as PyTorch does and fmaxf does not.
__device__ __forceinline__ float relu(float x) { return 0.0f > x ? 0.0f : x; }
__device__ __forceinline__ float maximum(float a, float b) { return a != a || a >= b ? a : b; }
__device__ __forceinline__ float minimum(float a, float b) { return a != a || a <= b ? a : b; }
__device__ __forceinline__ float less(float a, float b) { return a < b ? 1.0f : 0.0f; }
__device__ __forceinline__ float where(float condition, float a, float b) { return condition != 0.0f ? a : b; }
__device__ __forceinline__ float round_even(float x) { return rintf(x); }
__device__ __forceinline__ float to_bf16(float x) { return float(bf16(x)); }
__device__ __forceinline__ float to_f16(float x) { return float(half(x)); }

}  // namespace math

__device__ __forceinline__ float warp_maximum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = math::maximum(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The lanes of a warp.
struct WarpGroup {
  __device__ __forceinline__ int rank() const { return lane_id(); }
  __device__ __forceinline__ int size() const { return 32; }
  __device__ __forceinline__ float sum(float x) const { return warp_sum(x); }
  __device__ __forceinline__ float maximum(float x) const { return warp_maximum(x); }
};

// All threads of a block, a multiple of 32; `shared` are 32 floats of shared memory.
struct BlockGroup {
  float* shared;

  __device__ __forceinline__ int rank() const { return int(threadIdx.x); }
  __device__ __forceinline__ int size() const { return int(blockDim.x); }
  __device__ __forceinline__ float sum(float x) const { return warp_sum(gather(warp_sum(x), 0.0f)); }
  __device__ __forceinline__ float maximum(float x) const {
    return warp_maximum(gather(warp_maximum(x), __int_as_float(0xff800000)));
  }

 private:
  // The results of all warps in the lanes of each.
  __device__ __forceinline__ float gather(float x, float identity) const {
    __syncthreads();  // nobody still reads the results before
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    return lane_id() < size() / 32 ? shared[lane_id()] : identity;
  }
};

// N neighbouring elements, in accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Elements {
  T value[N];
};

// Elements c, c + 1, … of a row, those below `columns`; the others read as zero. `vector`: whether whole groups of N
// elements may be accessed at once, c being a multiple of N.
template <int N, typename T>
__device__ __forceinline__ void load_row(const T* row, int64_t c, int64_t columns, bool vector, float (&x)[N]) {
  if (vector && c + N <= columns) {
    const Elements<T, N> raw = *reinterpret_cast<const Elements<T, N>*>(row + c);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = float(raw.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = c + i < columns ? float(row[c + i]) : 0.0f;
  }
}
template <int N, typename T>
__device__ __forceinline__ void store_row(T* row, int64_t c, int64_t columns, bool vector, const float (&x)[N]) {
  if (vector && c + N <= columns) {
    Elements<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.value[i] = T(x[i]);
    *reinterpret_cast<Elements<T, N>*>(row + c) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (c + i < columns) row[c + i] = T(x[i]);
  }
}

// The widest power of two, up to `width`, of elements that can be accessed at once in every row of this matrix.
inline int vector_width(int width, const void* address, int64_t stride, int bytes) {
  const uint64_t place = reinterpret_cast<uint64_t>(address) | uint64_t(stride) * uint64_t(bytes);
  while (width > 1 && place % uint64_t(width * bytes < 16 ? width * bytes : 16) != 0) width /= 2;
  return width;
}

}  // namespace device
