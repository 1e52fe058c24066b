"""Products of rows that are rounded to int8 at run time, and int8 weights, as torchao writes them.

What ``Int8DynamicActivationInt8WeightConfig`` makes of a linear layer is a dozen operators or two: the range of each
row, its integers, their product, with 128 added where the CPU multiplies unsigned numbers by signed ones, two scales,
and what zero points add to sums. ``Int8StaticActivationInt8WeightConfig`` knows the ranges before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuser.frontend.linear import by_rows
from fuser.frontend.raising import Raiser
from fuser.frontend.sizes import traced
from fuser.frontend.views import View
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Extern, Int8Gemm, Ref, TorchCall
from fuser.ir.quantization import rounding_as_row, rounding_of

aten = torch.ops.aten
_RANGE, _ROUND = "torchao.choose_qparams_affine.default", "torchao.quantize_affine.default"
_RANGES = ((-128, 127), (-64, 63))
"""What rows are rounded to, the latter with ``reduce_range``: around zero, so that symmetric ones have zero points of
zero."""
_OFFSET = 128
"""What is added to signed numbers to make them unsigned."""
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Int8Rounding:
    """How ``x`` (…, K) becomes integers from ``low`` to ``high``: by ``scale`` and zero ``point``, which are constant,
    or, with the least scale ``least``, found for each row, or for all of x as a ``whole``."""

    x: fx.Node
    scale: fx.Node
    point: fx.Node
    low: int
    high: int
    least: float | None = None
    whole: bool = True
    symmetric: bool = False


@dataclass(frozen=True)
class Int8Product:
    """x · W in int8: W (K, N) of int8, and ``scales`` (N,) of its columns, or (1,) of all."""

    rounding: Int8Rounding
    weight: fx.Node
    scales: fx.Node


def find(graph: fx.Graph) -> Mapping[fx.Node, Int8Product]:
    """By the last of its nodes, every product whose integers are used for nothing else.

    Only ranges of single rows, or of a whole tensor, count. What rounds in another way is left as it is.
    """
    found = (_product(node) for node in graph.nodes if node.target is aten._int_mm.default and _is_on_cpu(node))
    return dict(filter(None, found))


def product_from(r: Raiser, node: fx.Node, p: Int8Product) -> View | None:
    """The product as one operator; None where the integers or scales of W are not constant."""
    how = p.rounding
    x, weight, scales = r.view(how.x), r.view(p.weight).permute((1, 0)), r.view(p.scales)
    if not (r.is_constant(weight) and r.is_constant(scales)) or r.is_constant(x) or 0 in (*x.shape, *weight.shape):
        return None
    kind = Int8Gemm(True, how.low, how.high, None if how.whole else how.least, how.whole or how.symmetric)
    if weight.shape[1] > kind.max_terms or r.dtype(x) not in r.floating:
        return None

    columns = scales if scales.shape == weight.shape[:1] else scales.expand(weight.shape[:1])
    given: tuple[str, ...] = ()
    name, shape, dtype = f"{node.name}_rounding", (3,), torch.float32
    if how.least is None:
        known = [r.view(part) for part in (how.scale, how.point)]
        if not all(r.is_constant(part) for part in known):
            return None
        sources = tuple(r.realize(part) for part in known)
        given = (r.derived(name, sources, TorchCall(rounding_of, (Ref(0), Ref(1))), shape, dtype),)
    elif how.whole:
        call = TorchCall(rounding_as_row, (Ref(0), how.low, how.high, how.least, how.symmetric))
        found = Extern(call, "a scale that is found at run time")
        given = (r.emit(found, name, (r.realize(x),), TensorSpec.contiguous(shape, dtype)).base,)

    def product(rows: View) -> View:
        spec = TensorSpec.contiguous((*rows.shape[:-1], weight.shape[0]), torch.float32)
        return r.emit(kind, node.name, (r.realize(rows), r.realize(weight), r.realize(columns), *given), spec)

    return r.reshaped(by_rows(r, x, product), traced(node).shape)


def _is_on_cpu(node: fx.Node) -> bool:
    """Elsewhere PyTorch's own product is faster than what we would put in its place."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _product(node: fx.Node) -> tuple[fx.Node, Int8Product] | None:
    """What ``_int_mm`` is a part of."""
    rows, weight = node.args
    unsigned = _source(rows, aten._to_copy.default, dtype=torch.uint8)
    signed = _source(_source(unsigned, aten.add.Tensor, _OFFSET), aten._to_copy.default, dtype=torch.int32)
    sums: fx.Node | None = node
    if signed is not None:
        sums = _reader(node, aten.sub.Tensor)
        offset = sums.args[1] if sums is not None and sums.args[0] is node and not sums.kwargs else None
        total = _source(offset, aten.mul.Tensor, _OFFSET)
        if _source(total, aten.sum.dim_IntList, [0], True, dtype=torch.int32) is not weight:
            return None
    how = _rounding(_reshaped(rows if signed is None else signed))
    wide = _reader(sums, aten._to_copy.default)
    by_row = _reader(wide, aten.mul.Tensor)
    # In bf16, torchao rounds between the two scales; results are no worse without.
    narrow = _reader(by_row, aten._to_copy.default) or by_row
    if how is None or wide is None or by_row is None or narrow is None:
        return None
    own, less = _other(by_row, wide), _reader(narrow, aten.sub.Tensor)
    if less is None and not how.symmetric:
        return None
    if less is not None and _reshaped(_point_taken_off(less, narrow, own, weight)) is not how.point:
        return None
    total = less or narrow
    last = _reader(total, aten.mul.Tensor)
    if last is None:
        return None
    scales = _other(last, total)
    m, n = traced(node).shape
    if not isinstance(scales, fx.Node) or _reshaped(own) is not how.scale:
        return None
    # By their shapes, every row and every column has a scale of its own, or all have one.
    if traced(own).shape != (1 if how.whole else m, 1) or traced(scales).shape not in ((n,), (1,)):
        return None
    if {traced(part).dtype for part in (wide, own, scales, last)} != {torch.float32}:
        return None
    dtype = traced(how.x).dtype
    if dtype not in (torch.float32, torch.bfloat16) or {traced(narrow).dtype, traced(total).dtype} != {dtype}:
        return None
    return last, Int8Product(how, weight, scales)


def _point_taken_off(less: fx.Node, sums: fx.Node, scale: fx.Node, weight: fx.Node) -> Any:
    """The zero points that are multiplied with scales and the sums of W's columns and subtracted from ``sums``."""
    if less.args[0] is not sums or less.kwargs:
        return None
    columns, product = _source(weight, aten.t.default), less.args[1]
    if isinstance(product, fx.Node) and product.target is aten._to_copy.default:
        product = product.args[0]
    by_scale, totals = _factors(product)
    summed = _source(_source(totals, aten._to_copy.default, dtype=torch.float32), aten.sum.dim_IntList, [-1])
    if columns is None or summed is not columns:
        return None
    wide, own = _factors(by_scale)
    same = isinstance(own, fx.Node) and traced(own).shape == traced(scale).shape and _reshaped(own) is _reshaped(scale)
    point = _source(wide, aten._to_copy.default, dtype=torch.float32)
    return point if same and point is not None and traced(point).shape == traced(scale).shape else None


def _rounding(codes: Any) -> Int8Rounding | None:
    """What ``codes`` are made by."""
    if str(codes.target) != _ROUND:
        return None
    rounded = _arguments(codes)
    x, scale, point = rounded["input"], rounded["scale"], rounded["zero_point"]
    low, high = rounded["quant_min"], rounded["quant_max"]
    if rounded["output_dtype"] != torch.int8 or (low, high) not in _RANGES or not isinstance(point, fx.Node):
        return None
    shape = traced(x).shape
    block, row = tuple(rounded["block_size"]), (*(1 for _ in shape[:-1]), shape[-1])
    if block != row and block != tuple(shape):
        return None
    ranged = _source(scale, operator.getitem, 0)
    if ranged is None:
        # One element each, and fp32, so that any tensor of x is rounded as a whole.
        if {tuple(set(traced(part).shape)) for part in (scale, point)} != {(1,)} or block != tuple(shape):
            return None
        if traced(scale).dtype != torch.float32:
            return None
        return Int8Rounding(x, _reshaped(scale), _reshaped(point), low, high, symmetric=_is_zero(point))
    if str(ranged.target) != _RANGE or _source(point, operator.getitem, 1) is not ranged:
        return None
    chosen = _arguments(ranged)
    if any(chosen[name] != rounded[name] for name in ("input", "block_size", "quant_min", "quant_max")):
        return None
    least, kind = chosen["eps"], chosen["mapping_type"]
    if kind not in ("SYMMETRIC", "ASYMMETRIC") or not least:
        return None
    return Int8Rounding(x, scale, point, low, high, least, block != row, kind == "SYMMETRIC")


def _is_zero(node: fx.Node) -> bool:
    """Whether all elements are zero, so that no zero points have to be taken off sums."""
    return node.target is aten.zeros_like.default or (node.target is aten.full_like.default and node.args[1] == 0)


def _factors(product: Any) -> tuple[Any, Any]:
    """The two factors of a product; None twice for what is none."""
    is_one = isinstance(product, fx.Node) and product.target is aten.mul.Tensor
    return tuple(product.args) if is_one else (None, None)


def _source(node: Any, target: Any, *others: Any, dtype: torch.dtype | None = None) -> Any:
    """The first argument of ``node``, if it is ``target`` of that and these others."""
    if not isinstance(node, fx.Node) or node.target is not target or node.args[1:] != others:
        return None
    return node.args[0] if node.kwargs == ({} if dtype is None else {"dtype": dtype}) else None


def _reader(node: fx.Node | None, target: Any) -> fx.Node | None:
    """The operator that alone reads ``node``, if it is this one."""
    readers = [] if node is None else [u for u in node.users if u.target is not aten._assert_tensor_metadata.default]
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def _other(product: fx.Node, factor: fx.Node) -> Any:
    return product.args[1] if product.args[0] is factor else product.args[0]


def _reshaped(node: Any) -> Any:
    """What ``node`` shows in another shape."""
    while isinstance(node, fx.Node) and node.target in _RESHAPES:
        node = node.args[0]
    return node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, which torchao has added to."""
    schema = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
