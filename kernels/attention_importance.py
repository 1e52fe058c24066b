"""Attention to proposals with LARA's importance weights, which are never stored: :mod:`fuser.ir.importance` on CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fuser.ir.importance import LEAST_WEIGHT
from fuser.ir.size import Size
from fuser.ir.target import Target
from fuser.kernels.attention import (
    AnyPlan,
    AttentionExtents,
    AttentionMatch,
    AttentionParameters,
    CpuAttention,
    HeadStrides,
    Launch,
    Operands,
    ScorePolicy,
)
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec

MOST_LANDMARKS = 256
"""The mean over landmarks needs all of them in one block of keys."""
_STEP = 32


@dataclass(frozen=True)
class ImportanceExtents(AttentionExtents):
    """With elements between batch entries, heads and landmarks of what the bias is made of, and its coefficient."""

    landmarks: HeadStrides
    sums: HeadStrides
    heuristic: HeadStrides
    offset: HeadStrides
    coefficient: float


@dataclass(frozen=True)
class ImportanceParameters(AttentionParameters):
    """The parameters of one kernel, whose block of keys holds all landmarks."""

    policy: ClassVar[ScorePolicy] = ScorePolicy("Importance", "importance.h")
    extents_kind: ClassVar[type[AttentionExtents]] = ImportanceExtents

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        return {"kLeastWeight": LEAST_WEIGHT}

    @property
    def few_rows(self) -> int:
        """Rows lie in lanes, however few they are."""
        return 0


class CpuImportanceAttention(Implementation[AttentionMatch, ImportanceParameters]):
    """Attention whose bias is made from a second product, block by block."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[ImportanceParameters]:
        """One choice, in fp32."""
        if match.importance is None or match.out is None or match.lse is not None:
            return ()
        values = match.group.graph.values
        specs = [values[value] for value in (match.q, *match.importance.inputs[1:])]
        count = specs[1].shape[2]
        if (
            isinstance(count, Size)
            or count > MOST_LANDMARKS
            or any(STORAGE.get(s.dtype) is not DType.F32 for s in specs)
        ):
            return ()
        if specs[1].strides[3] != 1 or specs[1].shape[:2] != specs[0].shape[:2]:
            return ()
        return [ImportanceParameters(*match.widths, key_block=-(-count // _STEP) * _STEP)]

    def cost(self, match: AttentionMatch, parameters: ImportanceParameters, target: Target) -> Cost:
        assert match.importance is not None
        plain = CpuAttention().cost(match, parameters, target)
        return dataclasses.replace(plain, flops=plain.flops + match.group.graph.flops(match.importance))

    def call(self, match: AttentionMatch, parameters: ImportanceParameters, target: Target, threads: int) -> KernelCall:
        assert match.importance is not None
        parts = match.importance.inputs[1:]
        strides = tuple(HeadStrides(*match.group.graph.values[value].strides[:3]) for value in parts)
        weighted = _Weighted(parameters, strides, match.importance.semantics.coefficient)
        made = match.call(weighted, target, threads)
        return made.reading(*parts)


@dataclass(frozen=True)
class _Weighted:
    """A kernel and what one operator gives it: strides of landmarks, sums, heuristic and offset, and a coefficient."""

    kernel: ImportanceParameters
    strides: tuple[HeadStrides, ...]
    coefficient: float

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        made = self.kernel.launch(plan, operands, scale, target, threads)
        landmarks, sums, heuristic, offset = self.strides
        return made.extended(
            ImportanceExtents,
            landmarks=landmarks,
            sums=sums,
            heuristic=heuristic,
            offset=offset,
            coefficient=self.coefficient,
        )
