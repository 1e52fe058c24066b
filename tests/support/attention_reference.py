"""What attention is, in float64, for every test that computes it some other way."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, as the definition has them; rows without keys give zeros and -inf.

    ``cap`` limits scaled scores, softly. ``allowed`` (bool) and ``bias`` broadcast to (B, H, Sq, Sk); heads of ``k``
    and ``v`` serve groups of those of ``q``.
    """
    q, k, v = (t.detach().double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([t[:, h // group] for h in range(q.shape[1])], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = torch.where(allowed, scores, -math.inf)
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -math.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bhkd->bhqd", weights / total.clamp(min=1e-300), v)
    return out, (top + total.log())[..., 0]
