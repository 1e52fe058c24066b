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
    """Values in 127ths of the largest of their row, whose size multiplies the row's weights, and these dithered in
    255ths of the largest of their row and block, normalized as they are: in fp64."""
    scores, v = scores.double(), v.double()
    step = v.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, v / step, 0.0).round()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    sized, rounded = weights * step.mT, []
    dither = torch.tensor([-0.375, 0.125, 0.375, -0.125], dtype=torch.float64).repeat(BLOCK // 4)
    for block in sized.split(BLOCK, -1):
        largest = block.amax(-1, keepdim=True)
        # Of a row that sees nothing of the block all weights are zero.
        part = (255 * block / largest.clamp_min(1e-300) + dither[: block.shape[-1]]).round() / 255 * largest
        rounded.append(part)
    return torch.cat(rounded, -1) @ codes / weights.sum(-1, keepdim=True)


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
