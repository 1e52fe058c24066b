"""Tensors that PyTorch's quantizers round and restore, and their products with stored integers: one on integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

import fuser
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.evaluation import run_graph
from fuser.ir.graph import OperatorGraph
from fuser.ir.operators import FakeQuantize, Int8Gemm
from fuser.ir.quantization import found_rounding, rounding_of
from fuser.module.stored_integers import with_stored_integers
from fuser.runtime.device import cpu_target

Numbers = tuple[float, int, int, int, torch.dtype]
UNSIGNED: Numbers = (0.031, 127, 0, 255, torch.uint8)
SIGNED: Numbers = (0.05, -3, -128, 127, torch.int8)
decomposed = torch.ops.quantized_decomposed


def static(numbers: Numbers) -> Callable[[Tensor], Tensor]:
    def round_trip(x: Tensor) -> Tensor:
        restored: Tensor = decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *numbers), *numbers)
        return restored

    return round_trip


def dynamic(low: int, high: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def round_trip(x: Tensor) -> Tensor:
        scale, point = decomposed.choose_qparams.tensor(x, low, high, 2.0**-12, dtype)
        codes = decomposed.quantize_per_tensor.tensor(x, scale, point, low, high, dtype)
        restored: Tensor = decomposed.dequantize_per_tensor.tensor(codes, scale, point, low, high, dtype)
        return restored

    return round_trip


class Layer(nn.Module):
    """Linear layers of int8 weights that read one rounded tensor."""

    def __init__(self, round_trip: Callable[[Tensor], Tensor], products: int = 1, points: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.round_trip, self.products = round_trip, products
        for i in range(products):
            self.register_buffer(f"weight{i}", torch.randint(-127, 128, (40, 48), generator=g, dtype=torch.int8))
            self.register_buffer(f"scales{i}", torch.rand(40, generator=g) / 100 + 1e-4)
            self.register_buffer(f"points{i}", torch.full((40,), int(points)))
            self.register_buffer(f"bias{i}", torch.randn(40, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            [self.get_buffer(f"{name}{i}") for name in ("weight", "scales", "points", "bias")]
            for i in range(self.products)
        ]
        weights = [decomposed.dequantize_per_channel(w, s, p, 0, -128, 127, torch.int8) for w, s, p, _ in parts]
        outputs = [nn.functional.linear(self.round_trip(x), w, b) for w, (*_, b) in zip(weights, parts, strict=True)]
        return torch.cat(outputs, -1)


def rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 48, generator=generator) * 3


def raised(model: nn.Module, x: Tensor) -> tuple[OperatorGraph, Tensor]:
    """The graph of a call, and what it gives."""
    captured = capture(model, flatten_call((x,), {}))
    graph = with_stored_integers(raise_graph(captured), captured.parameters, cpu_target())
    (output,) = run_graph(graph, captured.parameters, dict(zip(graph.inputs, [x], strict=True)))
    return graph, output


def kinds(graph: OperatorGraph) -> list[str]:
    return [op.kind for op in graph.compute]


@pytest.mark.parametrize("numbers", [UNSIGNED, SIGNED, (0.4, 0, -127, 127, torch.int8)], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=str)
@torch.no_grad()
def test_a_static_rounding_is_part_of_the_product(shape: tuple[int, ...], numbers: Numbers) -> None:
    model, x = Layer(static(numbers)).eval(), rows(*shape)
    graph, output = raised(model, x)
    shift = 128 if numbers[3] > 127 else 0
    assert kinds(graph) == ["int8_gemm", "bias"]
    assert graph.compute[0].semantics == Int8Gemm(True, numbers[2] - shift, numbers[3] - shift, None)
    exact = Layer(static(numbers)).double()
    for name, buffer in model.named_buffers():
        exact.register_buffer(name, buffer)
    # The integers are PyTorch's, which rounds their products where they are exact here.
    weight = model.weight0.double() * model.scales0.double()[:, None]
    want = static(numbers)(x).double() @ weight.T + model.bias0.double()
    torch.testing.assert_close(output.double(), want, rtol=2.0**-20, atol=2.0**-18)
    torch.testing.assert_close(output, model(x), rtol=2.0**-18, atol=2.0**-16)


@pytest.mark.parametrize("kind", [(0, 255, torch.uint8), (-128, 127, torch.int8)], ids=str)
@torch.no_grad()
def test_a_rounding_that_is_found_at_run_time_is_part_of_the_product(kind: tuple[int, int, torch.dtype]) -> None:
    model = Layer(dynamic(*kind)).eval()
    for x in (rows(3, 5), rows(4) + 5, rows(4) * 0, rows(2).abs()):
        graph, output = raised(model, x)
        assert "int8_gemm" in kinds(graph) and not any("quantize_per" in op.reason for op in graph.compute)
        torch.testing.assert_close(output, model(x), rtol=2.0**-18, atol=2.0**-16)


class Shared(Layer):
    """As :class:`Layer`, with one rounding that every product restores for itself."""

    def forward(self, x: Tensor) -> Tensor:
        weights = [
            decomposed.dequantize_per_channel(
                self.get_buffer(f"weight{i}"), self.get_buffer(f"scales{i}"), self.points0, 0, -128, 127, torch.int8
            )
            for i in range(self.products)
        ]
        codes = decomposed.quantize_per_tensor(x, *UNSIGNED)
        restored = [decomposed.dequantize_per_tensor(codes, *UNSIGNED) for _ in weights]
        biases = [self.get_buffer(f"bias{i}") for i in range(self.products)]
        return torch.cat([*map(nn.functional.linear, restored, weights, biases)], -1)


@torch.no_grad()
def test_products_of_one_rounding_are_one() -> None:
    model, x = Shared(static(UNSIGNED), products=3).eval(), rows(5)
    graph, output = raised(model, x)
    assert [kind for kind in kinds(graph) if kind.endswith("gemm")] == ["int8_gemm"]
    torch.testing.assert_close(output, model(x), rtol=2.0**-18, atol=2.0**-16)


class Dropped(nn.Module):
    """Two layers of what is random for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 40), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [nn.functional.dropout(x, 0.5, training=True) for _ in range(2)]
        return self.first(inputs[0]) - self.second(inputs[1])


@torch.no_grad()
def test_random_operators_of_one_value_are_two() -> None:
    model, x = Dropped().eval(), rows(5)
    captured = capture(model, flatten_call((x,), {}))
    graph = raise_graph(captured)
    assert kinds(graph).count("gemm") == 2
    torch.manual_seed(0)
    want = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fuser.optimize(model, search="model")(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_no_kernel_multiplies_is_rounded_alone() -> None:
    """Weights with zero points are fp32 to a product; so is what has other numbers on its way back."""
    model, x = Layer(static(UNSIGNED), points=True).eval(), rows(5)
    graph, output = raised(model, x)
    assert kinds(graph) == ["fake quantize", "gemm", "bias"]
    assert graph.compute[0].semantics == FakeQuantize(0.031, -1, -128, 127)
    torch.testing.assert_close(output, model(x), rtol=2.0**-18, atol=2.0**-16)

    def uneven(x: Tensor) -> Tensor:
        restored: Tensor = decomposed.dequantize_per_tensor(
            decomposed.quantize_per_tensor(x, *UNSIGNED), 0.05, *UNSIGNED[1:]
        )
        return restored

    model = Layer(uneven).eval()
    graph, output = raised(model, x)
    assert "int8_gemm" not in kinds(graph) and "fake quantize" not in kinds(graph)
    torch.testing.assert_close(output, model(x), rtol=2.0**-18, atol=2.0**-16)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e3), st.integers(0, 255), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_restored_numbers_are_pytorch_s(scale: float, point: int, values: list[float]) -> None:
    numbers: Numbers = (scale, point, 0, 255, torch.uint8)
    x = torch.tensor(values)
    (got,) = FakeQuantize(scale, point, 0, 255).evaluate(x)
    assert torch.equal(got, static(numbers)(x))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40),
    st.floats(2.0**-100, 1, width=32),
    st.sampled_from([(0, 255, torch.uint8), (-128, 127, torch.int8), (-127, 127, torch.int8)]),
)
def test_ranges_are_found_as_pytorch_does(
    values: list[float], least: float, kind: tuple[int, int, torch.dtype]
) -> None:
    x, (low, high, dtype) = torch.tensor(values), kind
    scale, point = decomposed.choose_qparams.tensor(x, low, high, least, dtype)
    got = found_rounding(x, low, high, least, 5)
    if math.isfinite(float(scale)):
        assert torch.equal(got, rounding_of(scale, point, 5))
    assert found_rounding(torch.cat([x, torch.tensor([torch.nan])]), low, high, least).isnan().all()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False).module()


@pytest.mark.parametrize("found", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_what_pytorch_s_quantizer_for_cpus_makes(found: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 33, 64)
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_dynamic=found))
    prepared = prepare_pt2e(exported(Block().eval(), x), quantizer)
    prepared(x)
    model = convert_pt2e(prepared)
    optimized = fuser.optimize(model, (x,))
    want = model(x)
    # A result on the way that rounds to the next integer moves what follows by a step of that.
    assert float((optimized(x) - want).norm() / want.norm()) < 1e-3
    report = str(optimized.report())
    assert report.count("int8_gemm") >= 2 and "original model" not in report

    optimized.save(tmp_path / "model.fuser")
    assert torch.equal(fuser.load(tmp_path / "model.fuser")(x), optimized(x))


@torch.no_grad()
def test_exported_modules_have_one_mode() -> None:
    """Their flag says that they are in training, and `eval()` raises."""
    x = torch.randn(2, 33, 64)
    model = exported(Block().eval(), x)
    assert model.training
    optimized = fuser.optimize(model, (x,))
    assert "original model" not in str(optimized.report())
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-5, atol=1e-5)
