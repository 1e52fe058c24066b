"""The values and operators of a graph while it is raised: views get names, and constants are derived, not computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fuser.frontend import norms
from fuser.frontend.views import View, collapsed
from fuser.ir import operators as kinds
from fuser.ir.binding import Binder, Late
from fuser.ir.errors import CaptureError
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec, ViewCalls, read
from fuser.ir.operators import Extern, GatherRows, Ref, Semantics, TorchCall, canonical
from fuser.ir.size import Size

Decision = TypeVar("Decision")
_LEAST_WIDTH = 8
"""Elements of a row whose number costs little beside it."""


def _is_still(decision: Decision, function: Callable[..., Decision], *arguments: Any) -> bool:
    return function(*arguments) == decision


def _of_contents(function: Callable[..., Decision], evaluation: Evaluation, *arguments: Any) -> Decision:
    return function(evaluation(), *arguments)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How to compute a ``constant``: from its ``sources``, or it is a tensor that is there."""

    constant: Constant
    sources: tuple[Evaluation, ...] = ()
    tensor: Tensor | None = None

    def __call__(self, known: dict[int, Tensor] | None = None) -> Tensor:
        """The constant's value, contiguous. Parts that are one object are computed once."""
        known = {} if known is None else known
        if id(self) not in known:
            if self.tensor is not None:
                return self.tensor.detach()
            known[id(self)] = self.constant.evaluate([source(known) for source in self.sources])
        return known[id(self)]


class GraphBuilder:
    """A graph to which operators are appended; what nothing needs is left out at the end.

    ``floating`` are the dtypes that kernels compute with. ``inspected`` collects the parameters whose values, not only
    shapes, decided something, and ``assumptions`` what was decided for the ``sample`` of the named sizes and has to be
    the same for others.
    """

    def __init__(self, sample: Mapping[str, int], floating: frozenset[torch.dtype] = frozenset()) -> None:
        self.floating = floating
        self.values: dict[str, TensorSpec] = {}
        self.operators: list[Operator] = []
        self.constants: dict[str, Constant] = {}
        self.states: list[str] = []
        self.sample = sample
        self.assumptions: list[Late] = []
        self._tensors: dict[str, Tensor] = {}
        self._evaluations: dict[str, Evaluation] = {}
        self._decisions: dict[Hashable, Any] = {}
        self._producers: dict[str, Operator] = {}
        self._realized: dict[View, str] = {}
        self._numbers: dict[tuple[tuple[str, ...], str], str] = {}
        self.inspected: set[str] = set()

    # ---- values

    def dtype(self, view: View) -> torch.dtype:
        return self.values[view.base].dtype

    def is_constant(self, view: View) -> bool:
        return view.base in self.constants

    def add_value(self, name: str, spec: TensorSpec) -> str:
        unique, n = name, 1
        while unique in self.values:
            unique, n = f"{name}_{n}", n + 1
        self.values[unique] = spec
        return unique

    def add_state(self, name: str, spec: TensorSpec) -> View:
        """A value that lives across calls, by the name that all programs know it by. Raises CaptureError where that is
        the name of another value."""
        if self.values.setdefault(name, spec) is not spec and (name not in self.states or self.values[name] != spec):
            raise CaptureError(f"the state {name} has the name of another value")
        if name not in self.states:
            self.states.append(name)
        return View.of(name, spec)

    def realize(self, view: View) -> str:
        """The name of a value that is this view: its base, an alias, or, where no strides can say it, a copy."""
        base = self.values[view.base]
        shape, strides = view.shape, view.strides()
        if view.offset == 0 and shape == base.shape and strides is not None and base.has_strides(strides):
            return view.base
        if view in self._realized:
            return self._realized[view]
        if self.is_constant(view):
            name = self.derived(f"{view.base}_view", (view.base,), view.copied(), shape, base.dtype)
        elif strides is not None:
            name = self.alias(f"{view.base}_view", view.base, shape, strides, view.offset)
        else:
            name = self._turned(view) or self.gathered(view) or self._copied(view)
        self._realized[view] = name
        return name

    def _turned(self, view: View) -> str | None:
        """A view whose columns are rows in memory, as one of the rows that :meth:`gathered` gives, which others read,
        too; None for others."""
        if len(view.dims) < 2 or self.is_constant(view):
            return None
        back = (*range(len(view.dims) - 2), len(view.dims) - 1, len(view.dims) - 2)
        rows = view.permute(back)
        if self.row_numbers(view) is not None or self.row_numbers(rows) is None:
            return None
        name = self.realize(rows)
        turned = View.of(name, self.values[name]).permute(back)
        strides = turned.strides()
        return None if strides is None else self.alias(f"{name}_turned", name, turned.shape, strides, turned.offset)

    def _copied(self, view: View) -> str:
        copy = Extern(view.copied(), "a view that no strides can describe is copied")
        spec = TensorSpec.contiguous(view.shape, self.dtype(view))
        return self.emit(copy, f"{view.base}_copy", (view.base,), spec).base

    # ---- rows in another order

    def gathered(self, view: View) -> str | None:
        """A value that has the rows of a view, its last dimension, by their numbers: what windows of an image are. None
        where they are no rows of one matrix, or of numbers that kernels do not move."""
        found = self.row_numbers(view)
        return None if found is None else self.of_rows(view, *found)

    def of_rows(self, view: View, table: str, numbers: str) -> str:
        """The rows with these numbers of a matrix that :meth:`row_numbers` gave for ``view``."""
        matrix = self.values[table]
        spec = TensorSpec.contiguous((*self.values[numbers].shape, matrix.shape[1]), matrix.dtype)
        op = self.producer(matrix.base or table)
        if op is not None and isinstance(op.semantics, GatherRows):
            source, before = op.inputs
            if {before, numbers} <= self.constants.keys() and self.values[source].shape[1] == matrix.shape[1]:
                call = TorchCall(torch.ops.aten.take.default, (Ref(0), Ref(1)))
                return self.of_rows(view, source, self.numbered((before, numbers), call, self.values[numbers].shape))
        elif op is not None and self._is_by_row(op, matrix):
            # Each row by itself, and so in any order: a kernel reads rows where they are.
            first, *others = op.inputs
            seen = self.values[first]
            rows = self.alias(f"{first}_rows", seen.base or first, *_matrix(seen, seen.shape[-1]))
            inputs = (self.of_rows(view, rows, numbers), *others)
            return self.emit(op.semantics, f"{view.base}_gathered", inputs, spec).base
        return self.emit(GatherRows(), f"{view.base}_gathered", (table, numbers), spec).base

    def _is_by_row(self, op: Operator, rows: TensorSpec) -> bool:
        """Whether ``op`` is a norm or the like, which makes every row of its result of the same row of one operand."""
        if op.expression is None or not op.expression.has_reduction or self._states_of(op.inputs):
            return False
        first, *others = (self.values[value] for value in op.inputs)
        same = first.is_contiguous and first.offset == 0 and first.numel == rows.numel and first.dtype == rows.dtype
        return same and first.shape[-1] == rows.shape[1] and all(len(spec.shape) < 2 for spec in others)

    def row_numbers(self, view: View) -> tuple[str, str] | None:
        """A matrix that a view shows rows of, and a constant with the number of each, in the shape of the view without
        its last dimension; None where it shows something else."""
        *outer, last = view.dims or ((),)
        base, columns = self.values[view.base], collapsed(last)
        if base.dtype not in self.floating or len(columns) != 1 or columns[0][1] != 1 or self.is_constant(view):
            return None
        width, strides = columns[0][0], [stride for factors in outer for _, stride in factors]
        if not outer or isinstance(width, Size) or width < _LEAST_WIDTH:
            return None
        dense = base.base is None and base.extent == base.numel
        if not dense or any(n % width != 0 for n in (*strides, view.offset, base.numel)):
            return None
        table, count = self.alias(f"{view.base}_rows", view.base, *_matrix(base, width)), base.numel // width
        numbers = self.numbered((), TorchCall(torch.arange, (count,)), (count,))
        dims = tuple(tuple((size, stride // width) for size, stride in factors) for factors in outer)
        seen = View(numbers, dims, view.offset // width)
        return table, self.numbered((numbers,), seen.copied(), seen.shape)

    def numbered(self, sources: tuple[str, ...], call: TorchCall, shape: Sequence[int]) -> str:
        """A constant of numbers of rows, one for all that need the same."""
        key = sources, canonical(call)
        if key not in self._numbers:
            self._numbers[key] = self.derived("numbers", sources, call, shape, torch.int64)
        return self._numbers[key]

    def reshaped(self, view: View, shape: Sequence[int]) -> View:
        """A view in another shape, of a copy where it has to be. Raises CaptureError where even that has none."""
        found = view.reshape(shape)
        if found is None:
            name = self.realize(view)
            found = View.of(name, self.values[name]).reshape(shape)
        if found is None:
            raise CaptureError(f"{view.base} of the shape {view.shape} cannot be seen as {tuple(shape)}")
        return found

    # ---- constants

    def add_parameter(self, name: str, tensor: Tensor) -> View:
        """A constant that the model holds, as it lies in memory."""
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))
        self.constants[name], self.values[name], self._tensors[name] = Constant(name), spec, tensor
        return View.of(name, spec)

    def derived(
        self, name: str, sources: tuple[str, ...], call: TorchCall, shape: Sequence[int], dtype: torch.dtype
    ) -> str:
        """A constant made from others, which is computed when something needs its contents."""
        unique = self.add_value(name, TensorSpec.contiguous(shape, dtype))
        self.constants[unique] = Constant(unique, sources, call)
        return unique

    def tensor(self, name: str) -> Tensor:
        """The value of a constant that does not depend on named sizes, computed once."""
        if name not in self._tensors:
            constant = self.constants[name]
            if constant.call is None:
                raise KeyError(name)
            self._tensors[name] = constant.evaluate([self.tensor(s) for s in constant.sources])
        return self._tensors[name]

    def decided(self, function: Callable[..., Decision], view: View, *arguments: Any) -> Decision:
        """``function(tensor, *arguments)`` of the contents of a constant view, which the graph is then made for.

        Where the contents depend on named sizes, it is decided by those of the ``sample``, and assumed for others.
        """
        key = (function, view, arguments)
        if key in self._decisions:
            known: Decision = self._decisions[key]
            return known
        found, evaluation = self.evaluated(function, view, *arguments)
        if evaluation is not None:
            self.assumed(_of_contents, function, evaluation, *arguments)
        self._decisions[key] = found
        return found

    def assumed(self, function: Callable[..., Decision], *arguments: Any) -> Decision:
        """``function(*arguments)``; where these depend on named sizes, what it is for the ``sample``, which is assumed
        for others."""
        binder = Binder(arguments)
        found = function(*binder(self.sample))
        if binder.names:
            self.assumptions.append(Late(_is_still, (found, function, *arguments)))
        return found

    def evaluated(
        self, function: Callable[..., Decision], view: View, *arguments: Any
    ) -> tuple[Decision, Evaluation | None]:
        """As :meth:`decided`, without assuming anything: and how the contents follow from named sizes, if they do."""
        self._inspect(view.base)
        seen = Constant(view.base, (view.base,), view.copied())
        evaluation = Evaluation(seen, (self._evaluation(view.base),))
        binder = Binder(evaluation)
        if binder.names:
            return function(binder(self.sample)(), *arguments), evaluation
        (tensor,) = view.copied()(self.tensor(view.base))
        return function(tensor.detach(), *arguments), None

    def _evaluation(self, name: str) -> Evaluation:
        if name not in self._evaluations:
            constant = self.constants[name]
            sources = tuple(map(self._evaluation, constant.sources))
            tensor = self._tensors[name] if constant.call is None else None
            self._evaluations[name] = Evaluation(constant, sources, tensor)
        return self._evaluations[name]

    def _inspect(self, name: str) -> None:
        constant = self.constants[name]
        if constant.call is None:
            self.inspected.add(name)
        for source in constant.sources:
            self._inspect(source)

    # ---- operators

    def producer(self, value: str) -> Operator | None:
        """The operator that makes a value, if one does."""
        return self._producers.get(value)

    def append(self, operator: Operator) -> None:
        self.operators.append(operator)
        self._producers.update(dict.fromkeys(operator.outputs, operator))

    def emit(self, semantics: Semantics, name: str, inputs: Sequence[str], spec: TensorSpec) -> View:
        """Append an operator with one output of its own storage."""
        return self.emit_all(semantics, name, inputs, [spec])[0]

    def emit_all(
        self, semantics: Semantics, name: str, inputs: Sequence[str], specs: Sequence[TensorSpec]
    ) -> tuple[View, ...]:
        """Append an operator with outputs of their own storage."""
        outputs = tuple(self.add_value(name, spec) for spec in specs)
        self.append(Operator(outputs[0], semantics, tuple(inputs), outputs))
        return tuple(map(View.of, outputs, specs))

    def alias(self, name: str, base: str, shape: Sequence[int], strides: Sequence[int], offset: int) -> str:
        """Memory of ``base`` seen with another shape and strides."""
        whole = self.values[base]
        spec = TensorSpec(tuple(shape), whole.dtype, tuple(strides), base, offset)
        if offset == 0 and (spec.shape, spec.strides) == (whole.shape, whole.strides):
            return base
        call = TorchCall(torch.as_strided, (Ref(0), spec.shape, spec.strides, offset))
        return self.emit(_view_kind(whole, spec)(call), name, (base,), spec).base

    # ---- the end

    def finish(
        self,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        aliases: Mapping[int, ViewCalls],
        updated: tuple[str, ...] = (),
    ) -> OperatorGraph:
        """The graph, without what neither an output nor a state needs."""
        operators, _ = read(self.operators, outputs)
        operators, _ = read(norms.joined(operators, self.values, self.constants, outputs), outputs)
        whole = OperatorGraph(
            operators=self._kernels_last(operators),
            values=self.values,
            inputs=inputs,
            outputs=outputs,
            constants=self.constants,
            aliases=aliases,
            inspected=frozenset(self.inspected),
            assumptions=tuple(self.assumptions),
            states=tuple(self.states),
            updated=updated,
        )
        return whole.without_unread()

    def _kernels_last(self, operators: Sequence[Operator]) -> tuple[Operator, ...]:
        """The same operators, those first that depend on no kernel; random ones, and those that touch a state, stay in
        their order."""
        late: set[str] = set()
        late_touched: set[str] = set()
        late_written: set[str] = set()
        random_late = False
        first: list[Operator] = []
        rest: list[Operator] = []
        for op in operators:
            early = not op.semantics.fusible and not any(v in late for v in op.inputs)
            early = early and not (op.semantics.is_random and random_late)
            touched, written = self._states_of(op.inputs), self._states_of(op.mutates)
            early = early and not touched & late_written and not written & late_touched
            (first if early else rest).append(op)
            if not early:
                late.update(op.outputs)
                late_touched |= touched
                late_written |= written
                random_late |= op.semantics.is_random
        return (*first, *rest)

    def _states_of(self, values: Sequence[str]) -> set[str]:
        return {self.values[v].base or v for v in values}.intersection(self.states)


def _matrix(spec: TensorSpec, width: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Shape, strides and offset of the matrix with rows of ``width`` that lies in the memory of ``spec``."""
    return (spec.numel // width, width), (width, 1), 0


def _view_kind(base: TensorSpec, spec: TensorSpec) -> type[kinds.View]:
    if len(spec.shape) == 4 and len(base.shape) < 4:
        return kinds.SplitHeads
    if len(base.shape) == 4 and len(spec.shape) < 4:
        return kinds.MergeHeads
    return kinds.View
