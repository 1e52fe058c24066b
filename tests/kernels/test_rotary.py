"""The `rotary` family on CPUs and on the emulator: widths, layouts and types against float64; what it declines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Expression, layer_norm, rms_norm
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Norm, Ref, Rotary, TorchCall, View
from fuser.ir.target import Isa, Target, emulated_target
from fuser.kernels.base import KernelCall, KernelSpec
from fuser.kernels.rotary import CPU_ROTARY, CUDA_ROTARY, RotaryFamily, RotaryMatch, rows_of
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

FAMILY = RotaryFamily()
# A product and a sum of two roundings each, and that of the result to its dtype.
TOLERANCE = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
B, H, S = 2, 3, 5


@dataclass(frozen=True)
class Case:
    """x (B, S, H, columns) as a slice of rows with ``gap`` elements more; tables (B or 1, S, 1, width or half)."""

    columns: int
    start: int
    width: int
    interleaved: bool
    paired: bool = False
    gap: int = 0
    batched: bool = False
    x: torch.dtype = torch.float32
    table: torch.dtype = torch.float32
    out: torch.dtype = torch.float32

    def graph(self) -> OperatorGraph:
        row = H * self.columns + self.gap
        strides = (S * row, row, self.columns, 1)
        count = self.width // 2 if self.paired else self.width
        table = TensorSpec.contiguous((B if self.batched else 1, S, 1, count), self.table)
        shape = (B, S, H, self.columns)
        values = {
            "x": TensorSpec(shape, self.x, strides),
            "cos": table,
            "sin": table,
            "out": TensorSpec.contiguous(shape, self.out),
        }
        rotary = Rotary(self.start, self.width, self.interleaved)
        op = Operator("rotary", rotary, ("x", "cos", "sin"), ("out",))
        return OperatorGraph((op,), values, ("x", "cos", "sin"), ("out",), {})


WIDTHS = [
    *(Case(2 * w, 0, 2 * w, False) for w in (1, 3, 9, 32, 128)),
    *(Case(2 * w, 0, 2 * w, True) for w in (3, 5, 128)),
]
PARTS = [
    Case(32, 4, 20, True, gap=5),
    Case(80, 0, 32, False, gap=160),
    Case(17, 3, 6, False, paired=True),
    Case(64, 32, 32, True, paired=True),
    Case(13, 1, 12, True, paired=True, batched=True),
]
BF16, F16 = torch.bfloat16, torch.float16
TYPES = [
    Case(36, 4, 24, True, x=BF16, table=BF16, out=BF16),
    Case(36, 4, 24, False, True, x=BF16, out=BF16),
    Case(36, 4, 24, True, True, table=BF16),
    Case(36, 4, 24, False, out=BF16),
]
HALF = [Case(64, 0, 64, interleaved, x=F16, table=F16, out=F16) for interleaved in (False, True)]
ON_CPU = [*WIDTHS, *PARTS, *TYPES]


def values(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.columns)
    specs = case.graph().values
    angles = 9 * torch.randn(specs["cos"].shape, generator=generator)
    x = specs["x"]
    memory = torch.randn(x.extent, generator=generator).to(x.dtype)
    return {
        "x": memory.as_strided(x.shape, x.strides),
        "cos": (1.5 * angles.cos()).to(case.table),
        "sin": (1.5 * angles.sin()).to(case.table),
    }


def match(case: Case, target: Target) -> RotaryMatch:
    graph = case.graph()
    found = FAMILY.match(graph.group(graph.operators), target)
    assert found is not None
    return found


def check(case: Case, run: Callable[[KernelSpec, Sequence[Tensor], KernelCall], None], target: Target) -> None:
    """A kernel of a case against float64, element by element relative to the pair that it comes from."""
    graph, tensors = case.graph(), values(case)
    found = match(case, target)
    implementation = CPU_ROTARY if target.kind == "cpu" else CUDA_ROTARY
    (parameters,) = implementation.space(found, target)
    call = implementation.call(found, parameters, target, 2)
    out = torch.full(graph.values["out"].shape, torch.nan, dtype=case.out)
    run(call.spec, [*tensors.values(), out], call)
    exact = evaluate(graph, tensors, torch.float64)["out"]
    reach = (tensors["x"].double().abs().amax(-1, keepdim=True) * 3).expand(exact.shape)
    assert bool(((out.double() - exact).abs() <= TOLERANCE[case.out] * reach).all())
    kept = [*range(case.start), *range(case.start + case.width, case.columns)]
    assert torch.equal(out[..., kept], tensors["x"][..., kept].to(case.out))


@pytest.mark.parametrize(
    ("isa", "case"), [*((None, case) for case in ON_CPU), *((Isa.PORTABLE, case) for case in ON_CPU[2::4])], ids=str
)
def test_a_rotation_on_a_cpu(isa: Isa | None, case: Case, paths: Mapping[tuple[Isa | None, str], Path]) -> None:
    def run(spec: KernelSpec, tensors: Sequence[Tensor], call: KernelCall) -> None:
        args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2)
        assert load(paths[isa, spec.symbol], spec.symbol).status(args) == 0

    check(case, run, cpu_target(isa))


@pytest.fixture(scope="module")
def paths() -> Mapping[tuple[Isa | None, str], Path]:
    """Every kernel of this file for CPUs, built in one run of ninja for each instruction set."""
    found: dict[tuple[Isa | None, str], Path] = {}
    for isa in (None, Isa.PORTABLE):
        target = cpu_target(isa)
        matches = [match(case, target) for case in ON_CPU]
        specs = {CPU_ROTARY.call(m, m.parameters, target, 2).spec for m in matches}
        built = build([render(spec) for spec in specs], target, headers=header_folder(target))
        found |= {(isa, symbol): path for symbol, path in built.items()}
    return found


@pytest.mark.parametrize("case", [*WIDTHS[1::2], *PARTS, *TYPES[::2], *HALF], ids=str)
def test_a_rotation_on_a_gpu(case: Case, run_cuda: Callable[..., int]) -> None:
    def run(spec: KernelSpec, tensors: Sequence[Tensor], call: KernelCall) -> None:
        assert run_cuda(spec, tensors, call.extents) == 0

    check(case, run, emulated_target())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("case", [TYPES[0], PARTS[1]], ids=str)
def test_a_gpu_keeps_a_rotation_in_registers(case: Case, arch: str, compile_cuda: Callable[..., Any]) -> None:
    found = match(case, emulated_target())
    for resources in compile_cuda(CUDA_ROTARY.call(found, found.parameters, emulated_target(), 1).spec, arch):
        assert (resources.stack_bytes, resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0, 0)


@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_are_walked_as_pytorch_broadcasts_them(sizes: list[int], data: st.DataObject) -> None:
    """The address of every row of permuted and broadcast tensors, against PyTorch's."""
    tensors = []
    for _ in range(2):
        own = [1 if data.draw(st.booleans()) else size for size in sizes]
        order = data.draw(st.permutations(range(len(own))))
        base = torch.arange(math.prod(own)).view([own[d] for d in order])
        tensors.append(base.permute([order.index(d) for d in range(len(own))]))
    found = rows_of(sizes, [t.shape for t in tensors], [t.stride() for t in tensors])
    if found is None:
        assert len(sizes) > 3
        return
    walked, *strides = found
    assert math.prod(walked) == math.prod(sizes)
    for tensor, along in zip(tensors, strides, strict=True):
        at = sum(torch.arange(n).view([-1 if d == i else 1 for d in range(3)]) * along[i] for i, n in enumerate(walked))
        assert torch.equal(torch.as_tensor(at).expand(walked).flatten(), tensor.expand(sizes).flatten())


@dataclass(frozen=True)
class Normed:
    """A norm of heads (B, S, H, columns) in the rows of a product, whose result is rotated as (B, H, S, columns)."""

    dtype: torch.dtype
    expression: Expression
    weights: tuple[str, ...]

    def graph(self, columns: int = 20) -> OperatorGraph:
        shape, row = (B, S, H, columns), 3 * H * columns
        table = TensorSpec.contiguous((1, S, 1, 1, columns), torch.float32)
        made = TensorSpec.contiguous(shape, self.dtype)
        values = {
            "x": TensorSpec(shape, self.dtype, (S * row, row, columns, 1)),
            "cos": table,
            "sin": table,
            "norm": made,
            "seen": TensorSpec((B, S, 1, H, columns), self.dtype, (*made.strides[:2], 7, *made.strides[2:]), "norm"),
            "out": TensorSpec.contiguous((B, S, 1, H, columns), self.dtype),
            **{name: TensorSpec.contiguous((columns,), self.dtype) for name in ("weight", "bias")},
        }
        view = View(TorchCall(torch.as_strided, (Ref(0), values["seen"].shape, values["seen"].strides, 0)))
        operators = (
            Operator("norm", Norm(self.expression), ("x", *self.weights), ("norm",)),
            Operator("seen", view, ("norm",), ("seen",)),
            Operator("rotary", Rotary(0, columns, False), ("seen", "cos", "sin"), ("out",)),
        )
        constants = {name: Constant(name) for name in ("weight", "bias")}
        return OperatorGraph(operators, values, ("x", "cos", "sin"), ("out",), constants)


NORMS = [
    Normed(torch.float32, rms_norm(1e-6), ("weight",)),
    Normed(torch.bfloat16, layer_norm(1e-5), ("weight", "bias")),
    Normed(torch.float32, rms_norm(1e-6, weight=False), ()),
]


@pytest.mark.parametrize("case", NORMS, ids=["rms", "layer", "plain"])
def test_the_norm_of_heads_is_part_of_their_rotation(case: Normed) -> None:
    graph, target = case.graph(), cpu_target()
    group = graph.group(op for op in graph.compute)
    found = FAMILY.match(group, target)
    assert found is not None
    call = CPU_ROTARY.call(found, *CPU_ROTARY.space(found, target), target, 2)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(graph.values[name].extent, generator=generator)
        .to(graph.values[name].dtype)
        .as_strided(graph.values[name].shape, graph.values[name].strides)
        for name in (*graph.inputs, *case.weights)
    }
    out = torch.full(graph.values["out"].shape, torch.nan, dtype=case.dtype)
    path = build([render(call.spec)], target, headers=header_folder(target))[call.spec.symbol]
    values = [{**tensors, "out": out}[str(name)] for name in call.tensors]
    assert load(path, call.spec.symbol).status(KernelArgs.pack([t.data_ptr() for t in values], call.extents, 2)) == 0
    exact = evaluate(graph, tensors, torch.float64)["out"]
    assert float((out.double() - exact).norm()) <= TOLERANCE[case.dtype] * 4 * float(exact.norm())
    assert CUDA_ROTARY.space(found, emulated_target()) == []


def test_a_norm_that_is_read_besides_is_no_part_of_a_rotation() -> None:
    graph = dataclasses.replace(NORMS[0].graph(), outputs=("norm", "out"))
    assert FAMILY.match(graph.group(graph.compute), cpu_target()) is None
    # Rows that are not those that the norm has made: the first two dimensions in the other order.
    graph = NORMS[0].graph()
    seen = graph.values["seen"]
    other = dataclasses.replace(seen, strides=(seen.strides[1], seen.strides[0], *seen.strides[2:]))
    graph = dataclasses.replace(graph, values={**graph.values, "seen": other})
    assert FAMILY.match(graph.group(graph.compute), cpu_target()) is None


def declined(case: Case, **changed: TensorSpec) -> bool:
    graph = case.graph()
    graph = dataclasses.replace(graph, values={**graph.values, **changed})
    return FAMILY.match(graph.group(graph.operators), cpu_target()) is None


def test_columns_apart_and_foreign_types_are_declined() -> None:
    case = WIDTHS[2]
    x, table = (case.graph().values[name] for name in ("x", "cos"))
    assert not declined(case)
    assert declined(case, x=TensorSpec(x.shape, x.dtype, (*x.strides[:-1], 2)))
    assert declined(case, cos=TensorSpec(table.shape, table.dtype, (*table.strides[:-1], 2)))
    assert declined(case, sin=TensorSpec.contiguous(table.shape, torch.bfloat16))
    assert declined(case, x=TensorSpec(x.shape, torch.float64, x.strides))


@pytest.mark.parametrize(("start", "width"), [(0, 3), (0, 0), (-1, 4)])
def test_columns_that_are_no_pairs_are_refused(start: int, width: int) -> None:
    with pytest.raises(ValueError, match="cannot be rotated by pairs"):
        Rotary(start, width, interleaved=False)
