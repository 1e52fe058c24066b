"""Attention of PyTorch and of our own operators, and the parts that efficient attention is made of."""

from __future__ import annotations

import math

import torch
from torch import fx

from fuser.attention.registry import spec_of
from fuser.frontend.aten.handlers import aten, handles, named
from fuser.frontend.attention_masks import Distances
from fuser.frontend.attention_operators import attention_from, average_from, scores_from, sums_from
from fuser.frontend.attention_patterns import MaskUse
from fuser.frontend.raising import Raiser
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import Value, View
from fuser.ir import operators as kinds
from fuser.ir.graph import TensorSpec
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.masks import Dense
from fuser.ir.operators import Ref, TorchCall
from fuser.ir.size import Size
from fuser.ir.windows import Windowed


@handles(aten.scaled_dot_product_attention.default)
def _sdpa(r: Raiser, node: fx.Node) -> Value | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = (r.view(given[n]) for n in names[:3])
    mask = given.get("attn_mask")
    if given.get("dropout_p", 0.0) or r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if len(q.dims) > 4 and mask is None:
        return _of_many_dimensions(r, node, q, k, v, scale, bool(given.get("is_causal", False)))
    if not 2 <= len(q.dims) <= 4:
        return None
    if not len(q.dims) == len(k.dims) == len(v.dims) or (mask is not None and traced(mask).ndim > len(q.dims)):
        return None
    if len(q.dims) > 2 and not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:-2] == v.shape[1:-2]):
        return None
    grouped = len(q.dims) == 4 and q.shape[1] != k.shape[1]
    # One head of keys broadcasts to all.
    if grouped and k.shape[1] != 1 and not (given.get("enable_gqa") and q.shape[1] % k.shape[1] == 0):
        return None
    masks = [] if mask is None else [MaskUse(mask, inverted=False)]
    return attention_from(r, node, q, k, v, scale, masks, causal=bool(given.get("is_causal", False)))


def _of_many_dimensions(r: Raiser, node: fx.Node, q: View, k: View, v: View, scale: float, causal: bool) -> View | None:
    """Attention of windows, say: the dimension whose elements lie closest counts heads, those before it samples."""
    lead = q.shape[:-2]
    if not (lead == k.shape[:-2] == v.shape[:-2]):
        return None
    order = [d for d in q.memory_order() if d < len(lead)]
    samples, heads = math.prod(lead[d] for d in order[:-1]), lead[order[-1]]

    def four(t: View) -> View:
        return r.reshaped(t.permute((*order, len(lead), len(lead) + 1)), (samples, heads, *t.shape[-2:]))

    out = attention_from(r, node, four(q), four(k), four(v), scale, [], causal=causal)
    apart = r.reshaped(out, (*(lead[d] for d in order), *out.shape[-2:]))
    return apart.permute((*(order.index(d) for d in range(len(lead))), len(lead), len(lead) + 1))


@handles(torch.ops.fuser.sparse_attention.default)
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


@handles(torch.ops.fuser.windowed_attention.default)
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


@handles(torch.ops.fuser.averages.default)
def _averages(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v = (r.view(n) for n in node.args[:3])
    _, _, _, bias, scale = node.args
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    masks = [] if bias is None else [MaskUse(bias, inverted=False)]
    scores = scores_from(r, node, q, k, v, scale, masks)
    sums = sums_from(r, node, scores)
    return average_from(r, node, scores), sums


@handles(torch.ops.fuser.log_sums.default)
def _log_sums(r: Raiser, node: fx.Node) -> Value | None:
    q, k = (r.view(n) for n in node.args[:2])
    _, _, bias, scale = node.args
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k)):
        return None
    masks = [] if bias is None else [MaskUse(bias, inverted=False)]
    return sums_from(r, node, scores_from(r, node, q, k, k, scale, masks))


@handles(torch.ops.fuser.importance_attention.default)
def _importance_attention(r: Raiser, node: fx.Node) -> Value | None:
    q, k, v, *parts = (r.view(n) for n in node.args[:7])
    coefficient, scale = node.args[7:]
    if r.dtype(q) not in r.floating or any(0 in t.shape for t in (q, k, v)):
        return None
    spec = TensorSpec.contiguous((*q.shape[:3], k.shape[2]), r.dtype(q))
    inputs = tuple(map(r.realize, (q, *parts)))
    bias = r.emit(kinds.ImportanceBias(coefficient, scale), f"{node.name}_weights", inputs, spec)
    return attention_from(r, node, q, k, v, scale, [], added=bias.base)


@handles(torch.ops.fuser.linear_attention.default)
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
    return named(r, r.derived(f"{node.name}_none", (), call, empty.shape, empty.dtype))


@handles(torch.ops.fuser.features.default)
def _features(r: Raiser, node: fx.Node) -> Value | None:
    x, directions = r.view(node.args[0]), r.view(node.args[1])
    spec = r.spec(node)
    if not {r.dtype(x), r.dtype(directions)} <= r.floating or not r.is_constant(directions) or spec.numel == 0:
        return None
    semantics = kinds.Features(FeatureMap(node.args[2]))
    return r.emit(semantics, node.name, (r.realize(x), r.realize(directions)), spec)
