"""The structure of masks without a closed form, found in their entries.

Candidates are arrangements of rows in which neighbours see the same keys: as they are (bands, blocks, dense columns and
rows), by residue modulo a frequent distance of keys (strides, dilation), and by signature (rows with like columns,
wherever they are). Every allowed pair goes to the arrangement in which most neighbours share its key. A sample of the
columns decides which arrangements pay; the cover is taken from all entries, and so is exact whatever was detected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fuser.kernels.cover import SPAN, Cover, GroupCost, by_class, from_blocks, identity
from fuser.kernels.plan import WIDTHS, Bools, Int64s

_LANES = min(WIDTHS)
_COLUMNS = 512
"""Columns on which arrangements are compared."""
_ENTRIES = 1 << 25
"""Entries that are looked at together."""
_PHASES = 3
_GAIN = 0.95
"""A further phase must bring the cost below this share."""


class _Arrangement(NamedTuple):
    """Rows in slots, the slot of every row, and the distance of keys that its groups share."""

    order: Int64s
    slot: Int64s
    step: int

    @classmethod
    def of(cls, order: Int64s, rows: int, step: int = 1) -> _Arrangement:
        slot = np.zeros(rows, np.int64)
        slot[order[order >= 0]] = np.flatnonzero(order >= 0)
        return cls(order, slot, step)

    def counts(self, entries: Bools) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """For every 16 slots, how many of their rows see each column: uint8 (S / 16, K)."""
        out = np.empty((len(self.order) // _LANES, entries.shape[1]), np.uint8)
        for start, stop in _slices(len(self.order), entries.shape[1]):
            block = _gather(entries, self.order[start:stop])
            block.view(np.uint8).reshape(-1, _LANES, entries.shape[1]).sum(
                axis=1, dtype=np.uint8, out=out[start // _LANES : stop // _LANES]
            )
        return out


def detect(entries: Bools, model: GroupCost, *, one_phase: bool = False) -> Iterator[tuple[Int64s, int, Cover | None]]:
    """Groups that cover ``entries`` (q_len, kv_len): order of slots, phase and cover, a slice of slots at a time.

    With ``one_phase``, neighbouring rows are together where it would take several.
    """
    n, m = entries.shape
    chosen = _choose(entries, model)
    if one_phase and len(chosen) > 1:
        chosen = [_Arrangement.of(identity(n), n)]
    counts = [arrangement.counts(entries) for arrangement in chosen] if len(chosen) > 1 else []
    for phase, arrangement in enumerate(chosen):
        for start, stop in _slices(len(arrangement.order), m):
            order = arrangement.order[start:stop]
            blocks = _gather(entries, order)
            if counts:
                rows = np.maximum(order, 0)
                own = counts[phase][arrangement.slot[rows] // _LANES]
                for other, theirs in enumerate(chosen):
                    if other != phase:
                        shared = counts[other][theirs.slot[rows] // _LANES]
                        blocks &= own > shared if other < phase else own >= shared
            yield order, phase, from_blocks(blocks, order, arrangement.step, model)


def _slices(slots: int, width: int) -> Iterator[tuple[int, int]]:
    size = max(1, _ENTRIES // max(1, width) // SPAN) * SPAN
    for start in range(0, slots, size):
        yield start, min(start + size, slots)


def _gather(entries: Bools, order: Int64s) -> Bools:
    """Entries of the rows in slots, False in idle ones."""
    blocks: Bools = entries[np.maximum(order, 0)]
    blocks[order < 0] = False
    return blocks


def _choose(entries: Bools, model: GroupCost) -> list[_Arrangement]:
    """The arrangements, one a phase, whose common cost on a sample of the columns is lowest."""
    n, m = entries.shape
    rng = np.random.default_rng(0)
    columns = np.sort(rng.choice(m, min(m, _COLUMNS), replace=False))
    sample = np.ascontiguousarray(entries[:, columns])
    scale = m / max(1, len(columns))
    plain = _Arrangement.of(identity(n), n)
    found = [plain]
    found += [_Arrangement.of(by_class(np.arange(n), np.arange(n) % period), n, period) for period in _periods(entries)]
    counts = [plain.counts(sample)]
    ideal = scale * sample.sum() / _LANES
    if _cost(sample, found[:1], counts, scale, model) > 1.3 * ideal + 2 * model.setup * n / _LANES:
        alone = counts[0][np.arange(n) // _LANES] <= _LANES // 4
        for part in (sample, sample & alone):
            found.append(_Arrangement.of(_by_signature(part, rng), n))
    counts += [arrangement.counts(sample) for arrangement in found[1:]]
    costs = [_cost(sample, [a], [c], scale, model) for a, c in zip(found, counts, strict=True)]
    # The order of the rows is the first candidate, and the others must beat it clearly.
    best = int(np.argmin(np.array(costs) * np.array([_GAIN] + [1.0] * (len(costs) - 1))))
    sets = [([best], costs[best])]
    if best:
        sets.append(([0], costs[0]))
    results = []
    for chosen, cost in sets:
        while len(chosen) < _PHASES:
            trials = [
                (_cost(sample, [found[i] for i in (*chosen, t)], [counts[i] for i in (*chosen, t)], scale, model), t)
                for t in range(len(found))
                if t not in chosen
            ]
            if not trials or min(trials)[0] > _GAIN * cost:
                break
            cost = min(trials)[0]
            chosen = [*chosen, min(trials)[1]]
        results.append((cost, chosen))
    return [found[i] for i in min(results)[1]]


def _cost(
    sample: Bools,
    arrangements: list[_Arrangement],
    counts: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]],
    scale: float,
    model: GroupCost,
) -> float:
    """Cost of groups of 16 rows when every pair goes where most neighbours share its key."""
    if len(arrangements) == 1:
        return float(scale * np.count_nonzero(counts[0]) + model.setup * np.count_nonzero(counts[0].any(axis=1)))
    shared = [count[a.slot // _LANES] for a, count in zip(arrangements, counts, strict=True)]
    total, best, most = 0.0, np.zeros(sample.shape, np.uint8), shared[0]
    for phase, other in enumerate(shared[1:], 1):
        best[other > most] = phase
        most = np.maximum(most, other)
    for phase, arrangement in enumerate(arrangements):
        words = arrangement.counts(sample & (best == phase))
        total += scale * np.count_nonzero(words) + model.setup * np.count_nonzero(words.any(axis=1))
    return total


def _periods(entries: Bools) -> list[int]:
    """Frequent distances of successive allowed keys, seen in a sample of the rows."""
    n, _ = entries.shape
    distances = [np.zeros(0, np.int64)]
    for row in np.unique(np.linspace(0, max(0, n - 1), 64, dtype=np.int64)) if n else []:
        steps = np.diff(np.flatnonzero(entries[row]))
        # A distance counts where it repeats.
        distances.append(steps[1:][(steps[1:] > 1) & (steps[1:] == steps[:-1])])
    period, times = np.unique(np.concatenate(distances), return_counts=True)
    likely = period[np.argsort(-times, kind="stable")][:3]
    return [int(p) for p in likely if 2 * p <= n]


def _by_signature(sample: Bools, rng: np.random.Generator) -> Int64s:
    """Rows with equal or like columns next to each other, by hashes whose chance to agree is the rows' likeness."""
    n, columns = sample.shape
    if not columns or not n:
        return identity(n)
    hashes = []
    for _ in range(4):
        rank = rng.permutation(columns).astype(np.uint16)
        hashes.append(np.where(sample, rank, np.uint16(columns)).min(axis=1))
    order = identity(n)
    order[:n] = np.lexsort(hashes)
    return order
