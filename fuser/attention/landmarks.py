"""Averages and their sums, and attention with importance weights, as operators of torch that are plain PyTorch but for
fused programs: what :class:`~fuser.attention.mechanisms.randomized.LaraAttention` consists of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fuser.ir.importance import importance_bias

torch.library.define("fuser::averages", "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale) -> (Tensor, Tensor)")
torch.library.define("fuser::log_sums", "(Tensor q, Tensor k, Tensor? bias, float scale) -> Tensor")
torch.library.define(
    "fuser::importance_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor sums, Tensor heuristic, Tensor offset, "
    "float coefficient, float scale) -> Tensor",
)


def averages(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q · kᵀ / √D + bias) · v of (B, H, S, D), and the logarithm (B, H, Sq) of what softmax divides by.

    Zeros and -inf for queries that see nothing; ``bias`` broadcasts to (B, H, Sq, Sk).
    """
    found: tuple[Tensor, Tensor] = torch.ops.fuser.averages(q, k, v, bias, 1 / math.sqrt(q.shape[-1]))
    return found


def log_sums(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """The second of :func:`averages` alone."""
    found: Tensor = torch.ops.fuser.log_sums(q, k, bias, 1 / math.sqrt(q.shape[-1]))
    return found


def importance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    sums: Tensor,
    heuristic: Tensor,
    offset: Tensor,
    coefficient: float,
) -> Tensor:
    """softmax(q · kᵀ / √D + bias) · v with the bias of :func:`fuser.ir.importance.importance_bias`, whose scale is 1 /
    √D: q is (B, H, N, D), k, v and landmarks (B, H, C, D), all others (B, H, C)."""
    scale = 1 / math.sqrt(q.shape[-1])
    out: Tensor = torch.ops.fuser.importance_attention(
        q, k, v, landmarks, sums, heuristic, offset, float(coefficient), scale
    )
    return out


@torch.library.impl("fuser::averages", "CompositeImplicitAutograd")
def _averages(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out, torch.ops.fuser.log_sums(q, k, bias, scale)


@torch.library.impl("fuser::log_sums", "CompositeImplicitAutograd")
def _log_sums(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    return (scores if bias is None else scores + bias).logsumexp(-1)


@torch.library.impl("fuser::importance_attention", "CompositeImplicitAutograd")
def _importance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    sums: Tensor,
    heuristic: Tensor,
    offset: Tensor,
    coefficient: float,
    scale: float,
) -> Tensor:
    bias = importance_bias(q, landmarks, sums, heuristic, offset, coefficient=coefficient, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
