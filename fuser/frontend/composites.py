"""Operators that PyTorch itself writes as a few others, of which fuser knows all: these are what is captured.

Such as ``narrow``, ``einsum``, ``subtract`` or ``meshgrid``: there are hundreds of them, and none needs a handler whose
parts have handlers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.export import default_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

_MOST = 16
"""Parts of an operator that is taken apart; those with more are loops, as recurrent layers are."""


def decompositions(graph: fx.Graph, known: Collection[Any]) -> dict[OpOverload, Callable[..., Any]] | None:
    """What takes apart those operators of an exported graph that are not ``known``, but made of such as are; None where
    there are none."""
    found: dict[OpOverload, bool] = {}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, OpOverload) or target.namespace != "aten" or target in known:
            continue
        if not target._can_decompose():
            continue
        if not all(isinstance(part, Tensor) for part in pytree.tree_leaves(node.meta.get("val"))):
            continue
        # One table serves all nodes of an operator.
        found[target] = found.get(target, True) and _is_made_of(node, known)
    parts = [target for target, holds in found.items() if holds]
    if not parts:
        return None
    # Without an entry are those that PyTorch takes apart in any case.
    table = _pytorch_table()
    return {t: _OWN.get(t) or table[t] for t in parts if t in _OWN or t in table}


@functools.cache
def _pytorch_table() -> Mapping[OpOverload, Callable[..., Any]]:
    return cast("Mapping[OpOverload, Callable[..., Any]]", default_decompositions())


def _is_made_of(node: fx.Node, known: Collection[Any]) -> bool:
    """Whether a node's operator is few others, all known, for the values at hand."""

    def value(n: fx.Node) -> Any:
        return n.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    modes = {leaf.fake_mode for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)}
    if len(modes) != 1:
        return False
    parts = _Parts()
    try:
        with modes.pop(), parts:
            _OWN.get(node.target, node.target.decompose)(*args, **kwargs)
    except Exception:
        # Not for these values, such as those whose shapes follow from their contents.
        return False
    return len(parts.found) <= _MOST and all(part in known for part in parts.found)


class _Parts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Of which device a tensor is, and the like, is no part.
        if func.namespace != "prim":
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def _einsum(equation: str, operands: Sequence[Tensor], *, path: Sequence[int] | None = None) -> Tensor:
    """Two operands as one ``matmul`` in which batch dimensions are as many as they were, so that what follows sees
    which they are; PyTorch makes them one."""
    terms = _terms(equation)
    if len(operands) != 2 or len(terms) != 3:
        return _written_by_pytorch(equation, operands, path)
    (x, y), (a, b, out) = operands, terms
    if any(x.shape[a.index(c)] != y.shape[b.index(c)] for c in a if c in b):
        return _written_by_pytorch(equation, operands, path)

    x, a = _without(x, a, [c for c in a if c not in b + out])
    y, b = _without(y, b, [c for c in b if c not in a + out])
    batch, summed = [c for c in out if c in a and c in b], [c for c in a if c in b and c not in out]
    left, right = [c for c in out if c not in b], [c for c in out if c not in a]
    if len(right) != 1 and len(left) == 1:
        x, y, a, b, left, right = y, x, b, a, right, left
    sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}
    x, y = _in_order(x, a, batch + left + summed), _in_order(y, b, batch + summed + right)
    shape, rows, columns, depth = ([sizes[c] for c in part] for part in (batch, left, right, summed))
    if not summed:
        product = x.reshape([*shape, *rows, *(1 for _ in right)]) * y.reshape([*shape, *(1 for _ in left), *columns])
    else:
        # Rows may be those of several dimensions where there is no batch, and heads of queries share one of keys.
        shared = bool(batch) and (len(left), len(right), len(summed)) == (2, 1, 1)
        whole = len(summed) == 1 and (len(left) == 1 or not batch or shared)
        x = x if whole else x.reshape([*shape, *([math.prod(rows)] if batch else rows), math.prod(depth)])
        y = y if len(summed) == len(right) == 1 else y.reshape([*shape, math.prod(depth), math.prod(columns)])
        product = x @ (y.unsqueeze(len(batch)) if shared else y)
        if len(right) != 1 or (batch and len(left) != 1 and not shared):
            product = product.reshape([*shape, *rows, *columns])
    return _in_order(product, batch + left + right, out)


def _in_order(x: Tensor, letters: Sequence[str], wanted: Sequence[str]) -> Tensor:
    return x if list(letters) == list(wanted) else x.permute([letters.index(c) for c in wanted])


def _terms(equation: str) -> list[str]:
    """The letters of all operands and of the result; none where dimensions have no letter or one letter has several."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        out = "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
    terms = [*left.split(","), out]
    plain = all(not term or term.isalpha() for term in terms) and all(len(set(term)) == len(term) for term in terms)
    return terms if plain else []


def _without(x: Tensor, letters: str, summed: Sequence[str]) -> tuple[Tensor, str]:
    """x summed over some letters."""
    if not summed:
        return x, letters
    return x.sum([letters.index(c) for c in summed]), "".join(c for c in letters if c not in summed)


def _written_by_pytorch(equation: str, operands: Sequence[Tensor], path: Sequence[int] | None) -> Tensor:
    # While the table is in force, ``decompose`` would come back here.
    result: Tensor = _pytorch_table()[torch.ops.aten.einsum.default](equation, operands, path=path)
    return result


_OWN: dict[OpOverload, Callable[..., Any]] = {torch.ops.aten.einsum.default: _einsum}
"""What is taken apart in another way than PyTorch does."""
