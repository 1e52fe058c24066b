"""The mask interface, the algebra of masks (``& | ~``, per head, shifted queries) and what all masks share."""

from __future__ import annotations

import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fuser.ir.errors import MaskError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

# Entries that one step of a chunked computation may hold: large enough to vectorize, small beside any model.
CHUNK = 1 << 22

# Where a mask keeps what it was when somebody last asked.
_CURRENT = "_current"

# Largest length or parameter: products of two of them fit in int64.
LARGEST = (1 << 31) - 1


class Columns(NamedTuple):
    """Allowed columns of a batch of rows, CSR: row ``r`` allows ``indices[indptr[r]:indptr[r + 1]]``, ascending."""

    indptr: Ints
    indices: Ints


@dataclass(frozen=True, eq=False)
class Progressions:
    """Allowed columns of R rows as K arithmetic progressions a row; all three arrays are int64 (R, K).

    Row ``r`` allows ``start[r, k] + t * step[r, k]`` for ``0 <= t < count[r, k]``. Within a row the progressions ascend
    and their ranges do not overlap; unused ones have count 0.
    """

    start: Ints
    count: Ints
    step: Ints

    def columns(self) -> Columns:
        used = self.count.ravel() > 0
        start, count, step = (array.ravel()[used] for array in (self.start, self.count, self.step))
        # Differences of successive indices, summed in place: one array of the result's size and no other.
        indices = np.repeat(step, count)
        indices[np.cumsum(count) - count] = start - np.concatenate([[0], (start + (count - 1) * step)[:-1]])
        np.cumsum(indices, out=indices)
        return Columns(_indptr(self.count.sum(axis=1)), indices)


def spans(rows: int, kv_len: int, *parts: tuple[Any, Any, Any]) -> Progressions:
    """Progressions from ascending parts ``(first, last, step)``, inclusive, scalars or (rows,), cut to [0, kv_len)."""
    shape = (len(parts), rows)
    first, last, step = (np.empty(shape, np.int64) for _ in range(3))
    for k, part in enumerate(parts):
        first[k], last[k], step[k] = part
    first += np.maximum(0, -(first // step)) * step  # the progression's first member that is not negative
    count = np.maximum(0, (np.minimum(last, kv_len - 1) - first) // step + 1)
    return Progressions(*(np.ascontiguousarray(array.T) for array in (first, count, step)))


def integer(name: str, value: Any, least: int | None) -> int:
    """``value`` as an int not below ``least``; MaskError otherwise."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise MaskError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise MaskError(f"{name} must be at least {least}, got {number}")
    if abs(number) > LARGEST:
        raise MaskError(f"{name} must be at most {LARGEST}, got {number}")
    return number


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together hold at most CHUNK entries of ``width`` a row, and at least one row."""
    size = max(1, CHUNK // max(1, width))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _indptr(lengths: npt.NDArray[Any]) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _row_of(columns: Columns) -> Ints:
    """For every entry of ``columns``, the position of its row in the batch."""
    return np.repeat(np.arange(len(columns.indptr) - 1), np.diff(columns.indptr))


class Mask(ABC):
    """Which (query, key) pairs attention may use. Immutable, comparable, usable as a dictionary key.

    A mask is one matrix (q_len, kv_len) for all heads (``heads`` is None) or one a head, (heads, q_len, kv_len). Where
    ``kv_len`` is None it equals ``q_len``. Subclasses define ``_allowed``; those that know their rows in closed form
    also define ``_progressions``, from which counting and listing cost no more than their result.

    All methods that take lengths raise MaskError when the mask does not fit them.
    """

    @property
    def heads(self) -> int | None:
        """Number of heads that have a matrix of their own, or None if all heads share one."""
        return None

    @property
    def structured(self) -> bool:
        """Whether ``columns`` costs time in proportion to the allowed pairs, not to rows x kv_len."""
        return True

    @property
    @abstractmethod
    def name(self) -> str:
        """Short description, e.g. ``longformer(window=256, global=16)``."""

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the definition, the same in every process. Raises MaskError if a callable is part of it."""
        return digest(["fuser.mask", 1, self._key()])

    def fingerprint(self, q_len: int, kv_len: int | None = None) -> str:
        """Hex SHA-256 that determines every entry at these lengths, for cache keys; works for callables too.

        It is taken over the entries where no definition is available, in chunks, and over the definition elsewhere; so
        equal fingerprints mean equal masks, but masks that are defined differently may be equal nonetheless.
        """
        n, m = self._lengths(q_len, kv_len)
        return digest(["fuser.mask", 1, n, m, self._shape_key(n, m)])

    def validate(self, q_len: int, kv_len: int | None = None) -> None:
        """Raise MaskError unless the mask is defined for these lengths; callables are tried on the outermost rows."""
        n, m = self._lengths(q_len, kv_len)
        if n:
            self._block(np.array([0, n - 1]), n, m)

    def dense(self, q_len: int, kv_len: int | None = None) -> torch.Tensor:
        """The whole mask: bool, (q_len, kv_len) or (heads, q_len, kv_len), on the CPU; True means allowed."""
        n, m = self._lengths(q_len, kv_len)
        out = np.empty((*self._lead, n, m), np.bool_)
        for start, stop in self._chunks(n, m):
            out[..., start:stop, :] = self._block(np.arange(start, stop), n, m)
        return torch.from_numpy(out)

    def rows(self, start: int, stop: int, q_len: int, kv_len: int | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of ``dense``, without making the others: bool, ([heads,] stop - start, kv_len)."""
        n, m = self._lengths(q_len, kv_len)
        start, stop = integer("start", start, 0), integer("stop", stop, 0)
        if not start <= stop <= n:
            raise MaskError(f"rows {start}:{stop} are not rows of a mask with q_len = {n}")
        return torch.from_numpy(np.array(self._block(np.arange(start, stop), n, m)))

    def columns(self, rows: npt.ArrayLike, q_len: int, kv_len: int | None = None) -> Columns:
        """Allowed columns of each of ``rows`` (any order, repeats allowed), ascending, as CSR arrays of int64.

        Only for masks that all heads share: take ``mask.head(h)`` of others.
        """
        n, m = self._lengths(q_len, kv_len)
        return self._columns(self._row_indices(rows, n), n, m)

    def progressions(self, rows: npt.ArrayLike, q_len: int, kv_len: int | None = None) -> Progressions | None:
        """Allowed columns of each of ``rows`` in closed form, in time O(rows), or None where none is known."""
        n, m = self._lengths(q_len, kv_len)
        return self._progressions(self._row_indices(rows, n), n, m)

    def count(self, q_len: int, kv_len: int | None = None) -> int:
        """Exact number of allowed pairs, summed over the heads of a mask that has heads; never holds the whole mask."""
        n, m = self._lengths(q_len, kv_len)
        if self.heads is not None:
            return sum(times * mask.count(n, m) for mask, times in self._distinct_heads().items())
        closed = self._progressions(np.arange(n), n, m)
        if closed is not None:
            return int(closed.count.sum())
        from fuser.ir.masks.structure import progressions

        parts = progressions(self, n, m)
        if parts is not None:
            return sum(int(part.count.sum()) for part in parts)
        total = 0
        for start, stop in chunks(n, m):
            rows = np.arange(start, stop)
            total += len(self._columns(rows, n, m).indices) if self.structured else int(self._block(rows, n, m).sum())
        return total

    def density(self, q_len: int, kv_len: int | None = None) -> float:
        """Allowed pairs over all pairs, in [0, 1]; 0.0 where there are no pairs."""
        n, m = self._lengths(q_len, kv_len)
        return self.count(n, m) / max(1, n * m * (self.heads or 1))

    def head(self, index: int) -> Mask:
        """The mask of one head, which has ``heads`` None. A mask that all heads share returns itself."""
        index = integer("head", index, 0)
        if self.heads is None:
            return self
        if index >= self.heads:
            raise MaskError(f"head {index} of a mask with {self.heads} heads")
        return self._head(index)

    def shift(self, offset: int) -> Mask:
        """The mask whose query ``i`` is query ``i + offset`` of this one, as if after ``offset`` cached ones."""
        offset = integer("offset", offset, 0)
        return Shifted(self, offset) if offset else self

    def current(self) -> Mask:
        """This mask as it is now, for whoever keeps what follows from it: itself, where nothing can change.

        What the functions in it read belongs to the result's identity, and the result refuses to be used once that has
        changed: MaskError, from this method too.
        """
        now = tuple(mask.current() for mask in self._operands)
        if all(a is b for a, b in zip(now, self._operands, strict=True)):
            return self
        kept = self.__dict__.get(_CURRENT)
        if kept is None or kept._operands != now:
            kept = self.__dict__[_CURRENT] = self._with(now)
        return kept  # type: ignore[no-any-return]

    @property
    def is_current(self) -> bool:
        """Whether nothing has changed that this mask, made by :meth:`current`, depends on."""
        try:
            self.current()
        except MaskError:
            return False
        return True

    @property
    def has_functions(self) -> bool:
        """Whether the mask depends on what functions read, so that it can change."""
        return any(mask.has_functions for mask in self._operands)

    def draw(self, path: str | Path, q_len: int, kv_len: int | None = None) -> None:
        """Write a PNG picture, shaded by block density where there are more entries than pixels. Needs matplotlib."""
        from fuser.ir.masks.picture import draw

        n, m = self._lengths(q_len, kv_len)
        draw(self, Path(path), n, m)

    def __and__(self, other: Mask) -> Mask:
        return And.of((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or.of((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __str__(self) -> str:
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _CURRENT}

    def __copy__(self) -> Mask:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        return self

    # What subclasses define. Lengths are checked; n is q_len, m is kv_len, i and j are int64 indices.

    @property
    def _operands(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""
        return ()

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        """The same of other operands."""
        raise NotImplementedError(f"{type(self).__name__} has operands and must define _with")

    @abstractmethod
    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        """Whether pairs are allowed: i (R, 1) with j (1, K), or both (P,); broadcastable to that, heads in front."""

    @abstractmethod
    def _key(self) -> Any:
        """The definition as a JSON value."""

    def _shape_key(self, n: int, m: int) -> Any:
        """A JSON value that determines all entries at lengths n, m."""
        return self._key()

    def _check(self, n: int, m: int) -> None:  # noqa: B027 most masks fit all lengths
        """Raise MaskError if the mask is not defined at these lengths."""

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return None

    def _head(self, index: int) -> Mask:
        raise NotImplementedError(f"{type(self).__name__} has heads and must define _head")

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        """Rows i of the mask: (..., len(i), m); may be a read-only view."""
        allowed = self._allowed(i[:, None], np.arange(m)[None, :], n, m)
        return np.broadcast_to(allowed, (*self._lead, len(i), m))

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        closed = self._progressions(i, n, m)
        if closed is not None:
            return closed.columns()
        lengths, indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, stop in chunks(len(i), m):
            block = self._block(i[start:stop], n, m)
            lengths.append(block.sum(axis=1, dtype=np.int64))
            indices.append(np.nonzero(block)[1])
        return Columns(_indptr(np.concatenate(lengths)), np.concatenate(indices))

    # What all share.

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.heads is None else (self.heads,)

    def _chunks(self, n: int, m: int) -> Iterator[tuple[int, int]]:
        return chunks(n, m * (self.heads or 1))

    def _distinct_heads(self) -> Counter[Mask]:
        return Counter(self.head(h) for h in range(self.heads or 1))

    def _lengths(self, q_len: int, kv_len: int | None) -> tuple[int, int]:
        n = integer("q_len", q_len, 0)
        m = n if kv_len is None else integer("kv_len", kv_len, 0)
        self._check(n, m)
        return n, m

    def _row_indices(self, rows: npt.ArrayLike, n: int) -> Ints:
        if self.heads is not None:
            raise MaskError(f"{self.name} has a matrix for each head: ask mask.head(h), one head at a time")
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise MaskError(f"rows must be a list of integers, got {index.dtype} of shape {index.shape}")
        if index.size and (index.min() < 0 or index.max() >= n):
            raise MaskError(f"rows must lie in [0, {n}), got {index.min()} to {index.max()}")
        return index.astype(np.int64)


@dataclass(frozen=True)
class Derived(Mask):
    """A mask made from one other, ``operand``, with as many heads."""

    operand: Mask

    @property
    def heads(self) -> int | None:
        return self.operand.heads

    @property
    def structured(self) -> bool:
        return self.operand.structured

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return (self.operand,)

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return replace(self, operand=operands[0])


@dataclass(frozen=True)
class Not(Derived):
    """Pairs that the operand does not allow."""

    @property
    def structured(self) -> bool:
        return False

    @property
    def name(self) -> str:
        inner = self.operand.name
        return f"~({inner})" if isinstance(self.operand, _Composed) else f"~{inner}"

    def __invert__(self) -> Mask:
        return self.operand

    def count(self, q_len: int, kv_len: int | None = None) -> int:
        n, m = self._lengths(q_len, kv_len)
        return n * m * (self.heads or 1) - self.operand.count(n, m)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return ~self.operand._allowed(i, j, n, m)

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return ~self.operand._block(i, n, m)

    def _check(self, n: int, m: int) -> None:
        self.operand._check(n, m)

    def _head(self, index: int) -> Mask:
        return ~self.operand.head(index)

    def _key(self) -> Any:
        return ["not", self.operand._key()]

    def _shape_key(self, n: int, m: int) -> Any:
        return ["not", self.operand._shape_key(n, m)]


@dataclass(frozen=True, eq=False)
class _Composed(Mask):
    """An associative, commutative, idempotent combination; equal whatever the order of its operands."""

    operands: tuple[Mask, ...]

    kind: ClassVar[str]
    sign: ClassVar[str]

    def __post_init__(self) -> None:
        if len(self.operands) < 2:
            raise MaskError(f"`{self.sign}` combines two masks or more, got {len(self.operands)}")
        sizes = {mask.heads for mask in self.operands if mask.heads is not None}
        if len(sizes) > 1:
            raise MaskError(f"cannot combine masks with different numbers of heads: {sorted(sizes)} in {self.name}")

    @classmethod
    def of(cls, masks: tuple[Mask, ...]) -> Mask:
        """The combination, flattened, without repeated or neutral operands; absorbed where heads do not differ."""
        flat = [part for mask in masks for part in (mask.operands if isinstance(mask, cls) else (mask,))]
        neutral, absorbing = cls._units()
        kept = tuple(dict.fromkeys(mask for mask in flat if mask != neutral))
        if absorbing in kept and all(mask.heads is None for mask in kept):
            return absorbing
        if len(kept) < 2:
            return kept[0] if kept else neutral
        return cls(kept)

    @classmethod
    @abstractmethod
    def _units(cls) -> tuple[Mask, Mask]:
        """The neutral and the absorbing mask."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Composed)
            and self.kind == other.kind
            and frozenset(self.operands) == frozenset(other.operands)
        )

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self.operands)))

    @property
    def heads(self) -> int | None:
        return next((mask.heads for mask in self.operands if mask.heads is not None), None)

    @property
    def name(self) -> str:
        parts = (f"({mask.name})" if isinstance(mask, _Composed) else mask.name for mask in self.operands)
        return f" {self.sign} ".join(parts)

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return self.operands

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return self.of(operands)

    def _check(self, n: int, m: int) -> None:
        for mask in self.operands:
            mask._check(n, m)

    def _head(self, index: int) -> Mask:
        return self.of(tuple(mask.head(index) for mask in self.operands))

    def _key(self) -> Any:
        return [self.kind, sorted((mask._key() for mask in self.operands), key=json.dumps)]

    def _shape_key(self, n: int, m: int) -> Any:
        return [self.kind, sorted((mask._shape_key(n, m) for mask in self.operands), key=json.dumps)]


class And(_Composed):
    """Pairs that every operand allows. Listing costs what its cheapest operand costs; the others only filter."""

    kind = "and"
    sign = "&"

    @classmethod
    def _units(cls) -> tuple[Mask, Mask]:
        from fuser.ir.masks.patterns import Dense

        return Dense(), Not(Dense())

    @property
    def structured(self) -> bool:
        return any(mask.structured for mask in self.operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_and, (mask._allowed(i, j, n, m) for mask in self.operands))

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_and, (mask._block(i, n, m) for mask in self.operands))

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        """Closed form where all operands have one and all but one of them are intervals, which then clip that one."""
        low, high, rest = np.zeros(len(i), np.int64), np.full(len(i), m - 1), None
        for mask in self.operands:
            part = mask._progressions(i, n, m)
            if part is None:
                return None
            if part.start.shape[1] == 1 and (part.step == 1).all():
                low = np.maximum(low, part.start[:, 0])
                high = np.minimum(high, part.start[:, 0] + part.count[:, 0] - 1)
            elif rest is None:
                rest = part
            else:
                return None
        if rest is None:
            return spans(len(i), m, (low, high, 1))
        skipped = np.maximum(0, -((rest.start - low[:, None]) // rest.step))
        start = rest.start + skipped * rest.step
        last = np.minimum(rest.start + (rest.count - 1) * rest.step, high[:, None])
        return Progressions(start, np.maximum(0, (last - start) // rest.step + 1), rest.step)

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        closed = [(part, mask) for mask in self.operands if (part := mask._progressions(i, n, m)) is not None]
        if (whole := self._progressions(i, n, m)) is not None:
            return whole.columns()
        if closed:
            part, base = min(closed, key=lambda pair: int(pair[0].count.sum()))
            found = part.columns()
        else:
            base = next((mask for mask in self.operands if mask.structured), self.operands[0])
            found = base._columns(i, n, m)
        row, col = _row_of(found), found.indices
        for mask in self.operands:
            if mask is not base:
                keep = np.broadcast_to(mask._allowed(i[row], col, n, m), col.shape)
                row, col = row[keep], col[keep]
        return Columns(_indptr(np.bincount(row, minlength=len(i))), col)


class Or(_Composed):
    """Pairs that at least one operand allows."""

    kind = "or"
    sign = "|"

    @classmethod
    def _units(cls) -> tuple[Mask, Mask]:
        neutral, absorbing = And._units()
        return absorbing, neutral

    @property
    def structured(self) -> bool:
        return all(mask.structured for mask in self.operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_or, (mask._allowed(i, j, n, m) for mask in self.operands))

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return reduce(np.logical_or, (mask._block(i, n, m) for mask in self.operands))

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        if not self.structured:
            return super()._columns(i, n, m)
        parts = [mask._columns(i, n, m) for mask in self.operands]
        pairs = np.unique(np.concatenate([_row_of(part) * m + part.indices for part in parts]))
        row, col = np.divmod(pairs, max(1, m))
        return Columns(_indptr(np.bincount(row, minlength=len(i))), col)


@dataclass(frozen=True)
class PerHead(Mask):
    """Head ``h`` uses ``masks[h]``, each one matrix. Masks without heads combine with it by applying to every head."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        if not self.masks:
            raise MaskError("a per-head mask needs at least one head")
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise MaskError(f"a per-head mask is made of masks, got {mask!r}")
            if mask.heads is not None:
                raise MaskError(f"{mask.name} already has {mask.heads} heads: pass mask.head(h) for each head")

    @property
    def heads(self) -> int | None:
        return len(self.masks)

    @property
    def structured(self) -> bool:
        return all(mask.structured for mask in self.masks)

    @property
    def name(self) -> str:
        times = Counter(mask.name for mask in self.masks)
        if len(times) < len(self.masks):
            return f"per_head({', '.join(f'{count} x {name}' for name, count in times.items())})"
        return f"per_head({', '.join(times)})"

    @property
    def _operands(self) -> tuple[Mask, ...]:
        return self.masks

    def _with(self, operands: tuple[Mask, ...]) -> Mask:
        return PerHead(operands)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        shape = np.broadcast_shapes(i.shape, j.shape)
        once = {mask: np.broadcast_to(mask._allowed(i, j, n, m), shape) for mask in set(self.masks)}
        return np.stack([once[mask] for mask in self.masks])

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        once = {mask: mask._block(i, n, m) for mask in set(self.masks)}
        return np.stack([once[mask] for mask in self.masks])

    def _check(self, n: int, m: int) -> None:
        for mask in set(self.masks):
            mask._check(n, m)

    def _head(self, index: int) -> Mask:
        return self.masks[index]

    def _key(self) -> Any:
        return ["per_head", [mask._key() for mask in self.masks]]

    def _shape_key(self, n: int, m: int) -> Any:
        once = {mask: mask._shape_key(n, m) for mask in set(self.masks)}
        return ["per_head", [once[mask] for mask in self.masks]]


def per_head(masks: Sequence[Mask]) -> PerHead:
    """One mask for each head, in order. MaskError if there is none or one of them has heads of its own."""
    return PerHead(tuple(masks))


@dataclass(frozen=True)
class Shifted(Derived):
    """Query ``i`` sees what query ``i + offset`` of the operand sees; made by ``Mask.shift``."""

    offset: int

    @property
    def name(self) -> str:
        inner = self.operand.name
        return f"{f'({inner})' if isinstance(self.operand, (_Composed, Not)) else inner}.shift({self.offset})"

    def shift(self, offset: int) -> Mask:
        return self.operand.shift(self.offset + integer("offset", offset, 0))

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return self.operand._allowed(i + self.offset, j, n + self.offset, m)

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        return self.operand._block(i + self.offset, n + self.offset, m)

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return self.operand._progressions(i + self.offset, n + self.offset, m)

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        return self.operand._columns(i + self.offset, n + self.offset, m)

    def _check(self, n: int, m: int) -> None:
        self.operand._check(n + self.offset, m)

    def _head(self, index: int) -> Mask:
        return self.operand.head(index).shift(self.offset)

    def _key(self) -> Any:
        return ["shifted", self.offset, self.operand._key()]

    def _shape_key(self, n: int, m: int) -> Any:
        return ["shifted", self.offset, self.operand._shape_key(n + self.offset, m)]
