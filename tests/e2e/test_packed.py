"""A layout that makes three tensors of two constants: packed once, following both, measured, saved and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.codegen.render import TEMPLATES, environment
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import Bias, Gemm
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module import compiler
from fuser.module.optimized import OptimizedModule
from fuser.runtime.device import cpu_target

WIDTH, ROWS = 192, 5
PACKINGS: list[tuple[int, ...]] = []


@dataclass(frozen=True)
class SplitLayout(Layout):
    """A weight (N, K) and a bias (N,) as integers of 8 bits, their scales a row, and what a shift of the input by one
    adds to the bias."""

    limit: int

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        weight, bias = tensors
        PACKINGS.append(tuple(weight.shape))
        scales = weight.abs().amax(1) / self.limit
        integers = (weight / scales[:, None]).round().to(torch.int8)
        return integers.contiguous(), scales, integers.sum(1) * scales + bias


@dataclass(frozen=True)
class SplitMatch:
    group: OperatorGroup
    x: str
    weight: str
    bias: str


class SplitFamily:
    """A linear layer with a bias."""

    name = "split_linear"

    def match(self, group: OperatorGroup, target: Target) -> SplitMatch | None:
        if [type(op.semantics) for op in group.operators] != [Gemm, Bias]:
            return None
        gemm, bias = group.operators
        return SplitMatch(group, *gemm.inputs, next(v for v in bias.inputs if v != gemm.output))


class CpuSplit(Implementation[SplitMatch, None]):
    def space(self, match: SplitMatch, target: Target) -> Sequence[None]:
        return [None]

    def cost(self, match: SplitMatch, parameters: None, target: Target) -> Cost:
        return Cost(1.0, 1.0)

    def call(self, match: SplitMatch, parameters: None, target: Target, threads: int) -> KernelCall:
        values, group = match.group.graph.values, match.group
        n, k = values[match.weight].shape
        packed = [Packed((match.weight, match.bias), SplitLayout(127), index) for index in range(3)]
        spec = KernelSpec("split_linear", "split_linear.cpp.j2", None)
        extents = (values[match.x].numel // k, n, k)
        return KernelCall(spec, (match.x, *packed, *group.outputs), extents, group.outputs)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", {(SplitFamily(), "cpu"): (CpuSplit(),), **IMPLEMENTATIONS})
    loader = jinja2.FileSystemLoader([TEMPLATES, Path(__file__).parent])
    monkeypatch.setattr(environment(), "loader", loader)
    PACKINGS.clear()


class Layer(nn.Module):
    """A linear layer whose weights are integers of 8 bits times a power of two for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.set(0)

    @torch.no_grad()
    def set(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        integers = torch.randint(-126, 127, (WIDTH, WIDTH), generator=g)
        integers[:, 0] = 127
        self.linear.weight.copy_(integers * 2.0 ** torch.randint(-9, -5, (WIDTH, 1), generator=g))
        self.linear.bias.copy_(torch.randn(WIDTH, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def x(seed: int = 7) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def agree(model: nn.Module, result: Tensor) -> bool:
    """Whether a result is the model's, within the rounding of sums of products with a shifted input."""
    with torch.no_grad():
        weight, bias = (t.double() for t in model.parameters())
        exact = x().double() @ weight.t() + bias
        bound = WIDTH * 2.0**-24 * ((x().double().abs() + 1) @ weight.abs().t() + bias.abs())
    return bool(((result.double() - exact).abs() <= 2 * bound).all())


def optimized(model: nn.Module) -> OptimizedModule:
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        fast(x())
    (compiled,) = fast.programs
    assert [record.family for record in compiled.assembly.kernels] == ["split_linear"]
    return fast


@pytest.fixture
def layer() -> Layer:
    return Layer().eval()


@torch.no_grad()
def test_three_tensors_of_two_constants_are_packed_once(layer: Layer) -> None:
    fast = optimized(layer)
    (compiled,) = fast.programs
    refs = compiled.assembly.plan.constants
    assert [ref.index for ref in refs] == [0, 1, 2]
    assert len({ref.whole for ref in refs}) == 1
    assert PACKINGS == [(WIDTH, WIDTH)]
    assert agree(layer, fast(x()))
    assert fast._engine.store.made_bytes == WIDTH * WIDTH + 2 * 4 * WIDTH


@torch.no_grad()
def test_originals_of_which_only_packed_forms_are_used_move_to_files(layer: Layer) -> None:
    fast = optimized(layer)
    assert not fast._engine.store.offload_error
    assert fast._engine.store.offloaded_bytes == layer.linear.weight.nbytes
    assert agree(layer, fast(x()))


@torch.no_grad()
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_all_three_follow_either_constant(layer: Layer, part: str) -> None:
    fast = optimized(layer)
    getattr(layer.linear, part).mul_(2.0)
    assert agree(layer, fast(x()))
    assert PACKINGS == [(WIDTH, WIDTH)] * 2
    assert not agree(Layer(), fast(x()))


@torch.no_grad()
def test_layers_with_weights_of_their_own_are_packed_apart_and_those_that_share_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(), Layer()
            self.second.set(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.first(x), self.second(x.sin()), self.first(x.cos())

    model = Three().eval()
    fast = fuser.optimize(model, search="model")
    for got, expected in zip(fast(x()), model(x()), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=WIDTH * 2.0**-24 * 2 * 5 * WIDTH**0.5)
    assert PACKINGS == [(WIDTH, WIDTH)] * 2


@torch.no_grad()
def test_a_program_with_them_is_saved_and_read(layer: Layer, tmp_path: Path) -> None:
    fast = optimized(layer)
    fast.save(tmp_path / "program.fuser")
    PACKINGS.clear()
    loaded = fuser.load(tmp_path / "program.fuser")
    assert torch.equal(loaded(x()), fast(x()))
    assert agree(layer, loaded(x()))
    assert not PACKINGS


@torch.no_grad()
def test_a_search_measures_and_checks_them(layer: Layer) -> None:
    from fuser.runtime.cache import default_cache
    from fuser.search.measure import measure

    (compiled,) = optimized(layer).programs
    (measurement,) = measure([compiled.assembly.choices], cpu_target(), 1, default_cache())
    assert 0 < measurement.seconds < 1
