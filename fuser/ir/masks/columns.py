"""Lists of allowed columns, as CSR arrays and as arithmetic progressions, and the checks that all masks share."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fuser.ir.errors import MaskError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

# Entries that one step of a chunked computation may hold: large enough to vectorize, small beside any model.
CHUNK = 1 << 22

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
        return Columns(indptr_of(self.count.sum(axis=1)), indices)


def spans(rows: int, kv_len: int, *parts: tuple[Any, Any, Any]) -> Progressions:
    """Progressions from ascending parts ``(first, last, step)``, inclusive, scalars or (rows,), cut to [0, kv_len)."""
    shape = (len(parts), rows)
    first, count, step = (np.empty(shape, np.int64) for _ in range(3))
    for k, (begin, last, by) in enumerate(parts):
        first[k], step[k] = begin, by
        first[k] += np.maximum(0, -(first[k] // by)) * by  # the progression's first member that is not negative
        count[k] = np.maximum(0, (np.minimum(last, kv_len - 1) - first[k]) // by + 1)
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


def indptr_of(lengths: npt.NDArray[Any]) -> Ints:
    """Where rows of these lengths begin, and behind the last one."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def row_of(columns: Columns) -> Ints:
    """For every entry of ``columns``, the position of its row in the batch."""
    return np.repeat(np.arange(len(columns.indptr) - 1), np.diff(columns.indptr))
