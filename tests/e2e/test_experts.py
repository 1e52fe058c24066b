"""Mixtures of experts whose tokens are sorted by expert: their products are kernels, whatever is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuser

pytest.importorskip("transformers.integrations.moe")

EXPERTS, WIDTH, HIDDEN, CHOSEN = 5, 24, 40, 2


class Experts(nn.Module):
    """Gated MLPs, of which every token takes those with the largest scores: x (T, WIDTH) and scores (T, EXPERTS)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shapes = ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = (
            nn.Parameter(torch.randn(EXPERTS, *(s if transposed else s[::-1]), generator=generator) / s[1] ** 0.5)
            for s in shapes
        )
        self.transposed = transposed

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        best, experts = scores.topk(CHOSEN)
        _, order = experts.flatten().sort(stable=True)
        ends = (experts.flatten()[:, None] == torch.arange(EXPERTS)).sum(0).cumsum(0).to(torch.int32)
        rows = self._multiplied(x[order // CHOSEN], self.up, ends)
        gate, up = rows.chunk(2, -1)
        rows = self._multiplied(nn.functional.silu(gate) * up, self.down, ends)
        weighted = rows * best.softmax(-1).to(rows.dtype).flatten()[order, None]
        return torch.zeros_like(weighted).index_copy(0, order, weighted).unflatten(0, (-1, CHOSEN)).sum(1)

    def _multiplied(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        matrices = weights.mT if self.transposed else weights
        if x.dtype == torch.bfloat16:
            return nn.functional.grouped_mm(x, matrices, offs=ends)
        # PyTorch captures its own of bf16 only.
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, matrices, ends)
        return product


@torch.no_grad()
def reference(model: Experts, x: Tensor, scores: Tensor) -> Tensor:
    """One token and one expert after the other in float64."""
    up, down = (w.double() if model.transposed else w.double().mT for w in (model.up, model.down))
    out = torch.zeros(x.shape, dtype=torch.float64)
    best, experts = scores.topk(CHOSEN)
    for t, weights in enumerate(best.double().softmax(-1)):
        for weight, e in zip(weights, experts[t].tolist(), strict=True):
            gate, value = (up[e] @ x[t].double()).chunk(2)
            out[t] += weight * (down[e] @ (nn.functional.silu(gate) * value))
    return out


def scores_of(rows: int, routing: str) -> Tensor:
    scores = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(rows))
    if routing == "two experts":
        scores[:, 1:3] += 100
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [True, False], ids=["nk", "kn"])
def test_experts_of_any_numbers_of_tokens(tmp_path: Path, dtype: torch.dtype, transposed: bool) -> None:
    model = Experts(transposed).to(dtype).eval()
    optimized = fuser.optimize(model)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    cases = [(7, "any"), (16, "two experts"), (1, "any"), (33, "any")]
    for rows, routing in cases:
        x, scores = torch.randn(rows, WIDTH).to(dtype), scores_of(rows, routing)
        with torch.no_grad():
            got = optimized(x, scores)
        want = reference(model, x, scores)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    assert not optimized.fallbacks
    assert [k.family for k in optimized.kernels].count("grouped_gemm") == 2
    optimized.save(tmp_path / "experts.fuser")
    loaded = fuser.load(tmp_path / "experts.fuser")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, scores), got, rtol=0, atol=0)


def test_weights_that_change_are_packed_again() -> None:
    model = Experts(True).eval()
    optimized = fuser.optimize(model)
    x, scores = torch.randn(9, WIDTH), scores_of(9, "any")
    with torch.no_grad():
        optimized(x, scores)
        model.up.mul_(2)
        got = optimized(x, scores)
    want = reference(model, x, scores)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_gpu_leaves_them_to_pytorch() -> None:
    model = Experts(True).eval()
    optimized = fuser.optimize(model, target="cuda:emulated")
    x, scores = torch.randn(9, WIDTH), scores_of(9, "any")
    with torch.no_grad():
        got = optimized(x, scores)
    want = reference(model, x, scores)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert any("grouped_gemm" in f"{name} {reason}" for name, reason in optimized.unfused)
