"""Vision transformers with any attention, as in the experiments of EVA and LARA: DeiT without a class token.

``build("evit_small_p8", "eva", attn_2d=True, window_size=7, use_rpe=True)`` makes one. Parameters have the names of the
reference (Zheng et al., efficient-attention), whose checkpoints load.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fuser.attention import build as build_attention
from fuser.attention.mechanisms.softmax import initialize
from fuser.ir.errors import MechanismError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """``image`` and ``patch`` are pixels along one side. Raises MechanismError where patches are no grid."""

    dim: int
    heads: int
    patch: int
    image: int = 224
    depth: int = 12
    ratio: int = 4
    classes: int = 1000
    channels: int = 3

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1 or self.image % self.patch:
            raise MechanismError(f"an image of {self.image} pixels is no grid of patches of {self.patch}: {self}")


SIZES: Mapping[str, Sizes] = {
    f"evit_{name}_p{patch}": Sizes(dim=dim, heads=heads, patch=patch)
    for name, dim, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))
    for patch in (16, 8, 4)
    if (name, patch) != ("base", 4)
}
"""The models of the reference by name."""


_Sizes = TypeVar("_Sizes")


def resized(known: Mapping[str, _Sizes], name: str, sizes: Mapping[str, Any] | None, what: str) -> _Sizes:
    """The dataclass ``name`` of those that are ``known``, with other ``sizes`` if given.

    Raises MechanismError, which says ``what`` has no such name, for an unknown name or size.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        raise MechanismError(f"there is no {what} {name!r}; {hint}")
    fields = vars(known[name])
    unknown = {*(sizes or {})} - {*fields}
    if unknown:
        raise MechanismError(f"sizes of {name} are {', '.join(fields)}, not {', '.join(sorted(unknown))}")
    return type(known[name])(**{**fields, **(sizes or {})})


class Mlp(nn.Module):
    """Two products with GELU between them, (…, C) → (…, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP with a norm before each and a residual around, of a grid of tokens (B, H, W, C)."""

    def __init__(self, sizes: Sizes, attention: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.dim, eps=1e-6) for _ in range(2))
        self.attn = build_attention(attention, dim=sizes.dim, num_heads=sizes.heads, **arguments)
        self.mlp = Mlp(sizes.dim, sizes.ratio * sizes.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Patches of an image (B, channels, H, W) as a grid of tokens (B, H / patch, W / patch, C)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.dim, sizes.patch, sizes.patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.permute(0, 2, 3, 1)


class EfficientVit(nn.Module):
    """Logits (B, classes) of images (B, channels, image, image): blocks, a norm, the mean of tokens, a linear layer.

    Raises MechanismError for images of another size.
    """

    def __init__(self, sizes: Sizes, attention: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.sizes = sizes
        side = sizes.image // sizes.patch
        self.patch_embed = PatchEmbedding(sizes)
        self.pos_embed = nn.Parameter(torch.empty(1, side, side, sizes.dim))
        self.blocks = nn.ModuleList(Block(sizes, attention, arguments) for _ in range(sizes.depth))
        self.norm_before_pooling = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.head = nn.Linear(sizes.dim, sizes.classes)
        self.apply(initialize)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        wanted = (self.sizes.channels, self.sizes.image, self.sizes.image)
        if tuple(images.shape[1:]) != wanted:
            raise MechanismError(f"images have the shape {tuple(images.shape)}; this model needs (batch, {wanted})")
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm_before_pooling(x.flatten(1, 2)).mean(1))
        return logits


def build(
    name: str, attention: str = "softmax", *, sizes: Mapping[str, int] | None = None, **arguments: Any
) -> EfficientVit:
    """A model of :data:`SIZES`, with other ``sizes`` if given, in training mode; ``arguments`` are the attention's.

    Raises MechanismError for an unknown name, impossible sizes, and arguments that the attention does not have.
    """
    return EfficientVit(resized(SIZES, name, sizes, "vision transformer"), attention, arguments)
