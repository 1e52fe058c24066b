"""CUDA products against float64, run by the emulator: tails, strides, alignments, epilogues, storage types, split sums;
and what nvcc says about the kernels that are chosen for real sizes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.expression import Builder, Expression, Op, layer_norm, rms_norm, softmax
from fuser.ir.target import emulated_target
from fuser.kernels import gemm_cuda
from fuser.kernels.base import Access, DType, KernelSpec, Operand
from fuser.kernels.gemm_cuda import CudaGemmParameters, Tile
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache
from fuser.runtime.emulator import EmulationError

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16
# One element of a result may be off by a few roundings where eager's happens to be exact.
FLOOR = {F32: 4 * 2.0**-24, F16: 2.0**-12, BF16: 2.0**-9}
# Relative error of a sum whose factors are both rounded to 10 bits of mantissa.
TF32_ERROR = 2.0**-10
PERIOD = 5


def _expression(make: Callable[[Builder, int], Sequence[int]]) -> Expression:
    b = Builder()
    return b.build(*make(b, b.input(0)))


def _activated(op: Op) -> Expression:
    return _expression(lambda b, x: [b.apply(op, b.apply(Op.ADD, x, b.input(1)))])


def _post_norm(b: Builder, x: int) -> Sequence[int]:
    total = b.apply(Op.ADD, b.apply(Op.ADD, x, b.input(1)), b.input(2))
    return b.inline(layer_norm(1e-5), (total, b.input(3), b.input(4)))


def _pre_norm(b: Builder, x: int) -> Sequence[int]:
    total = b.apply(Op.ADD, x, b.input(1))
    return [total, *b.inline(rms_norm(1e-6), (total, b.input(2)))]


# (expression, kind of every operand: "row" is a bias, "full" a residual, "periodic", "column").
EPILOGUES: dict[str, tuple[Expression, tuple[str, ...]]] = {
    "none": (_expression(lambda b, x: [x]), ()),
    "bias": (_expression(lambda b, x: [b.apply(Op.ADD, x, b.input(1))]), ("row",)),
    "bias_gelu": (_activated(Op.GELU), ("row",)),
    "bias_gelu_tanh": (_activated(Op.GELU_TANH), ("row",)),
    "relu_residual": (_expression(lambda b, x: [b.apply(Op.ADD, b.apply(Op.RELU, x), b.input(1))]), ("full",)),
    "positions": (_expression(lambda b, x: [b.apply(Op.ADD, x, b.input(1))]), ("periodic",)),
    "row_scale": (_expression(lambda b, x: [b.apply(Op.MUL, x, b.input(1))]), ("column",)),
    "gated": (_expression(lambda b, x: [b.apply(Op.MUL, b.apply(Op.SILU, x), b.input(1))]), ("full",)),
    "post_norm": (_expression(_post_norm), ("row", "full", "row", "row")),
    "sum_and_norm": (_expression(_pre_norm), ("full", "row")),
    "softmax": (_expression(lambda b, x: b.inline(softmax(), (x,))), ()),
}
_ACCESS = {
    "row": Operand(Access.MATRIX, F32),
    "full": Operand(Access.MATRIX, F32),
    "periodic": Operand(Access.MATRIX, F32, periodic=True),
    "column": Operand(Access.COLUMN, F32),
}
SMALL = Tile(16, 64, 32, 1, 4, 2, 1)
MEDIUM = Tile(64, 64, 64, 2, 2, 3, 1)


@dataclass(frozen=True)
class Case:
    dtype: DType
    n: int
    k: int
    epilogue: str
    tile: Tile = MEDIUM
    tensor_cores: bool = True
    out: DType | None = None

    @property
    def parameters(self) -> CudaGemmParameters:
        expression, kinds = EPILOGUES[self.epilogue]
        outs = [self.out or self.dtype] * len(expression.outputs)
        operands = [dataclasses.replace(_ACCESS[kind], dtype=self.dtype) for kind in kinds]
        # A tile's depth is given in 16-bit elements.
        tile = dataclasses.replace(self.tile, bk=self.tile.bk * 2 // self.dtype.bytes)
        return gemm_cuda.parameters(
            self.n, self.k, self.dtype, expression, operands, outs, tile, self.tensor_cores or self.dtype is not F32
        )

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("gemm", "cuda/gemm.cu.j2", self.parameters)

    def __str__(self) -> str:
        kind = self.dtype.value if self.dtype is not F32 else "tf32" if self.tensor_cores else "f32"
        sizes = "x".join(str(v) for v in dataclasses.astuple(self.tile))
        return f"{kind}-{self.n}-{self.k}-{self.epilogue}-{sizes}"


EXACT = {"tensor_cores": False}
SHAPES = [
    Case(F16, 1, 1, "bias", SMALL),
    Case(F16, 77, 131, "bias"),
    Case(F16, 96, 64, "bias", SMALL),
    Case(F16, 200, 136, "bias", Tile(128, 128, 64, 2, 2, 3, 1)),
    Case(BF16, 72, 40, "bias", Tile(32, 128, 32, 1, 4, 4, 1)),
    Case(F16, 33, 0, "bias", SMALL),
    Case(F32, 77, 131, "bias"),
    Case(F32, 136, 100, "bias", Tile(128, 128, 64, 2, 2, 2, 1)),
    Case(F32, 77, 131, "bias", Tile(64, 64, 32, 2, 2, 4, 1), **EXACT),
    Case(F32, 140, 52, "bias", Tile(128, 128, 64, 4, 2, 2, 1), **EXACT),
    Case(F32, 9, 3, "bias", SMALL, **EXACT),
]
FUSED = [Case(F16, 100, 72, name) for name in EPILOGUES]
FUSED += [
    Case(BF16, 100, 72, "gated", SMALL),
    Case(F32, 100, 70, "bias_gelu", SMALL),
    # Whole rows in a tile, and rows that a second kernel finishes.
    Case(BF16, 50, 70, "post_norm"),
    Case(F16, 200, 72, "post_norm", Tile(32, 256, 32, 1, 4, 2, 1)),
    Case(F32, 100, 70, "sum_and_norm", SMALL, **EXACT),
    # Longer rows than a lane keeps in registers.
    Case(F16, 1100, 40, "post_norm"),
]
SPLIT = [
    Case(F16, 77, 200, "bias_gelu", Tile(64, 64, 32, 2, 2, 2, 3)),
    Case(F32, 66, 130, "bias", Tile(16, 64, 32, 1, 4, 3, 2), **EXACT),
    Case(BF16, 101, 136, "post_norm", Tile(16, 64, 32, 1, 4, 3, 2)),
    Case(F32, 30, 64, "softmax", Tile(16, 64, 32, 1, 4, 3, 4)),
]
WIDER = [
    Case(F16, 40, 64, "bias", MEDIUM, out=F32),
    Case(F32, 40, 64, "bias", SMALL, out=F16, **EXACT),
]
ALL = [*SHAPES, *FUSED, *SPLIT, *WIDER]


@pytest.fixture(scope="module")
def kernels() -> dict[Case, Path]:
    """Every kernel of this file for the emulator, built in one run of ninja."""
    target = emulated_target()
    specs = {case: case.spec for case in ALL}
    built = build([render(s) for s in dict.fromkeys(specs.values())], target, headers=header_folder(target))
    return {case: built[spec.symbol] for case, spec in specs.items()}


@dataclass
class Problem:
    """Inputs of one launch; ``a`` may be strided and start anywhere."""

    a: Tensor
    weight: Tensor
    operands: list[Tensor]

    @classmethod
    def make(cls, case: Case, m: int, gap: int = 0, offset: int = 0) -> Problem:
        g = torch.Generator().manual_seed(m)
        store = torch.full((m * (case.k + gap) + offset,), float("nan"), dtype=case.dtype.torch)
        a = store[offset:].view(m, case.k + gap)[:, : case.k]
        a.copy_(torch.randn(m, case.k, generator=g))
        shapes = {"row": (case.n,), "full": (m, case.n), "periodic": (PERIOD, case.n), "column": (m, 1)}
        kinds = EPILOGUES[case.epilogue][1]
        operands = [torch.randn(shapes[kind], generator=g).to(case.dtype.torch) for kind in kinds]
        # Scaled as in a trained layer, so that a softmax does not magnify the logits' roundings.
        weight = torch.randn(case.n, case.k, generator=g) / max(case.k, 1) ** 0.5
        return cls(a, weight.to(case.dtype.torch), operands)

    def eager(self, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
        m = len(self.a)
        operands = [x.to(dtype) for x in self.operands]
        for i, kind in enumerate(EPILOGUES[case.epilogue][1]):
            if kind == "periodic":
                operands[i] = operands[i].repeat(-(-m // PERIOD), 1)[:m]
        return EPILOGUES[case.epilogue][0].evaluate(self.a.to(dtype) @ self.weight.to(dtype).t(), *operands)

    def run(self, case: Case, path: Path, gap: int = 0) -> tuple[Tensor, ...]:
        """The kernel's outputs, with ``gap`` untouched columns between their rows; all scratch starts as NaN."""
        p, m = case.parameters, len(self.a)
        stores = [torch.full((m, case.n + gap), float("nan"), dtype=d.torch) for d in p.out_dtypes]
        workspace = torch.full((p.workspace_bytes(m) // 4 + 4,), float("nan"))
        extents = [m, self.a.stride(0), self.weight.stride(0)]
        for kind, x in zip(EPILOGUES[case.epilogue][1], self.operands, strict=True):
            extents += [0 if kind == "row" else x.stride(0), PERIOD if kind == "periodic" else m]
        extents += [s.stride(0) for s in stores]
        tensors = [self.a, self.weight, *self.operands, *stores]
        emulator.run(path, case.spec.symbol, tensors, extents, workspace=workspace)
        assert all(s[:, case.n :].isnan().all() for s in stores)
        return tuple(s[:, : case.n] for s in stores)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def check(case: Case, path: Path, m: int, gap: int = 0, offset: int = 0) -> tuple[Tensor, ...]:
    problem = Problem.make(case, m, gap, offset)
    outputs = problem.run(case, path, gap)
    exact = problem.eager(case, torch.float64)
    stored = case.out or case.dtype
    eager = problem.eager(case, case.dtype.torch)
    rounded = case.dtype is F32 and case.tensor_cores
    for got, expected, other in zip(outputs, exact, eager, strict=True):
        bound = 2 * error(other, expected) + max(FLOOR[stored], FLOOR[case.dtype])
        assert error(got, expected) <= (TF32_ERROR if rounded else bound)
    return outputs


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_tail(case: Case, kernels: dict[Case, Path]) -> None:
    """Fewer rows than a tile, exactly one, several; rows of A that do and do not start at multiples of 16 bytes."""
    bm = case.tile.bm
    for m, gap, offset in ((1, 0, 0), (bm - 1, 7, 0), (bm, 8, 0), (bm + 3, 8, 1), (2 * bm + 5, 0, 8)):
        check(case, kernels[case], m, gap, offset)


@pytest.mark.parametrize("case", [*FUSED, *SPLIT, *WIDER], ids=str)
def test_epilogues(case: Case, kernels: dict[Case, Path]) -> None:
    """Every class of operand, reductions, several outputs, split sums; the same bits every time."""
    for m, gap in ((1, 0), (21, 4), (70, 3)):
        first, again = (check(case, kernels[case], m, gap) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_to_do(kernels: dict[Case, Path]) -> None:
    """No rows: nothing is read or written."""
    case = SHAPES[0]
    (got,) = Problem.make(case, 0).run(case, kernels[case])
    assert got.shape == (0, case.n)


def test_an_empty_sum_is_the_epilogue_of_zero(kernels: dict[Case, Path]) -> None:
    case = next(c for c in SHAPES if c.k == 0)
    problem = Problem.make(case, 4)
    (got,) = problem.run(case, kernels[case])
    assert torch.equal(got, problem.operands[0].expand(4, -1))


def test_many_tiles_run_in_groups(kernels: dict[Case, Path]) -> None:
    """More row tiles than run side by side, the last group incomplete."""
    case = next(c for c in SHAPES if c.n == 96)
    check(case, kernels[case], 11 * case.tile.bm + 1)


@pytest.mark.parametrize("dtype", [F16, F32])
def test_nan_and_infinity_reach_their_rows_only(dtype: DType, kernels: dict[Case, Path]) -> None:
    """Also where K ends inside of a copy, and rows and columns inside of a tile."""
    case = next(c for c in SHAPES if c.dtype is dtype and c.n == 77)
    problem = Problem.make(case, 9)
    problem.a[2, 3], problem.a[4, 0], problem.a[7, 130] = float("nan"), float("inf"), -float("inf")
    problem.weight[5, 1], problem.weight[76, 130] = float("inf"), float("nan")
    (got,) = problem.run(case, kernels[case])
    (eager,) = problem.eager(case, torch.float32)
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isposinf(), eager.isposinf()) and torch.equal(got.isneginf(), eager.isneginf())
    assert got.isfinite().sum() > 400


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator's checking mode needs g++")
def test_no_race_and_no_access_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checking mode: pipelines of all kinds, the staged epilogue, whole rows, split sums."""
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    target = emulated_target()
    cases = [
        Case(F16, 77, 136, "bias", SMALL),
        Case(F32, 77, 131, "bias", SMALL, **EXACT),
        Case(BF16, 50, 136, "post_norm", Tile(16, 64, 32, 1, 4, 3, 1)),
        Case(F16, 101, 136, "post_norm", Tile(16, 64, 32, 1, 4, 3, 2)),
    ]
    built = build([render(c.spec) for c in cases], target, headers=header_folder(target))
    for case in cases:
        for gap in (0, 1):
            check(case, built[case.spec.symbol], 19, gap)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator's checking mode needs g++")
@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (("    cp_async_wait<kStages - 2>();\n    __syncthreads();\n", "    __syncthreads();\n"), "asynchronous copy"),
        (("    cp_async_wait<kStages - 2>();\n    __syncthreads();\n", "    cp_async_wait<kStages - 2>();\n"), "race"),
    ],
)
def test_faults_in_the_pipeline_are_found(
    planted: tuple[str, str], found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    target, case = emulated_target(), Case(F16, 77, 136, "bias", SMALL)
    source = render(case.spec)
    assert source.text.count(planted[0]) == 1
    broken = dataclasses.replace(source, text=source.text.replace(*planted))
    built = build([broken], target, headers=header_folder(target), cache=KernelCache(tmp_path / "kernels"))
    with pytest.raises(EmulationError, match=found):
        Problem.make(case, 19).run(case, built[case.spec.symbol])
