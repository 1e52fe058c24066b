"""The `attention` family: q · kᵀ, scale, mask, softmax and · v as one kernel that runs an attention plan."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fuser.ir.binding import late_fields
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup, TensorSpec
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.operators import PV, QK, PatternMask, Scale, ScoreMask, Softmax
from fuser.ir.target import Target
from fuser.kernels.base import (
    STORAGE,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Literal,
    TensorRef,
    floating,
)
from fuser.kernels.plan import FEW_ROWS, AttentionPlan
from fuser.kernels.planner import PlanStore, stored_plan
from fuser.kernels.scores import ScoreRule

TEMPLATE = "cpu/attention.cpp.j2"
HEADS_IN_FLIGHT = 2


@dataclass(frozen=True)
class AttentionParameters:
    """``mask`` is the storage of the run-time mask: BOOL (True = may attend), F32 or BF16 (added to scores), or None.

    ``key_block`` keys are scored before their probabilities meet the values; ``lse`` adds the log-sum-exp output;
    ``rule`` changes scaled scores before masks do.
    """

    head_dim: int
    value_dim: int
    dtype: DType = DType.F32
    mask: DType | None = None
    lse: bool = False
    key_block: int = 96
    rule: ScoreRule | None = None

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("attention", TEMPLATE, self)

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return AttentionExtents.declaration()

    @property
    def few_rows(self) -> int:
        """The most rows of a group that is computed with the elements of a row in lanes."""
        return FEW_ROWS


@dataclass(frozen=True)
class HeadStrides(Extents):
    """Elements between batch entries, heads and rows of q, k, v or out."""

    batch: int
    head: int
    row: int


@dataclass(frozen=True)
class MaskStrides(Extents):
    """Elements between batch entries, heads, rows and keys of a run-time mask, 0 where it is broadcast."""

    batch: int
    head: int
    row: int
    key: int


@dataclass(frozen=True)
class AttentionExtents(Extents):
    """``mask`` is zero where there is no run-time mask, and where it is broadcast. ``in_flight`` is how many heads may
    be at work whose rows several phases share."""

    batch: int
    heads: int
    key_heads: int
    q_len: int
    kv_len: int
    scale: float
    in_flight: int
    q: HeadStrides
    k: HeadStrides
    v: HeadStrides
    out: HeadStrides
    mask: MaskStrides


def extents(
    batch: int,
    heads: int,
    key_heads: int,
    plan: AttentionPlan,
    scale: float,
    strides: Sequence[Sequence[int]],
    mask_strides: Sequence[int] | None = None,
    in_flight: int = HEADS_IN_FLIGHT,
) -> AttentionExtents:
    """The kernel's extents: ``strides`` are (batch, head, row) of q, k, v and out, in elements, and ``mask_strides``
    (batch, head, row, key) of the run-time mask, 0 where it is broadcast."""
    q, k, v, out = (HeadStrides(*tensor) for tensor in strides)
    mask = MaskStrides(*(mask_strides or (0, 0, 0, 0)))
    return AttentionExtents(
        batch, heads, key_heads, plan.q_len, plan.kv_len, float(scale), in_flight, q, k, v, out, mask
    )


def workspace_bytes(
    batch: int, heads: int, value_dim: int, plan: AttentionPlan, in_flight: int = HEADS_IN_FLIGHT
) -> int:
    """Scratch memory of one launch: counters, and partial results of rows that several phases share."""
    if plan.phases == 1:
        return 0
    counters = -(-batch * heads * plan.phases // 8) * 64
    state = -(-plan.slots * (-(-value_dim // 16) * 16 + 2) // 16) * 64
    return counters + min(in_flight, batch * heads) * state


_KINDS = (QK, Scale, ScoreMask, Softmax, PV)
LARGEST_HEAD = 256
"""Widest heads of queries, keys and values that the kernel takes."""
_EXP_FLOPS = 20


@dataclass(frozen=True)
class AttentionMatch:
    """One attention: values q, k, v (B, H, S, D), the constant ``pattern``, the run-time ``mask`` if any, and out."""

    group: OperatorGroup
    q: str
    k: str
    v: str
    out: str
    scale: float
    pattern: Mask
    mask: str | None

    @property
    def dtype(self) -> DType:
        return STORAGE[self.group.graph.values[self.q].dtype]

    @property
    def mask_dtype(self) -> DType | None:
        """Storage of the run-time mask."""
        return None if self.mask is None else STORAGE[self.group.graph.values[self.mask].dtype]

    @property
    def widths(self) -> tuple[int, int]:
        """Of queries and keys, and of values."""
        values = self.group.graph.values
        return values[self.q].shape[-1], values[self.v].shape[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the kernel reads: queries, keys, values, and the run-time mask if any."""
        return (self.q, self.k, self.v, *([] if self.mask is None else [self.mask]))

    @property
    def moved_bytes(self) -> int:
        return sum(self.group.graph.values[value].nbytes for value in (self.q, self.k, self.v, self.out))

    def plan(self, target: Target) -> AttentionPlan:
        values = self.group.graph.values
        return cached_plan(self.pattern, values[self.q].shape[2], values[self.k].shape[2], target)


@dataclass(frozen=True)
class AttentionFamily:
    """Product with the keys, scale, masks, softmax and product with the values, whatever views lie around them."""

    name = "attention"

    def match(self, group: OperatorGroup, target: Target) -> AttentionMatch | None:
        """The group as one attention; None when a part is missing, foreign, or needed outside."""
        if any(not isinstance(op.semantics, _KINDS) for op in group.operators):
            return None
        scales, masks = group.of(Scale), group.of(ScoreMask)  # type: ignore[type-abstract]
        if any(len(group.of(kind)) != 1 for kind in (QK, Softmax, PV)) or len(scales) > 1:
            return None
        (qk,), (pv,) = group.of(QK), group.of(PV)
        if group.outputs != (pv.output,) or not _is_chain(group.operators):
            return None
        q, k = qk.inputs
        v = pv.inputs[1]
        runtime = [op.inputs[1] for op in masks if len(op.inputs) > 1]
        if len(runtime) > 1 or not self._supported(group, (q, k, v), runtime, target):
            return None
        pattern: Mask = Dense()
        for op in group.of(PatternMask):
            if op.semantics.causal:
                pattern = pattern & Causal()
            if op.semantics.pattern is not None:
                pattern = pattern & op.semantics.pattern
        heads = group.graph.values[q].shape[1]
        if pattern.heads not in (None, heads):
            return None
        scale = math.prod(op.semantics.scale for op in scales)
        return AttentionMatch(group, q, k, v, pv.output, scale, pattern, runtime[0] if runtime else None)

    @staticmethod
    def _supported(
        group: OperatorGroup, operands: tuple[str, str, str], runtime: Sequence[str], target: Target
    ) -> bool:
        specs = [group.graph.values[value] for value in operands]
        if len({spec.dtype for spec in specs}) != 1 or specs[0].dtype not in floating(target):
            return False
        if any(spec.strides[-1] != 1 and spec.shape[-1] > 1 for spec in specs):
            return False
        if any(not 0 < spec.shape[-1] <= LARGEST_HEAD for spec in specs) or specs[0].shape[1] % specs[1].shape[1]:
            return False
        return all(group.graph.values[m].dtype in (*floating(target), torch.bool) for m in runtime)


class CpuAttention(Implementation[AttentionMatch, AttentionParameters]):
    """Attention plans on CPUs."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[AttentionParameters]:
        """Blocks of keys whose scores stay in the first cache."""
        return [AttentionParameters(*match.widths, match.dtype, match.mask_dtype)]

    def cost(self, match: AttentionMatch, parameters: AttentionParameters, target: Target) -> Cost:
        batch, heads, _, _ = match.group.graph.values[match.q].shape
        pairs = batch * heads * match.plan(target).pairs_allowed
        if match.pattern.heads is not None:
            pairs //= heads
        flops = pairs * (2.0 * (parameters.head_dim + parameters.value_dim) + _EXP_FLOPS)
        return Cost(flops, float(match.moved_bytes), efficiency=0.7)

    def call(self, match: AttentionMatch, parameters: AttentionParameters, target: Target, threads: int) -> KernelCall:
        return call_of(match, parameters, target, threads, launch_of)


@dataclass(frozen=True)
class Launch:
    """What one launch needs besides its tensors: the plan's array, extents, and bytes of scratch memory."""

    plan: Literal
    extents: Extents
    workspace_bytes: int


def call_of(
    match: AttentionMatch,
    parameters: Any,
    target: Target,
    threads: int,
    launch: Callable[..., Launch],
) -> KernelCall:
    """The call of a match; ``launch(pattern, (q, k, v, out), mask, scale, parameters, target, threads)`` gives what
    depends on how the tensors lie in memory, once their sizes are known."""
    values = match.group.graph.values
    layouts = tuple(values[value].layout for value in (match.q, match.k, match.v, match.out))
    mask = None if match.mask is None else values[match.mask].layout
    made = late_fields(launch, Launch, match.pattern, layouts, mask, match.scale, parameters, target, threads)
    tensors: tuple[TensorRef, ...] = (*match.tensors, made.plan, match.out)
    return KernelCall(parameters.spec, tensors, made.extents, (match.out,), made.workspace_bytes)


def launch_of(
    pattern: Mask,
    specs: tuple[TensorSpec, ...],
    mask: TensorSpec | None,
    scale: float,
    parameters: AttentionParameters,
    target: Target,
    threads: int,
) -> Launch:
    """The launch for q, k, v and the result as they lie in memory, and the run-time ``mask`` of the scores' shape."""
    q, k = specs[:2]
    batch, heads, q_len, _ = q.shape
    tiles = cached_plan(pattern, q_len, k.shape[2], target)
    strides = [spec.strides[:3] for spec in specs]
    return Launch(
        Literal(f"plan:{tiles.hash}", tiles.array),
        extents(batch, heads, k.shape[1], tiles, scale, strides, None if mask is None else mask.strides),
        workspace_bytes(batch, heads, parameters.value_dim, tiles),
    )


def _is_chain(operators: Sequence[Operator]) -> bool:
    """Whether each operator reads the one before as its first input."""
    return all(after.inputs[0] == before.output for before, after in itertools.pairwise(operators))


_store: PlanStore | None = None


def keep_plans(store: PlanStore | None) -> None:
    """Let :func:`cached_plan` read plans from ``store`` and write new ones to it; None for this process alone."""
    global _store
    _store = store


def cached_plan(mask: Mask, q_len: int, kv_len: int, target: Target) -> AttentionPlan:
    """:func:`fuser.kernels.planner.plan`, remembered: layers share their plan, and processes where a store is set.

    Raises MaskError for a mask made by :meth:`Mask.current` that is so no longer.
    """
    return _cached_plan(mask.current(), q_len, kv_len, target)


@functools.lru_cache(maxsize=128)
def _cached_plan(mask: Mask, q_len: int, kv_len: int, target: Target) -> AttentionPlan:
    return stored_plan(mask, q_len, kv_len, target, _store)
