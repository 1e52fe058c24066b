"""The `write_rows` family: rows at some positions of a cache, in the memory of that where a call is to leave it so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import WriteRows
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec


@dataclass(frozen=True)
class WriteRowsExtents(Extents):
    """``rows`` of ``width`` bytes for those of a cache of ``capacity``; ``before`` and ``start`` are the bytes between
    batch entries, heads and rows of the cache that is given, and of the new rows."""

    batch: int
    heads: int
    capacity: int
    rows: int
    width: int
    before: tuple[int, int, int]
    start: tuple[int, int, int]


@dataclass(frozen=True)
class WriteRowsParameters:
    """There is nothing to choose."""

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return WriteRowsExtents.declaration()


class WriteRowsFamily:
    """One :class:`WriteRows` with contiguous columns."""

    name = "write_rows"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        """The group, if it is that."""
        if len(group.operators) != 1 or len(group.of(WriteRows)) != 1:
            return None
        before, rows, at = (group.graph.values[v] for v in group.operators[0].inputs)
        return group if before.strides[-1] == rows.strides[-1] == at.strides[-1] == 1 else None


class CpuWriteRows(Implementation[OperatorGroup, WriteRowsParameters]):
    """Copies of the new rows, and of the others only where they lie elsewhere."""

    def space(self, match: OperatorGroup, target: Target) -> Sequence[WriteRowsParameters]:
        return [WriteRowsParameters()]

    def cost(self, match: OperatorGroup, parameters: WriteRowsParameters, target: Target) -> Cost:
        return Cost(0.0, 2.0 * match.graph.values[match.operators[0].inputs[1]].nbytes)

    def call(self, match: OperatorGroup, parameters: WriteRowsParameters, target: Target, threads: int) -> KernelCall:
        (op,) = match.operators
        before, rows, out = (match.graph.values[v] for v in (*op.inputs[:2], op.output))
        batch, heads, capacity, width = out.shape
        size = out.dtype.itemsize
        starts = [(b * size, h * size, r * size) for b, h, r, _ in (before.strides, rows.strides)]
        extents = WriteRowsExtents(batch, heads, capacity, rows.shape[2], width * size, *starts)
        spec = KernelSpec("write_rows", "cpu/write_rows.cpp.j2", parameters)
        return KernelCall(spec, (*op.inputs, op.output), extents, op.outputs)
