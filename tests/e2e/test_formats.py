"""Weights that a model keeps in 8 bits and makes floats of: a kernel may read them as they are kept, and where none
does, they are made floats once, when the program is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser
from fuser.codegen.render import TEMPLATES, environment
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.graph import Constant, OperatorGroup
from fuser.ir.operators import Bias, Gemm
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module import compiler, forms
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target
from fuser.search.measure import measure

WIDTH, ROWS = 96, 5


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """Integers (N, K) of 8 bits with scales (N,) and a bias (N,): the integers, the scales, and what a shift of the
    input by one adds to the bias."""

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        integers, scales, bias = tensors
        return integers.contiguous(), scales.contiguous(), integers.sum(1) * scales + bias


@dataclass(frozen=True)
class IntegerMatch:
    group: OperatorGroup
    x: str
    constants: tuple[str, str, str]


class IntegerFamily:
    """A linear layer whose weight is integers of 8 bits as floats, times a scale for every row."""

    name = "integer_linear"

    def match(self, group: OperatorGroup, target: Target) -> IntegerMatch | None:
        graph = group.graph
        if [type(op.semantics) for op in group.operators] != [Gemm, Bias]:
            return None
        gemm, bias = group.operators
        x, weight = gemm.inputs
        product = graph.constants[weight]
        if product.call is None or product.call.target is not torch.ops.aten.mul.Tensor:
            return None
        floats, column = (graph.constants[source] for source in product.sources)
        if floats.call is None or graph.values[floats.sources[0]].dtype is not torch.int8:
            return None
        constants = (floats.sources[0], column.sources[0], next(v for v in bias.inputs if v != gemm.output))
        return IntegerMatch(group, x, constants)


class CpuInteger(Implementation[IntegerMatch, None]):
    def space(self, match: IntegerMatch, target: Target) -> Sequence[None]:
        return [None]

    def cost(self, match: IntegerMatch, parameters: None, target: Target) -> Cost:
        return Cost(1.0, 1.0)

    def call(self, match: IntegerMatch, parameters: None, target: Target, threads: int) -> KernelCall:
        values, outputs = match.group.graph.values, match.group.outputs
        n, k = values[match.constants[0]].shape
        packed = [Packed(match.constants, IntegerLayout(), index) for index in range(3)]
        spec = KernelSpec("integer_linear", "split_linear.cpp.j2", None)
        return KernelCall(spec, (match.x, *packed, *outputs), (values[match.x].numel // k, n, k), outputs)


class Quantized(nn.Module):
    """A linear layer of integers with a scale for every row."""

    integers: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, seed: int, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("integers", torch.randint(0, 128, (WIDTH, WIDTH), generator=g).to(dtype))
        self.register_buffer("scales", torch.rand(WIDTH, generator=g) / 1024)
        self.register_buffer("bias", torch.randn(WIDTH, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers.to(torch.float32) * self.scales[:, None], self.bias)


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        self.first, self.second = Quantized(0, dtype), Quantized(1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))


def agree(model: Two, result: Tensor) -> bool:
    """Whether a result is the model's within 2⁻¹⁸ of its norm: sums of 96 products twice, the input shifted by one."""
    exact = x().double()
    for layer in (model.first, model.second):
        exact = exact @ (layer.integers.double() * layer.scales.double()[:, None]).t() + layer.bias.double()
    return bool((result.double() - exact).norm() <= 2.0**-18 * exact.norm())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", {(IntegerFamily(), "cpu"): (CpuInteger(),), **IMPLEMENTATIONS})
    for module in (compiler, forms):
        # The kernel that comes with fuser takes these integers, too.
        monkeypatch.setattr(module, "with_stored_integers", lambda graph, *_: graph)
    loader = jinja2.FileSystemLoader([TEMPLATES, Path(__file__).parent])
    monkeypatch.setattr(environment(), "loader", loader)


@torch.no_grad()
def test_a_kernel_reads_the_integers_that_floats_are_made_of(known: None, tmp_path: Path) -> None:
    model = Two().eval()
    fast = fuser.optimize(model, search="model")
    assert agree(model, fast(x()))
    (compiled,) = fast.programs
    assert [(record.family, record.calls) for record in compiled.assembly.kernels] == [("integer_linear", 2)]
    assert fast._engine.store.made_bytes == 2 * (WIDTH * WIDTH + 2 * 4 * WIDTH)
    model.second.integers.neg_()
    assert agree(model, fast(x()))
    fast.save(tmp_path / "program.fuser")
    assert torch.equal(fuser.load(tmp_path / "program.fuser")(x()), fast(x()))
    (measurement,) = measure([compiled.assembly.choices], cpu_target(), 1, default_cache())
    assert 0 < measurement.seconds < 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
def test_floats_that_no_kernel_asks_the_source_of_are_made_once(dtype: torch.dtype) -> None:
    model = Two(dtype).eval()
    fast = fuser.optimize(model, search="model")
    assert agree(model, fast(x()))
    (compiled,) = fast.programs
    assert {record.family for record in compiled.assembly.kernels} == {"gemm"}
    assert fast._engine.store.made_bytes == 2 * 4 * WIDTH * WIDTH
    model.first.integers.add_(1)
    assert agree(model, fast(x()))


def test_raising_computes_no_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(Two().eval(), flatten_call((x(),), {}))
    monkeypatch.setattr(Constant, "evaluate", lambda *_: pytest.fail("a constant was computed"))
    graph = raise_graph(captured)
    assert sum(op.kind == "gemm" for op in graph.operators) == 2


def test_equal_layers_are_decided_once_and_layers_of_other_formats_apart() -> None:
    first, second, third = (
        raise_graph(capture(layer.eval(), flatten_call((x(),), {}))).regions[0].hash
        for layer in (Quantized(0), Quantized(1), Quantized(0, torch.int16))
    )
    assert first == second != third
    plain = raise_graph(capture(nn.Linear(WIDTH, WIDTH).eval(), flatten_call((x(),), {}))).regions[0].hash
    assert plain not in (first, third)
