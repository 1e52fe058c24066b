"""Convolutions of a grid whose channels lie beside each other, as those of tokens do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fuser.frontend.raising import Raiser, stays_inside
from fuser.frontend.sizes import traced
from fuser.frontend.views import View
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec

aten = torch.ops.aten


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


def _spacing(given: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Stride, padding and dilation of lines and of columns."""
    found = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        lines, columns = each(given.get(name, default), 2)
        found[name] = (lines, columns)
    return found
