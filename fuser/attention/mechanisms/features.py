"""Attention over given keys, and the feature maps that approximate it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q · kᵀ / √D + bias) · v without the keys that are ``hidden``; rows that see nothing give zeros.

    ``q`` is (…, Sq, D), ``hidden`` (bool, True = not seen) and ``bias`` broadcast to (…, Sq, Sk).
    """
    mask = None if hidden is None else ~hidden
    if bias is not None:
        mask = (bias if hidden is None else bias.masked_fill(hidden, -math.inf)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def wide(x: Tensor) -> Tensor:
    """At least fp32, whose range squares and exponentials of 16-bit numbers need."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def half_norms(x: Tensor) -> Tensor:
    """‖x‖² / (2 √D), (…, N, D) → (…, N, 1)."""
    return x.square().sum(-1, keepdim=True) * (0.5 / math.sqrt(x.shape[-1]))


def attend_features(w: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """softmax over keys of w · k / √D - ‖k‖² / (2 √D), times values: attention with lengths of keys as a bias.

    The scores are logarithms of positive random features. (…, C, D).
    """
    return attend(wide(w), wide(k), wide(v), hidden, (-half_norms(wide(k))).mT).to(v.dtype)


def projected(x: Tensor, directions: Tensor) -> Tensor:
    """x (B, H, N, D) on random directions (H, M, D), scaled so that products approximate q · k / √D. (B, H, N, M)."""
    return x @ directions.mT.to(x.dtype) * (1 / math.sqrt(math.sqrt(x.shape[-1])))


def fourier(x: Tensor, directions: Tensor) -> Tensor:
    """Sines and cosines (Random Feature Attention, Peng et al., 2021), (B, H, N, D) → (B, H, N, 2 M)."""
    on = projected(x, directions)
    length = half_norms(x)
    length = torch.exp(length - length.amax(-2, keepdim=True))
    return torch.cat([on.sin(), on.cos()], -1) * (length * (1 / math.sqrt(directions.shape[-2])))


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al., 2021), (…, D) → (…, 2 D ν)."""
    signs = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([signs * signs.roll(shift, -1) for shift in range(1, nu + 1)], -1)


def cosine_weighted(features: Tensor) -> Tensor:
    """Features whose products are weighted by cos(π/2 · (i - j) / N) (cosFormer, Qin et al., 2022): twice as many."""
    length = features.shape[-2]
    angle = (torch.arange(length, device=features.device).to(features.dtype) * (math.pi / 2 / length)).unsqueeze(-1)
    return torch.cat([features * angle.cos(), features * angle.sin()], -1)


def orthogonal_directions(heads: int, count: int, width: int) -> Tensor:
    """Random directions (heads, count, width), orthogonal in blocks, with the lengths of Gaussian vectors."""
    blocks = torch.randn(heads, -(-count // width), width, width)
    orthogonal: Tensor = torch.linalg.qr(blocks).Q
    lengths = torch.randn(heads, count, width).square().sum(-1, keepdim=True).sqrt()
    return orthogonal.mT.flatten(1, 2)[:, :count] * lengths
