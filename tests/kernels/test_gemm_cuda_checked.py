"""CUDA products in the checking mode of the emulator: every dtype, every way to load a tile and to finish a sum."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Gemm, Norm, Residual
from fuser.ir.target import TF32, Target, emulated_target
from fuser.kernels.base import KernelCall
from fuser.kernels.gemm import GemmFamily
from fuser.kernels.gemm_cuda import CudaGemm
from fuser.runtime import emulator
from fuser.runtime.build import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the checking mode needs g++")
FAMILY = GemmFamily()
EXACT = emulated_target()
WITH_TF32 = dataclasses.replace(EXACT, features=EXACT.features | {TF32})
# What rounding of the factors adds to an element, and storing the result.
TOLERANCE = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 1e-6}
TF32_TOLERANCE = 2.0**-10

GEMM = Operator("dense", Gemm(transposed=True), ("x", "weight"), ("product",))
GELU = Operator("gelu", Activation(unary(Op.GELU)), ("product",), ("active",))
ADD = Operator("add", Residual(), ("product", "residual"), ("total",))
NORM = Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("normal",))
ELEMENTS, ROWS = (GEMM, GELU), (GEMM, ADD, NORM)


@dataclass(frozen=True)
class Case:
    """A product with N columns and sums of K terms, for tiles of ``bn`` columns, through ``stages`` buffers, by
    ``split`` blocks a tile; ``shift`` elements in front of the input in its memory."""

    dtype: torch.dtype
    chain: tuple[Operator, ...]
    n: int
    k: int
    bn: int = 64
    stages: int = 2
    split: int = 1
    shift: int = 0
    target: Target = EXACT

    def __str__(self) -> str:
        kind = "tf32" if self.target is WITH_TF32 else str(self.dtype).removeprefix("torch.")
        return f"{kind}-{self.chain[-1].name}-{self.n}x{self.k}-{self.bn}x{self.stages}x{self.split}-{self.shift}"

    @property
    def graph(self) -> OperatorGraph:
        rows = 19
        shapes = {"x": (rows, self.k), "weight": (self.n, self.k), "gamma": (self.n,), "beta": (self.n,)}
        shapes |= dict.fromkeys(("product", "active", "residual", "total", "normal"), (rows, self.n))
        values = {name: TensorSpec.contiguous(shape, self.dtype) for name, shape in shapes.items()}
        constants = {name: Constant(name) for name in ("weight", "gamma", "beta")}
        return OperatorGraph(self.chain, values, ("x", "residual"), (self.chain[-1].output,), constants)

    @property
    def call(self) -> KernelCall:
        graph = self.graph
        match = FAMILY.match(graph.group(self.chain), self.target)
        assert match is not None
        choice = CudaGemm().space(match, self.target)[0]
        sizes = {"bm": 16, "bn": self.bn, "bk": 64 // choice.dtype.bytes, "warps_m": 1, "warps_n": 4}
        tile = dataclasses.replace(choice.tile, **sizes, stages=self.stages, split=self.split)
        call = CudaGemm().call(match, dataclasses.replace(choice, tile=tile), self.target, 4)
        assert isinstance(call, KernelCall)
        return call


CASES = [
    Case(torch.float16, ELEMENTS, 77, 136),
    Case(torch.float16, ELEMENTS, 77, 200, stages=3, split=3, shift=1),
    # Rows that fit into a tile, that a second kernel reads again, and that several blocks have summed.
    Case(torch.bfloat16, ROWS, 50, 136, stages=3),
    Case(torch.bfloat16, ROWS, 1100, 40, bn=256),
    Case(torch.float16, ROWS, 101, 136, stages=3, split=2, shift=8),
    Case(torch.float32, ELEMENTS, 77, 131, stages=4),
    Case(torch.float32, ROWS, 70, 96, split=2),
    Case(torch.float32, ELEMENTS, 77, 132, stages=3, target=WITH_TF32),
    Case(torch.float32, ROWS, 50, 131, target=WITH_TF32),
]


@pytest.fixture(scope="module", autouse=True)
def _checked() -> Iterator[None]:
    """All kernels of this file, built side by side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSER_EMULATOR_CHECKED", "1")
        build([render(case.call.spec) for case in CASES], EXACT, headers=header_folder(EXACT))
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_race_and_no_access_out_of_bounds(case: Case) -> None:
    graph, call = case.graph, case.call
    generator = torch.Generator().manual_seed(0)

    def made(name: str) -> Tensor:
        spec = graph.values[name]
        values = torch.randn(spec.shape, generator=generator) / (case.k**0.5 if name == "weight" else 1)
        shift = case.shift if name == "x" else 0
        room = torch.empty(shift + values.numel(), dtype=spec.dtype)
        return room[shift:].view(spec.shape).copy_(values)

    values = {name: made(name) for name in (*graph.inputs, *graph.constants)}
    (name,) = call.outputs
    out = torch.full(graph.values[name].shape, torch.nan, dtype=case.dtype)
    tensors = [out if ref == name else values[str(ref)] for ref in call.tensors]
    path = build([render(call.spec)], EXACT, headers=header_folder(EXACT))[call.spec.symbol]
    workspace = torch.full((call.workspace_bytes // 4 + 4,), torch.nan)
    emulator.run(path, call.spec.symbol, tensors, call.extents, workspace=workspace)
    match = FAMILY.match(graph.group(case.chain), case.target)
    assert match is not None
    exact = evaluate(match.group, values, torch.float64)[name]
    tolerance = TF32_TOLERANCE if case.target is WITH_TF32 else TOLERANCE[case.dtype]
    assert float((out.double() - exact).norm() / exact.norm()) <= tolerance
