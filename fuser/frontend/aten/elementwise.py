"""Operators that compute element by element."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx

from fuser.frontend.aten.handlers import aten, handles
from fuser.frontend.raising import Raiser
from fuser.frontend.sizes import traced
from fuser.frontend.views import Conjunction, Value, View
from fuser.ir import expression as ex
from fuser.ir import operators as kinds
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import TensorSpec
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.quantization import found_rounding, packed_rounding, rounding_of


@handles(torch.ops.aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
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


@handles(*_UNARY)
def _unary(r: Raiser, node: fx.Node) -> Value | None:
    op = _UNARY[node.target]
    kind = kinds.Activation if op in _ACTIVATIONS else kinds.Pointwise
    return r.elementwise(node, kind(ex.unary(op)), [r.view(node.args[0])])


@handles(aten.gelu.default)
def _gelu(r: Raiser, node: fx.Node) -> Value | None:
    op = Op.GELU_TANH if node.kwargs.get("approximate", "none") == "tanh" else Op.GELU
    return r.elementwise(node, kinds.Activation(ex.unary(op)), [r.view(node.args[0])])


_DEQUANTIZE, _QUANTIZE = "quantized_decomposed.dequantize_per_tensor.", "quantized_decomposed.quantize_per_tensor."


@handles(f"{_DEQUANTIZE}default", f"{_DEQUANTIZE}tensor")
def _fake_quantize(r: Raiser, node: fx.Node) -> Value | None:
    """What ``quantize_per_tensor`` with the same numbers leaves of a tensor, in fp32."""
    codes, *numbers = node.args
    same = str(node.target).replace(_DEQUANTIZE, _QUANTIZE)
    if not isinstance(codes, fx.Node) or str(codes.target) != same or list(codes.args[1:]) != numbers:
        return None
    x = r.view(codes.args[0])
    scale, zero_point, low, high, _ = numbers
    if node.kwargs or codes.kwargs or r.is_constant(x) or {r.dtype(x), traced(node).dtype} != {torch.float32}:
        return None
    # Unsigned integers, and others that are as many, become signed ones.
    shift = 128 if high > 127 else 0
    low, high = low - shift, high - shift
    if not -128 <= low <= high <= 127 or 0 in x.shape:
        return None
    if isinstance(scale, fx.Node):
        if not isinstance(zero_point, fx.Node) or {math.prod(traced(t).shape) for t in (scale, zero_point)} != {1}:
            return None
        rows = r.realize(x)
        known: tuple[str, ...] = (rows,)
        call = _found_for(codes.args[0], scale, zero_point, low + shift, high + shift, shift)
        if call is None:
            known = r.realize(r.view(scale)), r.realize(r.view(zero_point))
            call = TorchCall(rounding_of, (Ref(0), Ref(1), shift))
        found = kinds.Extern(call, "a scale that is found at run time")
        given = r.emit(found, f"{node.name}_rounding", known, TensorSpec.contiguous((3,), torch.float32))
        spec = TensorSpec.contiguous(x.shape, torch.float32)
        return r.emit(kinds.FakeQuantizeAsFound(low, high), node.name, (rows, given.base), spec)
    if not 0 < scale < math.inf or not low <= zero_point - shift <= high:
        return None
    return r.elementwise(node, kinds.FakeQuantize(scale, zero_point - shift, low, high), [x])


def _found_for(x: fx.Node, scale: fx.Node, zero_point: fx.Node, low: int, high: int, shift: int) -> TorchCall | None:
    """What finds the rounding of x, where these are what ``choose_qparams`` or a packed layer finds for it."""
    chosen = scale.args[0] if scale.target is operator.getitem and scale.args[1] == 0 else None
    if not isinstance(chosen, fx.Node) or zero_point.target is not operator.getitem or zero_point.args != (chosen, 1):
        return None
    if str(chosen.target) == "quantized_decomposed.choose_qparams.tensor":
        source, *ends, least, _ = chosen.args
        return (
            TorchCall(found_rounding, (Ref(0), low, high, least, shift)) if (source, ends) == (x, [low, high]) else None
        )
    if str(chosen.target) == "fuser.packed_range.default":
        return TorchCall(packed_rounding, (Ref(0), high, shift)) if chosen.args == (x, high) and low == 0 else None
    return None


@handles(aten.glu.default)
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


@handles(*_CLAMPS)
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


@handles(*_BINARY)
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


@handles(
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


@handles(aten.pow.Tensor_Scalar, aten.square.default)
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
