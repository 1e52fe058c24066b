"""Gradients through attention against autograd and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_cases import LAYOUTS, OPERATOR, WITH_LSE, inputs, relative
from torch import Tensor

from fuser import masks, sparse_attention
from fuser.attention import register_mask, registry


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 2, 5, 6, 3))
    attn_mask = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True) if bias else None
    key = register_mask(masks.Causal())

    def both(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = WITH_LSE(q, k, v, key, attn_mask, 0.5)
        return out, lse, OPERATOR(q, k, v, key, attn_mask, 0.5)

    assert torch.autograd.gradcheck(both, (q, k, v, attn_mask), fast_mode=True)


def test_gradients_in_single_precision() -> None:
    mask = masks.SlidingWindow(6, 2)
    leaves = [t.requires_grad_() for t in inputs()]
    weight = torch.randn(2, 4, 70, 32, generator=torch.Generator().manual_seed(5))
    (sparse_attention(*leaves, mask) * weight).sum().backward()  # type: ignore[operator]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    dense = torch.zeros(70, 90, dtype=torch.float64).masked_fill(~mask.dense(70, 90), -math.inf)
    seen = mask.dense(70, 90).any(-1)
    want = F.scaled_dot_product_attention(*doubles, dense, enable_gqa=True)
    (want * weight).sum().backward()
    assert bool(seen.all())
    for mine, theirs in zip(leaves, doubles, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 2e-6


def test_gradients_behind_more_masks_than_the_registry_keeps() -> None:
    q, k, v = inputs(1, 1, 1, 4, 4)
    q.requires_grad_()
    out = sparse_attention(q, k, v, masks.SlidingWindow(1, 1))
    for i in range(registry._RECENT + 1):
        sparse_attention(q, k, v, masks.SlidingWindow(i, 0))
    (got,) = torch.autograd.grad(out.sum(), q)  # type: ignore[union-attr]
    leaf = q.detach().double().requires_grad_()
    seen = masks.SlidingWindow(1, 1).dense(4)
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(leaf, k.double(), v.double(), seen).sum(), leaf)
    assert relative(got, want) < 2e-6


@pytest.mark.parametrize("given", ["mask", "tensor"])
def test_poison_that_nobody_sees_does_not_reach_gradients(given: str) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    allowed = masks.Causal().dense(70, 90) & (torch.arange(90) != 21)
    mask = masks.from_dense(allowed) if given == "mask" else allowed
    want = torch.autograd.grad(sparse_attention(*leaves, mask).sum(), leaves)  # type: ignore[union-attr]
    poisoned = [t.detach().clone() for t in leaves]
    for t in poisoned[1:]:
        t[:, :, 21] = math.nan
    for t in poisoned:
        t.requires_grad_()
    got = torch.autograd.grad(sparse_attention(*poisoned, mask).sum(), poisoned)  # type: ignore[union-attr]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", [OPERATOR, WITH_LSE])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_registered_well(operator: Any, transposed: bool) -> None:
    q, k, v = (LAYOUTS["heads inside tokens"](t) if transposed else t for t in inputs())
    key = register_mask(masks.Longformer(4, 3))
    torch.library.opcheck(operator, (q.requires_grad_(), k, v, key, None, 0.2))
    attn_mask = torch.rand(2, 1, 1, 90) > 0.3
    torch.library.opcheck(operator, (q.detach(), k, v, key, attn_mask, 0.2))


@pytest.mark.parametrize("given", ["mask", "tensor", "bias"])
def test_tangents(given: str) -> None:
    q, k, v = (t.double() for t in inputs(1, 4, 2, 9, 11, 8))
    allowed = masks.SlidingWindow(3, 2).dense(9, 11) & (torch.arange(9) != 4)[:, None]
    bias = torch.where(allowed, 0.5, -math.inf).double()
    mask = {"mask": masks.from_dense(allowed), "tensor": allowed, "bias": bias}[given]
    tangents = inputs(1, 4, 2, 9, 11, 8, seed=7)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sparse_attention(q, k, v, mask, return_lse=True)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sparse_attention(q, k, v, mask)

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = torch.zeros(9, 11, dtype=torch.float64).masked_fill(~allowed, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True).nan_to_num()

    # The true rate of change, by differences on both sides: their error is of the second order of the step.
    step, doubled = 1e-5, [t.double() for t in tangents]
    ahead, behind = (exactly(*(t + s * d for t, d in zip((q, k, v), doubled, strict=True))) for s in (step, -step))
    want = (ahead - behind) / (2 * step)
    got, tangent = torch.func.jvp(alone, (q, k, v), tuple(doubled))
    torch.testing.assert_close(got, exactly(q, k, v))
    torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-8)
    (out, _), (tangent, of_lse) = torch.func.jvp(both, (q, k, v), tuple(doubled))
    torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-8)
    assert torch.equal(out, got) and bool(of_lse[:, :, :4].any())
    single = torch.func.jvp(alone, (q.float(), k.float(), v.float()), tangents)[1]
    assert relative(single, want) < 1e-5
