"""The `rowwise` and `pointwise` families: row expressions as one pass over memory.

`rowwise` reduces along rows (norms, softmax) or gathers rows (embeddings); `pointwise` runs any chain or small DAG of
elementwise operators, broadcasts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.expression import Expression
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import Embedding
from fuser.ir.target import Target
from fuser.kernels import rowwise_cuda
from fuser.kernels.base import Access, Cost, DType, KernelCall, KernelSpec, Operand, floating
from fuser.kernels.compose import RowProgram, compose
from fuser.kernels.rowwise_cuda import CudaRowwiseParameters, RowwiseExtents

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
class RowwiseMatch:
    group: OperatorGroup
    program: RowProgram


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
        program = compose(group, group.operators, storage=floating(target))
        if program is None or len(program.bounds) > _MAX_OPERANDS:
            return None
        return RowwiseMatch(group, program)

    @staticmethod
    def _is_row(group: OperatorGroup) -> bool:
        return bool(group.of(Embedding)) or any(op.expression and op.expression.has_reduction for op in group.operators)

    def space(self, match: RowwiseMatch, target: Target) -> Sequence[RowwiseParameters | CudaRowwiseParameters]:
        """One choice on a CPU, since the kernel is bound by memory; on a GPU also how many threads share a row."""
        program = match.program
        if target.kind == "cuda":
            return rowwise_cuda.space(program, target)
        block = 0 if program.expression.has_reduction else 4096
        return [RowwiseParameters(program.expression, program.operands, program.output_dtypes, block)]

    def cost(self, match: RowwiseMatch, parameters: RowwiseParameters | CudaRowwiseParameters, target: Target) -> Cost:
        program = match.program
        flops = float(program.rows * program.columns * max(program.expression.flops, 1))
        return Cost(flops, float(program.bytes(match.group.graph)), efficiency=0.3)

    def call(
        self,
        match: RowwiseMatch,
        parameters: RowwiseParameters | CudaRowwiseParameters,
        target: Target,
        threads: int,
    ) -> KernelCall:
        program = match.program
        rows, columns = program.rows, program.columns
        flat = (
            self._is_elementwise(parameters)
            and all(s == columns for s in program.output_strides)
            and all(
                b.operand.access is Access.MATRIX and not b.operand.periodic and b.stride == columns
                for b in program.bounds
            )
        )
        if flat:
            # Rows lie end to end, so the matrix is one long row and short rows cost no tails.
            rows, columns = 1, rows * columns
        if isinstance(parameters, CudaRowwiseParameters):
            return rowwise_cuda.call(self.name, program, parameters, rows, columns)
        spec = KernelSpec(self.name, "cpu/rowwise.cpp.j2", parameters)
        return KernelCall(
            spec,
            program.tensors,
            RowwiseExtents(rows, columns, program.operand_extents, program.output_strides),
            program.outputs,
        )

    @staticmethod
    def _is_elementwise(parameters: RowwiseParameters | CudaRowwiseParameters) -> bool:
        if isinstance(parameters, CudaRowwiseParameters):
            return parameters.group == 0
        return parameters.block > 0


class PointwiseFamily(RowwiseFamily):
    """Elementwise expressions."""

    name = "pointwise"
