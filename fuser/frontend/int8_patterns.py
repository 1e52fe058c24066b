"""Products of rows that are rounded to int8 at run time, and int8 weights, as torchao writes them.

What ``Int8DynamicActivationInt8WeightConfig`` makes of a linear layer is a dozen operators: the range of each row, its
integers, their product, with 128 added where the CPU multiplies unsigned numbers by signed ones, and two scales.
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
from fuser.ir.quantization import MAX_TERMS, largest_rounding

aten = torch.ops.aten
_RANGE, _ROUND = "torchao.choose_qparams_affine.default", "torchao.quantize_affine.default"
_RANGES = ((-128, 127), (-64, 63))
"""What rows are rounded to, the latter with ``reduce_range``: around zero, so that the zero point is zero."""
_OFFSET = 128
"""What is added to signed numbers to make them unsigned."""
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Int8Product:
    """x · W in int8: W (K, N) of int8, and ``scales`` (N,) of its columns, or (1,) of all. Rows of x have scales of
    ``least`` or more, each its own, or all one if it is rounded as a ``whole``."""

    x: fx.Node
    weight: fx.Node
    scales: fx.Node
    low: int
    high: int
    least: float
    whole: bool


def find(graph: fx.Graph) -> Mapping[fx.Node, Int8Product]:
    """By the last of its nodes, every product whose integers are used for nothing else.

    Only symmetric ranges of single rows, or of a whole tensor, count. What rounds in another way is left as it is.
    """
    found = (_product(node) for node in graph.nodes if node.target is aten._int_mm.default and _is_on_cpu(node))
    return dict(filter(None, found))


def product_from(r: Raiser, node: fx.Node, p: Int8Product) -> View | None:
    """The product as one operator; None where the integers or scales of W are not constant."""
    x, weight, scales = r.view(p.x), r.view(p.weight).permute((1, 0)), r.view(p.scales)
    if not (r.is_constant(weight) and r.is_constant(scales)) or r.is_constant(x) or 0 in (*x.shape, *weight.shape):
        return None
    if weight.shape[1] >= MAX_TERMS or r.dtype(x) not in r.floating:
        return None

    columns = scales if scales.shape == weight.shape[:1] else scales.expand(weight.shape[:1])
    given: tuple[str, ...] = ()
    if p.whole:
        if weight.shape[1] > MAX_TERMS // 2:
            return None
        call = TorchCall(largest_rounding, (Ref(0), p.low, p.high, p.least))
        spec, found = TensorSpec.contiguous((3,), torch.float32), Extern(call, "a scale that is found at run time")
        given = (r.emit(found, f"{node.name}_rounding", (r.realize(x),), spec).base,)

    def product(rows: View) -> View:
        spec = TensorSpec.contiguous((*rows.shape[:-1], weight.shape[0]), torch.float32)
        inputs = r.realize(rows), r.realize(weight), r.realize(columns), *given
        return r.emit(Int8Gemm(True, p.low, p.high, None if given else p.least), node.name, inputs, spec)

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
    rounded = _rounding(_reshaped(rows if signed is None else signed))
    wide = _reader(sums, aten._to_copy.default)
    by_row = _reader(wide, aten.mul.Tensor)
    # In bf16, torchao rounds between the two scales; results are no worse without.
    narrow = _reader(by_row, aten._to_copy.default) or by_row
    last = _reader(narrow, aten.mul.Tensor)
    if rounded is None or wide is None or by_row is None or last is None:
        return None
    x, chosen, whole, low, high, least = rounded
    own, scales = _other(by_row, wide), _other(last, narrow)
    m, n = traced(node).shape
    if not isinstance(scales, fx.Node) or _reshaped(own) is not chosen:
        return None
    # By their shapes, every row and every column has a scale of its own, or all have one.
    if traced(own).shape != (1 if whole else m, 1) or traced(scales).shape not in ((n,), (1,)):
        return None
    if {traced(part).dtype for part in (wide, own, scales, last)} != {torch.float32}:
        return None
    if traced(x).dtype not in (torch.float32, torch.bfloat16) or traced(narrow).dtype != traced(x).dtype:
        return None
    return last, Int8Product(x, weight, scales, low, high, least, whole)


def _rounding(codes: Any) -> tuple[fx.Node, fx.Node, bool, int, int, float] | None:
    """What rounds rows by their own largest magnitudes, or all of them by one: the rows, their scales, whether these
    are one, the range and the least scale."""
    if str(codes.target) != _ROUND:
        return None
    rounded = _arguments(codes)
    scale, point = rounded["scale"], rounded["zero_point"]
    ranged = _source(scale, operator.getitem, 0)
    if ranged is None or str(ranged.target) != _RANGE or _source(point, operator.getitem, 1) is not ranged:
        return None
    chosen = _arguments(ranged)
    same = ("input", "block_size", "quant_min", "quant_max")
    if any(chosen[name] != rounded[name] for name in same) or rounded["output_dtype"] != torch.int8:
        return None
    x, low, high, least = chosen["input"], chosen["quant_min"], chosen["quant_max"], chosen["eps"]
    shape = traced(x).shape
    block, row = tuple(chosen["block_size"]), (*(1 for _ in shape[:-1]), shape[-1])
    if block != row and block != tuple(shape):
        return None
    if chosen["mapping_type"] != "SYMMETRIC" or (low, high) not in _RANGES or not least:
        return None
    return x, scale, block != row, low, high, least


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
