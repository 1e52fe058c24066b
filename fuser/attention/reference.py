"""Attention in plain PyTorch, with all scores in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fuser.ir.attention import AttentionSpec
from fuser.ir.masks import Dense


def reference(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in plain PyTorch, on any device and in any floating-point dtype.

    16-bit types are computed in fp32. Memory grows with B x H x Sq x Sk.
    """
    scores = chosen_of(q, k, spec, attn_mask, scale).scores
    probabilities, lse = probabilities_of(scores)
    values = widened(v, q.shape[1] // k.shape[1], scores.dtype)
    return weighted_sum(probabilities, values, torch.isneginf(scores)).to(q.dtype), lse


def weighted_sum(weights: Tensor, values: Tensor, forbidden: Tensor, out: Tensor | None = None) -> Tensor:
    """``weights`` (…, S, K) times ``values`` (…, K, D), where weight 0 of a ``forbidden`` (…, S, K) key keeps out NaN.

    ``out`` (…, S, D) receives the result, if it is given.
    """
    poison = ~torch.isfinite(values)
    if not poison.any():
        return torch.matmul(weights, values, out=out)
    out = torch.matmul(weights, values.masked_fill(poison, 0.0), out=out)
    for key in poison.any(-1).view(-1, values.shape[-2]).any(0).nonzero().flatten().tolist():
        one = slice(key, key + 1)
        part = weights[..., one] * values[..., one, :].where(poison[..., one, :], 0.0)
        out += part.masked_fill_(forbidden[..., one], 0.0)
    return out


def widened(t: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Keys or values with a head for every head of q."""
    return t.to(dtype).repeat_interleave(group, 1)


def products_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, H, Sq, Sk), which nothing has changed yet."""
    dtype = arithmetic_dtype(q)
    return (q.to(dtype) * scale) @ widened(k, q.shape[1] // max(k.shape[1], 1), dtype).mT


class Chosen(NamedTuple):
    """Scores (B, H, Sq, Sk), what they are made of, and, with quantization, which of them are computed in full."""

    products: Tensor
    scores: Tensor
    full: Tensor | None = None


def chosen_of(q: Tensor, k: Tensor, spec: AttentionSpec, attn_mask: Tensor | None, scale: float) -> Chosen:
    """The scores that ``spec`` makes; -inf for pairs that are not allowed, or are left out."""
    products = products_of(q, k, scale)
    how = spec.quantize
    if how is None:
        return Chosen(products, scores_of(products, spec, attn_mask))
    queries, keys = q.to(products.dtype), widened(k, q.shape[1] // max(k.shape[1], 1), products.dtype)
    predicted = how.predicted(queries, keys, scale)
    full = how.chosen(scores_of(predicted, spec, _seen(attn_mask) if how.unmasked_maximum else attn_mask))
    products = how.mixed(how.in_full(queries, keys, scale), predicted, full)
    scores = scores_of(products, spec, attn_mask)
    return Chosen(products, scores.masked_fill(~full, -math.inf) if how.prunes else scores, full)


def _seen(attn_mask: Tensor | None) -> Tensor | None:
    """Which pairs a mask given at run time allows, without what it adds to their scores."""
    return attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else ~torch.isneginf(attn_mask)


def scores_of(products: Tensor, spec: AttentionSpec, attn_mask: Tensor | None) -> Tensor:
    """What becomes of scaled scores (B, H, Sq, Sk); -inf for pairs that are not allowed, whatever they hold."""
    scores = products if spec.rule is None else spec.rule.expression.evaluate(products)[0]
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = (scores + attn_mask.to(scores.dtype)).masked_fill(torch.isneginf(attn_mask), -math.inf)
    if not isinstance(spec.mask, Dense):
        allowed = spec.mask.dense(*scores.shape[2:]).to(scores.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores


def probabilities_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over keys, zeros where there are none, and the log-sum-exp."""
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0), torch.logsumexp(scores, -1)


def arithmetic_dtype(q: Tensor) -> torch.dtype:
    """What plain PyTorch computes in, and the dtype of log-sum-exps."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def is_forward_differentiated() -> bool:
    """Whether tangents may be carried along (``torch.func.jvp``, ``torch.autograd.forward_ad``), which operators of
    ``torch.library`` drop."""
    return forward_ad._current_level >= 0


def layout_of(q: Tensor) -> tuple[int, int, int, int]:
    """The dimensions of queries (B, H, Sq, D) from the outermost in memory to the innermost, heads' elements last."""
    # Of equal strides one is of a dimension with one index, which may be anywhere.
    batch, heads, rows = sorted(range(3), key=lambda d: (q.stride(d), q.shape[d]), reverse=True)
    return batch, heads, rows, 3


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Room for an output (B, H, Sq, Dv), laid out as ``q`` is."""
    order = layout_of(q)
    shape = (*q.shape[:3], v.shape[3])
    return v.new_empty([shape[d] for d in order]).permute([order.index(d) for d in range(4)])
