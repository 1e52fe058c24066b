"""Covers: groups of query rows with their runs and partial keys, at the widths that cost least.

Rows are arranged in *slots*, an ``order`` (S,) of row numbers with S a multiple of 64 and -1 where a slot is idle. A
group is an aligned part of 16, 32 or 64 slots whose rows have no idle slots between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fuser.ir.masks.structure import Part
from fuser.kernels.plan import WIDTHS, Bools, Int64s, Words, pointers, ramp, segments, vectors

SPAN = max(WIDTHS)
_FAR = 1 << 40
"""Beyond all keys."""


@dataclass(frozen=True)
class GroupCost:
    """Time of a group in units of one key against one vector of 16 lanes.

    ``setup`` is the cost of loading and storing one vector of rows, ``group`` that of starting a group, ``key`` of
    fetching a key, whatever the width, ``partial`` of applying a word of lanes to a vector, and ``range`` of a block of
    keys for some vectors only. Whether vectors that no row of a partial key needs are left out is ``skips``. The
    numbers are estimates.
    """

    group: float = 1.0
    setup: float = 20.0
    key: float = 0.4
    partial: float = 0.04
    range: float = 3.0
    skips: bool = True

    def __call__(
        self, width: int, full: Int64s, partial: Int64s, needed: Int64s, ranges: Int64s
    ) -> npt.NDArray[np.float64]:
        """Cost of groups with so many keys; nothing for groups without keys, which are left out.

        ``needed`` counts the vectors that partial keys concern, and ``ranges`` how many sets of them there are.
        """
        vectors = width // 16
        keys = full + partial
        some = needed + self.range * ranges if self.skips else vectors * partial
        cost: npt.NDArray[np.float64] = (
            self.group + vectors * (self.setup + full) + (1 + self.partial) * some + self.key * keys
        ) * (keys > 0)
        return cost


COSTS: Mapping[str, GroupCost] = {
    "cpu": GroupCost(),
    # A block of threads has 64 rows whether they are used or not, and its start and end last as long as two steps.
    "cuda": GroupCost(group=512.0, setup=24.0, key=4.0, partial=0.05, skips=False),
}
"""Costs of groups by the kind of target."""


class Cover(NamedTuple):
    """Groups of one width: their first ``slots``, runs (N, 3) and partial keys with lanes, each with counts a group."""

    width: int
    slots: Int64s
    run_counts: Int64s
    runs: Int64s
    key_counts: Int64s
    keys: Int64s
    lanes: Words

    def cost(self, model: GroupCost) -> npt.NDArray[np.float64]:
        group = np.repeat(np.arange(len(self.run_counts)), self.run_counts)
        groups = len(self.run_counts)
        full = np.bincount(group, weights=self.runs[:, 1], minlength=groups).astype(np.int64)
        first, last = vectors(self.lanes)
        group = np.repeat(np.arange(groups), self.key_counts)
        needed = np.bincount(group, weights=last - first, minlength=groups).astype(np.int64)
        kinds = np.zeros((groups, 20), np.bool_)
        kinds[group, 4 * (last - first) + first] = True
        return model(self.width, full, self.key_counts, needed, kinds.sum(axis=1))

    def take(self, chosen: Bools) -> Cover:
        by_run, by_key = np.repeat(chosen, self.run_counts), np.repeat(chosen, self.key_counts)
        return Cover(
            self.width,
            self.slots[chosen],
            self.run_counts[chosen],
            self.runs[by_run],
            self.key_counts[chosen],
            self.keys[by_key],
            self.lanes[by_key],
        )


def identity(rows: int) -> Int64s:
    """The order that leaves rows where they are."""
    order = np.full(-(-rows // SPAN) * SPAN, -1)
    order[:rows] = np.arange(rows)
    return order


def by_class(rows: Int64s, labels: Int64s) -> Int64s:
    """The order that puts rows of equal label together, each class in spans of its own.

    Idle slots come first in a class: where rows see the keys before them, the group that is not full has fewest keys.
    """
    sort = np.argsort(labels, kind="stable")
    _, sizes = np.unique(labels, return_counts=True)
    starts = pointers(-(-sizes // SPAN) * SPAN)
    order = np.full(int(starts[-1]), -1)
    order[np.repeat(starts[:-1] + -sizes % min(WIDTHS), sizes) + ramp(sizes)] = rows[sort]
    return order


def divide(options: Sequence[Cover], model: GroupCost) -> tuple[list[Cover], npt.NDArray[np.float64]]:
    """Each span at its cheapest division among covers of all ``WIDTHS``, and the cost of every span."""
    best = options[0].cost(model)
    divided = [np.ones(len(best), np.bool_)]
    for option in options[1:]:
        whole, parts = option.cost(model), best.reshape(-1, 2).sum(axis=1)
        divided.append(whole <= parts)
        best = np.minimum(whole, parts)
    blocked = np.zeros(len(divided[-1]), np.bool_)
    chosen = []
    for option, wanted in zip(reversed(options), reversed(divided), strict=True):
        blocked = np.repeat(blocked, len(wanted) // max(1, len(blocked)))
        picked = wanted & ~blocked
        chosen.append(option.take(picked & (option.run_counts + option.key_counts > 0)))
        blocked = blocked | picked
    return chosen, best


def from_parts(parts: Sequence[Part], order: Int64s, model: GroupCost) -> tuple[list[Cover], float]:
    """The cheapest cover of the progressions of the rows in ``order``: between two ends the same lanes are allowed.

    Spans whose keys are those of another one, moved, are covered as that one is.
    """
    if not parts:
        return [], 0.0
    spans = _Spans.of(parts, order)
    kinds, which = spans.kinds()
    used = np.flatnonzero(spans.count[:, kinds] > 0)
    part, slot = np.divmod(used, max(1, len(kinds) * SPAN))
    start, count = (values[:, kinds].reshape(-1)[used] for values in (spans.start, spans.count))
    step = spans.step[part]
    first, residue = np.divmod(start, step)
    lattices, lattice = np.unique(step << 31 | residue, return_inverse=True)
    pairs = np.stack([lattices >> 31, lattices & (1 << 31) - 1], axis=1)
    valid = spans.valid[kinds].reshape(-1)
    options = [_from_progressions(slot, first, count, lattice, pairs, valid, width) for width in WIDTHS]
    covers, costs = divide(options, model)
    return [spans.cover(made, len(kinds), which) for made in covers], float(costs[which].sum())


@dataclass(frozen=True, eq=False)
class _Spans:
    """The progressions of all spans, their keys moved together to where the first is 0 and gaps are short.

    ``start``, ``count`` are (parts, spans, 64), ``step`` is (parts,), ``valid`` (spans, 64) says which slots have rows.
    Keys from ``begin`` (spans, parts), ascending, on have been moved by ``moved`` (spans, parts).
    """

    start: Int64s
    count: Int64s
    step: Int64s
    valid: Bools
    begin: Int64s
    moved: Int64s

    @classmethod
    def of(cls, parts: Sequence[Part], order: Int64s) -> _Spans:
        slots = order.reshape(-1, SPAN)
        valid = slots >= 0
        rows = np.where(valid, slots, 0)
        start = np.stack([part.start[rows] for part in parts])
        count = np.stack([np.where(valid, part.count[rows], 0) for part in parts])
        step = np.array([part.step for part in parts])
        has_keys = count > 0
        low = np.where(has_keys, start, _FAR).min(axis=2, initial=_FAR)
        high = np.where(has_keys, start + (count - 1) * step[:, None, None], -1).max(axis=2, initial=-1)
        high[low == _FAR] = _FAR
        by_low = np.argsort(low, axis=0)
        low, high = np.take_along_axis(low, by_low, 0), np.maximum.accumulate(np.take_along_axis(high, by_low, 0))
        # Runs do not touch across more than a step.
        gap = int(step.max()) + 1
        removed = low.copy()
        removed[1:] = np.maximum(0, low[1:] - high[:-1] - gap)
        moved = np.cumsum(removed, axis=0)
        of_part = np.empty_like(moved)
        np.put_along_axis(of_part, by_low, moved, 0)
        return cls(np.where(has_keys, start - of_part[..., None], 0), count, step, valid, (low - moved).T, moved.T)

    def kinds(self) -> tuple[Int64s, Int64s]:
        """Spans of which all others are repetitions, and for every span the position of its like among these."""
        spans = len(self.valid)
        draw = np.random.default_rng(0).integers(1, 1 << 62, (2, len(self.step) + 1, SPAN), np.int64)
        words = np.concatenate([self.start, self.valid[None].astype(np.int64)]), self.count
        sums = sum(np.einsum("psl,pl->s", word, drawn[: len(word)]) for word, drawn in zip(words, draw, strict=True))
        _, kinds, which = np.unique(sums, return_index=True, return_inverse=True)
        like = kinds[which]
        same = np.array_equal(self.start, self.start[:, like]) and np.array_equal(self.count, self.count[:, like])
        if same and np.array_equal(self.valid, self.valid[like]):
            return kinds, which
        return np.arange(spans), np.arange(spans)

    def cover(self, made: Cover, kinds: int, which: Int64s) -> Cover:
        """The cover of all spans from that of the ``kinds`` of spans, every span of the kind ``which``."""
        groups = np.bincount(made.slots // SPAN, minlength=kinds)
        picked, span = segments(groups, which), np.repeat(np.arange(len(which)), groups[which])
        run_counts, key_counts = made.run_counts[picked], made.key_counts[picked]
        runs, partial = made.runs[segments(made.run_counts, picked)], segments(made.key_counts, picked)
        runs[:, 0] = self._back(runs[:, 0], np.repeat(span, run_counts))
        keys = self._back(made.keys[partial], np.repeat(span, key_counts))
        slots = made.slots[picked] % SPAN + span * SPAN
        return Cover(made.width, slots, run_counts, runs, key_counts, keys, made.lanes[partial])

    def _back(self, keys: Int64s, span: Int64s) -> Int64s:
        """Keys of spans where they were."""
        if self.begin.shape[1] == 1:
            first: Int64s = keys + self.moved[span, 0]
            return first
        limit = max(int(keys.max(initial=0)), int(self.begin.max(initial=0))) + 1
        begin = (self.begin + limit * np.arange(len(self.begin))[:, None]).reshape(-1)
        back: Int64s = keys + self.moved.reshape(-1)[np.searchsorted(begin, keys + limit * span, side="right") - 1]
        return back


def _lanes(valid: Bools, width: int) -> tuple[Words, Words]:
    """For groups of this width the number of idle slots before their rows, and the word of all their rows."""
    valid = valid.reshape(-1, width)
    size, lead = valid.sum(axis=1), valid.argmax(axis=1)
    full = np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - np.maximum(size, 1)).astype(np.uint64)
    return lead.astype(np.uint64), np.where(size > 0, full, np.uint64(0))


def _from_progressions(
    slot: Int64s, first: Int64s, count: Int64s, lattice: Int64s, lattices: Int64s, valid: Bools, width: int
) -> Cover:
    """Groups from progressions ``first <= t < first + count`` on lattices (step, residue)."""
    lead, every = _lanes(valid, width)
    groups = len(every)
    group = slot // width
    lane = np.uint64(1) << ((slot % width).astype(np.uint64) - lead[group])
    kinds = max(1, len(lattices))
    limit = int((first + count).max(initial=0)) + 1
    # A progression turns its lane on at its first key and off after its last.
    at = (group * kinds + lattice) * limit + first
    at, toggle = np.concatenate([at, at + count]), np.concatenate([lane, lane])
    sort = np.argsort(at, kind="stable")
    at, lanes = at[sort], np.bitwise_xor.accumulate(toggle[sort])
    length = np.diff(at, append=at[-1:])
    used = (length > 0) & (lanes != 0)
    at, lanes, length = at[used], lanes[used], length[used]
    block, first = np.divmod(at, limit)
    group, lattice = np.divmod(block, kinds)
    full = lanes == every[group]

    run_at, run_length = at[full], length[full]
    # Runs that touch are one run.
    joins = np.zeros(len(run_at), np.bool_)
    joins[1:] = run_at[1:] == run_at[:-1] + run_length[:-1]
    head = np.flatnonzero(~joins)
    run_length = np.add.reduceat(run_length, head) if len(head) else run_length[:0]
    step, residue = lattices[lattice[full][head]].T
    runs = np.stack([residue + first[full][head] * step, run_length, np.where(run_length > 1, step, 1)], axis=1)

    spans = length[~full]
    step, residue = lattices[lattice[~full]].T
    keys = np.repeat(residue + first[~full] * step, spans) + ramp(spans) * np.repeat(step, spans)
    key_group, lanes = np.repeat(group[~full], spans), np.repeat(lanes[~full], spans)
    if kinds > 1 and len(keys):
        # Rows of a group may see a key by way of different lattices.
        place = key_group * (int(keys.max()) + 1) + keys
        sort = np.argsort(place, kind="stable")
        once = np.flatnonzero(np.diff(place[sort], prepend=-1))
        keys, key_group, lanes = keys[sort][once], key_group[sort][once], np.bitwise_or.reduceat(lanes[sort], once)
    return Cover(
        width,
        np.arange(groups) * width,
        np.bincount(group[full][head], minlength=groups),
        runs,
        np.bincount(key_group, minlength=groups),
        keys,
        lanes,
    )


def from_blocks(blocks: Bools, order: Int64s, step: int, model: GroupCost) -> tuple[list[Cover], float]:
    """The cheapest cover of entries (S, kv_len) in the ``order`` of slots; full keys ``step`` apart become runs."""
    spans, keys = len(order) // SPAN, blocks.shape[1]
    # As np.packbits(axis=1, bitorder="little"), which is slow along columns.
    octets = blocks.view(np.uint8).reshape(spans, SPAN // 8, 8, keys)
    packed = octets[:, :, 0].copy()
    for bit in range(1, 8):
        packed |= octets[:, :, bit] << np.uint8(bit)
    options = []
    for width in WIDTHS:
        lead, every = _lanes(order >= 0, width)
        parts = packed.reshape(len(every), width // 8, keys)
        seen = np.flatnonzero(parts.any(axis=1))
        group, key = np.divmod(seen, max(1, keys))
        lanes = np.zeros(len(seen), np.uint64)
        for byte in range(width // 8):
            lanes |= parts[:, byte].reshape(-1)[seen].astype(np.uint64) << np.uint64(8 * byte)
        lanes >>= lead[group]
        full = lanes == every[group]
        runs, run_counts = _runs(group[full], key[full], len(every), step)
        options.append(
            Cover(
                width,
                np.arange(len(every)) * width,
                run_counts,
                runs,
                np.bincount(group[~full], minlength=len(every)),
                key[~full],
                lanes[~full],
            )
        )
    covers, costs = divide(options, model)
    return covers, float(costs.sum())


def _runs(group: Int64s, key: Int64s, groups: int, step: int) -> tuple[Int64s, Int64s]:
    """Ascending keys of groups as runs of this step: (N, 3), and how many each group has."""
    follows = np.zeros(len(key), np.bool_)
    follows[1:] = (np.diff(key) == step) & (np.diff(group) == 0)
    head = np.flatnonzero(~follows)
    count = np.diff(np.append(head, len(key)))
    runs = np.stack([key[head], count, np.where(count > 1, step, 1)], axis=1)
    return runs, np.bincount(group[head], minlength=groups)
