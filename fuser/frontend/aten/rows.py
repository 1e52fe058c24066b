"""Norms, softmax and reductions along rows, and rows of tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fuser.frontend.aten.handlers import FEW, aten, given_by, handles, named
from fuser.frontend.raising import Raiser, with_wide_rows
from fuser.frontend.sizes import traced
from fuser.frontend.views import Value, View, collapsed
from fuser.ir import expression as ex
from fuser.ir import operators as kinds
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size


@handles(aten.layer_norm.default)
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


@handles(aten.rms_norm.default)
def _rms_norm(r: Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if len(node.args[1]) != 1:
        return None
    weight = node.args[2] if len(node.args) > 2 else None
    eps = node.args[3] if len(node.args) > 3 and node.args[3] is not None else torch.finfo(r.dtype(x)).eps
    operands = [x] + ([r.view(weight)] if weight is not None else [])
    return r.elementwise(node, kinds.Norm(ex.rms_norm(eps, weight is not None)), operands)


@handles(aten.softmax.int, aten._softmax.default)
def _softmax(r: Raiser, node: fx.Node) -> Value | None:
    x = r.view(node.args[0])
    if not x.dims or node.args[1] % len(x.dims) != len(x.dims) - 1:
        return None
    return r.elementwise(node, kinds.Softmax(masked=False), [x])


@handles(aten.embedding.default)
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


_REDUCTIONS = {aten.mean.dim: Op.ROW_MEAN, aten.sum.dim_IntList: Op.ROW_SUM, aten.amax.default: Op.ROW_MAX}
_COMBINED = {aten.mean.dim: Op.ADD, aten.sum.dim_IntList: Op.ADD, aten.amax.default: Op.MAXIMUM}


@handles(*_REDUCTIONS)
def _reduced(r: Raiser, node: fx.Node) -> Value | None:
    given = given_by(node, "dim", "keepdim")
    found = _reductions(r, node, given, ex.unary(_REDUCTIONS[node.target]))
    return _reduced_across(r, node, given) if found is None else found


def _reduced_across(r: Raiser, node: fx.Node, given: Mapping[str, Any]) -> Value | None:
    """A reduction of other axes than the last: of few parts at once, or one axis after the other where PyTorch takes
    many times as long for all, as for squares of a grid. 16-bit numbers would be rounded in between."""
    result, source, dims = traced(node), traced(node.args[0]), given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    x = r.view(node.args[0])
    # No axes stand for all of them, and some for none where there are none.
    if not isinstance(dims, (list, tuple)) or not dims or not source.ndim:
        return None
    if result.dtype != source.dtype or r.is_constant(x):
        return None
    dims = sorted(d % source.ndim for d in dims)
    found = _few_combined(r, node.name, node.target, x, dims)
    if found is None and x.strides() is None:
        # PyTorch would be given such rows, too.
        x = View.of(*named(r, r.realize(x)))
        found = _few_combined(r, node.name, node.target, x, dims)
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
        count = next((n for n in range(FEW, 1, -1) if size % n == 0), None)
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
    if r.dtype(x) not in r.floating or not 2 <= math.prod(counts) <= FEW or 0 in x.shape:
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
    # Heads beside each other are one row.
    shape, wide = with_wide_rows(rows[0].shape, rows)
    # Kernels read rows that are evenly spaced in evenly spaced groups.
    if len(collapsed([f for factors in wide[0].dims[:-1] for f in factors])) > 2:
        return None
    inputs = [r.realize(part) for part in wide]
    made = r.emit(kinds.Pointwise(b.build(y)), name, inputs, TensorSpec.contiguous(shape, r.dtype(x)))
    found = made.reshape(rows[0].shape)
    return found and found.permute([order.index(d) for d in range(len(order))])


@handles(aten.logsumexp.default)
def _log_sum_exp(r: Raiser, node: fx.Node) -> Value | None:
    return _reductions(r, node, given_by(node, "dim", "keepdim"), ex.log_sum_exp())


@handles(aten.linalg_vector_norm.default, aten.linalg_norm.default, aten.norm.ScalarOpt_dim)
def _vector_norm(r: Raiser, node: fx.Node) -> Value | None:
    given = given_by(node, "order", "dim", "keepdim")
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


@handles(*_DEVIATIONS, *_WITH_MEAN, *_UNBIASED, aten.var.correction)
def _variance(r: Raiser, node: fx.Node) -> Value | None:
    given = given_by(node, *(("dim", "unbiased", "keepdim") if node.target in _UNBIASED else ("dim",)))
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
