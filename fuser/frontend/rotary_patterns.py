"""Rotary embeddings written out: found by what a captured graph computes of columns, not by how it is spelled.

A node's *meaning* says, for each of its columns, which products of which columns of other nodes are summed. Its leaves
are replaced by what they mean in turn, the last one of the graph first, until what is left is a rotation of one tensor.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fuser.frontend.sizes import Traced, traced

aten = torch.ops.aten
_MOST_STEPS = 48
"""The most nodes that are looked into for one rotation; known spellings have half as many."""


@dataclass(frozen=True)
class Leaf:
    """The last ``rank`` dimensions of a node's tensor as columns; of a complex one its real or imaginary ``part``."""

    node: fx.Node
    rank: int
    part: str | None = None


@dataclass(frozen=True)
class Columns:
    """``count`` neighbouring columns of a leaf from ``first`` on."""

    leaf: Leaf
    first: int
    count: int


@dataclass(frozen=True)
class Rotation:
    """``x`` with ``width`` of its columns from ``start`` on rotated by pairs: neighbours if ``interleaved``, else those
    half a width apart. ``cos`` and ``sin`` have a column for each of these, or one for each pair.
    """

    x: Columns
    cos: Columns
    sin: Columns
    interleaved: bool
    start: int
    width: int


def find(graph: fx.Graph) -> Mapping[fx.Node, Rotation]:
    """The nodes that compute rotations of other nodes; of several that hold the same rotation, the last."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[fx.Node, Rotation] = {}
    inner: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target in _LAST and node not in inner:
            match = _match(node, position)
            if match is not None:
                found[node], nodes = match
                inner |= nodes
    return found


# ---- meanings


@dataclass(frozen=True)
class _Term:
    """A product of columns of leaves: for every element a coefficient and, for each leaf, a column."""

    coefficient: npt.NDArray[Any]
    factors: tuple[tuple[Leaf, npt.NDArray[Any]], ...]


@dataclass(frozen=True)
class _Meaning:
    """A sum of terms over the last dimensions of a tensor, of the size ``shape``; ``rounded`` after a cast to a dtype
    that cannot hold everything."""

    shape: tuple[int, ...]
    terms: tuple[_Term, ...]
    rounded: bool = False

    def rearranged(self, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> _Meaning:
        """Elements moved, dropped or repeated alike in everything."""
        terms = tuple(
            _Term(function(t.coefficient), tuple((leaf, function(at)) for leaf, at in t.factors)) for t in self.terms
        )
        return _Meaning(tuple(function(np.empty(self.shape, np.int8)).shape), terms, self.rounded)

    def negative(self) -> _Meaning:
        return _Meaning(self.shape, tuple(_Term(-t.coefficient, t.factors) for t in self.terms), self.rounded)


@dataclass(frozen=True)
class _Complex:
    real: _Meaning
    imaginary: _Meaning


class _OpaqueError(Exception):
    """A node's meaning cannot be said in terms of its arguments."""


def _sum(a: _Meaning, b: _Meaning) -> _Meaning:
    if a.rounded or b.rounded:
        raise _OpaqueError
    shape = np.broadcast_shapes(a.shape, b.shape)
    terms = (t for m in (a, b) for t in m.rearranged(lambda array: np.broadcast_to(array, shape)).terms)
    return _Meaning(shape, tuple(terms))


def _product(a: _Meaning, b: _Meaning) -> _Meaning:
    if a.rounded or b.rounded:
        raise _OpaqueError
    shape = np.broadcast_shapes(a.shape, b.shape)
    a, b = (m.rearranged(lambda array: np.broadcast_to(array, shape)) for m in (a, b))
    pairs = itertools.product(a.terms, b.terms)
    return _Meaning(shape, tuple(_Term(s.coefficient * t.coefficient, s.factors + t.factors) for s, t in pairs))


def _joined(parts: Sequence[_Meaning], axis: int, join: Callable[..., Any]) -> _Meaning:
    """``join`` of the parts along an axis: every term reaches over all, with coefficients of zero outside its part."""
    terms: list[_Term] = []
    for i, part in enumerate(parts):
        for t in part.terms:

            def placed(array: npt.NDArray[Any], i: int = i) -> npt.NDArray[Any]:
                arrays = [array if j == i else np.zeros(other.shape, array.dtype) for j, other in enumerate(parts)]
                whole: npt.NDArray[Any] = join(arrays, axis=axis)
                return whole

            terms.append(_Term(placed(t.coefficient), tuple((leaf, placed(at)) for leaf, at in t.factors)))
    shape = join([np.empty(part.shape, np.int8) for part in parts], axis=axis).shape
    return _Meaning(tuple(shape), tuple(terms), any(part.rounded for part in parts))


class _Expansion:
    """What the last ``rank`` dimensions of ``end`` mean in terms of ``leaves``: the nodes that are not expanded."""

    def __init__(self, end: fx.Node, rank: int) -> None:
        self.end = end
        self.rank = rank
        self.expanded: set[fx.Node] = set()
        self.tried: set[fx.Node] = set()
        self.leaves = {end}
        self.meaning = _Meaning((), ())
        self._known: dict[tuple[fx.Node, int], _Meaning | _Complex] = {}

    def expand(self, node: fx.Node) -> bool:
        """Put what a leaf means in its place; False where that cannot be said."""
        self.tried.add(node)
        self._known.clear()
        try:
            self.expanded.add(node)
            self.meaning = self.real(self.end, self.rank)
        except (_OpaqueError, ValueError, IndexError):
            self.expanded.discard(node)
            return False
        self.leaves = {leaf.node for term in self.meaning.terms for leaf, _ in term.factors}
        return True

    def of(self, node: Any, rank: int) -> _Meaning | _Complex:
        """The meaning of a node's last ``rank`` dimensions. Raises _OpaqueError where they are no columns."""
        if (node, rank) not in self._known:
            step = _STEPS.get(node.target) if node in self.expanded else None
            self._known[node, rank] = step(self, node, rank) if step else _leaf(node, rank)
        return self._known[node, rank]

    def real(self, node: Any, rank: int) -> _Meaning:
        found = self.of(node, rank)
        if not isinstance(found, _Meaning):
            raise _OpaqueError
        return found

    def parts(self, node: Any, rank: int) -> _Complex:
        found = self.of(node, rank)
        return found if isinstance(found, _Complex) else _Complex(found, _Meaning(found.shape, ()))


def _sizes(node: Any, rank: int) -> tuple[int, ...]:
    """The last sizes of a node's tensor, which must be numbers."""
    value = traced(node)
    if not isinstance(value, Traced) or not 0 < rank <= value.ndim:
        raise _OpaqueError
    sizes = value.shape[value.ndim - rank :]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise _OpaqueError
    return sizes


def _leaf(node: fx.Node, rank: int) -> _Meaning | _Complex:
    shape = _sizes(node, rank)
    at = np.arange(math.prod(shape)).reshape(shape)

    def column(part: str | None) -> _Meaning:
        return _Meaning(shape, (_Term(np.ones(shape, np.int8), ((Leaf(node, rank, part), at),)),))

    if traced(node).dtype.is_complex:
        return _Complex(column("real"), column("imag"))
    return column(None)


def _axis(node: Any, dim: int, rank: int) -> int:
    """The position of a tensor's dimension among its last ``rank``; negative for one before them."""
    count: int = traced(node).ndim
    return dim % count - (count - rank)


# ---- what single nodes compute

_Step = Callable[[_Expansion, fx.Node, int], "_Meaning | _Complex"]
_STEPS: dict[Any, _Step] = {}


def _computes(*targets: Any) -> Callable[[_Step], _Step]:
    def register(step: _Step) -> _Step:
        _STEPS.update(dict.fromkeys(targets, step))
        return step

    return register


@_computes(aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default)
def _same(e: _Expansion, node: fx.Node, rank: int) -> _Meaning | _Complex:
    return e.of(node.args[0], rank)


_CASTS = (aten.to.dtype, aten.to.other, aten.type_as.default, aten._to_copy.default)


@_computes(*_CASTS)
def _cast(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    meaning = e.real(node.args[0], rank)
    source, result = traced(node.args[0]).dtype, traced(node).dtype
    if source == result:
        return meaning
    if meaning.rounded or not source.is_floating_point or not result.is_floating_point:
        raise _OpaqueError
    return _Meaning(meaning.shape, meaning.terms, rounded=torch.promote_types(source, result) != result)


@_computes(aten.neg.default)
def _neg(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    return e.real(node.args[0], rank).negative()


@_computes(aten.add.Tensor, aten.sub.Tensor)
def _add(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    a, b = _both(e, node, rank)
    if isinstance(a, _Complex) or isinstance(b, _Complex):
        raise _OpaqueError
    return _sum(a, b.negative() if node.target is aten.sub.Tensor else b)


@_computes(aten.mul.Tensor, aten.mul.Scalar)
def _mul(e: _Expansion, node: fx.Node, rank: int) -> _Meaning | _Complex:
    if type(node.args[1]) in (int, float) and node.args[1] == 1 and traced(node).dtype == traced(node.args[0]).dtype:
        # Such as a scale that is not used.
        return e.of(node.args[0], rank)
    a, b = _both(e, node, rank)
    if isinstance(a, _Meaning) and isinstance(b, _Meaning):
        return _product(a, b)
    a, b = (e.parts(argument, rank) for argument in node.args)
    real = _sum(_product(a.real, b.real), _product(a.imaginary, b.imaginary).negative())
    return _Complex(real, _sum(_product(a.real, b.imaginary), _product(a.imaginary, b.real)))


def _both(e: _Expansion, node: fx.Node, rank: int) -> tuple[_Meaning | _Complex, _Meaning | _Complex]:
    if len(node.args) != 2 or node.kwargs or not all(isinstance(argument, fx.Node) for argument in node.args):
        raise _OpaqueError
    a, b = (e.of(argument, rank) for argument in node.args)
    return a, b


@_computes(aten.cat.default)
def _cat(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    nodes: Any = node.args[0]
    axis = _axis(node, _given(node, 1, "dim", 0), rank)
    if axis < 0:
        raise _OpaqueError
    return _joined([e.real(n, rank) for n in nodes], axis, np.concatenate)


@_computes(aten.stack.default)
def _stack(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    nodes: Any = node.args[0]
    axis = _axis(node, _given(node, 1, "dim", 0), rank)
    if axis < 0:
        raise _OpaqueError
    return _joined([e.real(n, rank - 1) for n in nodes], axis, np.stack)


@_computes(aten.slice.Tensor)
def _slice(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    source: Any = node.args[0]
    axis = _axis(source, _given(node, 1, "dim", 0), rank)
    if axis < 0:
        if traced(source).shape != traced(node).shape:
            raise _OpaqueError
        return e.real(source, rank)
    start, end, step = (_given(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    if any(part is not None and type(part) is not int for part in (start, end, step)):
        raise _OpaqueError
    return e.real(source, rank).rearranged(lambda array: array[(slice(None),) * axis + (slice(start, end, step),)])


@_computes(aten.select.int)
def _select(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    source, dim, index = node.args
    axis = _axis(source, dim, rank + 1)
    if axis < 0 or type(index) is not int:
        raise _OpaqueError
    return e.real(source, rank + 1).rearranged(lambda array: array.take(index, axis))


@_computes(operator.getitem)
def _getitem(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    """A part of what was split along one dimension."""
    parts: Any = node.args[0]
    if parts.target not in _SPLITS:
        raise _OpaqueError
    index: Any = node.args[1]
    source: Any = parts.args[0]
    name = "dim"
    if parts.target is aten.unbind.int:
        axis = _axis(source, _given(parts, 1, name, 0), rank + 1)
        if axis < 0:
            raise _OpaqueError
        return e.real(source, rank + 1).rearranged(lambda array: array.take(index, axis))
    dim = _given(parts, 2, name, 0)
    axis = _axis(source, dim, rank)
    sizes = [part.shape[dim] for part in traced(parts)]
    if axis < 0 or any(type(size) is not int for size in sizes):
        raise _OpaqueError
    start = sum(sizes[:index])
    chosen = (slice(None),) * axis + (slice(start, start + sizes[index]),)
    return e.real(source, rank).rearranged(lambda array: array[chosen])


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int)


_FLATTENS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.reshape_as.default, aten.view_as.default),
)


@_computes(*_FLATTENS, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim)
def _reshape(e: _Expansion, node: fx.Node, rank: int) -> _Meaning | _Complex:
    """The last dimensions by other sizes, those before them as they were."""
    source: Any = node.args[0]
    shape = _sizes(node, rank)
    before = traced(node).shape[: traced(node).ndim - rank]
    given = traced(source).shape
    if given[: len(before)] != before:
        raise _OpaqueError
    found = e.of(source, len(given) - len(before))
    if isinstance(found, _Complex):
        return _Complex(
            *(part.rearranged(lambda array: array.reshape(shape)) for part in (found.real, found.imaginary))
        )
    return found.rearranged(lambda array: array.reshape(shape))


@_computes(aten.view_as_complex.default)
def _view_as_complex(e: _Expansion, node: fx.Node, rank: int) -> _Complex:
    pairs = e.real(node.args[0], rank + 1)
    return _Complex(pairs.rearranged(lambda array: array[..., 0]), pairs.rearranged(lambda array: array[..., 1]))


@_computes(aten.view_as_real.default)
def _view_as_real(e: _Expansion, node: fx.Node, rank: int) -> _Meaning:
    parts = e.parts(node.args[0], rank - 1)
    return _joined([parts.real, parts.imaginary], rank - 1, np.stack)


@_computes(aten.complex.default)
def _complex(e: _Expansion, node: fx.Node, rank: int) -> _Complex:
    return _Complex(*(e.real(part, rank) for part in node.args))


_PAIRED = (aten.stack.default, aten.view_as_real.default)
_LAST = {aten.add.Tensor, aten.cat.default, *_PAIRED, *_CASTS, *_FLATTENS}
"""What a rotation may end with."""


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, wherever it stands."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return default if value is None else value


# ---- rotations


def _match(end: fx.Node, position: Mapping[fx.Node, int]) -> tuple[Rotation, set[fx.Node]] | None:
    # A rotation may end with pairs of columns as a dimension of their own.
    for rank in (1, 2) if end.target in _PAIRED else (1,):
        e = _Expansion(end, rank)
        while len(e.tried) < _MOST_STEPS:
            candidates = [leaf for leaf in e.leaves if leaf.target in _STEPS and leaf not in e.tried]
            if not candidates:
                break
            if not e.expand(max(candidates, key=position.__getitem__)):
                continue
            found = _rotation(e.meaning, end, rank)
            if found is not None:
                return found, e.expanded
            if _is_too_much(e.meaning):
                break
    return None


def _is_too_much(meaning: _Meaning) -> bool:
    """Whether some element is a sum of more than two products, or a product of more than two columns."""
    count = sum(((term.coefficient != 0).astype(np.int64) for term in meaning.terms), np.int64(0))
    return bool(np.any(count > 2)) or any(len(term.factors) > 2 for term in meaning.terms)


def _rotation(meaning: _Meaning, end: fx.Node, rank: int) -> Rotation | None:
    """The rotation that a node of this meaning is, if it is one of a tensor with the same dimensions before columns."""
    leaves = [{leaf for leaf, _ in term.factors if leaf.part is None} for term in meaning.terms]
    shared = set.intersection(*leaves) if leaves else set()
    if len(shared) != 1 or max(len(term.factors) for term in meaning.terms) != 2:
        return None
    (x,) = shared
    if _before(end, rank) != _before(x.node, x.rank):
        return None
    columns = _by_column(meaning, x)
    if columns is None:
        return None
    turned = [j for j, column in enumerate(columns) if any(table is not None for _, table in column.values())]
    first, start, width = min(at for column in columns for at in column), turned[0], len(turned)
    kept = [j for j in range(len(columns)) if not start <= j < start + width]
    if turned[-1] - start >= width or width % 2 or any(columns[j] != {first + j: (1, None)} for j in kept):
        return None
    for interleaved in (False, True):
        tables = _tables(columns[start : start + width], first + start, interleaved)
        if tables is not None:
            cos, sin = tables
            whole = Columns(_stored(x), first, len(columns))
            return Rotation(whole, cos, sin, interleaved, start, width)
    return None


def _before(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The sizes of a tensor before its last ``rank``."""
    shape: tuple[int, ...] = traced(node).shape
    return shape[: len(shape) - rank]


_Table = tuple[Leaf, int]
_Column = dict[int, tuple[int, "_Table | None"]]
"""By the column of x that is read: its coefficient, and the column of a table that it is multiplied with."""


def _by_column(meaning: _Meaning, x: Leaf) -> list[_Column] | None:
    columns: list[_Column] = [{} for _ in range(math.prod(meaning.shape))]
    for term in meaning.terms:
        of_x = [at.reshape(-1) for leaf, at in term.factors if leaf == x]
        tables = [(leaf, at.reshape(-1)) for leaf, at in term.factors if leaf != x]
        coefficients = term.coefficient.reshape(-1)
        for j in np.flatnonzero(coefficients).tolist():
            column = int(of_x[0][j])
            if len(of_x) != 1 or column in columns[j]:
                return None
            table = (tables[0][0], int(tables[0][1][j])) if tables else None
            columns[j][column] = int(coefficients[j]), table
    return columns


def _tables(columns: Sequence[_Column], first: int, interleaved: bool) -> tuple[Columns, Columns] | None:
    """The columns of cos and sin, where the columns of x from ``first`` on are rotated by these pairs."""
    width, cos, sin = len(columns), list[_Table](), list[_Table]()
    for j, column in enumerate(columns):
        partner = j ^ 1 if interleaved else (j + width // 2) % width
        own, other = column.get(first + j, (0, None)), column.get(first + partner, (0, None))
        if (len(column), own[0], other[0]) != (2, 1, -1 if partner > j else 1) or own[1] is None or other[1] is None:
            return None
        cos.append(own[1])
        sin.append(other[1])
    found = _table(cos, interleaved), _table(sin, interleaved)
    return None if found[0] is None or found[1] is None or found[0].count != found[1].count else (found[0], found[1])


def _table(columns: Sequence[_Table], interleaved: bool) -> Columns | None:
    """Neighbouring columns of one leaf: one for each column that is rotated, or one for each pair."""
    width, (leaf, first) = len(columns), columns[0]
    if columns == [(leaf, first + j) for j in range(width)]:
        return Columns(_stored(leaf), first, width)
    if columns == [(leaf, first + (j // 2 if interleaved else j % (width // 2))) for j in range(width)]:
        return Columns(_stored(leaf), first, width // 2)
    return None


def _stored(leaf: Leaf) -> Leaf:
    """The same numbers before a cast to a dtype that holds them all: a kernel computes in fp32 anyway."""
    node: Any = leaf.node
    while node.target in _CASTS:
        source, result = traced(node.args[0]).dtype, traced(node).dtype
        if source != result and not (source.is_floating_point and torch.promote_types(source, result) == result):
            break
        node = node.args[0]
    return Leaf(node, leaf.rank, leaf.part)
