"""What attention in 8 bits promises about its numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser import Int8Attention, SoftCap
from fuser.ir.errors import ScoreError

# Of a row whose largest element is one, codes are off by half of a 127th, so a score of width d by d / 127 at most.
STEP = 1.0 / 127.0


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 48), st.booleans(), st.integers(0, 999), st.floats(-30, 30))
def test_scores_are_those_of_attention_to_the_step_of_codes(
    keys: int, width: int, smooth: bool, seed: int, far: float
) -> None:
    q, _, _ = inputs(1, 2, 5, width, seed=seed, dtype=torch.float64)
    k = inputs(1, 2, keys, width, seed=seed + 1, dtype=torch.float64)[1] + far
    how = Int8Attention(smooth=smooth)
    centred = k - k.mean(-2, keepdim=True) if smooth else k
    sizes = q.abs().amax(-1, keepdim=True) * centred.abs().amax(-1, keepdim=True).mT
    error = (how.predicted(q, k, 0.3) - 0.3 * q @ k.mT).abs()
    assert bool((error <= 0.3 * width * sizes * (STEP + STEP**2) + 1e-9).all())


def test_what_all_keys_have_in_common_costs_no_digits() -> None:
    q, k, v = inputs(1, 3, 50, 32, dtype=torch.float64)
    far = k + 20 * torch.randn(1, 3, 1, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = {
        smooth: float((Int8Attention(smooth=smooth).reference(q, far, v)[0] - dense(q, far, v)).norm())
        for smooth in (True, False)
    }
    assert errors[True] < 0.1 * errors[False]
    near, _ = Int8Attention().reference(q, k, v)
    moved, _ = Int8Attention().reference(q, far, v)
    # Codes of the same rows, less what they have in common.
    torch.testing.assert_close(moved, near, rtol=0, atol=1e-6)


def test_codes_are_whole_numbers_up_to_127() -> None:
    _, k, _ = inputs(2, 2, 9, 10)
    k[0, 0, 3] = 0.0
    codes, step = Int8Attention(smooth=False).codes(k, 1)
    assert torch.equal(codes, codes.round())
    largest = codes.abs().amax(-1)
    assert set(largest.flatten().tolist()) == {0.0, 127.0} and largest[0, 0, 3] == 0 and step[0, 0, 3] == 0
    torch.testing.assert_close(codes * step, k, rtol=0, atol=float(k.abs().max()) * STEP / 2 + 1e-6)


def test_heads_with_keys_that_are_not_finite_are_exact() -> None:
    q, k, v = inputs(1, 2, 6, 8, dtype=torch.float64)
    k[0, 1, 4, 2] = -math.inf
    out, full = Int8Attention().reference(q, k, v)
    assert full[0, 1].all() and not full[0, 0].any()
    want = dense(q, k, v)
    torch.testing.assert_close(out[0, 1], want[0, 1], equal_nan=True)
    q[0, 0, 3, 0] = math.nan
    out, full = Int8Attention().reference(q, k, v)
    assert out[0, 0, 3].isnan().all() and out[0, 0, :3].isfinite().all()


def test_gradients_are_those_of_attention_nearly() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 12, 16, dtype=torch.float64))
    grad = torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad((Int8Attention().reference(q, k, v)[0] * grad).sum(), (q, k, v))
    want = torch.autograd.grad((dense(q, k, v) * grad).sum(), (q, k, v))
    for a, b in zip(found, want, strict=True):
        assert float((a - b).norm()) < 0.03 * float(b.norm())


def test_rules_see_whole_scores() -> None:
    """A cap is of the score, not of what is left of it without the mean of keys."""
    q, k, v = inputs(1, 2, 20, 16, dtype=torch.float64)
    k = k + 3.0
    capped = torch.softmax(2.0 * torch.tanh(q @ k.mT / 4.0 / 2.0), -1) @ v
    out, _ = Int8Attention().reference(q, k, v, score=SoftCap(2.0))
    assert float((out - capped).norm()) < 0.02 * float(capped.norm())


def test_no_keys_and_no_rows() -> None:
    q, k, v = inputs(1, 2, 3, 4)
    out, full = Int8Attention().reference(q, k[:, :, :0], v[:, :, :0])
    assert not out.any() and full.shape == (1, 2, 3, 0)
    assert Int8Attention().reference(q[:, :, :0], k, v)[0].shape == (1, 2, 0, 4)


@pytest.mark.parametrize(
    "given", [{"smooth": 1}, {"skip": 1.0}, {"skip": -0.1}, {"skip": True}, {"skip": "0"}, {"skip": math.nan}]
)
def test_fields_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ScoreError, match=next(iter(given))):
        Int8Attention(**given)


def test_what_depends_on_other_rows() -> None:
    assert Int8Attention(smooth=False).is_by_row and not Int8Attention().is_by_row
    assert Int8Attention().is_by_document(None) and not Int8Attention().is_by_document(None, lse=True)
    assert not Int8Attention().is_by_document(SoftCap(2.0)) and Int8Attention(smooth=False).is_by_document(SoftCap(2.0))
