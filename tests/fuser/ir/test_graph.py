"""Region hashes: whatever a kernel could depend on is in them, and names are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.ir.expression import Op, binary, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, Region, TensorSpec
from fuser.ir.masks import Causal, SlidingWindow
from fuser.ir.operators import (
    PV,
    QK,
    Activation,
    AdditiveMask,
    Bias,
    BooleanMask,
    Gemm,
    Norm,
    PatternMask,
    Pointwise,
    Residual,
    Scale,
    Semantics,
    Softmax,
)

F32 = torch.float32


def block() -> OperatorGraph:
    """A product with bias, activation, a residual sum and its norm; then attention of the result with itself."""
    heads = TensorSpec((2, 4, 5, 8), F32, (160, 8, 32, 1), "y")
    operators = (
        Operator("gemm", Gemm(True), ("x", "w"), ("product",)),
        Operator("bias", Bias(), ("product", "b"), ("biased",)),
        Operator("gelu", Activation(unary(Op.GELU)), ("biased",), ("active",)),
        Operator("add", Residual(), ("active", "x"), ("total",)),
        Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("y",)),
        Operator("qk", QK(), ("q", "k"), ("scores",)),
        Operator("scale", Scale(0.125), ("scores",), ("scaled",)),
        Operator("mask", PatternMask(False, SlidingWindow(1, 1)), ("scaled",), ("masked",)),
        Operator("softmax", Softmax(True), ("masked",), ("p",)),
        Operator("pv", PV(), ("p", "k"), ("out",)),
    )
    rows, scores = TensorSpec.contiguous((2, 5, 32), F32), TensorSpec.contiguous((2, 4, 5, 5), F32)
    row = TensorSpec.contiguous((32,), F32)
    values = dict.fromkeys(("x", "product", "biased", "active", "total", "y"), rows)
    values |= dict.fromkeys(("b", "gamma", "beta"), row) | dict.fromkeys(("scores", "scaled", "masked", "p"), scores)
    values |= {"w": TensorSpec.contiguous((32, 32), F32), "q": heads, "k": dataclasses.replace(heads, base="total")}
    values["out"] = TensorSpec((2, 4, 5, 8), F32, (160, 8, 32, 1))
    constants = {name: Constant(name) for name in ("w", "b", "gamma", "beta")}
    return OperatorGraph(operators, values, ("x",), ("out",), constants)


def region_hash(graph: OperatorGraph) -> str:
    return Region(graph, graph.compute).hash


def with_operator(name: str, **changes: object) -> Callable[[OperatorGraph], OperatorGraph]:
    def change(graph: OperatorGraph) -> OperatorGraph:
        operators = [dataclasses.replace(op, **changes) if op.name == name else op for op in graph.operators]  # type: ignore[arg-type]
        return dataclasses.replace(graph, operators=tuple(operators))

    return change


def with_spec(name: str, **changes: object) -> Callable[[OperatorGraph], OperatorGraph]:
    return lambda graph: dataclasses.replace(
        graph,
        values={**graph.values, name: dataclasses.replace(graph.values[name], **changes)},  # type: ignore[arg-type]
    )


CHANGES: Mapping[str, Callable[[OperatorGraph], OperatorGraph]] = {
    "the way that the weight lies": with_operator("gemm", semantics=Gemm(False)),
    "the function": with_operator("gelu", semantics=Activation(unary(Op.GELU_TANH))),
    "the kind alone": with_operator("gelu", semantics=Pointwise(unary(Op.GELU))),
    "the last bit of a number": with_operator("norm", semantics=Norm(layer_norm(math.nextafter(1e-5, 1)))),
    "the last bit of the scale": with_operator("scale", semantics=Scale(math.nextafter(0.125, 1))),
    "the pattern": with_operator("mask", semantics=PatternMask(False, SlidingWindow(1, 2))),
    "causality": with_operator("mask", semantics=PatternMask(True, SlidingWindow(1, 1))),
    "a masked row": with_operator("softmax", semantics=Softmax(False)),
    "the operands of a residual": with_operator("add", inputs=("x", "active")),
    "a residual of the product's result": with_operator("add", inputs=("active", "biased")),
    "one constant twice": with_operator("norm", inputs=("total", "gamma", "gamma")),
    "values that are not keys": with_operator("pv", inputs=("p", "q")),
    "the dtype of an input": with_spec("x", dtype=torch.bfloat16),
    "the dtype of a constant": with_spec("w", dtype=torch.bfloat16),
    "the dtype of a result": with_spec("active", dtype=torch.bfloat16),
    "the shape of a constant": with_spec("b", shape=(1,)),
    "the strides of an input": with_spec("x", strides=(32, 64, 1)),
    "the strides of a result": with_spec("out", strides=(160, 40, 8, 1)),
    "the strides of a view": with_spec("q", strides=(160, 40, 8, 1)),
    "the offset of a view": with_spec("k", offset=8),
    "a result that the model returns": lambda graph: dataclasses.replace(graph, outputs=("total", "out")),
    "a weight that is an input": lambda graph: dataclasses.replace(
        graph, inputs=("x", "w"), constants={name: c for name, c in graph.constants.items() if name != "w"}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_changes_the_hash(what: str) -> None:
    assert region_hash(CHANGES[what](block())) != region_hash(block())


def test_all_changes_are_told_apart() -> None:
    assert len({region_hash(change(block())) for change in CHANGES.values()}) == len(CHANGES)


def renamed(graph: OperatorGraph, name: Callable[[str], str]) -> OperatorGraph:
    def names(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(name, values))

    return OperatorGraph(
        tuple(Operator(name(op.name), op.semantics, names(op.inputs), names(op.outputs)) for op in graph.operators),
        {name(v): dataclasses.replace(s, base=name(s.base) if s.base else None) for v, s in graph.values.items()},
        names(graph.inputs),
        names(graph.outputs),
        {name(c): Constant(name(c)) for c in graph.constants},
    )


def test_names_are_not_in_the_hash() -> None:
    assert region_hash(renamed(block(), lambda name: f"layer.7.{name[::-1]}")) == region_hash(block())


ELEMENTWISE: tuple[Semantics, ...] = (
    Bias(),
    Residual(binary(Op.MAXIMUM)),
    AdditiveMask(),
    BooleanMask(),
    Pointwise(binary(Op.MUL)),
)


@st.composite
def graphs(draw: st.DrawFn) -> OperatorGraph:
    """Operators of two operands each, wired at random."""
    count = draw(st.integers(1, 6))
    values = ["x", "c"]
    operators = []
    for i in range(count):
        inputs = tuple(draw(st.sampled_from(values)) for _ in range(2))
        operators.append(Operator(f"op{i}", draw(st.sampled_from(ELEMENTWISE)), inputs, (f"v{i}",)))
        values.append(f"v{i}")
    specs = dict.fromkeys(values, TensorSpec.contiguous((4, 8), F32))
    outputs = draw(st.lists(st.sampled_from(values[2:]), min_size=1, unique=True))
    return OperatorGraph(tuple(operators), specs, ("x",), tuple(outputs), {"c": Constant("c")})


def described(graph: OperatorGraph) -> object:
    """All that a graph of :func:`graphs` says; a result that nothing reads counts as an output or not."""
    return [(op.semantics.signature, op.inputs, op.output in graph.outputs) for op in graph.operators]


@settings(max_examples=150, deadline=None)
@given(graphs(), graphs(), st.permutations(range(8)))
def test_graphs_share_a_hash_exactly_when_they_are_the_same(
    one: OperatorGraph, other: OperatorGraph, order: Sequence[int]
) -> None:
    assert region_hash(renamed(one, lambda name: f"{order[len(name) % 8]}{name}")) == region_hash(one)
    assert (region_hash(one) == region_hash(other)) == (described(one) == described(other))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_any_other_wire_changes_the_hash(graph: OperatorGraph, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(graph.operators) - 1))
    op, side = graph.operators[at], data.draw(st.integers(0, 1))
    there = ["x", "c", *(f"v{i}" for i in range(at))]
    other = data.draw(st.sampled_from([value for value in there if value != op.inputs[side]]))
    inputs = (other, op.inputs[1]) if side == 0 else (op.inputs[0], other)
    assert region_hash(with_operator(op.name, inputs=inputs)(graph)) != region_hash(graph)


def test_masks_enter_by_what_they_allow() -> None:
    change = with_operator("mask", semantics=PatternMask(False, Causal()))
    assert region_hash(change(block())) != region_hash(block())
    assert region_hash(change(block())) == region_hash(change(block()))
