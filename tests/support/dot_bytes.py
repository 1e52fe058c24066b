"""The instruction that multiplies bytes, in C++, for sources that are to run where a CPU does not have it, and what
attention by bytes must give."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fuser.ir.target import Isa, Target
from fuser.kernels.attention_int8 import Int8Kernel
from fuser.runtime.cpuinfo import features, has_isa
from fuser.runtime.device import cpu_target

AVX_VNNI = "avx_vnni"
# Bytes in narrow registers, of which rows of a group fill several tiles.
NARROW = [AVX_VNNI] if AVX_VNNI in features(Isa.AVX2) and has_isa(Isa.AVX2) else []
BLOCK = Int8Kernel(16, 16).key_block

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


def bytes_of(scores: Tensor, v: Tensor) -> Tensor:
    """Dithered weights in 255ths of the largest of their row and block, normalized as rounded, times values in 127ths
    of the largest of their element: in fp64."""
    scores, v = scores.double(), v.double()
    step = v.abs().amax(-2, keepdim=True) / 127
    codes = torch.where(step > 0, v / step, 0.0).round()
    top = scores.amax(-1, keepdim=True)
    sums, weights = 0.0, []
    for block in scores.split(BLOCK, -1):
        largest = block.amax(-1, keepdim=True)
        dither = torch.tensor([-0.375, 0.125, 0.375, -0.125], dtype=block.dtype).repeat(BLOCK // 4)[: block.shape[-1]]
        part = (255 * (block - largest).exp() + dither).round() / 255 * (largest - top).exp()
        sums = sums + part.sum(-1, keepdim=True)
        weights.append(part)
    return torch.cat(weights, -1) / sums @ (codes * step)


def check_bytes(out: Tensor, want: Tensor, largest: float = 3.0) -> None:
    """That outputs are those of :func:`bytes_of`, of values up to about ``largest``."""
    # A weight that lies between two bytes may become either, since exponentials are known to some digits only.
    far = (out.double() - want).abs()
    assert float((far < 2e-5).double().mean()) > 0.95 and float(far.max()) < 2 * largest / 255


def target(isa: Isa | str | None) -> Target:
    """An instruction set alone, AVX2 with products of bytes, or with None this machine's with all extensions."""
    if isa == AVX_VNNI:
        return dataclasses.replace(cpu_target(), arch=Isa.AVX2.value, features=frozenset({AVX_VNNI}))
    assert not isinstance(isa, str) or isinstance(isa, Isa)
    return cpu_target() if isa is None else dataclasses.replace(cpu_target(), arch=isa.value, features=frozenset())
