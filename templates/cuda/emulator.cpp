// The emulator's own code, which is the same for all kernels: compiled once for a compiler and its flags, and linked
// with every kernel (runtime/emulator.py).
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <memory>
#include <vector>

#include "device.cuh"  // after the system's headers: CUDA's keywords are macros there

namespace emulator {

class Lock {
  public:
    FUSER_UNCHECKED explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
    FUSER_UNCHECKED ~Lock() { pthread_mutex_unlock(&mutex_); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

  private:
    pthread_mutex_t& mutex_;
};

// Seconds of a clock that only goes forward.
FUSER_UNCHECKED double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

// An array that a kernel declares __shared__, in the thread-local memory of this library.
struct StaticArray {
    size_t offset, bytes;
    const char* name;  // mangled
};

// Context switches

#ifdef FUSER_EMULATOR_X86
extern "C" void fuser_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden fuser_emulator_switch
.globl fuser_emulator_switch
.type fuser_emulator_switch, @function
fuser_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fuser_emulator_switch, .-fuser_emulator_switch
.popsection
)");
FUSER_UNCHECKED inline void switch_fiber(Fiber& from, Fiber& to) {
    fuser_emulator_switch(&from.stack_pointer, to.stack_pointer);
}
FUSER_UNCHECKED inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    // Fibers run in step: unless their frames start at different lines of a page, they fall into the same cache sets.
    auto** top = reinterpret_cast<void**>(stack + STACK_BYTES - (fiber.index % 64) * 64);
    *--top = nullptr;  // the return address of `entry`, which never returns; keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}
#else
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES - (fiber.index % 64) * 64;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
#endif

inline Worker::Worker(unsigned count) : threads(count) {
    const auto map = [](size_t bytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        return static_cast<char*>(memory);
    };
    stacks = map(threads * (STACK_BYTES + GUARD_BYTES));
    for (unsigned i = 0; i < threads; ++i) mprotect(stacks + i * (STACK_BYTES + GUARD_BYTES), GUARD_BYTES, PROT_NONE);
    shared = map(SHARED_MAPPED) + SHARED_MARGIN;
    signal_stack = map(SIGNAL_STACK_BYTES);
    fibers = new Fiber[threads]();
    warps = new Warp[(threads + 31) / 32]();
}
inline Worker::~Worker() {
    checks::end(*this);
    delete[] fibers;
    delete[] warps;
    if (stacks) munmap(stacks, threads * (STACK_BYTES + GUARD_BYTES));
    if (shared) munmap(shared - SHARED_MARGIN, SHARED_MAPPED);
    if (signal_stack) munmap(signal_stack, SIGNAL_STACK_BYTES);
}

// Faults

// A place in the kernel: its line, or an address in this library that debug information gives a line to.
struct Site {
    uint64_t address;
    Where where;
};

// An address in this library, as addr2line wants it: relative to where the library is mapped.
FUSER_UNCHECKED inline uint64_t relative_address(uint64_t address) {
    Dl_info info;
    return address && dladdr(reinterpret_cast<const void*>(address), &info) && info.dli_fbase ? address - reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
}

FUSER_UNCHECKED inline void record_fault(Worker& w, const Fiber* fiber, Where where, uint64_t address, Site other,
                                         const char* format, va_list arguments) {
    ++w.internal;
    Launch& launch = *w.launch;
    Lock lock(launch.mutex);
    if (__atomic_exchange_n(&launch.failed, true, __ATOMIC_SEQ_CST)) return;
    FuserFault& fault = launch.fault;
    fault = {};
    fault.block[0] = w.block.x, fault.block[1] = w.block.y, fault.block[2] = w.block.z;
    if (fiber) fault.thread[0] = fiber->thread.x, fault.thread[1] = fiber->thread.y, fault.thread[2] = fiber->thread.z;
    fault.line = where.line, fault.other_line = other.where.line;
    fault.address = relative_address(address), fault.other = relative_address(other.address);
    if (where.file) snprintf(fault.file, sizeof fault.file, "%s", where.file);
    vsnprintf(fault.text, sizeof fault.text, format, arguments);
}

// Ends the block of the calling fiber; the launch returns FAULT_STATUS.
[[noreturn]] FUSER_UNCHECKED inline void leave(Worker& w) {
    Fiber& fiber = *w.current;
    w.current = nullptr;
    for (;;) switch_fiber(fiber, w.host);
}
[[noreturn]] __attribute__((format(printf, 2, 3))) FUSER_UNCHECKED void fail(Where where, const char* format,
                                                                                   ...) {
    va_list arguments;
    va_start(arguments, format);
    record_fault(*worker, worker->current, where, 0, {}, format, arguments);
    va_end(arguments);
    leave(*worker);
}
[[noreturn]] __attribute__((format(printf, 3, 4))) FUSER_UNCHECKED inline void fail_at(Site site, Site other,
                                                                                      const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_fault(*worker, worker->current, site.where, site.address, other, format, arguments);
    va_end(arguments);
    leave(*worker);
}

// Seconds that a fiber may run without giving up its turn.
inline double patience() {
    const char* chosen = std::getenv("FUSER_EMULATOR_TIMEOUT");
    const double seconds = chosen ? std::atof(chosen) : 0;
    return seconds > 0 ? seconds : 60;
}

// A kernel that touches wild memory must not take the process with it. The handlers belong to the process: they are
// there only while a launch runs, and signals of other threads go on to whoever handled them before.
struct Signals {
    static constexpr int COUNT = 4;
    static constexpr int NUMBERS[COUNT] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    int launches = 0;
    struct sigaction previous[COUNT]{}, restore[COUNT]{};
    bool captured = false;
};
inline Signals signals;

FUSER_UNCHECKED inline void on_signal(int number, siginfo_t* info, void* context) {
    Worker* w = worker;
    const bool watched = number == SIGILL && info->si_code == SI_TKILL && info->si_pid == getpid();  // see watch()
    if (w == nullptr || w->current == nullptr) {
        if (watched) return;
        for (int i = 0; i < Signals::COUNT; ++i) {
            if (Signals::NUMBERS[i] != number) continue;
            const struct sigaction& before = signals.previous[i];
            if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
            if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
            signal(number, SIG_DFL);  // the instruction is executed again and ends the process, as it would have
        }
        return;
    }
    Site place{};
#if defined(__x86_64__) && defined(__linux__)
    // As a return address: behind the instruction.
    place.address = uint64_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#endif
    const auto* touched = static_cast<const char*>(info->si_addr);
    const char* stack = w->stacks + w->current->index * (STACK_BYTES + GUARD_BYTES);
    if (watched) {
        fail_at(place, {}, "runs for %g s without coming to a barrier or its end", patience());
    }
    if (number == SIGILL) fail_at(place, {}, "the compiler saw that this code divides by zero or uses a null pointer");
    if (number == SIGFPE) fail_at(place, {}, "integer division by zero");
    if (touched >= stack && touched < stack + GUARD_BYTES) {
        fail_at(place, {}, "more than %zu KiB of local memory in one thread", STACK_BYTES >> 10);
    }
    fail_at(place, {}, "access to address %p, where there is no memory", static_cast<const void*>(touched));
}

class SignalGuard {
  public:
    SignalGuard() {
        Lock lock(signals.mutex);
        if (signals.launches++) return;
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < Signals::COUNT; ++i) {
            sigaction(Signals::NUMBERS[i], &action, &signals.restore[i]);
            // Set once, in the order of first launches: handlers of several kernels form a chain without a circle.
            if (!signals.captured) signals.previous[i] = signals.restore[i];
        }
        signals.captured = true;
    }
    ~SignalGuard() {
        Lock lock(signals.mutex);
        if (--signals.launches) return;
        for (int i = 0; i < Signals::COUNT; ++i) {
            struct sigaction present {};
            sigaction(Signals::NUMBERS[i], nullptr, &present);
            if (present.sa_sigaction == on_signal) sigaction(Signals::NUMBERS[i], &signals.restore[i], nullptr);
        }
    }
    SignalGuard(const SignalGuard&) = delete;
    SignalGuard& operator=(const SignalGuard&) = delete;
};

// Scheduling

FUSER_UNCHECKED inline void wake(Worker& w, Fiber* fiber) {
    fiber->next = nullptr;
    fiber->waits = nullptr;
    if (w.last) w.last->next = fiber;
    else w.first = fiber;
    w.last = fiber;
}

// Runs other fibers until someone wakes this one.
FUSER_UNCHECKED inline void suspend(Worker& w, Fiber& fiber) {
    Fiber* next = w.first;
    if (next == nullptr) {
        w.current = nullptr;
        switch_fiber(fiber, w.host);  // nobody can run: a deadlock, or the end of the block
        return;
    }
    w.first = next->next;
    if (w.first == nullptr) w.last = nullptr;
    w.current = next;
    ++w.turns;
    switch_fiber(fiber, *next);
}
FUSER_UNCHECKED inline void wait_for(Worker& w, Fiber& fiber, const char* what, Where where) {
    fiber.waits = what;
    fiber.where = where;
    suspend(w, fiber);
}

FUSER_UNCHECKED void yield(Worker& w, Fiber& fiber) {
    if (w.first == nullptr) return;
    wake(w, &fiber);
    suspend(w, fiber);
}

// A look at something that another thread of this block must change: `waits` says what for.
FUSER_UNCHECKED void poll(Worker& w, Fiber& fiber, const char* waits, Where where) {
    if (++w.polls > 4 * w.threads + 64) {
        fail(where, "%s never completes: every thread of the block waits, and nobody is left to arrive", waits);
    }
    yield(w, fiber);
}

// A look at global memory, which other blocks change.
FUSER_UNCHECKED void poll_global(Worker& w, Fiber& fiber, Where where) {
    const double time = now();
    if (w.polls++ == 0) w.polling_since = time;
    if (time - w.polling_since > POLL_SECONDS) {
        fail(where, "polls global memory for %g s while nothing else happens in its block", POLL_SECONDS);
    }
    if (w.first == nullptr) sched_yield();
    yield(w, fiber);
}

// Warp-wide operations

FUSER_UNCHECKED inline void complete(Worker& w, Warp& warp, Rendezvous& pending, const Fiber* running) {
    const uint32_t lanes = pending.arrived;
    pending.arrived = 0;
    progress(w);
    warp.carried_out = &pending;
    pending.operation(warp, lanes);
    for (uint32_t left = lanes; left; left &= left - 1) {
        Fiber* fiber = warp.fibers + __builtin_ctz(left);
        if (fiber != running) wake(w, fiber);
    }
}

// Waits until all lanes of `mask` that have not exited are here; the last one runs `operation` for all.
FUSER_UNCHECKED void collective(uint32_t mask, void* operand, Operation operation, const char* name,
                                       Where where) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    Warp& warp = *fiber.warp;
    const uint32_t bit = 1u << fiber.lane;
    if (!(mask & bit)) fail(where, "%s: lane %u is not in its own mask 0x%08x", name, fiber.lane, mask);
    Rendezvous& pending = warp.pending[__builtin_ctz(mask)];
    if (pending.arrived == 0) {
        pending.mask = mask, pending.operation = operation, pending.name = name, pending.where = where;
    } else if (pending.mask != mask || pending.operation != operation) {
        fail(where, "lanes of a warp disagree: lane %u calls %s with mask 0x%08x, but lanes 0x%08x wait in %s with mask "
             "0x%08x (line %d)", fiber.lane, name, mask, pending.arrived, pending.name, pending.mask,
             pending.where.line);
    }
    warp.operands[fiber.lane] = operand;
    pending.arrived |= bit;
    if (pending.arrived == (mask & warp.live)) complete(w, warp, pending, &fiber);
    else wait_for(w, fiber, name, where);
}

// Barriers of a block

FUSER_UNCHECKED inline void release_barrier(Worker& w, Barrier& barrier, int id, Fiber* running) {
    progress(w);
    checks::order_block(barrier.waiting, id);
    for (size_t i = 0; i < barrier.waiting.count; ++i) {
        Fiber* fiber = barrier.waiting.items[i];
        fiber->result = barrier.count;
        if (fiber != running) wake(w, fiber);
    }
    barrier.waiting.count = 0;
    barrier.arrived = 0;
}

// expected 0: all threads of the block that have not exited.
FUSER_UNCHECKED int arrive_at_barrier(int id, int expected, bool waits, bool predicate, const char* name,
                                             Where where) {
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    if (id < 0 || id >= NAMED_BARRIERS) fail(where, "%s: there is no barrier %d, only 0 to 15", name, id);
    if (expected < 0 || expected % 32 || unsigned(expected) > (w.threads + 31) / 32 * 32) {
        fail(where, "%s: %d is not a multiple of 32 threads of a block of %u", name, expected, w.threads);
    }
    Barrier& barrier = w.barriers[id];
    if (barrier.arrived == 0) {
        barrier.expected = expected, barrier.count = 0, barrier.name = name, barrier.where = where;
    } else if (barrier.expected != expected) {
        fail(where, "%s: barrier %d is waited for by %d threads at line %d and by %d here", name, id,
             barrier.expected, barrier.where.line, expected);
    } else if (expected == 0 && (barrier.where.line != where.line || barrier.name != name)) {
        fail(where, "divergent barrier: this thread is at %s while others of its block are at %s (line %d)", name,
             barrier.name, barrier.where.line);
    }
    ++barrier.arrived;
    barrier.count += predicate;
    checks::arrive(fiber, id);
    if (waits) barrier.waiting.push(&fiber);
    if (barrier.arrived == (expected ? expected : int(w.live))) {
#ifdef FUSER_CHECKED
        if (expected == 0 && w.live != w.threads) {
            fail(where, "divergent barrier: %u of the %u threads of the block have exited before %s",
                 w.threads - w.live, w.threads, name);
        }
#endif
        release_barrier(w, barrier, id, waits ? &fiber : nullptr);
    } else if (waits) {
        wait_for(w, fiber, name, where);
    }
    return fiber.result;
}

// The end of a thread may be what others wait for: a thread that has exited counts as arrived.
FUSER_UNCHECKED inline void exit_thread(Worker& w, Fiber& fiber) {
    fiber.done = true;
    progress(w);
    --w.live;
    Warp& warp = *fiber.warp;
    warp.live &= ~(1u << fiber.lane);
    for (Rendezvous& pending : warp.pending) {
        if (pending.arrived && pending.arrived == (pending.mask & warp.live)) complete(w, warp, pending, nullptr);
    }
    Barrier& barrier = w.barriers[0];
    if (barrier.arrived && barrier.expected == 0 && barrier.arrived == int(w.live)) {
#ifdef FUSER_CHECKED
        fail(barrier.where, "divergent barrier: threads exit while %d others wait in %s", barrier.arrived, barrier.name);
#endif
        release_barrier(w, barrier, 0, nullptr);
    }
}

[[noreturn]] FUSER_UNCHECKED inline void fiber_main() {
    worker->launch->run(worker->launch->arguments);
    Worker& w = *worker;
    Fiber& fiber = *w.current;
    exit_thread(w, fiber);
    for (;;) suspend(w, fiber);
}

__attribute__((format(printf, 3, 4))) FUSER_UNCHECKED inline void report(Worker& w, const Fiber* fiber,
                                                                         const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_fault(w, fiber, fiber ? fiber->where : Where{nullptr, 0}, 0, {}, format, arguments);
    va_end(arguments);
}

FUSER_UNCHECKED inline void report_deadlock(Worker& w) {
    char text[1600];
    size_t used = 0;
    const Fiber* first = nullptr;
    std::vector<const Fiber*> waiting;
    for (unsigned i = 0; i < w.threads; ++i) {
        if (!w.fibers[i].done) waiting.push_back(&w.fibers[i]);
    }
    first = waiting.front();
    // Threads that wait at the same place are told together.
    while (!waiting.empty() && used + 200 < sizeof text) {
        const Fiber* one = waiting.front();
        std::vector<const Fiber*> others;
        unsigned count = 0;
        for (const Fiber* fiber : waiting) {
            if (fiber->where.line == one->where.line && fiber->waits == one->waits) ++count;
            else others.push_back(fiber);
        }
        used += snprintf(text + used, sizeof text - used, "%s%u thread%s (the first is %u) in %s at line %d", used ? ", " : "",
                         count, count == 1 ? "" : "s", one->index, one->waits ? one->waits : "nothing", one->where.line);
        waiting = std::move(others);
    }
    report(w, first, "deadlock (divergent barrier): %u of %u threads have exited, the others wait forever: %s",
           w.threads - w.live, w.threads, text);
}

// The file of this library, for its symbol table. It stays in memory: names point into it.
FUSER_UNCHECKED inline const std::vector<char>& library_image() {
    static const std::vector<char> image = [] {
        std::vector<char> bytes;
        Dl_info info;
        if (!dladdr(reinterpret_cast<const void*>(&library_image), &info) || !info.dli_fname) return bytes;
        std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(info.dli_fname, "rb"), std::fclose);
        char buffer[1 << 14];
        for (size_t got; file && (got = std::fread(buffer, 1, sizeof buffer, file.get())) > 0;) {
            bytes.insert(bytes.end(), buffer, buffer + got);
        }
        return bytes;
    }();
    return image;
}
// Calls visit(name, symbol) for every symbol of this library.
template <typename F>
void visit_symbols(F visit) {
    const std::vector<char>& image = library_image();
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
    if (image.size() < sizeof *header) return;
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[i].sh_offset);
        const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
        for (size_t k = 0; k < sections[i].sh_size / sizeof *symbols; ++k) visit(names + symbols[k].st_name, symbols[k]);
    }
}
// The __shared__ arrays of this library.
inline std::vector<StaticArray> read_static_arrays() {
    std::vector<StaticArray> arrays;
    visit_symbols([&](const char* name, const ElfW(Sym)& symbol) {
        // The emulator's own variables live there too.
        const bool own = std::strstr(name, "8emulator") || std::strstr(name, "fuser_gap_");
        if ((symbol.st_info & 15) == STT_TLS && symbol.st_size && !own) {
            arrays.push_back({symbol.st_value, symbol.st_size, name});
        }
    });
    return arrays;
}
FUSER_UNCHECKED inline const std::vector<StaticArray>& static_arrays() {
    static const std::vector<StaticArray> arrays = read_static_arrays();
    return arrays;
}
// Where this OS thread has them.
FUSER_UNCHECKED inline char* static_memory() {
    struct Found {
        uintptr_t base;
        char* memory;
    };
    static thread_local char* memory = [] {
        Dl_info info;
        dladdr(reinterpret_cast<const void*>(&library_image), &info);
        Found found{reinterpret_cast<uintptr_t>(info.dli_fbase), nullptr};
        dl_iterate_phdr(
            [](dl_phdr_info* module, size_t, void* data) {
                auto& found = *static_cast<Found*>(data);
                if (module->dlpi_addr != found.base) return 0;
                found.memory = static_cast<char*>(module->dlpi_tls_data);
                return 1;
            },
            &found);
        return found.memory;
    }();
    return memory;
}

FUSER_UNCHECKED inline void run_block(Worker& w, uint64_t number) {
    const Launch& launch = *w.launch;
    w.block = {unsigned(number % launch.grid.x), unsigned(number / launch.grid.x % launch.grid.y),
               unsigned(number / launch.grid.x / launch.grid.y)};
    w.live = w.threads;
    ++w.turns;
    w.first = w.last = nullptr;
    w.polls = 0;
    w.internal = 0;
    w.bulk.count = 0;
    for (Barrier& barrier : w.barriers) barrier.arrived = 0, barrier.waiting.count = 0;
    for (unsigned i = 0; i < w.threads; i += 32) {
        Warp& warp = w.warps[i / 32];
        warp.live = w.threads - i >= 32 ? 0xffffffffu : (1u << (w.threads - i)) - 1;
        warp.fibers = &w.fibers[i];
        for (Rendezvous& pending : warp.pending) pending.arrived = 0;
    }
    for (unsigned i = 0; i < w.threads; ++i) {
        Fiber& fiber = w.fibers[i];
        fiber.index = i;
        fiber.lane = i % 32;
        fiber.warp = &w.warps[i / 32];
        fiber.thread = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
        fiber.done = false;
        fiber.copies.count = fiber.copied = fiber.groups.count = fiber.waited = 0;
        prepare(fiber, w.stacks + i * (STACK_BYTES + GUARD_BYTES) + GUARD_BYTES, fiber_main);
        wake(w, &fiber);
    }
    // NaN: whatever is read before it is written shows.
    std::memset(w.shared, 0xff, launch.shared_bytes);
    for (const StaticArray& array : static_arrays()) std::memset(static_memory() + array.offset, 0xff, array.bytes);
    checks::begin_block(w);
    Fiber* first = w.first;
    w.first = first->next;
    if (w.first == nullptr) w.last = nullptr;
    w.current = first;
    switch_fiber(w.host, *first);
    w.current = nullptr;
    if (w.live && !launch.failed) report_deadlock(w);
}

FUSER_UNCHECKED inline void work(Worker& w) {
    Launch& launch = *w.launch;
    worker = &w;
    stack_t own{}, before{};
    own.ss_sp = w.signal_stack;
    own.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&own, &before);  // a fiber whose stack is full cannot handle a signal on it
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    try {
        while (!__atomic_load_n(&launch.failed, __ATOMIC_RELAXED)) {
            const uint64_t number = __atomic_fetch_add(&launch.next_block, 1, __ATOMIC_RELAXED);
            if (number >= blocks) break;
            run_block(w, number);
        }
    } catch (const std::bad_alloc&) {
        report(w, nullptr, "the emulator has not enough memory");
    }
    sigaltstack(&before, nullptr);
    worker = nullptr;
    Lock lock(launch.mutex);
    w.finished = true;
    pthread_cond_broadcast(&launch.changed);
}
FUSER_UNCHECKED inline void* start(void* w) {
    work(*static_cast<Worker*>(w));
    return nullptr;
}

// Waits for all workers; one in which no other fiber gets a turn for too long is stopped by a signal.
FUSER_UNCHECKED inline void watch(Launch& launch, const std::vector<std::unique_ptr<Worker>>& workers,
                                  const std::vector<pthread_t>& team) {
    std::vector<std::pair<uint64_t, double>> seen(team.size(), {0, now()});
    Lock lock(launch.mutex);
    for (;;) {
        const double time = now();
        bool finished = true;
        for (size_t i = 0; i < team.size(); ++i) {
            if (workers[i]->finished) continue;
            finished = false;
            const uint64_t turns = __atomic_load_n(&workers[i]->turns, __ATOMIC_RELAXED);
            if (turns != seen[i].first) seen[i] = {turns, time};
            else if (time - seen[i].second > patience()) {
                pthread_kill(team[i], SIGILL);
                seen[i].second = time;
            }
        }
        if (finished) return;
        timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 200'000'000;
        until.tv_sec += until.tv_nsec / 1'000'000'000, until.tv_nsec %= 1'000'000'000;
        pthread_cond_timedwait(&launch.changed, &launch.mutex, &until);
    }
}

inline thread_local FuserFault last_fault;

inline unsigned usable_threads() {
    const char* chosen = std::getenv("FUSER_EMULATOR_THREADS");
    const int count = chosen ? std::atoi(chosen) : 0;
    return count > 0 ? unsigned(count) : unsigned(std::max(1, get_nprocs()));
}

inline int refuse(const char* format, ...) {
    last_fault = {};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_fault.text, sizeof last_fault.text, format, arguments);
    va_end(arguments);
    return FAULT_STATUS;
}

// Set while launches are listed instead of carried out.
struct Listing {
    bool active = false;
    std::vector<FuserLaunch> launches;
};
inline thread_local Listing listing;

inline int list(const Launch& launch, const void* function) {
    FuserLaunch one{};
    one.grid[0] = launch.grid.x, one.grid[1] = launch.grid.y, one.grid[2] = launch.grid.z;
    one.block[0] = launch.block.x, one.block[1] = launch.block.y, one.block[2] = launch.block.z;
    one.shared_bytes = launch.shared_bytes;
    Dl_info info;
    if (dladdr(function, &info)) {
        const auto offset = reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase);
        visit_symbols([&](const char* name, const ElfW(Sym)& symbol) {
            if ((symbol.st_info & 15) == STT_FUNC && symbol.st_value == offset) {
                snprintf(one.function, sizeof one.function, "%s", name);
            }
        });
    }
    listing.launches.push_back(one);
    return 0;
}

bool only_lists() { return listing.active; }

int run(Launch& launch, const void* function) {
    if (listing.active) return list(launch, function);
    const dim3 &grid = launch.grid, &block = launch.block;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > BLOCK_LIMIT || block.z > 64) {
        return refuse("a block of (%u, %u, %u) threads cannot be launched", block.x, block.y, block.z);
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return refuse("a grid of (%u, %u, %u) blocks cannot be launched", grid.x, grid.y, grid.z);
    }
    if (launch.shared_bytes > SHARED_LIMIT) {
        return refuse("%zu bytes of dynamic shared memory; a block has at most %zu", launch.shared_bytes, SHARED_LIMIT);
    }
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const auto count = unsigned(std::min<uint64_t>(blocks, usable_threads()));
    SignalGuard guard;
    std::vector<std::unique_ptr<Worker>> workers;
    std::vector<pthread_t> team;
    const char* reason = "";
    try {
        team.reserve(count);
        for (unsigned i = 0; i < count; ++i) {
            workers.push_back(std::make_unique<Worker>(unsigned(threads)));
            workers.back()->launch = &launch;
            pthread_t member;
            const int error = pthread_create(&member, nullptr, start, workers.back().get());
            if (error) {
                reason = std::strerror(error);
                break;
            }
            team.push_back(member);
        }
    } catch (const std::bad_alloc&) {
        reason = "there is not enough memory";
    }
    // Threads that did start do the work of all.
    if (team.empty()) return refuse("the emulator cannot run this kernel here: %s", reason);
    watch(launch, workers, team);
    for (const pthread_t member : team) pthread_join(member, nullptr);
    if (!launch.failed) return 0;
    last_fault = launch.fault;
    return FAULT_STATUS;
}

}  // namespace emulator

namespace device {
namespace matrix {
template void multiply<half, half>(emulator::Warp&, uint32_t);
template void multiply<bf16, bf16>(emulator::Warp&, uint32_t);
template void multiply<e4m3, e4m3>(emulator::Warp&, uint32_t);
template void multiply<tf32, tf32>(emulator::Warp&, uint32_t);
template void multiply<int8_t, int8_t>(emulator::Warp&, uint32_t);
template void multiply<uint8_t, uint8_t>(emulator::Warp&, uint32_t);
template void multiply<uint8_t, int8_t>(emulator::Warp&, uint32_t);
}  // namespace matrix
}  // namespace device

// The fault of the last launch of this thread that failed.
FUSER_EXPORT const FuserFault* fuser_emulator_fault() { return &emulator::last_fault; }

// From here on this thread's launches are only listed, or carried out again.
FUSER_EXPORT void fuser_emulator_list(int only) {
    emulator::listing.active = only != 0;
    if (only) emulator::listing.launches.clear();
}
FUSER_EXPORT size_t fuser_emulator_listed(const FuserLaunch** launches) {
    *launches = emulator::listing.launches.data();
    return emulator::listing.launches.size();
}

#ifdef FUSER_CHECKED
#include "emulator_checks.h"
#endif
