"""Sets of keys as disjoint arithmetic progressions, row by row: the structure that follows from a mask's definition.

Closed under ``&``, ``|``, ``~`` and shifts as long as few progressions a row suffice. Everything is in time and memory
proportional to rows, whatever the number of allowed pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fuser.ir.masks.columns import LARGEST, Ints, Progressions

_MOST_PARTS = 96
"""Progressions a row above which a mask is treated as one without closed form."""


@dataclass(frozen=True, eq=False)
class Part:
    """For each row one progression of keys: ``start + t * step`` for ``0 <= t < count``; ``start``, ``count`` (N,).

    Rows that agree modulo ``period`` have their keys in the same residue class, or close: they suit one group.
    """

    start: Ints
    count: Ints
    step: int
    period: int


class IrregularError(Exception):
    """No closed form of reasonable size."""


def whole(rows: int, kv_len: int) -> list[Part]:
    """All keys of all rows."""
    return [Part(np.zeros(rows, np.int64), np.full(rows, kv_len), 1, 1)]


def parts_of(closed: Progressions | None) -> list[Part]:
    """Rows in closed form, each step as a part of its own."""
    if closed is None:
        raise IrregularError
    parts = []
    for start, count, step in zip(closed.start.T, closed.count.T, closed.step.T, strict=True):
        for value in _distinct(step[count > 0]):
            parts.append(Part(start, np.where(step == value, count, 0), value, value))
    return _short(parts)


def _distinct(values: Ints) -> list[int]:
    """The values there are, ascending; mostly there is one."""
    if len(values) and values.min() == values.max():
        return [int(values[0])]
    found: list[int] = np.unique(values).tolist()
    return found


def meet(a: list[Part], b: list[Part]) -> list[Part]:
    """Keys that are in both."""
    return _short([_meet(one, other) for one in a for other in b])


def _short(parts: list[Part]) -> list[Part]:
    parts = [part for part in parts if part.count.any()]
    if len(parts) > _MOST_PARTS:
        raise IrregularError
    return parts


def union(parts: list[Part]) -> list[Part]:
    """Disjoint parts with the keys of all ``parts``, which may overlap."""
    intervals = [part for part in parts if part.step == 1]
    result: list[Part] = []
    if intervals:
        start = np.stack([part.start for part in intervals], axis=1)
        end = start + np.stack([part.count for part in intervals], axis=1)
        order = np.argsort(np.where(end > start, start, np.iinfo(np.int64).max), axis=1, kind="stable")
        start, end = np.take_along_axis(start, order, 1), np.take_along_axis(end, order, 1)
        end = np.where(end > start, end, 0)
        reached = np.maximum.accumulate(end, axis=1)
        start[:, 1:] = np.maximum(start[:, 1:], reached[:, :-1])
        result = _short([Part(a, np.maximum(0, b - a), 1, 1) for a, b in zip(start.T, end.T, strict=True)])
    for part in sorted((part for part in parts if part.step > 1), key=lambda part: part.step):
        result = _short([*result, *minus([part], result)])
    return result


def minus(parts: list[Part], holes: list[Part]) -> list[Part]:
    """Keys of ``parts`` that are in none of ``holes``."""
    for hole in holes:
        parts = _short([piece for part in parts for piece in _without(part, hole)])
    return parts


def _without(part: Part, hole: Part) -> list[Part]:
    """The pieces of ``part`` that are not in ``hole``."""
    if not _meet(part, hole).count.any():
        return [part]
    if part.step % hole.step:
        # On the common multiple of both steps each class lies in the hole's lattice or does not touch it.
        fold = math.lcm(part.step, hole.step) // part.step
        if fold > _MOST_PARTS:
            raise IrregularError
        classes = [
            Part(
                part.start + t * part.step,
                np.maximum(0, -((t - part.count) // fold)),
                part.step * fold,
                part.period,
            )
            for t in range(fold)
        ]
        return [piece for one in classes for piece in _without(one, hole)]
    hit = (hole.count > 0) & ((part.start - hole.start) % hole.step == 0)
    end = hole.start + (hole.count - 1) * hole.step + 1
    before = np.clip(-((part.start - hole.start) // part.step), 0, part.count)
    after = np.clip(-((part.start - end) // part.step), 0, part.count)
    before, after = np.where(hit, before, part.count), np.where(hit, after, part.count)
    pieces = [replace(part, count=before)]
    pieces.append(replace(part, start=part.start + after * part.step, count=part.count - after))
    return [piece for piece in pieces if piece.count.any()]


def _meet(a: Part, b: Part) -> Part:
    """Keys in both, by the Chinese remainder theorem."""
    divisor = math.gcd(a.step, b.step)
    step = a.step // divisor * b.step
    if max(step, math.lcm(a.period, b.period)) > LARGEST:
        raise IrregularError  # products below would not fit in int64
    inverse = pow(a.step // divisor, -1, b.step // divisor) if b.step > divisor else 0
    gap = b.start - a.start
    first = a.start + a.step * (gap // divisor % (b.step // divisor) * inverse % (b.step // divisor))
    low = np.maximum(a.start, b.start)
    first = first + np.maximum(0, -((first - low) // step)) * step
    last = np.minimum(a.start + (a.count - 1) * a.step, b.start + (b.count - 1) * b.step)
    fits = (a.count > 0) & (b.count > 0) & (gap % divisor == 0)
    count = np.where(fits, np.maximum(0, (last - first) // step + 1), 0)
    return Part(first, count, step, math.lcm(a.period, b.period))
