// An attention plan as a kernel reads it: the arrays that kernels/plan.py writes, in their order.
#pragma once
#include <cstdint>

#include "simd.h"

namespace attention {

constexpr int64_t kPlanFormat = 1;

struct Plan {
  int64_t format, q_len, kv_len, heads, phases, groups, slots, members, runs, keys;
  const uint64_t *key_lanes, *resume, *finish;
  const int32_t *row_ptr, *run_ptr, *key_ptr, *width, *head, *phase, *phase_groups, *row, *slot, *run, *key;

  explicit Plan(const int64_t* p) {
    int64_t* const header[] = {&format, &q_len, &kv_len, &heads, &phases, &groups, &slots, &members, &runs, &keys};
    for (int64_t* field : header) *field = *p++;
    const auto words = [&p](int64_t n) {
      const auto* a = reinterpret_cast<const uint64_t*>(p);
      p += n;
      return a;
    };
    const auto halves = [&p](int64_t n) {
      const auto* a = reinterpret_cast<const int32_t*>(p);
      p += (n + 1) / 2;
      return a;
    };
    key_lanes = words(keys), resume = words(groups), finish = words(groups);
    row_ptr = halves(groups + 1), run_ptr = halves(groups + 1), key_ptr = halves(groups + 1);
    width = halves(groups), head = halves(groups), phase = halves(groups);
    phase_groups = halves((heads ? heads : 1) * phases);
    row = halves(members), slot = halves(members), run = halves(3 * runs), key = halves(keys);
  }

  // Groups of every phase of a head.
  const int32_t* groups_of(int64_t h) const { return phase_groups + (heads ? h * phases : 0); }

  int64_t keys_of(int64_t group) const {
    int64_t count = key_ptr[group + 1] - key_ptr[group];
    for (int64_t r = run_ptr[group]; r < run_ptr[group + 1]; ++r) count += run[3 * r + 1];
    return count;
  }

  // Calls f(key) for the keys of a group, runs first.
  template <class F>
  void each_key(int64_t group, const F& f) const {
    const int32_t* const end = run + 3 * int64_t(run_ptr[group + 1]);
    for (const int32_t* r = run + 3 * int64_t(run_ptr[group]); r != end; r += 3)
      for (int32_t j = 0; j < r[1]; ++j) f(r[0] + int64_t(j) * r[2]);
    for (int64_t j = key_ptr[group]; j < key_ptr[group + 1]; ++j) f(key[j]);
  }
};

// Rows that share keys: runs of (first, count, step) for all rows, then single keys with the lanes that see them.
struct Group {
  const int32_t *row, *slot, *run, *key;
  const uint64_t* key_lanes;
  uint64_t resume, finish;  // lanes whose row an earlier phase has begun, and those whose row ends here
  int64_t count, runs, keys;

  Group(const Plan& plan, int64_t i) {
    const int32_t row_at = plan.row_ptr[i], run_at = plan.run_ptr[i], key_at = plan.key_ptr[i];
    row = plan.row + row_at, slot = plan.slot + row_at, run = plan.run + 3 * int64_t(run_at);
    key = plan.key + key_at, key_lanes = plan.key_lanes + key_at;
    resume = plan.resume[i], finish = plan.finish[i];
    count = plan.row_ptr[i + 1] - row_at, runs = plan.run_ptr[i + 1] - run_at, keys = plan.key_ptr[i + 1] - key_at;
  }
};

}  // namespace attention
