"""Kinds of operators that write what lives across calls, and random graphs of them; none is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Ref, Semantics, Shape, TorchCall, View

SPEC = TensorSpec.contiguous((4, 3), torch.float32)


@dataclass(frozen=True)
class _Toy(Semantics):
    kind = "toy"

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 1.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@dataclass(frozen=True)
class Add(_Toy):
    """The sum of its inputs."""

    kind = "add"

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (sum(inputs[1:], inputs[0] * 1.0),)


@dataclass(frozen=True)
class Same(_Toy):
    """Its input, as PyTorch returns it: the same memory."""

    kind = "same"

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs[0].view(inputs[0].shape),)


@dataclass(frozen=True)
class Accumulate(_Toy):
    """Halves the first input in place and adds the second; makes nothing."""

    kind = "accumulate"
    writes = (0,)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs[0].mul_(0.5).add_(inputs[1])
        return ()


@dataclass(frozen=True)
class Exchange(Accumulate):
    """The sum of its inputs, of which the first then becomes the second."""

    kind = "exchange"

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        total = inputs[0] + inputs[1]
        inputs[0].copy_(inputs[1])
        return (total,)


def rows(state: str, first: int, count: int) -> tuple[Operator, TensorSpec]:
    """The free view of some rows of a state, and its spec."""
    name = f"{state}.{first}"
    spec = TensorSpec((count, 3), torch.float32, (3, 1), state, first * 3)
    call = TorchCall(torch.as_strided, (Ref(0), spec.shape, spec.strides, spec.offset))
    return Operator(name, View(call), (state,), (name,)), spec


def graph_of(operators: Sequence[Operator], states: Sequence[str], **specs: TensorSpec) -> OperatorGraph:
    """A graph over the input ``x`` that returns all that its operators make."""
    made = [v for op in operators for v in op.outputs if v not in specs]
    values = {**dict.fromkeys(["x", *states, *made], SPEC), **specs}
    return OperatorGraph(tuple(operators), values, ("x",), tuple(made), {}, states=tuple(states))


@st.composite
def graphs(draw: st.DrawFn) -> OperatorGraph:
    """Operators over two states, the second seen by its halves too."""
    views = [rows("t", 0, 2), rows("t", 2, 2)]
    operators: list[Operator] = [op for op, _ in views]
    specs = {op.output: spec for op, spec in views}
    values = {(4, 3): ["x", "s", "t"], (2, 3): list(specs)}
    writable = {(4, 3): ["s", "t"], (2, 3): list(specs)}
    for i in range(draw(st.integers(1, 8))):
        shape = draw(st.sampled_from([(4, 3), (4, 3), (2, 3)]))
        semantics = draw(st.sampled_from([Add(), Same(), Accumulate(), Exchange()]))
        first = draw(st.sampled_from(writable[shape] if semantics.writes else values[shape]))
        # Memory that is copied from lies apart from what is written.
        free = [v for v in values[shape] if not semantics.writes or v.split(".")[0] != first.split(".")[0]]
        if not free:
            continue
        inputs = (first,) if isinstance(semantics, Same) else (first, draw(st.sampled_from(free)))
        made = () if type(semantics) is Accumulate else (f"v{i}",)
        operators.append(Operator(f"op{i}", semantics, inputs, made))
        if made:
            specs[f"v{i}"] = TensorSpec.contiguous(shape, torch.float32)
            values[shape].append(f"v{i}")
    made_here = tuple(v for op in operators[2:] for v in op.outputs)
    specs |= dict.fromkeys(("x", "s", "t"), SPEC)
    return OperatorGraph(tuple(operators), specs, ("x",), made_here, {}, states=("s", "t"))


def sequential(graph: OperatorGraph, x: Tensor, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a graph of such operators gives, and its states then, written without anything of the compiler."""
    there = {"x": x.clone(), **{name: tensor.clone() for name, tensor in states.items()}}
    results: dict[str, Tensor] = {}
    for op in graph.operators:
        if isinstance(op.semantics, View):
            first = int(op.output.split(".")[1])
            there[op.output] = there[op.inputs[0]][first : first + 2]
            continue
        for name, tensor in zip(op.outputs, op.semantics.evaluate(*(there[v] for v in op.inputs)), strict=True):
            there[name] = results[name] = tensor.clone()
    return {**results, **{name: there[name] for name in states}}
