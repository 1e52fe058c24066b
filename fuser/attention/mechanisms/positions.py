"""Biases for relative positions of queries and keys of a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def grid_index(window: int, extension: int, exact: bool) -> Tensor:
    """Entry of a table for every query and key of a square window, (window², (window + 2 · extension)²) int64.

    The reference multiplies rows' distances by window + 2 · extension, which is less than the number of distances of
    columns, 2 · (window + extension) - 1, so that distinct offsets share entries. ``exact`` has one for each.
    """
    own = torch.arange(window)
    seen = torch.arange(-extension, window + extension)
    distance = own[:, None] - seen + window + extension - 1
    rows = 2 * (window + extension) - 1 if exact else window + 2 * extension
    index = distance[:, None, :, None] * rows + distance[None, :, None, :]
    return index.flatten(2, 3).flatten(0, 1)


def grid_entries(window: int, extension: int, exact: bool) -> int:
    """The number of entries of the table of :func:`grid_index`."""
    reach = window + extension - 1
    return (2 * reach + 1) ** 2 if exact else 2 * reach * (window + 2 * extension + 1) + 1


class BucketedPositions(nn.Module):
    """Biases of T5 (Raffel et al., 2020): one for each near distance, one for a range of far ones, times ``scale``.

    ``before`` keys precede the window's first query. The reference counts a key's place from the first of these, so
    that distances are shifted by ``before``; ``exact`` counts it from the query. Returns (heads, rows, keys).
    """

    buckets: Tensor

    def __init__(
        self, rows: int, before: int, after: int, *, reach: int, heads: int, scale: float, causal: bool, exact: bool
    ) -> None:
        super().__init__()
        count = max(min(reach // 2, 64), 16)
        self.scale = scale
        self.relative_attention_bias = nn.Embedding(count, heads)
        keys = torch.arange(before + rows + after) - (before if exact else 0)
        behind = torch.arange(rows)[:, None] - keys
        self.register_buffer("buckets", _buckets(behind, count, reach, causal), persistent=False)

    def forward(self) -> Tensor:
        bias: Tensor = self.relative_attention_bias(self.buckets)
        return bias.permute(2, 0, 1) * self.scale


def _buckets(behind: Tensor, count: int, reach: int, causal: bool) -> Tensor:
    """Buckets of distances (positive: the key precedes the query), int64: half of them for single distances, half for
    ranges that grow logarithmically to ``reach``."""
    first = torch.zeros_like(behind)
    if causal:
        distance = behind.clamp(min=0)
    else:
        count //= 2
        first = (behind < 0) * count
        distance = behind.abs()
    near = count // 2
    # A reach that is not beyond the single distances leaves no ranges.
    steps = math.log(reach / near) if reach > near else math.inf
    far = near + (torch.log(distance.clamp(min=1).float() / near) / steps * (count - near)).long()
    if reach <= near:
        far = torch.full_like(far, count - 1)
    return first + torch.where(distance < near, distance, far.clamp(max=count - 1))
