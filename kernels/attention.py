"""The `attention` family: q · kᵀ, scale, mask, softmax and · v as one kernel that runs an attention plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from fuser.ir.binding import late_fields
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup, TensorSpec
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.operators import (
    PV,
    QK,
    BiasByDistance,
    ChangeScores,
    DisentangledBias,
    DocumentMask,
    ImportanceBias,
    JoinedKeys,
    LogSumExp,
    PatternMask,
    PredictedAttention,
    Scale,
    ScoreMask,
    Softmax,
)
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
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

TEMPLATE = "cpu/attention.cpp.j2"
HEADS_IN_FLIGHT = 2


@dataclass(frozen=True)
class RunTimePlan:
    """A plan that is the contents of the value ``table``, for these numbers of queries and keys. Such plans have one
    phase, as those of packed rows do."""

    table: str
    lengths: tuple[int, int]

    phases: ClassVar[int] = 1
    slots: ClassVar[int] = 0

    @property
    def most_keys(self) -> int:
        """Keys of a group, at most."""
        return self.lengths[1]


AnyPlan = AttentionPlan | RunTimePlan


@dataclass(frozen=True)
class ScorePolicy:
    """A score policy of ``templates/cpu/attention/scores.h``, or of another ``header`` beside it; on GPUs of
    ``templates/cuda/attention``."""

    name: str
    header: str = ""


@dataclass(frozen=True)
class HeadStrides(Extents):
    """Elements between batch entries, heads and rows of q, k, v, out or lse."""

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
class Distances(Extents):
    """Elements between heads of a bias by distance; which that of query 0 and key 0 is; and how many it is from a key
    to the next, -1 or 1. From a query to the next it is 1."""

    head: int
    first: int
    step: int


@dataclass(frozen=True)
class AttentionExtents(Extents):
    """``mask`` is zero where there is no run-time mask, and where it is broadcast, ``distances`` where there is no bias
    by distance. ``in_flight`` is how many heads may be at work whose rows several phases share."""

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
    lse: HeadStrides
    mask: MaskStrides
    distances: Distances


@dataclass(frozen=True)
class AttentionParameters:
    """``mask`` is the storage of the run-time mask: BOOL (True = may attend), F32 or BF16 (added to scores), or None;
    ``distances`` that of a bias by distance, or None.

    ``key_block`` keys are scored before their probabilities meet the values; ``lse`` adds the log-sum-exp output, which
    is the only one if ``value_dim`` is 0; ``rule`` changes scaled scores before masks do.
    """

    head_dim: int
    value_dim: int
    dtype: DType = DType.F32
    mask: DType | None = None
    lse: bool = False
    key_block: int = 96
    rule: ScoreRule | None = None
    distances: DType | None = None

    few_bits: ClassVar[bool] = False
    """Whether scores are made of fewer bits than ``dtype`` has."""
    policy: ClassVar[ScorePolicy] = ScorePolicy("Products")
    extents_kind: ClassVar[type[AttentionExtents]] = AttentionExtents

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("attention", TEMPLATE, self)

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return self.extents_kind.declaration()

    @property
    def extents_type(self) -> str:
        """The struct of the extents in C."""
        return self.extents_kind.__name__

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        """What the configuration says to the policy, by its names in C++."""
        return {}

    @property
    def few_rows(self) -> int:
        """The most rows of a group that is computed with the elements of a row in lanes."""
        return FEW_ROWS

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        batch, heads, key_heads = operands.heads
        return Launch(
            plan.table if isinstance(plan, RunTimePlan) else Literal(f"plan:{plan.hash}", plan.array),
            extents(
                *(batch, heads, key_heads, *plan.lengths, scale),
                *(operands.strides, operands.mask_strides, operands.distances),
                lse=operands.lse_strides,
            ),
            workspace_bytes(batch, heads, self.value_dim, plan),
        )


def extents(
    batch: int,
    heads: int,
    key_heads: int,
    q_len: int,
    kv_len: int,
    scale: float,
    strides: Sequence[Sequence[int]],
    mask_strides: Sequence[int] | None = None,
    distances: Distances | None = None,
    in_flight: int = HEADS_IN_FLIGHT,
    lse: Sequence[int] | None = None,
) -> AttentionExtents:
    """The kernel's extents: ``strides`` are (batch, head, row) of q, k, v and out, in elements, ``mask_strides``
    (batch, head, row, key) of the run-time mask, 0 where it is broadcast, ``distances`` of a bias by distance, ``lse``
    (batch, head, row) of that output, unless it is contiguous."""
    q, k, v, out, sums = (HeadStrides(*tensor) for tensor in (*strides, lse or (heads * q_len, q_len, 1)))
    mask = MaskStrides(*(mask_strides or (0, 0, 0, 0)))
    far = distances or Distances(0, 0, 0)
    sizes = (batch, heads, key_heads, q_len, kv_len, float(scale), in_flight)
    return AttentionExtents(*sizes, q, k, v, out, sums, mask, far)


def workspace_bytes(batch: int, heads: int, value_dim: int, plan: AnyPlan, in_flight: int = HEADS_IN_FLIGHT) -> int:
    """Scratch memory of one launch: counters, and partial results of rows that several phases share."""
    if plan.phases == 1:
        return 0
    counters = -(-batch * heads * plan.phases // 8) * 64
    state = -(-plan.slots * (-(-value_dim // 16) * 16 + 2) // 16) * 64
    return counters + min(in_flight, batch * heads) * state


_KINDS = (QK, Scale, ChangeScores, ScoreMask, Softmax, PV)
"""What becomes of queries, in this order."""
_BESIDE = (DisentangledBias, ImportanceBias, JoinedKeys, LogSumExp)
"""What reads scores, or makes what the chain reads beside them."""
LARGEST_HEAD = 256
"""Widest heads of queries, keys and values that the kernel takes."""
_EXP_FLOPS = 20
_INTERVAL = 128
"""Keys that a row sees, for predictions where it is known at run time alone."""


@dataclass(frozen=True)
class AttentionMatch:
    """One attention: values q, k, v (B, H, S, D), the score ``rule``, the constant ``pattern``, the run-time
    ``mask`` if any, out and ``lse``, one of which may be missing, v with out; ``table`` is the value that holds the
    plan, where that is known at run time alone; ``bias`` adds one by ``distances``. The mask may be what the operator
    ``importance`` makes, or that to which ``disentangled`` adds positions. What these make is not stored, nor are keys
    and values that ``joins`` make. ``quantize`` says which scores are computed with few bits; ``documents`` are the
    rows and length of :class:`DocumentMask`."""

    group: OperatorGroup
    q: str
    k: str
    v: str | None
    out: str | None
    scale: float
    pattern: Mask
    mask: str | None
    rule: ScoreRule | None = None
    table: str | None = None
    bias: Operator[BiasByDistance] | None = None
    lse: str | None = None
    importance: Operator[ImportanceBias] | None = None
    joins: tuple[Operator[JoinedKeys], Operator[JoinedKeys]] | None = None
    disentangled: Operator[DisentangledBias] | None = None
    quantize: ScoreQuantization | None = None
    documents: tuple[str, str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scores may be products of rows that are stored, with what is added to them."""
        others = self.importance, self.joins, self.disentangled
        return all(other is None for other in others) and (self.quantize is None or self.quantize.may_be_exact)

    @property
    def dtype(self) -> DType:
        return STORAGE[self.group.graph.values[self.q].dtype]

    @property
    def mask_dtype(self) -> DType | None:
        """Storage of the run-time mask."""
        return None if self.mask is None else STORAGE[self.group.graph.values[self.mask].dtype]

    @property
    def distances(self) -> str | None:
        """The bias by distance."""
        return None if self.bias is None else self.bias.inputs[1]

    @property
    def distances_dtype(self) -> DType | None:
        """Storage of the bias by distance."""
        return None if self.distances is None else STORAGE[self.group.graph.values[self.distances].dtype]

    @property
    def of_scores(self) -> dict[str, Any]:
        """Parameters of what becomes of scores."""
        return {"rule": self.rule, "distances": self.distances_dtype}

    @property
    def widths(self) -> tuple[int, int]:
        """Of queries and keys, and of values."""
        values = self.group.graph.values
        return values[self.q].shape[-1], 0 if self.v is None else values[self.v].shape[-1]

    @property
    def writes(self) -> tuple[str, ...]:
        """Values that the kernel makes."""
        return tuple(value for value in (self.out, self.lse) if value is not None)

    def call(self, parameters: PlanParameters, target: Target, threads: int) -> KernelCall:
        """The launch of these parameters on the values of the group."""
        k, v = self.k, self.v or self.k
        if self.joins is not None:
            k, v = (op.inputs[0] for op in self.joins)
        reads = (self.q, k, v, *self.added)
        operands = self.operands
        lengths = operands.q.shape[2], operands.k.shape[2]
        plan = self.pattern if self.table is None else RunTimePlan(self.table, lengths)
        return call_of(plan, operands, reads, self.writes, self.scale, parameters, target, threads)

    @property
    def added(self) -> tuple[str, ...]:
        """Run-time mask and bias by distance, as far as there are any."""
        return tuple(value for value in (self.mask, self.distances) if value is not None)

    @property
    def operands(self) -> Operands:
        """The tensors as they lie in memory."""
        # Where there are no values, their places are not read.
        given = (self.q, self.k, self.v or self.k, self.out or self.q)
        q, k, v, out = (self.group.graph.values[value].layout for value in given)
        mask = None if self.mask is None else self.group.graph.values[self.mask].layout
        if self.joins is not None:
            # Keys beyond the tokens lie elsewhere.
            near = (self.group.graph.values[op.inputs[0]].strides for op in self.joins)
            k, v = (dataclasses.replace(spec, strides=strides) for spec, strides in zip((k, v), near, strict=True))
        far = None
        if self.bias is not None:
            row, how = self.group.graph.values[self.bias.inputs[1]], self.bias.semantics
            far = Distances(0 if row.shape[0] == 1 else row.strides[0], how.first, 1 if how.reversed else -1)
        lse = None if self.lse is None else self.group.graph.values[self.lse].layout
        return Operands(q, k, v, out, mask, far, lse)

    @property
    def moved_bytes(self) -> int:
        given = (self.q, self.k, self.v, self.out)
        return sum(self.group.graph.values[value].nbytes for value in given if value is not None)

    def pairs(self, target: Target) -> int:
        """Pairs of queries and keys of all heads, a guess where the plan is known at run time alone."""
        batch, heads, rows, _ = self.group.graph.values[self.q].shape
        if self.table is not None:
            return batch * heads * rows * min(rows, _INTERVAL)
        pairs = batch * heads * self.plan(target).pairs_allowed
        return pairs if self.pattern.heads is None else pairs // heads

    def plan(self, target: Target) -> AttentionPlan:
        values = self.group.graph.values
        return cached_plan(self.pattern, values[self.q].shape[2], values[self.k].shape[2], target)


@dataclass(frozen=True)
class AttentionFamily:
    """Product with the keys, scale, masks, softmax and product with the values, whatever views lie around them."""

    name = "attention"

    def match(self, group: OperatorGroup, target: Target) -> AttentionMatch | None:
        """The group as one attention; None when a part is missing, foreign, or needed outside."""
        if group.of(PredictedAttention):
            return self._predicted(group, target)
        chain = tuple(op for op in group.operators if not isinstance(op.semantics, _BESIDE))
        if any(not isinstance(op.semantics, _KINDS) for op in chain):
            return None
        scales, rules, masks = group.of(Scale), group.of(ChangeScores), group.of(ScoreMask)  # type: ignore[type-abstract]
        if (
            len(group.of(QK)) != 1
            or len(scales) > 1
            or len(rules) > 1
            or not _is_chain(chain)
            or not _is_ordered(chain)
        ):
            return None
        (qk,), softmaxes, products, sums = group.of(QK), group.of(Softmax), group.of(PV), group.of(LogSumExp)
        if len(softmaxes) != len(products) or max(len(products), len(sums)) > 1:
            return None
        scores = chain[-1 - len(softmaxes) - len(products)].output
        out, lse = (made[0].output if made else None for made in (products, sums))
        if {out, lse} - {None} != set(group.outputs) or any(op.inputs[0] != scores for op in sums):
            return None
        q, k = qk.inputs
        v = products[0].inputs[1] if products else None
        tables = [op.inputs[4] for op in group.of(DocumentMask)]
        others = (DocumentMask, BiasByDistance)
        attn_masks = [op.inputs[1] for op in masks if len(op.inputs) > 1 and not isinstance(op.semantics, others)]
        far = group.of(BiasByDistance)
        if len(far) > 1 or (tables and (len(masks) > 1 + len(far) or lse is not None)):
            return None
        operands = (q, k) if v is None else (q, k, v)
        if len(attn_masks) > 1 or not self._supported(group, operands, attn_masks, target):
            return None
        if lse is not None and group.graph.values[lse].dtype != torch.float32:
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
        mask = attn_masks[0] if attn_masks else None
        rule = rules[0].semantics.rule if rules else None
        table = tables[0] if tables else None
        bias = far[0] if far else None
        if bias is not None and not self._has_distances(group, bias, target):
            return None
        biases, importance = group.of(ImportanceBias), None
        if biases:
            importance = biases[0]
            if len(biases) > 1 or importance.output != mask or importance.inputs[0] != q:
                return None
            if importance.semantics.scale != scale or not isinstance(pattern, Dense):
                return None
            if rule is not None or bias is not None:
                return None
            mask = None
        disentangled = None
        if positions := group.of(DisentangledBias):
            disentangled = positions[0]
            if len(positions) > 1 or disentangled.output != mask or importance or table is not None:
                return None
            (mask,) = disentangled.inputs[2 * disentangled.semantics.parts :] or (None,)
            if mask is not None and not self._supported(group, operands, [mask], target):
                return None
        joins = None
        if joining := group.of(JoinedKeys):
            # Keys and values, of the same tokens and summaries.
            if len(joining) != 2 or {op.output for op in joining} != {k, v} or table is not None or importance:
                return None
            made = {op.output: op for op in joining}
            joins = made[k], made[v or k]
        return AttentionMatch(
            group, q, k, v, out, scale, pattern, mask, rule, table, bias, lse, importance, joins, disentangled
        )

    def _predicted(self, group: OperatorGroup, target: Target) -> AttentionMatch | None:
        """Attention that is one operator, whose scores have a width each."""
        if len(group.operators) != 1:
            return None
        ((q, k, v, *rest), how) = group.operators[0].inputs, group.of(PredictedAttention)[0].semantics
        documents, table, masks = ((rest[0], rest[1]), rest[3], []) if how.packed else (None, None, rest)
        if not self._supported(group, (q, k, v), masks, target):
            return None
        if how.pattern.heads not in (None, group.graph.values[q].shape[1]):
            return None
        out, mask = group.operators[0].output, masks[0] if masks else None
        scores = how.scale, how.pattern, mask, how.rule, table
        return AttentionMatch(group, q, k, v, out, *scores, quantize=how.quantize, documents=documents)

    @staticmethod
    def _has_distances(group: OperatorGroup, bias: Operator[BiasByDistance], target: Target) -> bool:
        """Whether numbers by distance lie as kernels read them."""
        spec, heads = (group.graph.values[value] for value in (bias.inputs[1], bias.inputs[0]))
        return spec.dtype in floating(target) and spec.strides[1] == 1 and spec.shape[0] in (1, heads.shape[1])

    @staticmethod
    def _supported(group: OperatorGroup, operands: Sequence[str], attn_masks: Sequence[str], target: Target) -> bool:
        specs = [group.graph.values[value] for value in operands]
        if len({spec.dtype for spec in specs}) != 1 or specs[0].dtype not in floating(target):
            return False
        if any(spec.strides[-1] != 1 and spec.shape[-1] > 1 for spec in specs):
            return False
        if any(not 0 < spec.shape[-1] <= LARGEST_HEAD for spec in specs) or specs[0].shape[1] % specs[1].shape[1]:
            return False
        return all(group.graph.values[m].dtype in (*floating(target), torch.bool) for m in attn_masks)


class CpuAttention(Implementation[AttentionMatch, AttentionParameters]):
    """Attention plans on CPUs."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[AttentionParameters]:
        """Blocks of keys whose scores stay in the first cache."""
        if not match.is_plain:
            return ()
        lse = match.lse is not None
        return [AttentionParameters(*match.widths, match.dtype, match.mask_dtype, lse, **match.of_scores)]

    def cost(self, match: AttentionMatch, parameters: AttentionParameters, target: Target) -> Cost:
        speedup = target.rate(match.group.graph.values[match.q].dtype) / target.peak_flops
        flops = match.pairs(target) * (2.0 * (parameters.head_dim + parameters.value_dim) / speedup + _EXP_FLOPS)
        return Cost(flops, float(match.moved_bytes), efficiency=0.7)

    def call(self, match: AttentionMatch, parameters: AttentionParameters, target: Target, threads: int) -> KernelCall:
        return match.call(parameters, target, threads)


@dataclass(frozen=True)
class Operands:
    """The tensors of one attention as they lie in memory: q, k, v and out (B, H, S, D) with contiguous rows, and the
    run-time ``mask`` of the scores' shape; where a bias by distance has its elements; and ``lse`` (B, H, Sq), unless it
    is contiguous."""

    q: TensorSpec
    k: TensorSpec
    v: TensorSpec
    out: TensorSpec
    mask: TensorSpec | None = None
    distances: Distances | None = None
    lse: TensorSpec | None = None

    @property
    def heads(self) -> tuple[int, int, int]:
        """Batch entries, heads of the queries, and heads of the keys."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """(batch, head, row) of q, k, v and out."""
        return [spec.strides[:3] for spec in (self.q, self.k, self.v, self.out)]

    @property
    def mask_strides(self) -> tuple[int, ...] | None:
        return None if self.mask is None else self.mask.strides

    @property
    def lse_strides(self) -> tuple[int, ...] | None:
        return None if self.lse is None else self.lse.strides


@dataclass(frozen=True)
class Launch:
    """What one launch needs besides its tensors: the plan's array, extents, and bytes of scratch memory."""

    plan: TensorRef
    extents: Extents
    workspace_bytes: int

    def extended(self, kind: type[Extents], **more: Any) -> Launch:
        """The same with extents of a kind that says ``more``."""
        known = {name: getattr(self.extents, name) for name in self.extents.__dataclass_fields__}
        return dataclasses.replace(self, extents=kind(**known, **more))

    def with_scratch(self, kind: type[Extents], words: int, **more: Any) -> Launch:
        """The same with so many 32-bit words of scratch memory behind what there is, which ``workspace`` bytes of the
        extents say, and ``more``."""
        made = self.extended(kind, workspace=self.workspace_bytes, **more)
        return dataclasses.replace(made, workspace_bytes=self.workspace_bytes + 4 * words)


class PlanParameters(Protocol):
    """Parameters of a kernel that runs attention plans."""

    @property
    def spec(self) -> KernelSpec: ...

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        """What the kernel needs to run ``plan`` on ``operands``."""


def call_of(
    plan: Mask | AnyPlan,
    operands: Operands,
    reads: Sequence[str],
    writes: Sequence[str],
    scale: float,
    parameters: PlanParameters,
    target: Target,
    threads: int,
) -> KernelCall:
    """The call of an attention kernel on ``operands``: of this plan, or of the one that a mask has for their lengths.

    ``reads`` names q, k, v and the run-time mask, ``writes`` the output and the log-sum-exp, (B, H, Sq);
    masks and log-sum-exps where the parameters say so. Beside a mask, sizes may be known late.
    """
    if isinstance(plan, AnyPlan):
        made = parameters.launch(plan, operands, scale, target, threads)
    else:
        made = late_fields(launch_of, Launch, plan, operands, scale, parameters, target, threads)
    tensors: tuple[TensorRef, ...] = (*reads, made.plan, *writes)
    return KernelCall(parameters.spec, tensors, made.extents, tuple(writes), made.workspace_bytes)


def launch_of(
    mask: Mask, operands: Operands, scale: float, parameters: PlanParameters, target: Target, threads: int
) -> Launch:
    """What a call needs besides its tensors, once their sizes are known."""
    plan = cached_plan(mask, operands.q.shape[2], operands.k.shape[2], target)
    return parameters.launch(plan, operands, scale, target, threads)


def _is_chain(operators: Sequence[Operator]) -> bool:
    """Whether each operator reads the one before as its first input."""
    return all(after.inputs[0] == before.output for before, after in itertools.pairwise(operators))


def _is_ordered(operators: Sequence[Operator]) -> bool:
    """Whether scores are scaled, changed and masked in the order in which a kernel does it."""
    steps = [next(i for i, kind in enumerate(_KINDS) if isinstance(op.semantics, kind)) for op in operators]
    return steps == sorted(steps)


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
