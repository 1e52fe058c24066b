"""Attention by a plan whose scores are predicted with few bits: :mod:`fuser.ir.prediction` on CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fuser.ir.prediction import EmptyRow, Form, Prediction
from fuser.ir.score_quantization import ScoreQuantization
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
from fuser.kernels.attention_int8 import byte_words, multiplies_bytes
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec

_LANES = 64
"""Rows of a group, as in attention/scratch.h."""
_KEYS_BEYOND = 8
"""Keys that a kernel's tiles may reach beyond the last one."""


@dataclass(frozen=True)
class PredictedExtents(AttentionExtents):
    """``workspace`` bytes of scratch memory lie before what predictions need, and every thread has room for ``sums``
    products of codes, of all keys of a group, if it keeps them; the numbers are those of
    :class:`Prediction`, thresholds 1 where there are none."""

    workspace: int
    sums: int
    limit: float
    q_threshold: float
    k_threshold: float


@dataclass(frozen=True)
class PredictedKernel(AttentionParameters):
    """The parameters of one kernel: equal for all thresholds."""

    form: Form = dataclasses.field(kw_only=True)

    few_bits: ClassVar[bool] = True
    policy: ClassVar[ScorePolicy] = ScorePolicy("Predicted", "predicted.h")
    extents_kind: ClassVar[type[AttentionExtents]] = PredictedExtents

    @property
    def few_rows(self) -> int:
        """Rows lie in lanes, however few they are."""
        return 0

    @property
    def keeps_products(self) -> bool:
        """Whether limits depend on nothing but their row, and products of codes have 16 bits."""
        return self.mask is None and not self.form.over_rows and self.form.bits <= 4

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        return constants_of(self.form)


@dataclass(frozen=True)
class PredictedAttention:
    """A kernel and the numbers that one specification gives it."""

    kernel: PredictedKernel
    quantize: Prediction

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        """Raises ScoreError for averages that no step of calibration has begun."""
        made = self.kernel.launch(plan, operands, scale, target, threads)
        batch, heads, key_heads = operands.heads
        q_len, kv_len = plan.lengths
        # A line of memory with the factor of codes; two numbers for each row of q; two and its codes for each of k, and
        # its values as bf16 where they are multiplied so.
        keys = batch * key_heads * kv_len
        words = 16 + 2 * batch * heads * q_len + keys * (2 + (self.kernel.head_dim + 3) // 4)
        if self.quantize.high_bits is not None:
            words += byte_words(self.kernel, batch * key_heads, kv_len)
        if "avx512_bf16" in target.features:
            words += (keys * self.kernel.value_dim + 1) // 2
        sums = 0
        if self.kernel.keeps_products and plan.phases == 1:
            sums = (plan.most_keys + _KEYS_BEYOND) * _LANES
        words += (threads * sums + 1) // 2
        self.quantize.check_calibrated()
        q_threshold, k_threshold = self.quantize.thresholds or (1.0, 1.0)
        return made.with_scratch(
            PredictedExtents,
            words,
            sums=sums,
            limit=self.quantize.limit,
            q_threshold=q_threshold,
            k_threshold=k_threshold,
        )


def constants_of(form: Form) -> Mapping[str, int | bool | float]:
    """What the configuration of a kernel says of the form, by its names in C++."""
    return {
        "kBits": form.bits,
        "kHighBits": form.high_bits or 0,
        "kPerRow": form.per_row,
        "kDynamic": form.dynamic,
        "kNormalize": form.normalize,
        "kSums": form.needs_sums,
        "kProbability": form.probability,
        "kBefore": form.before_softmax,
        "kOverRows": form.over_rows,
        "kOverHeads": form.over_heads,
        "kInverse": form.inverse,
        "kPrune": form.prune,
        "kBestOfEmpty": form.empty_row is EmptyRow.ARGMAX,
        "kAllOfEmpty": form.empty_row is EmptyRow.DENSE,
    }


def takes(quantize: ScoreQuantization, mask: torch.dtype | None) -> bool:
    """Whether the kernel makes these decisions under a run-time mask of this dtype: it knows no scores without what is
    added to them."""
    return mask in (None, torch.bool) or not quantize.unmasked_maximum


class CpuPredictedAttention(Implementation[AttentionMatch, PredictedKernel]):
    """Attention plans whose scores have a width each."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[PredictedKernel]:
        """One choice, that of the form."""
        how, mask = match.quantize, match.mask_dtype
        if not isinstance(how, Prediction) or not takes(how, None if mask is None else mask.torch):
            return ()
        return [PredictedKernel(*match.widths, match.dtype, mask, rule=match.rule, form=how.form)]

    def cost(self, match: AttentionMatch, parameters: PredictedKernel, target: Target) -> Cost:
        """What is computed in full is known when it runs, and so not counted."""
        plain = CpuAttention().cost(match, parameters, target)
        pairs, high = 2.0 * match.pairs(target), parameters.form.high_bits is not None
        of_codes, in_full = (target.peak_flops / target.rate(dtype) for dtype in (torch.int8, parameters.dtype.torch))
        walks = 1 if parameters.keeps_products else 2
        flops = pairs * parameters.head_dim * ((walks + high) * of_codes - in_full)
        if high and not parameters.form.prune and multiplies_bytes(target):
            flops += pairs * parameters.value_dim * (of_codes - in_full)
        return dataclasses.replace(plain, flops=plain.flops + flops)

    def call(self, match: AttentionMatch, parameters: PredictedKernel, target: Target, threads: int) -> KernelCall:
        assert isinstance(match.quantize, Prediction)
        return match.call(PredictedAttention(parameters, match.quantize), target, threads)
