"""The mask interface: what masks define, and what follows from that for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fuser.ir.errors import MaskError
from fuser.ir.masks.columns import Bools, Columns, Ints, Progressions, chunks, digest, indptr_of, integer
from fuser.ir.masks.picture import draw
from fuser.ir.masks.structure import IrregularError, Part, parts_of

CURRENT = "_current"
"""Where a mask keeps what it was when somebody last asked."""


@dataclass(frozen=True)
class Algebra:
    """What ``&``, ``|``, ``~`` and ``shift`` make. Their results are masks, so that :mod:`fuser.ir.masks.algebra`
    comes after the interface and enters them in it."""

    both: Callable[[tuple[Mask, ...]], Mask]
    either: Callable[[tuple[Mask, ...]], Mask]
    complement: Callable[[Mask], Mask]
    shifted: Callable[[Mask, int], Mask]


class Mask(ABC):
    """Which (query, key) pairs attention may use. Immutable, comparable, usable as a dictionary key.

    A mask is one matrix (q_len, kv_len) for all heads (``heads`` is None) or one a head, (heads, q_len, kv_len). Where
    ``kv_len`` is None it equals ``q_len``. Subclasses define ``_allowed``; those that know their rows in closed form
    also define ``_progressions``, from which counting and listing cost no more than their result.

    All methods that take lengths raise MaskError when the mask does not fit them.
    """

    _algebra: ClassVar[Algebra]

    @property
    def allows_all(self) -> bool:
        """Whether every pair is known to be allowed, at all lengths."""
        return False

    @property
    def allows_none(self) -> bool:
        """Whether no pair is known to be allowed, at any lengths."""
        return False

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

    def parts(self, q_len: int, kv_len: int | None = None) -> list[Part] | None:
        """Disjoint parts that together allow what the mask allows, or None where no short closed form is known."""
        n, m = self._lengths(q_len, kv_len)
        try:
            return self._parts(np.arange(n), n, m)
        except IrregularError:
            return None

    def count(self, q_len: int, kv_len: int | None = None) -> int:
        """Exact number of allowed pairs, summed over the heads of a mask that has heads; never holds the whole mask."""
        n, m = self._lengths(q_len, kv_len)
        if self.heads is not None:
            return sum(times * mask.count(n, m) for mask, times in self._distinct_heads().items())
        closed = self._progressions(np.arange(n), n, m)
        if closed is not None:
            return int(closed.count.sum())
        parts = self.parts(n, m)
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
        return self._algebra.shifted(self, offset) if offset else self

    def current(self) -> Mask:
        """This mask as it is now, for whoever keeps what follows from it: itself, where nothing can change.

        What the functions in it read belongs to the result's identity, and the result refuses to be used once that has
        changed: MaskError, from this method too.
        """
        now = tuple(mask.current() for mask in self._operands)
        if all(a is b for a, b in zip(now, self._operands, strict=True)):
            return self
        kept = self.__dict__.get(CURRENT)
        if kept is None or kept._operands != now:
            kept = self.__dict__[CURRENT] = self._with(now)
        return kept

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
        n, m = self._lengths(q_len, kv_len)
        masks = (self.head(h) for h in range(self.heads or 1))
        panels = ((mask.name, lambda a, b, mask=mask: mask._block(np.arange(a, b), n, m)) for mask in masks)
        draw(Path(path), f"{self.name}\n{n} x {m}, {self.density(n, m):.2%} allowed", panels, self.heads, n, m)

    def __and__(self, other: Mask) -> Mask:
        return self._algebra.both((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return self._algebra.either((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self._algebra.complement(self)

    def __str__(self) -> str:
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != CURRENT}

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

    def _parts(self, rows: Ints, n: int, m: int) -> list[Part]:
        """The rows as disjoint parts. Raises IrregularError where no short closed form is known."""
        return parts_of(self._progressions(rows, n, m))

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
        return Columns(indptr_of(np.concatenate(lengths)), np.concatenate(indices))

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
