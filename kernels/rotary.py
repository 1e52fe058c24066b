"""The `rotary` family: rotary embeddings of rows that lie evenly, such as the heads in a product for q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup, TensorSpec
from fuser.ir.operators import Rotary
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, floating

_DIMS = 3
"""Dimensions of rows that a kernel walks."""


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

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return RotaryExtents.declaration()


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
    """One rotation of the columns ``rotary`` says; ``rows`` has the sizes of the dimensions of rows and the strides of
    x, cos, sin and out along them."""

    group: OperatorGroup
    rotary: Rotary
    rows: tuple[tuple[int, int, int], ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Of x, cos, sin and out."""
        (op,) = self.group.operators
        return tuple(self.group.graph.values[value] for value in (*op.inputs, op.output))

    @property
    def cost(self) -> Cost:
        """Every number touched once."""
        x, cos, sin, out = self.specs
        return Cost(self.group.graph.flops(self.group.operators[0]), sum(s.nbytes for s in (x, cos, sin, out)))

    def call(self, template: str, parameters: RotaryParameters) -> KernelCall:
        """The launch of a template, whose parameters hold these."""
        (op,) = self.group.operators
        extents = RotaryExtents(*self.rows)
        return KernelCall(KernelSpec("rotary", template, parameters), (*op.inputs, op.output), extents, op.outputs)

    @property
    def parameters(self) -> RotaryParameters:
        x, cos, _, out = self.specs
        rotary = self.rotary
        x_type, table, stored = (STORAGE[spec.dtype] for spec in (x, cos, out))
        paired = cos.shape[-1] < rotary.width
        return RotaryParameters(
            out.shape[-1], rotary.start, rotary.width, rotary.interleaved, paired, x_type, table, stored
        )


@dataclass(frozen=True)
class RotaryFamily:
    """One rotary embedding by itself."""

    name = "rotary"

    def match(self, group: OperatorGroup, target: Target) -> RotaryMatch | None:
        """The group, where it is one rotation of rows in up to three dimensions, each with contiguous columns."""
        if len(group.operators) != 1 or not group.of(Rotary):
            return None
        (op,) = group.of(Rotary)
        x, cos, sin, _ = specs = [group.graph.values[value] for value in (*op.inputs, op.output)]
        if any(s.dtype not in floating(target) or s.strides[-1] != 1 for s in specs) or cos.dtype != sin.dtype:
            return None
        rows = rows_of(x.shape[:-1], [s.shape[:-1] for s in specs], [s.strides[:-1] for s in specs])
        return None if rows is None else RotaryMatch(group, op.semantics, rows)


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
    """Rotary embeddings by the template of a kind of target."""

    template: str

    def space(self, match: RotaryMatch, target: Target) -> Sequence[RotaryParameters]:
        """One choice, since the kernel is bound by memory."""
        return [match.parameters]

    def cost(self, match: RotaryMatch, parameters: RotaryParameters, target: Target) -> Cost:
        return match.cost

    def call(self, match: RotaryMatch, parameters: RotaryParameters, target: Target, threads: int) -> KernelCall:
        return match.call(self.template, parameters)


CPU_ROTARY, CUDA_ROTARY = RowRotary("cpu/rotary.cpp.j2"), RowRotary("cuda/rotary.cu.j2")
