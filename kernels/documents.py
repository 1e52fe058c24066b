"""Plans of packed documents: every document attends to itself, under one mask that is applied to each.

Where the keys of a row are an interval that moves with it, groups follow from lengths by arithmetic; of other masks the
plans of single documents are put side by side. Either way nothing here runs once a row or once a document.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fuser.ir.masks import And, Causal, Dense, Mask, SlidingWindow, from_dense
from fuser.ir.target import Target
from fuser.kernels.plan import WIDTHS, AttentionPlan, Bools, Int64s, Words, low_bits, ramp, segments
from fuser.kernels.planner import plan

_ROWS = max(WIDTHS)
_FAR = 1 << 40
"""Beyond the last key of any document."""


class _Groups(NamedTuple):
    """Groups as concatenated arrays, as :meth:`AttentionPlan.assemble` takes them."""

    head: Int64s
    phase: Int64s
    width: Int64s
    row_counts: Int64s
    rows: Int64s
    run_counts: Int64s
    runs: Int64s
    key_counts: Int64s
    keys: Int64s
    lanes: Words


def seeing(mask: Mask, q_lengths: Int64s, k_lengths: Int64s) -> Int64s:
    """How many of the last queries of each document stand at a key of it or behind; the others see nothing, unless the
    mask allows everything."""
    return np.where(k_lengths > 0, q_lengths, 0) if mask.allows_all else np.minimum(q_lengths, k_lengths)


def document_mask(mask: Mask, q_len: int, kv_len: int) -> Mask:
    """The mask of a document whose queries are the last of its keys."""
    return mask if mask.allows_all else mask.shift(kv_len - q_len)


def plan_documents(mask: Mask, q_bounds: Int64s, k_bounds: Int64s, target: Target | None = None) -> AttentionPlan:
    """The plan for documents that begin at rows ``q_bounds`` and keys ``k_bounds``; the last entries are the ends.

    Both (N + 1,) int64 ascend from zero. Query i of a document stands where key i + keys - queries does (see
    :func:`seeing`). Raises MaskError where the mask does not fit a document.
    """
    lengths, k_lengths = np.diff(q_bounds), np.diff(k_bounds)
    rows = seeing(mask, lengths, k_lengths)
    some = np.flatnonzero(rows)
    first = (q_bounds[1:] - rows)[some]
    documents = first, rows[some], k_bounds[:-1][some], k_lengths[some]
    around = band(mask)
    groups = _banded(*around, *documents) if around is not None else _side_by_side(mask, *documents, target)
    parts = [groups, *(_blind(q_bounds, lengths - rows, head) for head in range(mask.heads or 1))]
    joined = _Groups(*map(np.concatenate, zip(*parts, strict=True)))
    return AttentionPlan.assemble(int(q_bounds[-1]), int(k_bounds[-1]), mask.heads, **joined._asdict())


@dataclass(frozen=True)
class Documents:
    """Rows of documents one behind the other: row r is position r % ``length`` of document r // ``length``. ``rows``
    (R,) int64 ascend, ``is_key`` (R,) bool says which of them may be seen."""

    rows: Int64s
    length: int
    is_key: Bools

    def plan(self, mask: Mask) -> AttentionPlan:
        """The plan of rows that see the keys of their document that ``mask`` allows for its positions; of one phase,
        since programs have no scratch memory for what is known when it runs.

        Raises MaskError where the mask does not fit the length.
        """
        around = _band_at(mask, self.length)
        heads = None if around is not None else mask.heads
        if around is not None and not self._has_gaps:
            groups = self._of_band(*around)
        else:
            groups = self._one_by_one(mask)
        return AttentionPlan.assemble(len(self.rows), len(self.rows), heads, **groups._asdict())

    @functools.cached_property
    def _starts(self) -> Int64s:
        """Where documents begin, and the end."""
        starts = np.flatnonzero(np.diff(self.rows // self.length, prepend=-1))
        return np.append(starts, len(self.rows))

    @property
    def _has_gaps(self) -> bool:
        """Whether a row that may not be seen lies between two of its document that may."""
        places = np.flatnonzero(self.is_key)
        together = np.diff(self.rows[places] // self.length) == 0
        return bool((np.diff(places)[together] > 1).any())

    def _of_band(self, low: int, high: int) -> _Groups:
        places = np.flatnonzero(self.is_key)
        keys, begin = self.rows[places], self.rows // self.length * self.length
        at = self.rows - begin
        first = np.searchsorted(keys, begin + np.clip(at + low, 0, self.length))
        end = np.searchsorted(keys, begin + np.clip(at + high + 1, 0, self.length))
        first, last = np.append(places, len(self.rows))[first], np.insert(places, 0, -1)[end]
        return _of_intervals(self._starts[:-1], np.diff(self._starts), first, last)

    def _one_by_one(self, mask: Mask) -> _Groups:
        at = self.rows % self.length
        kinds: list[_Groups] = []
        numbers: dict[bytes, int] = {}
        which = []
        for start, stop in itertools.pairwise(self._starts.tolist()):
            positions, seen = at[start:stop], self.is_key[start:stop]
            name = positions.tobytes() + seen.tobytes()
            if name not in numbers:
                numbers[name] = len(kinds)
                kinds.append(_part(mask, self.length, positions.tobytes(), seen.tobytes()))
            which.append(numbers[name])
        return _beside(kinds, np.array(which, np.int64), self._starts[:-1], self._starts[:-1])


def sees(mask: Mask, is_key: Bools, position: int) -> bool:
    """Whether, in all entries of (B, S), a row at a position sees one of the keys there."""
    length = is_key.shape[1]
    around = _band_at(mask, length)
    if around is None:
        return bool((mask.dense(length, length)[..., position, :].numpy()[None] & is_key[:, None]).any(-1).all())
    low, high = around
    return bool(is_key[:, max(position + low, 0) : max(position + high + 1, 0)].any(1).all())


@functools.lru_cache(maxsize=64)
def _band_at(mask: Mask, length: int) -> tuple[int, int] | None:
    """The keys around each row that a mask allows at this length, if that is what it does."""
    found = band(mask)
    if found is None and mask.heads is None:
        allowed = mask.dense(length, length)
        pairs = allowed.nonzero()
        reach = pairs[:, 1] - pairs[:, 0]
        found = (int(reach.min()), int(reach.max())) if len(reach) else (length, length)
        steps = torch.arange(length)
        between = steps[None] - steps[:, None]
        found = found if torch.equal((between >= found[0]) & (between <= found[1]), allowed) else None
    return None if found is None else (max(-length, found[0]), min(length, found[1]))


@functools.lru_cache(maxsize=1024)
def _part(mask: Mask, length: int, positions: bytes, is_key: bytes) -> _Groups:
    """The groups of one document of some positions."""
    at = torch.from_numpy(np.frombuffer(positions, np.int64).copy())
    seen = torch.from_numpy(np.frombuffer(is_key, np.bool_).copy())
    allowed = mask.dense(length, length)[..., at[:, None], at] & seen
    return _groups_of(plan(from_dense(allowed), len(at), one_phase=True))


def _blind(q_bounds: Int64s, counts: Int64s, head: int) -> _Groups:
    """Groups of the first ``counts`` rows of each document, which give zeros."""
    rows = np.repeat(q_bounds[:-1], counts) + ramp(counts)
    sizes = np.minimum(_ROWS, len(rows) - np.arange(0, len(rows), _ROWS))
    zeros, none = np.zeros(len(sizes), np.int64), np.zeros(0, np.int64)
    width = np.full(len(sizes), _ROWS)
    runs = np.zeros((0, 3), np.int64)
    return _Groups(zeros + head, zeros, width, sizes, rows, zeros, runs, zeros, none, none.astype(np.uint64))


# ---- intervals that move with the row


def band(mask: Mask) -> tuple[int, int] | None:
    """The keys of a row relative to its own, from the first to the last, if that is what the mask says at all
    lengths."""
    if isinstance(mask, Dense):
        return -_FAR, _FAR
    if isinstance(mask, Causal):
        return -_FAR, mask.offset
    if isinstance(mask, SlidingWindow):
        return -mask.left, mask.right
    if isinstance(mask, And):
        bands = [band(operand) for operand in mask.operands]
        known = [band for band in bands if band is not None]
        low, high = max(low for low, _ in known or [(0, 0)]), min(high for _, high in known or [(0, 0)])
        if len(known) == len(bands) and low <= high:
            return low, high
    return None


def _banded(low: int, high: int, first: Int64s, rows: Int64s, k_first: Int64s, keys: Int64s) -> _Groups:
    """Groups of neighbouring rows that see the keys from ``low`` to ``high`` of their own."""
    document = np.repeat(np.arange(len(rows)), rows)
    # Where the row stands among its document's keys.
    at, count, offset = (keys - rows)[document] + ramp(rows), keys[document], k_first[document]
    begin, end = (np.clip(at + edge, 0, count) for edge in (low, high + 1))
    return _of_intervals(first, rows, offset + begin, offset + end - 1)


def _of_intervals(begin: Int64s, rows: Int64s, first: Int64s, last: Int64s) -> _Groups:
    """Groups of neighbouring rows: ``rows`` of a document from ``begin`` on, of which each sees the keys from its
    ``first`` to its ``last`` (sum of rows,). Both ascend."""
    counts = -(-rows // _ROWS)
    document = np.repeat(np.arange(len(rows)), counts)
    skipped = ramp(counts) * _ROWS
    size = np.minimum(_ROWS, rows[document] - skipped)
    top = (np.cumsum(rows) - rows)[document] + skipped
    bottom = top + size - 1
    seen, whole = (
        (start, np.maximum(start, stop + 1)) for start, stop in ((first[top], last[bottom]), (first[bottom], last[top]))
    )
    has_run = whole[1] > whole[0]
    # What lies before the keys that all rows see, and behind; everything where there are none of these.
    before = np.where(has_run, whole[0], seen[1]) - seen[0]
    key_counts = before + np.where(has_run, seen[1] - whole[1], 0)
    group, key = np.repeat(np.arange(len(size)), key_counts), ramp(key_counts)
    key += np.where(key < before[group], seen[0][group], (whole[1] - before)[group])
    lowest = np.maximum(0, np.searchsorted(last, key) - top[group])
    highest = np.minimum(size[group], np.searchsorted(first, key, side="right") - top[group])
    # Between intervals there may be keys that no row sees.
    is_seen = highest > lowest
    group, key, lowest, highest = (values[is_seen] for values in (group, key, lowest, highest))
    lanes = low_bits(highest) & ~(low_bits(lowest + 1) >> np.uint64(1))
    runs = np.stack([whole[0], whole[1] - whole[0], np.ones_like(top)], axis=1)[has_run]
    zeros = np.zeros(len(size), np.int64)
    width = np.array(WIDTHS)[np.searchsorted(WIDTHS, size)]
    members = np.repeat(begin[document] + skipped, size) + ramp(size)
    key_counts = np.bincount(group, minlength=len(size))
    return _Groups(zeros, zeros, width, size, members, has_run.astype(np.int64), runs, key_counts, key, lanes)


# ---- plans side by side


@functools.lru_cache(maxsize=1024)
def _document(mask: Mask, q_len: int, kv_len: int, target: Target | None) -> _Groups:
    """The groups of one document by itself."""
    return _groups_of(plan(document_mask(mask, q_len, kv_len), q_len, kv_len, target))


def _groups_of(made: AttentionPlan) -> _Groups:
    a = made._arrays
    row_ptr, run_ptr, key_ptr = (a[name].astype(np.int64) for name in ("row_ptr", "run_ptr", "key_ptr"))
    head, phase, width, rows, keys = (a[name].astype(np.int64) for name in ("head", "phase", "width", "row", "key"))
    runs = a["run"].reshape(-1, 3).astype(np.int64)
    lanes = a["lanes"].view(np.uint64)
    return _Groups(head, phase, width, np.diff(row_ptr), rows, np.diff(run_ptr), runs, np.diff(key_ptr), keys, lanes)


def _side_by_side(
    mask: Mask, first: Int64s, rows: Int64s, k_first: Int64s, keys: Int64s, target: Target | None
) -> _Groups:
    """The groups of every document's own plan."""
    lengths, which = np.unique(np.stack([rows, keys], axis=1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    kinds: Sequence[_Groups] = [_document(mask, n, m, target) for n, m in lengths.tolist()]
    return _beside(kinds, which, first, k_first)


def _beside(kinds: Sequence[_Groups], which: Int64s, first: Int64s, k_first: Int64s) -> _Groups:
    """Groups of documents, ``which`` of the ``kinds`` they are, from these rows and keys on."""
    if not kinds:
        return _blind(np.zeros(1, np.int64), np.zeros(0, np.int64), 0)
    sizes = np.array([len(kind.head) for kind in kinds])
    all_kinds = _Groups(*map(np.concatenate, zip(*kinds, strict=True)))
    picked = segments(sizes, which)
    document = np.repeat(np.arange(len(which)), sizes[which])
    row_counts, run_counts, key_counts = (
        counts[picked] for counts in (all_kinds.row_counts, all_kinds.run_counts, all_kinds.key_counts)
    )
    runs = all_kinds.runs[segments(all_kinds.run_counts, picked)]
    runs[:, 0] += np.repeat(k_first[document], run_counts)
    partial = segments(all_kinds.key_counts, picked)
    return _Groups(
        all_kinds.head[picked],
        all_kinds.phase[picked],
        all_kinds.width[picked],
        row_counts,
        all_kinds.rows[segments(all_kinds.row_counts, picked)] + np.repeat(first[document], row_counts),
        run_counts,
        runs,
        key_counts,
        all_kinds.keys[partial] + np.repeat(k_first[document], key_counts),
        all_kinds.lanes[partial],
    )
