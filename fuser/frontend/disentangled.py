"""What relative positions add to scores, as DeBERTa has it: sums of gathered products with all positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fuser.frontend.attention_patterns import MaskUse
from fuser.frontend.raising import Raiser
from fuser.frontend.sizes import Traced, traced
from fuser.frontend.views import View
from fuser.ir.operators import DisentangledBias, Ref, TorchCall

aten = torch.ops.aten
_SAME = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default, aten.contiguous.default),
    *(aten.unsqueeze.default, aten.alias.default, aten.flatten.using_ints),
)
_TRANSPOSES = (aten.transpose.int, aten.mT.default, aten.swapaxes.default)


@dataclass(frozen=True)
class Positions:
    """A bias of positions and what it reads but masks."""

    semantics: DisentangledBias
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """``factor`` times elements of ``products`` that ``index`` gives; of queries by keys, or ``turned``."""

    products: fx.Node
    index: fx.Node
    factor: float
    turned: bool


def apart(
    r: Raiser, uses: Sequence[MaskUse], shape: tuple[int, int, int, int]
) -> tuple[list[MaskUse], Positions | None]:
    """Masks of scores of ``shape`` without one that positions add, and that one."""
    for i, use in enumerate(uses):
        found = None if traced(use.node).dtype == torch.bool else _positions(r, use.node, shape)
        if found is not None:
            return [*uses[:i], *uses[i + 1 :]], found
    return list(uses), None


def _positions(r: Raiser, node: fx.Node, shape: tuple[int, int, int, int]) -> Positions | None:
    parts = _parts(r, node, 1.0, False)
    if not 0 < len(parts) <= 2 or len({part.turned for part in parts}) < len(parts):
        return None
    batch, heads, q_len, kv_len = shape
    inputs: list[str] = []
    factors: dict[bool, float] = {}
    for part in sorted(parts, key=lambda part: part.turned):
        rows, others = (kv_len, q_len) if part.turned else (q_len, kv_len)
        products, index = r.view(part.products), r.view(part.index)
        if r.dtype(products) not in r.floating or r.is_constant(products) or not r.is_constant(index):
            return None
        # The same for all heads of all samples.
        outer = [stride for factors in index.dims[:-2] for size, stride in factors if size != 1]
        if any(outer) or index.shape[-2:] != (rows, others) or products.shape[-2] != rows:
            return None
        pairs = View(index.base, index.dims[-2:], index.offset)
        width = products.shape[-1]
        if not r.decided(_are_by_distance, pairs, width):
            return None
        call = TorchCall(_of_keys if part.turned else _of_queries, (Ref(0),))
        size = q_len + kv_len - 1
        positions = r.derived(f"{part.index.name}_positions", (r.realize(pairs),), call, (size,), torch.int32)
        seen = products.reshape((batch, heads, rows, width))
        if seen is None:
            return None
        inputs += (r.realize(seen), positions)
        factors[part.turned] = part.factor
    return Positions(DisentangledBias(factors.get(False), factors.get(True)), tuple(inputs))


def _parts(r: Raiser, node: Any, factor: float, turned: bool) -> list[_Part]:
    """What a node is the sum of; nothing where it is something else."""
    if not isinstance(node, fx.Node) or not isinstance(value := traced(node), Traced) or value.ndim < 3:
        return []
    target, args = node.target, node.args
    if target is aten.gather.default:
        products, dim, index = args[:3]
        return [_Part(products, index, factor, turned)] if dim % value.ndim == value.ndim - 1 else []
    if target in _SAME and traced(args[0]).shape[-2:] == value.shape[-2:]:
        return _parts(r, args[0], factor, turned)
    if target in _TRANSPOSES and {d % value.ndim for d in (args[1:3] or (-1, -2))} == {value.ndim - 1, value.ndim - 2}:
        return _parts(r, args[0], factor, not turned)
    if target in (aten.add.Tensor, aten.add.Scalar) and not node.kwargs:
        a, b = args
        if b == 0:
            return _parts(r, a, factor, turned)
        first, second = (_parts(r, n, factor, turned) for n in (a, b))
        return [*first, *second] if first and second else []
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = _number(r, args[1])
        if number:
            divides = target in (aten.div.Tensor, aten.div.Scalar)
            return _parts(r, args[0], factor / number if divides else factor * number, turned)
    return []


def _are_by_distance(pairs: Tensor, width: int) -> bool:
    inside = bool((pairs >= 0).all()) and bool((pairs < width).all())
    return inside and bool((pairs[1:, 1:] == pairs[:-1, :-1]).all())


def _of_queries(pairs: Tensor) -> Tensor:
    """Positions by distance, from the last key seen by the first query to the first by the last: (Sq, Sk) pairs."""
    return torch.cat([pairs[0].flip(0), pairs[1:, 0]]).int()


def _of_keys(pairs: Tensor) -> Tensor:
    """The same of (Sk, Sq) pairs."""
    return _of_queries(pairs.t())


def _number(r: Raiser, value: Any) -> float | None:
    """A number, or what a constant of no dimensions holds."""
    if isinstance(value, (int, float)):
        return float(value)
    view = r.env.get(value)
    if isinstance(view, View) and not view.dims and r.is_constant(view) and r.dtype(view).is_floating_point:
        return r.decided(float, view)
    return None
