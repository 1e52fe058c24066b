#include "abi.h"
#include <chrono>
// The shortest of many calls of an empty kernel through the ABI, one parallel region each, in seconds. Every call is
// timed by itself, since on a busy machine one can take a time slice of the scheduler. extents: calls, nanoseconds.
static int empty(const FuserArgs* args, void*) {
    #pragma omp parallel num_threads(args->threads)
    { asm volatile("" ::: "memory"); }
    return 0;
}
extern "C" int fuser_probe_launch(const FuserArgs* args, void* stream) {
    const FuserStep step = {empty, args};
    const volatile FuserStep* hidden = &step;
    using clock = std::chrono::steady_clock;
    const auto* extents = static_cast<const int64_t*>(args->extents);
    const clock::time_point start = clock::now(), end = start + std::chrono::nanoseconds(extents[1]);
    double best = 1.0;
    clock::time_point before = start;
    for (int64_t i = 0; i < extents[0] && before < end; ++i) {
        if (int status = hidden->kernel(hidden->args, stream)) return status;
        const clock::time_point after = clock::now();
        const double seconds = std::chrono::duration<double>(after - before).count();
        best = seconds < best ? seconds : best;
        before = after;
    }
    *static_cast<double*>(args->tensors[0]) = best;
    return 0;
}
