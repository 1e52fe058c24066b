"""From an operator graph and its schemes to a program plan: lower, order, place in memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch

from fuser.codegen.choice import PYTORCH, GroupChoice
from fuser.codegen.memory import Lifetime, plan_arena
from fuser.codegen.render import render
from fuser.codegen.template import ProgramTemplate
from fuser.ir.errors import FuserError
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Append, Extern, Semantics, View, WriteRows
from fuser.ir.size import maximum
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall, KernelSpec, LibraryCall, TensorRef
from fuser.runtime.build import Source
from fuser.runtime.program import RUNNER, Memory, NativeStep, ProgramPlan, Slot, TorchStep


@dataclass(frozen=True)
class KernelRecord:
    """One kind of kernel of a program: its name, family, the operators of its first use, and how often it is called."""

    name: str
    family: str
    operators: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class Assembly:
    """A plan and everything it was made from: the sources to build and what to report.

    ``specs`` are the kernels that ``sources`` define beside the step runner. ``labels`` names every step for profiles.
    """

    plan: ProgramPlan
    specs: tuple[KernelSpec, ...]
    sources: tuple[Source, ...]
    kernels: tuple[KernelRecord, ...]
    unfused: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    choices: tuple[GroupChoice, ...]

    @functools.cached_property
    def template(self) -> ProgramTemplate:
        """The plan for any values of the graph's named sizes."""
        return ProgramTemplate(self.plan)


@dataclass(frozen=True)
class _Unit:
    """A step before it has memory: a launch, or an operator that PyTorch runs."""

    operators: tuple[Operator, ...]
    call: KernelCall | LibraryCall | None
    family: str

    @property
    def reads(self) -> tuple[str, ...]:
        if isinstance(self.call, KernelCall):
            return tuple(t for t in self.call.tensors if isinstance(t, str) and t not in self.call.outputs)
        if isinstance(self.call, LibraryCall):
            return self.call.inputs
        return self.operators[0].inputs

    @property
    def writes(self) -> tuple[str, ...]:
        return self.call.outputs if self.call is not None else self.operators[0].outputs


def assemble(graph: OperatorGraph, choices: Sequence[GroupChoice], target: Target, threads: int) -> Assembly:
    """Lay the chosen groups and the remaining operators out as steps over one arena.

    ``choices`` hold, for every group of every region, its kernel (None: PyTorch runs it).
    Where the graph has named sizes, numbers of the plan are formulas, and the result's ``template`` binds them. Raises
    FuserError when the groups cannot be ordered.
    """
    units = _ordered(graph, [*_group_units(choices, target, threads), *_extern_units(graph, choices)])
    layout = _Layout(graph, units)
    steps: list[NativeStep | TorchStep] = []
    labels: list[str] = []
    specs: dict[str, KernelSpec] = {}
    uses: dict[str, list[_Unit]] = {}
    unfused: list[tuple[str, str]] = []
    for unit in units:
        labels.append("+".join(op.name for op in unit.operators))
        if isinstance(unit.call, KernelCall):
            symbol = unit.call.spec.symbol
            specs[symbol] = unit.call.spec
            uses.setdefault(symbol, []).append(unit)
            steps.append(NativeStep(symbol, tuple(layout.slot(t) for t in unit.call.tensors), unit.call.extents))
        elif isinstance(unit.call, LibraryCall):
            uses.setdefault(unit.call.name, []).append(unit)
            inputs = tuple(layout.slot(v) for v in unit.call.inputs)
            steps.append(TorchStep(unit.call.run, inputs, (), out=layout.slot(unit.call.outputs[0])))
        else:
            steps.append(_torch_step(graph, unit.operators[0], layout))
            unfused.append((unit.operators[0].name, _reason(unit.operators[0])))
    sources = [*(render(spec) for spec in specs.values()), runner_source(target)]
    records = tuple(
        KernelRecord(name, units_[0].family, _with_views(graph, units_[0]), len(units_))
        for name, units_ in uses.items()
    )
    plan = ProgramPlan(
        steps=tuple(steps),
        inputs=tuple(_contiguous_slot(Memory.INPUT, i, graph.values[v]) for i, v in enumerate(graph.inputs)),
        outputs=layout.outputs,
        returns=tuple(layout.slot(v) for v in graph.outputs),
        aliases=dict(graph.aliases),
        appended=layout.appended,
        updated=layout.updated,
        states=layout.states,
        constants=layout.constants,
        result_count=layout.result_count,
        arena_bytes=layout.arena_bytes
        + maximum([0, *(u.call.workspace_bytes for u in units if isinstance(u.call, KernelCall))]),
        workspace_offset=layout.arena_bytes,
        threads=threads,
    )
    return Assembly(plan, tuple(specs.values()), tuple(sources), records, tuple(unfused), tuple(labels), tuple(choices))


_RUNNERS = {"cpu": "cpu/run_steps.cpp.j2", "cuda": "cuda/run_steps.cu.j2"}


def runner_source(target: Target) -> Source:
    """The step runner."""
    spec = KernelSpec("runtime", _RUNNERS[target.kind], None)
    source = render(spec)
    return Source(RUNNER, source.text.replace(spec.symbol, RUNNER), source.suffix)


def _group_units(choices: Iterable[GroupChoice], target: Target, threads: int) -> Iterable[_Unit]:
    for choice in choices:
        yield _Unit(choice.group.operators, choice.call(target, threads), choice.family)


def _extern_units(graph: OperatorGraph, choices: Sequence[GroupChoice]) -> Iterable[_Unit]:
    grouped = {op.name for choice in choices for op in choice.group.operators}
    return (_Unit((op,), None, PYTORCH) for op in graph.compute if op.name not in grouped)


def _ordered(graph: OperatorGraph, units: Sequence[_Unit]) -> list[_Unit]:
    owner = {op.name: i for i, unit in enumerate(units) for op in unit.operators}
    order = nx.DiGraph()
    order.add_nodes_from(range(len(units)))
    for a, b in graph.digraph.edges:
        if owner[a] != owner[b]:
            order.add_edge(owner[a], owner[b])
    # Operators that draw random numbers draw them in the order of the model.
    order.add_edges_from(itertools.pairwise(i for i, unit in enumerate(units) if unit.operators[0].semantics.is_random))
    first = [min(graph.position[op.name] for op in unit.operators) for unit in units]
    try:
        return [units[i] for i in nx.lexicographical_topological_sort(order, key=lambda i: first[i])]
    except nx.NetworkXUnfeasible as error:
        raise FuserError("the groups of the schemes wait for each other; use canonical schemes") from error


class _Layout:
    """Where every value lives."""

    def __init__(self, graph: OperatorGraph, units: Sequence[_Unit]) -> None:
        self.graph = graph
        self._constant_index: dict[TensorRef, int] = {}
        self._output_index: dict[str, int] = {}
        self._result_index: dict[str, int] = {}
        forever = len(units)
        last: dict[str, int] = {}
        first: dict[str, int] = {}
        torch_made: set[str] = set()
        for value in graph.outputs:
            last[graph.base(value)] = forever
        for i in range(len(units) - 1, -1, -1):
            unit = units[i]
            reads = [graph.base(v) for v in unit.reads]
            if unit.call is None:
                torch_made.update(unit.writes)
                # What PyTorch returns may be a view of what it was given.
                until = max([i, *(last.get(v, i) for v in unit.writes)])
            else:
                until = i
            for value in unit.writes:
                first[value] = i
                last.setdefault(value, i)
            for value in reads:
                last[value] = max(last.get(value, i), until)
        arena: list[Lifetime] = []
        for i, unit in enumerate(units):
            for value in unit.writes:
                spec = graph.values[value]
                if value in torch_made:
                    self._result_index[value] = len(self._result_index)
                elif last[value] == forever:
                    self._output_index[value] = len(self._output_index)
                else:
                    arena.append(Lifetime(value, max(spec.extent, 1) * spec.dtype.itemsize, i, last[value]))
        self._offsets, self.arena_bytes = plan_arena(arena)
        self._input_index = {value: i for i, value in enumerate(graph.inputs)}
        self._state_index = {value: i for i, value in enumerate(graph.states)}

    @property
    def outputs(self) -> tuple[Slot, ...]:
        values = self.graph.values
        return tuple(_slot(Memory.OUTPUT, i, 0, values[v]) for v, i in self._output_index.items())

    @property
    def appended(self) -> dict[int, int]:
        """The outputs that may lie in the memory of inputs, by position."""
        grown = [op for op in self.graph.operators if isinstance(op.semantics, (Append, WriteRows))]
        return {
            self._output_index[op.output]: self._input_index[op.inputs[0]]
            for op in grown
            if op.output in self._output_index and op.inputs[0] in self._input_index
        }

    @property
    def updated(self) -> dict[int, int]:
        """The inputs whose contents are results, by position of these."""
        first = len(self.graph.outputs) - len(self.graph.updated)
        return {first + i: self._input_index[value] for i, value in enumerate(self.graph.updated)}

    @property
    def states(self) -> dict[str, Slot]:
        return {v: _slot(Memory.STATE, i, 0, self.graph.values[v]) for v, i in self._state_index.items()}

    @property
    def constants(self) -> tuple[TensorRef, ...]:
        return tuple(self._constant_index)

    @property
    def result_count(self) -> int:
        return len(self._result_index)

    def slot(self, ref: TensorRef) -> Slot:
        """The slot of a value or packed constant."""
        if not isinstance(ref, str):
            return Slot(Memory.CONSTANT, self._constant(ref), 0, (0,), (1,), torch.uint8)
        spec = self.graph.values[ref]
        base = self.graph.base(ref)
        offset = spec.offset * spec.dtype.itemsize
        if base in self.graph.constants:
            return _slot(Memory.CONSTANT, self._constant(base), offset, spec)
        if base in self._input_index:
            return _slot(Memory.INPUT, self._input_index[base], offset, spec)
        if base in self._state_index:
            return _slot(Memory.STATE, self._state_index[base], offset, spec)
        if base in self._output_index:
            return _slot(Memory.OUTPUT, self._output_index[base], offset, spec)
        if base in self._result_index:
            return _slot(Memory.RESULT, self._result_index[base], offset, spec)
        return _slot(Memory.ARENA, 0, self._offsets[base] + offset, spec)

    def _constant(self, ref: TensorRef) -> int:
        return self._constant_index.setdefault(ref, len(self._constant_index))


def _slot(memory: Memory, index: int, offset: int, spec: TensorSpec) -> Slot:
    return Slot(memory, index, offset, spec.shape, spec.strides, spec.dtype)


def _contiguous_slot(memory: Memory, index: int, spec: TensorSpec) -> Slot:
    return _slot(memory, index, 0, TensorSpec.contiguous(spec.shape, spec.dtype))


def _torch_step(graph: OperatorGraph, op: Operator, layout: _Layout) -> TorchStep:
    inputs = tuple(layout.slot(v) for v in op.inputs)
    results = tuple(layout.slot(v) for v in op.outputs)
    if isinstance(op.semantics, Extern):
        return TorchStep(op.semantics.call, inputs, results)
    return TorchStep(Unfused(op.semantics, tuple(graph.values[v] for v in op.outputs)), inputs, results)


@dataclass(frozen=True)
class Unfused:
    """A fusible operator as a PyTorch function of its inputs, with results as the graph has them."""

    semantics: Semantics
    outputs: tuple[TensorSpec, ...]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = zip(self.semantics.evaluate(*inputs), self.outputs, strict=True)
        return tuple(result.to(spec.dtype).broadcast_to(spec.shape) for result, spec in results)

    def __str__(self) -> str:
        return self.semantics.kind


def _reason(op: Operator) -> str:
    if isinstance(op.semantics, View):
        return "a view that must be copied"
    return op.reason or f"no kernel family takes this {op.kind} as it stands"


def _with_views(graph: OperatorGraph, unit: _Unit) -> tuple[str, ...]:
    """Names of a kernel's operators, with the split and merge of heads that it reads and writes through."""
    names = {op.name for op in unit.operators}
    read = {v for op in unit.operators for v in op.inputs}
    for op in graph.operators:
        if isinstance(op.semantics, View) and graph.is_alias(op):
            if op.semantics.part_of_reader and op.output in read:
                names.add(op.name)
            if op.semantics.part_of_writer and graph.source(op.output) in unit.operators:
                names.add(op.name)
    return tuple(sorted(names, key=graph.position.__getitem__))
