// One small kernel for each primitive of device.cuh; tests/runtime/test_emulator.py runs them on the emulator and
// compiles them with nvcc.
#include "cuda/device.cuh"

using namespace device;

template <typename T>
T* tensor(const FuserArgs* args, int i) {
    return static_cast<T*>(args->tensors[i]);
}

const int64_t* extents(const FuserArgs* args) { return static_cast<const int64_t*>(args->extents); }

// Indices

__global__ void write_indices(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int* own = out + (size_t(block) * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
    own[0] = blockIdx.x, own[1] = blockIdx.y, own[2] = blockIdx.z;
    own[3] = threadIdx.x, own[4] = threadIdx.y, own[5] = threadIdx.z;
}
FUSER_EXPORT int indices(const FuserArgs* args, void* stream) {
    const int64_t* e = extents(args);
    return launch(write_indices, dim3(e[0], e[1], e[2]), dim3(e[3], e[4], e[5]), 0, stream, tensor<int>(args, 0));
}

// Barriers of a block

template <int THREADS>
__global__ void __launch_bounds__(THREADS) sum_rows(const half* __restrict__ x, float* __restrict__ out, int columns) {
    __shared__ float partial[THREADS / 32];
    float sum = 0.f;
    for (int i = threadIdx.x; i < columns; i += THREADS) sum += float(x[size_t(blockIdx.x) * columns + i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) partial[warp_id()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < THREADS / 32; ++w) sum += partial[w];
        out[blockIdx.x] = sum;
    }
}
FUSER_EXPORT int row_sums(const FuserArgs* args, void* stream) {
    return launch(sum_rows<96>, int(extents(args)[0]), 96, 0, stream, tensor<const half>(args, 0), tensor<float>(args, 1),
                  int(extents(args)[1]));
}

__global__ void count_block(const int* in, int* out) {
    const int t = threadIdx.x, n = blockDim.x;
    out[t] = __syncthreads_count(in[t]);
    out[n + t] = __syncthreads_or(in[t]);
    out[2 * n + t] = __syncthreads_and(in[t]);
}
FUSER_EXPORT int block_votes(const FuserArgs* args, void* stream) {
    return launch(count_block, 1, int(extents(args)[0]), 0, stream, tensor<const int>(args, 0), tensor<int>(args, 1));
}

// Two warps fill a buffer, two others read it; each pair waits only for the other.
__global__ void hand_over(const float* in, float* out, int rounds) {
    __shared__ float buffer[64];
    const bool producer = threadIdx.x < 64;
    const int t = threadIdx.x % 64;
    for (int i = 0; i < rounds; ++i) {
        if (producer) {
            if (i > 0) barrier_sync(2, 128);
            buffer[t] = in[i * 64 + t];
            barrier_arrive(1, 128);
        } else {
            barrier_sync(1, 128);
            out[i * 64 + t] = 2 * buffer[63 - t];
            if (i + 1 < rounds) barrier_arrive(2, 128);
        }
    }
}
FUSER_EXPORT int named_barriers(const FuserArgs* args, void* stream) {
    return launch(hand_over, 1, 128, 0, stream, tensor<const float>(args, 0), tensor<float>(args, 1),
                  int(extents(args)[0]));
}

// A ring of two stages between one warp that loads and three that read, with transaction-less mbarriers.
__global__ void ring(const float* in, float* out, int rounds) {
    __shared__ float stages[2][32];
    __shared__ uint64_t full[2], empty[2];
    const int warp = warp_id(), lane = lane_id();
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; ++s) mbarrier_init(&full[s], 32), mbarrier_init(&empty[s], 96);
    }
    __syncthreads();
    for (int i = 0; i < rounds; ++i) {
        const int s = i % 2, phase = i / 2 % 2;
        if (warp == 0) {
            mbarrier_wait(&empty[s], phase ^ 1);
            cp_async<4>(&stages[s][lane], in + i * 32 + lane);
            cp_async_mbarrier_arrive(&full[s]);
        } else {
            mbarrier_wait(&full[s], phase);
            out[((warp - 1) * rounds + i) * 32 + lane] = stages[s][31 - lane] * warp;
            mbarrier_arrive(&empty[s]);
        }
    }
}
FUSER_EXPORT int mbarriers(const FuserArgs* args, void* stream) {
    return launch(ring, 1, 128, 0, stream, tensor<const float>(args, 0), tensor<float>(args, 1), int(extents(args)[0]));
}

// Rows chosen by index arrive by bulk copies that one barrier counts. Before sm_90: an ordinary copy.
__global__ void gather_bulk(const float* in, const int* rows, float* out, int count) {
    SharedAllocator smem;
    float* buffer = smem.take<float>(count * 32, 128);
    uint64_t* done = smem.take<uint64_t>(1);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    (void)done;
    for (int i = threadIdx.x; i < count * 32; i += blockDim.x) buffer[i] = in[rows[i / 32] * 32 + i % 32];
    __syncthreads();
#else
    if (threadIdx.x == 0) {
        mbarrier_init(done, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(done, count * 128);
        for (int i = 0; i < count; ++i) bulk_load(buffer + i * 32, in + rows[i] * 32, 128, done);
    }
    mbarrier_wait(done, 0);
#endif
    for (int i = threadIdx.x; i < count * 32; i += blockDim.x) out[i] = buffer[i];
}
FUSER_EXPORT int bulk_copies(const FuserArgs* args, void* stream) {
    const int count = int(extents(args)[0]);
    return launch(gather_bulk, 1, 64, count * 128 + 16, stream, tensor<const float>(args, 0), tensor<const int>(args, 1),
                  tensor<float>(args, 2), count);
}

// Warps

template <typename T>
__global__ void shuffle_all(const T* in, T* out, int argument, int width) {
    const int t = threadIdx.x;
    out[t] = __shfl_sync(0xffffffffu, in[t], argument, width);
    out[32 + t] = __shfl_up_sync(0xffffffffu, in[t], argument, width);
    out[64 + t] = __shfl_down_sync(0xffffffffu, in[t], argument, width);
    out[96 + t] = __shfl_xor_sync(0xffffffffu, in[t], argument, width);
}
FUSER_EXPORT int shuffles_int(const FuserArgs* args, void* stream) {
    return launch(shuffle_all<int>, 1, 32, 0, stream, tensor<const int>(args, 0), tensor<int>(args, 1),
                  int(extents(args)[0]), int(extents(args)[1]));
}
FUSER_EXPORT int shuffles_double(const FuserArgs* args, void* stream) {
    return launch(shuffle_all<double>, 1, 32, 0, stream, tensor<const double>(args, 0), tensor<double>(args, 1),
                  int(extents(args)[0]), int(extents(args)[1]));
}

// Even and odd lanes vote among themselves, in different branches.
__global__ void vote_all(const int* in, uint32_t* out) {
    const int t = threadIdx.x;
    const int value = in[t];
    uint32_t* own = out + t * 12;
    const auto vote = [&](uint32_t mask) {
        own[0] = __ballot_sync(mask, value & 1);
        own[1] = __any_sync(mask, value & 2);
        own[2] = __all_sync(mask, value & 4);
        own[3] = __match_any_sync(mask, value & 3);
        int all;
        own[4] = __match_all_sync(mask, value & 8, &all);
        own[5] = all;
        own[6] = __reduce_add_sync(mask, value);
        own[7] = __reduce_min_sync(mask, value);
        own[8] = __reduce_max_sync(mask, value);
        own[9] = __reduce_and_sync(mask, uint32_t(value));
        own[10] = __reduce_or_sync(mask, uint32_t(value));
        own[11] = __reduce_xor_sync(mask, uint32_t(value));
    };
    if (t % 2) vote(0xaaaaaaaau);
    else vote(0x55555555u);
}
FUSER_EXPORT int votes(const FuserArgs* args, void* stream) {
    return launch(vote_all, 1, 32, 0, stream, tensor<const int>(args, 0), tensor<uint32_t>(args, 1));
}

__global__ void reduce_groups(const float* in, float* out, int width) {
    const int t = threadIdx.x;
    out[t] = warp_sum(in[t], width);
    out[64 + t] = warp_max(in[t], width);
    out[128 + t] = warp_min(in[t], width);
}
FUSER_EXPORT int warp_reductions(const FuserArgs* args, void* stream) {
    return launch(reduce_groups, 1, 64, 0, stream, tensor<const float>(args, 0), tensor<float>(args, 1),
                  int(extents(args)[0]));
}

// Lanes exchange through shared memory, ordered by __syncwarp alone; the last warp is not full.
__global__ void reverse_warp(const int* in, int* out) {
    __shared__ int buffer[80];
    const int t = threadIdx.x, base = t / 32 * 32, lanes = min(32, int(blockDim.x) - base);
    buffer[t] = in[t];
    __syncwarp();
    out[t] = buffer[base + lanes - 1 - lane_id()];
}
FUSER_EXPORT int warp_exchange(const FuserArgs* args, void* stream) {
    return launch(reverse_warp, 1, 80, 0, stream, tensor<const int>(args, 0), tensor<int>(args, 1));
}

// Atomics

__global__ void change_all(const int* in, int n, int* ints, float* floats, unsigned long long* longs, double* doubles) {
    __shared__ int counts[16];
    __shared__ float total;
    const int t = threadIdx.x;
    if (t < 16) counts[t] = 0;
    if (t == 0) total = 0.f;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) {
        const int value = in[i];
        atomicAdd(&counts[value & 15], 1);
        atomicAdd(&total, 0.5f * value);
        atomicSub(&ints[16], value);
        atomicMin(&ints[17], value);
        atomicMax(&ints[18], value);
        atomicAnd(&ints[19], value);
        atomicOr(&ints[20], value);
        atomicXor(&ints[21], value);
        atomicInc(reinterpret_cast<unsigned*>(&ints[22]), 6u);
        atomicDec(reinterpret_cast<unsigned*>(&ints[23]), 6u);
        atomicAdd(longs, static_cast<unsigned long long>(value));
        atomicAdd(doubles, double(value));
    }
    __syncthreads();
    if (t < 16) atomicAdd(&ints[t], counts[t]);
    if (t == 0) atomicAdd(floats, total);
}
FUSER_EXPORT int atomics(const FuserArgs* args, void* stream) {
    return launch(change_all, 3, 64, 0, stream, tensor<const int>(args, 0), int(extents(args)[0]), tensor<int>(args, 1),
                  tensor<float>(args, 2), tensor<unsigned long long>(args, 3), tensor<double>(args, 4));
}

// A lock that threads of all blocks take in turn, one of each warp at a time.
__global__ void lock_and_count(int* lock, volatile int* count) {
    for (int lane = 0; lane < 32; ++lane) {
        if (lane == lane_id()) {
            while (atomicCAS(lock, 0, 1) != 0) __nanosleep(20);
            __threadfence();
            *count = *count + 1;
            __threadfence();
            atomicExch(lock, 0);
        }
        __syncwarp();
    }
}
FUSER_EXPORT int spin_lock(const FuserArgs* args, void* stream) {
    return launch(lock_and_count, 3, 64, 0, stream, tensor<int>(args, 0), tensor<volatile int>(args, 1));
}

// The last block to finish adds up what all have written.
__global__ void sum_in_last_block(const float* in, float* partial, int* finished, float* out, int n) {
    __shared__ bool last;
    float sum = 0.f;
    for (int i = blockIdx.x * 32 + threadIdx.x; i < n; i += gridDim.x * 32) sum += in[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomic_add_release(finished, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        sum = 0.f;
        for (int i = 0; i < int(gridDim.x); ++i) sum += __ldcg(partial + i);
        *out = sum;
    }
}
FUSER_EXPORT int last_block(const FuserArgs* args, void* stream) {
    if (int status = clear(args->tensors[2], 4, stream)) return status;
    return launch(sum_in_last_block, int(extents(args)[0]), 32, 0, stream, tensor<const float>(args, 0),
                  tensor<float>(args, 1), tensor<int>(args, 2), tensor<float>(args, 3), int(extents(args)[1]));
}

// Each block waits for the one before it.
__global__ void chain(int* flag, int* order) {
    if (threadIdx.x == 0) {
        while (load_acquire(flag) != int(blockIdx.x)) __nanosleep(50);
        order[blockIdx.x] = int(blockIdx.x) * 3;
        store_release(flag, int(blockIdx.x) + 1);
    }
}
FUSER_EXPORT int block_chain(const FuserArgs* args, void* stream) {
    return launch(chain, int(extents(args)[0]), 32, 0, stream, tensor<int>(args, 0), tensor<int>(args, 1));
}

// Tensor cores

template <typename T, typename D>
__device__ void multiply_own(const uint32_t* a, const uint32_t* b, D* d) {
    const int t = threadIdx.x;
    const uint32_t own_a[4] = {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, own_b[2] = {b[2 * t], b[2 * t + 1]};
    D own_d[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
    mma<T>(own_d, own_a, own_b);
    for (int i = 0; i < 4; ++i) d[4 * t + i] = own_d[i];
}
template <typename T, typename D>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, D* d) {
    multiply_own<T>(a, b, d);
}
#define FUSER_TEST_MMA(name, T, D)                                                                                  \
    FUSER_EXPORT int name(const FuserArgs* args, void* stream) {                                                     \
        return launch(multiply_fragments<T, D>, 1, 32, 0, stream, tensor<const uint32_t>(args, 0),                   \
                      tensor<const uint32_t>(args, 1), tensor<D>(args, 2));                                          \
    }
FUSER_TEST_MMA(mma_half, half, float)
FUSER_TEST_MMA(mma_bf16, bf16, float)
FUSER_TEST_MMA(mma_tf32, tf32, float)
FUSER_TEST_MMA(mma_int8, int8_t, int)
FUSER_TEST_MMA(mma_uint8, uint8_t, int)

// Older architectures have no fp8.
__global__ void multiply_fp8(const uint32_t* a, const uint32_t* b, float* d) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    multiply_own<e4m3>(a, b, d);
#endif
}
FUSER_EXPORT int mma_e4m3(const FuserArgs* args, void* stream) {
    return launch(multiply_fp8, 1, 32, 0, stream, tensor<const uint32_t>(args, 0), tensor<const uint32_t>(args, 1),
                  tensor<float>(args, 2));
}

__global__ void multiply_mixed(const uint32_t* a, const uint32_t* b, int* d) {
    const int t = threadIdx.x;
    const uint32_t own_a[4] = {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, own_b[2] = {b[2 * t], b[2 * t + 1]};
    int own_d[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
    mma_u8s8(own_d, own_a, own_b);
    for (int i = 0; i < 4; ++i) d[4 * t + i] = own_d[i];
}
FUSER_EXPORT int mma_mixed(const FuserArgs* args, void* stream) {
    return launch(multiply_mixed, 1, 32, 0, stream, tensor<const uint32_t>(args, 0), tensor<const uint32_t>(args, 1),
                  tensor<int>(args, 2));
}

// `offsets` says for each lane where the row that it names starts, in 16-bit values.
template <int N, bool TRANSPOSED>
__global__ void load_fragments(const uint16_t* in, int count, const int* offsets, uint32_t* out) {
    uint16_t* buffer = dynamic_shared<uint16_t>();
    for (int i = threadIdx.x; i < count; i += 32) buffer[i] = in[i];
    __syncwarp();
    uint32_t registers[N];
    if constexpr (TRANSPOSED) ldmatrix_trans(registers, buffer + offsets[threadIdx.x]);
    else ldmatrix(registers, buffer + offsets[threadIdx.x]);
    for (int i = 0; i < N; ++i) out[i * 32 + threadIdx.x] = registers[i];
}
#define FUSER_TEST_LDMATRIX(name, N, TRANSPOSED)                                                                    \
    FUSER_EXPORT int name(const FuserArgs* args, void* stream) {                                                     \
        const int count = int(extents(args)[0]);                                                                     \
        return launch(load_fragments<N, TRANSPOSED>, 1, 32, count * 2, stream, tensor<const uint16_t>(args, 0), count, \
                      tensor<const int>(args, 1), tensor<uint32_t>(args, 2));                                        \
    }
FUSER_TEST_LDMATRIX(ldmatrix_1, 1, false)
FUSER_TEST_LDMATRIX(ldmatrix_2, 2, false)
FUSER_TEST_LDMATRIX(ldmatrix_4, 4, false)
FUSER_TEST_LDMATRIX(ldmatrix_trans_1, 1, true)
FUSER_TEST_LDMATRIX(ldmatrix_trans_2, 2, true)
FUSER_TEST_LDMATRIX(ldmatrix_trans_4, 4, true)

// Asynchronous copies

template <int BYTES>
__global__ void copy_async(const uint8_t* in, uint8_t* out, int valid) {
    SharedAllocator smem;
    uint8_t* buffer = smem.take<uint8_t>(BYTES * 32);
    const int t = threadIdx.x;
    cp_async<BYTES>(buffer + t * BYTES, in + t * BYTES, valid);
    cp_async_wait_all();
    __syncthreads();
    for (int i = t; i < BYTES * 32; i += 32) out[i] = buffer[i];
}
FUSER_EXPORT int cp_async_4(const FuserArgs* args, void* stream) {
    return launch(copy_async<4>, 1, 32, 4 * 32, stream, tensor<const uint8_t>(args, 0), tensor<uint8_t>(args, 1),
                  int(extents(args)[0]));
}
FUSER_EXPORT int cp_async_8(const FuserArgs* args, void* stream) {
    return launch(copy_async<8>, 1, 32, 8 * 32, stream, tensor<const uint8_t>(args, 0), tensor<uint8_t>(args, 1),
                  int(extents(args)[0]));
}
FUSER_EXPORT int cp_async_16(const FuserArgs* args, void* stream) {
    return launch(copy_async<16>, 1, 32, 16 * 32, stream, tensor<const uint8_t>(args, 0), tensor<uint8_t>(args, 1),
                  int(extents(args)[0]));
}

// Three groups of copies; what is visible after waiting until 2, 1, 0 are left. Others are read too early on purpose:
// this kernel is for the emulator without checks, where copies never come early.
__global__ void watch_groups(const int* in, int* out) {
    __shared__ __align__(16) int buffer[3][32];
    const int t = threadIdx.x;
    const volatile int* seen = &buffer[0][0];
    for (int g = 0; g < 3; ++g) buffer[g][t] = -1;
    for (int g = 0; g < 3; ++g) {
        cp_async<4>(&buffer[g][t], in + g * 32 + t);
        cp_async_commit();
    }
    for (int g = 0; g < 3; ++g) out[g * 32 + t] = seen[g * 32 + t];
    cp_async_wait<2>();
    for (int g = 0; g < 3; ++g) out[96 + g * 32 + t] = seen[g * 32 + t];
    cp_async_wait<1>();
    for (int g = 0; g < 3; ++g) out[192 + g * 32 + t] = seen[g * 32 + t];
    cp_async_wait<0>();
    for (int g = 0; g < 3; ++g) out[288 + g * 32 + t] = seen[g * 32 + t];
}
FUSER_EXPORT int cp_async_groups(const FuserArgs* args, void* stream) {
    return launch(watch_groups, 1, 32, 0, stream, tensor<const int>(args, 0), tensor<int>(args, 1));
}

// Arithmetic

__global__ void apply_math(const float* x, float* out, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const float v = x[i], positive = fabsf(v) + 0.01f;
        const float results[] = {__expf(v),  device::exp2(v), __logf(positive), device::log2(positive), rsqrtf(positive),
                                 rcp(positive), __fdividef(v, positive), fmaf(v, v, v), erff(v), tanhf(v), device::tanh(v),
                                 expf(v), sqrtf(positive), __frcp_rn(positive), __saturatef(v), max(v, 0.f)};
        for (int k = 0; k < 16; ++k) out[size_t(k) * n + i] = results[k];
    }
}
FUSER_EXPORT int math(const FuserArgs* args, void* stream) {
    const int n = int(extents(args)[0]);
    return launch(apply_math, 2, 64, 0, stream, tensor<const float>(args, 0), tensor<float>(args, 1), n);
}

__global__ void convert_all(const float* x, int n, uint16_t* halves, uint16_t* bf16s, uint32_t* tf32s, uint32_t* packed) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        halves[i] = half(x[i]).bits;
        bf16s[i] = bf16(x[i]).bits;
        tf32s[i] = to_tf32(x[i]);
        packed[i] = pack<half>(x[i], x[n - 1 - i]);
        packed[n + i] = pack<bf16>(x[i], x[n - 1 - i]);
    }
}
__global__ void convert_fp8(const float* x, int n, uint8_t* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = e4m3(x[i]).bits;
#endif
}
FUSER_EXPORT int to_fp8(const FuserArgs* args, void* stream) {
    return launch(convert_fp8, 1, 64, 0, stream, tensor<const float>(args, 0), int(extents(args)[0]),
                  tensor<uint8_t>(args, 1));
}
FUSER_EXPORT int from_float(const FuserArgs* args, void* stream) {
    return launch(convert_all, 1, 64, 0, stream, tensor<const float>(args, 0), int(extents(args)[0]),
                  tensor<uint16_t>(args, 1), tensor<uint16_t>(args, 2), tensor<uint32_t>(args, 3), tensor<uint32_t>(args, 4));
}
__global__ void widen_all(float* halves, float* bf16s) {
    for (uint32_t bits = threadIdx.x; bits < 65536; bits += blockDim.x) {
        halves[bits] = unpack<half>(bits).x;
        bf16s[bits] = unpack<bf16>(bits << 16).y;
    }
}
FUSER_EXPORT int to_float(const FuserArgs* args, void* stream) {
    return launch(widen_all, 1, 64, 0, stream, tensor<float>(args, 0), tensor<float>(args, 1));
}

__global__ void count_bits(const uint32_t* x, const uint32_t* y, int64_t* out, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const uint32_t a = x[i], b = y[i];
        const unsigned long long both = static_cast<unsigned long long>(a) << 32 | b;
        const int64_t results[] = {__popc(a), __popcll(both), __clz(int(a)), __clzll(int64_t(both)), __ffs(int(a)),
                                   __ffsll(int64_t(both)), int64_t(__brev(a)), int64_t(__byte_perm(a, b, b & 0x7777)),
                                   int64_t(__umulhi(a, b)), int64_t(__funnelshift_l(a, b, b & 63)),
                                   int64_t(__funnelshift_r(a, b, a & 63)), __dp4a(int(a), int(b), 7),
                                   __float2int_rn(float(int(a)) * 1e-7f * float(int(b))), int64_t(__float_as_uint(__uint_as_float(a)))};
        for (int k = 0; k < 14; ++k) out[size_t(k) * n + i] = results[k];
    }
}
FUSER_EXPORT int integers(const FuserArgs* args, void* stream) {
    return launch(count_bits, 1, 64, 0, stream, tensor<const uint32_t>(args, 0), tensor<const uint32_t>(args, 1),
                  tensor<int64_t>(args, 2), int(extents(args)[0]));
}

// Launching

__global__ void describe_shared(uint64_t* out, int first, int second) {
    SharedAllocator smem;
    const auto* a = smem.take<uint8_t>(first);
    const auto* b = smem.take<float>(second, 128);
    if (threadIdx.x == 0) {
        out[0] = smem.bytes();
        out[1] = shared_address(a) % 16;
        out[2] = shared_address(b) % 128;
    }
}
FUSER_EXPORT int shared_arrays(const FuserArgs* args, void* stream) {
    const int64_t* e = extents(args);
    return launch(describe_shared, int(e[3]), int(e[4]), size_t(e[2]), stream, tensor<uint64_t>(args, 0), int(e[0]), int(e[1]));
}

// Every thread reads what it has not written, then writes it.
__global__ void read_unwritten(float* out) {
    __shared__ float fixed[32];
    float* dynamic = dynamic_shared<float>();
    const int t = threadIdx.x;
    const volatile float *a = fixed, *b = dynamic;
    out[(blockIdx.x * 2) * 32 + t] = a[t];
    out[(blockIdx.x * 2 + 1) * 32 + t] = b[t];
    fixed[t] = dynamic[t] = 1.f;
}
FUSER_EXPORT int unwritten(const FuserArgs* args, void* stream) {
    return launch(read_unwritten, 8, 32, 128, stream, tensor<float>(args, 0));
}

__global__ void say(int value) {
    const long long start = clock64();
    if (threadIdx.x == 3) printf("thread %d of block %d says %d (%d)\n", int(threadIdx.x), int(blockIdx.x), value,
                                 int(clock64() >= start));
}
FUSER_EXPORT int print(const FuserArgs* args, void* stream) {
    return launch(say, 1, 32, 0, stream, int(extents(args)[0]));
}

// A whole product, as templates do it: C = A B^T in tiles of 64 x 64, two stages of cp.async, ldmatrix and mma.
__global__ void __launch_bounds__(128) multiply_tiles(const half* a, const half* b, float* c, int m, int n, int k) {
    constexpr int PITCH = 40;
    SharedAllocator smem;
    half* as = smem.take<half>(2 * 64 * PITCH);
    half* bs = smem.take<half>(2 * 64 * PITCH);
    const int t = threadIdx.x, warp = warp_id(), lane = lane_id();
    const int row0 = blockIdx.y * 64, column0 = blockIdx.x * 64, steps = (k + 31) / 32;
    const auto load = [&](int step) {
        for (int i = t; i < 256; i += 128) {
            const int row = i / 4, at = step * 32 + i % 4 * 8, to = (step % 2 * 64 + row) * PITCH + i % 4 * 8;
            const int left = max(0, min(8, k - at)) * 2;
            const int a_bytes = row0 + row < m ? left : 0, b_bytes = column0 + row < n ? left : 0;
            cp_async<16>(as + to, a_bytes ? a + size_t(row0 + row) * k + at : a, a_bytes);
            cp_async<16>(bs + to, b_bytes ? b + size_t(column0 + row) * k + at : b, b_bytes);
        }
        cp_async_commit();
    };
    float sums[8][4] = {};
    load(0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) load(step + 1);
        if (step + 1 < steps) cp_async_wait<1>();
        else cp_async_wait<0>();
        __syncthreads();
        const half *stage_a = as + step % 2 * 64 * PITCH, *stage_b = bs + step % 2 * 64 * PITCH;
        for (int kk = 0; kk < 32; kk += 16) {
            uint32_t fragment_a[4];
            ldmatrix(fragment_a, stage_a + (warp * 16 + lane % 16) * PITCH + kk + lane / 16 * 8);
            for (int j = 0; j < 8; j += 2) {
                uint32_t pair[4];
                ldmatrix(pair, stage_b + (j * 8 + lane % 8 + lane / 16 * 8) * PITCH + kk + lane / 8 % 2 * 8);
                const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
                mma<half>(sums[j], fragment_a, first);
                mma<half>(sums[j + 1], fragment_a, second);
            }
        }
        __syncthreads();
    }
    for (int j = 0; j < 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int row = row0 + warp * 16 + lane / 4 + e / 2 * 8, column = column0 + j * 8 + lane % 4 * 2 + e % 2;
            if (row < m && column < n) c[size_t(row) * n + column] = sums[j][e];
        }
    }
}
FUSER_EXPORT int product(const FuserArgs* args, void* stream) {
    const int m = int(extents(args)[0]), n = int(extents(args)[1]), k = int(extents(args)[2]);
    return launch(multiply_tiles, dim3((n + 63) / 64, (m + 63) / 64), 128, 4 * 64 * 40 * 2, stream,
                  tensor<const half>(args, 0), tensor<const half>(args, 1), tensor<float>(args, 2), m, n, k);
}
