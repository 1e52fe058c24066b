"""Attention, however it was written, as ``qk``, ``scale``, masks, ``softmax`` and ``pv``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fuser.frontend.attention_masks import Distances, combined, four_dims
from fuser.frontend.attention_patterns import MaskUse
from fuser.frontend.disentangled import Positions
from fuser.frontend.disentangled import apart as positions_apart
from fuser.frontend.raising import Raiser
from fuser.frontend.views import View, collapsed
from fuser.ir import operators as kinds
from fuser.ir.errors import CaptureError, MaskError
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import OperatorGraph, TensorSpec, is_kind
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default})
# What has scores that are never seen.
_WHOLE = frozenset(
    {aten.scaled_dot_product_attention.default, aten._native_multi_head_attention.default}
    | {aten._transformer_encoder_layer_fwd.default, torch.ops.fuser.sparse_attention.default}
)


def check_restricted(graph: OperatorGraph) -> None:
    """Raise MaskError unless a mask that was given for self-attention reached something, and missed nothing: no product
    that takes a square of each sequence, as weights of tokens for tokens, is left to PyTorch."""
    scores = [graph.values[op.outputs[0]].shape for op in graph.operators if is_kind(op, kinds.QK)]
    predicted = [op for op in graph.operators if is_kind(op, kinds.PredictedAttention)]
    lengths = [tuple(graph.values[name].shape[2] for name in op.inputs[:2]) for op in predicted]
    if not any(shape[-2] == shape[-1] for shape in (*scores, *lengths)):
        some = "only attention over other numbers of keys than queries"
        found = some if scores or predicted else "no attention"
        raise MaskError(f"attention= restricts attention of a sequence to itself, and fuser found {found}")
    for op in graph.operators:
        if not is_kind(op, kinds.Extern):
            continue
        shapes = [graph.values[name].shape for name in op.inputs if name not in graph.constants]
        square = any(len(shape) > 2 and shape[-2] == shape[-1] for shape in shapes)
        if op.semantics.call.target in _WHOLE or (op.semantics.call.target in _PRODUCTS and len(shapes) > 1 and square):
            raise MaskError(
                f"attention= restricts all attention of a sequence to itself, and {op.name} ({op.semantics}) may be "
                "attention in a form that fuser does not know; write it as scaled_dot_product_attention"
            )


def multiplied(r: Raiser, node: fx.Node, q: View, factors: View) -> View:
    """Queries (…, Sq, D) of ``node``, in the order in which they lie in memory, times numbers (…, 1, 1) that broadcast
    to them."""
    b = Builder()
    product = kinds.Pointwise(b.build(b.apply(Op.MUL, b.input(0), b.input(1))))
    order = q.memory_order()
    rows = q.permute(order)
    factors = factors.expand((1,) * (len(order) - len(factors.dims)) + factors.shape).permute(order)
    spec = TensorSpec.contiguous(rows.shape, r.dtype(q))
    scaled = r.emit(product, f"{node.name}_scaled", (r.realize(rows), r.realize(factors)), spec)
    return scaled.permute([order.index(d) for d in range(len(order))])


def _with_rows(r: Raiser, operand: View) -> View:
    """An operand of attention whose rows are contiguous, a copy if need be: before the scores, since behind them it
    would part the operators of attention."""
    strides = operand.strides()
    if strides is None:
        r.realize(operand)
    if strides is None or strides[-1] == 1 or operand.shape[-1] == 1 or r.is_constant(operand):
        return operand
    copy = kinds.Extern(operand.copied(), "rows of attention's operands are copied to lie side by side")
    return r.emit(copy, f"{operand.base}_rows", (operand.base,), TensorSpec.contiguous(operand.shape, r.dtype(operand)))


@dataclass(frozen=True)
class _Operands:
    """Queries, keys and values (B, H, S, D) whose rows are contiguous, and the masks of their scores."""

    q: View
    k: View
    v: View
    pattern: Mask | None
    mask: str | None
    distances: Distances | None
    positions: Positions | None

    @property
    def scores(self) -> tuple[int, ...]:
        """The shape of their scores."""
        return (*self.q.shape[:3], self.k.shape[2])


def _operands(
    r: Raiser,
    q: View,
    k: View,
    v: View,
    masks: Sequence[MaskUse],
    pattern: Mask | None,
    causal: bool,
    *,
    whole: bool = False,
) -> _Operands:
    rank = len(q.dims)
    if (parts := _samples_and_heads(q, k, v)) is not None:
        merged = (*q.shape[:-1], k.shape[-2])
        masks = [use if use.shape else replace(use, shape=merged) for use in masks]
        rank, (q, k, v) = 4, parts
    q, k, v = (four_dims(t) for t in (q, k, v))
    # Heads that are repeated for groups of queries, as they must be where a product has no groups.
    group = math.gcd(k.repeats(1), v.repeats(1))
    if group > 1:
        k, v = (t.without_repeats(1, group) for t in (k, v))
    q, k, v = (_with_rows(r, t) for t in (q, k, v))
    batch, heads, q_len, _ = q.shape
    shape = (batch, heads, q_len, k.shape[2])
    given = None if r.attention is None else r.attention.mask
    if given is not None and not isinstance(given, Dense) and shape[2] == shape[3]:
        pattern = given if pattern is None else pattern & given
    positions = None
    if not whole:
        masks, positions = positions_apart(r, masks, shape)
    pattern, attn_mask, distances = combined(r, masks, shape, rank, pattern, causal, r.dtype(q), whole=whole)
    # What PyTorch makes of masks would part the operators of attention as well.
    return _Operands(q, k, v, pattern, None if attn_mask is None else r.realize(attn_mask), distances, positions)


def _samples_and_heads(q: View, k: View, v: View) -> tuple[View, View, View] | None:
    """Operands (B·H, S, D) as (B, H, S, D) where one of them lies in memory so that no stride leads from every head to
    the next: a copy of it would be needed, and one of the result."""
    if len(q.dims) != 3:
        return None
    for outer in (collapsed(t.dims[0]) for t in (q, k, v)):
        if len(outer) == 2:
            sizes = (outer[0][0], outer[1][0])
            q4, k4, v4 = (t.reshape((*sizes, *t.shape[1:])) for t in (q, k, v))
            return None if q4 is None or k4 is None or v4 is None else (q4, k4, v4)
    return None


@dataclass(frozen=True)
class Scores:
    """Scores of attention as operators: value and ``spec``, operands, and the ``shape`` of what the call makes."""

    value: str
    spec: TensorSpec
    q: View
    v: View
    shape: tuple[int, ...]


def scores_from(
    r: Raiser,
    node: fx.Node,
    q: View,
    k: View,
    v: View,
    scale: float,
    masks: Sequence[MaskUse],
    *,
    pattern: Mask | None = None,
    causal: bool = False,
    rule: ScoreRule | None = None,
    distances: Distances | None = None,
    added: str | None = None,
) -> Scores:
    """Emit qk, scale, score rule and mask for q (…, Sq, D), k (…, Sk, D) and v (…, Sk, Dv);
    ``distances`` are a bias by distance, ``added`` is a value of the scores' shape that is added beside masks."""
    shape = (*q.shape[:-1], v.shape[-1])
    given = _operands(r, q, k, v, masks, pattern, causal, whole=distances is not None)
    q, k, v, pattern = given.q, given.k, given.v, given.pattern
    added = added if given.mask is None else given.mask
    distances = distances or given.distances
    scores = TensorSpec.contiguous(given.scores, r.dtype(q))
    name = node.name
    s = r.emit(kinds.QK(), f"{name}_qk", (r.realize(q), r.realize(k)), scores).base
    if scale != 1.0:
        s = r.emit(kinds.Scale(scale), f"{name}_scale", (s,), scores).base
    if rule is not None:
        s = r.emit(kinds.ChangeScores(rule), f"{name}_rule", (s,), scores).base
    if causal or pattern is not None:
        s = r.emit(kinds.PatternMask(causal, pattern), f"{name}_mask", (s,), scores).base
    if distances is not None:
        bias = kinds.BiasByDistance(distances.first, distances.reversed)
        s = r.emit(bias, f"{name}_bias", (s, distances.value), scores).base
    if given.positions is not None:
        inputs = (*given.positions.inputs, *([] if added is None else [added]))
        added = r.emit(given.positions.semantics, f"{name}_positions", inputs, scores).base
    if added is not None:
        mask = kinds.AdditiveMask() if r.values[added].dtype.is_floating_point else kinds.BooleanMask()
        s = r.emit(mask, f"{name}_mask", (s, added), scores).base
    return Scores(s, scores, q, v, shape)


def sums_from(r: Raiser, node: fx.Node, scores: Scores) -> View:
    """Emit the log-sum-exp of scores, (…, Sq), in the order in which queries lie in memory."""
    order = scores.q.memory_order()[:3]
    dense = TensorSpec.contiguous([scores.spec.shape[d] for d in order], torch.float32).strides
    spec = TensorSpec(scores.spec.shape[:3], torch.float32, tuple(dense[order.index(d)] for d in range(3)))
    made = r.emit(kinds.LogSumExp(), f"{node.name}_sums", (scores.value,), spec)
    return r.reshaped(made, scores.shape[:-1])


def average_from(r: Raiser, node: fx.Node, scores: Scores) -> View:
    """Emit softmax and pv of scores, (…, Sq, Dv)."""
    q, v, name = scores.q, scores.v, node.name
    batch, heads, q_len, _ = scores.spec.shape
    p = r.emit(kinds.Softmax(masked=True), f"{name}_softmax", (scores.value,), scores.spec).base
    # Heads lie inside a token and tokens as they do in q, so that merging heads afterwards moves nothing.
    width = v.shape[3]
    token = heads * width
    q_strides = q.strides()
    time_first = q_strides is not None and batch > 1 and q_len > 1 and q_strides[2] > q_strides[0] > 0
    batch_stride, row_stride = (token, batch * token) if time_first else (q_len * token, token)
    spec = TensorSpec((batch, heads, q_len, width), scores.spec.dtype, (batch_stride, width, row_stride, 1))
    out = r.emit(kinds.PV(), name, (p, r.realize(v)), spec)
    merged = out.reshape(scores.shape)
    if merged is None:
        raise CaptureError(f"{node} has the shape {scores.shape}, which its operands do not give")
    return merged


def attention_from(
    r: Raiser,
    node: fx.Node,
    q: View,
    k: View,
    v: View,
    scale: float,
    masks: Sequence[MaskUse],
    *,
    quantize: ScoreQuantization | None = None,
    **more: Any,
) -> View:
    """Emit all of attention; other arguments are those of :func:`scores_from`."""
    if quantize is None and r.attention is not None:
        quantize = r.attention.quantize
    if quantize is not None and not more.keys() & {"distances", "added"}:
        return _predicted(r, node, q, k, v, scale, masks, quantize, **more)
    return average_from(r, node, scores_from(r, node, q, k, v, scale, masks, **more))


def _predicted(
    r: Raiser,
    node: fx.Node,
    q: View,
    k: View,
    v: View,
    scale: float,
    masks: Sequence[MaskUse],
    quantize: ScoreQuantization,
    pattern: Mask | None = None,
    causal: bool = False,
    rule: ScoreRule | None = None,
) -> View:
    """Emit attention whose scores have a width each."""
    shape = (*q.shape[:-1], v.shape[-1])
    given = _operands(r, q, k, v, masks, pattern, causal, whole=True)
    _, heads, q_len, _ = given.scores
    seen = Dense() if given.pattern is None else given.pattern
    inputs = [r.realize(t) for t in (given.q, given.k, given.v)] + ([] if given.mask is None else [given.mask])
    width, strides = shape[-1], r.values[inputs[0]].strides
    out = TensorSpec.contiguous((*given.scores[:3], width), r.dtype(given.q))
    if strides[1] < strides[2]:
        out = TensorSpec(out.shape, out.dtype, (q_len * heads * width, width, heads * width, 1))
    semantics = kinds.PredictedAttention(quantize, scale, seen & Causal() if causal else seen, rule)
    return r.reshaped(r.emit(semantics, node.name, tuple(inputs), out), shape)
