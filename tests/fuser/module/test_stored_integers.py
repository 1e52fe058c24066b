"""Models that have weights as integers already: which products run on these, and that results are the model's."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.quantization import quantize_rows


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))


def kinds(fast: fuser.OptimizedModule) -> list[str]:
    return [op.kind for op in fast.programs[-1].graph.operators if op.kind.endswith("gemm")]


class Stored(nn.Module):
    """A layer as ``torch.ao`` stores it: int8 weights, a scale for each output, zero points."""

    def __init__(self, how: str, points: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        integers, scales = quantize_rows(torch.randn(48, 64))
        self.how, self.bias = how, nn.Parameter(torch.randn(48))
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales[:, 0].contiguous())
        self.register_buffer("points", torch.full((48,), points, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        decomposed = torch.ops.quantized_decomposed
        if self.how == "channel":
            given = (self.integers, self.scales, self.points, 0, -127, 127, torch.int8)
            weight = decomposed.dequantize_per_channel(*given)
        elif self.how == "tensor":
            weight = decomposed.dequantize_per_tensor(self.integers, 0.01, 0, -127, 127, torch.int8)
        else:
            weight = self.integers.to(x.dtype) * self.scales[:, None]
        return nn.functional.linear(x, weight, self.bias).relu()


@pytest.mark.parametrize(
    ("how", "points", "kind"),
    [
        ("channel", 0, "int8_weight_gemm"),
        ("channel", 3, "gemm"),
        ("tensor", 0, "int8_weight_gemm"),
        ("product", 0, "int8_weight_gemm"),
    ],
)
def test_models_that_are_quantized_already(how: str, points: int, kind: str) -> None:
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    model, x = Stored(how, points).eval(), rows(2, 5)
    for quantize in (None, fuser.Int8()):
        fast = fuser.optimize(model, quantize=quantize, search="model")
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=0)
        # Weights that are no parameters of a module are nothing that we round.
        assert kinds(fast) == [kind] and fast.fallbacks == ()


def test_zero_points_that_come_later() -> None:
    """Other kernels, which stay where they are right without zero points, too."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    model, x = Stored("channel").eval(), rows(2, 5)
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        for change, kind in ((0, "int8_weight_gemm"), (2, "gemm"), (-2, "gemm")):
            model.points.add_(change)
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=0)
            assert kinds(fast) == [kind]
