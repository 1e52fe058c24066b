// Work that the threads of a team share: units 0 to count - 1, of which every thread has an equal part to begin with. Who
// has done its own takes half of the longest rest that another has (work stealing; Blumofe and Leiserson, J. ACM 46(5),
// 1999), so that all end together where a core is slower than another, or is lent out for a while.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace work {
struct Span {
  int64_t begin, end;
};

class Units {
 public:
  // A cache line for every thread; its memory is the caller's.
  static constexpr int64_t kBytes = 64;

  Units(void* lines, int64_t count, int64_t threads) : lines_(static_cast<char*>(lines)), threads_(threads) {
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
      new (lines_ + t * kBytes) Rest(pack({begin, end}));
    }
  }

  // The units that `thread` does next: up to `most`, but no more than half of what it has, or `least`; none when nothing is
  // left for it. Spans that do not fit 2^32 units never exist: a unit is a register tile at least.
  Span take(int64_t thread, int64_t most, int64_t least) {
    Rest& own = rest(thread);
    for (;;) {
      uint64_t seen = own.load(std::memory_order_relaxed);
      for (Span left = unpack(seen); left.begin < left.end; left = unpack(seen)) {
        const int64_t size = left.end - left.begin;
        const Span taken{left.begin, left.begin + std::min({size, most, std::max(least, (size + 1) / 2)})};
        if (own.compare_exchange_weak(seen, pack({taken.end, left.end}), std::memory_order_relaxed)) return taken;
      }
      if (!steal(own)) return {0, 0};
    }
  }

 private:
  using Rest = std::atomic<uint64_t>;
  static uint64_t pack(Span s) { return uint64_t(s.begin) << 32 | uint64_t(s.end); }
  static Span unpack(uint64_t bits) { return {int64_t(bits >> 32), int64_t(bits & UINT32_MAX)}; }
  Rest& rest(int64_t thread) const { return *std::launder(reinterpret_cast<Rest*>(lines_ + thread * kBytes)); }

  // Whether `own`, which is empty, now has units of another thread's. Nobody but its thread fills it.
  bool steal(Rest& own) {
    for (;;) {
      int64_t longest = 0, from = 0;
      for (int64_t t = 0; t < threads_; ++t) {
        const Span left = unpack(rest(t).load(std::memory_order_relaxed));
        if (left.end - left.begin > longest) longest = left.end - left.begin, from = t;
      }
      if (longest == 0) return false;
      uint64_t seen = rest(from).load(std::memory_order_relaxed);
      const Span left = unpack(seen);
      if (left.begin >= left.end) continue;
      const int64_t middle = left.begin + (left.end - left.begin) / 2;
      if (!rest(from).compare_exchange_strong(seen, pack({left.begin, middle}), std::memory_order_relaxed)) continue;
      own.store(pack({middle, left.end}), std::memory_order_relaxed);
      return true;
    }
  }

  char* lines_;
  int64_t threads_;
};
}  // namespace work
