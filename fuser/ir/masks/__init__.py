"""Which (query, key) pairs attention may use: immutable values that name, hash, count, draw and materialize themselves.

Row ``i`` of a mask belongs to query ``i`` and column ``j`` to key ``j``; both count from 0 and pair (0, 0) is the top
left corner whatever the lengths, as in ``scaled_dot_product_attention(is_causal=True)`` of torch. Where the queries are
the last of the keys (a filled cache), shift them: ``mask.shift(kv_len - q_len)``; for ``Causal`` that is ``offset``.
"""

from __future__ import annotations

from fuser.ir.masks.algebra import And, Not, Or, PerHead, Shifted, per_head
from fuser.ir.masks.base import Mask
from fuser.ir.masks.batch import PerBatch, per_batch
from fuser.ir.masks.blocks import Blocks, from_block_indices, from_block_mask, from_blocks
from fuser.ir.masks.columns import Columns, Progressions
from fuser.ir.masks.opaque import MaskMod, TensorMask, from_dense, from_mask_mod
from fuser.ir.masks.patterns import (
    BigBird,
    Causal,
    Dense,
    Dilated,
    Fixed,
    GlobalBlocks,
    GridChunks,
    GridWindows,
    Longformer,
    SlidingWindow,
    Strided,
    WindowsAndChunks,
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
    "WindowsAndChunks",
    "GridWindows",
    "GridChunks",
    "GlobalBlocks",
    "from_dense",
    "from_mask_mod",
    "from_block_mask",
    "from_block_indices",
    "from_blocks",
    "Blocks",
    "per_head",
    "per_batch",
    "PerHead",
    "PerBatch",
    "And",
    "Or",
    "Not",
    "Shifted",
    "TensorMask",
    "MaskMod",
    "Columns",
    "Progressions",
]
