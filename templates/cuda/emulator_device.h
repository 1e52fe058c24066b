// The emulator's CUDA built-ins, and its implementation of the functions of device.cuh.
#pragma once

// Barriers of a block

FUSER_UNCHECKED inline void __syncthreads(emulator::Where where = emulator::here()) {
    emulator::arrive_at_barrier(0, 0, true, false, "__syncthreads", where);
}
FUSER_UNCHECKED inline int __syncthreads_count(int predicate, emulator::Where where = emulator::here()) {
    return emulator::arrive_at_barrier(0, 0, true, predicate != 0, "__syncthreads_count", where);
}
FUSER_UNCHECKED inline int __syncthreads_or(int predicate, emulator::Where where = emulator::here()) {
    return emulator::arrive_at_barrier(0, 0, true, predicate != 0, "__syncthreads_or", where) != 0;
}
FUSER_UNCHECKED inline int __syncthreads_and(int predicate, emulator::Where where = emulator::here()) {
    return emulator::arrive_at_barrier(0, 0, true, predicate == 0, "__syncthreads_and", where) == 0;
}
FUSER_UNCHECKED inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
inline void __threadfence_system() { __threadfence(); }

// Warps

namespace emulator {

template <typename In, typename Out>
struct Exchange {
    In in;
    int argument;  // the source lane, a distance, or nothing
    int width;
    Out out;
};

FUSER_UNCHECKED inline void sync_warp(Warp& warp, uint32_t lanes) { checks::order_warp(warp, lanes); }

enum class Shuffle { index, up, down, exclusive_or };

// A source that is not among the lanes gives poison.
template <Shuffle KIND, typename T>
FUSER_UNCHECKED void shuffle(Warp& warp, uint32_t lanes) {
    using Operand = Exchange<T, T>;
    for (uint32_t left = lanes; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        auto& mine = *static_cast<Operand*>(warp.operands[lane]);
        const int width = mine.width, base = lane & ~(width - 1), end = base + width;
        int source = lane;
        if (KIND == Shuffle::index) source = base + (mine.argument & (width - 1));
        if (KIND == Shuffle::up) source = lane - mine.argument >= base ? lane - mine.argument : lane;
        if (KIND == Shuffle::down) source = lane + mine.argument < end ? lane + mine.argument : lane;
        if (KIND == Shuffle::exclusive_or) source = (lane ^ mine.argument) < end ? lane ^ mine.argument : lane;
        if (lanes >> source & 1) mine.out = static_cast<Operand*>(warp.operands[source])->in;
        else std::memset(static_cast<void*>(&mine.out), 0xff, sizeof(T));
    }
}
template <Shuffle KIND, typename T>
FUSER_UNCHECKED T shuffle_lane(uint32_t mask, T value, int argument, int width, const char* name, Where where) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "shuffles are of 32-bit and 64-bit numbers");
    if (width < 1 || width > 32 || (width & (width - 1))) fail(where, "%s: the width %d is no power of two", name, width);
    Exchange<T, T> operand{value, argument, width, T()};
    collective(mask, &operand, shuffle<KIND, T>, name, where);
    return operand.out;
}

template <typename T>
FUSER_UNCHECKED void vote(Warp& warp, uint32_t lanes) {
    uint32_t ballot = 0;
    for (uint32_t left = lanes; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        if (static_cast<Exchange<T, uint32_t>*>(warp.operands[lane])->in) ballot |= 1u << lane;
    }
    for (uint32_t left = lanes; left; left &= left - 1) {
        static_cast<Exchange<T, uint32_t>*>(warp.operands[__builtin_ctz(left)])->out = ballot;
    }
}
FUSER_UNCHECKED inline uint32_t ballot(uint32_t mask, bool predicate, const char* name, Where where) {
    Exchange<bool, uint32_t> operand{predicate, 0, 0, 0};
    collective(mask, &operand, vote<bool>, name, where);
    return operand.out;
}

template <typename T>
FUSER_UNCHECKED void match(Warp& warp, uint32_t lanes) {
    using Operand = Exchange<T, uint32_t>;
    for (uint32_t left = lanes; left; left &= left - 1) {
        auto& mine = *static_cast<Operand*>(warp.operands[__builtin_ctz(left)]);
        mine.out = 0;
        for (uint32_t others = lanes; others; others &= others - 1) {
            const int other = __builtin_ctz(others);
            if (!std::memcmp(&static_cast<Operand*>(warp.operands[other])->in, &mine.in, sizeof(T))) {
                mine.out |= 1u << other;
            }
        }
    }
}
template <typename T>
FUSER_UNCHECKED uint32_t match_lane(uint32_t mask, T value, const char* name, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "matching compares 4 or 8 bytes");
    Exchange<T, uint32_t> operand{value, 0, 0, 0};
    collective(mask, &operand, match<T>, name, where);
    return operand.out;
}

struct Add { template <typename T> static T of(T a, T b) { return a + b; } };
struct Min { template <typename T> static T of(T a, T b) { return a < b ? a : b; } };
struct Max { template <typename T> static T of(T a, T b) { return a > b ? a : b; } };
struct And { template <typename T> static T of(T a, T b) { return a & b; } };
struct Or { template <typename T> static T of(T a, T b) { return a | b; } };
struct Xor { template <typename T> static T of(T a, T b) { return a ^ b; } };

template <typename F, typename T>
FUSER_UNCHECKED void reduce(Warp& warp, uint32_t lanes) {
    using Operand = Exchange<T, T>;
    T total = static_cast<Operand*>(warp.operands[__builtin_ctz(lanes)])->in;
    for (uint32_t left = lanes & (lanes - 1); left; left &= left - 1) {
        total = F::of(total, static_cast<Operand*>(warp.operands[__builtin_ctz(left)])->in);
    }
    for (uint32_t left = lanes; left; left &= left - 1) {
        static_cast<Operand*>(warp.operands[__builtin_ctz(left)])->out = total;
    }
}
template <typename F, typename T>
FUSER_UNCHECKED T reduce_lane(uint32_t mask, T value, const char* name, Where where) {
    static_assert(std::is_integral<T>::value && sizeof(T) == 4, "warp reductions are of 32-bit integers");
    Exchange<T, T> operand{value, 0, 0, 0};
    collective(mask, &operand, reduce<F, T>, name, where);
    return operand.out;
}

}  // namespace emulator

FUSER_UNCHECKED inline void __syncwarp(uint32_t mask = 0xffffffffu, emulator::Where where = emulator::here()) {
    emulator::collective(mask, nullptr, emulator::sync_warp, "__syncwarp", where);
}
FUSER_UNCHECKED inline uint32_t __activemask() { return 1u << emulator::self().lane; }

#define FUSER_SHUFFLE(name, kind)                                                                                    \
    template <typename T>                                                                                            \
    FUSER_UNCHECKED T name(uint32_t mask, T value, int argument, int width = 32,                                     \
                           emulator::Where where = emulator::here()) {                                               \
        return emulator::shuffle_lane<emulator::Shuffle::kind>(mask, value, argument, width, #name, where);          \
    }
FUSER_SHUFFLE(__shfl_sync, index)
FUSER_SHUFFLE(__shfl_up_sync, up)
FUSER_SHUFFLE(__shfl_down_sync, down)
FUSER_SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef FUSER_SHUFFLE

FUSER_UNCHECKED inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Where where = emulator::here()) {
    return emulator::ballot(mask, predicate != 0, "__ballot_sync", where);
}
FUSER_UNCHECKED inline int __any_sync(uint32_t mask, int predicate, emulator::Where where = emulator::here()) {
    return emulator::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}
FUSER_UNCHECKED inline int __all_sync(uint32_t mask, int predicate, emulator::Where where = emulator::here()) {
    return emulator::ballot(mask, predicate == 0, "__all_sync", where) == 0;
}
template <typename T>
FUSER_UNCHECKED uint32_t __match_any_sync(uint32_t mask, T value, emulator::Where where = emulator::here()) {
    return emulator::match_lane(mask, value, "__match_any_sync", where);
}
template <typename T>
FUSER_UNCHECKED uint32_t __match_all_sync(uint32_t mask, T value, int* all, emulator::Where where = emulator::here()) {
    const uint32_t same = emulator::match_lane(mask, value, "__match_all_sync", where);
    *all = same == (mask & emulator::self().warp->live);
    return *all ? same : 0;
}

#define FUSER_REDUCE(name, F)                                                                                        \
    template <typename T>                                                                                            \
    FUSER_UNCHECKED T name(uint32_t mask, T value, emulator::Where where = emulator::here()) {                       \
        return emulator::reduce_lane<emulator::F>(mask, value, #name, where);                                        \
    }
FUSER_REDUCE(__reduce_add_sync, Add)
FUSER_REDUCE(__reduce_min_sync, Min)
FUSER_REDUCE(__reduce_max_sync, Max)
FUSER_REDUCE(__reduce_and_sync, And)
FUSER_REDUCE(__reduce_or_sync, Or)
FUSER_REDUCE(__reduce_xor_sync, Xor)
#undef FUSER_REDUCE

// Atomics

namespace emulator {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>;

// Replaces the value by change(value), and returns what it was.
template <typename T, typename F>
FUSER_UNCHECKED T update(T* pointer, Where where, F change) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");
    if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) {
        fail(where, "atomic operation at address %p, which is not a multiple of %zu", static_cast<void*>(pointer), sizeof(T));
    }
    checks::access(pointer, sizeof(T), Access::atomic, where);
    progress(*worker);
    auto* word = reinterpret_cast<Bits<T>*>(pointer);
    Bits<T> before = __atomic_load_n(word, __ATOMIC_SEQ_CST), after;
    T old;
    do {
        std::memcpy(&old, &before, sizeof(T));
        const T value = change(old);
        std::memcpy(&after, &value, sizeof(T));
    } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

}  // namespace emulator

#define FUSER_ATOMIC(name, expression)                                                                               \
    template <typename T>                                                                                            \
    FUSER_UNCHECKED T name(T* pointer, std::common_type_t<T> value, emulator::Where where = emulator::here()) {      \
        return emulator::update(pointer, where, [value](T old) FUSER_UNCHECKED -> T { return expression; });         \
    }
FUSER_ATOMIC(atomicAdd, old + value)
FUSER_ATOMIC(atomicSub, old - value)
FUSER_ATOMIC(atomicMin, value < old ? value : old)
FUSER_ATOMIC(atomicMax, value > old ? value : old)
FUSER_ATOMIC(atomicAnd, old & value)
FUSER_ATOMIC(atomicOr, old | value)
FUSER_ATOMIC(atomicXor, old ^ value)
FUSER_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
FUSER_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef FUSER_ATOMIC

// Kernels spin on these two, so other threads get a turn after each.
template <typename T>
FUSER_UNCHECKED T atomicExch(T* pointer, std::common_type_t<T> value, emulator::Where where = emulator::here()) {
    const T before = emulator::update(pointer, where, [value](T) FUSER_UNCHECKED -> T { return value; });
    emulator::yield(*emulator::worker, emulator::self());
    return before;
}
template <typename T>
FUSER_UNCHECKED T atomicCAS(T* pointer, std::common_type_t<T> compare, std::common_type_t<T> value,
                            emulator::Where where = emulator::here()) {
    const T before = emulator::update(
        pointer, where, [compare, value](T old) FUSER_UNCHECKED -> T { return old == compare ? value : old; });
    if (before != compare) emulator::yield(*emulator::worker, emulator::self());
    return before;
}

// Arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<T>::value) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<T>::value) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}

namespace emulator {
template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of the same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulator

inline uint32_t __float_as_uint(float x) { return emulator::bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_as<double>(x); }

namespace emulator {
// Conversions saturate, and NaN becomes 0.
template <typename T>
inline T saturate(double x) {
    if (std::isnan(x)) return 0;
    const double low = double(std::numeric_limits<T>::min()), high = double(std::numeric_limits<T>::max());
    return x <= low ? std::numeric_limits<T>::min() : x >= high ? std::numeric_limits<T>::max() : T(x);
}
}  // namespace emulator
inline int __float2int_rn(float x) { return emulator::saturate<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulator::saturate<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return emulator::saturate<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulator::saturate<int>(std::ceil(x)); }
inline uint32_t __float2uint_rn(float x) { return emulator::saturate<uint32_t>(std::nearbyint(x)); }
inline uint32_t __float2uint_rz(float x) { return emulator::saturate<uint32_t>(std::trunc(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(uint32_t x) { return float(x); }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(uint32_t(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline uint32_t __brev(uint32_t x) {
    uint32_t y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = selector >> 4 * i & 15;
        uint32_t byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint64_t(x) * y >> 32; }
inline int __mulhi(int x, int y) { return int(int64_t(x) * y >> 32); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return sum;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
    for (int i = 0; i < 4; ++i) sum += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return sum;
}

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
// Never contracted to a fused multiply-add, as in CUDA.
inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }
inline float __fadd_rn(float x, float y) { volatile float z = x + y; return z; }
inline float __fsub_rn(float x, float y) { volatile float z = x - y; return z; }

// The C library declares some of these names itself. The product is rounded to float, as on a GPU.
namespace emulator {
inline float fast_exp(float x) { return exp2f(x * 1.4426950408889634f); }
inline float fast_exp10(float x) { return exp2f(x * 3.3219280948873623f); }
inline float fast_log(float x) { return log2f(x) * 0.6931471805599453f; }
inline float fast_log10(float x) { return log2f(x) * 0.3010299956639812f; }
inline float fast_pow(float x, float y) { return exp2f(y * log2f(x)); }
}  // namespace emulator
#define __expf(x) ::emulator::fast_exp(x)
#define __exp10f(x) ::emulator::fast_exp10(x)
#define __logf(x) ::emulator::fast_log(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::emulator::fast_log10(x)
#define __powf(x, y) ::emulator::fast_pow(x, y)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)

// Loads and stores that choose a cache
template <typename T> inline __attribute__((always_inline)) T __ldg(const T* pointer) { return *pointer; }
template <typename T> inline __attribute__((always_inline)) T __ldcs(const T* pointer) { return *pointer; }
template <typename T> inline __attribute__((always_inline)) T __ldcg(const T* pointer) { return *pointer; }
template <typename T> inline __attribute__((always_inline)) T __ldca(const T* pointer) { return *pointer; }
template <typename T> inline __attribute__((always_inline)) T __ldlu(const T* pointer) { return *pointer; }
template <typename T> inline __attribute__((always_inline)) void __stcs(T* pointer, T value) { *pointer = value; }
template <typename T> inline __attribute__((always_inline)) void __stcg(T* pointer, T value) { *pointer = value; }
template <typename T> inline __attribute__((always_inline)) void __stwb(T* pointer, T value) { *pointer = value; }

inline long long clock64() { return static_cast<long long>(1e9 * emulator::now()); }
FUSER_UNCHECKED inline void __nanosleep(unsigned) {
    emulator::poll_global(*emulator::worker, emulator::self(), {nullptr, 0});
}
[[noreturn]] FUSER_UNCHECKED inline void __trap(emulator::Where where = emulator::here()) {
    emulator::fail(where, "the kernel called __trap");
}

namespace device {

using emulator::Access;
using emulator::here;
using emulator::Where;

// 16-bit floating point

namespace conversions {
inline float half_to_float(uint16_t bits) {
#ifdef FUSER_EMULATOR_F16C
    float value;
    asm("vmovd %1, %0\n\tvcvtph2ps %0, %0" : "=x"(value) : "r"(uint32_t(bits)));
    return value;
#else
    // The exponent is moved by a multiplication, which also normalizes subnormal numbers.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
    const uint32_t scaled = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    return __uint_as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
#endif
}
inline uint16_t float_to_half(float value) {
#ifdef FUSER_EMULATOR_F16C
    uint32_t bits;
    asm("vcvtps2ph $0, %1, %1\n\tvmovd %1, %0" : "=r"(bits), "+x"(value));
    return uint16_t(bits);
#else
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // from 65520 on
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the lowest bits.
        return uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
#endif
}
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float e4m3_to_float(uint8_t bits) {
    const uint32_t sign = uint32_t(bits & 0x80) << 24, magnitude = uint32_t(bits & 0x7f) << 20;
    if (magnitude == 0x07f00000u) return __uint_as_float(sign | 0x7fc00000u);
    if (magnitude < 0x00800000u) return __uint_as_float(sign | __float_as_uint(float(bits & 0x7f) * 0x1p-9f));
    return __uint_as_float(sign | (magnitude + 0x3c000000u));
}
inline uint8_t float_to_e4m3(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7e);  // from 448 on
    if (magnitude < 0x3c800000u) {
        // Subnormal: adding 2^14 leaves the rounded multiple of 2^-9 in the lowest bits.
        return uint8_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0x1p14f) - 0x46800000u));
    }
    const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    return uint8_t(sign | ((rounded - 0x3c000000u) >> 20));
}
}  // namespace conversions

struct half {
    uint16_t bits;
    half() = default;
    inline explicit half(float value) : bits(conversions::float_to_half(value)) {}
    inline operator float() const { return conversions::half_to_float(bits); }
};
struct bf16 {
    uint16_t bits;
    bf16() = default;
    inline explicit bf16(float value) : bits(conversions::float_to_bf16(value)) {}
    inline operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct e4m3 {
    uint8_t bits;
    e4m3() = default;
    inline explicit e4m3(float value) : bits(conversions::float_to_e4m3(value)) {}
};
struct tf32;

inline uint32_t pack_half(float low, float high) { return half(low).bits | uint32_t(half(high).bits) << 16; }
inline uint32_t pack_bf16(float low, float high) { return bf16(low).bits | uint32_t(bf16(high).bits) << 16; }
inline uint32_t to_tf32(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000u) return 0x7fffffff;
    if ((bits & 0x7fffffff) == 0x7f800000u) return bits;
    return (bits + 0x1000) & ~0x1fffu;  // to nearest, ties away from zero
}

// Tensor cores. Products are exact; sums are of fp32, in the order of k.

namespace matrix {

template <typename D>
struct Operands {
    D (*d)[4];
    const uint32_t* a;
    const uint32_t* b;
};

typedef float Floats __attribute__((vector_size(32)));
typedef int Ints __attribute__((vector_size(32)));

// The elements of a register: how many, and their values.
template <typename T> struct Element;
template <> struct Element<half> {
    static constexpr int count = 2;
    using Sum = float;
    using Row = Floats;
    static float at(uint32_t word, int i) { return conversions::half_to_float(uint16_t(word >> 16 * i)); }
};
template <> struct Element<bf16> {
    static constexpr int count = 2;
    using Sum = float;
    using Row = Floats;
    static float at(uint32_t word, int i) { return __uint_as_float(i ? word & 0xffff0000u : word << 16); }
};
template <> struct Element<e4m3> {
    static constexpr int count = 4;
    using Sum = float;
    using Row = Floats;
    static float at(uint32_t word, int i) { return conversions::e4m3_to_float(uint8_t(word >> 8 * i)); }
};
template <> struct Element<tf32> {
    static constexpr int count = 1;
    using Sum = float;
    using Row = Floats;
    static float at(uint32_t word, int) { return __uint_as_float(word & ~0x1fffu); }  // the hardware ignores 13 bits
};
template <> struct Element<int8_t> {
    static constexpr int count = 4;
    using Sum = int;
    using Row = Ints;
    static int at(uint32_t word, int i) { return int8_t(word >> 8 * i); }
};
template <> struct Element<uint8_t> {
    static constexpr int count = 4;
    using Sum = int;
    using Row = Ints;
    static int at(uint32_t word, int i) { return uint8_t(word >> 8 * i); }
};

// m16n8k(8 registers' elements): lane 4 g + t holds rows g and g + 8 of a, column g of b, and of d the columns 2 t and
// 2 t + 1 of rows g and g + 8; along k it holds elements t * count ... of the first and of the second half.
template <typename A, typename B>
FUSER_UNCHECKED void multiply(emulator::Warp& warp, uint32_t lanes) {
    using Sum = typename Element<A>::Sum;
    using Row = typename Element<A>::Row;
    constexpr int COUNT = Element<A>::count, K = 8 * COUNT;
    emulator::require_full_warp(warp, lanes);
    Sum a[16][K], b[K][8];
    Row d[16];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<const Operands<Sum>*>(warp.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < COUNT; ++i) {
            const int low = t * COUNT + i, high = low + K / 2;
            a[g][low] = Element<A>::at(own.a[0], i);
            a[g + 8][low] = Element<A>::at(own.a[1], i);
            a[g][high] = Element<A>::at(own.a[2], i);
            a[g + 8][high] = Element<A>::at(own.a[3], i);
            b[low][g] = Element<B>::at(own.b[0], i);
            b[high][g] = Element<B>::at(own.b[1], i);
        }
        d[g][2 * t] = (*own.d)[0], d[g][2 * t + 1] = (*own.d)[1];
        d[g + 8][2 * t] = (*own.d)[2], d[g + 8][2 * t + 1] = (*own.d)[3];
    }
    Row columns[K];
    std::memcpy(columns, b, sizeof b);
    for (int row = 0; row < 16; ++row) {
        Row sum = d[row];
        for (int k = 0; k < K; ++k) sum += a[row][k] * columns[k];
        d[row] = sum;
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<const Operands<Sum>*>(warp.operands[lane]);
        const int g = lane / 4, t = lane % 4;
        (*own.d)[0] = d[g][2 * t], (*own.d)[1] = d[g][2 * t + 1];
        (*own.d)[2] = d[g + 8][2 * t], (*own.d)[3] = d[g + 8][2 * t + 1];
    }
}

extern template void multiply<half, half>(emulator::Warp&, uint32_t);
extern template void multiply<bf16, bf16>(emulator::Warp&, uint32_t);
extern template void multiply<e4m3, e4m3>(emulator::Warp&, uint32_t);
extern template void multiply<tf32, tf32>(emulator::Warp&, uint32_t);
extern template void multiply<int8_t, int8_t>(emulator::Warp&, uint32_t);
extern template void multiply<uint8_t, uint8_t>(emulator::Warp&, uint32_t);
extern template void multiply<uint8_t, int8_t>(emulator::Warp&, uint32_t);

template <typename A, typename B, typename D>
FUSER_UNCHECKED void multiply_lane(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
    Operands<D> operands{&d, a, b};
    emulator::collective(0xffffffffu, &operands, multiply<A, B>, "mma", where);
}

}  // namespace matrix

template <typename T>
FUSER_UNCHECKED void mma(typename matrix::Element<T>::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Where where = here()) {
    matrix::multiply_lane<T, T>(d, a, b, where);
}
FUSER_UNCHECKED inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     Where where = here()) {
    matrix::multiply_lane<uint8_t, int8_t>(d, a, b, where);
}

// Shared memory

FUSER_UNCHECKED inline uint32_t shared_address(const void* pointer) {
    return uint32_t(static_cast<const char*>(pointer) - emulator::worker->shared);
}
template <typename T>
FUSER_UNCHECKED T* dynamic_shared() {
    return reinterpret_cast<T*>(emulator::worker->shared);
}

class SharedAllocator {
  public:
    template <typename T>
    FUSER_UNCHECKED T* take(size_t count, size_t align = 16, Where where = here()) {
        const size_t padded = (used_ + align - 1) / align * align;
        shift_ += emulator::checks::GAP;
        const size_t bytes = count * sizeof(T), launched = emulator::worker->launch->shared_bytes;
        if (align > 128 || (align & (align - 1))) emulator::fail(where, "an array cannot be aligned to %zu bytes", align);
        if (bytes > launched || padded > launched - bytes) {
            emulator::fail(where, "shared memory: an array of %zu bytes behind %zu others; the kernel was launched with %zu",
                           bytes, padded, launched);
        }
        used_ = padded + bytes;
        char* array = emulator::worker->shared + padded + shift_;
        emulator::checks::take(array, bytes);
        return reinterpret_cast<T*>(array);
    }
    size_t bytes() const { return used_; }

  private:
    size_t used_ = 0, shift_ = 0;
};

namespace matrix {

template <int N>
struct Rows {
    const char* row;
    uint32_t* registers;
};
template <int N, bool TRANSPOSED>
FUSER_UNCHECKED void load(emulator::Warp& warp, uint32_t lanes) {
    emulator::require_full_warp(warp, lanes);
    for (int m = 0; m < N; ++m) {
        uint16_t values[8][8];
        for (int i = 0; i < 8; ++i) {
            std::memcpy(values[i], static_cast<Rows<N>*>(warp.operands[8 * m + i])->row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const uint16_t low = TRANSPOSED ? values[t][g] : values[g][t];
            const uint16_t high = TRANSPOSED ? values[t + 1][g] : values[g][t + 1];
            static_cast<Rows<N>*>(warp.operands[lane])->registers[m] = low | uint32_t(high) << 16;
        }
    }
}
template <int N, bool TRANSPOSED>
FUSER_UNCHECKED void load_lane(uint32_t* registers, const void* row, Where where) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    if (emulator::self().lane < 8 * N) {
        if (reinterpret_cast<uintptr_t>(row) % 16) {
            emulator::fail(where, "ldmatrix: the row at %p is not aligned to 16 bytes", row);
        }
        emulator::checks::access(row, 16, Access::read, where);
    }
    Rows<N> operand{static_cast<const char*>(row), registers};
    emulator::collective(0xffffffffu, &operand, load<N, TRANSPOSED>, TRANSPOSED ? "ldmatrix_trans" : "ldmatrix", where);
}

}  // namespace matrix

template <int N>
FUSER_UNCHECKED void ldmatrix(uint32_t (&r)[N], const void* row, Where where = here()) {
    matrix::load_lane<N, false>(r, row, where);
}
template <int N>
FUSER_UNCHECKED void ldmatrix_trans(uint32_t (&r)[N], const void* row, Where where = here()) {
    matrix::load_lane<N, true>(r, row, where);
}

// Asynchronous copies: carried out when they are waited for, not before.

template <int BYTES>
FUSER_UNCHECKED void cp_async(void* shared, const void* global, int valid = BYTES, Where where = here()) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if (valid < 0 || valid > BYTES) emulator::fail(where, "cp.async: %d valid bytes of %d", valid, BYTES);
    if (reinterpret_cast<uintptr_t>(shared) % BYTES || reinterpret_cast<uintptr_t>(global) % BYTES) {
        emulator::fail(where, "cp.async: %p or %p is not aligned to %d bytes", shared, global, BYTES);
    }
    if (valid) emulator::checks::access(global, valid, Access::read, where);
    emulator::checks::begin_async(shared, BYTES, where);
    emulator::self().copies.push({shared, global, BYTES, valid});
}

namespace copies {
FUSER_UNCHECKED inline void finish(emulator::Fiber& fiber, size_t end) {
    for (; fiber.copied < end; ++fiber.copied) {
        const emulator::AsyncCopy& copy = fiber.copies.items[fiber.copied];
        std::memcpy(copy.to, copy.from, copy.valid);
        std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
        emulator::checks::end_async(copy.to, copy.bytes, &fiber);
    }
    if (fiber.copied == fiber.copies.count) fiber.copied = fiber.copies.count = fiber.groups.count = fiber.waited = 0;
}
}  // namespace copies

FUSER_UNCHECKED inline void cp_async_commit() {
    emulator::Fiber& fiber = emulator::self();
    fiber.groups.push(fiber.copies.count);
}
template <int PENDING>
FUSER_UNCHECKED void cp_async_wait() {
    emulator::Fiber& fiber = emulator::self();
    size_t end = fiber.copied;
    for (; fiber.waited + PENDING < fiber.groups.count; ++fiber.waited) end = fiber.groups.items[fiber.waited];
    copies::finish(fiber, end);
}
FUSER_UNCHECKED inline void cp_async_wait_all() {
    emulator::Fiber& fiber = emulator::self();
    fiber.waited = fiber.groups.count;
    copies::finish(fiber, fiber.copies.count);
}

// Barriers

FUSER_UNCHECKED inline void barrier_sync(int id, int threads, Where where = here()) {
    emulator::arrive_at_barrier(id, threads, true, false, "barrier_sync", where);
}
FUSER_UNCHECKED inline void barrier_arrive(int id, int threads, Where where = here()) {
    emulator::arrive_at_barrier(id, threads, false, false, "barrier_arrive", where);
}

namespace barriers {

// The state of an mbarrier, in the 8 bytes that the kernel gives it.
struct State {
    uint64_t pending : 20, expected : 20, phase : 1, valid : 1;
    int64_t bytes : 22;
};
static_assert(sizeof(State) == 8, "an mbarrier has 8 bytes");

FUSER_UNCHECKED inline State get(const uint64_t* barrier, const char* name, Where where) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8) emulator::fail(where, "%s: an mbarrier is aligned to 8 bytes", name);
    State state;
    std::memcpy(&state, barrier, 8);
    if (!state.valid || state.expected == 0 || state.expected == 0xfffff) {
        emulator::fail(where, "%s: the mbarrier at offset %u is not initialized", name, shared_address(barrier));
    }
    return state;
}
FUSER_UNCHECKED inline void set(uint64_t* barrier, State state) {
    if (state.pending == 0 && state.bytes == 0) {
        state.phase ^= 1, state.pending = state.expected;
        emulator::checks::publish(barrier);
    }
    std::memcpy(barrier, &state, 8);
    emulator::progress(*emulator::worker);
}
FUSER_UNCHECKED inline void arrive(uint64_t* barrier, int bytes, const char* name, Where where) {
    State state = get(barrier, name, where);
    if (state.pending == 0) emulator::fail(where, "%s: more arrivals than the %d expected", name, int(state.expected));
    --state.pending;
    state.bytes += bytes;
    emulator::checks::arrive(emulator::self(), barrier);
    set(barrier, state);
}
// Bulk copies take effect when someone looks at their barrier.
FUSER_UNCHECKED inline void deliver(uint64_t* barrier, Where where) {
    emulator::List<emulator::BulkCopy>& bulk = emulator::worker->bulk;
    size_t kept = 0;
    for (size_t i = 0; i < bulk.count; ++i) {
        const emulator::BulkCopy copy = bulk.items[i];
        if (copy.barrier != barrier) {
            bulk.items[kept++] = copy;
            continue;
        }
        std::memcpy(copy.to, copy.from, copy.bytes);
        emulator::checks::end_async(copy.to, copy.bytes, nullptr);
        State state = get(barrier, "bulk_load", where);
        state.bytes -= copy.bytes;
        set(barrier, state);
    }
    bulk.count = kept;
}

}  // namespace barriers

FUSER_UNCHECKED inline void mbarrier_init(uint64_t* barrier, int count, Where where = here()) {
    if (count < 1 || count >= 0xfffff) emulator::fail(where, "mbarrier_init: a count of %d", count);
    emulator::checks::access(barrier, 8, Access::write, where);
    barriers::State state{uint64_t(count), uint64_t(count), 0, 1, 0};
    std::memcpy(barrier, &state, 8);
}
FUSER_UNCHECKED inline void mbarrier_inval(uint64_t* barrier, Where where = here()) {
    barriers::get(barrier, "mbarrier_inval", where);
    emulator::checks::access(barrier, 8, Access::write, where);
    std::memset(barrier, 0, 8);
}
FUSER_UNCHECKED inline void mbarrier_arrive(uint64_t* barrier, Where where = here()) {
    emulator::checks::access(barrier, 8, Access::atomic, where);
    barriers::arrive(barrier, 0, "mbarrier_arrive", where);
}
FUSER_UNCHECKED inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Where where = here()) {
    emulator::checks::access(barrier, 8, Access::atomic, where);
    barriers::arrive(barrier, bytes, "mbarrier_arrive_expect_tx", where);
}
FUSER_UNCHECKED inline bool mbarrier_try_wait(uint64_t* barrier, int parity, Where where = here()) {
    emulator::checks::access(barrier, 8, Access::atomic, where);
    barriers::deliver(barrier, where);
    if (barriers::get(barrier, "mbarrier_try_wait", where).phase != unsigned(parity & 1)) {
        emulator::checks::acquire(emulator::self(), barrier);
        return true;
    }
    emulator::poll(*emulator::worker, emulator::self(), "the phase of an mbarrier", where);
    return false;
}
FUSER_UNCHECKED inline void mbarrier_wait(uint64_t* barrier, int parity, Where where = here()) {
    while (!mbarrier_try_wait(barrier, parity, where)) {
    }
}
FUSER_UNCHECKED inline void cp_async_mbarrier_arrive(uint64_t* barrier, Where where = here()) {
    cp_async_wait_all();
    emulator::checks::access(barrier, 8, Access::atomic, where);
    barriers::arrive(barrier, 0, "cp_async_mbarrier_arrive", where);
}
inline void fence_mbarrier_init() {}
FUSER_UNCHECKED inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier,
                                      Where where = here()) {
    if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 ||
        reinterpret_cast<uintptr_t>(global) % 16) {
        emulator::fail(where, "bulk_load: %p, %p and %d bytes must be multiples of 16", shared, global, bytes);
    }
    barriers::get(barrier, "bulk_load", where);
    emulator::checks::access(global, bytes, Access::read, where);
    emulator::checks::begin_async(shared, bytes, where);
    emulator::checks::arrive(emulator::self(), barrier);  // who has waited for the barrier may read what was copied
    emulator::worker->bulk.push({shared, global, bytes, barrier});
}

// Memory order between blocks

FUSER_UNCHECKED inline int load_acquire(const int* pointer, Where where = here()) {
    emulator::checks::access(pointer, 4, Access::atomic, where);
    const int value = __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
    emulator::poll_global(*emulator::worker, emulator::self(), where);
    return value;
}
FUSER_UNCHECKED inline void store_release(int* pointer, int value, Where where = here()) {
    emulator::checks::access(pointer, 4, Access::atomic, where);
    emulator::progress(*emulator::worker);
    __atomic_store_n(pointer, value, __ATOMIC_RELEASE);
}
FUSER_UNCHECKED inline int atomic_add_release(int* pointer, int value, Where where = here()) {
    return emulator::update(pointer, where, [value](int old) FUSER_UNCHECKED { return old + value; });
}

// Fast math; denormal numbers count as zero where the instruction says so

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? copysignf(0.f, x) : x; }
inline float exp2(float x) { return flush(exp2f(flush(x))); }
inline float log2(float x) { return flush(log2f(flush(x))); }
inline float rcp(float x) { return flush(1.f / flush(x)); }
inline float tanh(float x) { return tanhf(x); }

// Host side

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
    const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
    emulator::Launch one;
    one.grid = grid, one.block = block, one.shared_bytes = shared_bytes;
    one.arguments = &call, one.arguments_bytes = sizeof call;
    one.run = [](const void* data) FUSER_UNCHECKED {
        const Call& own = *static_cast<const Call*>(data);
        std::apply(own.first, own.second);
    };
    return emulator::run(one, reinterpret_cast<const void*>(kernel));
}
inline int multiprocessors() { return 4; }
template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, size_t) {
    return 2;
}
inline int clear(void* pointer, size_t bytes, void*) {
    if (!emulator::only_lists()) std::memset(pointer, 0, bytes);
    return 0;
}

}  // namespace device
