"""From a mask to a plan: groups of neighbouring rows, as wide as pays for each part of the mask.

Rows that allow intervals of keys (closed forms with step 1) are planned from the ends of their intervals, in time and
memory proportional to rows; other masks from their allowed pairs, a slice of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fuser.ir.masks import Mask, Progressions
from fuser.ir.target import Target
from fuser.kernels.plan import WIDTHS, AttentionPlan, Int64s, Words, pointers, ramp

_SPAN = max(WIDTHS)
_PAIRS = 1 << 22
"""Allowed pairs that are looked at together."""


@dataclass(frozen=True)
class GroupCost:
    """Time of a group in units of one key against one vector of 16 lanes.

    ``setup`` is the cost of loading and storing one vector of rows, ``group`` that of starting a group, ``key`` of
    fetching a key, whatever the width, and ``partial`` of applying a word of lanes to a vector.
    """

    group: float = 1.0
    setup: float = 13.0
    key: float = 0.1
    partial: float = 0.03

    def __call__(self, width: int, full: Int64s, partial: Int64s) -> npt.NDArray[np.float64]:
        vectors = width / 16
        keys = full + partial
        cost: npt.NDArray[np.float64] = (
            self.group + vectors * (self.setup + keys + self.partial * partial) + self.key * keys
        )
        return cost


class _Cover(NamedTuple):
    """Keys of consecutive groups of one width: runs (N, 3) and partial keys with lanes, each with counts a group."""

    width: int
    rows: Int64s
    run_counts: Int64s
    runs: Int64s
    key_counts: Int64s
    keys: Int64s
    lanes: Words

    def cost(self, model: GroupCost) -> npt.NDArray[np.float64]:
        group = np.repeat(np.arange(len(self.run_counts)), self.run_counts)
        full = np.bincount(group, weights=self.runs[:, 1], minlength=len(self.run_counts)).astype(np.int64)
        return model(self.width, full, self.key_counts)

    def take(self, chosen: npt.NDArray[np.bool_]) -> _Cover:
        by_run, by_key = np.repeat(chosen, self.run_counts), np.repeat(chosen, self.key_counts)
        return _Cover(
            self.width,
            self.rows[chosen],
            self.run_counts[chosen],
            self.runs[by_run],
            self.key_counts[chosen],
            self.keys[by_key],
            self.lanes[by_key],
        )


def plan(mask: Mask, q_len: int, kv_len: int | None = None, target: Target | None = None) -> AttentionPlan:
    """The plan that computes ``mask`` for these lengths (``kv_len`` defaults to ``q_len``).

    Raises MaskError when the mask does not fit the lengths. The result is exact: each allowed pair is in one tile.
    """
    m = q_len if kv_len is None else kv_len
    mask.validate(q_len, m)
    model = GroupCost()
    if mask.heads is None:
        return _assemble(q_len, m, None, [(0, cover) for cover in _covers(mask, q_len, m, model)])
    masks = [mask.head(h) for h in range(mask.heads)]
    known: dict[Mask, list[_Cover]] = {}
    for part in masks:
        if part not in known:
            known[part] = list(_covers(part, q_len, m, model))
    return _assemble(q_len, m, mask.heads, [(h, c) for h, part in enumerate(masks) for c in known[part]])


def _assemble(q_len: int, kv_len: int, heads: int | None, covers: list[tuple[int, _Cover]]) -> AttentionPlan:
    parts = [cover for _, cover in covers]
    starts = np.concatenate([np.zeros(0, np.int64), *(c.rows for c in parts)])
    width = np.concatenate([np.zeros(0, np.int64), *(np.full(len(c.rows), c.width) for c in parts)])
    counts = np.minimum(width, q_len - starts)
    return AttentionPlan.assemble(
        q_len,
        kv_len,
        heads,
        head=np.concatenate([np.zeros(0, np.int64), *(np.full(len(c.rows), h) for h, c in covers)]),
        phase=np.zeros(len(starts), np.int64),
        width=width,
        row_counts=counts,
        rows=np.repeat(starts, counts) + ramp(counts),
        run_counts=np.concatenate([np.zeros(0, np.int64), *(c.run_counts for c in parts)]),
        runs=np.concatenate([np.zeros((0, 3), np.int64), *(c.runs for c in parts)]),
        key_counts=np.concatenate([np.zeros(0, np.int64), *(c.key_counts for c in parts)]),
        keys=np.concatenate([np.zeros(0, np.int64), *(c.keys for c in parts)]),
        lanes=np.concatenate([np.zeros(0, np.uint64), *(c.lanes for c in parts)]),
    )


def _covers(mask: Mask, n: int, m: int, model: GroupCost) -> Iterator[_Cover]:
    """The groups of all rows, a slice of rows at a time, each span of 64 rows at its cheapest division."""
    for start, stop in _slices(mask, n, m):
        rows = np.arange(start, stop)
        closed = mask.progressions(rows, n, m)
        intervals = closed is not None and bool((closed.step[closed.count > 1] == 1).all())
        if closed is not None and intervals:
            options = [_from_intervals(closed, start, width) for width in WIDTHS]
        else:
            columns = mask.columns(rows, n, m)
            lengths, keys = np.diff(columns.indptr), columns.indices
            options = [_from_pairs(lengths, keys, start, width, m) for width in WIDTHS]
        best = options[0].cost(model)
        divided = [np.ones(len(best), np.bool_)]
        for option in options[1:]:
            whole = option.cost(model)
            parts = np.zeros(2 * len(whole))
            parts[: len(best)] = best
            parts = parts.reshape(-1, 2).sum(axis=1)
            divided.append(whole <= parts)
            best = np.minimum(whole, parts)
        blocked = np.zeros(len(divided[-1]), np.bool_)
        for option, chosen in zip(reversed(options), reversed(divided), strict=True):
            blocked = np.repeat(blocked, 2)[: len(chosen)] if len(blocked) != len(chosen) else blocked
            picked = chosen & ~blocked
            yield option.take(picked)
            blocked = blocked | picked


def _slices(mask: Mask, n: int, m: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole spans of rows whose pairs fit in memory."""
    closed = n and mask.progressions(np.zeros(1, np.int64), n, m) is not None
    rows = (1 << 18) if closed and mask.structured else max(_SPAN, _PAIRS // max(1, m) // _SPAN * _SPAN)
    for start in range(0, n, rows):
        yield start, min(start + rows, n)


def _from_intervals(closed: Progressions, start: int, width: int) -> _Cover:
    """Groups from rows that allow intervals: between two successive ends the same lanes are allowed."""
    rows, kinds = closed.start.shape
    groups = -(-rows // width)
    size = np.minimum(width, rows - np.arange(groups) * width)
    lane = np.uint64(1) << (np.arange(rows) % width).astype(np.uint64)
    begin = np.zeros((groups * width, kinds), np.int64)
    end = begin.copy()
    begin[:rows], end[:rows] = closed.start, closed.start + closed.count
    toggle = np.zeros((groups * width, kinds), np.uint64)
    toggle[:rows] = np.where(closed.count > 0, lane[:, None], np.uint64(0))
    # An interval turns its lane on at its first key and off after its last.
    at = np.concatenate([begin, end], axis=1).reshape(groups, -1)
    lanes = np.concatenate([toggle, toggle], axis=1).reshape(groups, -1)
    order = np.argsort(at, axis=1, kind="stable")
    at = np.take_along_axis(at, order, 1)
    lanes = np.bitwise_xor.accumulate(np.take_along_axis(lanes, order, 1), axis=1)
    length = np.diff(at, axis=1, append=at[:, -1:])
    every = (np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - size).astype(np.uint64))[:, None]
    full = (length > 0) & (lanes == every)
    some = (length > 0) & (lanes != every) & (lanes != 0)

    group, _ = np.nonzero(full)
    first, count = at[full], length[full]
    # Runs that touch are one run.
    joins = np.zeros(len(first), np.bool_)
    joins[1:] = (first[1:] == first[:-1] + count[:-1]) & (group[1:] == group[:-1])
    head = np.flatnonzero(~joins)
    count = np.add.reduceat(count, head) if len(head) else count[:0]
    runs = np.stack([first[head], count, np.ones_like(count)], axis=1)
    spans = length[some]
    keys = np.repeat(at[some], spans) + ramp(spans)
    return _Cover(
        width,
        start + np.arange(groups) * width,
        np.bincount(group[head], minlength=groups),
        runs,
        np.where(some, length, 0).sum(axis=1),
        keys,
        np.repeat(lanes[some], spans),
    )


def _from_pairs(lengths: Int64s, keys: Int64s, start: int, width: int, kv_len: int) -> _Cover:
    """Groups from allowed keys row by row: ``lengths`` of rows and their ``keys``, ascending in a row."""
    rows = len(lengths)
    groups = -(-rows // width)
    row = np.repeat(np.arange(rows), lengths)
    place = row // width * kv_len + keys
    order = np.argsort(place, kind="stable")
    place = place[order]
    head = np.flatnonzero(np.diff(place, prepend=-1))
    lane = np.uint64(1) << (row[order] % width).astype(np.uint64)
    lanes = np.bitwise_or.reduceat(lane, head) if len(head) else lane[:0]
    group, key = np.divmod(place[head], max(1, kv_len))
    size = np.minimum(width, rows - np.arange(groups) * width)
    full = lanes == (np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - size).astype(np.uint64))[group]
    runs, run_counts = _runs(group[full], key[full], groups)
    return _Cover(
        width,
        start + np.arange(groups) * width,
        run_counts,
        runs,
        np.bincount(group[~full], minlength=groups),
        key[~full],
        lanes[~full],
    )


def _runs(group: Int64s, key: Int64s, groups: int) -> tuple[Int64s, Int64s]:
    """Ascending keys of groups as runs of step 1: (N, 3), and how many each group has."""
    follows = np.zeros(len(key), np.bool_)
    follows[1:] = (np.diff(key) == 1) & (np.diff(group) == 0)
    head = np.flatnonzero(~follows)
    count = np.diff(pointers(np.diff(np.append(head, len(key))))) if len(head) else np.zeros(0, np.int64)
    runs = np.stack([key[head], count, np.ones_like(count)], axis=1)
    return runs, np.bincount(group[head], minlength=groups)
