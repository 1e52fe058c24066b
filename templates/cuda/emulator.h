// The emulator: runs generated CUDA kernels on a CPU, so that they can be tested without a GPU.
//
// Every CUDA thread is a fiber; the fibers of a block take turns on one OS thread, blocks are spread over several.
// A fiber gives up its turn only where it must wait: at a barrier, or in a warp-wide operation until all lanes have
// come. The last lane to come carries the operation out for all of them.
//
// With -DFUSER_CHECKED and g++'s -fsanitize=thread,bounds-strict,alignment (compiler only, not its libraries), the
// compiler calls the emulator at every memory access; emulator_checks.h then looks for accesses outside of arrays and
// tensors and for races on shared memory. See runtime/emulator.py for how to build and run.
//
// Every kernel is compiled with this header and emulator_device.h, so what does not depend on the kernel is in
// emulator.cpp, which is compiled once. Half-precision instructions are written out: the compiler's headers for them
// take longer than most kernels.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__F16C__) && !defined(FUSER_EMULATOR_PORTABLE)
#define FUSER_EMULATOR_F16C
#endif

// FUSER_EMULATOR_PORTABLE: what other processors get, for tests.
#if defined(__x86_64__) && !defined(FUSER_EMULATOR_PORTABLE)
#define FUSER_EMULATOR_X86
#else
#include <ucontext.h>
#endif

// CUDA's keywords. Shared memory is per OS thread because a block runs on one.

#define __global__
#define __device__
#define __host__
#define __constant__
#ifdef FUSER_CHECKED
// A gap in front of every array, so that leaving one is noticed.
#define FUSER_JOIN_NAMES(a, b) a##b
#define FUSER_GAP(number) FUSER_JOIN_NAMES(fuser_gap_, number)
#define __shared__ static thread_local __attribute__((used)) char FUSER_GAP(__COUNTER__)[128]; static thread_local
#else
#define __shared__ static thread_local
#endif
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

// The emulator's own code is not instrumented: what it reads and writes for a kernel it reports itself.
#ifdef FUSER_CHECKED
#define FUSER_UNCHECKED __attribute__((no_sanitize("thread,bounds-strict,alignment")))
#else
#define FUSER_UNCHECKED
#endif

// CUDA's vector types

#define FUSER_VECTOR1_TO_4(type, name, align2, align4)                                                          \
    struct name##1 { type x; };                                                                                 \
    struct alignas(align2) name##2 { type x, y; };                                                              \
    struct name##3 { type x, y, z; };                                                                           \
    struct alignas(align4) name##4 { type x, y, z, w; };                                                        \
    constexpr name##1 make_##name##1(type x) { return {x}; }                                                    \
    constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }                                         \
    constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                              \
    constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FUSER_VECTOR1_TO_4(signed char, char, 2, 4)
FUSER_VECTOR1_TO_4(unsigned char, uchar, 2, 4)
FUSER_VECTOR1_TO_4(short, short, 4, 8)
FUSER_VECTOR1_TO_4(unsigned short, ushort, 4, 8)
FUSER_VECTOR1_TO_4(int, int, 8, 16)
FUSER_VECTOR1_TO_4(unsigned, uint, 8, 16)
FUSER_VECTOR1_TO_4(long long, longlong, 16, 16)
FUSER_VECTOR1_TO_4(unsigned long long, ulonglong, 16, 16)
FUSER_VECTOR1_TO_4(float, float, 8, 16)
FUSER_VECTOR1_TO_4(double, double, 16, 16)
#undef FUSER_VECTOR1_TO_4

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern "C" {

// What went wrong in a launch; `line` and `file` are null where only `address` (relative to the library) is known.
typedef struct {
    uint32_t block[3];
    uint32_t thread[3];
    uint64_t address;
    uint64_t other;  // the address of the access that this one collides with, or 0
    int32_t line;
    int32_t other_line;
    char file[512];
    char text[2048];
} FuserFault;

// What a launch was asked for, while launches are only listed; `function` is the kernel's mangled name.
typedef struct {
    uint32_t grid[3];
    uint32_t block[3];
    uint64_t shared_bytes;
    char function[4000];
} FuserLaunch;

}

namespace emulator {

constexpr int FAULT_STATUS = 900;  // kernels return 1000 + the number of a CUDA error
constexpr size_t STACK_BYTES = 96 << 10;
constexpr size_t GUARD_BYTES = 4 << 10;
constexpr size_t SHARED_LIMIT = 227 << 10;
constexpr size_t SHARED_MARGIN = 32 << 10;  // in front of shared memory and behind it, for accesses to be noticed
constexpr size_t SHARED_MAPPED = 2 * SHARED_LIMIT + 2 * SHARED_MARGIN;
constexpr size_t SIGNAL_STACK_BYTES = 64 << 10;
constexpr unsigned BLOCK_LIMIT = 1024;
constexpr int NAMED_BARRIERS = 16;
constexpr double POLL_SECONDS = 30;  // how long a kernel may poll global memory while nothing else happens

// The place in the kernel's source that calls a function with `Where where = here()` as its last parameter.
struct Where {
    const char* file;
    int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

enum class Access { read, write, atomic };

struct Warp;
struct Worker;

struct AsyncCopy {
    void* to;
    const void* from;
    int bytes, valid;
};

// Grows, and keeps its memory when cleared: fibers are reused for every block.
template <typename T>
struct List {
    static_assert(std::is_trivially_copyable<T>::value, "items are moved by realloc");
    T* items = nullptr;
    size_t count = 0, capacity = 0;
    List() = default;
    List(const List&) = delete;
    List& operator=(const List&) = delete;
    FUSER_UNCHECKED ~List() { std::free(items); }
    FUSER_UNCHECKED void push(const T& item) {
        if (count == capacity) {
            capacity = capacity ? capacity * 2 : 16;
            items = static_cast<T*>(std::realloc(items, capacity * sizeof(T)));
            if (items == nullptr) std::abort();
        }
        items[count++] = item;
    }
};

struct Fiber {
    void* stack_pointer;
#ifndef FUSER_EMULATOR_X86
    ucontext_t context;
#endif
    uint3 thread;
    unsigned index, lane;
    Warp* warp;
    Fiber* next;          // in the queue of fibers that can run
    bool done;
    const char* waits;    // for what, or null
    Where where;
    int result;           // of the barrier that it waited for
    List<AsyncCopy> copies;
    size_t copied;        // how many of them have been carried out
    List<size_t> groups;  // for each committed group: the number of copies up to its end
    size_t waited;        // how many groups have been waited for
};

// One warp-wide operation that some lanes have come to.
using Operation = void (*)(Warp& warp, uint32_t lanes);
struct Rendezvous {
    uint32_t mask, arrived;
    Operation operation;
    const char* name;
    Where where;
};

struct Warp {
    uint32_t live;
    Rendezvous pending[32];      // by the lowest lane of the mask
    const Rendezvous* carried_out;  // the one whose operation runs
    void* operands[32];
    Fiber* fibers;  // of lane 0; those of the other lanes follow
};

struct Barrier {
    int arrived, expected, count;
    const char* name;
    Where where;
    List<Fiber*> waiting;
};

struct BulkCopy {
    void* to;
    const void* from;
    int bytes;
    uint64_t* barrier;
};

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    void (*run)(const void* arguments);
    const void* arguments;
    size_t arguments_bytes;
    uint64_t next_block = 0;  // shared by workers, as is the next
    bool failed = false;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
    FuserFault fault{};
};

namespace checks {
struct Shadow;
}

struct Worker {
    Launch* launch = nullptr;
    uint3 block{};
    Fiber* current = nullptr;
    Fiber* first = nullptr;  // the queue of fibers that can run
    Fiber* last = nullptr;
    Fiber host{};  // the context that starts blocks
    Fiber* fibers = nullptr;
    Warp* warps = nullptr;
    const unsigned threads;
    unsigned live = 0;
    Barrier barriers[NAMED_BARRIERS];
    List<BulkCopy> bulk;
    char* stacks = nullptr;
    char* shared = nullptr;  // dynamic shared memory
    char* signal_stack = nullptr;
    uint64_t turns = 0;      // how often a fiber has got its turn
    bool finished = false;
    unsigned polls = 0;      // failed polls since anything else happened
    double polling_since = 0;
    int internal = 0;             // above 0 while a fiber runs code of the emulator that is instrumented
    checks::Shadow* shadow = nullptr;

    explicit Worker(unsigned count);
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;
};

inline thread_local Worker* worker = nullptr;

// Hooks of the checking mode (emulator_checks.h); empty otherwise.
namespace checks {
#ifdef FUSER_CHECKED
void begin_block(Worker& w);
void end(Worker& w);
void access(const void* pointer, size_t bytes, Access kind, Where where);
void begin_async(const void* pointer, size_t bytes, Where where);
void end_async(const void* pointer, size_t bytes, const Fiber* writer);
void order_warp(Warp& warp, uint32_t lanes);
void order_block(const List<Fiber*>& waiting, int barrier);
void arrive(Fiber& fiber, int barrier);
void arrive(Fiber& fiber, const void* mbarrier);
void publish(const void* mbarrier);
void acquire(Fiber& fiber, const void* mbarrier);
void take(const char* array, size_t bytes);
constexpr size_t GAP = 128;  // between arrays of dynamic shared memory, so that leaving one is noticed
#else
inline void begin_block(Worker&) {}
inline void end(Worker&) {}
inline void access(const void*, size_t, Access, Where) {}
inline void begin_async(const void*, size_t, Where) {}
inline void end_async(const void*, size_t, const Fiber*) {}
inline void order_warp(Warp&, uint32_t) {}
inline void order_block(const List<Fiber*>&, int) {}
inline void arrive(Fiber&, int) {}
inline void arrive(Fiber&, const void*) {}
inline void publish(const void*) {}
inline void acquire(Fiber&, const void*) {}
inline void take(const char*, size_t) {}
constexpr size_t GAP = 0;
#endif
}  // namespace checks

// Defined in emulator.cpp

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Where where, const char* format, ...);
double now();
void yield(Worker& w, Fiber& fiber);
void poll(Worker& w, Fiber& fiber, const char* waits, Where where);
void poll_global(Worker& w, Fiber& fiber, Where where);
void collective(uint32_t mask, void* operand, Operation operation, const char* name, Where where);
int arrive_at_barrier(int id, int expected, bool waits, bool predicate, const char* name, Where where);
bool only_lists();
int run(Launch& launch, const void* function);

FUSER_UNCHECKED inline Fiber& self() { return *worker->current; }
FUSER_UNCHECKED inline uint3 thread_index() { return worker->current->thread; }
FUSER_UNCHECKED inline uint3 block_index() { return worker->block; }
FUSER_UNCHECKED inline dim3 block_dim() { return worker->launch->block; }
FUSER_UNCHECKED inline dim3 grid_dim() { return worker->launch->grid; }

FUSER_UNCHECKED inline void progress(Worker& w) { w.polls = 0; }
FUSER_UNCHECKED inline void require_full_warp(const Warp& warp, uint32_t lanes) {
    if (lanes == 0xffffffffu) return;
    fail(warp.carried_out->where, "%s needs all 32 lanes of a warp, but only 0x%08x came", warp.carried_out->name, lanes);
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
constexpr int warpSize = 32;

#include "emulator_device.h"
