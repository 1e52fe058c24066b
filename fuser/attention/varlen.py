"""Attention over packed documents of any lengths: :func:`varlen_attention`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser.attention.checks import check_heads, check_operands, check_scores, check_tensors
from fuser.attention.gradients import gradients_of
from fuser.attention.jagged import offsets_of
from fuser.attention.launch import NoKernelError, run_plan, say, target_for
from fuser.attention.operators import TAGS
from fuser.attention.reference import arithmetic_dtype, is_forward_differentiated, reference
from fuser.attention.registry import DENSE, key_of_any_lengths, pin, spec_of
from fuser.ir.errors import BuildError, CacheError, MaskError, ToolchainError
from fuser.ir.masks import Dense, Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.target import Target
from fuser.kernels.attention import cached_plan
from fuser.kernels.base import Literal
from fuser.kernels.documents import document_mask, plan_documents, seeing
from fuser.kernels.plan import AttentionPlan, Int64s, ramp

_PACKED = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, str spec, float scale"
torch.library.define("fuser::varlen_attention", f"({_PACKED}, bool return_lse) -> (Tensor, Tensor)", tags=TAGS)
torch.library.define(
    "fuser::varlen_attention_backward",
    f"(Tensor grad, Tensor? grad_lse, {_PACKED}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_EVERYTHING = Dense()


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | None = None,
    *,
    score: ScoreRule | None = None,
    quantize: ScoreQuantization | None = None,
    scale: float | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every document to itself, where documents of any lengths lie one behind the other without padding.

    Args:
        q: (total_q, H, D), the queries of all documents.
        k: (total_k, Hkv, D); H is a multiple of Hkv, and each of k's heads serves H / Hkv heads of q in a row.
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (documents + 1,) int32 or int64: document i has queries ``cu_seqlens_q[i]`` to
            ``cu_seqlens_q[i + 1]``; from 0, ascending, to total_q. On the device of ``q`` or on the CPU, where it is
            read at every call. Documents may be empty.
        cu_seqlens_k: the same of keys, for as many documents; None where they are those of the queries.
        mask: one of :mod:`fuser.masks`, which is applied to each document by itself; None for all pairs.
        score: as in :func:`fuser.sparse_attention`.
        quantize: as there, of each document by itself: what depends on more than a row (the mean of keys,
            ``calibration="dynamic"``, the largest one of a head or a sample) depends on one document, and documents run
            one after another then, but for the mean of keys without ``score`` and ``return_lse``.
        scale: default 1 / sqrt(D).
        max_seqlen_q, max_seqlen_k: taken as flash-attention's functions take them and not needed, since the lengths are
            read from the offsets.
        return_lse: also return the log-sum-exp of the scores of each row, (H, total_q) fp32, natural logarithm.

    Instead of packed tensors with offsets ``q``, ``k`` and ``v`` may be nested ones, (documents, lengths, H, D) with
    ``layout=torch.jagged``; so is the result then, with the offsets of ``q``.

    Returns (total_q, H, Dv) in the dtype of ``q``, contiguous. A row that may see nothing gives zeros, and -inf as its
    log-sum-exp.

    Where a document has other numbers of queries and keys, its queries are the last of its keys, as in flash-attention
    since 2.1 (masks are aligned bottom right, other than in :func:`fuser.sparse_attention`): query i stands where key
    i + keys - queries does, and one that stands before the first key sees nothing. None and ``Dense()`` allow all pairs
    whatever the numbers.

    New lengths need no other code, only another plan of a few milliseconds, which layers with the same lengths share:
    made by arithmetic for all pairs, ``Causal`` and ``SlidingWindow`` and what ``&`` makes of these, else put together
    of plans of single documents, which are remembered by their lengths. It is ``torch.ops.fuser.varlen_attention``,
    eager, exported and compiled. The kernels take what those of :func:`fuser.sparse_attention` take; everything else
    and the backward pass are plain PyTorch, one document after another. A mask with functions (``from_mask_mod``) is
    known to graphs of this process alone.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or offsets do not ascend from 0 to the number of
            rows.
        MaskError: the mask does not fit a document.
        ScoreError: ``score`` is no rule of ours, or ``quantize`` no specification.
    """
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_tensors(q=q, k=k, v=v, **{name: cu for name, cu in offsets.items() if cu is not None})
    if q.is_nested or k.is_nested or v.is_nested:
        more: dict[str, Any] = {"score": score, "quantize": quantize, "scale": scale, "return_lse": return_lse}
        return _of_nested(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, **more)
    if cu_seqlens_q is None:
        raise ValueError(
            "cu_seqlens_q says where the documents of q begin; only nested tensors know that by themselves"
        )
    check_scores(score, quantize)
    if mask is not None and not isinstance(mask, Mask):
        raise MaskError(f"mask must be one of fuser.masks or None, which every document has, got {type(mask).__name__}")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    key = DENSE
    if mask is not None or score is not None or quantize is not None:
        key = key_of_any_lengths(_EVERYTHING if mask is None else mask, score, quantize)
    operands = q, k, v, cu_seqlens_q, cu_seqlens_k, key, scale
    if is_forward_differentiated():
        out, lse = _reference(*operands)
    else:
        out, lse = torch.ops.fuser.varlen_attention(*operands, return_lse)
    return (out, lse) if return_lse else out


def _of_nested(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Mask | None,
    **more: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if not (q.is_nested and k.is_nested and v.is_nested) or cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise ValueError("q, k and v are nested tensors all three or none of them, and have no cu_seqlens beside them")
    ours, keys, values = (offsets_of(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
    if not torch.equal(keys, values):
        raise ValueError("k and v must have equal lengths")
    found = varlen_attention(q.values(), k.values(), v.values(), ours, keys, mask, **more)
    out, *lse = found if isinstance(found, tuple) else (found,)
    nested = torch.nested.nested_tensor_from_jagged(out, ours)
    return (nested, *lse) if lse else nested  # type: ignore[return-value]


def _check(q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit."""
    if not q.dim() == k.dim() == v.dim() == 3:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"packed attention takes q (total_q, H, D), k (total_k, Hkv, D) and v (total_k, Hkv, Dv), got {shapes}"
        )
    check_operands(*map(_by_heads, (q, k, v)))
    for name, cu in zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True):
        if cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be (documents + 1,) int32 or int64, got {tuple(cu.shape)} {cu.dtype}")
        if cu.device not in (q.device, torch.device("cpu")):
            raise ValueError(f"{name} must be on the device of q, {q.device}, or on the CPU, not on {cu.device}")
    if offsets[0].shape != offsets[1].shape:
        counts = " and ".join(str(len(cu) - 1) for cu in offsets)
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have as many documents, got {counts}")


def _by_heads(packed: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    return packed.transpose(0, 1)[None]


def _bounds(name: str, cu: Tensor, rows: int) -> Int64s:
    """Offsets as int64 on this side. Raises ValueError unless they ascend from 0 to the number of rows."""
    bounds = np.array(cu.tolist(), np.int64)
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != rows:
        ends = f"from {bounds[0]} to {bounds[-1]}" if len(bounds) else "nothing"
        raise ValueError(f"{name} must go from 0 to the number of rows, {rows}, and is {ends}")
    if (down := np.flatnonzero(np.diff(bounds) < 0)).size:
        i = int(down[0])
        raise ValueError(f"{name} must ascend: it is {bounds[i]} at {i} and {bounds[i + 1]} at {i + 1}")
    return bounds


def _both_bounds(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Int64s, Int64s]:
    return _bounds("cu_seqlens_q", cu_seqlens_q, len(q)), _bounds("cu_seqlens_k", cu_seqlens_k, len(k))


def _documents(mask: Mask, q_bounds: Int64s, k_bounds: Int64s) -> Iterator[tuple[slice, slice, Mask]]:
    """Rows that see something, keys, and the mask of each document that has such rows."""
    rows = seeing(mask, np.diff(q_bounds), np.diff(k_bounds))
    for n, stop, k_start, k_stop in zip(
        rows.tolist(), *(b.tolist() for b in (q_bounds[1:], k_bounds[:-1], k_bounds[1:])), strict=True
    ):
        if n:
            yield slice(stop - n, stop), slice(k_start, k_stop), document_mask(mask, n, k_stop - k_start)


@torch.library.impl("fuser::varlen_attention", "default")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spec: str,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    what = spec_of(spec)
    q_heads, k_heads, v_heads = map(_by_heads, (q, k, v))
    check_heads(what.mask, q_heads)
    bounds = _both_bounds(q, k, cu_seqlens_q, cu_seqlens_k)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=arithmetic_dtype(q))
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    if k.shape[0] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    try:
        target = target_for(q_heads, v_heads, None, what.quantize)
        into = _by_heads(out), lse[None] if return_lse else None
        how, documents = what.quantize, None
        by_row = how is None or how.is_by_row
        if how is not None and not by_row and target.kind == "cpu" and how.is_by_document(what.rule, lse=return_lse):
            documents = _rows(bounds[1].tobytes())
        if by_row or documents is not None:
            plan = _plan(what.mask.current(), *(b.tobytes() for b in bounds), target)
            run_plan(q_heads, k_heads, v_heads, plan, None, scale, *into, target, what.rule, what.quantize, documents)
            return out, lse
        out.zero_()
        lse.fill_(-math.inf)
        for rows, keys, mask in _documents(what.mask, *bounds):
            plan = cached_plan(mask, rows.stop - rows.start, keys.stop - keys.start, target)
            sums = lse.new_empty(1, q.shape[1], rows.stop - rows.start) if return_lse else None
            ours = q_heads[:, :, rows], k_heads[:, :, keys], v_heads[:, :, keys]
            run_plan(*ours, plan, None, scale, into[0][:, :, rows], sums, target, what.rule, what.quantize)
            if sums is not None:
                lse[:, rows] = sums[0]
        return out, lse
    except (NoKernelError, BuildError, ToolchainError, CacheError) as error:
        say(str(error))
    exact, sums = _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, spec, scale)
    return exact, sums if return_lse else lse


@functools.lru_cache(maxsize=32)
def _plan(mask: Mask, q_bounds: bytes, k_bounds: bytes, target: Target) -> AttentionPlan:
    return plan_documents(mask, np.frombuffer(q_bounds, np.int64), np.frombuffer(k_bounds, np.int64), target)


@functools.lru_cache(maxsize=32)
def _rows(bounds: bytes) -> tuple[Literal, Literal]:
    """Of which document each row between ``bounds`` is: row r of document r // length."""
    ends = np.frombuffer(bounds, np.int64)
    lengths = ends[1:] - ends[:-1]
    most = int(lengths.max(initial=1))
    rows = ramp(lengths) + np.repeat(np.arange(len(lengths)) * most, lengths)
    return Literal(f"rows:{bounds.hex()}", rows), Literal(f"length:{most}", np.array([most]))


@torch.library.register_fake("fuser::varlen_attention")  # type: ignore[untyped-decorator]
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spec: str,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    pin(spec)
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=arithmetic_dtype(q))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in plain PyTorch, one document after another, by operators that PyTorch differentiates."""
    spec = spec_of(key)
    heads = tuple(map(_by_heads, (q, k, v)))
    check_heads(spec.mask, heads[0])
    bounds = _both_bounds(q, k, cu_seqlens_q, cu_seqlens_k)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=arithmetic_dtype(q))
    for rows, keys, mask in _documents(spec.mask, *bounds):
        part, sums = reference(
            heads[0][:, :, rows], heads[1][:, :, keys], heads[2][:, :, keys], spec.of(mask), None, scale
        )
        out[rows], lse[:, rows] = part[0].transpose(0, 1), sums[0]
    return out, lse


# ---- the backward pass


@torch.library.impl("fuser::varlen_attention_backward", "default")
def _gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spec: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, one document after another."""
    what = spec_of(spec)
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    bounds = _both_bounds(q, k, cu_seqlens_q, cu_seqlens_k)
    for rows, keys, mask in _documents(what.mask, *bounds):
        of_lse = None if grad_lse is None else grad_lse[None, :, rows]
        of_out, of_q, of_k, of_v = map(_by_heads, (grad[rows], q[rows], k[keys], v[keys]))
        found = gradients_of(of_out, of_lse, of_q, of_k, of_v, what.of(mask), None, scale, False)
        for into, part in zip((dq[rows], dk[keys], dv[keys]), found, strict=False):
            into.copy_(part[0].transpose(0, 1))
    return dq, dk, dv


@torch.library.register_fake("fuser::varlen_attention_backward")  # type: ignore[untyped-decorator]
def _fake_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spec: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, key, scale, return_lse = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
    # The backward pass finds the specification by its key because somebody holds its mask.
    ctx.key, ctx.spec, ctx.scale, ctx.return_lse = key, spec_of(key), scale, return_lse


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    of_lse = grad_lse if ctx.return_lse else None
    found = torch.ops.fuser.varlen_attention_backward(grad, of_lse, *ctx.saved_tensors, ctx.key, ctx.scale)
    return (*found, None, None, None, None, None)


torch.library.register_autograd("fuser::varlen_attention", _backward, setup_context=_keep)
