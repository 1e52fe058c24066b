"""Attention within shifted windows of an image (Swin): rows are gathered where they are, by kernels of every target."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser

WIDTH, HEADS, WINDOW = 32, 2, 4


class Block(nn.Module):
    """Swin's block on images (B, H, W, C) without its MLP, with the norm before or, as in version 2, behind."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(1, HEADS, WINDOW**2, WINDOW**2))
        self.before = before

    def attention(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.roll((-2, -2), (1, 2)).view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
        x = x.transpose(2, 3).reshape(-1, WINDOW**2, c)
        q, k, v = self.qkv(x).view(-1, WINDOW**2, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        x = self.out(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).reshape(x.shape))
        x = x.view(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).transpose(2, 3).reshape(b, h, w, c)
        return x.roll((2, 2), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + (self.attention(self.norm(x)) if self.before else self.norm(self.attention(x)))


CPU, CUDA = dict[str, str](), {"target": "cuda:emulated"}


@pytest.mark.parametrize(
    ("options", "before", "dtype"),
    [
        pytest.param(CPU, True, torch.float32, id="swin"),
        pytest.param(CPU, False, torch.bfloat16, id="swin-v2 bf16"),
        pytest.param(CUDA, True, torch.bfloat16, id="swin bf16 cuda"),
        pytest.param(CUDA, False, torch.float32, id="swin-v2 cuda"),
    ],
)
def test_windows_are_fused(options: dict[str, str], before: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Block(before).eval().to(dtype)
    exact = copy.deepcopy(model).double()
    fast = fuser.optimize(model, search="model", **options)
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randn(b, h, w, WIDTH, generator=generator).to(dtype) for b, h, w in ((1, 8, 8), (2, 8, 8), (1, 12, 8))
    ]
    with torch.inference_mode():
        for x in images:
            expected = exact(x.double())
            error = (fast(x).double() - expected).norm() / expected.norm()
            assert error <= (1e-6 if dtype is torch.float32 else 8e-3)
        assert fast.unfused == () and fast.fallbacks == ()
        gathers = [kernel for kernel in fast.kernels if any("gathered" in name for name in kernel.operators)]
        assert gathers and {kernel.family for kernel in gathers} == {"rowwise"}
        if not options:
            fast.save(tmp_path / "model.fuser")
            loaded = fuser.load(tmp_path / "model.fuser")
            assert all(torch.equal(loaded(x), fast(x)) for x in images)
