"""Operators that move, pick, repeat or join elements and compute nothing: views where memory allows it."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fuser.frontend.aten.handlers import aten, given_by, handles, named
from fuser.frontend.raising import Raiser, storage_of
from fuser.frontend.sizes import traced
from fuser.frontend.views import Conjunction, Value, View
from fuser.ir import operators as kinds
from fuser.ir.errors import CaptureError
from fuser.ir.expression import Builder
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size
from fuser.ir.size import result as late_size


@handles(aten._assert_tensor_metadata.default)
def _nothing(r: Raiser, node: fx.Node) -> Value:
    return ()


@handles(
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _same(r: Raiser, node: fx.Node) -> Value | None:
    value = r.env[node.args[0]]
    source, result = traced(node.args[0]), traced(node)
    if isinstance(value, Conjunction):
        return value if source.dtype == result.dtype else None
    if source.dtype == result.dtype:
        return value
    b = Builder()
    return r.elementwise(node, kinds.Pointwise(b.build(b.input(0))), [r.view(node.args[0])])


@handles(aten.dropout.default)
def _dropout(r: Raiser, node: fx.Node) -> Value | None:
    return r.env[node.args[0]] if not node.args[2] or node.args[1] == 0 else None


@handles(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _reshape(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    shape = traced(node).shape
    reshaped = view.reshape(shape)
    if reshaped is None and view.shape and 0 not in shape and 0 not in view.shape and not r.is_constant(view):
        copied = View.of(*named(r, r.realize(View(view.base, view.dims, view.offset))))
        reshaped = copied.reshape(shape)
    return reshaped


@handles(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.mT.default)
def _transpose(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    n = len(view.dims)
    if n == 0:
        return view
    a, b = (d % n for d in (node.args[1:3] or (-2, -1)))
    order = list(range(n))
    order[a], order[b] = b, a
    return view.permute(order)


@handles(aten.t.default, aten.numpy_T.default)
def _reverse(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute(tuple(reversed(range(len(view.dims)))))


@handles(aten.permute.default)
def _permute(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute([d % len(view.dims) for d in node.args[1]])


@handles(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _movedim(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    if not view.dims:
        return view
    moved = ([dims] if isinstance(dims, int) else dims for dims in node.args[1:3])
    sources, targets = ([d % len(view.dims) for d in dims] for dims in moved)
    rest = [d for d in range(len(view.dims)) if d not in sources]
    at = dict(zip(targets, sources, strict=True))
    return view.permute([at[d] if d in at else rest.pop(0) for d in range(len(view.dims))])


@handles(aten.select.int)
def _select(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = node.args[1] % len(view.dims)
    return view.select(dim, node.args[2] % view.shape[dim])


@handles(aten.slice.Tensor)
def _slice(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    size = view.shape[dim]
    start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = node.args[4] if len(node.args) > 4 else 1
    count = traced(node).shape[dim]
    return view.slice(dim, start, count, step) if count != 0 else None


@handles(aten.diagonal.default)
def _diagonal(r: Raiser, node: fx.Node) -> Value | None:
    view, given = r.view(node.args[0]), {"offset": 0, "dim1": 0, "dim2": 1, **given_by(node, "offset", "dim1", "dim2")}
    first, second = (given[name] % len(view.dims) for name in ("dim1", "dim2"))
    if any(isinstance(view.shape[d], Size) for d in (first, second)):
        return None
    return view.diagonal(first, second, given["offset"])


@handles(aten.index.Tensor)
def _index(r: Raiser, node: fx.Node) -> Value | None:
    """Indices of one dimension that are constant and evenly spaced, or whatever picks whole rows."""
    view = r.view(node.args[0])
    given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
    even = _evenly_indexed(r, view, given)
    return _picked_rows(r, node, view) if even is None else even


def _evenly_indexed(r: Raiser, view: View, given: Sequence[tuple[int, fx.Node]]) -> View | None:
    if len(given) != 1 or traced(given[0][1]).ndim != 1 or not r.is_constant(r.view(given[0][1])):
        return None
    ((dim, index),) = given
    size = view.shape[dim]
    if isinstance(size, Size) or isinstance(traced(index).shape[0], Size) or traced(index).dtype != torch.int64:
        return None
    even = r.decided(_evenly_spaced, r.view(index), size)
    return None if even is None else view.slice(dim, *even)


def _evenly_spaced(indices: Tensor, size: int) -> tuple[int, int, int] | None:
    """First, count and step of indices of a dimension of so many, if they are rising and evenly spaced."""
    places = [i + size if i < 0 else i for i in indices.tolist()]
    step = places[1] - places[0] if len(places) > 1 else 1
    if not places or step <= 0 or places[0] < 0 or places[-1] >= size:
        return None
    return (places[0], len(places), step) if places == list(range(places[0], places[-1] + 1, step)) else None


def _picked_rows(r: Raiser, node: fx.Node, view: View) -> View | None:
    """Rows at places that are known when the program runs, such as the last token of every text: their numbers are
    picked instead."""
    indices = [index for index in node.args[1] if index is not None]
    if len(node.args[1]) >= len(view.dims) or any(traced(index).dtype != torch.int64 for index in indices):
        return None
    if 0 in traced(node).shape or all(r.is_constant(r.view(index)) for index in indices):
        return None
    found = r.row_numbers(view)
    if found is None:
        return None
    table, numbers = found
    views = [r.view(index) for index in indices]
    places = [None if index is None else Ref(1 + indices.index(index)) for index in node.args[1]]
    pick = kinds.Extern(TorchCall(node.target, (Ref(0), places)), "numbers of the rows that are picked")
    spec = TensorSpec.contiguous(traced(node).shape[:-1], torch.int64)
    picked = r.emit(pick, f"{node.name}_numbers", (numbers, *map(r.realize, views)), spec)
    return View.of(*named(r, r.of_rows(view, table, picked.base)))


@handles(aten.pad.default, aten.constant_pad_nd.default)
def _pad(r: Raiser, node: fx.Node) -> Value | None:
    return None if any(isinstance(n, Size) or n for n in node.args[1]) else r.view(node.args[0])


@handles(aten.roll.default)
def _roll(r: Raiser, node: fx.Node) -> Value | None:
    """A cyclic shift that leaves rows whole: these in another order."""
    view, shifts, dims = r.view(node.args[0]), node.args[1], node.args[2] if len(node.args) > 2 else []
    dims = tuple(d % len(view.dims) for d in dims)
    found = r.row_numbers(view) if dims and len(view.dims) - 1 not in dims else None
    if found is None:
        return None
    table, numbers = found
    shifted = r.numbered((numbers,), TorchCall(node.target, (Ref(0), tuple(shifts), dims)), view.shape[:-1])
    return View.of(*named(r, r.of_rows(view, table, shifted)))


@handles(aten.as_strided.default, aten.as_strided_copy.default)
def _as_strided(r: Raiser, node: fx.Node) -> Value | None:
    """Whatever lies in the memory of the operand's root, once that lies as the model has it."""
    result, root = traced(node), r.root(node.args[0])
    source = traced(root)
    if source.dtype != result.dtype or not r.is_whole(root):
        return None
    base = r.in_place(root)
    # A copy's own offset says nothing about where it was read.
    given = {**dict(zip(("size", "stride", "storage_offset"), node.args[1:], strict=False)), **node.kwargs}
    offset = given.get("storage_offset")
    offset = traced(node.args[0]).offset if offset is None else offset
    dims = tuple(((size, stride),) for size, stride in zip(given["size"], given["stride"], strict=True))
    return View(base.base, dims, base.offset + offset - source.offset)


@handles(aten.expand.default, aten.expand_as.default)
def _expand(r: Raiser, node: fx.Node) -> Value:
    shape = traced(node).shape
    value = r.env[node.args[0]]
    return value.expand(shape) if isinstance(value, Conjunction) else r.view(node.args[0]).expand(shape)


@handles(aten.cat.default)
def _cat(r: Raiser, node: fx.Node) -> Value | None:
    """What is joined with nothing, as the keys of a call are with an empty cache, and rows that are appended to the
    cache that a call is given, which nothing else needs as it was."""
    filled = [part for part in node.args[0] if 0 not in traced(part).shape]
    value = traced(node)
    if any(traced(part).dtype != value.dtype for part in filled):
        return None
    if len(filled) == 1:
        return r.view(filled[0])
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % max(value.ndim, 1)
    given = [part for part in filled[:1] if part.name in r.captured.inputs and len(part.users) == 1]
    if len(filled) != 2 or value.ndim != 4 or dim != 2 or not _is_kept(r, node) or not given:
        return _between_kernels(r, node, filled, dim)
    _, heads, rows, width = value.shape
    space = rows + (late_size(kinds.room, rows) if isinstance(rows, Size) else kinds.room(rows))
    spec = TensorSpec(value.shape, value.dtype, (heads * space * width, space * width, width, 1))
    appended = r.emit(kinds.Append(), node.name, tuple(r.realize(r.view(part)) for part in filled), spec)
    r.roomy.add(appended.base)
    return appended


def _between_kernels(r: Raiser, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> Value | None:
    """What is joined of results of kernels, such as patches of an image and the token before them."""
    views = [r.view(part) for part in parts]
    if not 2 <= len(views[0].dims if views else ()) <= 5 or any(r.dtype(v) not in r.floating for v in views):
        return None
    made = {value for op in r.operators if op.semantics.fusible for value in op.outputs}
    if made.isdisjoint(view.base for view in views):
        return None
    return r.emit(kinds.Concat(dim), node.name, [r.realize(view) for view in views], r.spec(node))


@handles(aten.index_copy.default)
def _index_copy(r: Raiser, node: fx.Node) -> Value | None:
    """Rows of a cache that a call leaves it with, or that a new one of zeros has."""
    before, dim, at, rows = node.args
    value = traced(node)
    if value.ndim != 4 or dim % 4 != 2 or 0 in (*value.shape, *traced(rows).shape) or traced(at).dtype != torch.int64:
        return None
    width, shape = value.shape[3], value.shape
    if before.target is aten.zeros.default and r.is_returned(node):
        call = TorchCall(torch.zeros, ((width,),), (("dtype", value.dtype),))
        zeros = r.derived(f"{node.name}_zeros", (), call, (width,), value.dtype)
        blank = r.alias(f"{node.name}_blank", zeros, shape, (0, 0, 0, 1), 0)
    elif _is_update(r, node, before) and len(before.users) == 1:
        blank = r.realize(r.view(before))
    else:
        return None
    inputs = (blank, r.realize(r.view(rows)), r.realize(r.view(at)))
    written = r.emit(kinds.WriteRows(), node.name, inputs, TensorSpec.contiguous(shape, value.dtype))
    r.roomy.add(written.base)
    return written


def _is_update(r: Raiser, node: fx.Node, given: fx.Node) -> bool:
    """Whether the tensor of ``node`` is what the graph leaves in the input ``given``, and no other result has its
    memory."""
    if given.op != "placeholder" or given.name not in r.captured.updated:
        return False
    leaves = node.graph.output_node().args[0]
    place = len(leaves) - len(r.captured.updated) + r.captured.updated.index(given.name)
    return leaves[place] is node and sum(storage_of(leaf) == storage_of(node) for leaf in leaves) == 1


def _is_kept(r: Raiser, node: fx.Node) -> bool:
    """Whether all of a tensor is an output of the graph: by itself, or as a slice, such as a window, that is all."""
    whole = [u for u in node.users if u.target is aten.slice.Tensor and traced(u).shape == traced(node).shape]
    return any(map(r.is_returned, (node, *whole)))


@handles(aten.repeat.default)
def _repeat(r: Raiser, node: fx.Node) -> Value | None:
    view, counts = r.view(node.args[0]), node.args[1]
    if 0 in counts:
        return None
    whole = view.expand((1,) * (len(counts) - len(view.dims)) + view.shape)
    each = zip(whole.dims, counts, strict=True)
    return View(view.base, tuple(f if count == 1 else ((count, 0), *f) for f, count in each), view.offset)


@handles(aten.stack.default)
def _stack(r: Raiser, node: fx.Node) -> Value | None:
    """One tensor several times, as sines and cosines for both members of a pair are."""
    first, *others = node.args[0]
    if any(other is not first for other in others):
        return None
    view, count = r.view(first), traced(node).ndim
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % count
    return View(view.base, (*view.dims[:dim], ((len(others) + 1, 0),), *view.dims[dim:]), view.offset)


@handles(aten.repeat_interleave.self_int)
def _repeat_interleave(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return None if dim is None or not view.dims else view.repeat(dim % len(view.dims), node.args[1])


@handles(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
)
def _split(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(view.dims)
    parts: list[View] = []
    start = 0
    for result in traced(node):
        part = view.slice(dim, start, result.shape[dim], 1)
        if part is None:
            return None
        parts.append(part)
        start += result.shape[dim]
    return tuple(parts)


@handles(aten.unbind.int)
def _unbind(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    parts = [view.select(dim, i) for i in range(view.shape[dim])]
    return None if any(p is None for p in parts) else tuple(p for p in parts if p is not None)


@handles(python_operator.getitem)
def _getitem(r: Raiser, node: fx.Node) -> Value:
    value = r.env[node.args[0]]
    if not isinstance(value, tuple):
        raise CaptureError(f"{node.args[0]} is indexed but is not a tuple")
    part: View = value[node.args[1]]
    return part
