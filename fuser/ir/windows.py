"""Attention of a sequence's windows to themselves and to summaries of chunks, as one over keys that nobody copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuser.ir.masks import WindowsAndChunks

_PART = 4096


@dataclass(frozen=True)
class Windowed:
    """Windows of ``window`` tokens see themselves, ``before`` and ``after``; ``chunk`` is that of
    :class:`~fuser.ir.masks.WindowsAndChunks`. ``relative`` scores have a bias by the distance of query and key.

    Then keys are in reverse order: the bias of query i and key j lies at i + j, in one row for all, and a gap keeps
    summaries away from what is near.
    """

    window: int
    before: int = 0
    after: int = 0
    chunk: int = 0
    relative: bool = False

    @property
    def gap(self) -> int:
        """Keys between tokens and summaries that nobody sees."""
        return self.window + self.before if self.relative else 0

    @property
    def mask(self) -> WindowsAndChunks:
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
        near = torch.cat([bias[:, 0].flip(-1), bias[:, 1:, 0]], -1)
        keys = tokens + self.gap + summaries
        first = tokens - self.window - self.after
        return F.pad(near, (first, tokens + keys - 1 - first - near.shape[-1]))


def by_sums(row: Tensor, queries: int, keys: int) -> Tensor:
    """(H, queries + keys - 1) as (1, H, queries, keys), of which element (i, j) is element i + j."""
    row = row.contiguous()
    return row.as_strided((1, row.shape[0], queries, keys), (0, row.shape[1], 1, 1))
