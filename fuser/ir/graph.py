"""The operator graph: what a captured model computes, at the granularity at which operators share kernels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeGuard

import networkx as nx
import torch
from torch import Tensor
from typing_extensions import TypeVar

from fuser.ir.expression import Expression
from fuser.ir.operators import Extern, Semantics, TorchCall, View, canonical, laid_out
from fuser.ir.quantization import Fixed
from fuser.ir.size import Size


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and memory layout of a value.

    ``strides`` are in elements. A value that views another's storage names it in ``base`` and starts ``offset``
    elements into it; ``base`` is never itself a view.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    base: str | None = None
    offset: int = 0

    @classmethod
    def contiguous(cls, shape: Iterable[int], dtype: torch.dtype) -> TensorSpec:
        shape = tuple(s if isinstance(s, Size) else int(s) for s in shape)
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size if size != 0 else 1
        return cls(shape, dtype, tuple(reversed(strides)))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return self.numel * self.dtype.itemsize

    @property
    def layout(self) -> TensorSpec:
        """Shape, dtype and strides alone, without the place in the storage of another."""
        return TensorSpec(self.shape, self.dtype, self.strides)

    @property
    def extent(self) -> int:
        """Elements from the first to one past the last in memory; 0 for an empty tensor."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        return self.has_strides(TensorSpec.contiguous(self.shape, self.dtype).strides)

    def has_strides(self, strides: Sequence[int]) -> bool:
        """Whether these strides address the same elements; the stride of a dimension of size one does not matter."""
        return all(
            size == 1 or mine == other for size, mine, other in zip(self.shape, self.strides, strides, strict=True)
        )


S = TypeVar("S", bound=Semantics, default=Semantics, covariant=True)


@dataclass(frozen=True)
class Operator(Generic[S]):
    """One operator: what it means, and the names of the values that it reads and makes."""

    name: str
    semantics: S
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        """The first value that it makes, or, if it makes none, that it writes."""
        return self.outputs[0] if self.outputs else self.mutates[0]

    @property
    def mutates(self) -> tuple[str, ...]:
        """Those of its inputs that it writes in place."""
        return tuple(self.inputs[i] for i in self.semantics.writes)

    @property
    def kind(self) -> str:
        """The name of its kind, to print."""
        return self.semantics.kind

    @property
    def expression(self) -> Expression | None:
        """What it computes row by row, where a row expression says it."""
        return self.semantics.expression

    @property
    def reason(self) -> str:
        """Why PyTorch runs it, for the report; empty for one that kernels may run."""
        return self.semantics.reason if isinstance(self.semantics, Extern) else ""


K = TypeVar("K", bound=Semantics)


def is_kind(op: Operator, kind: type[K]) -> TypeGuard[Operator[K]]:
    """Whether ``op`` is of a kind, or of a class of kinds."""
    return isinstance(op.semantics, kind)


@dataclass(frozen=True)
class Constant:
    """A value known when the program is built: a parameter or buffer of the model, or a function of some.

    A leaf has ``call`` None and its tensor is looked up under its own name; a derived constant applies ``call`` to the
    constants ``sources``.
    """

    name: str
    sources: tuple[str, ...] = ()
    call: TorchCall | None = None

    def evaluate(self, sources: Sequence[Tensor]) -> Tensor:
        """The tensor of a derived constant, contiguous whatever layout PyTorch would give it, unless it is laid out."""
        if self.call is None:
            raise ValueError(f"{self.name} is a parameter, not derived")
        with torch.no_grad():
            made = self.call(*sources)[0].detach()
        return made if self.call.target is laid_out else made.contiguous()


ViewCalls = tuple[tuple[TorchCall, int], ...]


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in topological order, the specs of all values, and which values enter, leave and are constant.

    Operators that touch the same state, one of them writing it, do so in the order of ``operators``.
    """

    operators: tuple[Operator, ...]
    values: Mapping[str, TensorSpec]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    aliases: Mapping[int, ViewCalls] = field(default_factory=dict)
    """Outputs by position that the model makes of an input or parameter by views alone: ``outputs`` names that, and
    these calls, each with the number of its result, make the output of the very tensor that was given."""
    inspected: frozenset[str] = frozenset()
    """Parameters whose values, not only shapes, made the graph what it is: if one changes, another graph is needed."""
    assumptions: tuple[Any, ...] = ()
    """What the graph was decided by and may be otherwise for other sizes: :class:`~fuser.ir.binding.Late` values that
    are true, once bound, for the sizes that the graph is right for."""
    states: tuple[str, ...] = ()
    """Values that live across calls, all zeros before the first: the only ones that operators may write in place. A
    state among ``outputs`` is returned as it is, not copied."""
    updated: tuple[str, ...] = ()
    """Inputs that a call leaves with other contents: these are the last of ``outputs``."""

    @functools.cached_property
    def producer(self) -> Mapping[str, Operator]:
        """The operator that makes each value; inputs and constants have none."""
        return {value: op for op in self.operators for value in op.outputs}

    @functools.cached_property
    def consumers(self) -> Mapping[str, tuple[Operator, ...]]:
        """The operators that read each value directly."""
        readers: dict[str, list[Operator]] = {value: [] for value in self.values}
        for op in self.operators:
            for value in dict.fromkeys(op.inputs):
                readers[value].append(op)
        return {value: tuple(ops) for value, ops in readers.items()}

    @functools.cached_property
    def position(self) -> Mapping[str, int]:
        """Index of every operator in the topological order, by name."""
        return {op.name: i for i, op in enumerate(self.operators)}

    def without_unread(self) -> OperatorGraph:
        """The graph without what neither an output nor a state needs."""
        operators, used = read(self.operators, self.outputs)
        stack = [name for name in used if name in self.constants]
        while stack:
            for source in self.constants[stack.pop()].sources:
                if source not in used:
                    used.add(source)
                    stack.append(source)
        bases = {spec.base for name, spec in self.values.items() if name in used and spec.base}
        keep = used | bases | set(self.inputs)
        return dataclasses.replace(
            self,
            operators=tuple(operators),
            values={name: spec for name, spec in self.values.items() if name in keep},
            constants={name: constant for name, constant in self.constants.items() if name in keep},
            states=tuple(name for name in self.states if name in keep),
        )

    def base(self, value: str) -> str:
        """The value whose storage ``value`` lives in."""
        return self.values[value].base or value

    def is_alias(self, op: Operator) -> bool:
        """Whether a view operator costs nothing because its output lives in its input's storage."""
        return isinstance(op.semantics, View) and self.values[op.output].base is not None

    def provenance(self, constant: str) -> str:
        """How a constant is derived, and from constants of which shapes and dtypes, whatever their names: kernels may
        ask for the sources in its place."""
        found = self.constants[constant]
        if found.call is None or isinstance(found.call.target, Fixed):
            return "constant"
        sources = (f"{self.provenance(s)}:{_layout(self.values[s])}" for s in found.sources)
        return f"{canonical(found.call)}({','.join(sources)})"

    def with_sources(self, constants: Iterable[str]) -> tuple[str, ...]:
        """These constants and all that they are derived from, each before its sources, as often as it is used."""
        found: list[str] = []
        for name in constants:
            found += [name, *self.with_sources(self.constants[name].sources)]
        return tuple(found)

    def description(self, op: Operator) -> str:
        """What an operator does to its values, in a few words; empty where the name of its kind says it."""
        return op.semantics.describe([self.values[v].shape for v in op.inputs], self.values[op.output].shape)

    def flops(self, op: Operator) -> float:
        """fp32 operations of one operator."""
        return op.semantics.flops([self.values[v].shape for v in op.inputs], self.values[op.output].shape)

    def source(self, value: str) -> Operator | None:
        """The operator that computes the contents of ``value``, looking through free views."""
        return self.producer.get(self.base(value))

    def readers(self, value: str) -> tuple[Operator, ...]:
        """The operators that compute with ``value``, looking through free views."""
        found: dict[str, Operator] = {}
        for op in self.consumers[value]:
            if self.is_alias(op):
                found.update((r.name, r) for o in op.outputs for r in self.readers(o))
            else:
                found[op.name] = op
        return tuple(found.values())

    def escapes(self, value: str) -> bool:
        """Whether ``value``, or a view of it, is an output of the model."""
        if value in self.outputs:
            return True
        return any(self.escapes(o) for op in self.consumers[value] if self.is_alias(op) for o in op.outputs)

    def written(self, op: Operator) -> frozenset[str]:
        """The states that an operator writes. Raises ValueError where it writes anything else."""
        found = frozenset(self.base(value) for value in op.mutates)
        if wrong := sorted(found - set(self.states)):
            raise ValueError(f"{op.name} writes {', '.join(wrong)} in place, which lives for one call only")
        return found

    @functools.cached_property
    def digraph(self) -> nx.DiGraph:
        """Operators as nodes (by name); an edge wherever one reads what another computed, or touches a state that
        another touches before it, if one of them writes it; free views contracted."""
        graph = nx.DiGraph()
        writer: dict[str, str] = {}
        readers: dict[str, list[str]] = {}
        for op in self.operators:
            if self.is_alias(op):
                continue
            graph.add_node(op.name, operator=op)
            for value in op.inputs:
                source = self.source(value)
                if source is not None:
                    graph.add_edge(source.name, op.name)
            written = self.written(op)
            for state in dict.fromkeys(v for v in map(self.base, op.inputs) if v in self.states):
                if state in writer:
                    graph.add_edge(writer[state], op.name)
                if state in written:
                    graph.add_edges_from((reader, op.name) for reader in readers.pop(state, ()))
                    writer[state] = op.name
                else:
                    readers.setdefault(state, []).append(op.name)
        return graph

    @functools.cached_property
    def compute(self) -> tuple[Operator, ...]:
        """Operators that do work: all but free views."""
        return tuple(op for op in self.operators if not self.is_alias(op))

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """Connected fusible operators between two externs, cut before every GEMM that starts from finished rows.

        Such a cut has only residual sums and their norms alive, so no kernel could keep anything on chip across it,
        and the blocks of an encoder become equal regions.
        """
        return tuple(_regions(self))

    def group(self, operators: Iterable[Operator]) -> OperatorGroup:
        """The group of these operators, in topological order."""
        return OperatorGroup(self, tuple(sorted(operators, key=lambda op: self.position[op.name])))

    def __str__(self) -> str:
        lines = [f"inputs  {', '.join(f'{v}{_shape(self.values[v])}' for v in self.inputs)}"]
        if self.states:
            lines.append(f"states  {', '.join(f'{v}{_shape(self.values[v])}' for v in self.states)}")
        for op in self.operators:
            made = ", ".join([*(f"{v}{_shape(self.values[v])}" for v in op.outputs), *(f"{v}!" for v in op.mutates)])
            detail = f" [{text}]" if (text := str(op.semantics)) else ""
            lines.append(f"{op.kind:<12}{made} = {op.name}({', '.join(op.inputs)}){detail}")
        return "\n".join([*lines, f"outputs {', '.join(self.outputs)}"])


def read(operators: Sequence[Operator], outputs: Sequence[str]) -> tuple[list[Operator], set[str]]:
    """The operators that must run for these outputs, and the values that they or a caller touch."""
    used = set(outputs)
    kept: list[Operator] = []
    for op in reversed(operators):
        if op.semantics.is_random or op.mutates or any(o in used for o in op.outputs):
            kept.append(op)
            used.update(op.inputs)
    kept.reverse()
    return kept, used.union(*(op.outputs for op in kept))


def _shape(spec: TensorSpec) -> str:
    return f"[{'×'.join(map(str, spec.shape))}]"


@dataclass(frozen=True)
class OperatorGroup:
    """Operators that are to share one kernel."""

    graph: OperatorGraph
    operators: tuple[Operator, ...]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        return frozenset(op.name for op in self.operators)

    def __contains__(self, op: Operator | None) -> bool:
        return op is not None and op.name in self.names

    def of(self, kind: type[K]) -> tuple[Operator[K], ...]:
        """The operators of a kind, or of a class of kinds."""
        return tuple(op for op in self.operators if is_kind(op, kind))

    def produces(self, value: str) -> Operator | None:
        """The operator of this group that computes ``value`` (through free views), if any."""
        source = self.graph.source(value)
        return source if source in self else None

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Values read from outside, in order of first use."""
        found = dict.fromkeys(v for op in self.operators for v in op.inputs if self.produces(v) is None)
        return tuple(found)

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """Values computed here that something outside needs."""
        graph = self.graph
        return tuple(
            value
            for op in self.operators
            for value in op.outputs
            if graph.escapes(value) or any(reader not in self for reader in graph.readers(value))
        )

    @functools.cached_property
    def mutates(self) -> tuple[str, ...]:
        """The states that are written here, in order of first use."""
        return tuple(dict.fromkeys(self.graph.base(v) for op in self.operators for v in op.mutates))

    @functools.cached_property
    def is_convex(self) -> bool:
        """No path leaves the group and comes back."""
        return is_convex(self.graph.digraph, self.names)


def is_convex(digraph: nx.DiGraph, names: frozenset[str]) -> bool:
    """Whether no path between two of ``names`` runs through a node outside."""
    outside = {s for n in names for s in digraph.successors(n) if s not in names}
    reached = set(outside)
    while outside:
        outside = {s for n in outside for s in digraph.successors(n) if s not in reached}
        if outside & names:
            return False
        reached |= outside
    return not any(s in names for n in reached for s in digraph.successors(n))


@dataclass(frozen=True)
class Region:
    """A connected set of fusible operators, in topological order."""

    graph: OperatorGraph
    operators: tuple[Operator, ...]

    @functools.cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Pairs (producer, consumer) of positions in ``operators``, sorted: what the bits of a scheme stand for."""
        at = {op.name: i for i, op in enumerate(self.operators)}
        digraph = self.graph.digraph
        return tuple(sorted((at[a], at[b]) for a in at for b in digraph.successors(a) if b in at))

    @functools.cached_property
    def hash(self) -> str:
        """Merkle hash over kinds with all their attributes, shapes, dtypes, layouts, topology and how constants are
        derived, 16 hex digits; equal for layers that differ only in their weights."""
        graph = self.graph
        labels: dict[str, str] = {}
        own: list[str] = []
        group = graph.group(self.operators)
        for op in self.operators:
            parts = [op.semantics.signature]
            for value in op.inputs:
                spec = graph.values[value]
                source = group.produces(value)
                origin = labels[graph.base(value)] if source else _origin(graph, value)
                parts.append(f"{origin}:{_layout(spec)}")
            parts.extend(f"{_layout(graph.values[v])}:{v in group.outputs}" for v in op.outputs)
            parts.extend(f"writes {i}" for i in op.semantics.writes)
            digests = [
                hashlib.sha256("\0".join([*parts, str(i)]).encode()).hexdigest() for i in range(max(len(op.outputs), 1))
            ]
            own.append(digests[0])
            labels.update(zip(op.outputs, digests, strict=False))
        # Which value is which matters (a residual that is also the GEMM's input, the sides of q · kᵀ), so number them.
        used = [[graph.base(v) for v in op.inputs] + list(op.outputs) for op in self.operators]
        order = {v: i for i, v in enumerate(dict.fromkeys(v for values in used for v in values))}
        wiring = [str([order[v] for v in values]) for values in used]
        body = "\0".join(own + wiring)
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)


def _origin(graph: OperatorGraph, value: str) -> str:
    if graph.base(value) in graph.states:
        return "state"
    return graph.provenance(value) if value in graph.constants else "value"


def _layout(spec: TensorSpec) -> str:
    return f"{spec.shape}{spec.strides}{spec.offset}{spec.dtype}"


def _regions(graph: OperatorGraph) -> Iterator[Region]:
    order = graph.compute
    last_use = {graph.base(value): i for i, op in enumerate(order) for value in op.inputs}
    run: list[Operator] = []
    alive: dict[str, Semantics] = {}
    for i, op in enumerate(order):
        alive = {value: made_by for value, made_by in alive.items() if last_use.get(value, -1) >= i}
        fusible = op.semantics.fusible
        starts = op.semantics.is_linear and all(made_by.finishes_rows for made_by in alive.values())
        if run and (not fusible or starts):
            yield from _connected(graph, run)
            run = []
        if fusible:
            run.append(op)
            alive.update((value, op.semantics) for value in op.outputs)
    if run:
        yield from _connected(graph, run)


def _connected(graph: OperatorGraph, run: list[Operator]) -> Iterator[Region]:
    members = {op.name: op for op in run}
    parts = nx.weakly_connected_components(graph.digraph.subgraph(members))
    ordered = sorted(
        (sorted(part, key=graph.position.__getitem__) for part in parts), key=lambda p: graph.position[p[0]]
    )
    for part in ordered:
        yield Region(graph, tuple(members[name] for name in part))
