"""Rotary embeddings at positions that a call gives, whole: numbers of every length and dtype, and positions beyond."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser

WIDTH, HEADS, KEY_HEADS, PLACES = 32, 2, 1, 40
HEAD = WIDTH // HEADS


class Attention(nn.Module):
    """Grouped heads, each normalized and a part of it rotated by tables that are read at ``positions`` (B, S)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD, eps=1e-6), nn.RMSNorm(HEAD, eps=1e-6)
        angles = torch.arange(PLACES)[:, None] / 100.0 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.width = width

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., : self.width], x[..., self.width :]
        a, b = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, kept), -1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        tables = [F.embedding(positions, table).unsqueeze(1) for table in (self.cos, self.sin)]
        heads = self.qkv(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        q, k = self.rotated(self.q_norm(q), *tables), self.rotated(self.k_norm(k), *tables)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


def call(batch: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    positions = torch.randint(0, PLACES, (batch, length), generator=generator)
    return torch.randn(batch, length, WIDTH, generator=generator).to(dtype), positions


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, HEAD)])
def test_positions_of_a_call_rotate_heads_in_one_kernel_each(dtype: torch.dtype, width: int) -> None:
    model = Attention(width).eval().to(dtype)
    exact = copy.deepcopy(model).double()
    fast = fuser.optimize(model, search="model")
    with torch.inference_mode():
        for batch, length in [(2, 9), (3, 17), (2, 33)]:
            x, positions = call(batch, length, dtype)
            truth = exact(x.double(), positions)
            error, eager = ((f(x, positions).double() - truth).norm() for f in (fast, model))
            assert float(error) <= 2 * float(eager) + 1e-6 * float(truth.norm())
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "rotary") == 2
    assert fast.unfused == () and fast.specialized == ()


def test_a_position_that_the_table_lacks_is_an_error_and_no_number() -> None:
    fast = fuser.optimize(Attention(8).eval(), search="model")
    x, positions = call(2, 9, torch.float32)
    with torch.inference_mode():
        expected = fast(x, positions)
        for wrong in (PLACES, -1):
            with pytest.raises(IndexError):
                fast(x, positions.index_fill(1, torch.tensor([4]), wrong))
        assert torch.equal(fast(x, positions), expected)
