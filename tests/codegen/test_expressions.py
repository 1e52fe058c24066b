"""Rendered row expressions against what they mean in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuser.codegen.expressions import literal, row_function, statements
from fuser.codegen.render import TEMPLATES, render
from fuser.ir.expression import (
    Builder,
    Expression,
    Op,
    layer_norm,
    log_sum_exp,
    masked_softmax,
    rms_norm,
    softmax,
    unary,
)
from fuser.ir.target import Isa
from fuser.kernels.base import Access, DType, KernelSpec, Operand
from fuser.kernels.operands import OperandExtents
from fuser.kernels.rowwise import RowwiseExtents, RowwiseParameters
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cpuinfo import detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import Kernel, load


@given(st.floats(width=32))
def test_literals_read_back_as_the_same_number(value: float) -> None:
    text = literal(value)
    if math.isnan(value):
        assert text == '__builtin_nanf("")'
    elif math.isinf(value):
        assert text == ("-" if value < 0 else "") + "__builtin_inff()"
    else:
        assert text.endswith("f")
        assert np.float32(text[:-1]) == np.float32(value)
        assert math.copysign(1, float(text[:-1])) == math.copysign(1, value)
        # A C++ literal needs a point or an exponent before its suffix.
        assert any(c in text for c in ".e")


def test_statements_refer_to_inputs_and_earlier_results_only() -> None:
    b = Builder()
    y = b.apply(Op.MUL, b.apply(Op.ADD, b.input(0), b.input(1)), b.constant(0.5))
    assert statements(b.build(y)) == [
        "const simd::vf v0 = x0;",
        "const simd::vf v1 = x1;",
        "const simd::vf v2 = v0 + v1;",
        "const simd::vf v3 = simd::set1(0.5f);",
        "const simd::vf v4 = v2 * v3;",
    ]


def test_zeros_of_both_signs_are_different_constants() -> None:
    b = Builder()
    expression = b.build(b.apply(Op.ADD, b.apply(Op.MUL, b.input(0), b.constant(-0.0)), b.constant(0.0)))
    (y,) = expression.evaluate(torch.ones(3))
    assert not bool(y.signbit().any())


def test_unused_operands_compile_without_warnings() -> None:
    b = Builder()
    text = row_function("row", b.build(b.input(1)), (Operand(Access.MATRIX, DType.F32),) * 2, (DType.F32,))
    assert "(void)p0;" in text and "(void)p1;" not in text


# ---- rendered and run

UNARY = (Op.NEG, Op.ABS, Op.TANH, Op.ERF, Op.SIGMOID, Op.RELU, Op.GELU, Op.GELU_TANH, Op.SILU)
BINARY = (Op.ADD, Op.SUB, Op.MUL, Op.MAXIMUM, Op.MINIMUM)
REDUCE = (Op.ROW_SUM, Op.ROW_MEAN, Op.ROW_MAX)
ACCESSES = (Access.MATRIX, Access.MATRIX, Access.COLUMN)


@dataclass(frozen=True)
class Case:
    expression: Expression
    operands: tuple[Operand, ...]
    outputs: tuple[DType, ...]

    @property
    def spec(self) -> KernelSpec:
        block = 0 if self.expression.has_reduction else 64
        parameters = RowwiseParameters(self.expression, self.operands, self.outputs, block)
        return KernelSpec("rowwise", "cpu/rowwise.cpp.j2", parameters)


def randomized(seed: int) -> Case:
    """An expression of about twelve well-conditioned instructions over three operands, some bf16, with two outputs."""
    pick = random.Random(seed)
    b = Builder()
    values = [b.input(i) for i in range(3)] + [b.constant(pick.choice([0.5, -1.25, 2.0, 1e-3]))]
    for _ in range(9):
        choice = pick.random()
        if choice < 0.45:
            values.append(b.apply(pick.choice(UNARY), pick.choice(values)))
        elif choice < 0.85:
            values.append(b.apply(pick.choice(BINARY), pick.choice(values), pick.choice(values)))
        else:
            # Squashed first, so that sums stay small; of something that has columns.
            row = b.apply(Op.ADD, pick.choice(values), b.input(0))
            values.append(b.apply(pick.choice(REDUCE), b.apply(Op.TANH, row)))
    operands = tuple(
        Operand(access, pick.choice([DType.F32, DType.F32, DType.BF16]), periodic=pick.random() < 0.4)
        for access in ACCESSES
    )
    outputs = (DType.F32, pick.choice([DType.F32, DType.BF16]))
    return Case(b.build(values[-1], values[-2]), operands, outputs)


def fixed(expression: Expression, inputs: int = 1) -> Case:
    return Case(expression, (Operand(Access.MATRIX, DType.F32),) * inputs, (DType.F32,))


def chosen() -> Case:
    """Numbers of a row or of a column, by a condition for each element and one for each row."""
    b = Builder()
    x, column, each, row = (b.input(i) for i in range(4))
    accesses = (Access.MATRIX, Access.COLUMN, Access.MATRIX, Access.COLUMN)
    dtypes = (DType.F32, DType.F32, DType.BOOL, DType.BOOL)
    return Case(
        b.build(b.apply(Op.WHERE, each, x, column), b.apply(Op.WHERE, row, x, b.constant(-math.inf))),
        tuple(Operand(access, dtype) for access, dtype in zip(accesses, dtypes, strict=True)),
        (DType.F32, DType.F32),
    )


CASES: dict[str, Case] = {
    "where": chosen(),
    **{f"random{seed}": randomized(seed) for seed in range(8)},
    "softmax": fixed(softmax()),
    "masked softmax": fixed(masked_softmax()),
    "layer norm": fixed(layer_norm(1e-5), 3),
    "rms norm": fixed(rms_norm(1e-6), 2),
}
ROUGH = {
    op.value: Case(unary(op), (Operand(Access.MATRIX, DType.F32),), (DType.BF16,))
    for op in (Op.EXP, Op.SIGMOID, Op.SILU, Op.GELU, Op.GELU_TANH)
}
"""Functions that have a shorter form where the result is rounded to bf16."""
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * torch.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)),
}
"""Without PyTorch's 1 + erf and 1 + tanh, of which nothing is left far out."""
ISAS = tuple(dict.fromkeys((detect_isa(), *((Isa.AVX2,) if detect_isa() is Isa.AVX512 else ()), Isa.PORTABLE)))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Mapping[str, Kernel]]:
    specs = {name: case.spec for name, case in CASES.items()}
    paths = build([render(spec) for spec in dict.fromkeys(specs.values())], cpu_target(), headers=TEMPLATES / "cpu")
    yield {name: load(paths[spec.symbol], spec.symbol) for name, spec in specs.items()}


def run(
    kernel: Kernel, case: Case, inputs: Sequence[Tensor], rows: int, columns: int, threads: int = 2
) -> list[Tensor]:
    """Call the kernel on operands whose rows are ``stride(0)`` apart, or repeat."""
    operands = tuple(
        OperandExtents(tensor.stride(0), tensor.shape[0] if operand.periodic else rows)
        for operand, tensor in zip(case.operands, inputs, strict=True)
    )
    outputs = [torch.full((rows, columns + 3), 7.0, dtype=dtype.torch)[:, :columns] for dtype in case.outputs]
    extents = RowwiseExtents(rows, columns, operands, tuple(out.stride(0) for out in outputs))
    kernel(KernelArgs.pack([t.data_ptr() for t in (*inputs, *outputs)], extents, threads))
    for out in outputs:
        beyond = out.as_strided((rows, 3), (out.stride(0), 1), out.storage_offset() + columns)
        assert bool((beyond == 7.0).all()), "wrote beyond its rows"
    return outputs


def operands_of(case: Case, rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    found = []
    for operand in case.operands:
        period = next(p for p in (3, 2, 1) if rows % p == 0) if operand.periodic else rows
        width = 1 if operand.access is Access.COLUMN else columns
        # Rows with gaps between them.
        found.append(torch.randn(period, width + 2, generator=generator).to(operand.dtype.torch)[:, :width])
    return found


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (6, 7), (6, 16), (4, 17), (3, 64), (2, 79), (12, 300)])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("random")])
def test_random_expressions(kernels: Mapping[str, Kernel], name: str, rows: int, columns: int) -> None:
    case = CASES[name]
    inputs = operands_of(case, rows, columns)
    wide = [t.repeat(rows // t.shape[0], 1).expand(rows, columns) for t in inputs]
    exact = case.expression.evaluate(*(t.double() for t in wide))
    eager = case.expression.evaluate(*(t.float() for t in wide))
    for mine, theirs, truth, dtype in zip(
        run(kernels[name], case, inputs, rows, columns), eager, exact, case.outputs, strict=True
    ):
        truth = truth.broadcast_to(rows, columns)
        scale = float(truth.norm())
        rounding = 2**-8 if dtype is DType.BF16 else 2e-6
        error, reference = float((mine.double() - truth).norm()), float((theirs.double() - truth).norm())
        assert error <= 2 * reference + rounding * scale + 1e-12


@pytest.mark.parametrize("columns", [1, 7, 16, 41])
def test_conditions_choose(kernels: Mapping[str, Kernel], columns: int) -> None:
    case = CASES["where"]
    generator = torch.Generator().manual_seed(columns)
    x, column = torch.randn(5, columns, generator=generator), torch.randn(5, 1, generator=generator)
    each, row = (torch.rand(shape, generator=generator) > 0.5 for shape in ((5, columns), (5, 1)))
    # Numbers that are not chosen leave no trace.
    x[~each], x[0, 0], each[0, 0] = math.nan, math.inf, True
    first, second = run(kernels["where"], case, [x, column, each, row], 5, columns)
    assert torch.equal(first, torch.where(each, x, column))
    assert torch.equal(second.nan_to_num(), torch.where(row, x, -math.inf).nan_to_num())


@pytest.mark.parametrize("columns", [1, 16, 33])
def test_rows_of_nothing(kernels: Mapping[str, Kernel], columns: int) -> None:
    x = torch.randn(3, columns)
    x[1] = -math.inf
    (plain,) = run(kernels["softmax"], CASES["softmax"], [x], 3, columns)
    (masked,) = run(kernels["masked softmax"], CASES["masked softmax"], [x], 3, columns)
    assert bool(plain[1].isnan().all())
    assert torch.equal(masked[1], torch.zeros(columns))
    assert torch.equal(plain[::2], masked[::2])
    lowest = torch.full((1, columns), torch.finfo(torch.float32).min)
    (uniform,) = run(kernels["masked softmax"], CASES["masked softmax"], [lowest], 1, columns)
    assert torch.allclose(uniform, torch.full((1, columns), 1 / columns))


@pytest.mark.parametrize("name", ["softmax", "layer norm", "rms norm"])
@pytest.mark.parametrize("columns", [1, 15, 64, 1000])
def test_norms_and_softmax(kernels: Mapping[str, Kernel], name: str, columns: int) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(columns)
    x = 5 + torch.randn(7, columns, generator=generator)
    rest = [torch.randn(1, columns, generator=generator).expand(7, columns) for _ in case.operands[1:]]
    exact = case.expression.evaluate(x.double(), *(t.double() for t in rest))[0]
    eager = case.expression.evaluate(x, *rest)[0]
    (mine,) = run(kernels[name], case, [x, *rest], 7, columns)
    assert float((mine - exact).norm()) <= 2 * float((eager - exact).norm()) + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("isa", ISAS)
def test_functions_that_are_rounded_to_bf16(isa: Isa) -> None:
    specs = {name: case.spec for name, case in ROUGH.items()}
    target = cpu_target(isa)
    paths = build([render(spec) for spec in specs.values()], target, headers=TEMPLATES / "cpu")
    x = torch.cat([torch.linspace(-12, 12, 24001), torch.linspace(-0.01, 0.01, 999), torch.logspace(-30, 1, 500)])
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 200.0, -200.0, 90.0, -95.0])
    for name, spec in specs.items():
        kernel, case = load(paths[spec.symbol], spec.symbol), ROUGH[name]
        (got,) = run(kernel, case, [x[None]], 1, len(x))
        exact = EXACT[name](x.double()) if name in EXACT else case.expression.evaluate(x.double())[0]
        # Half a unit of bf16's last bit, and a tenth of it; what is 1e-37 may be nothing.
        bound = exact.abs() * (2**-8 + 4e-4) + 1e-37
        if name == "gelu":
            # Below 2e-5 it is rougher, and beyond -9 it stays as it is.
            bound[x < -4.5] += exact[x < -4.5].abs() * 4e-3 + 2e-18
        assert bool(((got[0].double() - exact).abs() <= bound).all()), (
            name,
            float(((got[0] - exact).abs() / exact.abs())[exact != 0].max()),
        )
        (got,) = run(kernel, case, [special[None]], 1, len(special))
        wanted = case.expression.evaluate(special)[0].bfloat16()
        assert bool(got[0, 0].isnan()), name
        # What eager makes of infinities depends on its vectors.
        got, wanted = got[:, ~wanted.isnan()], wanted[~wanted.isnan()]
        # Far out, GELU stays at -9 times the tail there; e^-95 may be nothing.
        torch.testing.assert_close(got[0], wanted, rtol=2**-7, atol=2e-18)


def _of_sigmoid(op: Op, *, reduced: bool) -> Expression:
    b = Builder()
    y = b.apply(Op.SIGMOID, b.input(0))
    return b.build(b.apply(op, y, b.apply(Op.ROW_MEAN, y) if reduced else b.input(1)))


def _log_softmax() -> Expression:
    b = Builder()
    x = b.input(0)
    return b.build(b.apply(Op.SUB, x, *b.inline(log_sum_exp(), [x])))


def _normalized_sigmoid() -> Expression:
    b = Builder()
    return b.build(*b.inline(layer_norm(1e-5, weight=False, bias=False), [b.apply(Op.SIGMOID, b.input(0))]))


@pytest.mark.parametrize(
    ("expression", "rough"),
    [
        (softmax(), True),
        (masked_softmax(), True),
        (_of_sigmoid(Op.MUL, reduced=False), True),
        (_of_sigmoid(Op.DIV, reduced=True), True),
        (_of_sigmoid(Op.SUB, reduced=False), False),
        (_of_sigmoid(Op.SUB, reduced=True), False),
        (log_sum_exp(), False),
        (_log_softmax(), False),
        (_normalized_sigmoid(), False),
    ],
)
def test_functions_are_rough_only_where_no_difference_shows_it(expression: Expression, rough: bool) -> None:
    operands = (Operand(Access.MATRIX, DType.F32),) * expression.inputs
    assert ("rough::" in row_function("row", expression, operands, (DType.BF16,))) is rough
    for others in ((DType.F32,), (DType.BF16, DType.F32)):
        twice = Expression(expression.instructions, expression.outputs * len(others))
        assert "rough::" not in row_function("row", twice, operands, others)


@pytest.mark.parametrize("isa", ISAS)
def test_differences_of_functions_in_bf16(isa: Isa) -> None:
    x = torch.cat([torch.zeros(1, 64), 0.003 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))])
    x[1, 0] = 40.0
    target = cpu_target(isa)
    for expression in (_log_softmax(), _of_sigmoid(Op.SUB, reduced=True), _normalized_sigmoid()):
        case = Case(expression, (Operand(Access.MATRIX, DType.F32),), (DType.BF16,))
        (path,) = build([render(case.spec)], target, headers=TEMPLATES / "cpu").values()
        (got,) = run(load(path, case.spec.symbol), case, [x], 8, 64)
        (exact,), (eager,) = (expression.evaluate(t) for t in (x.double(), x))
        bound = float((eager.bfloat16() - exact).norm())
        assert float((got - exact).norm()) <= 1.5 * bound + 1e-6 * float(exact.norm())
        assert not bool(got.isnan().any())


def test_results_do_not_depend_on_the_number_of_threads(kernels: Mapping[str, Kernel]) -> None:
    case = CASES["random0"]
    inputs = operands_of(case, 60, 300)
    one = run(kernels["random0"], case, inputs, 60, 300, threads=1)
    for threads in (2, 3):
        for a, b in zip(one, run(kernels["random0"], case, inputs, 60, 300, threads=threads), strict=True):
            assert torch.equal(a, b)


def test_nothing_to_do(kernels: Mapping[str, Kernel]) -> None:
    case = CASES["softmax"]
    (got,) = run(kernels["softmax"], case, [torch.empty(0, 4)], 0, 4)
    assert got.shape == (0, 4)


def test_sources_name_their_parameters(tmp_path: Path) -> None:
    source = render(CASES["softmax"].spec)
    assert source.text.startswith(f"// fuser rowwise kernel {source.symbol}\n")
    assert "RowwiseParameters(" in source.text.splitlines()[1]


# ---- rounding


def test_products_are_written_without_contraction_where_something_rounds() -> None:
    def chain(last: Op) -> Expression:
        b = Builder()
        return b.build(b.apply(last, b.apply(Op.ADD, b.apply(Op.MUL, b.input(0), b.input(1)), b.input(2))))

    assert "const simd::vf v2 = v0 * v1;" in statements(chain(Op.RELU))
    for last in (Op.ROUND, Op.TO_BF16):
        assert "const simd::vf v2 = simd::mul_rounded(v0, v1);" in statements(chain(last))


def test_casts_that_memory_makes_anyway_are_left_out() -> None:
    b = Builder()
    read = b.cast(b.input(0), torch.bfloat16)
    total = b.apply(Op.ADD, read, b.cast(b.input(1), torch.bfloat16))
    assert b.cast(b.cast(total, torch.bfloat16), torch.bfloat16) == b.cast(total, torch.bfloat16)
    assert b.cast(total, torch.float32) == total
    whole = b.build(b.cast(total, torch.bfloat16), b.cast(total, torch.bfloat16))
    stored = whole.without_idle_casts({0: torch.bfloat16, 1: torch.float32}, (torch.bfloat16, torch.float32))
    assert str(stored) == "add(x0, to_bf16(x1)), to_bf16(add(x0, to_bf16(x1)))"
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16().float()
    for a, c in zip(whole.evaluate(x, y), stored.evaluate(x, y), strict=True):
        assert torch.equal(a.bfloat16(), c.bfloat16())
