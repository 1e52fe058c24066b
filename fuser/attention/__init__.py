"""Exact attention under any mask, as operators of torch: :func:`sparse_attention`, and :func:`varlen_attention` of
packed documents. Attention that is linear in the length: :func:`linear_attention`, and modules by :func:`build`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fuser.attention.gradients  # noqa: F401 registers the operators and their backward pass
from fuser.attention.checks import check_attn_mask, check_heads, check_operands, check_scores
from fuser.attention.linear import linear_attention
from fuser.attention.mechanisms import NestedNamespace, add_arguments, build, configure, names
from fuser.attention.reference import is_forward_differentiated, layout_of, reference
from fuser.attention.registry import CAUSAL, DENSE, key_of, register_mask, spec_of
from fuser.attention.varlen import varlen_attention
from fuser.ir.errors import MaskError
from fuser.ir.masks import Dense, Mask, PerBatch
from fuser.ir.masks.blocks import from_block_mask, is_block_mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "NestedNamespace",
    "add_arguments",
    "attend",
    "build",
    "configure",
    "linear_attention",
    "names",
    "register_mask",
    "sparse_attention",
    "varlen_attention",
]

_EVERYTHING = Dense()


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | PerBatch | BlockMask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    score: ScoreRule | None = None,
    quantize: ScoreQuantization | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score(scale · q · kᵀ) + bias) · v over the pairs that ``mask`` allows.

    Args:
        q: (B, H, Sq, D).
        k: (B, Hkv, Sk, D); H is a multiple of Hkv, and each of k's heads serves H / Hkv heads of q in a row.
        v: (B, Hkv, Sk, Dv).
        mask: one of :mod:`fuser.masks`, whose forbidden pairs cost nothing, or a ``BlockMask`` of FlexAttention; or one
            for each batch entry (``fuser.masks.per_batch``), which are computed one after the other; or a tensor that
            broadcasts to (B, H, Sq, Sk), bool (True = may attend) or added to the scores, which saves no work apart
            from keys that nobody sees (turn a constant one into a mask with ``fuser.masks.from_dense``); or None for
            all pairs.
        bias: what is added to the scores, floating and broadcastable to (B, H, Sq, Sk), such as relative positions. It
            has gradients.
        score: what becomes of scaled scores before the mask is applied or added, such as ``fuser.SoftCap(50.0)``.
        quantize: ``fuser.Int8Attention(...)``, scores and values in 8 bits; ``fuser.DEQ(...)``, scores of few bits
            where they matter little, or ``fuser.Sanger(...)``, which leaves those out. Pairs that the mask forbids do
            not exist: they set no maximum. The backward pass takes decisions as constants and codes as if they were not
            rounded.
        scale: default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores of each row, (B, H, Sq) fp32, natural logarithm.

    Returns (B, H, Sq, Dv) in the dtype of ``q``, laid out in memory as ``q`` is (heads inside tokens, or tokens inside
    heads). A row that may see nothing gives zeros, and -inf as its log-sum-exp.

    It runs as ``torch.ops.fuser.sparse_attention`` (or ``sparse_attention_lse``): eager, exported, compiled, and as
    part of a fused program under ``fuser.optimize``. The kernels take fp32 and bf16, on GPUs fp16 as well, and heads
    up to 256 wide; everything else, the backward pass and forward-mode differentiation are plain PyTorch with all
    Sq x Sk scores in memory, said once in the log where no kernel takes the tensors. Under ``torch.compile``, make the
    mask outside of the compiled function: one made inside breaks the graph.

    Raises:
        ValueError: shapes, dtypes or devices of q, k and v do not fit each other.
        MaskError: the mask does not fit them.
        ScoreError: ``score`` is no rule of ours, or ``quantize`` no specification.
    """
    check_scores(score, quantize)
    if mask is not None and not isinstance(mask, (Mask, PerBatch, Tensor)):
        if not is_block_mask(mask):
            raise MaskError(f"mask must be one of fuser.masks, a tensor or None, got {type(mask).__name__}")
        mask = from_block_mask(mask)
    if isinstance(mask, PerBatch):
        return _by_entries(q, k, v, mask, bias, score, quantize, scale, return_lse)
    pattern, attn_mask = (None, _biased(mask, bias)) if isinstance(mask, Tensor) else (mask, _biased(None, bias))
    if not return_lse:
        return attend(q, k, v, pattern, attn_mask, rule=score, quantize=quantize, scale=scale)
    operands = _operands(q, k, v, pattern, attn_mask, score, quantize, False, 0, scale)
    return (
        _differentiated(*operands) if is_forward_differentiated() else torch.ops.fuser.sparse_attention_lse(*operands)
    )


def _by_entries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PerBatch,
    bias: Tensor | None,
    score: ScoreRule | None,
    quantize: ScoreQuantization | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sparse_attention` of one batch entry after another; neighbours with equal masks are one."""
    check_operands(q, k, v)
    if len(mask) != q.shape[0]:
        raise MaskError(f"the mask is for {len(mask)} batch entries and q has {q.shape[0]}: {tuple(q.shape)}")
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    for entry, same in itertools.groupby(mask.entries):
        stop = start + len(list(same))
        one = q[start:stop], k[start:stop], v[start:stop]
        added = bias[start:stop] if bias is not None and bias.ndim == 4 and bias.shape[0] > 1 else bias
        options: Any = {"score": score, "quantize": quantize, "scale": scale, "return_lse": return_lse}
        part = sparse_attention(*one, entry, bias=added, **options)
        parts.append((part,) if isinstance(part, Tensor) else part)
        start = stop
    outs, *sums = zip(*parts, strict=True)
    order = layout_of(q)
    out = torch.cat([part.permute(order) for part in outs], order.index(0)).permute([order.index(d) for d in range(4)])
    return (out, torch.cat(sums[0])) if return_lse else out


def _biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask given at run time and what is added to scores, as one tensor."""
    if bias is None:
        return mask
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias is added to the scores, so it must be a tensor of floating numbers, got {kind}")
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Mask | None,
    attn_mask: Tensor | None,
    *,
    causal: bool = False,
    offset: int = 0,
    rule: ScoreRule | None = None,
    quantize: ScoreQuantization | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`sparse_attention` under both a ``pattern`` and a tensor known at run time only, such as padding.

    Queries are rows ``offset`` and on of the pattern; with ``causal``, query i sees keys up to i only (counted from 0).
    """
    operands = _operands(q, k, v, pattern, attn_mask, rule, quantize, causal, offset, scale)
    if is_forward_differentiated():
        return _differentiated(*operands)[0]
    result: Tensor = torch.ops.fuser.sparse_attention(*operands)
    return result


def _differentiated(
    q: Tensor, k: Tensor, v: Tensor, key: str, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by operators that PyTorch differentiates in every mode."""
    spec = spec_of(key)
    check_heads(spec.mask, q)
    return reference(q, k, v, spec, attn_mask, scale)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Mask | None,
    attn_mask: Tensor | None,
    rule: ScoreRule | None,
    quantize: ScoreQuantization | None,
    causal: bool,
    offset: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, str, Tensor | None, float]:
    """Checked arguments of the operators."""
    check_operands(q, k, v)
    if attn_mask is not None:
        attn_mask = check_attn_mask(attn_mask, q, k)
    if pattern is None and rule is None and quantize is None:
        key = CAUSAL if causal else DENSE
    else:
        what = _EVERYTHING if pattern is None else pattern, rule, quantize, causal, offset
        # Lengths are not asked for where they do not matter, since they may be symbols of a trace.
        key = key_of(*what) or key_of(*what, q.shape[2], k.shape[2])
    return q, k, v, key, attn_mask, 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
