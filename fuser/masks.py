"""Attention masks: ``fuser.masks.Causal() & ~fuser.masks.SlidingWindow(0, 3)``. See :mod:`fuser.ir.masks`."""

from __future__ import annotations

from fuser.ir.masks import (
    BigBird,
    Causal,
    Columns,
    Dense,
    Dilated,
    Fixed,
    Longformer,
    Mask,
    PerHead,
    Progressions,
    SlidingWindow,
    Strided,
    from_dense,
    from_mask_mod,
    per_head,
)

__all__ = [
    "Mask",
    "Dense",
    "Causal",
    "SlidingWindow",
    "Strided",
    "Fixed",
    "Dilated",
    "Longformer",
    "BigBird",
    "from_dense",
    "from_mask_mod",
    "per_head",
    "PerHead",
    "Columns",
    "Progressions",
]
