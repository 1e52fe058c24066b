"""The backward pass of attention, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuser.attention.operators import TAGS
from fuser.attention.reference import chosen_of, probabilities_of, weighted_sum, widened
from fuser.attention.registry import spec_of
from fuser.ir.attention import AttentionSpec

torch.library.define(
    "fuser::sparse_attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, str spec, Tensor? attn_mask, float scale, bool bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@torch.library.impl("fuser::sparse_attention_backward", "default")
def _gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    attn_mask: Tensor | None,
    scale: float,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gradients_of(grad, grad_lse, q, k, v, spec_of(spec), attn_mask, scale, bias)


def gradients_of(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    attn_mask: Tensor | None,
    scale: float,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, with ``bias``, of the tensor added to the scores; probabilities are computed again."""
    products, scores, full = chosen_of(q, k, spec, attn_mask, scale)
    p, _ = probabilities_of(scores)
    forbidden = torch.isneginf(scores)
    group = q.shape[1] // max(k.shape[1], 1)
    grad = grad.to(p.dtype)
    dp = (grad @ widened(v, group, p.dtype).mT).masked_fill(forbidden, 0.0)
    inner = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - inner if grad_lse is None else dp - inner + grad_lse.to(p.dtype)[..., None])

    def narrow(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(1, (k.shape[1], group))  # type: ignore[no-untyped-call]
        return grouped.sum(2).to(q.dtype).contiguous()

    db = None if attn_mask is None or not bias else ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if spec.rule is not None:
        ds = (ds * spec.rule.derivative.evaluate(products)[0]).masked_fill(forbidden, 0.0)
    keys, dv = widened(k, group, p.dtype), narrow(p.mT @ grad)
    if spec.quantize is None or full is None:
        dq, dk = weighted_sum(ds, keys, forbidden), ds.mT @ (q.to(p.dtype) * scale)
    else:
        # Scores have the gradient of products of the rows that their codes stand for.
        high = ds.masked_fill(~full, 0.0)
        low = ds - high
        how, queries = spec.quantize, q.to(p.dtype)
        dq = weighted_sum(high, how.rounded_in_full(keys), ~full)
        dq += weighted_sum(low, how.rounded(keys, 1), forbidden | full)
        dk = (high.mT @ how.rounded_in_full(queries) + low.mT @ how.rounded(queries, 0)) * scale
    return (dq * scale).to(q.dtype), narrow(dk), dv, q.new_empty(0) if db is None else db


@torch.library.register_fake("fuser::sparse_attention_backward")  # type: ignore[untyped-decorator]
def _fake_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    attn_mask: Tensor | None,
    scale: float,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [q.new_empty(t.shape) for t in (q, k, v)]
    if attn_mask is None or not bias:
        return shapes[0], shapes[1], shapes[2], q.new_empty(0)
    return shapes[0], shapes[1], shapes[2], attn_mask.new_empty(attn_mask.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, key, attn_mask, scale = inputs
    ctx.save_for_backward(q, k, v, attn_mask)
    # The backward pass finds the specification by its key because somebody holds its mask.
    ctx.key, ctx.spec, ctx.scale = key, spec_of(key), scale


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    q, k, v, attn_mask = ctx.saved_tensors
    bias = attn_mask is not None and attn_mask.is_floating_point() and ctx.needs_input_grad[4]
    dq, dk, dv, db = torch.ops.fuser.sparse_attention_backward(
        grad, grad_lse, q, k, v, ctx.key, attn_mask, ctx.scale, bias
    )
    return dq, dk, dv, None, db if bias else None, None


for _name in ("sparse_attention", "sparse_attention_lse"):
    torch.library.register_autograd(f"fuser::{_name}", _backward, setup_context=_keep)
