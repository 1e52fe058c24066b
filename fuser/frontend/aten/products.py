"""Products with matrices: linear layers, several of one input as one, grouped ones, convolutions that are such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fuser.frontend.aten.handlers import FEW, aten, handles
from fuser.frontend.convolutions import arguments, depthwise, each, keeps_tokens, overlapping, sequence
from fuser.frontend.linear import linear, product_of_heads
from fuser.frontend.raising import Raiser, stays_inside
from fuser.frontend.sizes import traced
from fuser.frontend.views import Value, View
from fuser.ir import operators as kinds
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size

_MERGE_LIMIT = 3


@handles(aten.linear.default)
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


@handles(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
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


@handles(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default)
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


@handles(aten.addmm.default)
def _addmm(r: Raiser, node: fx.Node) -> Value | None:
    bias, x, weight = (r.view(a) for a in node.args[:3])
    if node.kwargs or not r.is_constant(weight) or not r.is_constant(bias) or len(bias.dims) != 1:
        return None
    return _matrix_product(r, node, x, weight, bias)


@handles(aten.mm.default, aten.matmul.default, aten.bmm.default)
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
    few = not any(isinstance(size, Size) for size in (*x.shape, *y.shape)) and 0 < x.shape[0] * columns <= FEW
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
