"""Attention of a sequence's windows to themselves and to summaries of chunks, as one over keys that nobody copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuser.ir.masks import GridWindows, Mask, WindowsAndChunks

_PART = 4096


@dataclass(frozen=True)
class Windowed:
    """Windows of ``window`` tokens see themselves, ``before`` and ``after``; ``chunk`` is that of
    :class:`~fuser.ir.masks.WindowsAndChunks`. Tokens of a grid with ``columns``, 0 for a sequence, have square
    windows, as far before as after. ``relative`` scores have a bias by the distance of query and key.

    Then keys are in reverse order: the bias of query i and key j lies at i + j, in one row for all, and a gap keeps
    summaries away from what is near.
    """

    window: int
    before: int = 0
    after: int = 0
    chunk: int = 0
    columns: int = 0
    relative: bool = False

    @property
    def reach(self) -> int:
        """How far along an axis a query sees keys before it, at most."""
        return self.window + self.before - 1

    @property
    def gap(self) -> int:
        """Keys between tokens and summaries that nobody sees."""
        return self.reach * (self.columns + 1) if self.relative else 0

    @property
    def mask(self) -> Mask:
        if self.columns:
            return GridWindows(self.columns, self.window, self.before, self.gap, int(self.relative))
        return WindowsAndChunks(self.window, self.before, self.after, self.chunk, self.gap, int(self.relative))

    def joined(self, tokens: Tensor, summaries: Tensor) -> Tensor:
        """Tokens (B, H, N, D) and summaries (B, H, C, D) as keys or values in the order of the mask."""
        summaries = summaries.to(tokens.dtype)
        if not self.relative:
            return torch.cat([tokens, summaries], 2)
        batch, heads, count, width = tokens.shape
        keys = count + self.gap + summaries.shape[2]
        out = tokens.new_empty(batch, heads, keys, width)
        out[:, :, count : count + self.gap] = 0
        out[:, :, count + self.gap :] = summaries.flip(2)
        # In parts, since a reversed copy of all of them would be as much memory again.
        for start in range(0, count, _PART):
            part = tokens[:, :, start : start + _PART]
            out[:, :, count - start - part.shape[2] : count - start] = part.flip(2)
        return out

    def by_distance(self, bias: Tensor, tokens: int, summaries: int) -> Tensor:
        """A bias (H, W, L) of a window's queries and keys, which depends on their distance alone, as a row (H, N + keys
        - 1) whose element i + j is that of query i and key j; zeros for summaries."""
        keys, behind = tokens + self.gap + summaries, self.window - 1 + self.after
        if self.columns:
            near = self._of_grid(bias)
            behind *= self.columns + 1
        else:
            near = torch.cat([bias[:, 0].flip(-1), bias[:, 1:, 0]], -1)
        first = tokens - 1 - behind
        return F.pad(near, (first, tokens + keys - 1 - first - near.shape[-1]))

    def _of_grid(self, bias: Tensor) -> Tensor:
        """The bias (H, W², L²) of a grid by distance: rows of ``columns`` numbers, one for each distance of rows."""
        size, seen = self.window, self.window + 2 * self.before
        apart = torch.arange(-self.reach, self.reach + 1, device=bias.device)
        # A query and a key of that distance.
        query = (apart - self.before).clamp(min=0)
        key = query - apart + self.before
        pairs = bias.unflatten(2, (seen, seen)).unflatten(1, (size, size))  # type: ignore[no-untyped-call]
        table = pairs[:, query[:, None], query[None, :], key[:, None], key[None, :]]
        count = 2 * self.reach + 1
        return F.pad(table, (0, self.columns - count)).flatten(1)[:, : 2 * self.reach * (self.columns + 1) + 1]


def by_sums(row: Tensor, queries: int, keys: int) -> Tensor:
    """(H, queries + keys - 1) as (1, H, queries, keys), of which element (i, j) is element i + j."""
    row = row.contiguous()
    return row.as_strided((1, row.shape[0], queries, keys), (0, row.shape[1], 1, 1))
