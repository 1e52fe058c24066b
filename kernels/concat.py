"""The `concat` family: tensors one behind the other in a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup, TensorSpec
from fuser.ir.operators import Concat
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec

_RANK = 5
_PARTS = 8


@dataclass(frozen=True)
class PartExtents(Extents):
    """Of one part: where it starts in the result, bytes of a row, numbers of rows, and bytes between these in the part
    and in the result."""

    start: int
    width: int
    rows: tuple[int, int, int, int]
    step: tuple[int, int, int, int]
    out: tuple[int, int, int, int]


@dataclass(frozen=True)
class ConcatExtents(Extents):
    """All parts."""

    part: tuple[PartExtents, ...]


@dataclass(frozen=True)
class ConcatParameters:
    """How many tensors there are, and the bytes of an element."""

    parts: int
    element: int

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return ConcatExtents.declaration(part=self.parts)


class ConcatFamily:
    """One :class:`Concat` of up to eight tensors of up to five dimensions, with contiguous columns."""

    name = "concat"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        """The group, if it is that."""
        if len(group.operators) != 1 or len(group.of(Concat)) != 1:
            return None
        (op,) = group.operators
        specs = [group.graph.values[v] for v in (*op.inputs, op.output)]
        fits = len(op.inputs) <= _PARTS and len(specs[0].shape) <= _RANK
        return group if fits and all(spec.strides[-1] == 1 or spec.shape[-1] == 1 for spec in specs) else None


@dataclass(frozen=True)
class RowConcat(Implementation[OperatorGroup, ConcatParameters]):
    """Copies of rows by a template."""

    template: str

    def space(self, match: OperatorGroup, target: Target) -> Sequence[ConcatParameters]:
        (op,) = match.operators
        return [ConcatParameters(len(op.inputs), match.graph.values[op.output].dtype.itemsize)]

    def cost(self, match: OperatorGroup, parameters: ConcatParameters, target: Target) -> Cost:
        return Cost(0.0, 2.0 * match.graph.values[match.operators[0].output].nbytes)

    def call(self, match: OperatorGroup, parameters: ConcatParameters, target: Target, threads: int) -> KernelCall:
        (op,) = match.operators
        (concat,) = match.of(Concat)
        assert isinstance(concat.semantics, Concat)
        out, dim, start = match.graph.values[op.output], concat.semantics.dim, 0
        parts = []
        for value in op.inputs:
            part = match.graph.values[value]
            parts.append(_part(part, out, start * out.strides[dim] * out.dtype.itemsize))
            start += part.shape[dim]
        spec = KernelSpec("concat", self.template, parameters)
        return KernelCall(spec, (*op.inputs, op.output), ConcatExtents(tuple(parts)), op.outputs)


CPU_CONCAT = RowConcat("cpu/concat.cpp.j2")
CUDA_CONCAT = RowConcat("cuda/concat.cu.j2")


def _part(part: TensorSpec, out: TensorSpec, start: int) -> PartExtents:
    size, pad = out.dtype.itemsize, _RANK - len(part.shape)

    def outer(values: Sequence[int], scale: int, filler: int) -> tuple[int, int, int, int]:
        a, b, c, d = (*(filler for _ in range(pad)), *(n * scale for n in values[:-1]))
        return a, b, c, d

    rows = outer(part.shape, 1, 1)
    return PartExtents(start, part.shape[-1] * size, rows, outer(part.strides, size, 0), outer(out.strides, size, 0))
