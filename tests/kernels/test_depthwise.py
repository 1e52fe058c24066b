"""The `depthwise` family on CPUs and on the emulator: sizes, layouts, types and epilogues against float64; what it
declines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Depthwise, Norm, Residual
from fuser.ir.target import Isa, Target, emulated_target
from fuser.kernels.base import KernelCall, materialized
from fuser.kernels.depthwise import CpuDepthwise, CudaDepthwise, DepthwiseFamily, DepthwiseMatch
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

FAMILY = DepthwiseFamily()
BF16, F16 = torch.bfloat16, torch.float16
SAME = Depthwise((1, 1), (1, 1))
# Sums of up to 49 products; and the rounding of the result to its dtype.
TOLERANCE = {torch.float32: 2.0**-19, BF16: 2.0**-7, F16: 2.0**-10}


@dataclass(frozen=True)
class Case:
    """x (B, H, W, C), with ``gap`` elements between its pixels; ``norm`` takes the place of GELU and a residual."""

    grid: tuple[int, int, int, int]
    how: Depthwise = SAME
    kernel: tuple[int, int] = (3, 3)
    gap: int = 0
    norm: bool = False
    plain: bool = False
    dtype: torch.dtype = torch.float32

    def values(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.grid[3])
        batch, height, width, channels = self.grid

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        x = normal(batch, height, width, channels + self.gap)[..., :channels]
        weight = normal(channels, 1, *self.kernel)
        out = self.how.evaluate(x.float(), weight.float())[0].shape
        rows = {"residual": normal(*out), "scale": normal(channels), "shift": normal(channels)}
        return {"x": x, "weight": weight, "bias": normal(channels), **rows}

    def graph(self, **changed: TensorSpec) -> OperatorGraph:
        tensors = self.values()
        values = {name: TensorSpec(tuple(t.shape), t.dtype, t.stride()) for name, t in tensors.items()}
        out = TensorSpec.contiguous(tensors["residual"].shape, self.dtype)
        values |= dict.fromkeys(("sums", "biased", "active", "out"), out) | changed
        operators = [Operator("sums", self.how, ("x", "weight"), ("sums",))]
        if not self.plain:
            operators.append(Operator("biased", Bias(), ("sums", "bias"), ("biased",)))
        if self.norm:
            operators.append(Operator("out", Norm(layer_norm(1e-5)), ("biased", "scale", "shift"), ("out",)))
        elif not self.plain:
            operators.append(Operator("active", Activation(unary(Op.GELU)), ("biased",), ("active",)))
            operators.append(Operator("out", Residual(), ("active", "residual"), ("out",)))
        constants = {name: Constant(name) for name in ("weight", "bias", "scale", "shift")}
        return OperatorGraph(tuple(operators), values, ("x", "residual"), (operators[-1].output,), constants)


ELEMENTWISE = [
    Case((2, 7, 5, 40)),
    Case((1, 4, 3, 600), gap=8),
    Case((1, 1, 1, 13)),
    Case((2, 9, 8, 24), Depthwise((2, 1), (0, 2), (1, 2)), (2, 3), gap=3),
    Case((1, 8, 8, 17), Depthwise((1, 1), (3, 3)), (7, 7), plain=True),
    Case((1, 6, 9, 21), dtype=BF16),
]
NORMED = [Case((1, 5, 5, 520), norm=True), Case((2, 3, 4, 12), norm=True, dtype=BF16)]
ON_CPU = [*ELEMENTWISE, *NORMED]


def match(case: Case, target: Target) -> DepthwiseMatch:
    graph = case.graph()
    found = FAMILY.match(graph.group(graph.operators), target)
    assert found is not None
    return found


def check(case: Case, run: Callable[[KernelCall, list[Tensor]], int], target: Target) -> None:
    graph, tensors = case.graph(), case.values()
    kernel = CpuDepthwise() if target.kind == "cpu" else CudaDepthwise()
    found = match(case, target)
    for parameters in kernel.space(found, target):
        call = kernel.call(found, parameters, target, 2)
        (output,) = graph.outputs
        out = torch.full(graph.values[output].shape, torch.nan, dtype=case.dtype)
        assert run(call, materialized(call.tensors, {**tensors, output: out})) == 0
        exact = evaluate(graph, tensors, torch.float64)[output]
        # What is summed is of that size, whatever the sum.
        reach = float(exact.abs().amax()) + 1
        assert float((out.double() - exact).abs().amax()) <= TOLERANCE[case.dtype] * reach


@pytest.mark.parametrize(
    ("isa", "case"), [*((None, case) for case in ON_CPU), *((Isa.PORTABLE, case) for case in ON_CPU[::3])], ids=str
)
def test_a_convolution_on_a_cpu(isa: Isa | None, case: Case, paths: Mapping[tuple[Isa | None, str], Path]) -> None:
    def run(call: KernelCall, tensors: list[Tensor]) -> int:
        args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2)
        return load(paths[isa, call.spec.symbol], call.spec.symbol).status(args)

    check(case, run, cpu_target(isa))


@pytest.fixture(scope="module")
def paths() -> Mapping[tuple[Isa | None, str], Path]:
    """Every kernel of this file for CPUs, built in one run of ninja for each instruction set."""
    found: dict[tuple[Isa | None, str], Path] = {}
    for isa, cases in ((None, ON_CPU), (Isa.PORTABLE, ON_CPU[::3])):
        target, kernel = cpu_target(isa), CpuDepthwise()
        matches = [match(case, target) for case in cases]
        specs = {kernel.call(m, p, target, 2).spec for m in matches for p in kernel.space(m, target)}
        built = build([render(spec) for spec in specs], target, headers=header_folder(target))
        found |= {(isa, symbol): path for symbol, path in built.items()}
    return found


@pytest.mark.parametrize("case", [*ELEMENTWISE, dataclasses.replace(ELEMENTWISE[0], dtype=F16)], ids=str)
def test_a_convolution_on_a_gpu(case: Case, run_cuda: Callable[..., int]) -> None:
    check(case, lambda call, tensors: run_cuda(call.spec, tensors, call.extents), emulated_target())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_gpu_keeps_a_convolution_in_registers(arch: str, compile_cuda: Callable[..., tuple[object, ...]]) -> None:
    found, kernel = match(ELEMENTWISE[0], emulated_target()), CudaDepthwise()
    call = kernel.call(found, *kernel.space(found, emulated_target()), emulated_target(), 1)
    for resources in compile_cuda(call.spec, arch):
        assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)


def test_a_gpu_leaves_norms_of_channels_to_another_kernel() -> None:
    assert CudaDepthwise().space(match(NORMED[0], emulated_target()), emulated_target()) == []


def test_channels_apart_foreign_types_and_weights_at_run_time_are_declined() -> None:
    case = ELEMENTWISE[0]
    graph = case.graph()
    x = graph.values["x"]
    changed = [
        case.graph(x=TensorSpec(x.shape, x.dtype, (*x.strides[:-1], 2))),
        case.graph(x=dataclasses.replace(x, dtype=torch.float64)),
        dataclasses.replace(graph, inputs=(*graph.inputs, "weight"), constants={"bias": Constant("bias")}),
        # Sums that are seen as other rows.
        case.graph(biased=TensorSpec.contiguous((2, 7, 10, 20), x.dtype)),
    ]
    for other in changed:
        assert FAMILY.match(other.group(other.operators), cpu_target()) is None


def test_kernels_of_many_taps_are_pytorchs() -> None:
    case = Case((1, 12, 12, 8), Depthwise((1, 1), (6, 6)), (13, 13))
    assert CpuDepthwise().space(match(case, cpu_target()), cpu_target()) == []
