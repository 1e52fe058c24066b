"""Composing the operators of a group into one row expression over bound operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuser.ir.expression import Builder, Expression
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, TensorSpec
from fuser.ir.operators import Embedding, QuantizeRows, Reduction
from fuser.ir.size import Size
from fuser.kernels.base import FLOATING, STORAGE, Access, DType, Operand
from fuser.kernels.operands import Bound, OperandExtents, bind, bind_groups, row_stride, rows_and_columns


@dataclass(frozen=True)
class RowProgram:
    """A fused chain as one expression on a ``rows`` × ``columns`` matrix.

    ``bounds`` describe the expression's inputs in order, after the ``seeds`` that the caller supplies (the accumulator
    of a GEMM); ``gathers`` are the index values of the gathered operands, in order; ``outputs`` the values written
    and ``output_strides`` their row strides.
    """

    expression: Expression
    seeds: int
    bounds: tuple[Bound, ...]
    gathers: tuple[str, ...]
    rows: int
    columns: int
    outputs: tuple[str, ...]
    output_dtypes: tuple[DType, ...]
    output_strides: tuple[int, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(b.operand for b in self.bounds)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Values in the order of the templates: operands, gather indices, outputs."""
        return (*(b.value for b in self.bounds), *self.gathers, *self.outputs)

    @property
    def operand_extents(self) -> tuple[OperandExtents, ...]:
        return tuple(b.extents for b in self.bounds)

    def bytes(self, graph: OperatorGraph) -> int:
        """Memory traffic of the operands and outputs, each touched once."""
        touched = 0
        for bound in self.bounds:
            rows = bound.distinct(self.rows)
            width = 1 if bound.operand.access is Access.COLUMN else self.columns
            touched += (
                (self.rows if bound.operand.access is Access.GATHER else rows) * width * bound.operand.dtype.bytes
            )
        widths = (1 if i in self.expression.narrow else self.columns for i in range(len(self.outputs)))
        return touched + sum(self.rows * n * d.bytes for n, d in zip(widths, self.output_dtypes, strict=True))


def same_matrix(spec: TensorSpec, base: TensorSpec) -> bool:
    """Whether a view shows its base as the same matrix, by other leading dimensions at most."""
    return (
        spec.offset == 0
        and spec.is_contiguous
        and base.is_contiguous
        and rows_and_columns(spec.shape) == rows_and_columns(base.shape)
    )


def compose(
    group: OperatorGroup,
    operators: Sequence[Operator],
    seeds: Sequence[str] = (),
    storage: frozenset[torch.dtype] = FLOATING,
    groups: bool = False,
    narrow: bool = False,
) -> RowProgram | None:
    """The row program of ``operators``, which must all work on one matrix; None when they do not.

    ``seeds`` are values computed before (the GEMM's accumulator, or views of it); they become the expression's first
    inputs.
    ``storage`` holds the dtypes that operands and results may have (:func:`fuser.kernels.base.floating`); ``groups``
    says that the kernel reads operands whose rows are evenly spaced in groups only, ``narrow`` that it also computes
    and stores one number a row, as a reduction makes.
    """
    graph = group.graph
    builder = Builder()
    at: dict[str, int] = {value: builder.input(i) for i, value in enumerate(seeds)}
    bounds: list[Bound] = []
    known: dict[tuple[str, Bound], int] = {}
    gathers: list[str] = []
    computed = {rows_and_columns(graph.values[value].shape) for value in seeds}
    shapes = computed | {rows_and_columns(graph.values[op.output].shape) for op in operators}
    if narrow:
        reduced = [op.inputs[0] for op in operators if isinstance(op.semantics, Reduction)]
        shapes |= {rows_and_columns(graph.values[value].shape) for value in reduced}
        widest = max((columns for _, columns in shapes if not isinstance(columns, Size)), default=1)
        shapes = {(rows, widest if columns == 1 else columns) for rows, columns in shapes}
    # What is there already has all columns: one number a row would be a row of one.
    if len(shapes) != 1 or not computed <= shapes:
        return None
    rows, columns = shapes.pop()

    def operand(value: str, shape: tuple[int, ...], decides: bool) -> int | None:
        spec = graph.values[value]
        base = graph.base(value)
        if value in at:
            return at[value]
        if base in at:
            return at[base] if same_matrix(spec, graph.values[base]) else None
        bound = bind(value, spec, shape)
        if bound is None and groups:
            bound = bind_groups(value, spec, shape)
        if bound is None or not (spec.dtype in storage or (decides and spec.dtype == torch.bool)):
            return None
        return _input(value, bound)

    def _input(value: str, bound: Bound) -> int:
        key = (value, bound)
        if key not in known:
            known[key] = builder.input(len(seeds) + len(bounds))
            bounds.append(bound)
        return known[key]

    for op in operators:
        shape = graph.values[op.output].shape
        # Codes are written and not read here.
        made = storage | {op.semantics.codes} if isinstance(op.semantics, QuantizeRows) else storage
        if any(graph.values[value].dtype not in made for value in op.outputs):
            return None
        if isinstance(op.semantics, Embedding):
            table, index = op.inputs
            spec, indices = graph.values[table], graph.values[index]
            if len(spec.shape) != 2 or spec.shape[1] != columns or spec.strides[1] != 1 or spec.dtype not in storage:
                return None
            if group.produces(table) is not None:
                # Any of its rows may be read for the first.
                return None
            if indices.dtype != torch.int64 or not indices.is_contiguous:
                return None
            bound = Bound(Operand(Access.GATHER, STORAGE[spec.dtype]), table, spec.strides[0], spec.shape[0])
            at[op.output] = builder.input(len(seeds) + len(bounds))
            bounds.append(bound)
            gathers.append(index)
            continue
        if op.expression is None or op.expression.inputs > len(op.inputs):
            return None
        if isinstance(op.semantics, Reduction):
            shape = graph.values[op.inputs[0]].shape
            if rows_and_columns(shape)[1] != columns:
                # What is one number already would be counted once for every column.
                return None
        decide, given = op.expression.conditions, op.inputs[: op.expression.inputs]
        arguments = [operand(value, shape, i in decide) for i, value in enumerate(given)]
        if any(a is None for a in arguments):
            return None
        at.update(zip(op.outputs, builder.inline(op.expression, [a for a in arguments if a is not None]), strict=True))

    outputs = tuple(value for value in group.outputs if value in at)
    if set(outputs) != set(group.outputs):
        return None
    one = tuple(i for i, value in enumerate(outputs) if narrow and graph.values[value].shape[-1] != columns)
    strides = tuple(row_stride(graph.values[value], i in one) for i, value in enumerate(outputs))
    if not outputs or any(s is None for s in strides):
        return None
    stored = {len(seeds) + i: bound.operand.dtype.torch for i, bound in enumerate(bounds)}
    expression = builder.build(*(at[value] for value in outputs), narrow=one)
    return RowProgram(
        expression=expression.without_idle_casts(stored, [graph.values[value].dtype for value in outputs]),
        seeds=len(seeds),
        bounds=tuple(bounds),
        gathers=tuple(gathers),
        rows=rows,
        columns=columns,
        outputs=outputs,
        output_dtypes=tuple(STORAGE[graph.values[value].dtype] for value in outputs),
        output_strides=tuple(s for s in strides if s is not None),
    )
