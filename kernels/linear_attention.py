"""The `linear_attention` and `features` families on CPUs: recurrences over tokens, and the feature maps before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup, TensorSpec
from fuser.ir.linear_attention import FeatureMap
from fuser.ir.operators import Features, LinearAttention
from fuser.ir.target import Target
from fuser.kernels.base import (
    STORAGE,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Layout,
    Packed,
    floating,
)

WIDEST = 512
"""The widest keys: what one thread works in grows with it."""
_CHUNK = 32
_BLOCK = 96
"""Rows of the features of keys whose largest projection is kept."""


# ---- linear attention


@dataclass(frozen=True)
class RowStrides(Extents):
    """Elements between batch entries, heads and rows, 0 where one is for all."""

    batch: int = 0
    head: int = 0
    row: int = 0


@dataclass(frozen=True)
class LinearAttentionExtents(Extents):
    """``heads`` and ``keys`` are those of k, ``columns`` those of v."""

    batch: int
    heads: int
    queries: int
    keys: int
    columns: int
    scale: float
    floor: float
    q: RowStrides
    k: RowStrides
    v: RowStrides
    out: RowStrides
    decay: RowStrides
    beta: RowStrides
    first: RowStrides


@dataclass(frozen=True)
class Recurrent:
    """What kernels of linear attention are built for: keys have ``width`` columns and serve ``group`` heads of queries;
    ``decay`` and ``beta`` are the storage of what there is of them, ``decays`` the numbers for a token."""

    width: int
    group: int
    key: DType
    value: DType
    decays: int
    decay: DType | None
    beta: DType | None
    causal: bool
    floor: bool
    resumed: bool
    kept: bool

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return LinearAttentionExtents.declaration()


@dataclass(frozen=True)
class LinearAttentionParameters(Recurrent):
    """A task has ``vectors`` vectors of the values' columns."""

    vectors: int

    def workspace_bytes(self, target: Target) -> int:
        """Scratch of one thread: an upper bound of the struct ``Work`` of the template."""
        lanes = target.vector_lanes
        row, columns = -(-self.width // lanes) * lanes, self.vectors * lanes
        floats = _CHUNK * ((self.group + 1) * (row + columns) + row + 1 + self.group) + row * (columns + 1)
        return 4 * floats + 64 * 10


@dataclass(frozen=True)
class LinearAttentionMatch:
    """One linear attention, with its ``inputs`` by what they are."""

    group: OperatorGroup
    operator: Operator[LinearAttention]

    @property
    def inputs(self) -> dict[str, str]:
        """Values by their names in the template."""
        op = self.operator.semantics
        r = op.recurrence
        there = {"q": True, "k": True, "v": True, "decay": r.decay, "beta": r.delta, "first": op.resumed}
        return dict(zip((name for name, found in there.items() if found), self.operator.inputs, strict=True))

    def spec(self, name: str) -> TensorSpec:
        return self.group.graph.values[self.inputs[name]]

    @property
    def recurrent(self) -> dict[str, Any]:
        """The fields of :class:`Recurrent`."""
        op, q, k = self.operator.semantics, self.spec("q"), self.spec("k")
        decay = self.spec("decay") if op.recurrence.decay else None
        return {
            "width": k.shape[-1],
            "group": q.shape[1] // k.shape[1],
            "key": STORAGE[k.dtype],
            "value": STORAGE[self.spec("v").dtype],
            "decays": 0 if decay is None else decay.shape[-1],
            "decay": None if decay is None else STORAGE[decay.dtype],
            "beta": STORAGE[self.spec("beta").dtype] if op.recurrence.delta else None,
            "causal": op.recurrence.causal,
            "floor": op.recurrence.floor is not None,
            "resumed": op.resumed,
            "kept": op.kept,
        }

    def call(self, spec: KernelSpec, workspace_bytes: int = 0) -> KernelCall:
        """The launch of a kernel, which has the tensors in the order of the templates."""
        op, inputs = self.operator, self.inputs
        q, k, v = (self.spec(name) for name in "qkv")
        of = {name: _strides(self.spec(name)) for name in inputs}
        r = op.semantics.recurrence
        extents = LinearAttentionExtents(
            batch=k.shape[0],
            heads=k.shape[1],
            queries=q.shape[2],
            keys=k.shape[2],
            columns=v.shape[3],
            scale=r.scale,
            floor=r.floor or 0.0,
            q=of["q"],
            k=of["k"],
            v=of["v"],
            out=_strides(self.group.graph.values[op.output]),
            decay=of.get("decay", RowStrides()),
            beta=of.get("beta", RowStrides()),
            first=of.get("first", RowStrides()),
        )
        return KernelCall(spec, (*inputs.values(), *op.outputs), extents, op.outputs, workspace_bytes)


@dataclass(frozen=True)
class LinearAttentionFamily:
    """One linear attention."""

    name = "linear_attention"

    def match(self, group: OperatorGroup, target: Target) -> LinearAttentionMatch | None:
        """The group, where it is one linear attention of tensors with contiguous rows, with a state in fp32."""
        if len(group.operators) != 1 or not (found := group.of(LinearAttention)):
            return None
        match = LinearAttentionMatch(group, found[0])
        values = group.graph.values
        specs = {name: values[value] for name, value in match.inputs.items()}
        q, k, v = (specs[name] for name in "qkv")
        out = values[found[0].output]
        if any(s.dtype not in floating(target) or not _has_rows(s) for s in (*specs.values(), out)):
            return None
        if q.dtype != k.dtype or v.dtype != out.dtype or not 0 < q.shape[-1] <= WIDEST or out.numel == 0:
            return None
        states = [specs["first"]] if "first" in specs else []
        states += [values[value] for value in found[0].outputs[1:]]
        return match if all(s.dtype == torch.float32 for s in states) else None


def _has_rows(spec: TensorSpec) -> bool:
    return spec.shape[-1] == 1 or spec.strides[-1] == 1


class CpuLinearAttention(Implementation[LinearAttentionMatch, LinearAttentionParameters]):
    """Our template on CPUs."""

    def space(self, match: LinearAttentionMatch, target: Target) -> Sequence[LinearAttentionParameters]:
        """Blocks of four, two or one vectors of columns, the widest first that occupies all cores."""
        k, v = match.spec("k"), match.spec("v")
        needed = -(-v.shape[-1] // target.vector_lanes)
        widths = [n for n in (4, 2, 1) if n == 1 or n < 2 * needed]
        heads = k.shape[0] * k.shape[1]
        widths.sort(key=lambda n: (heads * -(-needed // n) < target.cores, -n))
        return [LinearAttentionParameters(**match.recurrent, vectors=vectors) for vectors in widths]

    def cost(self, match: LinearAttentionMatch, parameters: LinearAttentionParameters, target: Target) -> Cost:
        """Every state element once a token, keys packed once for each block of columns."""
        graph, k, v = match.group.graph, match.spec("k"), match.spec("v")
        columns = parameters.vectors * target.vector_lanes
        blocks = -(-v.shape[-1] // columns)
        packing = 4.0 * k.numel * (1 + parameters.group) * blocks
        padded = graph.flops(match.operator) * blocks * columns / v.shape[-1]
        used = {*match.operator.inputs, *match.operator.outputs}
        share = min(1.0, k.shape[0] * k.shape[1] * blocks / target.cores)
        narrow = 0.7 if parameters.beta else 0.5 + 0.1 * parameters.vectors
        return Cost(padded + packing, float(sum(graph.values[value].nbytes for value in used)), 1, share * narrow)

    def call(
        self, match: LinearAttentionMatch, parameters: LinearAttentionParameters, target: Target, threads: int
    ) -> KernelCall:
        spec = KernelSpec("linear_attention", "cpu/linear_attention.cpp.j2", parameters)
        return match.call(spec, threads * parameters.workspace_bytes(target))


def _strides(spec: TensorSpec) -> RowStrides:
    return RowStrides(*(0 if size == 1 else stride for size, stride in zip(spec.shape[:3], spec.strides, strict=False)))


# ---- features


@dataclass(frozen=True)
class FeaturesExtents(Extents):
    """Strides of x are those of batch entries, heads and rows; ``half`` is what squares of x are summed with, ``share``
    the factor of features."""

    batch: int
    heads: int
    rows: int
    half: float
    share: float
    x: tuple[int, int, int]


@dataclass(frozen=True)
class FeaturesParameters:
    """Rows of ``width`` columns become ``features``: those of ``relu``, else of FAVOR+, of ``keys`` or of queries; or
    the ``product``."""

    width: int
    features: int
    x: DType
    relu: bool
    keys: bool
    product: bool

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return FeaturesExtents.declaration()


@dataclass(frozen=True)
class Directions(Layout):
    """Directions (H, M, D) as (H, D, M) fp32, M padded by zeros to whole vectors of ``lanes``; ``scaled`` by D^-¼."""

    lanes: int
    scaled: bool

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (directions,) = tensors
        directions = directions.float()
        if self.scaled:
            directions = directions / math.sqrt(math.sqrt(directions.shape[-1]))
        return (torch.nn.functional.pad(directions.mT, (0, -directions.shape[1] % self.lanes)).contiguous(),)


@dataclass(frozen=True)
class FeaturesMatch:
    """One feature map."""

    group: OperatorGroup
    operator: Operator[Features]

    @property
    def parameters(self) -> FeaturesParameters:
        """What a kernel is built for."""
        values, op = self.group.graph.values, self.operator
        x, kind = values[op.inputs[0]], op.semantics.map
        kinds = (kind is wanted for wanted in (FeatureMap.RELU, FeatureMap.FAVOR_KEYS, FeatureMap.PRODUCT))
        return FeaturesParameters(x.shape[-1], values[op.output].shape[-1], STORAGE[x.dtype], *kinds)

    @property
    def moved_bytes(self) -> float:
        """Those of x and of the result, which keys touch once more."""
        values, op = self.group.graph.values, self.operator
        return float(values[op.inputs[0]].nbytes + (3 if self.parameters.keys else 1) * values[op.output].nbytes)

    def call(self, spec: KernelSpec, lanes: int, block: int | None) -> KernelCall:
        """The launch of a kernel that takes features by ``lanes``, and keeps the largest projection of every ``block``
        of rows, unless that is None."""
        op, values = self.operator, self.group.graph.values
        x, features = values[op.inputs[0]], values[op.output].shape[-1]
        batch, heads, rows, width = x.shape
        strides = tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.strides, strict=False))
        half, share = 0.5 / math.sqrt(width), 1 / math.sqrt(features)
        return KernelCall(
            spec,
            (op.inputs[0], Packed((op.inputs[1],), Directions(lanes, not self.parameters.product)), op.output),
            FeaturesExtents(batch, heads, rows, half, share, (strides[0], strides[1], strides[2])),
            op.outputs,
            0 if block is None else 4 * batch * heads * -(-rows // block),
        )


@dataclass(frozen=True)
class FeaturesFamily:
    """One feature map."""

    name = "features"

    def match(self, group: OperatorGroup, target: Target) -> FeaturesMatch | None:
        """The group, where it is one feature map on constant directions, into fp32."""
        if len(group.operators) != 1 or not (found := group.of(Features)):
            return None
        (op,) = found
        x, out = (group.graph.values[value] for value in (op.inputs[0], op.output))
        if x.dtype not in floating(target) or x.strides[-1] != 1 or op.inputs[1] not in group.graph.constants:
            return None
        fits = out.dtype == torch.float32 and out.is_contiguous and out.numel and x.shape[-1] <= WIDEST
        return FeaturesMatch(group, op) if fits else None


class CpuFeatures(Implementation[FeaturesMatch, FeaturesParameters]):
    """Our template on CPUs."""

    def space(self, match: FeaturesMatch, target: Target) -> Sequence[FeaturesParameters]:
        """One choice."""
        return [match.parameters]

    def cost(self, match: FeaturesMatch, parameters: FeaturesParameters, target: Target) -> Cost:
        """A product, and its result once more for keys."""
        return Cost(match.group.graph.flops(match.operator), match.moved_bytes, 1, 0.6)

    def call(self, match: FeaturesMatch, parameters: FeaturesParameters, target: Target, threads: int) -> KernelCall:
        spec = KernelSpec("features", "cpu/features.cpp.j2", parameters)
        return match.call(spec, target.vector_lanes, _BLOCK if parameters.keys else None)
