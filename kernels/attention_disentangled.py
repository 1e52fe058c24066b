"""Attention whose bias is read from products with relative positions, by distance: DeBERTa's on CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec

_LOOK_UP_FLOPS = 40
"""What reading a number by its distance costs."""


@dataclass(frozen=True)
class DisentangledExtents(AttentionExtents):
    """With elements between batch entries, heads and rows of the products with positions, and what they are multiplied
    with; zeros for a part that there is not."""

    queries: HeadStrides
    keys: HeadStrides
    query_factor: float
    key_factor: float


@dataclass(frozen=True, kw_only=True)
class DisentangledParameters(AttentionParameters):
    """The parameters of one kernel: whether there are products of queries, and of keys, with positions."""

    of_queries: bool
    of_keys: bool

    policy: ClassVar[ScorePolicy] = ScorePolicy("Disentangled", "disentangled.h")
    extents_kind: ClassVar[type[AttentionExtents]] = DisentangledExtents

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        return {"kOfQueries": self.of_queries, "kOfKeys": self.of_keys}

    @property
    def few_rows(self) -> int:
        """Rows lie in lanes, however few they are."""
        return 0


class CpuDisentangledAttention(Implementation[AttentionMatch, DisentangledParameters]):
    """Attention that looks up what positions add to its scores."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[DisentangledParameters]:
        """One choice, in fp32."""
        if match.disentangled is None or match.lse is not None or match.rule is not None or match.joins is not None:
            return ()
        values, how = match.group.graph.values, match.disentangled.semantics
        products = [values[value] for value in match.disentangled.inputs[: how.parts * 2 : 2]]
        if any(STORAGE.get(spec.dtype) is not DType.F32 for spec in (values[match.q], *products)):
            return ()
        if any(spec.strides[3] != 1 for spec in products):
            return ()
        return [
            DisentangledParameters(
                *match.widths,
                match.dtype,
                match.mask_dtype,
                distances=match.distances_dtype,
                of_queries=how.queries is not None,
                of_keys=how.keys is not None,
            )
        ]

    def cost(self, match: AttentionMatch, parameters: DisentangledParameters, target: Target) -> Cost:
        assert match.disentangled is not None
        plain, spec = CpuAttention().cost(match, parameters, target), match.group.graph.values
        pairs = spec[match.disentangled.output].numel
        products = sum(spec[value].nbytes for value in match.disentangled.inputs)
        more = match.disentangled.semantics.parts * _LOOK_UP_FLOPS * pairs
        return dataclasses.replace(plain, flops=plain.flops + more, bytes=plain.bytes + products)

    def call(
        self, match: AttentionMatch, parameters: DisentangledParameters, target: Target, threads: int
    ) -> KernelCall:
        assert match.disentangled is not None
        op, how = match.disentangled, match.disentangled.semantics
        parts = op.inputs[: 2 * how.parts]
        rows = [HeadStrides(*match.group.graph.values[value].strides[:3]) for value in parts[::2]]
        none = HeadStrides(0, 0, 0)
        queries = none if how.queries is None else rows[0]
        keys = none if how.keys is None else rows[-1]
        kernel = _LookedUp(parameters, queries, keys, how.queries or 0.0, how.keys or 0.0)
        made = match.call(kernel, target, threads)
        return made.reading(*parts)


@dataclass(frozen=True)
class _LookedUp:
    """A kernel and what one operator gives it: strides of products with positions, and factors."""

    kernel: DisentangledParameters
    queries: HeadStrides
    keys: HeadStrides
    query_factor: float
    key_factor: float

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        made = self.kernel.launch(plan, operands, scale, target, threads)
        return made.extended(
            DisentangledExtents,
            queries=self.queries,
            keys=self.keys,
            query_factor=self.query_factor,
            key_factor=self.key_factor,
        )
