"""The `unfold` family: overlapping windows of a grid as rows, which a product multiplies then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import Unfold
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, floating


@dataclass(frozen=True)
class UnfoldExtents(Extents):
    """Rows of the result; lines and columns of x and of the result; elements between entries of the batch, planes and
    lines of x."""

    rows: int
    grid: tuple[int, int]
    out: tuple[int, int]
    x: tuple[int, int, int]


@dataclass(frozen=True)
class UnfoldParameters:
    """Planes, elements of a pixel, lines and columns of ``kernel``, ``stride`` and ``padding``."""

    planes: int
    pixel: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: DType

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return UnfoldExtents.declaration()


class UnfoldFamily:
    """One :class:`Unfold` of lines that are contiguous."""

    name = "unfold"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        """The group, if it is that."""
        if len(group.operators) != 1 or len(group.of(Unfold)) != 1:
            return None
        x = group.graph.values[group.operators[0].inputs[0]]
        *_, width, pixel = x.shape
        lies = (pixel == 1 or x.strides[-1] == 1) and (width == 1 or x.strides[-2] == pixel)
        return group if lies and x.dtype in floating(target) else None


@dataclass(frozen=True)
class RowUnfold(Implementation[OperatorGroup, UnfoldParameters]):
    """Copies of the lines of windows, cut where the grid ends, by a template."""

    template: str

    def space(self, match: OperatorGroup, target: Target) -> Sequence[UnfoldParameters]:
        (op,) = match.of(Unfold)
        x, how = match.graph.values[op.inputs[0]], op.semantics
        _, planes, _, _, pixel = x.shape
        return [UnfoldParameters(planes, pixel, how.kernel, how.stride, how.padding, STORAGE[x.dtype])]

    def cost(self, match: OperatorGroup, parameters: UnfoldParameters, target: Target) -> Cost:
        (op,) = match.operators
        return Cost(0.0, float(sum(match.graph.values[v].nbytes for v in (*op.inputs, op.output))))

    def call(self, match: OperatorGroup, parameters: UnfoldParameters, target: Target, threads: int) -> KernelCall:
        (op,) = match.operators
        x, out = (match.graph.values[v] for v in (*op.inputs, op.output))
        (batch, lines, columns, _), (_, _, height, width, _) = out.shape, x.shape
        entry, plane, line, _, _ = x.strides
        extents = UnfoldExtents(batch * lines * columns, (height, width), (lines, columns), (entry, plane, line))
        spec = KernelSpec("unfold", self.template, parameters)
        return KernelCall(spec, (*op.inputs, op.output), extents, op.outputs)


CPU_UNFOLD = RowUnfold("cpu/unfold.cpp.j2")
CUDA_UNFOLD = RowUnfold("cuda/unfold.cu.j2")
