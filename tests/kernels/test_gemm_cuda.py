"""CUDA products against float64, run by the emulator: tails, strides, alignments, epilogues, storage types, split sums;
and what nvcc says about the kernels that are chosen for real sizes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gated import Gated
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Builder, Expression, Op, layer_norm, rms_norm, softmax, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Gemm, Norm, Residual
from fuser.ir.target import TF32, Target, cuda_target, emulated_target
from fuser.kernels import gemm_cuda, gemm_cutlass
from fuser.kernels.base import (
    STORAGE,
    Access,
    DType,
    KernelCall,
    KernelSpec,
    LibraryCall,
    Operand,
    Packed,
    materialized,
)
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.gemm import GemmFamily, GemmMatch
from fuser.kernels.gemm_cuda import (
    CublasGemm,
    CublasParameters,
    CudaGatedGemmParameters,
    CudaGemm,
    CudaGemmExtents,
    CudaGemmParameters,
    Tile,
)
from fuser.kernels.gemm_cutlass import CutlassExtents, CutlassGemm, CutlassParameters
from fuser.kernels.operands import OperandExtents
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache
from fuser.runtime.emulator import EmulationError
from fuser.runtime.nvcc import Resources
from fuser.runtime.targets import named_target
from fuser.search import partition

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
    Case(F32, 77, 131, "bias", Tile(64, 64, 64, 2, 2, 2, 1)),
    Case(F32, 77, 131, "bias", Tile(64, 64, 32, 2, 2, 4, 1), **EXACT),
    Case(F32, 140, 52, "bias", Tile(128, 128, 64, 4, 2, 2, 1), **EXACT),
    Case(F32, 9, 3, "bias", SMALL, **EXACT),
]
FUSED = [Case(F16, 100, 72, name) for name in EPILOGUES if name != "bias"]
FUSED += [
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
        operands = tuple(
            OperandExtents(0 if kind == "row" else x.stride(0), PERIOD if kind == "periodic" else m)
            for kind, x in zip(EPILOGUES[case.epilogue][1], self.operands, strict=True)
        )
        strides = tuple(s.stride(0) for s in stores)
        extents = CudaGemmExtents(m, self.a.stride(0), self.weight.stride(0), operands, strides)
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


def test_offsets_beyond_32_bits(kernels: dict[Case, Path]) -> None:
    """Rows of A that lie gigabytes apart; memory that is never touched costs nothing."""
    case, stride = next(c for c in SHAPES if c.n == 96), (1 << 30) + 8
    try:
        store = torch.empty(3 * stride + case.k, dtype=case.dtype.torch)
    except RuntimeError:
        pytest.skip("this machine does not lend out 6 GiB of addresses")
    problem = Problem.make(case, 4)
    far = store.as_strided((4, case.k), (stride, 1))
    far.copy_(problem.a)
    (near,) = problem.run(case, kernels[case])
    (got,) = dataclasses.replace(problem, a=far).run(case, kernels[case])
    assert torch.equal(got, near)


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


# The family on operator graphs.

FAMILY, OURS, CUTLASS = GemmFamily(), CudaGemm(), CutlassGemm()
EMULATED = emulated_target()
GEMM = Operator("dense", Gemm(transposed=True), ("x", "weight"), ("product",))
ADD_BIAS = Operator("bias", Bias(), ("product", "bias"), ("biased",))
GELU = Operator("gelu", Activation(unary(Op.GELU)), ("biased",), ("active",))
TANH_GELU = Operator("gelu", Activation(unary(Op.GELU_TANH)), ("biased",), ("active",))
RELU = Operator("relu", Activation(unary(Op.RELU)), ("biased",), ("active",))
RESIDUAL = Operator("add", Residual(), ("biased", "residual"), ("total",))
ADD_ONLY = Operator("add", Residual(), ("residual", "product"), ("total",))
NORM = Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("normal",))
MLP_LAYER = [GEMM, ADD_BIAS, GELU]
POST_NORM = [GEMM, ADD_BIAS, RESIDUAL, NORM]
KN = dataclasses.replace(GEMM, semantics=Gemm(transposed=False))


_MADE = (("y", "x"), ("other", "residual"))


def graph(
    chain: Sequence[Operator],
    outputs: Sequence[str],
    dtype: torch.dtype = torch.float16,
    sizes: tuple[int, int, int] = (42, 96, 64),
    weight: torch.dtype | None = None,
    computed: bool = False,
) -> OperatorGraph:
    """A graph of ``chain`` on ``sizes`` (rows, N, K); with ``computed`` operators make its inputs."""
    rows, n, k = sizes
    values = {name: TensorSpec.contiguous((2, rows // 2, n), dtype) for op in chain for name in op.outputs}
    values |= {v: TensorSpec.contiguous((n,), dtype) for v in ("bias", "gamma", "beta")}
    values |= {v: TensorSpec.contiguous((2, rows // 2, k), dtype) for v in ("x", "y")}
    values["residual"] = TensorSpec.contiguous((2, rows // 2, n), dtype)
    transposed = chain[0].semantics.transposed
    values["weight"] = TensorSpec.contiguous((n, k) if transposed else (k, n), weight or dtype)
    constants = {v: Constant(v) for v in ("bias", "gamma", "beta", "weight")}
    values["other"] = values["residual"]
    if not computed:
        return OperatorGraph(tuple(chain), values, ("x", "residual"), tuple(outputs), constants)
    before = [Operator(made, Activation(unary(Op.TANH)), (of,), (made,)) for of, made in _MADE]
    return OperatorGraph((*before, *chain), values, ("y", "other"), tuple(outputs), constants)


def inputs(of: OperatorGraph) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    names = (*of.inputs, *of.constants)
    return {n: torch.randn(of.values[n].shape, generator=g).to(of.values[n].dtype) for n in names}


def launch(call: KernelCall, of: OperatorGraph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    source = render(call.spec)
    path = build([source], EMULATED, headers=header_folder(EMULATED))[source.symbol]
    results = {v: torch.full(of.values[v].shape, float("nan"), dtype=of.values[v].dtype) for v in call.outputs}
    known = {**values, **results}
    tensors = materialized(call.tensors, known)
    workspace = torch.full((call.workspace_bytes // 4 + 4,), float("nan"))
    emulator.run(path, source.symbol, tensors, call.extents, workspace=workspace)
    return results


def compare(got: Mapping[str, Tensor], match: GemmMatch, values: Mapping[str, Tensor]) -> None:
    exact, eager = evaluate(match.group, values, torch.float64), evaluate(match.group, values)
    for name, result in got.items():
        bound = 2 * error(eager[name], exact[name]) + FLOOR[DType(dict(_NAMES)[result.dtype])]
        assert error(result, exact[name]) <= bound


_NAMES = ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16"))


@pytest.mark.parametrize(
    ("chain", "outputs", "dtype", "weight"),
    [
        (MLP_LAYER, ["active"], torch.float32, None),
        (POST_NORM, ["total", "normal"], torch.float16, None),
        ([KN, ADD_BIAS], ["biased"], torch.float16, None),
        ([GEMM], ["product"], torch.float32, torch.bfloat16),
    ],
    ids=["mlp", "post_norm", "k_by_n", "narrow_weight"],
)
def test_family_runs_a_group(
    chain: list[Operator], outputs: list[str], dtype: torch.dtype, weight: torch.dtype | None
) -> None:
    of = graph(chain, outputs, dtype, weight=weight)
    match = FAMILY.match(of.group(chain), EMULATED)
    assert match is not None
    choices = OURS.space(match, EMULATED)
    assert 1 <= len(choices) <= 8 and len(set(choices)) == len(choices)
    costs = [OURS.cost(match, c, EMULATED).seconds(EMULATED) for c in choices]
    assert all(c > 0 for c in costs)
    call = OURS.call(match, choices[0], EMULATED, 4)
    assert isinstance(call, KernelCall) and call.outputs == tuple(outputs)
    # The weight of a linear layer is used where it is; every other one is packed.
    assert isinstance(call.tensors[1], Packed) == (chain[0] is KN or weight is not None)
    values = inputs(of)
    compare(launch(call, of, values), match, {n: v.to(dtype) for n, v in values.items()})


@dataclass(frozen=True)
class GatedCase(Gated):
    target: Target = EMULATED

    def match(self, rows: int) -> GemmMatch:
        graph = self.graph(rows)
        match = GemmFamily().match(graph.group(graph.compute), self.target)
        assert match is not None and (match.n, match.products) == (self.n, self.products)
        return match


@pytest.mark.parametrize(
    "case",
    [
        GatedCase(40, 33),
        GatedCase(100, 72, dtype=torch.float16),
        GatedCase(33, 40, dtype=torch.bfloat16, transposed=False),
        GatedCase(17, 24, products=4, dtype=torch.float16),
        GatedCase(40, 36, target=dataclasses.replace(EMULATED, features=EMULATED.features | {TF32})),
    ],
    ids=str,
)
def test_products_that_meet_in_the_epilogue_are_one_kernel(case: GatedCase) -> None:
    choices = CudaGemm().space(case.match(4), case.target)
    assert choices and all(isinstance(c, CudaGatedGemmParameters) and not c.separate for c in choices)
    g = torch.Generator().manual_seed(0)
    for rows in (1, 35, 130):
        match = case.match(rows)
        values = {v: torch.randn(match.group.graph.values[v].shape, generator=g) for v in ("x", "weight")}
        values = {v: t.to(case.dtype) for v, t in values.items()}
        exact, eager = (evaluate(match.group, values, precision) for precision in (torch.float64, None))
        for choice in choices[:2]:
            call = CudaGemm().call(match, choice, case.target, 2)
            got = launch(call, match.group.graph, values)
            for name, expected in exact.items():
                bound = 2 * error(eager[name], expected) + FLOOR[STORAGE[case.dtype]]
                assert error(got[name], expected) <= (2 * TF32_ERROR if TF32 in case.target.features else bound)
    assert CublasGemm().space(match, case.target) == []


def test_packed_weights_share_memory_where_they_can() -> None:
    weight = torch.randn(6, 4)
    (same,), (rows,) = gemm_cuda.RowLayout(True, F32).pack(weight), gemm_cuda.RowLayout(False, BF16).pack(weight)
    assert same.data_ptr() == weight.data_ptr()
    assert torch.equal(rows, weight.t().bfloat16())
    assert rows.is_contiguous()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([GEMM], CublasParameters(bias=False)),
        ([GEMM, ADD_BIAS], CublasParameters(bias=True)),
        ([GEMM, ADD_BIAS, RELU], CublasParameters(bias=True, activation=Op.RELU)),
        ([GEMM, ADD_BIAS, TANH_GELU], CublasParameters(bias=True, activation=Op.GELU_TANH)),
        ([GEMM, ADD_ONLY], CublasParameters(bias=False, residual=True)),
    ],
    ids=lambda v: "-".join(op.name for op in v) if isinstance(v, list) else "",
)
def test_library_is_a_choice_where_it_has_the_epilogue(
    chain: list[Operator], expected: CublasParameters, transposed: bool
) -> None:
    chain = [dataclasses.replace(chain[0], semantics=Gemm(transposed)), *chain[1:]]
    of = graph(chain, [chain[-1].output], torch.float32)
    match = FAMILY.match(of.group(chain), EMULATED)
    assert match is not None
    assert CublasGemm().space(match, EMULATED) == [expected]
    assert CublasGemm().cost(match, expected, EMULATED).seconds(EMULATED) > 0
    call = CublasGemm().call(match, expected, EMULATED, 4)
    assert isinstance(call, LibraryCall) and call.outputs == of.outputs
    values = inputs(of)
    out = torch.full(of.values[call.outputs[0]].shape, float("nan"))
    pickle.loads(pickle.dumps(call.run))(*(values[v] for v in call.inputs), out)
    compare({call.outputs[0]: out}, match, values)


def test_library_does_not_pretend() -> None:
    """No exact GELU, no norm, not two outputs."""
    for chain, outputs in (
        (MLP_LAYER, ["active"]),
        (POST_NORM, ["normal"]),
        ([GEMM, ADD_BIAS, RELU], ["biased", "active"]),
    ):
        of = graph(chain, outputs)
        match = FAMILY.match(of.group(chain), EMULATED)
        assert match is not None and not CublasGemm().space(match, EMULATED)


def test_family_refuses_a_weight_that_is_wider_than_its_input() -> None:
    of = graph([GEMM], ["product"], torch.bfloat16, weight=torch.float32)
    assert not list(partition.kernels(of.group([GEMM]), IMPLEMENTATIONS, EMULATED, offline=True))
    half = graph([GEMM], ["product"])
    cpu = dataclasses.replace(EMULATED, kind="cpu", arch="portable", features=frozenset())
    assert FAMILY.match(half.group([GEMM]), cpu) is None


def test_tf32_follows_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact by default; both of PyTorch's settings allow TF32."""
    assert TF32 not in named_target("cuda:emulated").features
    for matmul in (SimpleNamespace(fp32_precision="tf32"), SimpleNamespace(allow_tf32=True)):
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
        assert TF32 in named_target("cuda:emulated").features


def defaults(target: Target, chain: Sequence[Operator], dtype: torch.dtype, sizes: tuple[int, int, int]) -> Tile:
    of = graph(chain, [chain[-1].output], dtype, sizes)
    match = FAMILY.match(of.group(chain), target)
    assert match is not None
    choice = OURS.space(match, target)[0]
    assert choice.tensor_cores == (dtype is not torch.float32 or TF32 in target.features)
    assert choice.shared_bytes <= target.shared_bytes
    return choice.tile


def test_tiles_fill_the_machine() -> None:
    """Large tiles for large products, small or split ones where there would be few blocks, exact fp32 by default."""
    for arch in ("sm_80", "sm_89", "sm_90a"):
        target = cuda_target(arch)
        large = defaults(target, [GEMM], torch.float16, (8192, 8192, 8192))
        assert large.bm * large.bn >= 128 * 128 and large.split == 1
        for n, k in ((768, 768), (768, 3072)):
            small = defaults(target, [GEMM], torch.float16, (128, n, k))
            blocks = -(-128 // small.bm) * -(-n // small.bn) * small.split
            assert blocks >= target.cores // 2
        one = defaults(target, [GEMM], torch.float16, (2, 768, 3072))
        assert one.bm <= 32 and one.split > 1
        defaults(dataclasses.replace(target, features=frozenset({TF32})), [GEMM], torch.float32, (512, 768, 768))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
def test_no_registers_spill(arch: str, compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]) -> None:
    """What is chosen for real sizes compiles for every architecture and keeps its sums in registers."""
    target = cuda_target(arch)
    rounding = dataclasses.replace(target, features=frozenset({TF32}))
    cases = [
        (target, POST_NORM, torch.float16, (4096, 768, 3072)),
        (target, MLP_LAYER, torch.float32, (4096, 3072, 768)),
        (rounding, MLP_LAYER, torch.float32, (4096, 3072, 768)),
        (target, MLP_LAYER, torch.bfloat16, (128, 3072, 768)),
    ]
    # The choices for both kinds of sm_90 are the same.
    for machine, chain, dtype, sizes in cases[: 1 if arch == "sm_90" else None]:
        of = graph(chain, [chain[-1].output], dtype, sizes)
        match = FAMILY.match(of.group(chain), machine)
        assert match is not None
        call = OURS.call(match, OURS.space(match, machine)[0], machine, 1)
        assert isinstance(call, KernelCall)
        for kernel in compile_cuda(call.spec, arch):
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
            assert kernel.registers <= call.spec.parameters.tile.registers(call.spec.parameters.dtype.bytes)


PRODUCTS = {"fp16": (F16, True), "tf32": (F32, True), "exact": (F32, False)}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers_fit(arch: str, product: str) -> None:
    """Every tile has room for its sums and for as many again, and its blocks for their registers."""
    dtype, tensor_cores = PRODUCTS[product]
    tiles = gemm_cuda.legal_tiles(768, 3072, dtype, tensor_cores, cuda_target(arch))
    assert len({dataclasses.replace(tile, split=1) for tile in tiles}) >= 48
    for tile in tiles:
        sums, registers = tile.bm * tile.bn // tile.threads, tile.registers(dtype.bytes)
        assert min(2 * sums, 255) <= registers <= 255
        assert tile.blocks(dtype.bytes) * tile.threads * registers <= 65536
        # More registers only where shared memory stops more blocks.
        if registers > 128 and sums <= 64:
            assert (tile.blocks(dtype.bytes) + 1) * (tile.shared_bytes(dtype.bytes) + 1024) > 228 << 10


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_tile_spills(
    arch: str, product: str, compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]
) -> None:
    """The tiles with the most sums a thread, any two in every combination of tile, product, architecture (with shallow
    pipelines on one, with deep ones on the other) and an epilogue of their own or in another kernel;
    ``benchmarks/gpu_kernels.py`` compiles them all."""
    dtype, tensor_cores = PRODUCTS[product]
    tiles = [t for t in gemm_cuda.legal_tiles(768, 3072, dtype, tensor_cores, cuda_target(arch)) if t.split <= 2]
    by_shape: dict[tuple[int, ...], list[Tile]] = {}
    for tile in tiles:
        if tile.bm * tile.bn >= 64 * tile.threads:
            by_shape.setdefault((tile.bm, tile.bn, tile.split), []).append(tile)
    sides = list(dict.fromkeys(shape[:2] for shape in by_shape))
    # A tile is on one architecture for one product, and on the other one for the next.
    first = (list(PRODUCTS).index(product) + (arch == "sm_80")) % 2
    splits = {side: 1 + (i // 2 + (arch == "sm_80")) % 2 for i, side in enumerate(sides) if i % 2 == first}
    chosen = [by_shape[(*side, split)][0 if arch == "sm_80" else -1] for side, split in splits.items()]
    assert len(chosen) >= len(sides) // 2 > 0
    expression, _ = EPILOGUES["bias_gelu"]
    operands = [dataclasses.replace(_ACCESS["row"], dtype=dtype)]
    specs = [
        KernelSpec(
            "gemm",
            "cuda/gemm.cu.j2",
            gemm_cuda.parameters(768, 3072, dtype, expression, operands, [dtype], tile, tensor_cores),
        )
        for tile in chosen
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(lambda spec: compile_cuda(spec, arch), specs))
    for spec, kernels in zip(specs, reports, strict=True):
        for kernel in kernels:
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, (spec.parameters.tile, kernel)


# CUTLASS.


def _cutlass(chain: Sequence[Operator], **options: object) -> Sequence[CutlassParameters]:
    of = graph(chain, [chain[-1].output], computed=True, **options)  # type: ignore[arg-type]
    target = cuda_target("sm_90a")
    match = FAMILY.match(of.group(chain), target)
    assert match is not None
    choices = CUTLASS.offline_space(match, target)
    assert not CUTLASS.space(match, target)
    for choice in choices:
        assert CUTLASS.cost(match, choice, target).seconds(target) > 0
        call = CUTLASS.call(match, choice, target, 1)
        assert isinstance(call, KernelCall) and call.outputs == match.program.outputs
        assert len(call.tensors) == 3 + (choice.bias is not None) + choice.residual
        assert isinstance(call.extents, CutlassExtents)
    return choices


without_cutlass = pytest.mark.skipif(
    gemm_cutlass.include_folder() is None, reason="CUTLASS's headers (nvidia-cutlass) are not installed"
)


@without_cutlass
def test_cutlass_is_offered_where_it_can_run() -> None:
    assert {c.activation for c in _cutlass(MLP_LAYER)} == {Op.GELU}
    assert {(c.bias, c.residual) for c in _cutlass([GEMM, ADD_BIAS, RESIDUAL])} == {(F16, True)}
    assert {c.bias for c in _cutlass([GEMM], dtype=torch.bfloat16)} == {None}
    # A norm; rows that are no multiple of 16 bytes; fp32; another architecture; a caller's tensor may start anywhere.
    assert not _cutlass(POST_NORM)
    assert not _cutlass([GEMM], sizes=(42, 100, 64)) and not _cutlass([GEMM], sizes=(42, 96, 60))
    assert not _cutlass([GEMM], dtype=torch.float32)
    of = graph([GEMM], ["product"])
    for target in (cuda_target("sm_80"), cuda_target("sm_90a"), EMULATED):
        match = FAMILY.match(of.group([GEMM]), target)
        assert match is not None and not CUTLASS.offline_space(match, target)


@without_cutlass
def test_cutlass_source_names_its_version_and_headers() -> None:
    choices = _cutlass([GEMM, ADD_BIAS, RESIDUAL])
    sources = [render(KernelSpec("gemm", "cuda/gemm_cutlass.cu.j2", choice)) for choice in choices]
    assert len({source.symbol for source in sources}) == len(choices) > 1
    for source in sources:
        assert f"version=({gemm_cutlass.version()[0]}," in source.text.splitlines()[1]
        assert source.includes == (gemm_cutlass.include_folder(),)


@without_cutlass
@pytest.mark.skipif("FUSER_SLOW_TESTS" not in os.environ, reason="takes minutes; set FUSER_SLOW_TESTS=1")
def test_cutlass_compiles(tmp_path: Path) -> None:
    choice = _cutlass(MLP_LAYER)[0]
    source = render(KernelSpec("gemm", "cuda/gemm_cutlass.cu.j2", choice))
    target = cuda_target("sm_90a")
    built = build([source], target, headers=header_folder(target), cache=KernelCache(tmp_path / "kernels"))
    assert built[source.symbol].stat().st_size > 0
