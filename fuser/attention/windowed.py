"""Attention to windows and summaries of chunks as an operator of torch: :func:`windowed_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuser.attention.operators import TAGS
from fuser.attention.reference import empty_out
from fuser.attention.registry import key_of
from fuser.ir.masks import GridChunks, WindowsAndChunks
from fuser.ir.windows import Windowed, by_sums

torch.library.define(
    "fuser::windowed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor far_keys, Tensor far_values, Tensor? bias, int window, int before, "
    "int after, int chunk, int columns) -> Tensor",
    tags=TAGS,
)


def is_known_to(q: Tensor, *others: Tensor) -> bool:
    """Whether :func:`windowed_attention` is for such tensors: on a CPU, in a dtype that kernels have, where nobody asks
    for gradients and no other compiler traces."""
    if torch.compiler.is_dynamo_compiling() or any(t.requires_grad for t in (q, *others)):
        return False
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    bias: Tensor | None,
    *,
    window: int,
    before: int = 0,
    after: int = 0,
    chunk: int = 0,
    columns: int = 0,
) -> Tensor:
    """softmax(q · kᵀ / √D) · v over the windows and summaries of :class:`~fuser.ir.masks.WindowsAndChunks`, or, for the
    tokens of a grid with ``columns``, of :class:`~fuser.ir.masks.GridWindows`.

    q, k, v are (B, H, N, D), ``far_keys`` and ``far_values`` (B, H, C, D). ``bias`` (1 or H, window, before + window +
    after), on a grid (H, window², (before + window + after)²), is added to scores of a window and depends on the
    distance of query and key alone. Returns (B, H, N, D), laid out as ``q`` is. Keys and summaries are joined once, so
    that memory is linear in N + C.
    """
    out: Tensor = torch.ops.fuser.windowed_attention(
        q, k, v, far_keys, far_values, bias, window, before, after, chunk, columns
    )
    return out


def attend_windows(q: Tensor, k: Tensor, v: Tensor, *, window: int, extension: int = 0, causal: bool = False) -> Tensor:
    """softmax(q · kᵀ / √D) · v of (B, H, N, D) where tokens see those of their window of a sequence, and ``extension``
    tokens before and after it; if ``causal``, none behind themselves."""
    after = 0 if causal else extension
    key = key_of(WindowsAndChunks(window, extension, after, int(causal)), None, None, False, 0)
    out: Tensor = torch.ops.fuser.sparse_attention(q, k, v, key, None, 1.0 / math.sqrt(q.shape[3]))
    return out


def attend_squares(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, columns: int, size: int) -> Tensor:
    """softmax(q · kᵀ / √D + bias) · v where query c of (B, H, C, D) sees the tokens (B, H, N, D) of one square of
    ``size`` × ``size`` on a grid with ``columns``; ``bias`` is (B, H, 1, N)."""
    key = key_of(GridChunks(columns, size), None, None, False, 0)
    out: Tensor = torch.ops.fuser.sparse_attention(q, k, v, key, bias, 1.0 / math.sqrt(q.shape[3]))
    return out


@torch.library.impl("fuser::windowed_attention", "default")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    bias: Tensor | None,
    window: int,
    before: int,
    after: int,
    chunk: int,
    columns: int,
) -> Tensor:
    how = Windowed(window, before, after, chunk, columns, bias is not None)
    keys, values = how.joined(k, far_keys), how.joined(v, far_values)
    attn_mask = None
    if bias is not None:
        tokens = q.shape[2]
        attn_mask = by_sums(how.by_distance(bias.to(q.dtype), tokens, far_keys.shape[2]), tokens, keys.shape[2])
    key = key_of(how.mask, None, None, False, 0)
    out: Tensor = torch.ops.fuser.sparse_attention(q, keys, values, key, attn_mask, 1.0 / math.sqrt(q.shape[3]))
    return out


@torch.library.register_fake("fuser::windowed_attention")  # type: ignore[untyped-decorator]
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    bias: Tensor | None,
    window: int,
    before: int,
    after: int,
    chunk: int,
    columns: int,
) -> Tensor:
    return empty_out(q, v)
