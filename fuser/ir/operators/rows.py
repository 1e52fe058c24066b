"""Operators that read, rotate, slide over and join rows: embeddings, convolutions of channels, and caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.operators.base import Semantics, Shape, kind


@kind("embedding")
@dataclass(frozen=True)
class Embedding(Semantics):
    """Rows of a table (N, D) by their numbers (…)."""

    finishes_rows = True
    gathers = (0,)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        table, index = inputs
        return (torch.nn.functional.embedding(index, table),)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@kind("gather rows")
@dataclass(frozen=True)
class GatherRows(Embedding):
    """Rows of a value, seen as a matrix (N, D), by their numbers (…): windows of an image, what is shifted, or
    one token of every text."""


@kind("rotary")
@dataclass(frozen=True)
class Rotary(Semantics):
    """Rotary embedding of x (…, D): ``width`` columns from ``start`` on rotated by pairs, (a, b) to (a·cos − b·sin,
    b·cos + a·sin), the others as they are.

    The members of a pair are neighbours if ``interleaved``, else ``width / 2`` apart. cos and sin (…, width), which
    broadcast to x before their last dimension, have a number for each column; or, (…, width / 2), one for each pair.
    Raises ValueError for columns that are no pairs.
    """

    start: int
    width: int
    interleaved: bool

    def __post_init__(self) -> None:
        if self.start < 0 or self.width < 2 or self.width % 2:
            raise ValueError(f"{self.width} columns from {self.start} on cannot be rotated by pairs")

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = inputs[0]
        end = self.start + self.width
        cos, sin = (table if table.shape[-1] == self.width else self._of_columns(table) for table in inputs[1:])
        turned = x[..., self.start : end]
        if self.interleaved:
            partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            partner = torch.cat((-b, a), -1)
        return (torch.cat((x[..., : self.start], turned * cos + partner * sin, x[..., end:]), -1),)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

    def _of_columns(self, table: Tensor) -> Tensor:
        return table.repeat_interleave(2, -1) if self.interleaved else torch.cat((table, table), -1)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 3.0 * math.prod(output[:-1]) * self.width

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        columns = f"{self.width} of {output[-1]}" if self.width < output[-1] else str(self.width)
        return f"{columns}, interleaved" if self.interleaved else columns


@kind("depthwise")
@dataclass(frozen=True)
class Depthwise(Semantics):
    """A convolution of every channel of a grid x (B, H, W, C) by itself with a weight (C, 1, kh, kw), amid ``padding``
    lines and columns of zeros on both sides; sizes are of lines, then columns."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight = inputs
        # A weight may be kept narrower than what it is multiplied with.
        grid, weight = x.permute(0, 3, 1, 2), weight.to(x.dtype)
        how = self.stride, self.padding, self.dilation
        return (torch.nn.functional.conv2d(grid, weight, None, *how, groups=weight.shape[0]).permute(0, 2, 3, 1),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * math.prod(output) * math.prod(inputs[1][2:])

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][2]} × {inputs[1][3]} over {output[-1]}"


@kind("unfold")
@dataclass(frozen=True)
class Unfold(Semantics):
    """Windows of ``kernel`` pixels, ``stride`` apart, of grids x (B, P, H, W, C) amid ``padding`` lines and columns of
    zeros on both sides, as rows (B, lines, columns, P · kh · kw · C); sizes are of lines, then columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        (top, left), (high, wide), (down, right) = self.padding, self.kernel, self.stride
        padded = torch.nn.functional.pad(x, (0, 0, left, left, top, top))
        windows = padded.unfold(2, high, down).unfold(3, wide, right)
        return (windows.permute(0, 2, 3, 1, 5, 6, 4).flatten(3),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{self.kernel[0]} × {self.kernel[1]}"


@kind("concat")
@dataclass(frozen=True)
class Concat(Semantics):
    """Its inputs one behind the other along the dimension ``dim``."""

    dim: int

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, self.dim),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return " + ".join(str(shape[self.dim]) for shape in inputs)


# ---- caches


@kind("append")
@dataclass(frozen=True)
class Append(Semantics):
    """Rows (B, H, n, D) behind those of a cache (B, H, m, D): the cache of m + n rows.

    Its output has :func:`room` behind its rows. Where the memory of the cache that is given has it, too, and nobody
    else can see that, the output is in the same memory, and the rows that were there stay where they are.
    """

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, -2),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][-2]} behind {inputs[0][-2]}"


@kind("write rows")
@dataclass(frozen=True)
class WriteRows(Semantics):
    """Rows (B, H, n, D) at the positions (n,), int64, of a cache (B, H, m, D): the cache with these rows.

    Where it is what a call leaves in the cache that is given, it lies in the memory of that, and the other rows stay
    where they are. A position outside of the cache raises IndexRangeError.
    """

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        before, rows, at = inputs
        # A row of zeros may stand for all of them.
        return (before.contiguous().index_copy(2, at, rows),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][-2]} of {output[-2]}"


def room(rows: int) -> int:
    """Rows for which a cache of so many has room behind them: a quarter, in multiples of 64."""
    capacity = 64
    while capacity < rows:
        capacity += max(64, capacity // 256 * 64)
    return capacity - rows
