"""Row-wise and pointwise CUDA kernels: on the emulator against float64, and compiled for every architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fuser
from fuser.codegen.cuda import cached_values
from fuser.codegen.render import header_folder, render
from fuser.ir.expression import Builder, Expression, Op, layer_norm, masked_softmax, rms_norm, softmax
from fuser.ir.target import cuda_target, emulated_target
from fuser.kernels.base import Access, DType, KernelSpec, Operand
from fuser.kernels.compose import RowProgram
from fuser.kernels.operands import Bound, OperandExtents
from fuser.kernels.rowwise import RowwiseExtents
from fuser.kernels.rowwise_cuda import TEMPLATE, CudaRowwiseParameters, space
from fuser.runtime.build import build
from fuser.runtime.nvcc import Resources

Run = Callable[..., int]
Compile = Callable[[KernelSpec, str], tuple[Resources, ...]]
DTYPES = (DType.F32, DType.F16, DType.BF16)
# sm_90 has the same instructions for these as sm_90a.
ARCHS = ("sm_80", "sm_90a")
PERIOD, TABLE = 3, 11
# Storing a result may move every element by half a unit in its last place; fp32 arithmetic adds a few roundings.
TOLERANCE = {DType.F32: 1e-6, DType.F16: 2.0**-11 + 1e-6, DType.BF16: 2.0**-8 + 1e-6}


def expression(make: Callable[[Builder], Sequence[int]]) -> Expression:
    b = Builder()
    return b.build(*make(b))


def sums(b: Builder, *inputs: int) -> int:
    total = b.input(inputs[0])
    for i in inputs[1:]:
        total = b.apply(Op.ADD, total, b.input(i))
    return total


@dataclass(frozen=True)
class Case:
    """An expression and how its operands lie: full matrices, one row for all, rows with a period, one number a row,
    rows of a table."""

    expression: Expression
    operands: tuple[str, ...]

    @property
    def reduces(self) -> bool:
        return self.expression.has_reduction or "table" in self.operands


CASES = {
    "post_norm": Case(
        expression(lambda b: b.inline(layer_norm(1e-5), (sums(b, 0, 1, 2), b.input(3), b.input(4)))),
        ("full", "full", "row", "row", "row"),
    ),
    "sum_and_norm": Case(
        expression(lambda b: [s := sums(b, 0, 1), *b.inline(rms_norm(1e-6), (s, b.input(2)))]), ("full", "full", "row")
    ),
    "embeddings": Case(
        expression(lambda b: b.inline(layer_norm(1e-12), (sums(b, 0, 1, 2), b.input(3), b.input(4)))),
        ("table", "table", "periodic", "row", "row"),
    ),
    "table": Case(expression(lambda b: [sums(b, 0)]), ("table",)),
    "softmax": Case(
        expression(lambda b: b.inline(softmax(), (b.apply(Op.MUL, b.input(0), b.input(1)),))), ("full", "column")
    ),
    "masked_softmax": Case(expression(lambda b: b.inline(masked_softmax(), (sums(b, 0, 1),))), ("full", "periodic")),
    "mean": Case(expression(lambda b: [b.apply(Op.SUB, b.input(0), b.apply(Op.ROW_MEAN, b.input(0)))]), ("full",)),
    "bias_gelu": Case(expression(lambda b: [b.apply(Op.GELU, sums(b, 0, 1))]), ("full", "row")),
    "gate": Case(
        expression(lambda b: [b.apply(Op.MUL, b.apply(Op.SILU, b.input(0)), b.input(1))]), ("full", "periodic")
    ),
    "scale_rows": Case(expression(lambda b: [b.apply(Op.MUL, b.input(0), b.input(1))]), ("full", "column")),
}
OPERANDS = {
    "full": (Access.MATRIX, False),
    "row": (Access.MATRIX, False),
    "periodic": (Access.MATRIX, True),
    "column": (Access.COLUMN, False),
    "table": (Access.GATHER, False),
}


def choices(case: Case, dtype: DType) -> list[CudaRowwiseParameters]:
    """A warp and a block for a row with values in registers, blocks that read twice; or threads for elements."""
    operands = tuple(Operand(access, dtype, periodic) for access, periodic in (OPERANDS[o] for o in case.operands))
    outputs = (dtype,) * len(case.expression.outputs)
    width = 4 if dtype is DType.F32 else 8

    def made(threads: int, group: int, items: int) -> CudaRowwiseParameters:
        return CudaRowwiseParameters(case.expression, operands, outputs, width, threads, group, items)

    if not case.reduces:
        return [made(128, 0, 0)]
    return [made(64, 32, 4), made(64, 64, 2), made(64, 64, 0), made(1024, 1024, 0)]


def spec(parameters: CudaRowwiseParameters) -> KernelSpec:
    return KernelSpec("rowwise", TEMPLATE, parameters)


# Every dtype for every way to share a row and every class of operand; each case for one dtype at least.
ONCE = {
    "sum_and_norm": DType.F16,
    "table": DType.BF16,
    "masked_softmax": DType.F16,
    "mean": DType.BF16,
    "bias_gelu": DType.F32,
    "scale_rows": DType.F32,
}
BUILT = {
    (name, dtype, number): parameters
    for name, case in CASES.items()
    for dtype in ([ONCE[name]] if name in ONCE else DTYPES)
    for number, parameters in enumerate(choices(case, dtype))
    if number == 0
    or (name, number) == ("post_norm", 1)
    or (dtype is DType.F32 and name == "softmax")
    or (number == 2 and (name, dtype) in (("post_norm", DType.F16), ("embeddings", DType.F32), ("softmax", DType.BF16)))
}
# In the checking mode: every dtype, and every way to share a row.
CHECKED = [
    *(("post_norm", DType.BF16, 0), ("softmax", DType.F32, 1), ("post_norm", DType.F16, 2), ("softmax", DType.F32, 3)),
    *(("embeddings", DType.F32, 2), ("gate", DType.F16, 0)),
]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All kernels of this file, built in parallel."""
    target = emulated_target()
    build([render(spec(p)) for p in BUILT.values()], target, headers=header_folder(target))


class Data:
    """Tensors for a case; ``gap`` elements between rows, ``shift`` elements before the first."""

    def __init__(self, case: Case, dtype: DType, rows: int, columns: int, gap: int = 0, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(rows * 1000 + columns)

        def matrix(count: int) -> Tensor:
            room = torch.randn(count * (columns + gap) + shift, generator=generator).to(dtype.torch)
            return room[shift:].view(count, columns + gap)[:, :columns]

        self.tensors: list[Tensor] = []
        self.rows = rows
        self.operands: list[OperandExtents] = []
        self.exact: list[Tensor] = []
        self.indices: list[Tensor] = []
        for kind in case.operands:
            if kind == "column":
                column = torch.randn(rows, generator=generator).to(dtype.torch)
                self._add(column, 1, rows, column[:, None])
            elif kind == "table":
                table, index = matrix(TABLE), torch.randint(0, TABLE, (rows,), generator=generator)
                self.indices.append(index)
                self._add(table, columns + gap, TABLE, table[index])
            else:
                count = {"full": rows, "row": 1, "periodic": PERIOD}[kind]
                values = matrix(count)
                read = values[torch.arange(rows) % count]
                self._add(values, 0 if kind == "row" else columns + gap, count, read)
        self.outputs = [
            torch.full((rows * (columns + gap) + shift,), math.nan, dtype=dtype.torch)[shift:].view(rows, columns + gap)
            for _ in case.expression.outputs
        ]
        self.output_strides = (columns + gap,) * len(self.outputs)
        self.columns = columns

    def _add(self, tensor: Tensor, stride: int, period: int, exact: Tensor) -> None:
        self.tensors.append(tensor)
        self.operands.append(OperandExtents(stride, period))
        self.exact.append(exact.double())

    @property
    def extents(self) -> RowwiseExtents:
        return RowwiseExtents(self.rows, self.columns, tuple(self.operands), self.output_strides)

    @property
    def arguments(self) -> tuple[list[Tensor], RowwiseExtents]:
        return [*self.tensors, *self.indices, *self.outputs], self.extents

    def errors(self, case: Case) -> Iterator[float]:
        """Relative L2 errors of the outputs; what lies between rows must be untouched."""
        for out, exact in zip(self.outputs, case.expression.evaluate(*self.exact), strict=True):
            assert out[:, self.columns :].isnan().all()
            truth = exact.broadcast_to(out.shape[0], self.columns)
            yield float((out[:, : self.columns].double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("key", BUILT, ids=lambda k: f"{k[0]}-{k[1].value}-{k[2]}")
def test_kernels_agree_with_float64(key: tuple[str, DType, int], run_cuda: Run) -> None:
    name, dtype, _ = key
    case, parameters = CASES[name], BUILT[key]
    longest = parameters.capacity or 1500
    for rows, columns, gap, shift in (
        *((1, 1, 0, 0), (5, 64, 0, 0), (7, 83, 0, 0)),
        *((6, 64, 8, 0), (6, 64, 0, 1), (4, 40, 3, 0)),
        *((3, longest, 0, 0), (2, longest - 1, 1, 0)),
    ):
        data = Data(case, dtype, rows, columns, gap, shift)
        assert run_cuda(spec(parameters), *data.arguments) == 0
        if name == "mean" and columns == 1:
            continue
        for error in data.errors(case):
            assert error <= TOLERANCE[dtype], (rows, columns, gap, shift)


@pytest.fixture(scope="module")
def _built_checked() -> None:
    target = emulated_target()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSER_EMULATOR_CHECKED", "1")
        build([render(spec(BUILT[key])) for key in CHECKED], target, headers=header_folder(target))


@pytest.fixture
def checked(_built_checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's checking mode, for which its kernels are built in parallel."""
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")


@pytest.mark.parametrize("key", CHECKED, ids=lambda k: f"{k[0]}-{k[1].value}-{k[2]}")
def test_nothing_races_or_leaves_its_arrays(key: tuple[str, DType, int], run_cuda: Run, checked: None) -> None:
    case, dtype = CASES[key[0]], key[1]
    for rows, columns, gap, shift in ((5, 83, 0, 0), (4, 64, 8, 0), (3, 64, 0, 1)):
        data = Data(case, dtype, rows, columns, gap, shift)
        assert run_cuda(spec(BUILT[key]), *data.arguments) == 0
        assert max(data.errors(case)) <= TOLERANCE[dtype]


def test_offsets_beyond_32_bits(run_cuda: Run) -> None:
    """Rows that lie gigabytes apart; memory that is never touched costs nothing."""
    stride, columns = (1 << 30) + 8, 40
    try:
        memory = torch.empty(3 * stride, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not lend out 6 GiB of addresses")
    far = memory.as_strided((3, 4, columns), (stride, columns, 1))
    for name in ("gate", "softmax"):
        case = CASES[name]
        data = Data(case, DType.F16, 3, columns)
        far[:, 0] = data.tensors[0]
        extents = RowwiseExtents(3, columns, (OperandExtents(stride, 3), *data.operands[1:]), (stride,))
        assert run_cuda(spec(BUILT[name, DType.F16, 0]), [far[:, 0], data.tensors[1], far[:, 1]], extents) == 0
        data.outputs = [far[:, 1]]
        assert max(data.errors(case)) <= TOLERANCE[DType.F16]


def test_more_blocks_than_a_grid_has_are_refused(run_cuda: Run) -> None:
    nowhere = [torch.empty(1)] * 3
    for rows, columns in ((1 << 40, 1), (1 << 20, 1 << 40)):
        extents = RowwiseExtents(rows, columns, (OperandExtents(columns, rows), OperandExtents(1, rows)), (columns,))
        assert run_cuda(spec(BUILT["scale_rows", DType.F32, 0]), nowhere, extents) == 2


def test_no_rows_and_no_columns(run_cuda: Run) -> None:
    case, parameters = CASES["bias_gelu"], BUILT["bias_gelu", DType.F32, 0]
    for rows, columns in ((0, 8), (8, 0)):
        data = Data(case, DType.F32, rows, columns)
        assert run_cuda(spec(parameters), *data.arguments) == 0


def test_more_rows_than_blocks_of_a_grid_fit_along_y(run_cuda: Run) -> None:
    case, parameters = CASES["scale_rows"], BUILT["scale_rows", DType.F32, 0]
    data = Data(case, DType.F32, 70_000, 2)
    assert run_cuda(spec(parameters), *data.arguments) == 0
    assert max(data.errors(case)) <= TOLERANCE[DType.F32]


def test_a_row_longer_than_the_kernel_holds_is_refused(run_cuda: Run) -> None:
    parameters = BUILT["softmax", DType.F32, 0]
    data = Data(CASES["softmax"], DType.F32, 1, parameters.capacity + 1)
    assert run_cuda(spec(parameters), *data.arguments) == 2


@pytest.mark.parametrize("index", [TABLE, -1, 2**62])
def test_an_index_outside_its_table_is_reported_and_gives_no_number(index: int, run_cuda: Run) -> None:
    case, parameters = CASES["embeddings"], BUILT["embeddings", DType.F16, 0]
    data = Data(case, DType.F16, 6, 64)
    data.indices[1][2] = index
    status = torch.zeros(1, dtype=torch.int32)
    assert run_cuda(spec(parameters), *data.arguments, status=status) == 0
    assert int(status) == 1
    wrong = data.outputs[0].isnan().all(dim=1)
    assert wrong.tolist() == [False, False, True, False, False, False]


def test_nan_and_infinity_propagate(run_cuda: Run) -> None:
    case, parameters = CASES["softmax"], BUILT["softmax", DType.F32, 0]
    data = Data(case, DType.F32, 3, 40)
    data.tensors[0][0, 7], data.tensors[0][1, 3] = math.nan, math.inf
    data.tensors[1].fill_(1.0)
    run_cuda(spec(parameters), *data.arguments)
    assert data.outputs[0][0].isnan().all() and data.outputs[0][1].isnan().any()
    assert torch.allclose(data.outputs[0][2], torch.softmax(data.tensors[0][2], -1))


UNARY = (
    *(Op.NEG, Op.ABS, Op.EXP, Op.LOG, Op.SQRT, Op.RSQRT, Op.RECIPROCAL, Op.TANH, Op.ERF, Op.SIGMOID, Op.RELU),
    *(Op.GELU, Op.GELU_TANH, Op.SILU),
)
BINARY = (Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM)


def test_every_instruction(run_cuda: Run) -> None:
    made = expression(
        lambda b: [
            *(b.apply(op, b.input(0)) for op in UNARY),
            *(b.apply(op, b.input(0), b.input(1)) for op in BINARY),
            b.apply(Op.WHERE, b.input(2), b.input(0), b.input(1)),
            *(b.constant(value) for value in (math.nan, -math.inf, 0.1)),
        ]
    )
    matrix = Operand(Access.MATRIX, DType.F32)
    count = len(made.outputs)
    operands = (matrix, matrix, Operand(Access.MATRIX, DType.BOOL))
    parameters = CudaRowwiseParameters(made, operands, (DType.F32,) * count, 4, 128, 0, 0)
    x = torch.cat([torch.randn(200), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, 90.0, -90.0])])
    y = x.roll(3)
    outputs = [torch.empty_like(x) for _ in range(count)]
    extents = RowwiseExtents(1, x.numel(), (OperandExtents(x.numel(), 1),) * 3, (x.numel(),) * count)
    holds = torch.arange(x.numel()) % 3 == 0
    assert run_cuda(spec(parameters), [x, y, holds, *outputs], extents) == 0
    exact = made.evaluate(x.double(), y.double(), holds)
    for op, mine, truth in zip((*UNARY, *BINARY, Op.WHERE, *[Op.CONSTANT] * 3), outputs, exact, strict=True):
        truth = truth.broadcast_to(x.shape)
        # Where 1 + erf or 1 + tanh cancel, the error is that of one next to it.
        assert torch.allclose(mine.double(), truth.float().double(), rtol=1e-6, atol=2e-7, equal_nan=True), op


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "key",
    [
        ("post_norm", DType.F16, 0),
        ("softmax", DType.F32, 2),
        ("embeddings", DType.BF16, 0),
        ("bias_gelu", DType.F16, 0),
    ],
    ids=lambda k: k[0],
)
def test_nvcc_compiles_without_spills(key: tuple[str, DType, int], arch: str, compile_cuda: Compile) -> None:
    (found,) = compile_cuda(spec(choices(CASES[key[0]], key[1])[key[2]]), arch)
    assert found.spill_store_bytes == found.spill_load_bytes == 0
    assert found.registers <= 168


# ---- which kernel for which matrix


def program(case: Case, rows: int, columns: int, dtype: DType = DType.F16) -> RowProgram:
    kinds = [OPERANDS[o] for o in case.operands]
    bounds = tuple(Bound(Operand(a, dtype, p), f"v{i}", columns, rows) for i, (a, p) in enumerate(kinds))
    count = len(case.expression.outputs)
    gathers = tuple(f"i{i}" for i, o in enumerate(case.operands) if o == "table")
    outputs = tuple(f"y{i}" for i in range(count))
    return RowProgram(case.expression, 0, bounds, gathers, rows, columns, outputs, (dtype,) * count, (columns,) * count)


@pytest.mark.parametrize("columns", [1, 31, 768, 1024, 5120, 40_000])
@pytest.mark.parametrize("rows", [1, 64, 16384])
def test_choices_hold_their_rows(rows: int, columns: int) -> None:
    target = cuda_target("sm_90a")
    for name, case in CASES.items():
        found = space(program(case, rows, columns), target)
        assert found == list(dict.fromkeys(found))
        for parameters in found:
            assert (parameters.group == 0) == (not case.reduces)
            assert parameters.threads <= 1024 and parameters.threads % 32 == 0, name
            assert parameters.items == 0 or parameters.capacity >= columns
            assert parameters.items * parameters.width <= 64


def test_few_rows_get_a_block_each_and_many_a_warp() -> None:
    target, case = cuda_target("sm_80"), CASES["post_norm"]
    assert space(program(case, 16, 768), target)[0].group > 32
    assert space(program(case, 16384, 768), target)[0].group == 32


def test_registers_keep_what_later_passes_read() -> None:
    # The sum, and not its three terms, nor the weight and the bias that only the last pass reads.
    assert len(cached_values(CASES["post_norm"].expression)) == 1
    assert cached_values(CASES["bias_gelu"].expression) == ()


def test_mixed_storage(run_cuda: Run) -> None:
    made = CASES["post_norm"].expression
    kinds = (DType.BF16, DType.F32, DType.BF16, DType.F32, DType.F32)
    operands = tuple(Operand(Access.MATRIX, d) for d in kinds)
    parameters = CudaRowwiseParameters(made, operands, (DType.F32,), 4, 64, 32, 2)
    rows, columns = 5, 100
    tensors = [torch.randn(rows if i < 2 else 1, columns).to(d.torch) for i, d in enumerate(kinds)]
    out = torch.empty(rows, columns)
    strides = [columns, columns, 0, 0, 0]
    extents = RowwiseExtents(rows, columns, tuple(OperandExtents(s, rows) for s in strides), (columns,))
    assert run_cuda(spec(parameters), [*tensors, out], extents) == 0
    (truth,) = made.evaluate(*(t.double() for t in tensors))
    assert float((out - truth).norm() / truth.norm()) <= TOLERANCE[DType.F32]


def test_groups_become_one_kernel_in_a_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = torch.nn.Embedding(TABLE, 48), torch.nn.LayerNorm(48)

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(self.table(ids) + x), torch.nn.functional.gelu(x) * 2

    torch.manual_seed(0)
    model, x, ids = Model().eval().half(), torch.randn(2, 9, 48).half(), torch.randint(0, TABLE, (2, 9))
    fast = fuser.optimize(model, target="cuda:emulated")
    with torch.no_grad():
        for mine, eager in zip(fast(ids, x), model(ids, x), strict=True):
            assert torch.allclose(mine.float(), eager.float(), rtol=2.0**-9, atol=1e-2)
    assert sorted(k.family for k in fast.kernels) == ["pointwise", "rowwise"] and fast.unfused == ()
    with pytest.raises(IndexError, match="outside the table"):
        fast(ids + TABLE, x)
    # The error is over.
    fast(ids, x)


def test_parameters_are_named_in_the_source() -> None:
    parameters = BUILT["softmax", DType.F32, 0]
    assert "CudaRowwiseParameters" in render(spec(parameters)).text
    assert spec(parameters).symbol != spec(dataclasses.replace(parameters, items=8)).symbol
