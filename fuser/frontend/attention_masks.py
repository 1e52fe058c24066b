"""The masks of one attention: what constants forbid, as a pattern, and what is known at run time, as one tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fuser.frontend.attention_patterns import FLOOR, MaskUse
from fuser.frontend.building import Evaluation
from fuser.frontend.raising import Raiser
from fuser.frontend.sizes import broadcast, traced
from fuser.frontend.views import Conjunction, View
from fuser.ir.errors import CaptureError, MaskError
from fuser.ir.graph import TensorSpec
from fuser.ir.masks import Causal, Dense, Mask, from_dense
from fuser.ir.masks.late import LateMask
from fuser.ir.operators import Embedding, Extern, Ref, TorchCall
from fuser.ir.size import Size, UndecidedSizeError

aten = torch.ops.aten


@dataclass(frozen=True)
class Distances:
    """A bias by distance, as :class:`~fuser.ir.operators.BiasByDistance` has it: ``value`` (1 or H, distances)."""

    value: str
    first: int
    reversed: bool = False


def combined(
    r: Raiser,
    uses: Sequence[MaskUse],
    shape: tuple[int, int, int, int],
    rank: int,
    pattern: Mask | None,
    causal: bool,
    dtype: torch.dtype,
    *,
    whole: bool = False,
) -> tuple[Mask | None, View | None, Distances | None]:
    """All masks of one attention over scores of ``rank`` dimensions: a constant pattern of what is forbidden, one
    run-time tensor, expanded to ``shape``, and, unless what is added is to be ``whole``, a bias by distance.

    Only -inf forbids. A finite minimum that a mask adds, or fills in, gives exactly zero in every row that allows
    something, as a pattern does, and a uniform average in a row that does not: that needs the numbers.
    """
    full = {4: shape, 3: (shape[0], *shape[2:]), 2: shape[2:]}[rank]
    lowered: list[tuple[MaskUse, Mask | None]] = []
    attn_masks: list[View] = []
    distances = None
    if not whole:
        uses, distances = _apart(r, uses, shape, full)
    for use in uses:
        constant, finite = _constant_mask(r, use, full)
        if finite:
            lowered.append((use, constant))
            continue
        value, rest = r.env[use.node], None
        if isinstance(value, Conjunction) and not use.inverted and use.fill == -math.inf and use.shape is None:
            constant, _ = _constant_mask(r, use, full, value.constant)
            rest = value.attn_mask if constant is not None else None
        if constant is not None:
            pattern = _conjunction(pattern, constant)
        if constant is None or rest is not None:
            attn_masks.append(_attn_mask(r, use, rest or at_scores(r, use, r.view(use.node), full), dtype))
    for use, constant in lowered:
        known = _conjunction(_conjunction(pattern, Causal() if causal else None), constant)
        if attn_masks or (known is not None and not r.assumed(_rows_allow, known, *shape[2:])):
            attn_masks.append(_attn_mask(r, use, at_scores(r, use, r.view(use.node), full), dtype))
        else:
            pattern = _conjunction(pattern, constant)
    if isinstance(pattern, Dense):
        pattern = None
    if pattern is not None:
        pattern = _hashable(pattern, *shape[2:])
    if not attn_masks:
        return pattern, None, distances
    # Constants meet before a call.
    attn_masks.sort(key=lambda view: not r.is_constant(view))
    total, *more = attn_masks if len(attn_masks) == 1 else [_additive(r, v, -math.inf, dtype) for v in attn_masks]
    for view in more:
        total = _torch_mask(r, "sum", torch.add, (total, view), (), dtype)
    return pattern, four_dims(total.expand(full)), distances


def _apart(
    r: Raiser, uses: Sequence[MaskUse], shape: tuple[int, int, int, int], full: Sequence[int]
) -> tuple[list[MaskUse], Distances | None]:
    """Masks without one that follows from distances alone, perhaps within a sum, and that one."""
    rest: list[MaskUse] = []
    waiting, found = list(uses), None
    while waiting:
        use = waiting.pop(0)
        if found is None and not use.inverted:
            found = _by_distance(r, use, shape, full)
            if found is not None:
                continue
            parts = _summands(use)
            if any(_by_distance(r, part, shape, full) for part in parts if traced(part.node).dtype != torch.bool):
                waiting[:0] = parts
                continue
        rest.append(use)
    return rest, found


def _summands(use: MaskUse) -> list[MaskUse]:
    """What a mask is the sum of; nothing where it is none."""
    node = use.node
    while node.target is aten.clone.default:
        node = node.args[0]
    args = node.args
    if node.target is aten.add.Tensor and not node.kwargs and all(isinstance(n, fx.Node) for n in args):
        parts = [replace(use, node=n) for n in args]
        return parts if all(traced(part.node).dtype.is_floating_point for part in parts) else []
    if node.target is aten.where.ScalarOther and args[2] <= FLOOR:
        # What is as low as that is the same with any number added.
        return [replace(use, node=args[1]), replace(use, node=args[0], fill=args[2])]
    if node.target is aten.masked_fill.Scalar and args[2] <= FLOOR:
        return [replace(use, node=args[0]), replace(use, node=args[1], fill=args[2], inverted=True)]
    return []


def _by_distance(r: Raiser, use: MaskUse, shape: tuple[int, int, int, int], full: Sequence[int]) -> Distances | None:
    """A bias whose rows are looked up by indices that are the same for all pairs of a distance, as in T5."""
    value = r.env[use.node]
    if not isinstance(value, View) or r.dtype(value) not in r.floating:
        return None
    op = r.producer(value.base)
    if op is None or not isinstance(op.semantics, Embedding) or not all(name in r.constants for name in op.inputs):
        return None
    table, indices = (r.values[name] for name in op.inputs)
    view = four_dims(at_scores(r, use, value, full).expand(full))
    _, heads, q_len, kv_len = shape
    strides, width = view.strides(), table.shape[1]
    if strides is None or view.offset != 0:
        return None
    if not TensorSpec(view.shape, table.dtype, strides).has_strides((0, int(width > 1), kv_len * width, width)):
        return None
    places = View.of(op.inputs[1], indices).reshape((q_len, kv_len))
    if width not in (1, heads) or places is None or not r.decided(_is_of_distances, places):
        return None
    key = (_distances_of, *op.inputs)
    if key not in r.masks:
        call = TorchCall(_distances_of, (Ref(0), Ref(1), q_len, kv_len))
        name = r.derived(f"{value.base}_distances", op.inputs, call, (width, q_len + kv_len - 1), table.dtype)
        r.masks[key] = View.of(name, r.values[name])
    return Distances(r.masks[key].base, kv_len - 1)


def _is_of_distances(indices: Tensor) -> bool:
    return bool((indices[1:, 1:] == indices[:-1, :-1]).all())


def _distances_of(table: Tensor, indices: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The rows of ``table`` by distance, from the last key seen by the first query to the first by the last."""
    pairs = indices.reshape(q_len, kv_len)
    return table[torch.cat([pairs[0].flip(0), pairs[1:, 0]])].t().contiguous()


def at_scores(r: Raiser, use: MaskUse, view: View, full: Sequence[int]) -> View:
    """A mask operand as it broadcasts to scores of the shape ``full``, as far as batch and heads go."""
    if use.shape is None or tuple(use.shape) == tuple(full):
        return view
    rows = ((1,) * 2 + view.shape)[-2:]
    if math.prod(view.shape) == math.prod(rows):
        return r.reshaped(view, rows)
    return r.reshaped(view.expand((*use.shape[:-2], *rows)), (*full[:-2], *rows))


def _attn_mask(r: Raiser, use: MaskUse, view: View, dtype: torch.dtype) -> View:
    """A mask operand as kernels take it: True where something may attend, or numbers to add."""
    if use.inverted:
        view = _torch_mask(r, "not", torch.logical_not, (view,), (), torch.bool)
    if use.fill != -math.inf and r.dtype(view) == torch.bool:
        return _additive(r, view, use.fill, dtype)
    return view


def _additive(r: Raiser, view: View, fill: float, dtype: torch.dtype) -> View:
    """A boolean mask as numbers to add: zero, and ``fill`` where it is False."""
    if r.dtype(view) != torch.bool:
        return view
    lowest = fill if fill == -math.inf else max(fill, torch.finfo(dtype).min)
    return _torch_mask(r, "numbers", _numbers, (view,), (lowest, dtype), dtype)


def _torch_mask(
    r: Raiser,
    what: str,
    function: Callable[..., Tensor],
    views: Sequence[View],
    more: tuple[Any, ...],
    dtype: torch.dtype,
) -> View:
    """A mask that PyTorch makes of others, once for all layers that read it."""
    shape = broadcast(*(view.shape for view in views))
    # What is the same all along a dimension is made once.
    views = [_unrepeated(view) for view in views]
    key = (function, *views, *more, dtype)
    if key in r.masks:
        return r.masks[key].expand(shape)
    spec = TensorSpec.contiguous(broadcast(*(view.shape for view in views)), dtype)
    call, label = TorchCall(function, (*map(Ref, range(len(views))), *more)), f"{views[0].base}_{what}"
    sources = tuple(map(r.realize, views))
    if all(map(r.is_constant, views)) and not isinstance(spec.numel, Size):
        name = r.derived(label, sources, call, spec.shape, dtype)
        made = View.of(name, r.values[name])
    else:
        made = r.emit(Extern(call, "a mask made at run time"), label, sources, spec)
    r.masks[key] = made
    return made.expand(shape)


def _unrepeated(view: View) -> View:
    for dim, size in enumerate(view.shape):
        if size != 1 and view.repeats(dim) == size:
            view = view.without_repeats(dim, size)
    return view


def _constant_mask(r: Raiser, use: MaskUse, full: Sequence[int], view: View | None = None) -> tuple[Mask | None, bool]:
    """A constant mask as a pattern, Dense for what allows everything and None for what is no pattern (a bias, not
    constant, or different for each sample); and whether what it forbids is a finite number."""
    if view is None:
        value = r.env[use.node]
        if isinstance(value, Conjunction) or not r.is_constant(r.view(use.node)):
            return None, False
        view = at_scores(r, use, r.view(use.node), full)
    expanded = four_dims(view.expand(full))
    (mask, finite), evaluation = r.evaluated(_pattern, expanded, use.inverted, use.fill)
    if evaluation is None or mask is None or mask in (Dense(), Causal()):
        return r.decided(_pattern, expanded, use.inverted, use.fill)
    # Some pattern for all sizes, each its own.
    r.decided(_is_pattern, expanded, use.inverted, use.fill, finite)
    return LateMask(_late_pattern, (evaluation, use.inverted, use.fill)), finite


def _rows_allow(mask: Mask, q_len: int, kv_len: int) -> bool:
    """Whether every query may attend to something."""
    return bool(mask.dense(q_len, kv_len).any(-1).all())


def _late_pattern(evaluation: Evaluation, inverted: bool, fill: float) -> Mask | None:
    return _pattern(evaluation(), inverted, fill)[0]


def _is_pattern(tensor: Tensor, inverted: bool, fill: float, finite: bool) -> bool:
    found, low = _pattern(tensor, inverted, fill)
    return found is not None and found.heads is None and low == finite


def _pattern(tensor: Tensor, inverted: bool, fill: float) -> tuple[Mask | None, bool]:
    """The entries of a constant mask as :func:`_constant_mask` gives them."""
    finite = fill != -math.inf
    if tensor.dtype != torch.bool:
        allowed = tensor == 0
        lowest = torch.finfo(tensor.dtype).min / 2 if tensor.is_floating_point() else -math.inf
        if not bool((allowed | (tensor < lowest)).all()):
            return None, False
        finite = not bool(torch.isneginf(tensor[~allowed]).all())
        tensor = allowed
    elif inverted:
        tensor = ~tensor
    if bool(tensor.all()):
        return Dense(), False
    if not bool((tensor == tensor[:1]).all()):
        return None, False
    tensor = tensor[0]
    if tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
        tensor = tensor[:1]
    dense = tensor[0] if tensor.shape[0] == 1 else tensor
    return _named_mask(dense.contiguous()), finite


def _conjunction(a: Mask | None, b: Mask | None) -> Mask | None:
    """What both allow; None and Dense allow everything."""
    if a is None or isinstance(a, Dense):
        return b
    return a if b is None or isinstance(b, Dense) else a & b


def _numbers(mask: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, fill)


@functools.lru_cache(maxsize=8)
def _hashable(mask: Mask, q_len: int, kv_len: int) -> Mask:
    """The mask itself, or, where a function is part of it, its entries: regions are compared by the hash of masks."""
    try:
        mask.hash  # noqa: B018
    except UndecidedSizeError:
        return mask
    except MaskError:
        return from_dense(mask.dense(q_len, kv_len))
    return mask


def _named_mask(dense: Tensor) -> Mask:
    if dense.dim() == 2 and bool((dense == Causal().dense(*dense.shape)).all()):
        return Causal()
    return from_dense(dense)


def four_dims(view: View) -> View:
    """An operand of attention as (batch, heads, …, …)."""
    if len(view.dims) == 4:
        return view
    if len(view.dims) == 3:
        # (B·H, S, D), as nn.MultiheadAttention has it: every pair of batch and head is a sample of one head.
        return View(view.base, (view.dims[0], ((1, 0),), *view.dims[1:]), view.offset)
    if len(view.dims) == 2:
        return View(view.base, (((1, 0),), ((1, 0),), *view.dims), view.offset)
    raise CaptureError(f"attention over a tensor of {len(view.dims)} dimensions")
