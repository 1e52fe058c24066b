"""Windows and chunks of a sequence or grid of tokens, and attention inside of windows and to summaries of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuser.attention.mechanisms.features import attend
from fuser.ir.errors import MechanismError


def check_divides(size: int, grid: Sequence[int], what: str) -> None:
    """Raise MechanismError unless windows of ``size`` cover the grid."""
    if any(length % size for length in grid):
        raise MechanismError(
            f"{what} of {size} do not divide {' × '.join(map(str, grid))} tokens; pad the input or choose another size"
        )


def windows(
    x: Tensor, grid: Sequence[int], size: int, before: int = 0, after: int = 0, outside: float | bool = 0
) -> Tensor:
    """Windows of ``size`` tokens along every axis, extended by their neighbours, (B, N, F) → (B, G, L, F).

    ``grid`` is (N,) or (rows, columns). L is (before + size + after), squared on a grid. What lies ``outside`` has that
    value. Without an extension, windows of a sequence are views.
    """
    length = before + size + after
    if len(grid) == 1:
        if length == size:
            return torch.unflatten(x, 1, (-1, size))
        return _sliding(F.pad(x, (0, 0, before, after), value=outside), 1, length, size)
    x = torch.unflatten(x, 1, tuple(grid))
    if length == size:
        split = torch.unflatten(torch.unflatten(x, 2, (-1, size)), 1, (-1, size)).transpose(2, 3)
        return split.flatten(3, 4).flatten(1, 2)
    padded = F.pad(x, (0, 0, before, after, before, after), value=outside)
    # (B, rows, L, columns, L, F)
    return _sliding(_sliding(padded, 2, length, size), 1, length, size).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _sliding(x: Tensor, dim: int, length: int, step: int) -> Tensor:
    """Windows of ``length`` that begin every ``step``, (…, N, …) → (…, G, length, …), without a copy."""
    size, stride = list(x.shape), list(x.stride())
    size[dim : dim + 1] = [(size[dim] - length) // step + 1, length]
    stride[dim : dim + 1] = [stride[dim] * step, stride[dim]]
    return x.as_strided(size, stride)


def merge_windows(x: Tensor, grid: Sequence[int], size: int) -> Tensor:
    """The inverse of :func:`windows` without an extension, (B, G, L, F) → (B, N, F)."""
    if len(grid) == 1:
        return x.flatten(1, 2)
    rows, columns = (length // size for length in grid)
    split = torch.unflatten(torch.unflatten(x, 2, (size, size)), 1, (rows, columns))
    return split.transpose(2, 3).flatten(1, 4)


def missing_tokens(count: int, size: int) -> int:
    """How many tokens ``count`` are short of whole windows of ``size``."""
    # As a trace with symbols understands it: the sum of both is a multiple.
    return -(-count // size) * size - count


def padded(x: Tensor, hidden: Tensor | None, missing: int) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, F) and which are ``hidden`` (B, N), with so many more hidden ones."""
    # How many a length is short of that a trace does not know, nobody asks, or it would be another trace.
    if isinstance(missing, int) and not missing:
        return x, hidden
    if hidden is None:
        hidden = x.new_zeros(x.shape[:2]).bool()
    return F.pad(x, (0, 0, 0, missing)), F.pad(hidden, (0, missing), value=True)


def first_tokens(x: Tensor, count: int) -> Tensor:
    """The first ``count`` tokens of (B, N, F). Of a length that a trace does not know they are a copy, which it takes
    for contiguous without a question."""
    if isinstance(count, int) and isinstance(x.shape[1], int):
        return x[:, :count]
    return x[:, :count].clone(memory_format=torch.contiguous_format)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(…, L, H · D) → (…, H, L, D)."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-3, -2)


def qkv_of(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (…, H, L, D) of what one projection made, (…, L, 3 · H · D)."""
    q, k, v = (heads_of(part, heads) for part in x.chunk(3, -1))
    return q, k, v


@dataclass(frozen=True)
class Far:
    """What the queries of a window see beyond it: C keys of every window, or the same ones for all (G = 1).

    ``keys`` and ``values`` are (B, G, H, C, D), ``bias`` is added to their scores, ``hidden`` are those that are not
    seen (True); both broadcast to (B, G, H, W, C).
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    hidden: Tensor | None = None


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    far: Far | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One softmax over the keys of a window and ``far`` ones.

    ``q`` is (B, G, H, W, D), ``k`` and ``v`` are (B, G, H, L, D); ``hidden`` keys (True) and a ``bias`` of the scores
    broadcast to (B, G, H, W, L). Returns (B, G, W, H · D).
    """
    batch, groups = q.shape[:2]
    near = k.shape[3]
    if far is not None:
        count = far.keys.shape[3]
        k, v = (
            torch.cat([own, other.to(own.dtype).expand(batch, groups, -1, -1, -1)], 3)
            for own, other in ((k, far.keys), (v, far.values))
        )
        bias = _joined(bias, near, far.bias, count, 0)
        hidden = _joined(hidden, near, far.hidden, count, False)
    bias, hidden = (_of_all_windows(t, batch, groups) for t in (bias, hidden))
    # Attention knows batch and heads only, so windows are entries of the batch.
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = attend(q, k, v, hidden, bias, dropout)
    return torch.unflatten(out.transpose(1, 2).flatten(2), 0, (batch, groups))


def _joined(near: Tensor | None, near_count: int, far: Tensor | None, far_count: int, missing: float) -> Tensor | None:
    """Biases or masks of both kinds of keys side by side, ``missing`` where one has none."""
    if near is None and far is None:
        return None
    if far is None:
        assert near is not None
        return F.pad(near, (0, far_count), value=missing)
    if near is None:
        return F.pad(far, (near_count, 0), value=missing)
    one, other = torch.broadcast_tensors(near[..., :1], far[..., :1])  # type: ignore[no-untyped-call]
    return torch.cat([near.expand(*one.shape[:-1], -1), far.expand(*other.shape[:-1], -1)], -1)


def _of_all_windows(x: Tensor | None, batch: int, groups: int) -> Tensor | None:
    """Windows folded into the batch, as those of the operands are; what is alike in all stays one."""
    if x is None or x.ndim < 5:
        return x
    if x.shape[0] == x.shape[1] == 1:
        return x[0]
    return x.expand(batch, groups, -1, -1, -1).flatten(0, 1)
