"""Rotary embeddings, however they were written, as ``rotary``."""

from __future__ import annotations

import math

import torch
from torch import fx

from fuser.frontend.raising import Raiser
from fuser.frontend.rotary_patterns import Columns, Rotation
from fuser.frontend.sizes import traced
from fuser.frontend.views import View
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Extern, Ref, TorchCall


def rotary_from(r: Raiser, node: fx.Node, rotation: Rotation) -> View | None:
    """The rotation that ``node`` computes, in the order in which what is rotated lies in memory; None where no kernel
    could run it."""
    spec = r.spec(node)
    x, cos, sin = (_view(r, columns) for columns in (rotation.x, rotation.cos, rotation.sin))
    if x is None or cos is None or sin is None or r.is_constant(x) or spec.numel == 0:
        return None
    tables = [cos, sin]
    if any(len(table.dims) > len(x.dims) for table in tables):
        return None
    if any(dtype not in r.floating for dtype in (spec.dtype, *(r.dtype(view) for view in (x, *tables)))):
        return None
    pairs = [_of_pairs(table, rotation.interleaved) for table in tables]
    order = x.memory_order()
    inputs = [r.realize(x.permute(order))]
    for table in [table for table in pairs if table is not None] if None not in pairs else tables:
        padded = table.expand((1,) * (len(x.dims) - len(table.dims)) + table.shape)
        inputs.append(r.realize(padded.permute(order)))
    shape = tuple(x.shape[d] for d in order)
    kind = kinds.Rotary(rotation.start, rotation.width, rotation.interleaved)
    out = r.emit(kind, node.name, inputs, TensorSpec.contiguous(shape, spec.dtype))
    return out.permute(tuple(order.index(d) for d in range(len(order)))).reshape(spec.shape)


def _of_pairs(table: View, interleaved: bool) -> View | None:
    """The numbers of a table that holds each of them twice, once for both members of a pair."""
    factors = table.dims[-1]
    if len(factors) < 2 or factors[-1 if interleaved else 0] != (2, 0):
        return None
    return View(table.base, (*table.dims[:-1], factors[:-1] if interleaved else factors[1:]), table.offset)


def _view(r: Raiser, columns: Columns) -> View | None:
    """Neighbouring columns as the last dimension of a view; None where no strides describe them."""
    leaf = columns.leaf
    view = r.view(leaf.node) if leaf.part is None else _part(r, leaf.node, imaginary=leaf.part == "imag")
    before = view.shape[: len(view.shape) - leaf.rank]
    shape = (*before, math.prod(view.shape[len(before) :]))
    whole = view.reshape(shape)
    if whole is None or columns.count == shape[-1]:
        return whole
    return whole.slice(len(before), columns.first, columns.count, 1)


def _part(r: Raiser, node: fx.Node, imaginary: bool) -> View:
    """The real or the imaginary part of a complex tensor, in memory of its own."""
    value = traced(node)
    spec = TensorSpec.contiguous(value.shape, value.dtype.to_real())
    source = r.realize(r.view(node))
    name = f"{node.name}_{'imag' if imaginary else 'real'}"
    part = torch.ops.aten.imag.default if imaginary else torch.ops.aten.real.default
    call = TorchCall(part, (Ref(0),))
    if r.is_constant(r.view(node)):
        made = r.derived(name, (source,), call, spec.shape, spec.dtype)
        return View.of(made, r.values[made])
    return r.emit(Extern(call, "a part of complex numbers"), name, (source,), spec)
