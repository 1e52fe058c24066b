"""Attention with few bits on GPUs: rows of q and k become codes in a launch's scratch memory, whose products are those
of tensor cores; weights and values are those of exact attention."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fuser.ir.int8_attention import Int8Attention
from fuser.ir.prediction import Form, Prediction
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.target import Target
from fuser.kernels.attention import AnyPlan, AttentionMatch, Launch, Operands, ScorePolicy
from fuser.kernels.attention_cuda import (
    CudaAttention,
    CudaAttentionExtents,
    CudaAttentionParameters,
    choices,
)
from fuser.kernels.attention_predicted import constants_of, takes
from fuser.kernels.attention_tiles import BitOrder
from fuser.kernels.base import Cost, DType, KernelCall, KernelSpec
from fuser.kernels.plan import AttentionPlan

_MOST_KEYS = 32
"""Keys whose scores of two widths registers hold."""


@dataclass(frozen=True)
class CudaQuantizedExtents(CudaAttentionExtents):
    """``workspace`` bytes of scratch memory lie before what codes need. Then come the numbers of
    :class:`~fuser.ir.int8_attention.Int8Attention`, or of :class:`~fuser.ir.prediction.Prediction`, thresholds 1 where
    there are none."""

    workspace: int
    smooth: int
    limit: float
    q_threshold: float
    k_threshold: float


@dataclass(frozen=True)
class CudaQuantizedParameters(CudaAttentionParameters):
    """The parameters of one kernel: equal for all specifications of a ``form``, which is None for
    :class:`~fuser.ir.int8_attention.Int8Attention`."""

    form: Form | None = dataclasses.field(default=None, kw_only=True)

    few_bits: ClassVar[bool] = True

    @property
    def extents_kind(self) -> type[CudaAttentionExtents]:
        return CudaQuantizedExtents

    @property
    def policy(self) -> ScorePolicy:
        return ScorePolicy("Int8", "int8.cuh") if self.form is None else ScorePolicy("Predicted", "predicted.cuh")

    @property
    def codes(self) -> int:
        return 1 if self.form is None or self.given else 2

    @property
    def given(self) -> bool:
        return self.form is not None and self.form.high_bits is None

    @property
    def surveys(self) -> bool:
        return self.form is not None

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        return {} if self.form is None else constants_of(self.form)

    @property
    def key_bytes(self) -> int:
        return self.codes * -(-self.head_dim // 32) * 32 + 16 + self.given * self.given_bytes

    @property
    def shares_queries(self) -> bool:
        return self.head_dim > 128 or (self.given and self.order is BitOrder.VECTOR)


@dataclass(frozen=True)
class CudaQuantizedAttention:
    """A kernel and the numbers that one specification gives it."""

    kernel: CudaQuantizedParameters
    quantize: ScoreQuantization

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        """Raises ScoreError for averages that no step of calibration has begun."""
        made = self.kernel.launch(plan, operands, scale, target, threads)
        made = dataclasses.replace(made, workspace_bytes=-(-made.workspace_bytes // 16) * 16)
        assert isinstance(plan, AttentionPlan) and isinstance(made.extents, CudaAttentionExtents)
        batch, heads, key_heads = operands.heads
        q_len, kv_len = plan.lengths
        q_rows, how = batch * heads * q_len, self.quantize
        words = (q_rows + batch * key_heads * kv_len) * self.kernel.key_bytes // 4
        smooth, limit, thresholds = 0, 0.0, (1.0, 1.0)
        if isinstance(how, Prediction):
            how.check_calibrated()
            limit, thresholds = how.limit, how.thresholds or thresholds
            # Of every row, and of every part of one, two numbers; the largest elements of q and k; and those of heads.
            units = batch if made.extents.per_head else batch * heads
            words += 2 * (q_rows + units * made.extents.states) + 2 + batch * heads
        else:
            assert isinstance(how, Int8Attention)
            smooth = int(how.smooth)
            # Of every head the mean of its keys, and whether all have codes.
            words += batch * key_heads * (self.kernel.head_dim + 1)
        numbers = {"smooth": smooth, "limit": limit, "q_threshold": thresholds[0], "k_threshold": thresholds[1]}
        return made.with_scratch(CudaQuantizedExtents, words, **numbers)


def quantized_choices(
    how: ScoreQuantization,
    head_dim: int,
    value_dim: int,
    dtype: DType,
    mask: DType | None,
    lse: bool,
    target: Target,
    rule: ScoreRule | None,
) -> list[CudaAttentionParameters]:
    """Legal parameters on ``target`` of the kernel that computes what ``how`` says: see
    :func:`fuser.kernels.attention_cuda.choices`."""
    form = how.form if isinstance(how, Prediction) else None
    kind = functools.partial(CudaQuantizedParameters, form=form)
    return choices(
        *(head_dim, value_dim, dtype, mask, lse, target, rule), kind=kind, most_keys=64 if form is None else _MOST_KEYS
    )


class CudaFewBitsAttention(CudaAttention):
    """Attention plans whose scores are products of codes; :class:`CudaAttention` has the exact ones."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[CudaAttentionParameters]:
        """What shared memory and registers hold."""
        how, mask = match.quantize, match.mask_dtype
        if how is None or match.table is not None or match.out is None:
            return ()
        if not takes(how, None if mask is None else mask.torch):
            return ()
        return quantized_choices(how, *match.widths, match.dtype, mask, match.lse is not None, target, match.rule)

    def cost(self, match: AttentionMatch, parameters: CudaAttentionParameters, target: Target) -> Cost:
        """What is computed in full is known when it runs, and so not counted. Rows of q and k become codes first."""
        values = match.group.graph.values
        rows = sum(math.prod(values[value].shape[:3]) for value in (match.q, match.k))
        plain = super().cost(match, parameters, target)
        return dataclasses.replace(plain, bytes=plain.bytes + 2.0 * rows * parameters.key_bytes, launches=4)

    def call(
        self, match: AttentionMatch, parameters: CudaAttentionParameters, target: Target, threads: int
    ) -> KernelCall:
        assert isinstance(parameters, CudaQuantizedParameters) and match.quantize is not None
        return match.call(CudaQuantizedAttention(parameters, match.quantize), target, threads)
