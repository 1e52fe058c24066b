// The emulator's checking mode: every memory access of a kernel is looked at.
//
// Races are found by vector clocks (FastTrack, Flanagan and Freund, PLDI 2009). A thread's clock advances at every
// synchronization; clocks[i][j] is the latest time of thread j that is known to lie before what thread i does now. An
// access races with an earlier one of another thread if its time is not known. Of the readers of a byte since its last
// write, the last one of each warp is kept.
#pragma once

namespace emulator {
namespace checks {

// Memory that is shared by the threads of a block: dynamic shared memory, or the arrays declared __shared__.
struct Region {
    char* begin = nullptr;
    size_t bytes = 0;
    bool* allowed = nullptr;  // whether a byte belongs to an array
    bool* pending = nullptr;  // whether an asynchronous copy to it has not been waited for
    bool* atomic = nullptr;   // whether its last write was an atomic operation
    uint16_t* writer = nullptr;
    uint32_t* written = nullptr;  // the writer's clock
    Site* site = nullptr;         // of the last write
    uint64_t* read = nullptr;     // for each warp: the clock and lane of its last reader
    Site* read_site = nullptr;    // of the last read
};

struct Array {
    const char *begin, *end;
};

struct Channel {  // what threads know of each other through an mbarrier
    const void* object;
    uint32_t *arrived, *published;
};

struct Shadow {
    Region dynamic, fixed;
    unsigned threads = 0, warps = 0;
    uint32_t now = 1;  // above every clock of earlier blocks
    uint32_t* clocks = nullptr;
    uint32_t* barriers = nullptr;
    std::vector<Channel> channels;
    std::vector<Array> arrays;
    char* fixed_memory = nullptr;
    size_t used = 0;  // bytes of the dynamic region that are cleared for each block
};

// Global memory that kernels may touch; everything if empty. Set by the caller, for all launches.
inline std::vector<Array> global_arrays;
inline Array library{nullptr, nullptr};  // constants of this library

template <typename T>
FUSER_UNCHECKED T* zeros(size_t count) {
    void* memory = mmap(nullptr, std::max<size_t>(count, 1) * sizeof(T), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<T*>(memory);
}
template <typename T>
FUSER_UNCHECKED void unmap(T*& memory, size_t count) {
    if (memory) munmap(memory, std::max<size_t>(count, 1) * sizeof(T));
    memory = nullptr;
}
FUSER_UNCHECKED inline void unmap(Region& region, unsigned warps) {
    unmap(region.allowed, region.bytes);
    unmap(region.pending, region.bytes);
    unmap(region.atomic, region.bytes);
    unmap(region.writer, region.bytes);
    unmap(region.written, region.bytes);
    unmap(region.site, region.bytes);
    unmap(region.read, region.bytes * warps);
    unmap(region.read_site, region.bytes);
}
FUSER_UNCHECKED inline Region map(char* begin, size_t bytes, unsigned warps) {
    Region region;
    region.begin = begin, region.bytes = bytes;
    region.allowed = zeros<bool>(bytes), region.pending = zeros<bool>(bytes), region.atomic = zeros<bool>(bytes);
    region.writer = zeros<uint16_t>(bytes), region.written = zeros<uint32_t>(bytes);
    region.site = zeros<Site>(bytes), region.read = zeros<uint64_t>(bytes * warps), region.read_site = zeros<Site>(bytes);
    return region;
}

FUSER_UNCHECKED void end(Worker& w) {
    if (w.shadow == nullptr) return;
    Shadow& shadow = *w.shadow;
    unmap(shadow.dynamic, shadow.warps);
    unmap(shadow.fixed, shadow.warps);
    unmap(shadow.clocks, size_t(shadow.threads) * shadow.threads);
    unmap(shadow.barriers, size_t(NAMED_BARRIERS) * shadow.threads);
    for (Channel& channel : shadow.channels) unmap(channel.arrived, 2 * shadow.threads);
    delete w.shadow;
}

FUSER_UNCHECKED inline Array loaded_library() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&loaded_library), &info)) return {nullptr, nullptr};
    struct Found {
        uintptr_t base, end;
    } found{reinterpret_cast<uintptr_t>(info.dli_fbase), 0};
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
            auto& found = *static_cast<Found*>(data);
            if (module->dlpi_addr != found.base) return 0;
            for (int i = 0; i < module->dlpi_phnum; ++i) {
                const auto& part = module->dlpi_phdr[i];
                if (part.p_type == PT_LOAD) found.end = std::max<uintptr_t>(found.end, found.base + part.p_vaddr + part.p_memsz);
            }
            return 1;
        },
        &found);
    return {reinterpret_cast<const char*>(found.base), reinterpret_cast<const char*>(found.end)};
}

FUSER_UNCHECKED void begin_block(Worker& w) {
    if (w.shadow == nullptr) w.shadow = new Shadow();
    Shadow& s = *w.shadow;
    if (s.threads == 0) {
        s.threads = w.threads, s.warps = (w.threads + 31) / 32, s.fixed_memory = static_memory();
        s.clocks = zeros<uint32_t>(size_t(s.threads) * s.threads);
        s.barriers = zeros<uint32_t>(size_t(NAMED_BARRIERS) * s.threads);
        s.dynamic = map(w.shared - SHARED_MARGIN, SHARED_MAPPED, s.warps);
        size_t begin = SIZE_MAX, end = 0;
        for (const StaticArray& array : static_arrays()) {
            begin = std::min(begin, array.offset), end = std::max(end, array.offset + array.bytes);
        }
        if (end) {
            s.fixed = map(s.fixed_memory + begin, end - begin, s.warps);
            for (const StaticArray& array : static_arrays()) {
                std::memset(s.fixed.allowed + (array.offset - begin), 1, array.bytes);
            }
        }
        library = loaded_library();
    }
    uint32_t latest = s.now;
    for (unsigned i = 0; i < s.threads; ++i) latest = std::max(latest, s.clocks[size_t(i) * s.threads + i]);
    s.now = latest;
    for (size_t i = 0; i < size_t(s.threads) * s.threads; ++i) s.clocks[i] = s.now;
    for (unsigned i = 0; i < s.threads; ++i) ++s.clocks[size_t(i) * s.threads + i];
    std::memset(s.barriers, 0, size_t(NAMED_BARRIERS) * s.threads * sizeof *s.barriers);
    for (Channel& channel : s.channels) {
        channel.object = nullptr;
        std::memset(channel.arrived, 0, 2 * s.threads * sizeof *channel.arrived);
    }
    if (s.fixed.bytes) std::memset(s.fixed.pending, 0, s.fixed.bytes);
    // With room for the gaps between arrays.
    s.used = std::min(s.dynamic.bytes, w.launch->shared_bytes + 3 * SHARED_MARGIN);
    std::memset(s.dynamic.begin, 0xff, s.used);
    std::memset(s.dynamic.pending, 0, s.used);
    std::memset(s.dynamic.allowed, 0, s.used);
    std::memset(s.dynamic.allowed + (w.shared - s.dynamic.begin), 1, w.launch->shared_bytes);
    s.arrays.clear();
}

FUSER_UNCHECKED inline uint32_t* clocks_of(Shadow& s, const Fiber& fiber) {
    return s.clocks + size_t(fiber.index) * s.threads;
}
FUSER_UNCHECKED inline void join(uint32_t* into, const uint32_t* from, unsigned count) {
    for (unsigned i = 0; i < count; ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

FUSER_UNCHECKED void order_warp(Warp& warp, uint32_t lanes) {
    Shadow& s = *worker->shadow;
    // The first lane's clocks collect those of all.
    uint32_t* all = clocks_of(s, warp.fibers[__builtin_ctz(lanes)]);
    for (uint32_t left = lanes; left; left &= left - 1) join(all, clocks_of(s, warp.fibers[__builtin_ctz(left)]), s.threads);
    for (uint32_t left = lanes & (lanes - 1); left; left &= left - 1) {
        const Fiber& fiber = warp.fibers[__builtin_ctz(left)];
        std::memcpy(clocks_of(s, fiber), all, s.threads * sizeof *all);
    }
    for (uint32_t left = lanes; left; left &= left - 1) {
        const Fiber& fiber = warp.fibers[__builtin_ctz(left)];
        ++clocks_of(s, fiber)[fiber.index];
    }
}
FUSER_UNCHECKED void arrive(Fiber& fiber, int barrier) {
    Shadow& s = *worker->shadow;
    uint32_t* own = clocks_of(s, fiber);
    join(s.barriers + size_t(barrier) * s.threads, own, s.threads);
    ++own[fiber.index];
}
FUSER_UNCHECKED void order_block(const List<Fiber*>& waiting, int barrier) {
    Shadow& s = *worker->shadow;
    uint32_t* all = s.barriers + size_t(barrier) * s.threads;
    for (size_t i = 0; i < waiting.count; ++i) join(clocks_of(s, *waiting.items[i]), all, s.threads);
    std::memset(all, 0, s.threads * sizeof *all);
}
FUSER_UNCHECKED inline Channel& channel_of(Shadow& s, const void* object) {
    Channel* unused = nullptr;
    for (Channel& channel : s.channels) {
        if (channel.object == object) return channel;
        if (channel.object == nullptr && unused == nullptr) unused = &channel;
    }
    if (unused == nullptr) {
        uint32_t* memory = zeros<uint32_t>(2 * s.threads);
        s.channels.push_back({object, memory, memory + s.threads});
        return s.channels.back();
    }
    unused->object = object;
    return *unused;
}

// The standard library's code is instrumented where it is not inlined; what it does for the emulator is no access of
// the kernel.
class Internal {
  public:
    FUSER_UNCHECKED Internal() { ++worker->internal; }
    FUSER_UNCHECKED ~Internal() { --worker->internal; }
};

FUSER_UNCHECKED void arrive(Fiber& fiber, const void* mbarrier) {
    Internal internal;
    Shadow& s = *worker->shadow;
    uint32_t* own = clocks_of(s, fiber);
    join(channel_of(s, mbarrier).arrived, own, s.threads);
    ++own[fiber.index];
}
FUSER_UNCHECKED void publish(const void* mbarrier) {
    Internal internal;
    Shadow& s = *worker->shadow;
    const Channel& channel = channel_of(s, mbarrier);
    join(channel.published, channel.arrived, s.threads);
}
FUSER_UNCHECKED void acquire(Fiber& fiber, const void* mbarrier) {
    Internal internal;
    Shadow& s = *worker->shadow;
    join(clocks_of(s, fiber), channel_of(s, mbarrier).published, s.threads);
}

FUSER_UNCHECKED void take(const char* array, size_t bytes) {
    Internal internal;
    Shadow& s = *worker->shadow;
    Region& region = s.dynamic;
    if (s.arrays.empty()) std::memset(region.allowed, 0, s.used);
    const Array own{array, array + bytes};
    for (const Array& known : s.arrays) {
        if (known.begin == own.begin && known.end == own.end) return;
    }
    s.arrays.push_back(own);
    std::memset(region.allowed + (array - region.begin), 1, bytes);
}

// What a byte of shared memory is called in messages.
FUSER_UNCHECKED inline void describe(const Shadow& s, const char* byte, char* text, size_t size) {
    if (s.fixed.bytes && byte >= s.fixed.begin && byte < s.fixed.begin + s.fixed.bytes) {
        for (const StaticArray& array : static_arrays()) {
            const char* begin = s.fixed_memory + array.offset;
            if (byte < begin || byte >= begin + array.bytes) continue;
            int status = 0;
            char* readable = abi::__cxa_demangle(array.name, nullptr, nullptr, &status);
            const char* name = readable ? readable : array.name;
            for (const char* part = name; (part = std::strstr(part, "::")) != nullptr;) name = part += 2;
            snprintf(text, size, "'%s' (byte %td of %zu)", name, byte - begin, array.bytes);
            std::free(readable);
            return;
        }
        snprintf(text, size, "shared memory");
        return;
    }
    for (size_t i = 0; i < s.arrays.size(); ++i) {
        const Array& array = s.arrays[i];
        if (byte >= array.begin && byte < array.end) {
            snprintf(text, size, "array %zu of dynamic shared memory (byte %td of %td)", i, byte - array.begin,
                     array.end - array.begin);
            return;
        }
    }
    snprintf(text, size, "dynamic shared memory (byte %td)", byte - worker->shared);
}

[[noreturn]] FUSER_UNCHECKED inline void report_race(Shadow& s, const char* byte, Access kind, Site site, bool other_wrote,
                                                     unsigned other, Site other_site) {
    ++worker->internal;
    char text[400];
    describe(s, byte, text, sizeof text);
    const uint3 thread = worker->fibers[other].thread;
    fail_at(site, other_site, "race on %s: %s what thread (%u, %u, %u) %s, with no barrier in between", text,
            kind == Access::read ? "reads" : kind == Access::write ? "overwrites" : "changes", thread.x, thread.y, thread.z,
            other_wrote ? "wrote" : "reads");
}

[[noreturn]] FUSER_UNCHECKED inline void report_outside(Shadow& s, const char* pointer, size_t bytes, Access kind, Site site) {
    ++worker->internal;
    // The array that the access was probably meant for: the nearest one.
    const char *nearest = nullptr, *nearest_end = nullptr;
    ptrdiff_t distance = PTRDIFF_MAX;
    char text[400] = "shared memory";
    const auto consider = [&](const char* begin, const char* end) FUSER_UNCHECKED {
        if (begin == end) return;
        const ptrdiff_t away = pointer < begin ? begin - pointer : pointer >= end ? pointer - end + 1 : 0;
        if (away < distance) distance = away, nearest = begin, nearest_end = end;
    };
    for (const Array& array : s.arrays) consider(array.begin, array.end);
    if (s.fixed.bytes && pointer >= s.fixed.begin && pointer < s.fixed.begin + s.fixed.bytes) {
        for (const StaticArray& array : static_arrays()) {
            consider(s.fixed_memory + array.offset, s.fixed_memory + array.offset + array.bytes);
        }
    } else if (s.arrays.empty()) {
        consider(worker->shared, worker->shared + worker->launch->shared_bytes);
    }
    if (nearest == nullptr) {
        fail_at(site, {}, "out of bounds: %s %zu bytes of dynamic shared memory, but the kernel was launched with none",
                kind == Access::read ? "reads" : "writes", bytes);
    }
    describe(s, pointer < nearest ? nearest : nearest_end - 1, text, sizeof text);
    if (pointer < nearest) {
        fail_at(site, {}, "out of bounds: %s %zu bytes, %td in front of %s", kind == Access::read ? "reads" : "writes", bytes,
                nearest - pointer, text);
    }
    fail_at(site, {}, "out of bounds: %s %zu bytes, the last of them %td behind the end of an array; its last byte is %s",
            kind == Access::read ? "reads" : "writes", bytes, pointer + bytes - nearest_end, text);
}

FUSER_UNCHECKED inline void touch_shared(Worker& w, Region& region, const char* pointer, size_t bytes, Access kind, Site site) {
    Shadow& s = *w.shadow;
    const Fiber& fiber = *w.current;
    const uint32_t* known = clocks_of(s, fiber);
    const unsigned warp = fiber.index / 32;
    for (size_t i = 0; i < bytes; ++i) {
        const size_t at = size_t(pointer + i - region.begin);
        if (at >= region.bytes || !region.allowed[at]) report_outside(s, pointer, bytes, kind, site);
        if (region.pending[at]) {
            ++w.internal;
            char text[400];
            describe(s, pointer + i, text, sizeof text);
            const uint3 thread = w.fibers[region.writer[at]].thread;
            fail_at(site, region.site[at], "%s %s before the asynchronous copy to it, by thread (%u, %u, %u), was waited for",
                    kind == Access::read ? "reads" : "writes", text, thread.x, thread.y, thread.z);
        }
        const unsigned writer = region.writer[at];
        const bool both_atomic = kind == Access::atomic && region.atomic[at];
        if (!both_atomic && writer < s.threads && writer != fiber.index && region.written[at] > known[writer]) {
            report_race(s, pointer + i, kind, site, true, writer, region.site[at]);
        }
        uint64_t* readers = region.read + at * s.warps;
        if (kind == Access::read) {
            readers[warp] = uint64_t(known[fiber.index]) << 5 | fiber.lane;
            region.read_site[at] = site;
            continue;
        }
        for (unsigned other = 0; other < s.warps; ++other) {
            const unsigned reader = other * 32 + (readers[other] & 31);
            if (reader < s.threads && reader != fiber.index && readers[other] >> 5 > known[reader]) {
                report_race(s, pointer + i, kind, site, false, reader, region.read_site[at]);
            }
        }
        region.writer[at] = uint16_t(fiber.index);
        region.written[at] = known[fiber.index];
        region.atomic[at] = kind == Access::atomic;
        region.site[at] = site;
    }
}

FUSER_UNCHECKED inline bool within(const char* pointer, size_t bytes, const void* begin, size_t size) {
    const auto* low = static_cast<const char*>(begin);
    return pointer >= low && pointer + bytes <= low + size;
}

FUSER_UNCHECKED inline void touch(const void* address, size_t bytes, Access kind, Site site) {
    Worker* w = worker;
    if (w == nullptr || w->current == nullptr || w->internal) return;
    Internal internal;
    Shadow& s = *w->shadow;
    const auto* pointer = static_cast<const char*>(address);
    if (pointer >= s.dynamic.begin && pointer < s.dynamic.begin + s.dynamic.bytes) {
        return touch_shared(*w, s.dynamic, pointer, bytes, kind, site);
    }
    const auto near_fixed = [&](size_t margin) FUSER_UNCHECKED {
        return s.fixed.bytes && pointer + margin >= s.fixed.begin && pointer < s.fixed.begin + s.fixed.bytes + margin;
    };
    if (near_fixed(0)) return touch_shared(*w, s.fixed, pointer, bytes, kind, site);
    if (global_arrays.empty()) return;
    const char* stack = w->stacks + w->current->index * (STACK_BYTES + GUARD_BYTES);
    if (within(pointer, bytes, stack, STACK_BYTES + GUARD_BYTES)) return;
    for (const Array& array : global_arrays) {
        if (pointer >= array.begin && pointer + bytes <= array.end) return;
    }
    // Behind the tensors: one may lie next to the arrays, whose memory is the thread's.
    if (near_fixed(64)) return touch_shared(*w, s.fixed, pointer, bytes, kind, site);
    if (within(pointer, bytes, library.begin, size_t(library.end - library.begin))) return;
    if (within(pointer, bytes, w->launch->arguments, w->launch->arguments_bytes)) return;
    ++w->internal;
    // The tensor that the access was probably meant for: the nearest one.
    ptrdiff_t nearest = PTRDIFF_MAX;
    size_t index = 0;
    bool front = false;
    for (size_t i = 0; i < global_arrays.size(); ++i) {
        const Array& array = global_arrays[i];
        const ptrdiff_t away = pointer < array.begin ? array.begin - pointer : pointer + bytes - array.end;
        if (away < nearest) nearest = away, index = i, front = pointer < array.begin;
    }
    fail_at(site, {}, "out of bounds: %s %zu bytes of global memory, %td bytes %s of tensor %zu",
            kind == Access::read ? "reads" : "writes", bytes, nearest, front ? "in front" : "behind the end", index);
}

FUSER_UNCHECKED void access(const void* pointer, size_t bytes, Access kind, Where where) {
    touch(pointer, bytes, kind, {0, where});
}
FUSER_UNCHECKED void begin_async(const void* pointer, size_t bytes, Where where) {
    touch(pointer, bytes, Access::write, {0, where});
    Shadow& s = *worker->shadow;
    for (Region* region : {&s.dynamic, &s.fixed}) {
        if (within(static_cast<const char*>(pointer), bytes, region->begin, region->bytes)) {
            std::memset(region->pending + (static_cast<const char*>(pointer) - region->begin), 1, bytes);
            return;
        }
    }
    fail(where, "an asynchronous copy goes to %p, which is not in shared memory", pointer);
}
// `writer` is the thread that has waited for its copy; null leaves the time of the copy at its start.
FUSER_UNCHECKED void end_async(const void* pointer, size_t bytes, const Fiber* writer) {
    Shadow& s = *worker->shadow;
    for (Region* region : {&s.dynamic, &s.fixed}) {
        if (!within(static_cast<const char*>(pointer), bytes, region->begin, region->bytes)) continue;
        const auto at = size_t(static_cast<const char*>(pointer) - region->begin);
        std::memset(region->pending + at, 0, bytes);
        if (writer == nullptr) continue;
        for (size_t i = 0; i < bytes; ++i) region->written[at + i] = clocks_of(s, *writer)[writer->index];
    }
}

// What g++'s -fsanitize=bounds-strict,alignment tells (the structures of GCC's libsanitizer/ubsan/ubsan_handlers.h).
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
struct TypeDescriptor {
    uint16_t kind, info;
    char name[1];
};
struct OutOfBounds {
    SourceLocation location;
    const TypeDescriptor *array, *index;
};
struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    uint8_t log_alignment, kind;
};

FUSER_UNCHECKED inline bool in_kernel() { return worker && worker->current && !worker->internal; }

}  // namespace checks
}  // namespace emulator

FUSER_EXPORT void fuser_emulator_allow(const uint64_t* spans, size_t count) {
    emulator::checks::global_arrays.clear();
    for (size_t i = 0; i < count; ++i) {
        emulator::checks::global_arrays.push_back(
            {reinterpret_cast<const char*>(spans[2 * i]), reinterpret_cast<const char*>(spans[2 * i + 1])});
    }
}

// What g++'s instrumentation calls. Hidden: every library has its own.
#define FUSER_HOOK extern "C" __attribute__((visibility("hidden"), used, noinline)) FUSER_UNCHECKED
#define FUSER_CALLER {reinterpret_cast<uintptr_t>(__builtin_return_address(0)), {nullptr, 0}}
#define FUSER_ACCESS(kind, suffix, bytes)                                                                         \
    FUSER_HOOK void __tsan_##kind##suffix(void* pointer) {                                                        \
        emulator::checks::touch(pointer, bytes, emulator::Access::kind, FUSER_CALLER);                            \
    }                                                                                                             \
    FUSER_HOOK void __tsan_unaligned_##kind##suffix(void* pointer) {                                              \
        emulator::checks::touch(pointer, bytes, emulator::Access::kind, FUSER_CALLER);                            \
    }
FUSER_ACCESS(read, 1, 1)
FUSER_ACCESS(read, 2, 2)
FUSER_ACCESS(read, 4, 4)
FUSER_ACCESS(read, 8, 8)
FUSER_ACCESS(read, 16, 16)
FUSER_ACCESS(write, 1, 1)
FUSER_ACCESS(write, 2, 2)
FUSER_ACCESS(write, 4, 4)
FUSER_ACCESS(write, 8, 8)
FUSER_ACCESS(write, 16, 16)
#undef FUSER_ACCESS
FUSER_HOOK void __tsan_read_range(void* pointer, size_t bytes) {
    emulator::checks::touch(pointer, bytes, emulator::Access::read, FUSER_CALLER);
}
FUSER_HOOK void __tsan_write_range(void* pointer, size_t bytes) {
    emulator::checks::touch(pointer, bytes, emulator::Access::write, FUSER_CALLER);
}
FUSER_HOOK void __tsan_init() {}
FUSER_HOOK void __tsan_vptr_update(void**, void*) {}
FUSER_HOOK void __tsan_vptr_read(void**) {}
FUSER_HOOK void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
    if (!emulator::checks::in_kernel()) return;
    const auto& found = *static_cast<const emulator::checks::OutOfBounds*>(data);
    emulator::fail({found.location.file, int(found.location.line)}, "out of bounds: index %lld of an array of type %s",
                   static_cast<long long>(index), found.array->name);
}
FUSER_HOOK void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t pointer) {
    if (!emulator::checks::in_kernel()) return;
    const auto& found = *static_cast<const emulator::checks::TypeMismatch*>(data);
    emulator::fail({found.location.file, int(found.location.line)},
                   "misaligned: an access of type %s at address %#zx, which is not a multiple of %d", found.type->name,
                   size_t(pointer), 1 << found.log_alignment);
}
#undef FUSER_HOOK
#undef FUSER_CALLER
