"""Covers: groups of query rows with their runs and partial keys, at the widths that cost least.

Rows are arranged in *slots*, an ``order`` (S,) of row numbers with S a multiple of 64 and -1 where a slot is idle. A
group is an aligned part of 16, 32 or 64 slots whose rows have no idle slots between them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fuser.ir.masks.structure import Part
from fuser.kernels.plan import WIDTHS, Bools, Int64s, Words, low_bits, pointers, ramp, segments, vectors

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
        self, width: Int64s, full: Int64s, partial: Int64s, needed: Int64s, ranges: Int64s
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
    """Groups: the ``width`` and the first of the ``slots`` of each, runs (N, 3) and partial keys with lanes, each with
    counts a group."""

    width: Int64s
    slots: Int64s
    run_counts: Int64s
    runs: Int64s
    key_counts: Int64s
    keys: Int64s
    lanes: Words

    def cost(self, model: GroupCost) -> npt.NDArray[np.float64]:
        groups = len(self.width)
        group = np.repeat(np.arange(groups), self.run_counts)
        full = np.bincount(group, weights=self.runs[:, 1], minlength=groups).astype(np.int64)
        first, last = vectors(self.lanes)
        group = np.repeat(np.arange(groups), self.key_counts)
        needed = np.bincount(group, weights=last - first, minlength=groups).astype(np.int64)
        kinds = np.zeros((groups, 20), np.bool_)
        kinds[group, 4 * (last - first) + first] = True
        return model(self.width, full, self.key_counts, needed, kinds.sum(axis=1))

    def take(self, groups: Int64s) -> Cover:
        """These groups, in this order; a group may be taken more than once."""
        by_run, by_key = segments(self.run_counts, groups), segments(self.key_counts, groups)
        return Cover(
            self.width[groups],
            self.slots[groups],
            self.run_counts[groups],
            self.runs[by_run],
            self.key_counts[groups],
            self.keys[by_key],
            self.lanes[by_key],
        )


class _Groups(NamedTuple):
    """The groups of all ``WIDTHS``, width by width, that so many slots have: what does not depend on their keys.

    ``lead`` counts the idle slots before the rows of a group, ``every`` is the word of all its rows.
    """

    width: Int64s
    slots: Int64s
    lead: Words
    every: Words

    @classmethod
    def of(cls, valid: Bools) -> _Groups:
        """Of slots (S,) that are ``valid`` where they have a row."""
        leads, sizes = [], []
        for width in WIDTHS:
            grouped = valid.reshape(-1, width)
            sizes.append(np.count_nonzero(grouped, axis=1))
            leads.append(grouped.argmax(axis=1))
        size, lead = np.concatenate(sizes), np.concatenate(leads)
        widths = np.repeat(WIDTHS, [len(valid) // width for width in WIDTHS])
        slots = np.concatenate([np.arange(0, len(valid), width) for width in WIDTHS])
        every = np.where(size > 0, low_bits(np.maximum(size, 1)), np.uint64(0))
        return cls(widths, slots, lead.astype(np.uint64), every)


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


def divide(options: Cover, model: GroupCost) -> tuple[Int64s, npt.NDArray[np.float64]]:
    """The groups of each span's cheapest division, by span, and the cost of every span; ``options`` are the groups of
    all ``WIDTHS``, width by width."""
    costs = np.split(options.cost(model), np.searchsorted(options.width, WIDTHS[1:]))
    best = costs[0]
    divided = [np.ones(len(best), np.bool_)]
    for whole in costs[1:]:
        parts = best.reshape(-1, 2).sum(axis=1)
        divided.append(whole <= parts)
        best = np.minimum(whole, parts)
    blocked = np.zeros(len(best), np.bool_)
    picked = []
    for wanted in reversed(divided):
        blocked = np.repeat(blocked, len(wanted) // max(1, len(blocked)))
        picked.append(wanted & ~blocked)
        blocked = blocked | picked[-1]
    chosen = np.flatnonzero(np.concatenate(picked[::-1]) & (options.run_counts + options.key_counts > 0))
    return chosen[np.argsort(options.slots[chosen])], best


def from_parts(parts: Sequence[Part], order: Int64s, model: GroupCost) -> tuple[Cover | None, float]:
    """The cheapest cover of the progressions of the rows in ``order``: between two ends the same lanes are allowed.

    Spans whose keys are those of another one, moved, are covered as that one is. None for no progressions.
    """
    if not parts:
        return None, 0.0
    spans = _Spans.of(parts, order)
    kinds, which = spans.kinds()
    used = np.flatnonzero(spans.count[:, kinds])
    part, slot = _divided(used, max(1, len(kinds) * SPAN))
    start, count = (values[:, kinds].reshape(-1)[used] for values in (spans.start, spans.count))
    step = spans.step[part]
    first, residue = np.divmod(start, step)
    lattices, lattice = np.unique(step << 31 | residue, return_inverse=True)
    pairs = np.stack([lattices >> 31, lattices & (1 << 31) - 1], axis=1)
    options = _from_progressions(slot, first, count, lattice, pairs, _Groups.of(spans.valid[kinds].reshape(-1)))
    chosen, costs = divide(options, model)
    return spans.cover(options, chosen, len(kinds), which), float(costs[which].sum())


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
        moved = of_part = low
        if len(parts) > 1:
            high = np.where(has_keys, start + (count - 1) * step[:, None, None], -1).max(axis=2, initial=-1)
            high[low == _FAR] = _FAR
            by_low = np.argsort(low, axis=0)
            low = np.take_along_axis(low, by_low, 0)
            high = np.maximum.accumulate(np.take_along_axis(high, by_low, 0))
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
        draw = _draw(len(self.step) + 1)
        words = np.concatenate([self.start, self.valid[None].astype(np.int64)]), self.count
        sums = sum(np.einsum("psl,pl->s", word, drawn[: len(word)]) for word, drawn in zip(words, draw, strict=True))
        _, kinds, which = np.unique(sums, return_index=True, return_inverse=True)
        like = kinds[which]
        same = np.array_equal(self.start, self.start[:, like]) and np.array_equal(self.count, self.count[:, like])
        if same and np.array_equal(self.valid, self.valid[like]):
            return kinds, which
        return np.arange(spans), np.arange(spans)

    def cover(self, options: Cover, chosen: Int64s, kinds: int, which: Int64s) -> Cover:
        """The cover of all spans from the ``chosen`` groups, by span, of the ``kinds`` of spans; every span is of the
        kind ``which``."""
        groups = np.bincount(options.slots[chosen] // SPAN, minlength=kinds)
        made, span = options.take(chosen[segments(groups, which)]), np.repeat(np.arange(len(which)), groups[which])
        made.runs[:, 0] = self._back(made.runs[:, 0], np.repeat(span, made.run_counts))
        keys = self._back(made.keys, np.repeat(span, made.key_counts))
        return made._replace(slots=made.slots % SPAN + span * SPAN, keys=keys)

    def _back(self, keys: Int64s, span: Int64s) -> Int64s:
        """Keys of spans where they were."""
        if self.begin.shape[1] == 1:
            first: Int64s = keys + self.moved[span, 0]
            return first
        limit = max(int(keys.max(initial=0)), int(self.begin.max(initial=0))) + 1
        begin = (self.begin + limit * np.arange(len(self.begin))[:, None]).reshape(-1)
        back: Int64s = keys + self.moved.reshape(-1)[np.searchsorted(begin, keys + limit * span, side="right") - 1]
        return back


@functools.cache
def _draw(words: int) -> Int64s:
    """Factors whose sums of products tell spans apart: two sets of (words, SPAN)."""
    return np.random.default_rng(0).integers(1, 1 << 62, (2, words, SPAN), np.int64)


def _divided(values: Int64s, by: int) -> tuple[Int64s, Int64s]:
    """As np.divmod, which takes no advantage of a divisor that is one number."""
    quotient = values // by
    return quotient, values - quotient * by


def _from_progressions(
    slot: Int64s, first: Int64s, count: Int64s, lattice: Int64s, lattices: Int64s, of: _Groups
) -> Cover:
    """Groups from progressions ``first <= t < first + count`` of slots on lattices (step, residue)."""
    groups = len(of.width)
    before = np.searchsorted(of.width, WIDTHS)
    group = np.concatenate([slot // width + start for width, start in zip(WIDTHS, before.tolist(), strict=True)])
    slot, first, count, lattice = (np.tile(values, len(WIDTHS)) for values in (slot, first, count, lattice))
    lane = np.uint64(1) << ((slot - of.slots[group]).astype(np.uint64) - of.lead[group])
    kinds = max(1, len(lattices))
    limit = int((first + count).max(initial=0)) + 1
    # A progression turns its lane on at its first key and off after its last.
    at = (group * kinds + lattice) * limit + first
    at, toggle = np.concatenate([at, at + count]), np.concatenate([lane, lane])
    sort = np.argsort(at)
    at, lanes = at[sort], np.bitwise_xor.accumulate(toggle[sort])
    length = np.diff(at, append=at[-1:])
    used = (length > 0) & (lanes != 0)
    at, lanes, length = at[used], lanes[used], length[used]
    block, first = _divided(at, limit)
    group, lattice = _divided(block, kinds)
    full = lanes == of.every[group]

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
        sort = np.argsort(place)
        once = np.flatnonzero(np.diff(place[sort], prepend=-1))
        keys, key_group, lanes = keys[sort][once], key_group[sort][once], np.bitwise_or.reduceat(lanes[sort], once)
    return Cover(
        of.width,
        of.slots,
        np.bincount(group[full][head], minlength=groups),
        runs,
        np.bincount(key_group, minlength=groups),
        keys,
        lanes,
    )


def from_blocks(blocks: Bools, order: Int64s, step: int, model: GroupCost) -> Cover:
    """The cheapest cover of entries (S, kv_len) in the ``order`` of slots; full keys ``step`` apart become runs."""
    spans, keys = len(order) // SPAN, blocks.shape[1]
    # As np.packbits(axis=1, bitorder="little"), which is slow along columns.
    octets = blocks.view(np.uint8).reshape(spans, SPAN // 8, 8, keys)
    packed = octets[:, :, 0].copy()
    for bit in range(1, 8):
        packed |= octets[:, :, bit] << np.uint8(bit)
    of = _Groups.of(order >= 0)
    found = []
    for width in WIDTHS:
        parts = packed.reshape(len(order) // width, width // 8, keys)
        seen = np.flatnonzero(parts.any(axis=1))
        lanes = np.zeros(len(seen), np.uint64)
        for byte in range(width // 8):
            lanes |= parts[:, byte].reshape(-1)[seen].astype(np.uint64) << np.uint64(8 * byte)
        found.append((len(parts), *np.divmod(seen, max(1, keys)), lanes))
    sizes, groups, seen_keys, words = zip(*found, strict=True)
    group = np.concatenate(
        [own + start for own, start in zip(groups, pointers(np.array(sizes)).tolist(), strict=False)]
    )
    key, lanes = np.concatenate(seen_keys), np.concatenate(words) >> of.lead[group]
    full = lanes == of.every[group]
    runs, run_counts = _runs(group[full], key[full], len(of.width), step)
    key_counts = np.bincount(group[~full], minlength=len(of.width))
    options = Cover(of.width, of.slots, run_counts, runs, key_counts, key[~full], lanes[~full])
    return options.take(divide(options, model)[0])


def _runs(group: Int64s, key: Int64s, groups: int, step: int) -> tuple[Int64s, Int64s]:
    """Ascending keys of groups as runs of this step: (N, 3), and how many each group has."""
    follows = np.zeros(len(key), np.bool_)
    follows[1:] = (np.diff(key) == step) & (np.diff(group) == 0)
    head = np.flatnonzero(~follows)
    count = np.diff(np.append(head, len(key)))
    runs = np.stack([key[head], count, np.where(count > 1, step, 1)], axis=1)
    return runs, np.bincount(group[head], minlength=groups)
