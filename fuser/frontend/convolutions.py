"""Convolutions of a grid whose channels lie beside each other, as those of tokens do, and those of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fuser.frontend.linear import linear
from fuser.frontend.raising import Raiser, stays_inside, storage_of
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import View
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall

aten = torch.ops.aten
_MOST_COPIES = 4
"""Of a pixel in the rows of a product: more cost more memory than PyTorch's convolution takes time."""


def each(value: int | Sequence[int], count: int) -> Sequence[int]:
    """An argument of a convolution for every dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a convolution behind the weight, by name. Padding is a word only where it differs by side."""
    names = ("bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args[2:], strict=False)), **node.kwargs}
    if isinstance(given.get("padding"), str):
        kernel = traced(node.args[1]).shape[2:]
        apart = each(given.get("dilation", 1), len(kernel))
        added = [0 if given["padding"] == "valid" else d * (n - 1) for d, n in zip(apart, kernel, strict=True)]
        if all(n % 2 == 0 for n in added):
            given["padding"] = [n // 2 for n in added]
    return given


def _of_grid(r: Raiser, node: fx.Node) -> tuple[View, View, View | None, dict[str, Any]] | None:
    """Input, weight, bias and other arguments of a convolution of grids by constants, alike on both sides of each."""
    x, weight, given = r.view(node.args[0]), r.view(node.args[1]), arguments(node)
    if len(weight.dims) != 4 or len(x.dims) != 4 or isinstance(given.get("padding"), str):
        return None
    bias = None if given.get("bias") is None else r.view(given["bias"])
    if r.is_constant(x) or not all(r.is_constant(t) for t in (weight, bias) if t is not None):
        return None
    if r.dtype(x) not in r.floating or r.dtype(weight) != r.dtype(x):
        return None
    return None if 0 in x.shape or 0 in traced(node).shape else (x, weight, bias, given)


def depthwise(r: Raiser, node: fx.Node) -> View | None:
    """A convolution of every channel by itself, where channels are contiguous before it, and so behind it."""
    if (found := _of_grid(r, node)) is None:
        return None
    x, weight, bias, given = found
    channels = weight.shape[0]
    alone = given.get("groups", 1) == channels > 1 and weight.shape[1] == 1
    if not alone or x.shape[1] != channels or not stays_inside(node):
        return None
    rows = x.permute((0, 2, 3, 1))
    strides, (batch, _, *sizes) = rows.strides(), traced(node).shape
    if strides is None or strides[-1] != 1:
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
    if (found := _of_grid(r, node)) is None:
        return None
    x, weight, bias, given = found
    how, kernel = _spacing(given), weight.shape[2:]
    if given.get("groups", 1) != 1 or how["dilation"] != (1, 1):
        return None
    if math.prod(kernel) > _MOST_COPIES * math.prod(how["stride"]) or not is_read_as_rows(node):
        return None
    batch, _, *sizes = traced(node).shape
    if (grid := _lines(x)) is None:
        return None
    matrix = weight if grid.shape[-1] == 1 else weight.permute((0, 2, 3, 1))
    matrix = r.reshaped(matrix, (weight.shape[0], math.prod(weight.shape[1:])))
    windows = kinds.Unfold((kernel[0], kernel[1]), how["stride"], how["padding"])
    spec = TensorSpec.contiguous((batch, *sizes, matrix.shape[1]), r.dtype(x))
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


def sequence(r: Raiser, node: fx.Node) -> View | None:
    """A convolution along one axis, its windows side by side or not: a product of the windows as rows of tokens (B, T,
    C), which overlap in memory."""
    x, weight, given = r.view(node.args[0]), r.view(node.args[1]), arguments(node)
    bias = None if given.get("bias") is None else r.view(given["bias"])
    stride, dilation, groups = (each(given.get(name, 1), 1)[0] for name in ("stride", "dilation", "groups"))
    if dilation != 1 or groups != 1 or len(weight.dims) != 3 or len(x.dims) != 3 or not keeps_tokens(node):
        return None
    if r.is_constant(x) or r.dtype(x) not in r.floating or not r.is_constant(weight) or weight.shape[2] == 1:
        return None
    if bias is not None and not r.is_constant(bias):
        return None
    (columns, channels, width), count = weight.shape, traced(node).shape[2]
    tokens = _padded(r, node, x.permute((0, 2, 1)), _margins(given.get("padding", 0), width))
    batch, length, _ = tokens.shape
    # Windows begin at every token, or so many apart.
    windows = View(
        tokens.base, (tokens.dims[0], ((count, stride * channels),), ((width * channels, 1),)), tokens.offset
    )
    if batch != 1 and count * stride != length:
        copy = kinds.Extern(windows.copied(), "windows of several samples are copied, which no one stride describes")
        spec = TensorSpec.contiguous(windows.shape, r.dtype(tokens))
        windows = r.emit(copy, f"{node.name}_windows", (windows.base,), spec)
    matrix = r.reshaped(weight.permute((0, 2, 1)), (columns, width * channels))
    out = linear(r, node, windows, matrix, bias, transposed=True)
    return None if out is None else out.permute((0, 2, 1))


def keeps_tokens(node: fx.Node) -> bool:
    """Whether the result of a convolution may lie in tokens: neither does a caller get it with channels first, nor
    does PyTorch normalize these."""
    return stays_inside(node) and not any(user.target is aten.group_norm.default for user in node.users)


def _margins(padding: Any, width: int) -> tuple[int, int]:
    """Zeros before and behind a sequence: as many as are asked for, or what keeps its length."""
    if isinstance(padding, str):
        return (width - 1) // 2, width // 2
    (margin,) = each(padding, 1)
    return margin, margin


def _padded(r: Raiser, node: fx.Node, tokens: View, margins: tuple[int, int]) -> View:
    """Tokens (B, T, C) that lie end to end, with zeros before and behind: as they are, or a copy."""
    batch, length, channels = tokens.shape
    strides = tokens.strides()
    if margins == (0, 0):
        spec = TensorSpec.contiguous(tokens.shape, r.dtype(tokens))
        if strides is not None and spec.has_strides(strides):
            return tokens
        copy = kinds.Extern(tokens.copied(), "tokens are copied to lie end to end")
        return r.emit(copy, f"{node.name}_tokens", (tokens.base,), spec)
    spec = TensorSpec.contiguous((batch, length + sum(margins), channels), r.dtype(tokens))
    if strides is None or (strides[2] != 1 and channels != 1):
        call = TorchCall(aten.constant_pad_nd.default, (Ref(0), [0, 0, *margins]))
        pad = kinds.Extern(call, "tokens are copied to lie end to end, between zeros")
        return r.emit(pad, f"{node.name}_padded", (r.realize(tokens),), spec)
    parts = [tokens]
    for i, margin in enumerate(margins):
        if margin:
            call = TorchCall(torch.zeros, ((batch, margin, channels),), (("dtype", spec.dtype),))
            zeros = r.derived(f"{node.name}_margin", (), call, (batch, margin, channels), spec.dtype)
            parts.insert(i * len(parts), View.of(zeros, r.values[zeros]))
    return r.emit(kinds.Concat(1), f"{node.name}_padded", [r.realize(part) for part in parts], spec)
