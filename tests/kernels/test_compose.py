"""Composing operators: one expression over bound operands computes what the operators do one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, binary, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import (
    Activation,
    Bias,
    BooleanMask,
    Embedding,
    GatherRows,
    Norm,
    Pointwise,
    Residual,
    Semantics,
)
from fuser.kernels.base import Access
from fuser.kernels.compose import RowProgram, compose

SHAPE = (2, 3, 8)
F32 = torch.float32
OPERANDS: Mapping[str, TensorSpec] = {
    "x": TensorSpec.contiguous(SHAPE, F32),
    "apart": TensorSpec(SHAPE, F32, (60, 20, 1)),
    "row": TensorSpec.contiguous((8,), F32),
    "rows": TensorSpec.contiguous((3, 8), F32),
    "column": TensorSpec.contiguous((2, 3, 1), F32),
    "one": TensorSpec.contiguous((), F32),
}


def graph(operators: Sequence[Operator], outputs: Sequence[str], **more: TensorSpec) -> OperatorGraph:
    values = {**OPERANDS, **{op.output: OPERANDS["x"] for op in operators}, **more}
    return OperatorGraph(tuple(operators), values, (*OPERANDS,), tuple(outputs), {})


def computed(program: RowProgram, values: Mapping[str, Tensor], seeds: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """The program as a kernel runs it: operands read by stride and period."""
    row, column = torch.arange(program.rows)[:, None], torch.arange(program.columns)[None]
    gathers = iter(program.gathers)
    inputs = [seed.reshape(program.rows, program.columns) for seed in seeds]
    for bound in program.bounds:
        memory = values[bound.value]
        memory = memory.as_strided((memory.untyped_storage().nbytes() // memory.itemsize,), (1,))
        at = values[next(gathers)].reshape(-1, 1) if bound.operand.access is Access.GATHER else row % bound.period
        inputs.append(memory[at * bound.stride + (0 if bound.operand.access is Access.COLUMN else column)])
    results = program.expression.evaluate(*inputs)
    return {v: r.broadcast_to(program.rows, program.columns) for v, r in zip(program.outputs, results, strict=True)}


def operands() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, spec in OPERANDS.items():
        memory = torch.randn(max(spec.extent, 1), generator=g, dtype=torch.float64)
        found[name] = memory.as_strided(spec.shape, spec.strides)
    return found


@st.composite
def chains(draw: st.DrawFn) -> OperatorGraph:
    """Elementwise and row-wise operators, each reading anything that is there; some results leave the group."""
    operators: list[Operator] = []
    there = [*OPERANDS]
    for i in range(draw(st.integers(1, 6))):
        made: Semantics = draw(
            st.sampled_from([Bias(), Residual(binary(Op.MUL)), Activation(unary(Op.TANH)), Norm(layer_norm(0.1))])
        )
        assert made.expression is not None
        # The first operand has every row, so that the result has too.
        first = draw(st.sampled_from([v for v in there if v not in ("row", "rows", "column", "one")]))
        rest = [draw(st.sampled_from(there)) for _ in range(made.expression.inputs - 1)]
        operators.append(Operator(f"op{i}", made, (first, *rest), (f"v{i}",)))
        there.append(f"v{i}")
    read = {value for op in operators for value in op.inputs}
    outputs = [op.output for op in operators if op.output not in read or draw(st.booleans())]
    return graph(operators, outputs)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_a_composed_expression_computes_its_operators(of: OperatorGraph) -> None:
    group, values = of.group(of.operators), operands()
    program = compose(group, group.operators)
    assert program is not None
    assert set(program.outputs) == set(group.outputs) and (program.rows, program.columns) == (6, 8)
    exact = evaluate(group, values, torch.float64)
    for name, result in computed(program, values).items():
        torch.testing.assert_close(result, exact[name].reshape(6, 8), rtol=1e-12, atol=1e-12)


def test_seeds_come_first_and_may_be_seen_as_another_matrix_of_the_same_rows() -> None:
    flat = TensorSpec((6, 8), F32, (8, 1), "product", 0)
    operators = [Operator("bias", Bias(), ("flat", "row"), ("biased",))]
    of = graph(operators, ["biased"], product=OPERANDS["x"], flat=flat, biased=TensorSpec.contiguous((6, 8), F32))
    product, values = torch.randn(SHAPE, dtype=torch.float64), operands()
    program = compose(of.group(of.operators), of.operators, seeds=("product",))
    assert program is not None and program.seeds == 1 and [b.value for b in program.bounds] == ["row"]
    result = computed(program, values, [product])["biased"]
    torch.testing.assert_close(result, product.reshape(6, 8) + values["row"])
    turned = dataclasses.replace(flat, shape=(6, 8), strides=(1, 6))
    other = dataclasses.replace(of, values={**of.values, "flat": turned})
    assert compose(other.group(other.operators), other.operators, seeds=("product",)) is None


def test_rows_are_gathered_by_number() -> None:
    operators = [
        Operator("embed", Embedding(), ("table", "index"), ("v0",)),
        Operator("add", Residual(), ("v0", "rows"), ("v1",)),
    ]
    table, index = TensorSpec((5, 8), F32, (10, 1)), TensorSpec.contiguous((2, 3), torch.int64)
    of = graph(operators, ["v1"], table=table, index=index)
    of = dataclasses.replace(of, inputs=(*of.inputs, "table", "index"), constants={"table": Constant("table")})
    values = operands()
    values["table"] = torch.randn(50, dtype=torch.float64).as_strided((5, 8), (10, 1))
    values["index"] = torch.tensor([[4, 0, 0], [1, 3, 4]])
    program = compose(of.group(of.operators), of.operators)
    assert program is not None and program.gathers == ("index",)
    expected = values["table"][values["index"]] + values["rows"]
    torch.testing.assert_close(computed(program, values)["v1"], expected.reshape(6, 8))


TURNED, WIDE = TensorSpec(SHAPE, F32, (24, 1, 3)), TensorSpec.contiguous(SHAPE, torch.float64)


@pytest.mark.parametrize(
    ("made", "more"),
    [
        (BooleanMask(), {}),
        (Pointwise(unary(Op.EXP)), {"x": TURNED}),
        (Pointwise(unary(Op.EXP)), {"x": WIDE}),
        (Pointwise(unary(Op.EXP)), {"v0": WIDE}),
        (Pointwise(unary(Op.EXP)), {"v0": TURNED}),
    ],
    ids=["no expression", "columns apart", "another storage", "a result of another storage", "a result turned"],
)
def test_what_is_no_row_program_is_declined(made: Semantics, more: dict[str, TensorSpec]) -> None:
    of = graph([Operator("op", made, ("x", "x"), ("v0",))], ["v0"], **more)
    assert compose(of.group(of.operators), of.operators) is None


def test_operators_on_different_matrices_are_declined() -> None:
    operators = [
        Operator("a", Pointwise(unary(Op.EXP)), ("x",), ("v0",)),
        Operator("b", Pointwise(unary(Op.EXP)), ("rows",), ("v1",)),
    ]
    of = graph(operators, ["v0", "v1"], v1=OPERANDS["rows"])
    assert compose(of.group(of.operators), of.operators) is None


def test_rows_are_not_gathered_of_what_the_same_kernel_computes() -> None:
    numbers = TensorSpec.contiguous((2, 3), torch.int64)
    act = Operator("act", Activation(unary(Op.RELU)), ("x",), ("act",))
    view = TensorSpec((6, 8), F32, (8, 1), "act")
    gather = Operator("moved", GatherRows(), ("act_rows", "numbers"), ("moved",))
    made = graph((act, gather), ("moved",), act_rows=view, numbers=numbers)
    assert compose(made.group((act, gather)), (act, gather)) is None
    assert compose(made.group((gather,)), (gather,)) is not None
