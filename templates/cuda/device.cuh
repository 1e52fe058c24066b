// What generated CUDA kernels are written in, beside plain CUDA C++17: tensor cores, asynchronous copies, barriers,
// 16-bit types and launching. nvcc compiles the functions below to PTX; with -DFUSER_EMULATED, emulator.h gives the
// same names (and CUDA's own keywords and built-ins) to a C++ compiler for CPUs.
#pragma once

#include "../cpu/abi.h"

#define FUSER_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef FUSER_EMULATED
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <tuple>
#include <utility>

namespace device {

// 16-bit floating point; conversions from float round to nearest even.

struct half {
    uint16_t bits;
    half() = default;
    __device__ __forceinline__ explicit half(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
    __device__ __forceinline__ operator float() const {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
};

struct bf16 {
    uint16_t bits;
    bf16() = default;
    __device__ __forceinline__ explicit bf16(float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
    __device__ __forceinline__ operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};

// fp8 with four bits of exponent and three of mantissa, no infinities and one NaN; conversions round to nearest even, and
// what is beyond 448 becomes that.
struct e4m3 {
    uint8_t bits;
    e4m3() = default;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    __device__ __forceinline__ explicit e4m3(float value) {
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
        bits = uint8_t(pair);
    }
#endif
};

struct tf32;  // names the operand type of mma<tf32>; values are uint32_t of to_tf32

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ uint32_t to_tf32(float value) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
}

// Tensor cores: d += a * b. Fragment layouts: PTX ISA, "Matrix Fragments for mma".

template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <typename T>
__device__ void mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FUSER_MMA(type, accumulator, constraint, instruction)                                                         \
    template <>                                                                                                       \
    __device__ __forceinline__ void mma<type>(accumulator(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {     \
        asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
FUSER_MMA(half, float, "f", "m16n8k16.row.col.f32.f16.f16.f32")
FUSER_MMA(bf16, float, "f", "m16n8k16.row.col.f32.bf16.bf16.f32")
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
FUSER_MMA(e4m3, float, "f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")
#endif
FUSER_MMA(tf32, float, "f", "m16n8k8.row.col.f32.tf32.tf32.f32")
FUSER_MMA(int8_t, int, "r", "m16n8k32.row.col.s32.s8.s8.s32")
FUSER_MMA(uint8_t, int, "r", "m16n8k32.row.col.s32.u8.u8.s32")
#undef FUSER_MMA

__device__ __forceinline__ void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Shared memory

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char fuser_dynamic_shared[];
    return reinterpret_cast<T*>(fuser_dynamic_shared);
}

// Carves dynamic shared memory into arrays, in order; the offsets are constants if the counts are.
class SharedAllocator {
  public:
    template <typename T>
    __device__ __forceinline__ T* take(size_t count, size_t align = 16) {
        used_ = (used_ + align - 1) / align * align;
        T* array = reinterpret_cast<T*>(dynamic_shared<unsigned char>() + used_);
        used_ += count * sizeof(T);
        return array;
    }
    __device__ __forceinline__ size_t bytes() const { return used_; }

  private:
    size_t used_ = 0;
};

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Asynchronous copies from global to shared memory: the first `valid` bytes, then zeros.

template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(BYTES), "r"(valid)
                     : "memory");
    }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Barriers

__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_inval(uint64_t* barrier) {
    asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
    int done;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
    return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}
// Arrives when all earlier cp.async of this thread are complete; the barrier's count must include it.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Copies a multiple of 16 contiguous bytes; the bytes are counted on `barrier`.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
                 "r"(shared_address(barrier)) : "memory");
}
#endif

// Memory order between blocks

__device__ __forceinline__ int load_acquire(const int* pointer) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(pointer)) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(int* pointer, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(pointer)), "r"(value) : "memory");
}
__device__ __forceinline__ int atomic_add_release(int* pointer, int value) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(old) : "l"(__cvta_generic_to_global(pointer)), "r"(value) : "memory");
    return old;
}

// Fast math: relative error of about 2^-22 (exp2, rcp, log2) and 2^-11 (tanh)

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Host side. A status is 0, or 1000 + the number of a CUDA error.

inline int status_of(cudaError_t error) { return error == cudaSuccess ? 0 : 1000 + int(error); }

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (status != cudaSuccess) return status_of(status);
    }
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    return std::apply(
        [&](auto&... value) {
            void* addresses[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
            return status_of(cudaLaunchKernel(function, grid, block, addresses, shared_bytes,
                                              static_cast<cudaStream_t>(stream)));
        },
        values);
}

inline int multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
    int blocks = 0;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
        if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes))) return 0;
    }
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes)) return 0;
    return blocks;
}

inline int clear(void* pointer, size_t bytes, void* stream) {
    return status_of(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace device

#endif  // FUSER_EMULATED

namespace device {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32); }

__device__ __forceinline__ uint32_t pack(half low, half high) { return low.bits | uint32_t(high.bits) << 16; }
__device__ __forceinline__ uint32_t pack(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<half>(float low, float high) { return pack_half(low, high); }
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) { return pack_bf16(low, high); }

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    T low, high;
    low.bits = uint16_t(packed);
    high.bits = uint16_t(packed >> 16);
    return make_float2(float(low), float(high));
}

// Over groups of `width` neighbouring lanes (a power of two); every lane of the warp takes part and has the result.

template <typename T>
__device__ __forceinline__ T warp_sum(T value, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}
template <typename T>
__device__ __forceinline__ T warp_max(T value, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
}
template <typename T>
__device__ __forceinline__ T warp_min(T value, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) value = min(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
}

}  // namespace device
