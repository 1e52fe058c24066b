"""Convolutions of a grid whose channels lie beside each other, as those of tokens do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fuser.frontend.linear import linear
from fuser.frontend.raising import Raiser, stays_inside, storage_of
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import View
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec

_MOST_COPIES = 4
"""Of a pixel in the rows of a product: more cost more memory than PyTorch's convolution takes time."""


def each(value: int | Sequence[int], count: int) -> Sequence[int]:
    """An argument of a convolution for every dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a convolution behind the weight, by name."""
    names = ("bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(names, node.args[2:], strict=False)), **node.kwargs}


def depthwise(r: Raiser, node: fx.Node) -> View | None:
    """A convolution of every channel by itself, where channels are contiguous before it, and so behind it."""
    x, weight, given = r.view(node.args[0]), r.view(node.args[1]), arguments(node)
    channels, *_ = weight.shape
    alone = len(weight.dims) == 4 and given.get("groups", 1) == channels > 1 and weight.shape[1] == 1
    if not alone or len(x.dims) != 4 or x.shape[1] != channels or not stays_inside(node):
        return None
    bias = None if given.get("bias") is None else r.view(given["bias"])
    if r.is_constant(x) or not all(r.is_constant(t) for t in (weight, bias) if t is not None):
        return None
    rows = x.permute((0, 2, 3, 1))
    strides, (batch, _, *sizes) = rows.strides(), traced(node).shape
    if strides is None or strides[-1] != 1 or r.dtype(x) not in r.floating or r.dtype(weight) != r.dtype(x):
        return None
    if 0 in x.shape or 0 in sizes:
        return None
    spec = TensorSpec.contiguous((batch, *sizes, channels), r.dtype(x))
    inputs = (r.realize(rows), r.realize(weight))
    name = node.name if bias is None else f"{node.name}_sums"
    out = r.emit(kinds.Depthwise(**_spacing(given)), name, inputs, spec)
    if bias is not None:
        out = r.emit(kinds.Bias(), node.name, (out.base, r.realize(bias)), spec)
    return out.permute((0, 3, 1, 2))


def overlapping(r: Raiser, node: fx.Node) -> View | None:
    """A convolution whose windows overlap a little, of which channels are read as rows: the product of these windows
    with all of its weight."""
    x, weight, given = r.view(node.args[0]), r.view(node.args[1]), arguments(node)
    how, kernel = _spacing(given), weight.shape[2:]
    if len(kernel) != 2 or len(x.dims) != 4 or given.get("groups", 1) != 1 or how["dilation"] != (1, 1):
        return None
    if math.prod(kernel) > _MOST_COPIES * math.prod(how["stride"]) or not is_read_as_rows(node):
        return None
    bias = None if given.get("bias") is None else r.view(given["bias"])
    if r.is_constant(x) or not all(r.is_constant(t) for t in (weight, bias) if t is not None):
        return None
    (batch, _, *sizes), dtype = traced(node).shape, r.dtype(x)
    if 0 in x.shape or 0 in sizes or dtype not in r.floating or r.dtype(weight) != dtype:
        return None
    if (grid := _lines(x)) is None:
        return None
    matrix = weight if grid.shape[-1] == 1 else weight.permute((0, 2, 3, 1))
    matrix = r.reshaped(matrix, (weight.shape[0], math.prod(weight.shape[1:])))
    windows = kinds.Unfold((kernel[0], kernel[1]), how["stride"], how["padding"])
    spec = TensorSpec.contiguous((batch, *sizes, matrix.shape[1]), dtype)
    rows = r.emit(windows, f"{node.name}_windows", (r.realize(grid),), spec)
    out = linear(r, node, rows, matrix, bias, transposed=True)
    return None if out is None else out.permute((0, 3, 1, 2))


def _lines(x: View) -> View | None:
    """Grids (B, C, H, W) as (B, 1, H, W, C) or (B, C, H, W, 1) whose lines are contiguous; None where neither is."""
    for grid in (View(x.base, (x.dims[0], ((1, 0),), *x.dims[2:], x.dims[1]), x.offset), _with_pixels(x)):
        strides = grid.strides()
        if strides is not None and strides[-1] == 1 and strides[-2] == grid.shape[-1]:
            return grid
    return None


def _with_pixels(x: View) -> View:
    return View(x.base, (*x.dims, ((1, 1),)), x.offset)


def is_read_as_rows(node: fx.Node) -> bool:
    """Whether all that is computed of a grid (B, C, H, W) reads a view of it whose last dimension are the channels."""
    _, channels, *_ = traced(node).shape
    step = traced(node).strides[1]

    def reads_rows(seen: fx.Node) -> bool:
        for user in seen.users:
            value = traced(user)
            if isinstance(value, Traced) and value.storage == storage_of(node):
                if not reads_rows(user):
                    return False
            elif user.op == "output" or (traced(seen).shape[-1], traced(seen).strides[-1]) != (channels, step):
                return False
        return True

    return reads_rows(node)


def _spacing(given: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Stride, padding and dilation of lines and of columns."""
    found = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        lines, columns = each(given.get(name, default), 2)
        found[name] = (lines, columns)
    return found
