"""Gated MLPs in every spelling: the products whose columns meet are one kernel, on every target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser

WIDTH, HIDDEN = 40, 72


class Gated(nn.Module):
    def __init__(self, gated: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gated(self, x))


def geglu(m: Any, x: Tensor) -> Tensor:
    value, gate = m.gate_up(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


SPELLINGS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "llama": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "t5": lambda m, x: F.gelu(m.gate(x), approximate="tanh") * m.up(x),
    "merged": lambda m, x: (lambda y: y[..., HIDDEN:] * F.silu(y[..., :HIDDEN]))(m.gate_up(x)),
    "geglu": geglu,
    "glu": lambda m, x: F.glu(m.gate_up(x), dim=-1),
}


def agree(fast: fuser.OptimizedModule, exact: nn.Module, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for shape in ((2, 9, WIDTH), (1, 1, WIDTH), (1, 23, WIDTH)):
            x = torch.randn(shape, generator=generator).to(dtype)
            expected = exact(x.double())
            error = (fast(x).double() - expected).norm() / expected.norm()
            assert error <= (1e-6 if dtype is torch.float32 else 8e-3)
            assert fast.unfused == ()
            assert [kernel.family for kernel in fast.kernels] == ["gemm", "gemm"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_gated_mlp_is_two_kernels(name: str) -> None:
    model, exact = (Gated(SPELLINGS[name]).eval() for _ in range(2))
    agree(fuser.optimize(model, search="model"), exact.double(), torch.float32)


@pytest.mark.parametrize("options", [{}, {"target": "cuda:emulated"}], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_mlp_is_two_kernels_on_every_target(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, exact = (Gated(SPELLINGS["llama"]).eval().to(dtype) for _ in range(2))
    agree(fuser.optimize(model, search="model", **options), exact.double(), dtype)


def test_weights_of_a_gated_mlp_follow_their_changes() -> None:
    model = Gated(SPELLINGS["llama"]).eval()
    fast = fuser.optimize(model, search="model")
    x = torch.randn(1, 7, WIDTH)
    with torch.no_grad():
        fast(x)
        model.up.weight.mul_(3)
        assert torch.allclose(fast(x), model(x), atol=1e-5)
