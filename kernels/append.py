"""The `append` family: rows behind those of a cache, in the memory that these lie in where nobody else sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup, TensorSpec
from fuser.ir.operators import Append
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec


@dataclass(frozen=True)
class AppendExtents(Extents):
    """Rows of ``width`` bytes: ``before`` those that there are, ``rows`` new ones; ``start`` are the bytes between
    batch entries, heads and new rows, ``out`` those between batch entries and heads of the buffer."""

    batch: int
    heads: int
    before: int
    rows: int
    width: int
    start: tuple[int, int, int]
    out: tuple[int, int]


@dataclass(frozen=True)
class AppendParameters:
    """There is nothing to choose."""

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return AppendExtents.declaration()


class AppendFamily:
    """One :class:`Append` of rows with contiguous columns."""

    name = "append"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        """The group, if it is that."""
        if len(group.operators) != 1 or len(group.of(Append)) != 1:
            return None
        (op,) = group.operators
        before, rows, out = (group.graph.values[v] for v in (*op.inputs, op.output))
        if not before.has_strides(TensorSpec.contiguous(before.shape, before.dtype).strides):
            return None
        return group if rows.strides[-1] == 1 and out.strides[-2:] == (out.shape[-1], 1) else None


class CpuAppend(Implementation[OperatorGroup, AppendParameters]):
    """Copies of the new rows, and of those before only where they lie elsewhere."""

    def space(self, match: OperatorGroup, target: Target) -> Sequence[AppendParameters]:
        return [AppendParameters()]

    def cost(self, match: OperatorGroup, parameters: AppendParameters, target: Target) -> Cost:
        return Cost(0.0, 2.0 * match.graph.values[match.operators[0].inputs[1]].nbytes)

    def call(self, match: OperatorGroup, parameters: AppendParameters, target: Target, threads: int) -> KernelCall:
        (op,) = match.operators
        before, rows, out = (match.graph.values[v] for v in (*op.inputs, op.output))
        size = out.dtype.itemsize
        a, b, c, _ = (stride * size for stride in rows.strides)
        batch, heads, _, width = out.shape
        to = out.strides[0] * size, out.strides[1] * size
        extents = AppendExtents(batch, heads, before.shape[2], rows.shape[2], width * size, (a, b, c), to)
        spec = KernelSpec("append", "cpu/append.cpp.j2", parameters)
        return KernelCall(spec, (*op.inputs, op.output), extents, op.outputs)
