"""Casts, rounding and clamping inside of kernels: bit for bit what eager gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser

WIDTH = 32
SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3.4e38, 1e-40, 0.5, 1.5, 2.5, 128.5, -129.5])
X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0)) * 4
X[0, 0, : len(SPECIAL)] = SPECIAL


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def quantized(x: Tensor, scale: float = 0.037) -> Tensor:
    """Simulated int8 with a straight-through estimator."""
    q = torch.clamp(torch.round(x / scale), -128, 127) * scale
    return x + (q - x).detach()


EXACT: dict[str, Callable[[Any, Tensor], Any]] = {
    "the error of bf16": lambda m, x: x - x.bfloat16().float(),
    "the error of fp16, with its overflow": lambda m, x: (x * 1e4) - (x * 1e4).half().float(),
    "bf16 of a sum and its rounding": lambda m, x: (s := x + x * 0.3, s.to(torch.bfloat16), s.to(torch.bfloat16) * 3.0),
    "a promoted sum": lambda m, x: (x * 0.7).bfloat16() + x * 0.3,
    "straight through": lambda m, x: quantized(x),
    "products that must not be contracted": lambda m, x: x - torch.round(x * 3.3 + 0.7) * 0.1,
    "PyTorch's own": lambda m, x: torch.fake_quantize_per_tensor_affine(x * 2.0, 0.1, 3, -128, 127) * 1.5,
    "integers": lambda m, x: x.clamp(-9, 9).to(torch.int32).float() * 0.5,
    "clamps": lambda m, x: (
        x.clamp(min=0.0),
        x.clamp(max=-0.0),
        F.hardtanh(x),
        F.hardtanh(x, 0.0, 6.0),
        x.clamp_min(1),
        1 / x.clamp(-0.0),
    ),
    "a clamp to NaN": lambda m, x: x.clamp(min=math.nan) + 1.0,
}


@pytest.mark.parametrize("target", ["cpu", "cuda:emulated"])
def test_rounding_is_that_of_eager_bit_for_bit(target: str) -> None:
    def run(m: Any, x: Tensor) -> Any:
        return [EXACT[name](m, x) for name in EXACT]

    model = Model(run).eval()
    fast = fuser.optimize(model, target=target)
    with torch.no_grad():
        for name, mine, theirs in zip(EXACT, fast(X), model(X), strict=True):
            for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (mine, theirs)), strict=True):
                assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()), name
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    assert len(fast.programs) == 1 and fast.fallbacks == ()
    left = {str(reason).rsplit(" ", 1)[-1] for _, reason in fast.unfused}
    assert left <= {"aten.fake_quantize_per_tensor_affine.default", "aten.to.dtype"}


def test_zeros_keep_their_signs() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return torch.reciprocal(torch.round(x.bfloat16().float().clamp(-1.0, 0.0)))

    model = Model(run).eval()
    x = torch.tensor([[-0.0, 0.0, -0.4, 0.4, 1e-40, -1e-40, -3.0, 2.0]]).repeat(3, 4)
    assert torch.equal(fuser.optimize(model)(x), model(x))


def close(model: nn.Module, x: Tensor) -> None:
    """Agreement with eager where rounding sits behind sums that kernels add in another order: nearly everywhere."""
    with torch.no_grad():
        mine, theirs = fuser.optimize(model)(x), model(x)
    different = (mine - theirs).abs() > 1e-5 * theirs.abs().amax()
    # A step of bf16, or of the quantizer, where the sum lay next to the middle between two.
    assert float(different.float().mean()) < 0.02
    assert float((mine - theirs).abs().max()) <= 0.04 + 2.0**-7 * float(theirs.abs().max())


def test_rounding_around_products_norms_and_softmax() -> None:
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))

    def bf16(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    close(Model(lambda m, x: bf16(m.linear(bf16(x))) * 2.0).eval(), x)
    close(Model(lambda m, x: bf16(m.norm(bf16(x + 0.1)))).eval(), x)
    close(Model(lambda m, x: bf16(torch.softmax(bf16(x), -1))).eval(), x)
    close(Model(lambda m, x: quantized(F.gelu(m.linear(quantized(x))))).eval(), x)


def test_scores_rounded_to_bf16_stay_rounded_in_a_model_of_fp32() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = (m.linear(x) * 9.0).unflatten(-1, (4, 8)).transpose(1, 2)
        scores = (q @ q.mT).bfloat16().float()
        return (torch.softmax(scores, -1).bfloat16().float() @ q).transpose(1, 2).flatten(2)

    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    model = Model(run).eval()
    with torch.no_grad():
        mine, theirs = fuser.optimize(model)(x), model(x)
    # Without the rounding of scores of up to 500, the difference is 0.6.
    assert float((mine - theirs).abs().max()) < 0.02 * float(theirs.abs().max())


def test_a_model_of_bf16_rounds_where_it_casts() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        total = x + x * 0.3
        return total.float() - (x.float() + (x * 0.3).float())

    model = Model(run).to(torch.bfloat16).eval()
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        mine = fuser.optimize(model)(x)
    # What is between two bf16 operators may stay in fp32, so only the total's rounding is certain.
    assert bool((mine != 0).any())
    assert float(mine.abs().max()) <= 2.0**-7 * float(x.abs().max()) * 1.3
