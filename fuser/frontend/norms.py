"""Norms written out: a row, its mean or sum or maximum, and what is made of both, as one operator.

Models spell norms in many ways, in whatever order and with whatever casts. All of them are functions of one row and of
constants, made of elementwise operators and reductions along the row, of which only one result is used elsewhere. Any
such function becomes one :class:`~fuser.ir.operators.Norm`, whose expression computes what the model has written.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence

from fuser.ir.expression import Builder
from fuser.ir.graph import Operator, TensorSpec
from fuser.ir.operators import Bias, Norm, Pointwise, Reduction, View

_LIMIT = 32
"""Operators that are looked at behind a row; LayerNorm with casts has a dozen."""


def joined(
    operators: Sequence[Operator], values: Mapping[str, TensorSpec], constants: Collection[str], outputs: Iterable[str]
) -> list[Operator]:
    """The same computation with one operator for every norm. ``operators`` are in order, and something needs each."""
    return _Search(operators, values, constants, outputs).run()


class _Search:
    def __init__(
        self,
        operators: Sequence[Operator],
        values: Mapping[str, TensorSpec],
        constants: Collection[str],
        outputs: Iterable[str],
    ) -> None:
        self.operators = operators
        self.values = values
        self.constants = constants
        self.outputs = frozenset(outputs)
        self.position = {op.output: i for i, op in enumerate(operators)}
        """By what an operator makes."""
        self.readers: dict[str, list[Operator]] = collections.defaultdict(list)
        for op in operators:
            for value in dict.fromkeys(op.inputs):
                self.readers[value].append(op)
        self.replaced: dict[str, Operator | None] = {}
        """By what an operator of a norm makes, the norm for the last one and None for the others."""

    def run(self) -> list[Operator]:
        rows = (v for op in self.operators if isinstance(op.semantics, (Pointwise, Reduction)) for v in op.inputs)
        # A row that is itself made of another is a part of that one's norm, if it has one.
        for row in dict.fromkeys(rows):
            if row not in self.constants and row not in self.replaced:
                self._replace(row)
        found = (self.replaced.get(op.output, op) for op in self.operators)
        return [op for op in found if op is not None]

    def _replace(self, row: str) -> None:
        """Make one operator of the longest norm of ``row``, if there is one."""
        following = self._following(row)
        if any(isinstance(op.semantics, Reduction) for op in following.values()):
            for last in sorted(following, key=self.position.__getitem__, reverse=True):
                members = self._behind(last, following)
                if self._is_norm(row, last, members):
                    self.replaced.update(dict.fromkeys(op.output for op in members))
                    self.replaced[last] = _composed(row, members)
                    return

    def _following(self, row: str) -> dict[str, Operator]:
        """The operators that need nothing but ``row`` and constants, by what they make."""
        found: dict[str, Operator] = {}
        todo = [row]
        while todo and len(found) < _LIMIT:
            for op in self.readers[todo.pop()]:
                if not {op.output} & (found.keys() | self.replaced.keys()) and self._follows(op, row, found):
                    found[op.output] = op
                    todo.append(op.output)
        return found

    def _follows(self, op: Operator, row: str, found: Collection[str]) -> bool:
        shape = self.values[row].shape
        spec = self.values[op.output]
        numbers = (shape[:-1], (*shape[:-1], 1))
        if isinstance(op.semantics, View):
            (source,) = op.inputs
            number = source in found and self.values[source].shape in numbers
            return number and spec.shape in (*numbers, shape) and self._lies_along(spec, shape)
        if not isinstance(op.semantics, (Pointwise, Bias, Reduction)) or spec.shape not in (*numbers, shape):
            return False
        if isinstance(op.semantics, Reduction) and self.values[op.inputs[0]].shape != shape:
            # What is one number already would be counted once for every column.
            return False
        return all(
            value == row or (value in found and self._broadcasts(value, spec)) or self._is_shared(value, spec)
            for value in op.inputs
        )

    def _lies_along(self, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
        """Whether a view of one number a row has the same number for a row, or a row of it."""
        rows = TensorSpec(shape[:-1], spec.dtype, spec.strides[: len(shape) - 1])
        repeats = len(spec.shape) < len(shape) or spec.shape[-1] == 1 or spec.strides[-1] == 0
        return spec.offset == 0 and rows.is_contiguous and repeats

    def _broadcasts(self, value: str, spec: TensorSpec) -> bool:
        """Whether the rows of ``value`` meet those of ``spec``: dimensions of PyTorch are aligned at the end."""
        return len(self.values[value].shape) == len(spec.shape)

    def _is_shared(self, value: str, of: TensorSpec) -> bool:
        """Whether a constant is the same for all rows."""
        spec = self.values[value]
        return value in self.constants and (spec.numel == 1 or spec.numel == spec.shape[-1] == of.shape[-1])

    def _behind(self, last: str, following: Mapping[str, Operator]) -> list[Operator]:
        """The operators of ``following`` that ``last`` needs, in order."""
        found = {last}
        todo = [last]
        while todo:
            new = {v for v in following[todo.pop()].inputs if v in following} - found
            found |= new
            todo.extend(new)
        return [following[value] for value in sorted(found, key=self.position.__getitem__)]

    def _is_norm(self, row: str, last: str, members: Sequence[Operator]) -> bool:
        shape, kinds = self.values[row].shape, [op.semantics for op in members]
        if self.values[last].shape != shape or shape[-1] == 1 or not isinstance(kinds[-1], (Pointwise, Bias)):
            return False
        inside = {op.output for op in members}
        alone = all(
            value not in self.outputs and all(reader.output in inside for reader in self.readers[value])
            for value in inside - {last}
        )
        return alone and any(isinstance(kind, Reduction) for kind in kinds)


def _composed(row: str, members: Sequence[Operator]) -> Operator:
    """One operator for ``members``, which are in order."""
    b = Builder()
    inputs = [row]
    at = {row: b.input(0)}
    for op in members:
        for value in op.inputs:
            if value not in at:
                at[value] = b.input(len(inputs))
                inputs.append(value)
        if op.expression is None:
            at[op.output] = at[op.inputs[0]]
        else:
            (at[op.output],) = b.inline(op.expression, [at[value] for value in op.inputs])
    last = members[-1]
    return Operator(last.name, Norm(b.build(at[last.output])), tuple(inputs), last.outputs)
