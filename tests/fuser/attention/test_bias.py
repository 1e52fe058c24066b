"""A bias beside a mask, of every shape that broadcasts, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import inputs
from attention_reference import exact
from torch import Tensor

import fuser
from fuser import SoftCap, masks, sparse_attention
from fuser.ir.errors import MaskError

MASK = masks.Longformer(6, 2)
SEEN = MASK.dense(70, 90)
PADDING = (torch.arange(90) < 80)[None, None, None]


def biased(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "shape", [(70, 90), (1, 90), (4, 70, 90), (2, 4, 70, 90), (2, 1, 1, 90), (1, 4, 70, 1), (1,), ()]
)
@pytest.mark.parametrize("score", [None, SoftCap(1.5)])
def test_a_static_mask_and_a_bias(shape: tuple[int, ...], score: SoftCap | None) -> None:
    q, k, v = inputs()
    bias = biased(*shape)
    out, lse = sparse_attention(q, k, v, MASK, bias=bias, score=score, return_lse=True)
    want = exact(q, k, v, SEEN, bias, cap=1.5 if score else None)
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("kind", ["bool", "added", "none", "of batch entries"])
def test_a_bias_beside_whatever_else_masks(kind: str) -> None:
    q, k, v = inputs()
    bias = biased(2, 4, 70, 90)
    each = masks.per_batch([masks.Causal(), masks.Dense()])
    mask: Any = {
        "bool": PADDING,
        "added": torch.where(PADDING, 0.5, -math.inf),
        "none": None,
        "of batch entries": each,
    }[kind]
    out = sparse_attention(q, k, v, mask, bias=bias)
    seen = {"none": None, "of batch entries": each.dense(70, 90)[:, None]}.get(kind, PADDING)
    want, _ = exact(q, k, v, seen, bias + 0.5 if kind == "added" else bias)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)  # type: ignore[union-attr]


def test_a_bias_has_gradients_beside_a_mask() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 2, 2, 5, 6, 3))
    bias = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)

    def attend(*operands: Tensor) -> Any:
        return sparse_attention(*operands[:3], masks.Causal(), bias=operands[3])

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))


def test_a_bias_that_fits_nothing() -> None:
    q, k, v = inputs()
    for wrong in (SEEN, torch.ones(90, dtype=torch.long), 1.0):
        with pytest.raises(ValueError, match="must be a tensor of floating numbers"):
            sparse_attention(q, k, v, MASK, bias=wrong)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="does not broadcast"):
        sparse_attention(q, k, v, MASK, bias=biased(3, 70, 90))
    assert "bias" in (fuser.sparse_attention.__doc__ or "")
