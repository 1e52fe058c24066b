"""Attention by a plan in 8 bits: :mod:`fuser.ir.int8_attention` on CPUs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fuser.ir.int8_attention import Int8Attention
from fuser.ir.target import Target
from fuser.kernels.attention import (
    AnyPlan,
    AttentionExtents,
    AttentionMatch,
    AttentionParameters,
    CpuAttention,
    Launch,
    Operands,
    ScorePolicy,
)
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec

_BYTES = frozenset({"avx512_vnni", "avx_vnni"})
"""Features by which weights and values are multiplied as bytes."""
_ROUNDING_FLOPS = 80
"""What turning an element of q, k or v into a code takes, in operations at the peak: measured on Zen 5, 256 tokens."""


@dataclass(frozen=True)
class Int8Extents(AttentionExtents):
    """``workspace`` bytes of scratch memory lie before what codes need; whether keys lose their mean; and the part of a
    row's probability that may be left out."""

    workspace: int
    smooth: int
    skip: float


@dataclass(frozen=True)
class Int8Kernel(AttentionParameters):
    """The parameters of one kernel: equal for all specifications. With ``documents``, keys lose the mean of their
    document, and the call reads of which one each is: ``rows`` and ``length`` of :class:`DocumentMask`."""

    documents: bool = False

    few_bits: ClassVar[bool] = True
    policy: ClassVar[ScorePolicy] = ScorePolicy("Int8", "int8.h")
    extents_kind: ClassVar[type[AttentionExtents]] = Int8Extents

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        return {"kDocuments": self.documents}

    @property
    def few_rows(self) -> int:
        """Rows lie in lanes, however few they are."""
        return 0


@dataclass(frozen=True)
class Int8Launch:
    """A kernel and the numbers that one specification gives it."""

    kernel: Int8Kernel
    quantize: Int8Attention

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        made = self.kernel.launch(plan, operands, scale, target, threads)
        batch, _, key_heads = operands.heads
        heads, how = batch * key_heads, self.quantize
        # Of every head the mean of its keys.
        words = byte_words(self.kernel, heads, plan.lengths[1]) + heads * self.kernel.head_dim
        return made.with_scratch(Int8Extents, words, smooth=int(how.smooth), skip=how.skip)


def byte_words(kernel: AttentionParameters, heads: int, keys: int) -> int:
    """The words of 32 bits that codes of 8 bits and bytes take: see ``Shared`` of attention/bytes.h."""
    # Of every head the largest value, and whether all is finite; of every key its step, what its products start with,
    # its codes, and two numbers for the step of its values; and the values of four keys in a word.
    of_keys = keys * (4 + (kernel.head_dim + 3) // 4) + (keys + 3) // 4 * kernel.value_dim
    return heads * (2 + of_keys)


def multiplies_bytes(target: Target) -> bool:
    """Whether weights and values are multiplied as bytes."""
    return bool(target.features & _BYTES)


class CpuInt8Attention(Implementation[AttentionMatch, Int8Kernel]):
    """Attention plans whose scores are products of int8 codes; :class:`CpuAttention` has the exact ones."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[Int8Kernel]:
        """One choice."""
        mask = match.mask_dtype
        if not isinstance(match.quantize, Int8Attention):
            return ()
        documents = match.documents is not None and match.quantize.smooth
        return [Int8Kernel(*match.widths, match.dtype, mask, rule=match.rule, documents=documents)]

    def cost(self, match: AttentionMatch, parameters: Int8Kernel, target: Target) -> Cost:
        """What is skipped is known when it runs, and so not counted."""
        plain, values = CpuAttention().cost(match, parameters, target), match.group.graph.values
        in_bytes = parameters.head_dim + multiplies_bytes(target) * parameters.value_dim
        products = 2.0 * match.pairs(target) * in_bytes
        of_codes, in_full = (target.peak_flops / target.rate(dtype) for dtype in (torch.int8, parameters.dtype.torch))
        rounded = sum(math.prod(values[value].shape) for value in (match.q, match.k, match.v) if value is not None)
        return dataclasses.replace(
            plain, flops=plain.flops + products * (of_codes - in_full) + _ROUNDING_FLOPS * rounded
        )

    def call(self, match: AttentionMatch, parameters: Int8Kernel, target: Target, threads: int) -> KernelCall:
        assert isinstance(match.quantize, Int8Attention)
        call, documents = match.call(Int8Launch(parameters, match.quantize), target, threads), match.documents
        return call.reading(*documents) if parameters.documents and documents is not None else call
