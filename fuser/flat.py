"""FLAT attention: exact attention whose logits are in memory one tile at a time.

    fuser.flat.attention(q, k, v, granularity="row", tile=(1, 1, 64))
    fuser.flat.live_bytes(q, k, v, granularity="head")           # what a tile of it needs on chip
    fuser.flat.choose_tile(q, k, v, buffer_bytes=2 << 20)        # the coarsest granularity that fits a buffer

See :mod:`fuser.kernels.flat` for the dataflow and its formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fuser.attention import sparse_attention
from fuser.attention.checks import check_attn_mask, check_heads, check_operands
from fuser.attention.reference import arithmetic_dtype, empty_out, weighted_sum
from fuser.ir.errors import MaskError, PlanError
from fuser.ir.masks import Dense, Mask
from fuser.kernels.flat import Choice, Granularity, Tile, check_tile, choose, largest_rows, live_elements, tile_of

__all__ = [
    "FLASH",
    "Choice",
    "Granularity",
    "Tile",
    "attention",
    "buffer_bytes",
    "choose_tile",
    "live_bytes",
    "live_elements",
    "tile_for",
    "tile_of",
]

FLASH = "flash"
"""Name that stands beside the granularities for the fused kernel of :func:`fuser.sparse_attention`."""
_FEWEST_ROWS = 128
"""Rows of a tile where the keys leave no room for more in the cache, so that reading them is worth it."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    granularity: str | Granularity = "row",
    tile: tuple[int, int, int] | Tile | None = None,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q · kᵀ) · v, tile by tile: whole rows of logits in one buffer that all tiles share.

    Args:
        q: (B, H, Sq, D).
        k: (B, Hkv, Sk, D); H is a multiple of Hkv.
        v: (B, Hkv, Sk, Dv).
        granularity: what a tile holds: ``"all"``, ``"batch"``, ``"head"`` or ``"row"``; or ``"flash"``, which runs
            :func:`fuser.sparse_attention` (keys in tiles too, online softmax) for comparison.
        tile: its extents (batch entries, heads, query rows); default one batch entry, one head, or as many rows of one
            head as fit the second cache of a core.
        mask: one of ``fuser.masks``, or a tensor that broadcasts to (B, H, Sq, Sk), bool (True = may attend) or added
            to the scores. Forbidden pairs are computed all the same.
        scale: default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores of each row, (B, H, Sq) fp32 (fp64 for fp64).

    Returns (B, H, Sq, Dv) in the dtype of q. A row that may see nothing gives zeros, and -inf as its log-sum-exp. Runs
    in PyTorch on any device, 16-bit types in fp32; no gradients. :func:`buffer_bytes` says what it takes in memory.

    Raises:
        ValueError: the tensors do not fit each other.
        PlanError: an unknown granularity, or a tile that is not of it.
        MaskError: the mask does not fit.
    """
    if granularity == FLASH:
        if tile is not None:
            raise PlanError("the flash kernel plans its own tiles: leave the tile out")
        return sparse_attention(q, k, v, mask, scale=scale, return_lse=return_lse)
    check_operands(q, k, v)
    if isinstance(mask, Tensor):
        mask = check_attn_mask(mask, q, k).detach()
    elif mask is not None:
        if not isinstance(mask, Mask):
            raise MaskError(f"mask must be one of fuser.masks, a tensor or None, got {type(mask).__name__}")
        check_heads(mask, q)
        mask.validate(q.shape[2], k.shape[2])
        mask = None if isinstance(mask, Dense) else mask
    q, k, v = q.detach(), k.detach(), v.detach()
    dtype = arithmetic_dtype(q)
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=dtype) if return_lse else None
    if q.numel() and k.shape[2]:
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
        _run(q, k, v, _tile(q, k, v, granularity, tile), mask, scale, out, lse)
    else:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    return out if lse is None else (out, lse)


def live_bytes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    granularity: str | Granularity = "row",
    tile: tuple[int, int, int] | Tile | None = None,
    double_buffered: bool = False,
) -> int:
    """Bytes of Q, K, V, output and logits that a tile needs at a time: what should fit the cache.

    By the paper's formula, in which every head of q has its own keys; 16-bit types count as they are stored.
    """
    check_operands(q, k, v)
    made = _tile(q, k, v, granularity, tile)
    elements = made.live_elements(k.shape[2], q.shape[3], value_dim=v.shape[3], double_buffered=double_buffered)
    return elements * q.element_size()


def buffer_bytes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    granularity: str | Granularity = "row",
    tile: tuple[int, int, int] | Tile | None = None,
) -> int:
    """Bytes that :func:`attention` allocates beside its arguments and results when there is no mask.

    The logits of a tile; for 16-bit types also its operands and output in fp32. A mask adds one or two bytes for every
    logit of a tile, and values that are not finite a copy of those of a tile.
    """
    check_operands(q, k, v)
    made = _tile(q, k, v, granularity, tile)
    elements = made.logit_elements(k.shape[2])
    if q.dtype != arithmetic_dtype(q):
        elements += made.batch * made.heads * made.rows * (q.shape[3] + v.shape[3])
        elements += made.batch * _key_heads(q, k, made) * k.shape[2] * (q.shape[3] + v.shape[3])
    return elements * (8 if q.dtype == torch.float64 else 4)


def tile_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    granularity: str | Granularity = "row",
    tile: tuple[int, int, int] | Tile | None = None,
) -> Tile:
    """The tile that :func:`attention` runs with these arguments."""
    check_operands(q, k, v)
    return _tile(q, k, v, granularity, tile)


def choose_tile(q: Tensor, k: Tensor, v: Tensor, buffer_bytes: int, *, double_buffered: bool = False) -> Choice:
    """The coarsest granularity, and its largest tile, whose live set fits ``buffer_bytes``.

    Raises PlanError when not even one row fits, with the smallest buffer that works.
    """
    check_operands(q, k, v)
    return choose(
        buffer_bytes,
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        max(q.shape[3], v.shape[3]),
        element_bytes=q.element_size(),
        double_buffered=double_buffered,
    )


def _tile(
    q: Tensor, k: Tensor, v: Tensor, granularity: str | Granularity, tile: tuple[int, int, int] | Tile | None
) -> Tile:
    kind = Granularity.of(granularity)
    batch, heads, rows, width = q.shape
    if tile is None:
        fit = None
        if kind is Granularity.ROW:
            from fuser.runtime.device import cpu_target

            room = cpu_target().cache_bytes[1] // q.element_size()
            fit = min(rows, max(_FEWEST_ROWS, largest_rows(room, k.shape[2], max(width, v.shape[3]), False)))
        return tile_of(kind, batch, heads, rows, fit)
    if not isinstance(tile, Tile):
        if not isinstance(tile, (tuple, list)) or len(tile) != 3:
            raise PlanError(f"a tile is three extents (batch entries, heads, query rows), got {tile!r}")
        tile = Tile(*tile)
    return check_tile(kind, tile, batch, heads, rows)


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]


def _key_heads(q: Tensor, k: Tensor, tile: Tile) -> int:
    """Most heads of k that a tile reads."""
    group, heads = _group(q, k), q.shape[1]
    return max((min(h + tile.heads, heads) - 1) // group - h // group + 1 for h in range(0, heads, tile.heads))


def _steps(q: Tensor, tile: Tile, rows_first: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Batch entries, heads and rows of every tile."""
    entries, heads, rows = (
        [slice(i, min(i + step, full)) for i in range(0, full, step)]
        for full, step in zip(q.shape[:3], (tile.batch, tile.heads, tile.rows), strict=True)
    )
    if rows_first:
        yield from ((b, h, n) for n, b, h in itertools.product(rows, entries, heads))
    else:
        yield from itertools.product(entries, heads, rows)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    mask: Mask | Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    dtype, kv_len, group = arithmetic_dtype(q), k.shape[2], _group(q, k)
    buffer = torch.empty(tile.logit_elements(kv_len), dtype=dtype, device=q.device)
    wide = None
    if q.dtype != dtype:
        rows, keys = tile.batch * tile.heads * tile.rows, tile.batch * _key_heads(q, k, tile) * kv_len
        sizes = [rows * q.shape[3], keys * q.shape[3], keys * v.shape[3], rows * v.shape[3]]
        wide = [torch.empty(size, dtype=dtype, device=q.device) for size in sizes]
    # NaN and infinity must not reach rows that may not see them, though their weight there is zero.
    poisoned = mask is not None and not bool(torch.isfinite(v.sum()))
    # A mask that all heads share is expanded once for each block of rows.
    shared = isinstance(mask, Mask) and mask.heads is None
    last: slice | None = None
    forbidden: Tensor | None = None
    for b, h, n in _steps(q, tile, shared):
        kv = slice(h.start // group, (h.stop - 1) // group + 1)
        parts = [q[b, h, n], k[b, kv], v[b, kv], out[b, h, n]]
        if wide is not None:
            narrow = parts
            parts = [_view(room, part.shape) for room, part in zip(wide, parts, strict=True)]
            for to, part in zip(parts[:3], narrow, strict=False):
                to.copy_(part)
        logits = _view(buffer, (*parts[0].shape[:3], kv_len))
        pairs = _pairs(parts[0], h, kv, group)
        for i, at, key in pairs:
            left, right, to = parts[0][i, at], parts[1][i, key].mT, logits[i, at]
            multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
            multiply(to, left, right, beta=0, alpha=scale, out=to)
        if isinstance(mask, Mask):
            if not shared or last != n or forbidden is None:
                forbidden, last = None, n
                forbidden = _forbidden(mask, h, n, q.shape[2], kv_len).to(q.device)
        elif mask is not None:
            cut = mask[tuple(s if size > 1 else slice(None) for s, size in zip((b, h, n), mask.shape[:3], strict=True))]
            if cut.dtype == torch.bool:
                forbidden = cut.logical_not()
            else:
                logits.add_(cut)
                # -inf forbids, also where NaN was.
                forbidden = torch.isneginf(cut)
        if forbidden is not None:
            logits.masked_fill_(forbidden, -math.inf)
        empty = _softmax(logits, None if lse is None else lse[b, h, n], mask is not None)
        for i, at, key in pairs:
            left, right, to = logits[i, at], parts[2][i, key], parts[3][i, at]
            if poisoned and forbidden is not None:
                to.copy_(weighted_sum(left, right, forbidden.expand(logits.shape)[i, at]))
            else:
                (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out=to)
        if empty is not None:
            parts[3].masked_fill_(empty, 0.0)
        if wide is not None:
            narrow[3].copy_(parts[3])


def _view(room: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return room[: math.prod(shape)].view(shape)


def _pairs(q: Tensor, h: slice, kv: slice, group: int) -> list[tuple[int, int | slice, int | slice]]:
    """The products of a tile: batch entry, heads of q and heads of k, counted within the tile.

    One batched product an entry where every head has its own keys, else one product a head.
    """
    count = q.shape[1]
    if group == 1 and count > 1:
        return [(i, slice(None), slice(None)) for i in range(q.shape[0])]
    return [(i, j, (h.start + j) // group - kv.start) for i in range(q.shape[0]) for j in range(count)]


def _forbidden(mask: Mask, h: slice, n: slice, q_len: int, kv_len: int) -> Tensor:
    """Rows ``n`` of a mask, True = may not attend: (rows, keys), or (heads, rows, keys) for heads ``h``."""
    if mask.heads is None:
        return mask.rows(n.start, n.stop, q_len, kv_len).logical_not_()
    made = torch.empty(h.stop - h.start, n.stop - n.start, kv_len, dtype=torch.bool)
    for i, head in enumerate(range(h.start, h.stop)):
        torch.logical_not(mask.head(head).rows(n.start, n.stop, q_len, kv_len), out=made[i])
    return made


def _softmax(logits: Tensor, lse: Tensor | None, masked: bool) -> Tensor | None:
    """Softmax over keys in place; the rows that may see nothing, (…, rows, 1) bool, or None if there can be none."""
    if lse is None:
        empty = torch.isneginf(logits.amax(-1, keepdim=True)) if masked else None
        torch.softmax(logits, -1, out=logits)
        return empty
    top = logits.amax(-1, keepdim=True)
    empty = torch.isneginf(top)
    top.masked_fill_(empty, 0.0)
    logits.sub_(top).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    lse.copy_((top + total.log()).squeeze(-1))
    return empty
