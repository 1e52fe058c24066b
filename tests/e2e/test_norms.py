"""Norms that a model writes out, between products: in the kernel of the product before them, on every target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser

WIDTH = 40


class Block(nn.Module):
    """Llama's order: a residual stream, whose norm is what the next product reads."""

    def __init__(self, gemma: bool, wide: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.gemma, self.wide = gemma, wide

    def norm(self, x: Tensor) -> Tensor:
        y = x.to(self.wide)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.to(y.dtype))).type_as(x) if self.gemma else self.weight * y.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(self.norm(x))


@pytest.mark.parametrize("options", [{}, {"target": "cuda:emulated"}], ids=["cpu", "cuda"])
@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_and_its_norm_are_the_epilogue_of_the_product(
    options: dict[str, Any], gemma: bool, dtype: torch.dtype
) -> None:
    model = Block(gemma).eval().to(dtype)
    exact = Block(gemma, torch.float64).eval().to(dtype).double()
    fast = fuser.optimize(model, search="model", **options)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for shape in ((2, 9, WIDTH), (1, 23, WIDTH)):
            x = torch.randn(shape, generator=generator).to(dtype)
            expected = exact(x.double())
            error = (fast(x).double() - expected).norm() / expected.norm()
            assert error <= (1e-6 if dtype is torch.float32 else 8e-3)
    assert fast.unfused == ()
    assert [(kernel.family, len(kernel.operators)) for kernel in fast.kernels] == [("gemm", 3), ("gemm", 2)]


class Heads(nn.Module):
    """Norms of the queries and keys of every head, as in Qwen3, and an activation of the values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q, self.k = (nn.Parameter(torch.randn(WIDTH // 5)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (t.unflatten(-1, (5, -1)) for t in (q, k))
        q, k = (w * t * (t.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() for w, t in ((self.q, q), (self.k, k)))
        # A factor for every token that all of its heads share.
        return q * x[..., None, :8].sigmoid(), k, torch.nn.functional.silu(v)


@pytest.mark.parametrize("options", [{}, {"target": "cuda:emulated"}], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_heads_read_the_product_that_holds_them(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, exact = (Heads().eval().to(dtype) for _ in range(2))
    fast = fuser.optimize(model, search="model", **options)
    x = torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        for ours, expected in zip(fast(x), exact.double()(x.double()), strict=True):
            error = (ours.double() - expected).norm() / expected.norm()
            assert error <= (1e-6 if dtype is torch.float32 else 1e-2)
    assert fast.unfused == () and fast.fallbacks == ()
    assert {"gemm", "rowwise", "pointwise"} == {kernel.family for kernel in fast.kernels}


def test_one_number_of_a_row_is_counted_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean(-1, keepdim=True).sum(-1, keepdim=True)

    fast = fuser.optimize(Twice().eval(), search="model")
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(fast(x), Twice()(x), rtol=1e-5, atol=1e-6)
