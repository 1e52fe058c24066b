"""The `rowwise` and `pointwise` families: row expressions as one pass over memory.

`rowwise` reduces along rows (norms, softmax) or gathers rows (embeddings); `pointwise` runs any chain or small DAG of
elementwise operators, broadcasts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuser.ir.expression import Expression
from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import Embedding
from fuser.ir.target import Target
from fuser.kernels.base import Access, Cost, DType, Implementation, KernelCall, KernelSpec, Operand, floating
from fuser.kernels.compose import RowProgram, compose
from fuser.kernels.operands import OperandExtents

_MAX_OPERANDS = 16


@dataclass(frozen=True)
class RowwiseParameters:
    """``block``: columns a task handles when rows may be split, 0 when a row is one task."""

    expression: Expression
    operands: tuple[Operand, ...]
    outputs: tuple[DType, ...]
    block: int

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return RowwiseExtents.declaration(operands=len(self.operands), output_strides=len(self.outputs))


@dataclass(frozen=True)
class RowwiseExtents(Extents):
    """Rows and columns of the matrix, the operands, and elements between the rows of every output."""

    rows: int
    columns: int
    operands: tuple[OperandExtents, ...]
    output_strides: tuple[int, ...]


@dataclass(frozen=True)
class RowwiseMatch:
    """A group as one row expression; ``family`` is the name of the family that matched it."""

    family: str
    group: OperatorGroup
    program: RowProgram

    def cost(self) -> Cost:
        """Every operand and result touched once: expressions are bound by memory, whatever the target."""
        program = self.program
        flops = float(program.rows * program.columns * max(program.expression.flops, 1))
        return Cost(flops, float(program.bytes(self.group.graph)), efficiency=0.3)

    def call(self, template: str, parameters: Any, *, elementwise: bool) -> KernelCall:
        """One launch; ``elementwise`` says that the template knows no rows."""
        program = self.program
        rows, columns = program.rows, program.columns
        if (
            elementwise
            and all(s == columns for s in program.output_strides)
            and all(
                b.operand == Operand(Access.MATRIX, b.operand.dtype) and b.stride == columns for b in program.bounds
            )
        ):
            # Rows lie end to end, so the matrix is one long row and short rows cost no tails.
            rows, columns = 1, rows * columns
        spec = KernelSpec(self.family, template, parameters)
        extents = RowwiseExtents(rows, columns, program.operand_extents, program.output_strides)
        return KernelCall(spec, program.tensors, extents, program.outputs)


@dataclass(frozen=True)
class RowwiseFamily:
    """Row expressions with reductions or gathers."""

    name = "rowwise"

    def match(self, group: OperatorGroup, target: Target) -> RowwiseMatch | None:
        """The group as one row expression, when all of it is elementwise or row-wise on one matrix."""
        # Composing is the expensive part, and most groups that are asked about belong to one family only.
        if any(op.expression is None and not isinstance(op.semantics, Embedding) for op in group.operators):
            return None
        if self._is_row(group) != (self.name == "rowwise"):
            return None
        program = compose(group, group.operators, storage=floating(target), groups=True, narrow=True)
        if program is None or len(program.bounds) > _MAX_OPERANDS:
            return None
        return RowwiseMatch(self.name, group, program)

    @staticmethod
    def _is_row(group: OperatorGroup) -> bool:
        return bool(group.of(Embedding)) or any(op.expression and op.expression.has_reduction for op in group.operators)


@dataclass(frozen=True)
class PointwiseFamily(RowwiseFamily):
    """Elementwise expressions."""

    name = "pointwise"


class CpuRowwise(Implementation[RowwiseMatch, RowwiseParameters]):
    """Row expressions of either family on CPUs."""

    def space(self, match: RowwiseMatch, target: Target) -> Sequence[RowwiseParameters]:
        """One choice, since the kernel is bound by memory."""
        program = match.program
        expression = program.expression
        block = 0 if expression.has_reduction or expression.narrow else 4096
        return [RowwiseParameters(expression, program.operands, program.output_dtypes, block)]

    def cost(self, match: RowwiseMatch, parameters: RowwiseParameters, target: Target) -> Cost:
        return match.cost()

    def call(self, match: RowwiseMatch, parameters: RowwiseParameters, target: Target, threads: int) -> KernelCall:
        return match.call("cpu/rowwise.cpp.j2", parameters, elementwise=parameters.block > 0)
