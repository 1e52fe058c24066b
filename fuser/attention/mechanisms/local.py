"""Exact attention inside windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuser.attention.mechanisms.configuration import Configuration, LocalConfiguration
from fuser.attention.mechanisms.positions import grid_entries, grid_index
from fuser.attention.mechanisms.softmax import SoftmaxAttention
from fuser.attention.mechanisms.windows import (
    Far,
    check_divides,
    heads_of,
    merge_windows,
    missing_tokens,
    qkv_of,
    window_attention,
    windows,
)
from fuser.attention.windowed import attend_windows, is_known_to, windowed_attention
from fuser.ir.errors import MechanismError


class LocalAttention(SoftmaxAttention):
    """Softmax attention of every window of tokens to itself and, with ``overlap_window``, half a window around it.

    Windows are ``window_size`` tokens of a sequence, which is padded to whole windows, or, with ``attn_2d``, squares of
    a grid (Liu et al., Swin Transformer, 2021, without shifts), which must consist of whole windows; a sequence is
    taken for a square grid. Scores get learned biases for relative positions with ``use_rpe``.
    """

    configuration_type: ClassVar[type[Configuration]] = LocalConfiguration
    relative_position_index: Tensor

    def __init__(self, configuration: LocalConfiguration) -> None:
        super().__init__(configuration)
        self.window_size, self.extension = configuration.window_size, configuration.extension
        self.attn_2d, self.use_rpe = configuration.attn_2d, configuration.use_rpe
        if self.use_rpe:
            window, extension, exact = self.window_size, self.extension, configuration.exact_rpe
            table: tuple[int, ...] = (self.num_heads, window, window + 2 * extension)
            if self.attn_2d:
                table = (grid_entries(window, extension, exact), self.num_heads)
                self.register_buffer("relative_position_index", grid_index(window, extension, exact))
            self.local_relative_position_bias_table = nn.Parameter(torch.empty(table))
            nn.init.trunc_normal_(self.local_relative_position_bias_table, std=0.02)

    def grid(self, shape: Sequence[int]) -> Sequence[int]:
        if not self.attn_2d:
            return super().grid(shape)
        if len(shape) == 1:
            side = math.isqrt(shape[0])
            if side * side != shape[0]:
                raise MechanismError(
                    f"attn_2d needs a grid of tokens, and {shape[0]} tokens are no square; give (B, H, W, C)"
                )
            shape = (side, side)
        check_divides(self.window_size, shape, "windows")
        return shape

    def missing(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> int:
        if self.attn_2d or self.joins(qkv, hidden, grid):
            return 0
        return missing_tokens(grid[0], self.window_size)

    @property
    def bias_by_distance(self) -> bool:
        """Whether a bias of scores, if there is one, depends on the distance of query and key alone."""
        return self.attn_2d or not self.use_rpe

    def joins(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> bool:
        """Whether tokens, and summaries if there are some, are one list of keys, of a sequence of any length: where
        nobody asks for gradients and nothing is hidden."""
        return len(grid) == 1 and hidden is None and self.bias_by_distance and is_known_to(qkv)

    def mix(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Tensor:
        size, extension = self.window_size, self.extension
        far = self.far(qkv, hidden, grid)
        if self.joins(qkv, hidden, grid):
            q, k, v = qkv_of(qkv, self.num_heads)
            if far is None:
                out = attend_windows(q, k, v, window=size, extension=extension)
            else:
                out = windowed_attention(
                    q,
                    k,
                    v,
                    far.keys.squeeze(1),
                    far.values.squeeze(1),
                    self.position_bias(),
                    window=size,
                    before=extension,
                    after=extension,
                    columns=grid[1] if self.attn_2d else 0,
                )
            return out.transpose(1, 2).flatten(2)
        q = heads_of(windows(qkv[..., : self.dim], grid, size), self.num_heads)
        seen = windows(qkv[..., self.dim :], grid, size, extension, extension)
        k, v = (heads_of(part, self.num_heads) for part in seen.chunk(2, -1))
        unseen = self.hidden_windows(hidden, qkv, grid, size)
        unseen = None if unseen is None else unseen.unsqueeze(2).mT
        return merge_windows(window_attention(q, k, v, unseen, self.position_bias(), far), grid, size)

    def hidden_windows(self, hidden: Tensor | None, qkv: Tensor, grid: Sequence[int], size: int) -> Tensor | None:
        """Tokens of windows of ``size`` and their extension that are hidden or do not exist, (B or 1, G, L, 1)."""
        if hidden is None:
            if not self.extension:
                return None
            hidden = qkv.new_zeros((1, qkv.shape[1])).bool()
        return windows(hidden.unsqueeze(-1), grid, size, self.extension, self.extension, True)

    def position_bias(self) -> Tensor | None:
        """What is added to the scores of a window, (H, W, L)."""
        if not self.use_rpe:
            return None
        table = self.local_relative_position_bias_table
        return table[self.relative_position_index].permute(2, 0, 1) if self.attn_2d else table

    def far(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Far | None:
        """What windows see beside their own keys."""
        return None
