// Linear attention as a recurrence: a block of rows of the state stays in registers while the tokens of a chunk pass.
//
// Tasks are (batch entry, head of keys, block of columns of the values), which do not depend on each other. A CPU has no
// faster product of matrices than this, and a token costs one multiplication less for each element of the state.
//
// A configuration C:
//   Extents                       the kernel's extents
//   Key, Value, Gate, Beta        types of q and k, of v and the output, of the decay, and of beta
//   kWidth, kGroup                columns of keys; heads of queries for each of keys
//   kVectors                      vectors of a block of columns
//   kCausal, kDelta, kFloor       see Recurrence; kFloor: whether outputs are divided by their sums
//   kDecays                       numbers of the decay for a token: 0, 1 or kWidth
//   kResumed, kKept               whether there is a first state; whether the last one is written
#pragma once
#include <algorithm>
#include <omp.h>
#include "abi.h"
#include "simd.h"

namespace linear_attention {
using namespace simd;

constexpr int64_t kChunk = 32;  // tokens
constexpr int64_t kRegisters = FUSER_VECTOR_BYTES == 64 ? 16 : 8;  // vectors of the state at a time

template <class T>
FUSER_INLINE vf load_part(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_n(p, n) : vf{};
}
template <class T>
FUSER_INLINE void store_part(T* p, vf v, int64_t n) {
  if (n >= kLanes) store(p, v);
  else if (n > 0) store_n(p, v, n);
}

// What one thread works in; rows are whole vectors, padded by zeros.
template <class C>
struct alignas(64) Work {
  static constexpr int64_t kRow = (C::kWidth + kLanes - 1) / kLanes * kLanes, kColumns = C::kVectors * kLanes;
  static constexpr int64_t kRows = kRegisters / C::kVectors;  // of the state in registers
  static constexpr int64_t kGates = C::kDecays > 1 ? kRow : 1;
  float q[C::kGroup][kChunk][kRow], k[kChunk][kRow], v[kChunk][kColumns], out[C::kGroup][kChunk][kColumns];
  float state[kRow][kColumns], sum[kRow], kept[kChunk][kGates], beta[kChunk], below[C::kGroup][kChunk];
};

// Rows of n tokens from p on, `stride` elements apart, times `factor`.
template <int64_t kTo, class T>
FUSER_INLINE void pack(const T* p, int64_t stride, int64_t n, int64_t columns, float factor, float (*to)[kTo]) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < kTo; i += kLanes) store(to[t] + i, load_part(p + t * stride + i, columns - i) * factor);
}

// The recurrence for rows r to r + R of the state and n tokens; queries read it where it is causal.
template <class C, int64_t R>
FUSER_INLINE void advance(Work<C>& w, int64_t r, int64_t n) {
  vf s[R][C::kVectors];
#pragma GCC unroll 16
  for (int64_t i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < C::kVectors; ++j) s[i][j] = load(w.state[r + i] + j * kLanes);
  for (int64_t t = 0; t < n; ++t) {
    vf v[C::kVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < C::kVectors; ++j) v[j] = load(w.v[t] + j * kLanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < R; ++i) {
      const vf k = set1(w.k[t][r + i]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < C::kVectors; ++j) {
        if constexpr (C::kDecays > 0) s[i][j] = s[i][j] * set1(w.kept[t][C::kDecays > 1 ? r + i : 0]);
        s[i][j] = s[i][j] + k * v[j];
      }
    }
    if constexpr (C::kCausal) {
      for (int64_t g = 0; g < C::kGroup; ++g) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < C::kVectors; ++j) {
          float* const to = w.out[g][t] + j * kLanes;
          vf sum = load(to);
#pragma GCC unroll 16
          for (int64_t i = 0; i < R; ++i) sum = sum + set1(w.q[g][t][r + i]) * s[i][j];
          store(to, sum);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < C::kVectors; ++j) store(w.state[r + i] + j * kLanes, s[i][j]);
}

template <class C>
FUSER_INLINE void advance_all(Work<C>& w, int64_t n) {
  constexpr int64_t whole = C::kWidth / Work<C>::kRows * Work<C>::kRows;
  for (int64_t r = 0; r < whole; r += Work<C>::kRows) advance<C, Work<C>::kRows>(w, r, n);
  for (int64_t r = whole; r < C::kWidth; ++r) advance<C, 1>(w, r, n);
}

// The same with the delta rule, where a token needs what all rows have for its key.
template <class C>
FUSER_INLINE void correct_all(Work<C>& w, int64_t n) {
  constexpr int64_t V = C::kVectors;
  for (int64_t t = 0; t < n; ++t) {
    const auto kept = [&](int64_t r) { return C::kDecays ? set1(w.kept[t][C::kDecays > 1 ? r : 0]) : set1(1.0f); };
    vf found[2][V] = {}, out[C::kGroup][V] = {};
    for (int64_t r = 0; r < Work<C>::kRow; r += 2)
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const vf k = C::kDecays ? kept(r + i) * set1(w.k[t][r + i]) : set1(w.k[t][r + i]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < V; ++j) found[i][j] = found[i][j] + k * load(w.state[r + i] + j * kLanes);
      }
    vf u[V];
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) u[j] = set1(w.beta[t]) * (load(w.v[t] + j * kLanes) - (found[0][j] + found[1][j]));
    for (int64_t r = 0; r < C::kWidth; ++r) {
      const vf k = set1(w.k[t][r]), g = kept(r);
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) {
        float* const at = w.state[r] + j * kLanes;
        const vf s = (C::kDecays ? g * load(at) : load(at)) + k * u[j];
        store(at, s);
#pragma GCC unroll 8
        for (int64_t h = 0; h < C::kGroup; ++h) out[h][j] = out[h][j] + set1(w.q[h][t][r]) * s;
      }
    }
    for (int64_t h = 0; h < C::kGroup; ++h)
      for (int64_t j = 0; j < V; ++j) store(w.out[h][t] + j * kLanes, out[h][j]);
  }
}

// Sums of keys, and those of a causal recurrence that belong to its queries.
template <class C>
FUSER_INLINE void add_keys(Work<C>& w, int64_t n) {
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < Work<C>::kRow; i += kLanes) {
      vf sum = load(w.sum + i);
      if constexpr (C::kDecays == 1) sum = sum * set1(w.kept[t][0]);
      if constexpr (C::kDecays > 1) sum = sum * load(w.kept[t] + i);
      store(w.sum + i, sum + load(w.k[t] + i));
    }
    if constexpr (C::kCausal) {
      for (int64_t g = 0; g < C::kGroup; ++g) {
        vf below = {};
        for (int64_t i = 0; i < Work<C>::kRow; i += kLanes) below = below + load(w.q[g][t] + i) * load(w.sum + i);
        w.below[g][t] = reduce_add(below);
      }
    }
  }
}

// Outputs of one chunk of queries from a state that does not change.
template <class C>
FUSER_INLINE void read(Work<C>& w, int64_t g, int64_t n) {
  constexpr int64_t R = Work<C>::kRows, V = C::kVectors;
  for (int64_t t = 0; t < n; t += R) {
    vf sum[R][V] = {};
    for (int64_t r = 0; r < C::kWidth; ++r) {
      vf s[V];
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) s[j] = load(w.state[r] + j * kLanes);
#pragma GCC unroll 16
      for (int64_t i = 0; i < R; ++i) {
        const vf q = set1(w.q[g][t + i][r]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < V; ++j) sum[i][j] = sum[i][j] + q * s[j];
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) store(w.out[g][t + i] + j * kLanes, sum[i][j]);
  }
  if constexpr (C::kFloor)
    for (int64_t t = 0; t < n; ++t) {
      vf below = {};
      for (int64_t i = 0; i < Work<C>::kRow; i += kLanes) below = below + load(w.q[g][t] + i) * load(w.sum + i);
      w.below[g][t] = reduce_add(below);
    }
}

template <class C>
struct Pointers {
  const typename C::Key *q, *k;
  const typename C::Value* v;
  const typename C::Gate* decay;
  const typename C::Beta* beta;
  const float* first;
  typename C::Value* out;
  float* last;
};

template <class C>
FUSER_INLINE void write(const Work<C>& w, const typename C::Extents& e, typename C::Value* to, int64_t g, int64_t n,
                        int64_t columns) {
  for (int64_t t = 0; t < n; ++t) {
    const float floor = float(e.floor);
    // The order of operands keeps NaN.
    const float below = w.below[g][t] < floor ? floor : w.below[g][t];
    for (int64_t i = 0; i < columns; i += kLanes) {
      const vf sum = load(w.out[g][t] + i);
      store_part(to + t * e.out.row + i, C::kFloor ? sum / set1(below) : sum, columns - i);
    }
  }
}

template <class C>
void run_task(Work<C>& w, const typename C::Extents& e, const Pointers<C>& p, int64_t b, int64_t h, int64_t block) {
  using W = Work<C>;
  constexpr int64_t more = C::kFloor ? 1 : 0;
  const int64_t first = block * W::kColumns, columns = std::min(W::kColumns, e.columns - first), row = e.columns + more;
  const auto* const k = p.k + b * e.k.batch + h * e.k.head;
  const auto* const v = p.v + b * e.v.batch + h * e.v.head + first;
  const auto q_at = [&](int64_t g, int64_t t) {
    return p.q + b * e.q.batch + (h * C::kGroup + g) * e.q.head + t * e.q.row;
  };
  const auto out_at = [&](int64_t g, int64_t t) {
    return p.out + b * e.out.batch + (h * C::kGroup + g) * e.out.head + t * e.out.row + first;
  };
  for (int64_t r = 0; r < W::kRow; ++r) {
    const float* const from = C::kResumed ? p.first + b * e.first.batch + h * e.first.head + r * e.first.row : nullptr;
    const bool there = C::kResumed && r < C::kWidth;
    for (int64_t i = 0; i < W::kColumns; i += kLanes)
      store(w.state[r] + i, there ? load_part(from + first + i, columns - i) : vf{});
    w.sum[r] = there && C::kFloor ? from[e.columns] : 0.0f;
  }
  for (int64_t t = 0; t < e.keys; t += kChunk) {
    const int64_t n = std::min(kChunk, e.keys - t);
    pack(k + t * e.k.row, e.k.row, n, C::kWidth, 1.0f, w.k);
    pack(v + t * e.v.row, e.v.row, n, columns, 1.0f, w.v);
    if constexpr (C::kDecays > 0) {
      const auto* const decay = p.decay + b * e.decay.batch + h * e.decay.head + t * e.decay.row;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C::kDecays; c += kLanes) {
          const vf kept = simd::exp(load_part(decay + i * e.decay.row + c, C::kDecays - c));
          store_part(w.kept[i] + c, kept, W::kGates - c);
        }
    }
    if constexpr (C::kDelta)
      for (int64_t i = 0; i < n; ++i)
        w.beta[i] = to_float(p.beta[b * e.beta.batch + h * e.beta.head + (t + i) * e.beta.row]);
    if constexpr (C::kCausal)
      for (int64_t g = 0; g < C::kGroup; ++g) {
        pack(q_at(g, t), e.q.row, n, C::kWidth, float(e.scale), w.q[g]);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t c = 0; c < W::kColumns; c += kLanes) store(w.out[g][i] + c, vf{});
      }
    if constexpr (C::kDelta) correct_all(w, n);
    else advance_all(w, n);
    if constexpr (C::kFloor) add_keys(w, n);
    if constexpr (C::kCausal)
      for (int64_t g = 0; g < C::kGroup; ++g) write(w, e, out_at(g, t), g, n, columns);
  }
  if constexpr (!C::kCausal)
    for (int64_t g = 0; g < C::kGroup; ++g)
      for (int64_t t = 0; t < e.queries; t += kChunk) {
        const int64_t n = std::min(kChunk, e.queries - t);
        pack(q_at(g, t), e.q.row, n, C::kWidth, float(e.scale), w.q[g]);
        read(w, g, n);
        write(w, e, out_at(g, t), g, n, columns);
      }
  if constexpr (C::kKept)
    for (int64_t r = 0; r < C::kWidth; ++r) {
      float* const to = p.last + ((b * e.heads + h) * C::kWidth + r) * row;
      for (int64_t i = 0; i < columns; i += kLanes) store_part(to + first + i, load(w.state[r] + i), columns - i);
      if (C::kFloor && block == 0) to[e.columns] = w.sum[r];
    }
}

template <class C>
int run(const FuserArgs* args) {
  const auto& e = *static_cast<const typename C::Extents*>(args->extents);
  int64_t at = 0;
  const auto next = [&](bool there) { return there ? args->tensors[at++] : nullptr; };
  Pointers<C> p;
  p.q = static_cast<const typename C::Key*>(next(true));
  p.k = static_cast<const typename C::Key*>(next(true));
  p.v = static_cast<const typename C::Value*>(next(true));
  p.decay = static_cast<const typename C::Gate*>(next(C::kDecays > 0));
  p.beta = static_cast<const typename C::Beta*>(next(C::kDelta));
  p.first = static_cast<const float*>(next(C::kResumed));
  p.out = static_cast<typename C::Value*>(next(true));
  p.last = static_cast<float*>(next(C::kKept));
  const int64_t blocks = (e.columns + Work<C>::kColumns - 1) / Work<C>::kColumns, tasks = e.batch * e.heads * blocks;
#pragma omp parallel for num_threads(args->threads) schedule(dynamic) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    auto& work = static_cast<Work<C>*>(args->workspace)[omp_get_thread_num()];
    run_task<C>(work, e, p, task / blocks / e.heads, task / blocks % e.heads, task % blocks);
  }
  return 0;
}

}  // namespace linear_attention
