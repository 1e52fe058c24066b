"""Pyramid vision transformers with any attention, as in the experiments of EVA and LARA: PVTv2 (Wang et al., 2022).

``build("pvt_medium", "eva", attn_2d=True, window_size=7, use_rpe=True)`` makes PVTv2-B3. Parameters have the names of
the reference (Zheng et al., efficient-attention), whose checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fuser.attention import build as build_attention
from fuser.attention.mechanisms.softmax import initialize
from fuser.evit import resized
from fuser.ir.errors import MechanismError

_SIDES = (4, 2, 2, 2)
"""By how much each stage divides the sides of its input."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One number for each of four stages; ``image`` is pixels along one side.

    Raises MechanismError unless there are four positive numbers of each and the stages divide the image.
    """

    depths: Sequence[int]
    dims: Sequence[int] = (64, 128, 320, 512)
    heads: Sequence[int] = (1, 2, 5, 8)
    ratios: Sequence[int] = (8, 8, 4, 4)
    image: int = 224
    classes: int = 1000
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("depths", "dims", "heads", "ratios"):
            numbers = getattr(self, name)
            if len(numbers) != len(_SIDES) or min(numbers) < 1:
                raise MechanismError(f"{name} are {numbers}; four stages need a positive number each")
        if min(self.image, self.classes, self.channels) < 1 or self.image % math.prod(_SIDES):
            raise MechanismError(f"four stages need images of multiples of {math.prod(_SIDES)} pixels: {self}")


SIZES: Mapping[str, Sizes] = {
    "pvt_nano": Sizes(depths=(2, 2, 2, 2), dims=(32, 64, 160, 256)),
    "pvt_tiny": Sizes(depths=(2, 2, 2, 2)),
    "pvt_small": Sizes(depths=(3, 4, 6, 3)),
    "pvt_medium": Sizes(depths=(3, 4, 18, 3)),
    "pvt_base": Sizes(depths=(3, 8, 27, 3)),
    "pvt_large": Sizes(depths=(3, 6, 40, 3), ratios=(4, 4, 4, 4)),
}
"""The models of the reference by name: PVTv2-B0 to B5."""


def _initialize(module: nn.Module) -> None:
    initialize(module)
    if isinstance(module, nn.Conv2d):
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Depthwise(nn.Module):
    """A convolution of every channel of a grid by itself, 3 × 3, (B, H, W, C) → the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.dwconv(x.permute(0, 3, 1, 2))
        return mixed.permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two products with a depthwise convolution and GELU between them, (B, H, W, C) → the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.act = nn.Linear(dim, hidden), Depthwise(hidden), nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.dwconv(self.fc1(x))))
        return out


class Attention(nn.Module):
    """An attention under the name that the reference's checkpoints have for it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn_fn = attention

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn_fn(x)
        return out


class Block(nn.Module):
    """Attention and MLP with a norm before each and a residual around, of a grid of tokens (B, H, W, C)."""

    def __init__(self, dim: int, ratio: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = Attention(attention)
        self.mlp = Mlp(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class OverlappingPatches(nn.Module):
    """Patches that overlap by about half, with a norm, (B, channels, H, W) → (B, H / stride, W / stride, C)."""

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return patches


class PyramidVit(nn.Module):
    """Logits (B, classes) of images (B, channels, image, image): four stages of ever fewer tokens, the mean of the last
    ones, a linear layer. The last stage has exact attention, as in the reference.

    Raises MechanismError for images of another size.
    """

    def __init__(self, sizes: Sizes, attention: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.sizes = sizes
        stages = len(sizes.depths)
        for i, (dim, heads) in enumerate(zip(sizes.dims, sizes.heads, strict=True)):
            last = i == stages - 1
            kind: tuple[str, Mapping[str, Any]] = ("softmax", {}) if last else (attention, arguments)
            blocks = nn.ModuleList(
                Block(dim, sizes.ratios[i], build_attention(kind[0], dim=dim, num_heads=heads, **kind[1]))
                for _ in range(sizes.depths[i])
            )
            channels = sizes.dims[i - 1] if i else sizes.channels
            self.add_module(f"patch_embed{i + 1}", OverlappingPatches(channels, dim, _SIDES[i]))
            self.add_module(f"block{i + 1}", blocks)
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(sizes.dims[-1], sizes.classes)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        wanted = (self.sizes.channels, self.sizes.image, self.sizes.image)
        if tuple(images.shape[1:]) != wanted:
            raise MechanismError(f"images have the shape {tuple(images.shape)}; this model needs (batch, {wanted})")
        x = images
        for i in range(1, len(_SIDES) + 1):
            x = self.get_submodule(f"patch_embed{i}")(x if i == 1 else x.permute(0, 3, 1, 2))
            for block in self.get_submodule(f"block{i}").children():
                x = block(x)
            x = self.get_submodule(f"norm{i}")(x)
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


def build(
    name: str, attention: str = "softmax", *, sizes: Mapping[str, Any] | None = None, **arguments: Any
) -> PyramidVit:
    """A model of :data:`SIZES`, with other ``sizes`` if given, in training mode; ``arguments`` are the attention's.

    Raises MechanismError for an unknown name, impossible sizes, and arguments that the attention does not have.
    """
    return PyramidVit(resized(SIZES, name, sizes, "pyramid vision transformer"), attention, arguments)
