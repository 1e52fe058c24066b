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
from fuser.kernels.plan import WIDTHS, Bools, Int64s, Words, pointers, ramp, vectors

SPAN = max(WIDTHS)


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


def divide(options: Sequence[Cover], model: GroupCost) -> tuple[list[Cover], float]:
    """Each span at its cheapest division among covers of all ``WIDTHS``, and the cost of the whole."""
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
    return chosen, float(best.sum())


def from_parts(parts: Sequence[Part], order: Int64s, model: GroupCost) -> tuple[list[Cover], float]:
    """The cheapest cover of the progressions of the rows in ``order``: between two ends the same lanes are allowed."""
    slot_of = np.full(max([int(order.max(initial=-1)) + 1, *(len(part.start) for part in parts)]), -1)
    slot_of[order[order >= 0]] = np.flatnonzero(order >= 0)
    pieces = [np.zeros((5, 0), np.int64)]
    for part in parts:
        used = np.flatnonzero((part.count > 0) & (slot_of >= 0))
        first, residue = np.divmod(part.start[used], part.step)
        step = np.full(len(used), part.step)
        pieces.append(np.stack([slot_of[used], first, part.count[used], residue, step]))
    slot, first, count, residue, step = np.concatenate(pieces, axis=1)
    lattices, lattice = np.unique(np.stack([step, residue], axis=1), axis=0, return_inverse=True)
    options = [_from_progressions(slot, first, count, lattice.reshape(-1), lattices, order, width) for width in WIDTHS]
    return divide(options, model)


def _lanes(order: Int64s, width: int) -> tuple[Words, Words]:
    """For groups of this width the number of idle slots before their rows, and the word of all their rows."""
    valid = (order >= 0).reshape(-1, width)
    size, lead = valid.sum(axis=1), valid.argmax(axis=1)
    full = np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - np.maximum(size, 1)).astype(np.uint64)
    return lead.astype(np.uint64), np.where(size > 0, full, np.uint64(0))


def _from_progressions(
    slot: Int64s, first: Int64s, count: Int64s, lattice: Int64s, lattices: Int64s, order: Int64s, width: int
) -> Cover:
    """Groups from progressions ``first <= t < first + count`` on lattices (step, residue)."""
    lead, every = _lanes(order, width)
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
        lead, every = _lanes(order, width)
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
    return divide(options, model)


def _runs(group: Int64s, key: Int64s, groups: int, step: int) -> tuple[Int64s, Int64s]:
    """Ascending keys of groups as runs of this step: (N, 3), and how many each group has."""
    follows = np.zeros(len(key), np.bool_)
    follows[1:] = (np.diff(key) == step) & (np.diff(group) == 0)
    head = np.flatnonzero(~follows)
    count = np.diff(np.append(head, len(key)))
    runs = np.stack([key[head], count, np.where(count > 1, step, 1)], axis=1)
    return runs, np.bincount(group[head], minlength=groups)
