"""Attention to tokens and summaries that lie where they were made: :class:`fuser.ir.windows.Windowed` on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec


@dataclass(frozen=True)
class JoinedExtents(AttentionExtents):
    """Keys before ``tokens`` are tokens: key j is the token ``near_first`` + ``step`` · j. Others are the summaries
    ``far_first`` + ``step`` · j, of whose keys and values these are the strides."""

    tokens: int
    step: int
    near_first: int
    far_first: int
    far_k: HeadStrides
    far_v: HeadStrides


@dataclass(frozen=True)
class JoinedParameters(AttentionParameters):
    """The parameters of one kernel."""

    policy: ClassVar[ScorePolicy] = ScorePolicy("Joined", "joined.h")
    extents_kind: ClassVar[type[AttentionExtents]] = JoinedExtents


class CpuJoinedAttention(Implementation[AttentionMatch, JoinedParameters]):
    """Attention with two sources of keys."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[JoinedParameters]:
        """One choice, where rows of all sources are contiguous."""
        if match.joins is None or match.out is None or match.disentangled is not None:
            return ()
        parts = [match.group.graph.values[value] for op in match.joins for value in op.inputs]
        if any(s.strides[3] != 1 and s.shape[3] > 1 for s in parts) or len({s.dtype for s in parts}) > 1:
            return ()
        lse = match.lse is not None
        return [JoinedParameters(*match.widths, match.dtype, match.mask_dtype, lse, **match.of_scores)]

    def cost(self, match: AttentionMatch, parameters: JoinedParameters, target: Target) -> Cost:
        return CpuAttention().cost(match, parameters, target)

    def call(self, match: AttentionMatch, parameters: JoinedParameters, target: Target, threads: int) -> KernelCall:
        assert match.joins is not None
        values, (of_keys, of_values) = match.group.graph.values, match.joins
        windowed = of_keys.semantics.windowed
        (_, _, tokens, _), (_, _, summaries, _) = (values[value].shape for value in of_keys.inputs)
        behind = tokens + windowed.gap
        far_k, far_v = (HeadStrides(*values[op.inputs[1]].strides[:3]) for op in (of_keys, of_values))
        places = (-1, tokens - 1, behind + summaries - 1) if windowed.relative else (1, 0, -behind)
        call = match.call(_Placed(parameters, (tokens, *places), (far_k, far_v)), target, threads)
        return call.reading(of_keys.inputs[1], of_values.inputs[1])


@dataclass(frozen=True)
class _Placed:
    """A kernel, and where keys are: tokens, step, and where both kinds begin; and the strides of summaries."""

    kernel: JoinedParameters
    places: tuple[int, int, int, int]
    far: tuple[HeadStrides, HeadStrides]

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        made = self.kernel.launch(plan, operands, scale, target, threads)
        tokens, step, near_first, far_first = self.places
        far_k, far_v = self.far
        return made.extended(
            JoinedExtents,
            tokens=tokens,
            step=step,
            near_first=near_first,
            far_first=far_first,
            far_k=far_k,
            far_v=far_v,
        )
