"""The `rotary` family: rotary embeddings of rows that lie evenly, such as the heads in a product for q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuser.ir.expression import Expression
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup, TensorSpec
from fuser.ir.operators import Rotary
from fuser.ir.target import Target
from fuser.kernels.base import (
    STORAGE,
    Access,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Operand,
    floating,
)

_DIMS = 3
"""Dimensions of rows that a kernel walks."""


@dataclass(frozen=True)
class RowNorm:
    """What becomes of a row of x before it is rotated: a function of it (input 0) and of constant rows of these
    types."""

    expression: Expression
    rows: tuple[DType, ...]


@dataclass(frozen=True)
class RotaryParameters:
    """``width`` of ``columns`` columns from ``start`` on are rotated by pairs, neighbours if ``interleaved``; tables
    have one number for each pair if ``paired``, else one for each column."""

    columns: int
    start: int
    width: int
    interleaved: bool
    paired: bool
    x: DType
    table: DType
    out: DType
    norm: RowNorm | None = None

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return RotaryExtents.declaration()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What the norm reads: x and its constant rows."""
        return tuple(Operand(Access.MATRIX, dtype) for dtype in (self.x, *(self.norm.rows if self.norm else ())))


@dataclass(frozen=True)
class RotaryExtents(Extents):
    """Sizes of the dimensions of rows, and for each tensor the elements between their indices."""

    sizes: tuple[int, int, int]
    x: tuple[int, int, int]
    cos: tuple[int, int, int]
    sin: tuple[int, int, int]
    out: tuple[int, int, int]


@dataclass(frozen=True)
class RotaryMatch:
    """One rotation ``rotary`` of the value ``x``, after its ``norm`` with the constant rows ``weights``; ``rows`` has
    the sizes of the dimensions of rows and the strides of x, cos, sin and out along them."""

    group: OperatorGroup
    rotary: Operator[Rotary]
    x: str
    rows: tuple[tuple[int, int, int], ...]
    norm: RowNorm | None
    weights: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Values in the order of the templates: x, cos, sin, out, and the rows of the norm."""
        return (self.x, *self.rotary.inputs[1:], self.rotary.output, *self.weights)

    @property
    def cost(self) -> Cost:
        """Every number touched once."""
        graph = self.group.graph
        flops = sum(graph.flops(op) for op in self.group.operators)
        return Cost(flops, float(sum(graph.values[value].nbytes for value in self.tensors)))

    def call(self, template: str, parameters: RotaryParameters) -> KernelCall:
        """The launch of a template, whose parameters hold these."""
        spec = KernelSpec("rotary", template, parameters)
        return KernelCall(spec, self.tensors, RotaryExtents(*self.rows), self.rotary.outputs)

    @property
    def parameters(self) -> RotaryParameters:
        x, cos, _, out, *_ = (self.group.graph.values[value] for value in self.tensors)
        rotary = self.rotary.semantics
        return RotaryParameters(
            columns=out.shape[-1],
            start=rotary.start,
            width=rotary.width,
            interleaved=rotary.interleaved,
            paired=cos.shape[-1] < rotary.width,
            x=STORAGE[x.dtype],
            table=STORAGE[cos.dtype],
            out=STORAGE[out.dtype],
            norm=self.norm,
        )


@dataclass(frozen=True)
class RotaryFamily:
    """One rotary embedding, and the norm of the rows that it rotates."""

    name = "rotary"

    def match(self, group: OperatorGroup, target: Target) -> RotaryMatch | None:
        """The group, where it is one rotation of rows in up to three dimensions, each with contiguous columns, of x or
        of a function of its rows that nothing else reads."""
        found, graph = group.of(Rotary), group.graph
        if len(found) != 1 or len(group.operators) > 2 or group.outputs != found[0].outputs:
            return None
        (op,) = found
        x, norm, weights = op.inputs[0], None, tuple[str, ...]()
        if len(group.operators) == 2:
            before = _normalized(group, op, floating(target))
            if before is None:
                return None
            x, norm, weights = before
        shown = graph.values[op.inputs[0]]
        values = [graph.values[value] for value in (x, *op.inputs[1:], op.output)]
        if any(s.dtype not in floating(target) or s.strides[-1] != 1 for s in values):
            return None
        if values[1].dtype != values[2].dtype:
            return None
        shapes, strides = [s.shape[:-1] for s in values], [s.strides[:-1] for s in values]
        if norm is not None:
            shapes[0], strides[0] = shown.shape[:-1], _along(shown.shape[:-1], values[0])
        rows = rows_of(shown.shape[:-1], shapes, strides)
        return None if rows is None else RotaryMatch(group, op, x, rows, norm, weights)


def _normalized(
    group: OperatorGroup, rotary: Operator[Rotary], storage: frozenset[torch.dtype]
) -> tuple[str, RowNorm, tuple[str, ...]] | None:
    """The value, the function of its rows and the constant rows that make what is rotated; None where it is made in
    another way, or seen as other rows."""
    graph = group.graph
    before = group.produces(rotary.inputs[0])
    if before is None or before.expression is None or before.expression.inputs > len(before.inputs):
        return None
    made, shown = graph.values[before.output], graph.values[rotary.inputs[0]]
    x, *weights = before.inputs[: before.expression.inputs]
    specs = [graph.values[value] for value in weights]
    if shown.offset or _long(made.shape, made.strides) != _long(shown.shape, shown.strides):
        return None
    if graph.values[x].shape != made.shape or made.dtype not in storage:
        return None
    if any(_long(s.shape, s.strides) != [(made.shape[-1], 1)] or s.dtype not in storage for s in specs):
        return None
    norm = RowNorm(before.expression, tuple(STORAGE[s.dtype] for s in specs))
    return x, norm, tuple(weights)


def _long(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions that have more than one index."""
    return [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]


def _along(shape: Sequence[int], spec: TensorSpec) -> tuple[int, ...]:
    """The strides of a tensor's rows along the dimensions of ``shape``, which differs in dimensions of one index."""
    strides = iter(_long(spec.shape[:-1], spec.strides[:-1]))
    return tuple(0 if size == 1 else next(strides)[1] for size in shape)


def rows_of(
    sizes: Sequence[int], shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, int, int], ...] | None:
    """The dimensions of rows as three, and the strides of tensors of these shapes, which broadcast to them, along each;
    None if they are more. Neighbouring dimensions along which all tensors lie evenly are one."""
    dims: list[tuple[int, list[int]]] = []
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        along = [0 if shape[d] == 1 else stride[d] for shape, stride in zip(shapes, strides, strict=True)]
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], along, strict=True)):
            dims[-1] = (dims[-1][0] * size, along)
        else:
            dims.append((size, along))
    if len(dims) > _DIMS:
        return None
    dims = [(1, [0] * len(shapes))] * (_DIMS - len(dims)) + dims
    a, b, c = (size for size, _ in dims)
    found = zip(*(along for _, along in dims), strict=True)
    return ((a, b, c), *((x, y, z) for x, y, z in found))


@dataclass(frozen=True)
class RowRotary(Implementation[RotaryMatch, RotaryParameters]):
    """Rotary embeddings by the template of a kind of target, which may take the norm before them."""

    template: str
    normalizes: bool

    def space(self, match: RotaryMatch, target: Target) -> Sequence[RotaryParameters]:
        """One choice, since the kernel is bound by memory."""
        return [match.parameters] if match.norm is None or self.normalizes else []

    def cost(self, match: RotaryMatch, parameters: RotaryParameters, target: Target) -> Cost:
        return match.cost

    def call(self, match: RotaryMatch, parameters: RotaryParameters, target: Target, threads: int) -> KernelCall:
        return match.call(self.template, parameters)


CPU_ROTARY = RowRotary("cpu/rotary.cpp.j2", normalizes=True)
CUDA_ROTARY = RowRotary("cuda/rotary.cu.j2", normalizes=False)
