// Kernels that each break one rule; tests/runtime/test_emulator_faults.py checks that the emulator says so, and where.
// Every faulty line ends with the name of its kernel in a comment.
#include "cuda/device.cuh"

using namespace device;

#define FUSER_TEST_FAULT(name, grid, block, bytes)                                                                 \
    FUSER_EXPORT int name(const FuserArgs* args, void* stream) {                                                   \
        return launch(name##_kernel, grid, block, bytes, stream, static_cast<float*>(args->tensors[0]));           \
    }

// The right kernel that the next one breaks: each block reverses 64 elements of its own.
__global__ void with_barrier_kernel(float* out) {
    __shared__ float tile[64];
    const int t = threadIdx.x;
    out += 64 * blockIdx.x;
    tile[t] = out[t];
    __syncthreads();
    out[t] = tile[63 - t];
}
FUSER_TEST_FAULT(with_barrier, 2, 64, 0)

__global__ void missing_barrier_kernel(float* out) {
    __shared__ float tile[64];
    const int t = threadIdx.x;
    tile[t] = out[t];  // missing_barrier
    out[t] = tile[63 - t];  // missing_barrier
}
FUSER_TEST_FAULT(missing_barrier, 2, 64, 0)

// The second barrier of a loop: a fast thread overwrites what a slow one still reads.
__global__ void missing_second_barrier_kernel(float* out) {
    __shared__ float tile[64];
    const int t = threadIdx.x;
    for (int i = 0; i < 3; ++i) {
        tile[t] = out[t] + i;  // missing_second_barrier
        __syncthreads();
        out[t] = tile[63 - t];  // missing_second_barrier
    }
}
FUSER_TEST_FAULT(missing_second_barrier, 1, 64, 0)

// __syncwarp orders a warp, not a block.
__global__ void warp_instead_of_block_kernel(float* out) {
    __shared__ float tile[64];
    const int t = threadIdx.x;
    tile[t] = out[t];  // warp_instead_of_block
    __syncwarp();
    out[t] = tile[63 - t];  // warp_instead_of_block
}
FUSER_TEST_FAULT(warp_instead_of_block, 1, 64, 0)

// A shuffle exchanges registers and orders nothing.
__global__ void shuffle_as_barrier_kernel(float* out) {
    __shared__ float tile[32];
    const int t = threadIdx.x;
    tile[t] = out[t];  // shuffle_as_barrier
    const float x = __shfl_sync(0xffffffffu, out[t], 0);
    out[t] = x + tile[31 - t];  // shuffle_as_barrier
}
FUSER_TEST_FAULT(shuffle_as_barrier, 1, 32, 0)

// An atomic counter that others read without a barrier.
__global__ void atomic_and_plain_kernel(float* out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);  // atomic_and_plain
    out[threadIdx.x] = count;  // atomic_and_plain
}
FUSER_TEST_FAULT(atomic_and_plain, 1, 64, 0)

__global__ void ldmatrix_race_kernel(float* out) {
    SharedAllocator smem;
    half* tile = smem.take<half>(64 * 8);
    for (int i = threadIdx.x; i < 512; i += 64) tile[i] = half(1.f);  // ldmatrix_race
    uint32_t r[4];
    ldmatrix(r, tile + (threadIdx.x % 32) * 8 + (threadIdx.x < 32 ? 256 : 0));  // ldmatrix_race
    out[threadIdx.x] = float(r[0]);
}
FUSER_TEST_FAULT(ldmatrix_race, 1, 64, 1024)

// Index 64 of a static array, by its name and through a pointer.
__global__ void static_index_kernel(float* out) {
    __shared__ float tile[2][32];
    tile[threadIdx.x / 32][threadIdx.x % 32] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[1][int(threadIdx.x) - 31];  // static_index
}
FUSER_TEST_FAULT(static_index, 1, 64, 0)

__device__ __noinline__ void store(float* to, float value) {
    *to = value;  // static_pointer
}
__global__ void static_pointer_kernel(float* out) {
    __shared__ float only[64];
    store(only + threadIdx.x + 1, 1.f);
    __syncthreads();
    out[threadIdx.x] = only[threadIdx.x];
}
FUSER_TEST_FAULT(static_pointer, 1, 64, 0)

// The arrays of a template are each in a section of their own.
__device__ __noinline__ void store_int(int* to, int value) {
    *to = value;  // template_pointer
}
template <int N>
__global__ void two_arrays(float* out) {
    __shared__ int first[N];
    __shared__ int second[N];
    second[threadIdx.x] = 0;
    store_int(first + threadIdx.x + 1, 1);
    __syncthreads();
    out[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}
FUSER_EXPORT int template_pointer(const FuserArgs* args, void* stream) {
    return launch(two_arrays<64>, 1, 64, 0, stream, static_cast<float*>(args->tensors[0]));
}

// One element behind the first of two arrays: inside of the block's memory, outside of the array.
__global__ void dynamic_index_kernel(float* out) {
    SharedAllocator smem;
    float* first = smem.take<float>(64);
    float* second = smem.take<float>(64);
    second[threadIdx.x] = out[threadIdx.x];
    first[threadIdx.x + 1] = out[threadIdx.x];  // dynamic_index
    __syncthreads();
    out[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}
FUSER_TEST_FAULT(dynamic_index, 1, 64, 512)

__global__ void in_front_kernel(float* out) {
    float* all = dynamic_shared<float>();
    all[int(threadIdx.x) - 1] = out[threadIdx.x];  // in_front
}
FUSER_TEST_FAULT(in_front, 1, 64, 256)

// A fragment index that is wrong for the last rows: one row too far down.
__global__ void wrong_fragment_kernel(float* out) {
    SharedAllocator smem;
    half* tile = smem.take<half>(16 * 8);
    for (int i = threadIdx.x; i < 128; i += 32) tile[i] = half(1.f);
    __syncwarp();
    uint32_t r[2];
    ldmatrix(r, tile + (threadIdx.x % 16 + 1) * 8);  // wrong_fragment
    out[threadIdx.x] = float(r[0]);
}
FUSER_TEST_FAULT(wrong_fragment, 1, 32, 256)

__global__ void global_index_kernel(float* out) {
    out[threadIdx.x + 1] = 1.f;  // global_index
}
FUSER_TEST_FAULT(global_index, 1, 64, 0)

__global__ void async_global_index_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(64);
    cp_async<4>(tile + threadIdx.x, out + threadIdx.x + 1);  // async_global_index
    cp_async_wait_all();
}
FUSER_TEST_FAULT(async_global_index, 1, 64, 256)

__global__ void early_read_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(64);
    cp_async<4>(tile + threadIdx.x, out + threadIdx.x);  // early_read
    cp_async_commit();
    out[threadIdx.x] = tile[threadIdx.x] + 1.f;  // early_read
    cp_async_wait<0>();
}
FUSER_TEST_FAULT(early_read, 1, 64, 256)

// Waits for one group too few.
__global__ void wrong_group_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(128);
    for (int g = 0; g < 2; ++g) {
        cp_async<4>(tile + g * 64 + threadIdx.x, out + threadIdx.x);  // wrong_group
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = tile[127 - threadIdx.x];  // wrong_group
}
FUSER_TEST_FAULT(wrong_group, 1, 64, 512)

// Waits for its own copies, but not for those of the others.
__global__ void wait_without_barrier_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(64);
    cp_async<4>(tile + threadIdx.x, out + threadIdx.x);  // wait_without_barrier
    cp_async_wait_all();
    out[threadIdx.x] = tile[63 - threadIdx.x];  // wait_without_barrier
}
FUSER_TEST_FAULT(wait_without_barrier, 1, 64, 256)

// A bulk copy that is read without waiting for its barrier.
__global__ void bulk_early_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(64);
    uint64_t* done = smem.take<uint64_t>(1);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) mbarrier_init(done, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(done, 256);
        bulk_load(tile, out, 256, done);  // bulk_early
    }
    __syncthreads();
#endif
    out[threadIdx.x] = tile[threadIdx.x];  // bulk_early
}
FUSER_TEST_FAULT(bulk_early, 1, 64, 272)

__global__ void misaligned_vector_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(68);
    for (int i = threadIdx.x; i < 68; i += 64) tile[i] = 1.f;
    __syncthreads();
    const float4 v = *reinterpret_cast<float4*>(tile + threadIdx.x);  // misaligned_vector
    out[threadIdx.x] = v.x + v.w;
}
FUSER_TEST_FAULT(misaligned_vector, 1, 64, 272)

__global__ void misaligned_copy_kernel(float* out) {
    SharedAllocator smem;
    float* tile = smem.take<float>(64);
    if (threadIdx.x < 8) cp_async<16>(tile + threadIdx.x * 4, out + threadIdx.x * 4 + 1);  // misaligned_copy
    cp_async_wait_all();
}
FUSER_TEST_FAULT(misaligned_copy, 1, 64, 256)

__global__ void misaligned_row_kernel(float* out) {
    SharedAllocator smem;
    half* tile = smem.take<half>(512);
    uint32_t r[1];
    ldmatrix(r, tile + threadIdx.x * 12);  // misaligned_row
    out[threadIdx.x] = float(r[0]);
}
FUSER_TEST_FAULT(misaligned_row, 1, 32, 1024)

// Faults that need no checking mode

__global__ void divergent_barrier_kernel(float* out) {
    if (threadIdx.x < 32) __syncthreads();  // divergent_barrier
    else __syncthreads_or(out[threadIdx.x] > 0);  // divergent_barrier
}
FUSER_TEST_FAULT(divergent_barrier, 1, 64, 0)

__global__ void barrier_and_warp_kernel(float* out) {
    if (threadIdx.x % 2) __syncwarp();  // barrier_and_warp
    else __syncthreads();  // barrier_and_warp
    out[threadIdx.x] = 0;
}
FUSER_TEST_FAULT(barrier_and_warp, 1, 64, 0)

__global__ void lanes_disagree_kernel(float* out) {
    if (threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);  // lanes_disagree
    else out[threadIdx.x] = __ballot_sync(0xffffffffu, 1);  // lanes_disagree
}
FUSER_TEST_FAULT(lanes_disagree, 1, 32, 0)

__global__ void not_in_mask_kernel(float* out) {
    out[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 0);  // not_in_mask
}
FUSER_TEST_FAULT(not_in_mask, 1, 32, 0)

__global__ void half_warp_mma_kernel(float* out) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16) return;
    mma<half>(d, a, b);  // half_warp_mma
    out[threadIdx.x] = d[0];
}
FUSER_TEST_FAULT(half_warp_mma, 1, 32, 0)

__global__ void too_few_arrivals_kernel(float* out) {
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) mbarrier_init(&barrier, 65);
    __syncthreads();
    mbarrier_arrive(&barrier);
    mbarrier_wait(&barrier, 0);  // too_few_arrivals
    out[threadIdx.x] = 1.f;
}
FUSER_TEST_FAULT(too_few_arrivals, 1, 64, 0)

__global__ void no_mbarrier_kernel(float* out) {
    __shared__ uint64_t barrier;
    mbarrier_arrive(&barrier);  // no_mbarrier
    out[threadIdx.x] = 1.f;
}
FUSER_TEST_FAULT(no_mbarrier, 1, 32, 0)

__global__ void wrong_barrier_count_kernel(float* out) {
    barrier_sync(1, threadIdx.x < 32 ? 64 : 32);  // wrong_barrier_count
    out[threadIdx.x] = 1.f;
}
FUSER_TEST_FAULT(wrong_barrier_count, 1, 64, 0)

__global__ void too_little_shared_kernel(float* out) {
    SharedAllocator smem;
    smem.take<float>(32);
    out[threadIdx.x] = *smem.take<float>(32);  // too_little_shared
}
FUSER_TEST_FAULT(too_little_shared, 1, 32, 248)

__global__ void wild_pointer_kernel(float* out) {
    out[size_t(1) << 45] = 1.f;  // wild_pointer
}
FUSER_TEST_FAULT(wild_pointer, 1, 32, 0)

__global__ void null_pointer_kernel(float* out) {
    *reinterpret_cast<volatile float*>(out[0] != out[0] ? 16 : 0) = 1.f;  // null_pointer
}
FUSER_TEST_FAULT(null_pointer, 1, 32, 0)

__global__ void division_kernel(float* out) {
    const volatile int zero = 0;
    out[threadIdx.x] = 7 / zero;  // division
}
FUSER_TEST_FAULT(division, 1, 32, 0)

__device__ __noinline__ float large_frame(float x) {
    volatile float local[40000];
    local[int(x)] = x;
    return local[int(x) + 1];
}
__global__ void local_memory_kernel(float* out) {
    out[threadIdx.x] = large_frame(out[threadIdx.x]);  // local_memory
}
FUSER_TEST_FAULT(local_memory, 1, 32, 0)

__global__ void trap_kernel(float* out) {
    if (out[threadIdx.x] >= 0) __trap();  // trap
}
FUSER_TEST_FAULT(trap, 1, 32, 0)

__global__ void endless_kernel(float* out) {
    volatile float* x = out;
    while (x[0] >= 0) x[1] = x[1] + 1;  // endless
}
FUSER_TEST_FAULT(endless, 1, 32, 0)

__global__ void too_many_threads_kernel(float*) {}
FUSER_TEST_FAULT(too_many_threads, 1, dim3(32, 33), 0)

__global__ void too_much_shared_kernel(float*) {}
FUSER_TEST_FAULT(too_much_shared, 1, 32, 240 << 10)

__global__ void too_large_grid_kernel(float*) {}
FUSER_TEST_FAULT(too_large_grid, dim3(1, 70000), 32, 0)

__global__ void empty_grid_kernel(float* out) { out[0] = 1.f; }
FUSER_TEST_FAULT(empty_grid, dim3(3, 0), 32, 0)
