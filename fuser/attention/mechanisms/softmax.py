"""Exact attention, and what all mechanisms with one projection of queries, keys and values share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from fuser.attention.mechanisms.configuration import Configuration, SoftmaxConfiguration
from fuser.attention.mechanisms.features import attend
from fuser.attention.mechanisms.windows import first_tokens, padded, qkv_of
from fuser.ir.errors import MechanismError


def initialize(module: nn.Module) -> None:
    """Weights as the reference begins with: small, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def projection(width: int, norm: bool = True) -> nn.Sequential:
    """A linear layer, with LayerNorm behind it or not."""
    return nn.Sequential(nn.Linear(width, width), *([nn.LayerNorm(width)] if norm else []))


def check_padding(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A padding mask as bool (B, N). Raises MechanismError unless it has the shape (B, N) or that of the tokens."""
    if tuple(mask.shape) not in (tuple(shape), (shape[0], math.prod(shape[1:]))):
        raise MechanismError(
            f"key_padding_mask has the shape {tuple(mask.shape)}; tokens of the shape {tuple(shape)} need one of them "
            "each, True for padding"
        )
    return mask.flatten(1).bool()


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention, softmax(q · kᵀ / √D) · v (Vaswani et al., 2017).

    ``forward(x, key_padding_mask=None)`` takes tokens in a sequence (B, N, C) or a grid (B, rows, columns, C) and, for
    padding, a mask with True, and returns what has the shape of ``x``. Queries that may see nothing get zeros in place
    of values. Raises MechanismError for shapes that do not fit.
    """

    configuration_type: ClassVar[type[Configuration]] = SoftmaxConfiguration

    def __init__(self, configuration: SoftmaxConfiguration) -> None:
        super().__init__()
        dim = configuration.dim
        self.dim, self.num_heads = dim, configuration.num_heads
        self.head_dim = dim // configuration.num_heads
        self.scale: float = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=configuration.qkv_bias)
        self.attn_drop = nn.Dropout(configuration.attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(configuration.proj_drop)
        self.apply(initialize)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim:
            raise MechanismError(
                f"tokens have the shape {tuple(x.shape)}; this needs (batch, tokens, {self.dim}) or (batch, rows, "
                f"columns, {self.dim})"
            )
        hidden = None if key_padding_mask is None else check_padding(key_padding_mask, x.shape[:-1])
        grid = self.grid(x.shape[1:-1])
        qkv = self.qkv(x.flatten(1, -2))
        padded_qkv, hidden = padded(qkv, hidden, self.missing(qkv, hidden, grid))
        if padded_qkv is qkv:
            mixed = self.mix(qkv, hidden, grid)
        else:
            mixed = first_tokens(self.mix(padded_qkv, hidden, padded_qkv.shape[1:2]), qkv.shape[1])
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out.reshape(x.shape)

    def grid(self, shape: Sequence[int]) -> Sequence[int]:
        """How the mechanism sees tokens of this shape: as a sequence or as a grid."""
        return (math.prod(shape),)

    def missing(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> int:
        """Tokens of padding that a sequence needs."""
        return 0

    def mix(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Tensor:
        """Attention of queries, keys and values (B, N, 3 · C) with ``hidden`` keys (B, N); returns (B, N, C)."""
        q, k, v = qkv_of(qkv, self.num_heads)
        return self.attend(q, k, v, hidden).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention of heads (B, H, N, D) with ``hidden`` keys (B, N)."""
        dropout = self.attn_drop.p if self.training else 0.0
        return attend(q, k, v, for_scores(hidden), dropout=dropout)


def for_scores(hidden: Tensor | None) -> Tensor | None:
    """Hidden keys (B, N) as scores (B, H, N, N) need them."""
    return None if hidden is None else hidden[:, None, None]
