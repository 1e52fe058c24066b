"""Row expressions: every instruction against its definition in float64, and building, sharing and inlining."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.ir import expression as ex
from fuser.ir.expression import CASTS, REDUCTIONS, Builder, Expression, Instruction, Op, binary, unary

# Both signs, zeros of both, halves that round to even, large and small numbers that fp16 and fp32 hold.
FINITE = (0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -3.0, 0.1, -0.7, 9.0, -20.0, 100.0, 2e-6, -6e4)
SPECIAL = (math.inf, -math.inf, math.nan)
X = torch.tensor([[*FINITE], [*reversed(FINITE)]], dtype=torch.float64)
POSITIVE = X.abs() + 2.0**-20


def _scalar(function: Callable[[float], float]) -> Callable[..., Tensor]:
    """The function of Python's ``math`` on every element."""
    return lambda x: torch.tensor([[function(v) for v in row] for row in x.tolist()], dtype=torch.float64)


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _gelu_tanh(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def _to_f16(v: float) -> float:
    return float(struct.unpack("e", struct.pack("e", v))[0])


def _to_bf16(v: float) -> float:
    """The upper half of the bits of fp32, rounded to nearest, ties to even."""
    (bits,) = struct.unpack("I", struct.pack("f", v))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return float(struct.unpack("f", struct.pack("I", bits))[0])


def _rows(function: Callable[[list[float]], float]) -> Callable[..., Tensor]:
    return lambda x: torch.tensor([[function(row)] for row in x.tolist()], dtype=torch.float64)


UNARY: dict[Op, tuple[Tensor, Callable[..., Tensor]]] = {
    Op.NEG: (X, _scalar(lambda v: -v)),
    Op.ABS: (X, _scalar(math.fabs)),
    Op.EXP: (X.clamp(max=100), _scalar(math.exp)),
    Op.LOG: (POSITIVE, _scalar(math.log)),
    Op.SQRT: (POSITIVE, _scalar(math.sqrt)),
    Op.RSQRT: (POSITIVE, _scalar(lambda v: 1 / math.sqrt(v))),
    Op.RECIPROCAL: (POSITIVE, _scalar(lambda v: 1 / v)),
    Op.TANH: (X, _scalar(math.tanh)),
    Op.ERF: (X, _scalar(math.erf)),
    Op.SIGMOID: (X, _scalar(_sigmoid)),
    Op.RELU: (X, _scalar(lambda v: max(v, 0.0))),
    Op.GELU: (X, _scalar(lambda v: 0.5 * v * math.erfc(-v / math.sqrt(2)))),
    Op.GELU_TANH: (X, _scalar(_gelu_tanh)),
    Op.SILU: (X, _scalar(lambda v: v * _sigmoid(v))),
    Op.ROUND: (X, _scalar(lambda v: math.copysign(round(v), v))),
    Op.TO_BF16: (X, _scalar(_to_bf16)),
    Op.TO_F16: (X, _scalar(_to_f16)),
    Op.ROW_SUM: (X, _rows(math.fsum)),
    Op.ROW_MEAN: (X, _rows(lambda row: math.fsum(row) / len(row))),
    Op.ROW_MAX: (X, _rows(max)),
}
BINARY: dict[Op, Callable[[float, float], float]] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.DIV: lambda a, b: a / b,
    Op.MAXIMUM: max,
    Op.MINIMUM: min,
    Op.LESS: lambda a, b: float(a < b),
}


def test_every_instruction_is_defined_here() -> None:
    assert {*UNARY, *BINARY, Op.WHERE, Op.INPUT, Op.CONSTANT} == set(Op)


@pytest.mark.parametrize("op", UNARY)
def test_an_instruction_of_one_operand_is_its_definition(op: Op) -> None:
    x, definition = UNARY[op]
    (got,) = unary(op).evaluate(x)
    # Tails of sigmoid-like functions lose digits to cancellation, of which an absolute tolerance remains.
    torch.testing.assert_close(got, definition(x), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("op", BINARY)
def test_an_instruction_of_two_operands_is_its_definition(op: Op) -> None:
    other = POSITIVE.flip(1)
    expected = [
        [BINARY[op](a, b) for a, b in zip(r, s, strict=True)] for r, s in zip(X.tolist(), other.tolist(), strict=True)
    ]
    (got,) = binary(op).evaluate(X, other)
    assert torch.equal(got, torch.tensor(expected, dtype=torch.float64))


def test_a_condition_chooses_between_numbers() -> None:
    b = Builder()
    x, other, condition = (b.input(i) for i in range(3))
    made = b.build(b.apply(Op.WHERE, condition, x, b.apply(Op.MUL, other, b.constant(2.0))))
    first, second = torch.tensor([[1.0, math.nan, -0.0, math.inf]]), torch.tensor([[math.nan, 3.0, 5.0, 7.0]])
    for holds in (torch.tensor([[True, False, True, False]]), torch.tensor([[0.5, 0.0, math.nan, -0.0]])):
        (got,) = made.evaluate(first, second, holds)
        assert got.tolist() == [[1.0, 6.0, -0.0, 14.0]] and bool(got[0, 2].signbit())
    assert made.conditions == {2}
    # What is computed with as well is no mere condition.
    assert b.build(b.apply(Op.WHERE, x, x, other)).conditions == frozenset()
    assert b.build(b.apply(Op.WHERE, condition, x, other), condition).conditions == frozenset()


@pytest.mark.parametrize("op", [op for op in UNARY if op not in (Op.LOG, Op.SQRT, Op.RSQRT, Op.RECIPROCAL)])
def test_what_is_no_number_stays_none(op: Op) -> None:
    (got,) = unary(op).evaluate(torch.full((1, 3), math.nan))
    assert bool(got.isnan().all())


@pytest.mark.parametrize("op", [Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM])
def test_a_number_and_what_is_none_give_none_on_either_side(op: Op) -> None:
    number, none = torch.tensor([[1.0, math.inf, -0.0]]), torch.full((1, 3), math.nan)
    for operands in ((number, none), (none, number)):
        (got,) = binary(op).evaluate(*operands)
        assert bool(got.isnan().all())


@pytest.mark.parametrize("op", [Op.TANH, Op.ERF, Op.ROUND, Op.TO_BF16, Op.TO_F16, Op.SILU, Op.SQRT])
def test_functions_keep_the_sign_of_zero(op: Op) -> None:
    (got,) = unary(op).evaluate(torch.tensor([[0.0, -0.0]]))
    assert got.tolist() == [[0.0, 0.0]] and got.signbit().tolist() == [[False, True]]


def test_infinities_reach_their_limits() -> None:
    limits = {Op.TANH: (1, -1), Op.ERF: (1, -1), Op.SIGMOID: (1, 0), Op.EXP: (math.inf, 0), Op.RELU: (math.inf, 0)}
    for op, expected in limits.items():
        (got,) = unary(op).evaluate(torch.tensor([[math.inf, -math.inf]]))
        assert tuple(got[0].tolist()) == expected


# ---- building


@given(st.floats(width=32))
def test_a_constant_is_what_was_given_to_the_sign_of_zero(value: float) -> None:
    b = Builder()
    (got,) = b.build(b.constant(value)).evaluate(torch.empty(1))
    assert struct.pack("f", float(got)) == struct.pack("f", value) or (math.isnan(value) and math.isnan(float(got)))


def test_equal_instructions_are_shared_but_neither_zeros_of_two_signs_nor_what_is_no_number() -> None:
    b = Builder()
    assert b.apply(Op.ADD, b.input(0), b.input(1)) == b.apply(Op.ADD, b.input(0), b.input(1))
    assert b.apply(Op.ADD, b.input(0), b.input(1)) != b.apply(Op.ADD, b.input(1), b.input(0))
    assert b.constant(1.0) == b.constant(1)
    assert b.constant(0.0) != b.constant(-0.0) and b.constant(-0.0) == b.constant(-0.0)
    assert b.constant(math.nan) != b.constant(math.nan)


def test_only_what_an_output_needs_is_kept() -> None:
    b = Builder()
    b.apply(Op.EXP, b.input(3))
    total = b.apply(Op.ADD, b.input(0), b.constant(2.0))
    b.apply(Op.LOG, total)
    expression = b.build(total)
    assert [i.op for i in expression.instructions] == [Op.INPUT, Op.CONSTANT, Op.ADD]
    assert expression.inputs == 1 and str(expression) == "add(x0, 2)"


@pytest.mark.parametrize(
    ("instructions", "outputs", "message"),
    [
        ((Instruction(Op.ADD, (0,)),), (0,), "add takes 2 operands"),
        ((Instruction(Op.EXP, (0,)),), (0,), "not there yet"),
        ((Instruction(Op.INPUT), Instruction(Op.EXP, (-1,))), (1,), "not there yet"),
        ((Instruction(Op.CONSTANT, value=1),), (0,), "not a float"),
        ((Instruction(Op.INPUT),), (1,), "outside the program"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(
    instructions: tuple[Instruction, ...], outputs: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(instructions, outputs)


_ELEMENTWISE = [op for op in UNARY if op not in REDUCTIONS and op not in (Op.EXP, Op.LOG, Op.RSQRT, Op.RECIPROCAL)]


@st.composite
def expressions(draw: st.DrawFn, inputs: int) -> Expression:
    """Well-defined everywhere, of ``inputs`` inputs, with one or two outputs."""
    b = Builder()
    values = [b.input(i) for i in range(inputs)] + [b.constant(draw(st.sampled_from([0.0, -0.0, 0.5, -2.0])))]
    for _ in range(draw(st.integers(1, 8))):
        pick = draw(st.sampled_from(["unary", "binary", "reduction", "cast"]))
        value, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        if pick == "unary":
            values.append(b.apply(Op.TANH, b.apply(draw(st.sampled_from(_ELEMENTWISE)), b.apply(Op.ABS, value))))
        elif pick == "binary":
            values.append(
                b.apply(draw(st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.MAXIMUM, Op.MINIMUM])), value, other)
            )
        elif pick == "reduction":
            values.append(
                b.apply(draw(st.sampled_from(sorted(REDUCTIONS, key=str))), b.apply(Op.ADD, value, b.input(0)))
            )
        else:
            values.append(b.cast(value, draw(st.sampled_from([*CASTS, torch.float32]))))
    return b.build(*draw(st.lists(st.sampled_from(values), min_size=1, max_size=2)))


ROWS = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions(2), expressions(3), st.permutations(range(3)))
def test_an_inlined_program_computes_what_both_compute_one_after_the_other(
    first: Expression, second: Expression, order: list[int]
) -> None:
    b = Builder()
    made = b.inline(first, [b.input(0), b.input(1)])
    given_to_second = [(made[0], made[-1], b.input(2))[i] for i in order]
    whole = b.build(*b.inline(second, given_to_second))
    results = first.evaluate(*ROWS[:2])
    operands = [(results[0], results[-1], ROWS[2])[i] for i in order]
    for got, expected in zip(whole.evaluate(*ROWS), second.evaluate(*operands), strict=True):
        assert torch.equal(got, expected) and torch.equal(got.signbit(), expected.signbit())
    assert whole.flops <= first.flops + second.flops
    assert whole.rounds <= (first.rounds or second.rounds)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions(3))
def test_a_pass_over_a_row_needs_reductions_of_earlier_passes_only(expression: Expression) -> None:
    stages = expression.stages()
    assert sorted(i for stage in stages for i in stage) == list(range(len(expression.instructions)))
    at = {i: number for number, stage in enumerate(stages) for i in stage}
    for position, instruction in enumerate(expression.instructions):
        for arg in instruction.args:
            reduces = expression.instructions[arg].op in REDUCTIONS
            assert at[arg] < at[position] if reduces else at[arg] <= at[position]
    assert expression.has_reduction or len(stages) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions(2), st.sampled_from(list(CASTS)), st.sampled_from(list(CASTS)))
def test_casts_that_memory_makes_change_nothing_when_left_out(
    expression: Expression, stored: torch.dtype, output: torch.dtype
) -> None:
    x, y = ROWS[0].to(stored).float(), ROWS[1].float()
    outputs = [output] * len(expression.outputs)
    shorter = expression.without_idle_casts({0: stored, 1: torch.float32}, outputs)
    assert len(shorter.instructions) <= len(expression.instructions)
    for a, b in zip(shorter.evaluate(x, y), expression.evaluate(x, y), strict=True):
        assert torch.equal(a.to(output), b.to(output))


# ---- the programs of norms and softmax


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_norms_are_pytorchs(weight: bool, bias: bool) -> None:
    x, parameters = ROWS[0], [ROWS[1][0], ROWS[1][1]]
    w, b = parameters[0] if weight else None, parameters[1] if bias else None
    given_to = [t for t in (w, b) if t is not None]
    (got,) = ex.layer_norm(1e-5, weight, bias).evaluate(x, *given_to)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (7,), w, b, 1e-5), rtol=1e-12, atol=1e-12)
    (got,) = ex.rms_norm(1e-6, weight).evaluate(x, *given_to[:weight])
    torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, (7,), w, 1e-6), rtol=1e-12, atol=1e-12)


def test_a_row_that_may_attend_to_nothing_is_zero_and_others_are_pytorchs_softmax() -> None:
    x = ROWS[0].clone()
    x[0, 2:] = -math.inf
    x[2] = -math.inf
    expected = x.softmax(-1)
    (plain,), (masked,) = ex.softmax().evaluate(x), ex.masked_softmax().evaluate(x)
    torch.testing.assert_close(plain, expected, rtol=1e-14, atol=0, equal_nan=True)
    assert bool(plain[2].isnan().all()) and bool((masked[2] == 0).all())
    torch.testing.assert_close(masked[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-14, atol=0)
