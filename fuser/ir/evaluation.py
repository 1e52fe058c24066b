"""Evaluating operators by PyTorch: the one reference that kernels and programs are checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fuser.ir.graph import Constant, Operator, OperatorGraph, OperatorGroup

_CPU = torch.device("cpu")


class Evaluation:
    """The values of ``graph`` in memory as their specs lay it out, so that views see what is written to their base.

    ``precision`` is the dtype of all floating-point values; None gives each its own. Set inputs and constants by name,
    :meth:`run` operators, and read any value by its name.
    """

    def __init__(self, graph: OperatorGraph, precision: torch.dtype | None = None, device: torch.device = _CPU) -> None:
        self.graph = graph
        self.precision = precision
        self.device = device
        self._storages: dict[str, Tensor] = {}

    def __getitem__(self, value: str) -> Tensor:
        spec, base = self.graph.values[value], self.graph.base(value)
        if base not in self._storages:
            whole = self.graph.values[base]
            dtype = self.precision if self.precision and whole.dtype.is_floating_point else whole.dtype
            self._storages[base] = torch.zeros(max(whole.extent, 1), dtype=dtype, device=self.device)
        return self._storages[base].as_strided(spec.shape, spec.strides, spec.offset)

    def __setitem__(self, value: str, tensor: Tensor) -> None:
        with torch.no_grad():
            self[value].copy_(tensor)

    def __contains__(self, value: str) -> bool:
        """Whether there is memory for a value or its base."""
        return self.graph.base(value) in self._storages

    def forget(self, value: str) -> None:
        """Give back the memory of a value and of all that are views of it."""
        self._storages.pop(self.graph.base(value), None)

    def run(self, operators: Iterable[Operator]) -> None:
        """Compute ``operators``, in this order, from values that are there."""
        with torch.no_grad():
            for op in operators:
                results = op.semantics.evaluate(*(self[value] for value in op.inputs))
                for value, result in zip(op.outputs, results, strict=True):
                    self[value] = result


def evaluate(
    part: OperatorGraph | OperatorGroup, values: Mapping[str, Tensor], precision: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The outputs of a group or of a whole graph by name, and what its states are then that it writes, computed by
    PyTorch on the device of ``values`` in ``precision`` (None: every value in its own dtype).

    ``values`` holds what the group reads, or the bases of these views; a state that is not among them is all zeros.
    """
    group = part if isinstance(part, OperatorGroup) else part.group(part.compute)
    found = Evaluation(group.graph, precision, next((t.device for t in values.values()), _CPU))
    for name, tensor in values.items():
        found[name] = tensor
    found.run(group.operators)
    return {value: found[value].clone() for value in (*part.outputs, *group.mutates)}


Look = Callable[[Operator, Evaluation], None]


def run_graph(
    graph: OperatorGraph,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    before: Look | None = None,
    after: Look | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of a graph by PyTorch; ``before`` and ``after`` see every operator with the values at that time."""
    evaluation = Evaluation(graph, device=next((t.device for t in values.values()), torch.device("cpu")))
    last: dict[str, int] = {}
    for position, op in enumerate(graph.operators):
        last.update((graph.base(value), position) for value in (*op.inputs, *op.outputs))
    lasting = {graph.base(value) for value in (*graph.outputs, *graph.states)}
    for value, tensor in values.items():
        evaluation[value] = tensor
    for position, op in enumerate(graph.operators):
        for value in op.inputs:
            if value in graph.constants and value not in evaluation:
                evaluation[value] = value_of(value, graph.constants, parameters)
        if before is not None:
            before(op, evaluation)
        evaluation.run([op])
        if after is not None:
            after(op, evaluation)
        for value in (*op.inputs, *op.outputs):
            if last[graph.base(value)] == position and graph.base(value) not in lasting:
                evaluation.forget(value)
    for value in graph.outputs:
        if value in graph.constants and value not in evaluation:
            evaluation[value] = value_of(value, graph.constants, parameters)
    return tuple(evaluation[value].clone() for value in graph.outputs)


def value_of(
    name: str,
    constants: Mapping[str, Constant],
    parameters: Mapping[str, Tensor],
    known: dict[str, Tensor] | None = None,
) -> Tensor:
    """The tensor of a constant: a parameter, or what is derived from some. Derived ones that are ``known`` are taken,
    and others added, so that what several have in common is computed once."""
    constant = constants[name]
    if constant.call is None:
        return parameters[name].detach()
    known = {} if known is None else known
    if name not in known:
        sources = [value_of(source, constants, parameters, known) for source in constant.sources]
        known[name] = constant.evaluate(sources)
    return known[name]
