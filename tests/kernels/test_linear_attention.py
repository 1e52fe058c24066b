"""The `linear_attention` and `features` families on CPUs and on the emulator: rules, sizes and types, in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.operators import Features, LinearAttention
from fuser.ir.target import Isa, Target, emulated_target
from fuser.kernels.base import KernelCall, materialized
from fuser.kernels.linear_attention import (
    CpuFeatures,
    CpuLinearAttention,
    FeaturesFamily,
    LinearAttentionFamily,
    LinearAttentionMatch,
)
from fuser.kernels.linear_attention_cuda import CudaFeatures, CudaLinearAttention
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-6, BF16: 2.0**-8}
"""Sums of some tens of terms in fp32, and one rounding of the output."""


@dataclass(frozen=True)
class Case:
    """q (B, H, S, D) as a slice of tokens that hold all heads; ``decays`` is 0, 1 or D."""

    rule: Recurrence
    sizes: tuple[int, int, int, int, int, int]
    decays: int = 0
    resumed: bool = False
    kept: bool = True
    dtype: torch.dtype = F32

    def graph(self) -> OperatorGraph:
        batch, heads, kv_heads, tokens, width, columns = self.sizes
        row = heads * width + 3
        queries = tokens if self.rule.causal else tokens + 2
        values = {
            "q": TensorSpec((batch, heads, queries, width), self.dtype, (queries * row, width, row, 1)),
            "k": TensorSpec.contiguous((batch, kv_heads, tokens, width), self.dtype),
            "v": TensorSpec.contiguous((batch, kv_heads, tokens, columns), self.dtype),
        }
        if self.decays:
            values["decay"] = TensorSpec.contiguous((batch, kv_heads, tokens, self.decays), self.dtype)
        if self.rule.delta:
            values["beta"] = TensorSpec.contiguous((batch, kv_heads, tokens, 1), self.dtype)
        state = TensorSpec.contiguous((batch, kv_heads, width, columns + self.rule.more_columns), F32)
        if self.resumed:
            values["first"] = state
        inputs = tuple(values)
        values["out"] = TensorSpec.contiguous((batch, heads, queries, columns), self.dtype)
        if self.kept:
            values["last"] = state
        outputs = ("out", "last")[: 1 + self.kept]
        semantics = LinearAttention(self.rule, self.resumed, self.kept)
        return OperatorGraph((Operator("out", semantics, inputs, outputs),), values, inputs, outputs, {})


def rules() -> list[Case]:
    sizes = itertools.cycle([(2, 4, 2, 35, 16, 24), (1, 3, 3, 33, 17, 5), (2, 2, 2, 3, 7, 70), (1, 2, 1, 64, 64, 64)])
    found = []
    for decayed, delta, floor in itertools.product((0, 1, 2), (False, True), (None, 0.05)):
        if delta and floor:
            continue
        for resumed in (False, True):
            shape = next(sizes)
            rule = Recurrence(0.3, True, bool(decayed), delta, floor)
            found.append(Case(rule, shape, (0, 1, shape[4])[decayed], resumed, kept=resumed or not delta))
    found += [Case(Recurrence(0.3, False, floor=floor), next(sizes), 0, floor is None) for floor in (None, 0.05)]
    return found


RULES = rules()
CASES = [*RULES, *(dataclasses.replace(case, dtype=BF16) for case in RULES[1::5])]
PORTABLE = RULES[::6]


def tensors_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.sizes[3])
    graph, found = case.graph(), {}
    for name in graph.inputs:
        spec = graph.values[name]
        memory = torch.rand(spec.extent, generator=generator)
        memory = {"decay": -memory, "v": memory - 0.5, "k": memory / spec.shape[-1] ** 0.5}.get(name, memory)
        found[name] = memory.to(spec.dtype).as_strided(spec.shape, spec.strides)
    return found


def match(case: Case, target: Target) -> LinearAttentionMatch:
    graph = case.graph()
    found = LinearAttentionFamily().match(graph.group(graph.operators), target)
    assert found is not None
    return found


def call_of(case: Case, target: Target) -> KernelCall:
    """The launch with one of the choices of parameters, of which the cases together have all."""
    found, kernel = match(case, target), CpuLinearAttention()
    choices = kernel.space(found, target)
    return kernel.call(found, choices[CASES.index(case) % len(choices)], target, 2)


@pytest.fixture(scope="module")
def paths() -> Mapping[tuple[Isa | None, str], Path]:
    """Every kernel of this file, built in one run of ninja for each instruction set."""
    found: dict[tuple[Isa | None, str], Path] = {}
    for isa, cases in ((None, CASES), (Isa.PORTABLE, PORTABLE)):
        target = cpu_target(isa)
        specs = {call_of(case, target).spec for case in cases}
        specs |= {feature_call(*case, target)[1].spec for case in FEATURES[:: 1 if isa is None else 2]}
        built = build([render(spec) for spec in specs], target, headers=header_folder(target))
        found |= {(isa, symbol): path for symbol, path in built.items()}
    return found


def run(call: KernelCall, tensors: Mapping[str, Tensor], path: Path) -> None:
    # What a kernel reads before it has written it is not a number.
    workspace = torch.full((call.workspace_bytes + 64,), 255, dtype=torch.uint8)
    start = -(-workspace.data_ptr() // 64) * 64
    given = materialized(call.tensors, tensors)
    args = KernelArgs.pack([t.data_ptr() for t in given], call.extents, 2, start)
    assert load(path, call.spec.symbol).status(args) == 0
    assert bool((workspace[start - workspace.data_ptr() + call.workspace_bytes :] == 255).all())


@pytest.mark.parametrize(
    ("isa", "case"), [*((None, case) for case in CASES), *((Isa.PORTABLE, case) for case in PORTABLE)], ids=str
)
def test_a_recurrence(isa: Isa | None, case: Case, paths: Mapping[tuple[Isa | None, str], Path]) -> None:
    graph, tensors = case.graph(), tensors_of(case)
    exact = evaluate(graph, tensors, torch.float64)
    call = call_of(case, cpu_target(isa))
    specs = {name: graph.values[name] for name in graph.outputs}
    outputs = {name: torch.full(spec.shape, torch.nan, dtype=spec.dtype) for name, spec in specs.items()}
    run(call, tensors | outputs, paths[isa, call.spec.symbol])
    for name, out in outputs.items():
        error = (out.double() - exact[name]).norm() / exact[name].norm()
        assert float(error) < TOLERANCE[out.dtype]


ON_GPU = [*RULES[::3], RULES[-1], *(dataclasses.replace(case, dtype=BF16) for case in RULES[1::7])]


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_a_recurrence_on_a_gpu(case: Case, run_cuda: Callable[..., int]) -> None:
    graph, tensors, target = case.graph(), tensors_of(case), emulated_target()
    exact = evaluate(graph, tensors, torch.float64)
    found, kernel = match(case, target), CudaLinearAttention()
    call = kernel.call(found, *kernel.space(found, target), target, 1)
    specs = {name: graph.values[name] for name in graph.outputs}
    outputs = {name: torch.full(spec.shape, torch.nan, dtype=spec.dtype) for name, spec in specs.items()}
    given = materialized(call.tensors, tensors | outputs)
    assert run_cuda(call.spec, given, call.extents) == 0
    for name, out in outputs.items():
        error = (out.double() - exact[name]).norm() / exact[name].norm()
        assert float(error) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_a_gpu_keeps_the_state_in_registers(delta: bool, arch: str, compile_cuda: Callable[..., Any]) -> None:
    rule = Recurrence(0.125, decay=True, delta=delta, floor=None if delta else 1e-3)
    case, target, kernel = Case(rule, (1, 2, 1, 64, 64, 64), 64, resumed=True), emulated_target(), CudaLinearAttention()
    found = match(case, target)
    (parameters,) = kernel.space(found, target)
    for resources in compile_cuda(kernel.call(found, parameters, target, 1).spec, arch):
        assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)


def test_a_state_that_no_gpu_has_registers_for_is_declined() -> None:
    target = emulated_target()
    wide = Case(Recurrence(1.0, delta=True), (1, 1, 1, 8, 129, 8))
    assert CudaLinearAttention().space(match(wide, target), target) == []


def test_narrow_blocks_of_columns_occupy_cores_that_heads_leave_idle() -> None:
    target = dataclasses.replace(cpu_target(), cores=8)
    sizes = (1, 2, 2, 64, 64, 4 * target.vector_lanes)
    found = match(Case(Recurrence(1.0), sizes), target)
    assert CpuLinearAttention().space(found, target)[0].vectors == 1
    many = match(Case(Recurrence(1.0), (8, *sizes[1:])), target)
    assert CpuLinearAttention().space(many, target)[0].vectors == 4


def test_what_no_kernel_runs_is_declined() -> None:
    target, case = cpu_target(), RULES[0]

    def declined(**changed: TensorSpec) -> bool:
        graph = case.graph()
        graph = dataclasses.replace(graph, values={**graph.values, **changed})
        return LinearAttentionFamily().match(graph.group(graph.operators), target) is None

    values = case.graph().values
    assert not declined()
    assert declined(v=dataclasses.replace(values["v"], strides=(1, 2, 4, 8)))
    assert declined(k=dataclasses.replace(values["k"], dtype=BF16))
    assert declined(last=dataclasses.replace(values["last"], dtype=BF16))
    assert declined(q=dataclasses.replace(values["q"], dtype=torch.float64))
    wide = (2, 4, 35, 513)
    assert declined(q=TensorSpec.contiguous(wide, F32))


# ---- features

FEATURES = [
    (FeatureMap.FAVOR_QUERIES, 16, 64, F32),
    (FeatureMap.FAVOR_QUERIES, 5, 21, BF16),
    (FeatureMap.FAVOR_KEYS, 16, 64, BF16),
    (FeatureMap.FAVOR_KEYS, 7, 9, F32),
    (FeatureMap.RELU, 16, 80, F32),
    (FeatureMap.PRODUCT, 20, 70, F32),
]
OF_GPU = [
    (FeatureMap.FAVOR_QUERIES, 36, 300, F32),
    FEATURES[1],
    FEATURES[2],
    FEATURES[3],
    (FeatureMap.RELU, 7, 33, BF16),
    FEATURES[5],
]
ROWS = 131


def feature_call(
    kind: FeatureMap, width: int, count: int, dtype: torch.dtype, target: Target
) -> tuple[OperatorGraph, KernelCall]:
    values = {
        "x": TensorSpec((2, 3, ROWS, width), dtype, (ROWS * 3 * width, width, 3 * width, 1)),
        "directions": TensorSpec.contiguous((3, count, width), F32),
        "out": TensorSpec.contiguous((2, 3, ROWS, count), F32),
    }
    op = Operator("out", Features(kind), ("x", "directions"), ("out",))
    graph = OperatorGraph((op,), values, ("x",), ("out",), {"directions": Constant("directions")})
    found = FeaturesFamily().match(graph.group((op,)), target)
    kernel: Any = CpuFeatures() if target.kind == "cpu" else CudaFeatures()
    assert found is not None
    (parameters,) = kernel.space(found, target)
    return graph, kernel.call(found, parameters, target, 2)


@pytest.mark.parametrize(
    ("isa", "case"), [*((None, case) for case in FEATURES), *((Isa.PORTABLE, case) for case in FEATURES[::2])], ids=str
)
def test_a_feature_map(
    isa: Isa | None,
    case: tuple[FeatureMap, int, int, torch.dtype],
    paths: Mapping[tuple[Isa | None, str], Path],
) -> None:
    graph, call = feature_call(*case, cpu_target(isa))
    check_features(graph, lambda tensors: run(call, tensors, paths[isa, call.spec.symbol]))


def check_features(graph: OperatorGraph, run: Callable[[Mapping[str, Tensor]], object]) -> None:
    generator = torch.Generator().manual_seed(1)
    spec = graph.values["x"]
    tensors = {
        "x": torch.randn(spec.extent, generator=generator).to(spec.dtype).as_strided(spec.shape, spec.strides),
        "directions": torch.randn(graph.values["directions"].shape, generator=generator),
    }
    out = torch.full(graph.values["out"].shape, torch.nan)
    run({**tensors, "out": out})
    exact = evaluate(graph, tensors, torch.float64)["out"]
    # Projections are sums of some tens of terms in fp32, which may cancel where they are all there is.
    atol = 2e-7 * max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("case", OF_GPU, ids=str)
def test_a_feature_map_on_a_gpu(case: tuple[FeatureMap, int, int, torch.dtype], run_cuda: Callable[..., int]) -> None:
    graph, call = feature_call(*case, emulated_target())

    def run(tensors: Mapping[str, Tensor]) -> None:
        given = materialized(call.tensors, tensors)
        assert run_cuda(call.spec, given, call.extents, workspace_bytes=call.workspace_bytes) == 0

    check_features(graph, run)


def test_features_of_directions_that_change_are_left_to_pytorch() -> None:
    graph, _ = feature_call(*FEATURES[0], cpu_target())
    graph = dataclasses.replace(graph, inputs=("x", "directions"), constants={})
    assert FeaturesFamily().match(graph.group(graph.operators), cpu_target()) is None
