"""What every ATen operator that fuser understands becomes; a handler that returns None leaves its node an extern."""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fuser.attention.registry import spec_of
from fuser.frontend.attention_masks import Distances
from fuser.frontend.attention_operators import attention_from, average_from, scores_from, sums_from
from fuser.frontend.attention_patterns import MaskUse
from fuser.frontend.convolutions import arguments, depthwise, each, keeps_tokens, overlapping, sequence
from fuser.frontend.linear import linear, product_of_heads
from fuser.frontend.raising import Handler, Raiser, stays_inside, storage_of
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import Conjunction, Value, View, collapsed
from fuser.ir import expression as ex
from fuser.ir import operators as kinds
from fuser.ir.errors import CaptureError
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import TensorSpec
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.masks import Dense
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size
from fuser.ir.size import result as late_size
from fuser.ir.windows import Windowed

aten = torch.ops.aten
_MERGE_LIMIT = 3
_FEW = 16
"""Parts that are reduced as operands of one operator."""


HANDLERS: dict[Any, Handler] = {}
"""By operators, or by the names of those that only another package defines."""


def _handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for target in targets:
            HANDLERS[target] = handler
        return handler

    return register


@_handles(aten._assert_tensor_metadata.default)
def _nothing(r: Raiser, node: fx.Node) -> Value:
    return ()


@_handles(
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


@_handles(aten.dropout.default)
def _dropout(r: Raiser, node: fx.Node) -> Value | None:
    return r.env[node.args[0]] if not node.args[2] or node.args[1] == 0 else None


@_handles(
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
        copied = View.of(*_named(r, r.realize(View(view.base, view.dims, view.offset))))
        reshaped = copied.reshape(shape)
    return reshaped


def _named(r: Raiser, name: str) -> tuple[str, TensorSpec]:
    return name, r.values[name]


@_handles(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.mT.default)
def _transpose(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    n = len(view.dims)
    if n == 0:
        return view
    a, b = (d % n for d in (node.args[1:3] or (-2, -1)))
    order = list(range(n))
    order[a], order[b] = b, a
    return view.permute(order)


@_handles(aten.t.default, aten.numpy_T.default)
def _reverse(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute(tuple(reversed(range(len(view.dims)))))


@_handles(aten.permute.default)
def _permute(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    return view.permute([d % len(view.dims) for d in node.args[1]])


@_handles(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _movedim(r: Raiser, node: fx.Node) -> Value:
    view = r.view(node.args[0])
    moved = ([dims] if isinstance(dims, int) else dims for dims in node.args[1:3])
    sources, targets = ([d % len(view.dims) for d in dims] for dims in moved)
    rest = [d for d in range(len(view.dims)) if d not in sources]
    at = dict(zip(targets, sources, strict=True))
    return view.permute([at[d] if d in at else rest.pop(0) for d in range(len(view.dims))])


@_handles(aten.select.int)
def _select(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = node.args[1] % len(view.dims)
    return view.select(dim, node.args[2] % view.shape[dim])


@_handles(aten.slice.Tensor)
def _slice(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    size = view.shape[dim]
    start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = node.args[4] if len(node.args) > 4 else 1
    count = traced(node).shape[dim]
    return view.slice(dim, start, count, step) if count != 0 else None


@_handles(aten.diagonal.default)
def _diagonal(r: Raiser, node: fx.Node) -> Value | None:
    view, given = r.view(node.args[0]), {"offset": 0, "dim1": 0, "dim2": 1, **_given(node, "offset", "dim1", "dim2")}
    first, second = (given[name] % len(view.dims) for name in ("dim1", "dim2"))
    if any(isinstance(view.shape[d], Size) for d in (first, second)):
        return None
    return view.diagonal(first, second, given["offset"])


@_handles(aten.index.Tensor)
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
    return View.of(*_named(r, r.of_rows(view, table, picked.base)))


@_handles(aten.pad.default, aten.constant_pad_nd.default)
def _pad(r: Raiser, node: fx.Node) -> Value | None:
    return None if any(isinstance(n, Size) or n for n in node.args[1]) else r.view(node.args[0])


@_handles(aten.roll.default)
def _roll(r: Raiser, node: fx.Node) -> Value | None:
    """A cyclic shift that leaves rows whole: these in another order."""
    view, shifts, dims = r.view(node.args[0]), node.args[1], node.args[2] if len(node.args) > 2 else []
    dims = tuple(d % len(view.dims) for d in dims)
    found = r.row_numbers(view) if dims and len(view.dims) - 1 not in dims else None
    if found is None:
        return None
    table, numbers = found
    shifted = r.numbered((numbers,), TorchCall(node.target, (Ref(0), tuple(shifts), dims)), view.shape[:-1])
    return View.of(*_named(r, r.of_rows(view, table, shifted)))


@_handles(aten.as_strided.default, aten.as_strided_copy.default)
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


@_handles(aten.expand.default, aten.expand_as.default)
def _expand(r: Raiser, node: fx.Node) -> Value:
    shape = traced(node).shape
    value = r.env[node.args[0]]
    return value.expand(shape) if isinstance(value, Conjunction) else r.view(node.args[0]).expand(shape)


@_handles(aten.cat.default)
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


@_handles(aten.index_copy.default)
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


@_handles(aten.repeat.default)
def _repeat(r: Raiser, node: fx.Node) -> Value | None:
    view, counts = r.view(node.args[0]), node.args[1]
    if 0 in counts:
        return None
    whole = view.expand((1,) * (len(counts) - len(view.dims)) + view.shape)
    each = zip(whole.dims, counts, strict=True)
    return View(view.base, tuple(f if count == 1 else ((count, 0), *f) for f, count in each), view.offset)


@_handles(aten.stack.default)
def _stack(r: Raiser, node: fx.Node) -> Value | None:
    """One tensor several times, as sines and cosines for both members of a pair are."""
    first, *others = node.args[0]
    if any(other is not first for other in others):
        return None
    view, count = r.view(first), traced(node).ndim
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % count
    return View(view.base, (*view.dims[:dim], ((len(others) + 1, 0),), *view.dims[dim:]), view.offset)


@_handles(aten.repeat_interleave.self_int)
def _repeat_interleave(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return None if dim is None or not view.dims else view.repeat(dim % len(view.dims), node.args[1])


@_handles(
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


@_handles(aten.unbind.int)
def _unbind(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(view.dims)
    parts = [view.select(dim, i) for i in range(view.shape[dim])]
    return None if any(p is None for p in parts) else tuple(p for p in parts if p is not None)


@_handles(python_operator.getitem)
def _getitem(r: Raiser, node: fx.Node) -> Value:
    value = r.env[node.args[0]]
    if not isinstance(value, tuple):
        raise CaptureError(f"{node.args[0]} is indexed but is not a tuple")
    part: View = value[node.args[1]]
    return part


@_handles(aten.linear.default)
def _linear(r: Raiser, node: fx.Node) -> Value | None:
    x, weight = r.view(node.args[0]), r.view(node.args[1])
    if not r.is_constant(weight) or len(weight.dims) != 2 or r.is_constant(x):
        return None
    siblings = _siblings(r, node)
    if len(siblings) > 1:
        _merged_linear(r, siblings, x)
        return r.env[node]
    bias = r.view(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    if bias is not None and not r.is_constant(bias):
        return None
    return linear(r, node, x, weight, bias, transposed=True)


@_handles(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
def _grouped_mm(r: Raiser, node: fx.Node) -> Value | None:
    given = {**dict(zip(("self", "mat2", "offs", "bias", "out_dtype"), node.args, strict=False)), **node.kwargs}
    x, weight, ends = (given.get(a, given.get(b)) for a, b in (("self", "input"), ("mat2", "weight"), ("offs", "offs")))
    if ends is None or given.get("bias") is not None or traced(x).ndim != 2 or traced(weight).ndim != 3:
        return None
    matrices, rows = r.view(weight), r.view(x)
    dtypes = {r.dtype(rows), r.dtype(matrices), traced(node).dtype}
    if not r.is_constant(matrices) or len(dtypes) > 1 or not dtypes <= r.floating:
        return None
    if 0 in (*rows.shape, *matrices.shape):
        return None
    strides = matrices.strides()
    transposed = strides is not None and strides[-1] != 1 and strides[-2] == 1
    stored = matrices.permute((0, 2, 1)) if transposed else matrices
    inputs = tuple(map(r.realize, (rows, stored, r.view(ends))))
    return r.emit(kinds.GroupedGemm(transposed), node.name, inputs, r.spec(node))


def _siblings(r: Raiser, node: fx.Node) -> list[fx.Node]:
    """This and the next linear layers that read the same value with constant weights of one width and dtype."""

    def signature(n: fx.Node) -> tuple[Any, ...] | None:
        if n.target is not aten.linear.default or n.args[0] is not node.args[0]:
            return None
        bias = n.args[2] if len(n.args) > 2 else None
        operands = [n.args[1], *([bias] if bias is not None else [])]
        if any(o not in r.env or not isinstance(r.env[o], View) or not r.is_constant(r.view(o)) for o in operands):
            return None
        return (bias is None, r.dtype(r.view(n.args[1])))

    mine = signature(node)
    if mine is None:
        return [node]
    return [n for n in node.args[0].users if n not in r.env and signature(n) == mine][:_MERGE_LIMIT]


def _merged_linear(r: Raiser, nodes: Sequence[fx.Node], x: View) -> None:
    """One GEMM for several: weights concatenated, results its slices."""
    first = nodes[0]
    weights = tuple(r.realize(r.view(n.args[1])) for n in nodes)
    sizes = [r.values[w].shape[0] for w in weights]
    total = sum(sizes)
    join = TorchCall(torch.cat, ([Ref(i) for i in range(len(nodes))],))
    spec = r.values[weights[0]]
    weight = r.derived(f"{first.name}_weights", weights, join, (total, spec.shape[1]), spec.dtype)
    bias = None
    if len(first.args) > 2 and first.args[2] is not None:
        biases = tuple(r.realize(r.view(n.args[2])) for n in nodes)
        name = r.derived(f"{first.name}_biases", biases, join, (total,), r.values[biases[0]].dtype)
        bias = View.of(name, r.values[name])
    out = linear(r, first, x, View.of(weight, r.values[weight]), bias, transposed=True)
    start = 0
    for n, size in zip(nodes, sizes, strict=True):
        part = out.slice(len(out.dims) - 1, start, size, 1) if out is not None else None
        r.env[n] = part if part is not None else r.extern(n) or ()
        start += size


@_handles(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default)
def _convolution(r: Raiser, node: fx.Node) -> Value | None:
    ways = (_patches, depthwise, overlapping, sequence)
    return next((found for raised in ways if (found := raised(r, node)) is not None), None)


def _patches(r: Raiser, node: fx.Node) -> Value | None:
    """A convolution whose windows lie side by side: the product of its patches, as rows, with all of its weight. What
    remains at the ends is left out."""
    x, weight = r.view(node.args[0]), r.view(node.args[1])
    given = arguments(node)
    batch, channels, *sizes = x.shape
    kernel = weight.shape[2:]
    beside = tuple(each(given.get("stride", 1), len(kernel))) == kernel and given.get("groups", 1) == 1
    dense = not any(each(given.get("padding", 0), len(kernel))) and set(each(given.get("dilation", 1), 1)) == {1}
    if not beside or not dense or math.prod(kernel) == 1 or len(sizes) != len(kernel):
        return None
    if not (keeps_tokens if len(kernel) == 1 else stays_inside)(node):
        # A caller gets channels first, which a product would have to be copied to.
        return None
    bias = None if given.get("bias") is None else r.view(given["bias"])
    if r.is_constant(x) or not all(r.is_constant(t) for t in (weight, bias) if t is not None):
        return None
    if any(isinstance(size, Size) for size in sizes):
        return None
    counts = [size // width for size, width in zip(sizes, kernel, strict=True)]
    for d, (count, width) in enumerate(zip(counts, kernel, strict=True), 2):
        cut = x.slice(d, 0, count * width, 1)
        if cut is None:
            return None
        x = cut
    x = r.reshaped(x, (batch, channels, *(n for pair in zip(counts, kernel, strict=True) for n in pair)))
    # Within a patch in the order of memory, so that a copy of it moves runs as long as can be.
    inner = [1, *range(3, len(x.dims), 2)]
    if (strides := x.strides()) is not None:
        inner.sort(key=lambda d: -strides[d])
    rows = x.permute((0, *range(2, len(x.dims), 2), *inner)).reshape((batch, *counts, math.prod(weight.shape[1:])))
    matrix = weight.permute((0, *((d + 1) // 2 for d in inner)))
    if rows is None:
        return None
    matrix = r.reshaped(matrix, (weight.shape[0], math.prod(weight.shape[1:])))
    out = linear(r, node, rows, matrix, bias, transposed=True)
    return None if out is None else out.permute((0, len(counts) + 1, *range(1, len(counts) + 1)))


@_handles(aten.addmm.default)
def _addmm(r: Raiser, node: fx.Node) -> Value | None:
    bias, x, weight = (r.view(a) for a in node.args[:3])
    if node.kwargs or not r.is_constant(weight) or not r.is_constant(bias) or len(bias.dims) != 1:
        return None
    return _matrix_product(r, node, x, weight, bias)


@_handles(aten.mm.default, aten.matmul.default, aten.bmm.default)
def _matmul(r: Raiser, node: fx.Node) -> Value | None:
    x, weight = r.view(node.args[0]), r.view(node.args[1])
    if len(weight.dims) > 2:
        return product_of_heads(r, node, x, weight)
    if len(weight.dims) != 2 or len(x.dims) < 2 or r.is_constant(x):
        return None
    return _matrix_product(r, node, x, weight, None) if r.is_constant(weight) else _few_products(r, node, x, weight)


def _few_products(r: Raiser, node: fx.Node, x: View, y: View) -> View | None:
    """Products of a few rows that are made at run time, such as embeddings of texts and images: sums along rows."""
    columns, dtype = y.shape[1], r.dtype(x)
    few = not any(isinstance(size, Size) for size in (*x.shape, *y.shape)) and 0 < x.shape[0] * columns <= _FEW
    if len(x.dims) != 2 or not few or 0 in x.shape or r.dtype(y) != dtype or dtype not in r.floating:
        return None
    b = Builder()
    function = b.build(b.apply(Op.ROW_SUM, b.apply(Op.MUL, b.input(0), b.input(1))))
    shape = (x.shape[0], columns, x.shape[1])
    pairs = View(x.base, (x.dims[0], ((1, 0),), x.dims[1]), x.offset).expand(shape), y.permute((1, 0))
    spec = TensorSpec.contiguous((*shape[:2], 1), dtype)
    return r.emit(kinds.Reduction(function), node.name, [r.realize(v) for v in pairs], spec).reshape(shape[:2])


def _matrix_product(r: Raiser, node: fx.Node, x: View, weight: View, bias: View | None) -> Value | None:
    strides = weight.strides()
    if strides is not None and strides[0] == 1 and weight.shape[0] > 1:
        # x · Wᵀ written out: use the weight as it is stored.
        return linear(r, node, x, weight.permute((1, 0)), bias, transposed=True)
    return linear(r, node, x, weight, bias, transposed=False)


@_handles(aten.layer_norm.default)
def _layer_norm(r: Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if len(node.args[1]) != 1:
        return None
    weight = node.args[2] if len(node.args) > 2 else None
    bias = node.args[3] if len(node.args) > 3 else None
    eps = node.args[4] if len(node.args) > 4 else 1e-5
    operands = [x] + [r.view(a) for a in (weight, bias) if a is not None]
    expression = ex.layer_norm(eps, weight is not None, bias is not None)
    return r.elementwise(node, kinds.Norm(expression), operands)


@_handles(aten.rms_norm.default)
def _rms_norm(r: Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if len(node.args[1]) != 1:
        return None
    weight = node.args[2] if len(node.args) > 2 else None
    eps = node.args[3] if len(node.args) > 3 and node.args[3] is not None else torch.finfo(r.dtype(x)).eps
    operands = [x] + ([r.view(weight)] if weight is not None else [])
    return r.elementwise(node, kinds.Norm(ex.rms_norm(eps, weight is not None)), operands)


@_handles(aten.softmax.int, aten._softmax.default)
def _softmax(r: Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if not x.dims or node.args[1] % len(x.dims) != len(x.dims) - 1:
        return None
    return r.elementwise(node, kinds.Softmax(masked=False), [x])


@_handles(aten.embedding.default)
def _embedding(r: Raiser, node: fx.Node) -> Value | None:
    table, index = r.view(node.args[0]), r.view(node.args[1])
    spec = r.spec(node)
    if not r.is_constant(table) or spec.dtype not in r.floating or spec.numel == 0:
        return None
    if r.is_constant(index) and not isinstance(spec.numel, Size):
        # Where sizes are named, rows for each of them would fill the memory.
        return None
    strides = index.strides()
    lies = strides is not None and TensorSpec.contiguous(index.shape, torch.int64).has_strides(strides)
    if not lies and not r.is_constant(index):
        return None
    return r.emit(kinds.Embedding(), node.name, (r.realize(table), r.realize(index)), spec)


@_handles(aten.scaled_dot_product_attention.default)
def _sdpa(r: Raiser, node: fx.Node) -> Value | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = (r.view(given[n]) for n in names[:3])
    if given.get("dropout_p", 0.0) or not 2 <= len(q.dims) <= 4 or r.dtype(q) not in r.floating or 0 in q.shape:
        return None
    if 0 in k.shape or 0 in v.shape:
        return None
    mask = given.get("attn_mask")
    if not len(q.dims) == len(k.dims) == len(v.dims) or (mask is not None and traced(mask).ndim > len(q.dims)):
        return None
    if len(q.dims) > 2 and not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:-2] == v.shape[1:-2]):
        return None
    grouped = len(q.dims) == 4 and q.shape[1] != k.shape[1]
    # One head of keys broadcasts to all.
    if grouped and k.shape[1] != 1 and not (given.get("enable_gqa") and q.shape[1] % k.shape[1] == 0):
        return None
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    masks = [] if mask is None else [MaskUse(mask, inverted=False)]
    return attention_from(r, node, q, k, v, scale, masks, causal=bool(given.get("is_causal", False)))


@_handles(torch.ops.fuser.sparse_attention.default)
def _sparse_attention(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v = (r.view(n) for n in node.args[:3])
    _, _, _, key, attn_mask, scale = node.args
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    spec = spec_of(key)
    if not any(isinstance(length, Size) for length in (q.shape[2], k.shape[2])):
        # Else the plan is made, and the mask checked, when the lengths are known.
        spec.mask.validate(q.shape[2], k.shape[2])
    masks = [] if attn_mask is None else [MaskUse(attn_mask, inverted=False)]
    pattern = None if isinstance(spec.mask, Dense) else spec.mask
    return attention_from(r, node, q, k, v, scale, masks, pattern=pattern, rule=spec.rule, quantize=spec.quantize)


@_handles(torch.ops.fuser.windowed_attention.default)
def _windowed_attention(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v, far_keys, far_values = (r.view(n) for n in node.args[:5])
    bias, window, before, after, chunk, columns = node.args[5:]
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    how = Windowed(window, before, after, chunk, columns, bias is not None)
    tokens, summaries = q.shape[2], far_keys.shape[2]
    shape = (*k.shape[:2], tokens + how.gap + summaries, k.shape[3])
    row = None
    if bias is not None:
        table = r.view(bias)
        if not r.is_constant(table):
            return None
        call = TorchCall(how.by_distance, (Ref(0), tokens, summaries))
        row = r.derived(
            f"{node.name}_row", (r.realize(table),), call, (table.shape[0], tokens + shape[2] - 1), r.dtype(table)
        )
    parts = [(r.realize(near), r.realize(far)) for near, far in ((k, far_keys), (v, far_values))]
    keys, values = (
        r.emit(kinds.JoinedKeys(how), f"{node.name}_{name}", pair, TensorSpec.contiguous(shape, r.dtype(q)))
        for name, pair in zip(("keys", "values"), parts, strict=True)
    )
    scale = 1.0 / math.sqrt(q.shape[3])
    distances = None if row is None else Distances(row, 0, reversed=True)
    return attention_from(r, node, q, keys, values, scale, [], pattern=how.mask, distances=distances)


@_handles(torch.ops.fuser.averages.default)
def _averages(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v = (r.view(n) for n in node.args[:3])
    _, _, _, bias, scale = node.args
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    masks = [] if bias is None else [MaskUse(bias, inverted=False)]
    scores = scores_from(r, node, q, k, v, scale, masks)
    sums = sums_from(r, node, scores)
    return average_from(r, node, scores), sums


@_handles(torch.ops.fuser.log_sums.default)
def _log_sums(r: Raiser, node: fx.Node) -> Value | None:
    q, k = (r.view(n) for n in node.args[:2])
    _, _, bias, scale = node.args
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k)):
        return None
    masks = [] if bias is None else [MaskUse(bias, inverted=False)]
    return sums_from(r, node, scores_from(r, node, q, k, k, scale, masks))


@_handles(torch.ops.fuser.importance_attention.default)
def _importance_attention(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v, *parts = (r.view(n) for n in node.args[:7])
    coefficient, scale = node.args[7:]
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    spec = TensorSpec.contiguous((*q.shape[:3], k.shape[2]), r.dtype(q))
    inputs = tuple(map(r.realize, (q, *parts)))
    bias = r.emit(kinds.ImportanceBias(coefficient, scale), f"{node.name}_weights", inputs, spec)
    return attention_from(r, node, q, k, v, scale, [], added=bias.base)


@_handles(torch.ops.fuser.linear_attention.default)
def _linear_attention(r: Raiser, node: fx.Node) -> Value | None:
    *given, scale, causal, floor, kept = node.args
    operands = [None if n is None else r.view(n) for n in given]
    out, state = traced(node)
    views = [t for t in operands if t is not None]
    if any(r.dtype(t) not in r.floating or 0 in t.shape for t in views) or 0 in out.shape:
        return None
    _, _, _, decay, beta, first = operands
    rule = Recurrence(scale, causal, decay is not None, beta is not None, floor)
    semantics = kinds.LinearAttention(rule, first is not None, kept)
    # Heads lie inside a token, so that merging them afterwards moves nothing.
    _, heads, rows, width = out.shape
    strides = (rows * heads * width, width, heads * width, 1)
    specs = [TensorSpec(out.shape, out.dtype, strides), TensorSpec.contiguous(state.shape, state.dtype)]
    found = r.emit_all(semantics, node.name, [r.realize(t) for t in views], specs[: 1 + kept])
    return found if kept else (*found, View.of(*_nothing_of(r, node, state)))


def _nothing_of(r: Raiser, node: fx.Node, empty: Traced) -> tuple[str, TensorSpec]:
    """A constant of no elements."""
    call = TorchCall(torch.empty, (tuple(empty.shape),), (("dtype", empty.dtype),))
    return _named(r, r.derived(f"{node.name}_none", (), call, empty.shape, empty.dtype))


@_handles(torch.ops.fuser.features.default)
def _features(r: Raiser, node: fx.Node) -> Value | None:
    x, directions = r.view(node.args[0]), r.view(node.args[1])
    spec = r.spec(node)
    if not {r.dtype(x), r.dtype(directions)} <= r.floating or not r.is_constant(directions) or spec.numel == 0:
        return None
    semantics = kinds.Features(FeatureMap(node.args[2]))
    return r.emit(semantics, node.name, (r.realize(x), r.realize(directions)), spec)


@_handles(torch.ops.aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
def _and(r: Raiser, node: fx.Node) -> Value | None:
    """Masks: a constant that allows everything vanishes, another is kept apart from the run-time part."""
    if traced(node).dtype != torch.bool:
        return None
    shape = traced(node).shape
    values = [r.env[a] for a in node.args if isinstance(a, fx.Node)]
    if len(values) != 2 or any(isinstance(v, tuple) for v in values):
        return None
    views = [v for v in values if isinstance(v, View)]
    if any(r.dtype(v) != torch.bool for v in views):
        return None
    for i, value in enumerate(values):
        other = values[1 - i]
        if isinstance(value, View) and r.is_constant(value):
            if r.decided(_all_true, value):
                return other.expand(shape) if not isinstance(other, tuple) else None
            if isinstance(other, View) and not r.is_constant(other):
                return Conjunction(value.expand(shape), other.expand(shape))
    return None


def _all_true(tensor: Tensor) -> bool:
    return bool(tensor.all())


# ---- elementwise operators

_UNARY = {
    aten.relu.default: Op.RELU,
    aten.silu.default: Op.SILU,
    aten.tanh.default: Op.TANH,
    aten.sigmoid.default: Op.SIGMOID,
    aten.exp.default: Op.EXP,
    aten.log.default: Op.LOG,
    aten.erf.default: Op.ERF,
    aten.sqrt.default: Op.SQRT,
    aten.rsqrt.default: Op.RSQRT,
    aten.reciprocal.default: Op.RECIPROCAL,
    aten.neg.default: Op.NEG,
    aten.abs.default: Op.ABS,
    aten.round.default: Op.ROUND,
}
_ACTIVATIONS = frozenset({Op.RELU, Op.SILU, Op.TANH, Op.SIGMOID, Op.GELU, Op.GELU_TANH})


@_handles(*_UNARY)
def _unary(r: Raiser, node: fx.Node) -> Value | None:
    op = _UNARY[node.target]
    kind = kinds.Activation if op in _ACTIVATIONS else kinds.Pointwise
    return r.elementwise(node, kind(ex.unary(op)), [r.view(node.args[0])])


@_handles(aten.gelu.default)
def _gelu(r: Raiser, node: fx.Node) -> Value | None:
    op = Op.GELU_TANH if node.kwargs.get("approximate", "none") == "tanh" else Op.GELU
    return r.elementwise(node, kinds.Activation(ex.unary(op)), [r.view(node.args[0])])


@_handles(aten.glu.default)
def _glu(r: Raiser, node: fx.Node) -> Value | None:
    view = r.view(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)) % len(view.dims)
    half = view.shape[dim] // 2
    parts = [view.slice(dim, start, half, 1) for start in (0, half)]
    b = Builder()
    y = b.apply(Op.MUL, b.input(0), b.apply(Op.SIGMOID, b.input(1)))
    known = [part for part in parts if part is not None]
    return r.elementwise(node, kinds.Pointwise(b.build(y)), known) if len(known) == 2 else None


_CLAMPS = {
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", None),
    aten.clamp_max.default: (None, "max"),
    aten.hardtanh.default: ("min_val", "max_val"),
}
"""The names of the lower and upper bound, in the order of the arguments."""


@_handles(*_CLAMPS)
def _clamp(r: Raiser, node: fx.Node) -> Value | None:
    low, high = names = _CLAMPS[node.target]
    defaults = {"min_val": -1.0, "max_val": 1.0}
    given = {**defaults, **dict(zip(filter(None, names), node.args[1:], strict=False)), **node.kwargs}
    b = Builder()
    y = b.input(0)
    for name, op in ((low, Op.MAXIMUM), (high, Op.MINIMUM)):
        bound = given.get(name)
        if bound is not None:
            y = b.apply(op, y, b.constant(float(bound)))
    return r.elementwise(node, kinds.Pointwise(b.build(y)), [r.view(node.args[0])])


_BINARY = {
    aten.add.Tensor: Op.ADD,
    aten.add.Scalar: Op.ADD,
    aten.sub.Tensor: Op.SUB,
    aten.sub.Scalar: Op.SUB,
    aten.mul.Tensor: Op.MUL,
    aten.mul.Scalar: Op.MUL,
    aten.div.Tensor: Op.DIV,
    aten.div.Scalar: Op.DIV,
    aten.maximum.default: Op.MAXIMUM,
    aten.minimum.default: Op.MINIMUM,
}


@_handles(*_BINARY)
def _binary(r: Raiser, node: fx.Node) -> Value | None:
    op = _BINARY[node.target]
    if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        return None
    b = Builder()
    operands: list[View] = []
    at: list[int] = []
    for argument in node.args[:2]:
        if isinstance(argument, fx.Node):
            scalar = _scalar(r, argument)
            if scalar is not None:
                at.append(b.constant(scalar))
                continue
            operands.append(r.view(argument))
            at.append(b.input(len(operands) - 1))
        elif isinstance(argument, (int, float)) and not isinstance(argument, bool):
            at.append(b.constant(float(argument)))
        else:
            return None
    if not operands:
        return None
    kind: type[kinds.Pointwise | kinds.Bias | kinds.Residual] = kinds.Pointwise
    running = [v for v in operands if not r.is_constant(v)]
    if op is Op.ADD and len(operands) == 2:
        bias = len(running) == 1 and any(len(v.dims) == 1 and r.is_constant(v) for v in operands)
        kind = kinds.Bias if bias else kinds.Residual
    return r.elementwise(node, kind(b.build(b.apply(op, *at))), operands)


def _scalar(r: Raiser, node: fx.Node) -> float | None:
    """The number that a constant of no dimensions holds."""
    value = r.env[node]
    if isinstance(value, View) and not value.dims and r.is_constant(value) and r.dtype(value).is_floating_point:
        return r.decided(float, value)
    return None


@_handles(
    *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
)
def _where(r: Raiser, node: fx.Node) -> Value | None:
    """Numbers of tensors, or the same for all, where a condition holds and where it does not."""
    filled = node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    x, condition, other = node.args if filled else (node.args[1], node.args[0], node.args[2])
    decides = r.env[condition]
    if not isinstance(decides, View) or r.dtype(decides) != torch.bool or node.kwargs:
        return None
    b = Builder()
    operands, at = list[View](), list[int]()
    for argument in (x, other):
        number = _scalar(r, argument) if isinstance(argument, fx.Node) else float(argument)
        if number is None:
            operands.append(r.view(argument))
        at.append(b.input(len(operands) - 1) if number is None else b.constant(number))
    if not any(not r.is_constant(view) for view in operands):
        return None
    first, second = reversed(at) if filled else at
    chosen = b.apply(Op.WHERE, b.input(len(operands)), first, second)
    return r.elementwise(node, kinds.Pointwise(b.build(chosen)), [*operands, decides])


@_handles(aten.pow.Tensor_Scalar, aten.square.default)
def _pow(r: Raiser, node: fx.Node) -> Value | None:
    exponent = node.args[1] if node.target is aten.pow.Tensor_Scalar else 2
    b = Builder()
    x = b.input(0)
    if exponent in (1, 2, 3, 4):
        y = x
        for _ in range(int(exponent) - 1):
            y = b.apply(Op.MUL, y, x)
    elif exponent == 0.5:
        y = b.apply(Op.SQRT, x)
    elif exponent == -0.5:
        y = b.apply(Op.RSQRT, x)
    elif exponent == -1:
        y = b.apply(Op.RECIPROCAL, x)
    else:
        return None
    return r.elementwise(node, kinds.Pointwise(b.build(y)), [r.view(node.args[0])])


# ---- reductions along rows


def _reductions(r: Raiser, node: fx.Node, given: Mapping[str, Any], *functions: ex.Expression) -> Value | None:
    """What ``functions``, one for each result, make of every row of the first operand; None where something else is
    asked for."""
    shape = traced(node.args[0]).shape
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or []
    if not shape or 0 in shape or [d % len(shape) for d in dims] != [len(shape) - 1]:
        return None
    several = isinstance(traced(node), tuple)
    results = traced(node) if several else (traced(node),)
    x, keepdim = r.view(node.args[0]), given.get("keepdim", False)
    names = [node.name, *(f"{node.name}_{i}" for i in range(1, len(results)))]
    each = zip(names, functions, results, strict=True)
    found = [r.reduction(name, function, x, result.dtype, keepdim) for name, function, result in each]
    views = tuple(view for view in found if view is not None)
    return None if len(views) < len(found) else views if several else views[0]


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the first, by name."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


_REDUCTIONS = {aten.mean.dim: Op.ROW_MEAN, aten.sum.dim_IntList: Op.ROW_SUM, aten.amax.default: Op.ROW_MAX}
_COMBINED = {aten.mean.dim: Op.ADD, aten.sum.dim_IntList: Op.ADD, aten.amax.default: Op.MAXIMUM}


@_handles(*_REDUCTIONS)
def _reduced(r: Raiser, node: fx.Node) -> Value | None:
    given = _given(node, "dim", "keepdim")
    found = _reductions(r, node, given, ex.unary(_REDUCTIONS[node.target]))
    return _reduced_across(r, node, given) if found is None else found


def _reduced_across(r: Raiser, node: fx.Node, given: Mapping[str, Any]) -> Value | None:
    """A reduction of other axes than the last: of few parts at once, or one axis after the other where PyTorch takes
    many times as long for all, as for squares of a grid. 16-bit numbers would be rounded in between."""
    result, source, dims = traced(node), traced(node.args[0]), given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    x = r.view(node.args[0])
    if not isinstance(dims, (list, tuple)) or result.dtype != source.dtype or r.is_constant(x):
        return None
    dims = sorted(d % source.ndim for d in dims)
    found = _few_combined(r, node.name, node.target, x, dims)
    if found is None and x.strides() is None:
        # PyTorch would be given such rows, too.
        found = _few_combined(r, node.name, node.target, View.of(*_named(r, r.realize(x))), dims)
    found = found or _many_combined(r, node, x, dims)
    if found is not None:
        return found.reshape(result.shape)
    if len(dims) < 2 or dims == list(range(dims[0], dims[-1] + 1)) or result.dtype.itemsize < 4:
        return None
    shape = list(source.shape)
    for dim in reversed(dims):
        shape[dim] = 1
        name = f"{node.name}_{dim}"
        part = _few_combined(r, name, node.target, x, [dim])
        if part is None:
            call = TorchCall(node.target, (Ref(0), [dim], True))
            step = kinds.Extern(call, "PyTorch reduces one axis after the other")
            part = r.emit(step, name, (r.realize(x),), TensorSpec.contiguous(shape, result.dtype))
        x = part
    return x.reshape(result.shape)


def _many_combined(r: Raiser, node: fx.Node, x: View, dims: Sequence[int]) -> View | None:
    """A reduction of one axis, such as all tokens of an image, as few parts of few parts each, until one is left; None
    where its size has no such factors. 16-bit numbers would be rounded in between."""
    (dim, *more), size = dims, x.shape[dims[0]]
    if more or isinstance(size, Size) or r.dtype(x).itemsize < 4:
        return None
    factors = _few_factors(size)
    if len(factors) < 2:
        return None
    for i, count in enumerate(factors):
        rest = math.prod(factors[i + 1 :])
        split = x.reshape((*x.shape[:dim], count, rest, *x.shape[dim + 1 :]))
        part = split and _few_combined(r, f"{node.name}_{rest}", node.target, split, [dim])
        if part is None:
            return None
        x = r.reshaped(part, (*part.shape[:dim], rest, *part.shape[dim + 2 :]))
    return x


def _few_factors(size: int) -> list[int]:
    """The factors of a size, each of few, the largest first; none where it has a larger one."""
    found: list[int] = []
    while size > 1:
        count = next((n for n in range(_FEW, 1, -1) if size % n == 0), None)
        if count is None:
            return []
        found.append(count)
        size //= count
    return found


def _few_combined(r: Raiser, name: str, target: Any, x: View, dims: Sequence[int]) -> View | None:
    """A reduction of few parts that lie beside each other, such as what the experts of a token have made of it or the
    squares of a grid, as one elementwise operator, its axes of size one; None for many parts, or those of rows."""
    counts = [x.shape[dim] for dim in dims]
    if len(x.dims) < 3 or len(x.dims) - 1 in dims or any(isinstance(count, Size) for count in counts):
        return None
    if r.dtype(x) not in r.floating or not 2 <= math.prod(counts) <= _FEW or 0 in x.shape:
        return None
    parts: list[View | None] = [x]
    for dim, count in zip(dims, counts, strict=True):
        parts = [part and part.slice(dim, i, 1, 1) for part in parts for i in range(count)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    b = Builder()
    y = b.input(0)
    for i in range(1, len(known)):
        y = b.apply(_COMBINED[target], y, b.input(i))
    if target is aten.mean.dim:
        y = b.apply(Op.MUL, y, b.constant(1 / len(known)))
    order = known[0].memory_order()
    rows = [part.permute(order) for part in known]
    shape, strides = rows[0].shape, rows[0].strides()
    # Heads beside each other are one row.
    while strides is not None and len(shape) > 1 and strides[-2] == shape[-1] * strides[-1]:
        shape, strides = (*shape[:-2], shape[-2] * shape[-1]), (*strides[:-2], strides[-1])
    wide = [part for part in (row.reshape(shape) for row in rows) if part is not None]
    # Kernels read rows that are evenly spaced in evenly spaced groups.
    if len(wide) < len(rows) or len(collapsed([f for factors in wide[0].dims[:-1] for f in factors])) > 2:
        return None
    inputs = [r.realize(part) for part in wide]
    made = r.emit(kinds.Pointwise(b.build(y)), name, inputs, TensorSpec.contiguous(shape, r.dtype(x)))
    found = made.reshape(rows[0].shape)
    return found and found.permute([order.index(d) for d in range(len(order))])


@_handles(aten.logsumexp.default)
def _log_sum_exp(r: Raiser, node: fx.Node) -> Value | None:
    return _reductions(r, node, _given(node, "dim", "keepdim"), ex.log_sum_exp())


@_handles(aten.linalg_vector_norm.default, aten.linalg_norm.default, aten.norm.ScalarOpt_dim)
def _vector_norm(r: Raiser, node: fx.Node) -> Value | None:
    given = _given(node, "order", "dim", "keepdim")
    order = given.get("ord", given.get("order", 2))
    b = Builder()
    x = b.input(0)
    if order in (2, None):
        y = b.apply(Op.SQRT, b.apply(Op.ROW_SUM, b.apply(Op.MUL, x, x)))
    elif order == 1:
        y = b.apply(Op.ROW_SUM, b.apply(Op.ABS, x))
    elif order == math.inf:
        y = b.apply(Op.ROW_MAX, b.apply(Op.ABS, x))
    else:
        return None
    return _reductions(r, node, given, b.build(y))


_DEVIATIONS = (aten.std.correction, aten.std.dim, aten.std_mean.correction, aten.std_mean.dim)
_WITH_MEAN = (aten.std_mean.correction, aten.std_mean.dim, aten.var_mean.correction, aten.var_mean.dim)
_UNBIASED = (aten.std.dim, aten.var.dim, aten.std_mean.dim, aten.var_mean.dim)


@_handles(*_DEVIATIONS, *_WITH_MEAN, *_UNBIASED, aten.var.correction)
def _variance(r: Raiser, node: fx.Node) -> Value | None:
    given = _given(node, *(("dim", "unbiased", "keepdim") if node.target in _UNBIASED else ("dim",)))
    correction = given.get("correction", int(given.get("unbiased", True)))
    correction = 1 if correction is None else correction
    count = traced(node.args[0]).shape[-1] if traced(node.args[0]).shape else 0
    if isinstance(count, Size) or count <= correction:
        return None
    b = Builder()
    x = b.input(0)
    mean = b.apply(Op.ROW_MEAN, x)
    centred = b.apply(Op.SUB, x, mean)
    total = b.apply(Op.ROW_SUM, b.apply(Op.MUL, centred, centred))
    y = b.apply(Op.DIV, total, b.constant(count - correction))
    y = b.apply(Op.SQRT, y) if node.target in _DEVIATIONS else y
    return _reductions(r, node, given, b.build(y), *([b.build(mean)] if node.target in _WITH_MEAN else []))
