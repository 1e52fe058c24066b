// Walks the keys of a group, block by block, and leaves out those that the run-time mask allows to no row.
#pragma once
#include <cstring>

#include "attention/scratch.h"

namespace attention {

constexpr int64_t kFewKeys = 8;  // a smaller block is not worth starting for the sake of vectors that can be left out

// Swaps rows and columns of a matrix of bits: 32 x 32 quarters first, then 16 x 16 and so on.
static inline void transpose_bits(uint64_t* a) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int width = 32; width != 0; width >>= 1, mask ^= mask << width)
    for (int i = 0; i < 64; i += 2 * width)
      for (int k = i; k < i + width; ++k) {
        const uint64_t t = ((a[k] >> width) ^ a[k + width]) & mask;
        a[k] ^= t << width;
        a[k + width] ^= t;
      }
}

// The block of keys that comes next: w.key, w.lanes and w.bias of up to kKeyBlock keys that some row may see.
template <class C>
struct Block {
  const Head<C>& t;
  const Group& g;
  Scratch<C>& w;
  const bool exact;
  const bool row_mask = C::kMask && t.mask_row != 0, row_bias = C::kDistances || row_mask;
  const bool rows_in_turn = C::kDistances && in_turn();
  int64_t run = 0, at = 0, next = 0;
  int64_t n = 0;
  bool masked = false, skipped = false;
  const Range every{0, (g.count + L - 1) / L};
  Range range = every;  // vectors that some key of the block concerns

  // Compiled once for all that walk over a plan.
  __attribute__((noinline)) bool fill() {
    n = 0;
    masked = false;
    Range wanted = every;
    // A mask by rows is read for all candidates at once; a nearly full block is not worth another reading.
    const int64_t enough = row_mask ? C::kKeyBlock * 3 / 4 : C::kKeyBlock - 1;
    while (n <= enough) {
      int64_t room = C::kKeyBlock - n;
      if (run < g.runs) {
        const int32_t* r = g.run + 3 * run;
        if constexpr (C::kMask)
          if (r[2] == 1 && t.mask_key == 1)
            while (r[1] - at >= kGroup && none_seen(r[0] + at)) at += kGroup;
        room = r[1] - at < room ? r[1] - at : room;
        for (int64_t i = 0; i < room; ++i) {
          w.key[n + i] = r[0] + int32_t(at + i) * r[2];
          w.lanes[n + i] = ~0ull;
        }
        at += room;
        if (at == r[1]) ++run, at = 0;
        keep(room, r[2] == 1);
      } else if (next < g.keys) {
        room = g.keys - next < room ? g.keys - next : room;
        const Range concerned = vectors_of(g.key_lanes[next]);
        if (n >= kFewKeys && !(concerned == wanted)) break;
        if (n == 0) wanted = concerned;
        int64_t alike = 1;
        while (alike < room && vectors_of(g.key_lanes[next + alike]) == concerned) ++alike;
        room = alike;
        if (!(concerned == wanted)) wanted = every;
        std::memcpy(w.key + n, g.key + next, room * sizeof(int32_t));
        std::memcpy(w.lanes + n, g.key_lanes + next, room * sizeof(uint64_t));
        next += room;
        masked = true;
        keep(room, false);
      } else {
        break;
      }
    }
    range = every;
    if (masked && n > 0) {
      uint64_t lanes = 0;
      for (int64_t j = 0; j < n; ++j) lanes |= w.lanes[j];
      range = vectors_of(lanes & (~0ull >> (64 - g.count)));
    }
    if constexpr (C::kDistances) add_distances();
    return n > 0;
  }

 private:
  // Takes those of the candidates n ... n + size that the run-time mask allows to some row.
  void keep(int64_t size, bool contiguous) {
    if constexpr (!C::kMask) {
      n += size;
    } else if (row_mask) {
      while (size > 0) {
        // Kept keys move down to n, so what is still to be looked at starts where the last round ended.
        const int64_t part = size < kGroup ? size : kGroup, first = n;
        int64_t kept;
        if constexpr (C::kBias)
          kept = keep_by_bias(part, contiguous);
        else
          kept = keep_by_bits(part, contiguous);
        for (int64_t i = 0; i < size - part; ++i) {
          w.key[first + kept + i] = w.key[first + part + i];
          w.lanes[first + kept + i] = w.lanes[first + part + i];
        }
        n += kept;
        size -= part;
      }
    } else {
      const int64_t end = n + size;
      for (int64_t j = n; j < end; ++j) {
        const typename C::MaskElement* m = t.mask + w.key[j] * t.mask_key;
        w.key[n] = w.key[j];
        w.lanes[n] = w.lanes[j];
        if constexpr (C::kBias) {
          const float b = to_float(*m);
          w.bias[n] = b;
          const bool out = exact ? b == -kInf : b <= kNever;
          skipped |= out && b != -kInf;
          n += !out;
        } else {
          n += *m != 0;
        }
      }
    }
  }

  bool in_turn() const {
    for (int64_t r = 1; r < g.count; ++r)
      if (g.row[r] != g.row[0] + r) return false;
    return true;
  }

  // w.bias of all keys and rows: that of the run-time mask, if it is one, and that of their distance.
  void add_distances() {
    float by_key[C::kKeyBlock];
    const bool of_keys = C::kBias && !row_mask;
    if (of_keys) std::memcpy(by_key, w.bias, n * sizeof(float));
    for (int64_t j = 0; j < n; ++j) {
      const typename C::DistanceElement* const d = t.distances + w.key[j] * t.distance_step;
      float* const to = w.bias + j * w.pitch;
      for (int64_t r = 0; r < g.count; r += L) {
        const int64_t size = g.count - r < L ? g.count - r : L;
        vf x;
        if (rows_in_turn) {
          x = size == L ? load(d + g.row[r]) : load_n(d + g.row[r], size);
        } else {
          float lane[L] = {};
          for (int64_t i = 0; i < size; ++i) lane[i] = to_float(d[g.row[r + i]]);
          x = load(lane);
        }
        if (of_keys) x += by_key[j];
        store(to + r, C::kBias && row_mask ? x + load(to + r) : x);
      }
    }
  }

  // Whether the run-time mask allows kGroup keys from `first` to no row, as those of a cache that are still to come. What
  // a decoding step reads of its buffer beyond the last position is then the mask alone.
  bool none_seen(int64_t first) {
    vi allowed = {};
    for (int64_t r = row_mask ? g.count - 1 : 0; r >= 0; --r) {
      const typename C::MaskElement* m = mask_of(r) + first;
      if constexpr (C::kBias) {
        vi seen = {};
        for (int64_t j = 0; j < kGroup; j += L) {
          const vf b = load(m + j);
          seen |= ~(vi)(b <= (exact ? -kInf : kNever));
          allowed |= ~(vi)(b == set1(-kInf));
        }
        if (any(seen)) return false;
      } else {
        uint64_t words[kGroup / 8], seen = 0;
        std::memcpy(words, m, kGroup);
        for (const uint64_t word : words) seen |= word;
        if (seen != 0) return false;
      }
    }
    skipped |= any(allowed);
    return true;
  }

  const typename C::MaskElement* mask_of(int64_t lane) const { return t.mask + g.row[lane] * t.mask_row; }

  // How many of `size` keys at n have a bias that some row may see; they and their biases move down to n.
  int64_t keep_by_bias(int64_t size, bool contiguous) {
    int64_t kept = 0;
    for (int64_t j = 0; j < size; j += L) {
      const int64_t part = size - j < L ? size - j : L;
      float* tile = w.bias + (n + kept) * w.pitch;
      const auto row = [&](int64_t r) { return mask_of(r < g.count ? r : g.count - 1); };
      if (contiguous && t.mask_key == 1) {
        const int64_t first = w.key[n + j];
        rows_to_lanes<typename C::MaskElement>(tile, w.pitch, part, 1.0f, [&](int64_t r) { return row(r) + first; });
      } else {
        for (int64_t i = 0; i < part; ++i)
          for (int64_t r = 0; r < w.pitch; ++r)
            tile[i * w.pitch + r] = to_float(row(r)[w.key[n + j + i] * t.mask_key]);
      }
      for (int64_t i = 0; i < part; ++i) {
        const float* from = tile + i * w.pitch;
        float* to = w.bias + (n + kept) * w.pitch;
        // NaN compares false, and so is seen.
        vi seen = {}, allowed = {};
        for (int64_t v = 0; v < every.last; ++v) {
          const vf b = load(from + v * L);
          store(to + v * L, b);
          seen |= ~(vi)(b <= (exact ? -kInf : kNever));
          allowed |= ~(vi)(b == set1(-kInf));
        }
        w.key[n + kept] = w.key[n + j + i];
        w.lanes[n + kept] = w.lanes[n + j + i];
        const bool out = !any(seen);
        skipped |= out && any(allowed);
        kept += !out;
      }
    }
    return kept;
  }

  // How many of `size` keys at n some row may see; they and their lanes move down to n.
  int64_t keep_by_bits(int64_t size, bool contiguous) {
    alignas(64) uint64_t bits[kGroup] = {};
    if (contiguous && t.mask_key == 1) {
      for (int64_t r = 0; r < g.count; ++r) bits[r] = load_bits(mask_of(r) + w.key[n], size);
      transpose_bits(bits);
    } else {
      for (int64_t r = 0; r < g.count; ++r) {
        const typename C::MaskElement* m = mask_of(r);
        for (int64_t j = 0; j < size; ++j) bits[j] |= uint64_t(m[w.key[n + j] * t.mask_key] != 0) << r;
      }
    }
    const uint64_t all = g.count == 64 ? ~0ull : (1ull << g.count) - 1;
    int64_t kept = 0;
    for (int64_t j = 0; j < size; ++j) {
      const uint64_t lanes = w.lanes[n + j] & bits[j];
      w.key[n + kept] = w.key[n + j];
      w.lanes[n + kept] = lanes;
      masked |= (lanes & all) != all && lanes != 0;
      kept += (lanes & all) != 0;
    }
    return kept;
  }
};

}  // namespace attention
