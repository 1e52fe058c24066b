"""The instruction that multiplies bytes, in C++, for sources that are to run where a CPU does not have it."""

from __future__ import annotations

# What VPDPBUSD does in every lane.
MODEL = """
#include "simd.h"
FUSER_INLINE simd::vi dot_bytes(simd::vi sum, simd::vi a, simd::vi b) {
  for (int i = 0; i < simd::kLanes; ++i)
    for (int byte = 0; byte < 32; byte += 8) sum[i] += int(uint8_t(a[i] >> byte)) * int(int8_t(b[i] >> byte));
  return sum;
}
#define FUSER_DOT_BYTES dot_bytes
"""
