"""Attention plans: which pairs of rows and keys a kernel computes, in which groups, and in which order.

A plan is a list of *groups* of at most 64 query rows. A group computes *runs* of keys, arithmetic progressions that
all its rows may see, and *partial* keys, each with a word of lanes: bit ``r`` says whether row ``r`` of the group may
see it. Row and key indices are arbitrary. A row may belong to groups of several *phases*, at most one a phase; its
partial results are merged exactly (by log-sum-exp) in the order of the phases. A row without keys is in some group,
too: it gets zeros.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fuser.ir.errors import PlanError
from fuser.ir.masks import Mask

FORMAT = 1
WIDTHS = (16, 32, 64)
"""Lanes that a kernel can give a group."""
FEW_ROWS = 4
"""Rows of a group up to which the CPU kernel computes each by itself (``kFewRows`` of its template)."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_HEADER = ("format", "q_len", "kv_len", "heads", "phases", "groups", "slots", "members", "runs", "keys")
_LARGEST = (1 << 31) - 1


class Group(NamedTuple):
    """One group of a plan: ``rows`` (R,), ``runs`` (N, 3) of (start, count, step), ``keys`` (K,) with ``lanes`` (K,).

    ``width`` is the number of lanes that its kernel computes, of which the first R hold rows.
    """

    rows: Int32s
    runs: Int32s
    keys: Int32s
    lanes: Words
    width: int
    phase: int = 0
    head: int = 0

    @property
    def run_keys(self) -> Int64s:
        """The keys that all rows see, in the order of the runs."""
        start, count, step = self.runs.T.astype(np.int64)
        keys: Int64s = np.repeat(start, count) + ramp(count) * np.repeat(step, count)
        return keys

    @property
    def allowed(self) -> Bools:
        """(R, K) bool: which row may see which partial key."""
        bits = self.lanes[None, :] >> np.arange(len(self.rows), dtype=np.uint64)[:, None]
        return (bits & np.uint64(1)).astype(np.bool_)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A plan as the one array that kernels read: int64 words, read-only.

    The array is a header of ten words (``_HEADER``), then, each padded to whole words: for every partial key its lanes
    (uint64); for every group the lanes that resume an earlier phase and the lanes that no later phase resumes (uint64);
    then int32: row, run and key pointers (groups + 1), width, head and phase of every group, groups of every (head,
    phase), row and state slot (-1 for none) of every member, runs (start, count, step), partial keys. Groups are
    ordered by head, phase, and falling cost. ``heads`` is 0 for one plan that all heads share.
    """

    array: Int64s

    def __post_init__(self) -> None:
        self.array.setflags(write=False)

    @classmethod
    def of(cls, q_len: int, kv_len: int, groups: Iterable[Group], heads: int | None = None) -> AttentionPlan:
        """The plan of these groups, which may come in any order. Raises PlanError if they do not make a plan."""
        groups = list(groups)
        empty = Group(
            np.zeros(0, np.int32), np.zeros((0, 3), np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint64), 16
        )
        parts = [empty, *groups]
        return cls.assemble(
            q_len,
            kv_len,
            heads,
            head=np.array([g.head for g in groups], np.int64),
            phase=np.array([g.phase for g in groups], np.int64),
            width=np.array([g.width for g in groups], np.int64),
            row_counts=np.array([len(g.rows) for g in groups], np.int64),
            rows=np.concatenate([g.rows for g in parts]),
            run_counts=np.array([len(g.runs) for g in groups], np.int64),
            runs=np.concatenate([np.reshape(g.runs, (-1, 3)) for g in parts]),
            key_counts=np.array([len(g.keys) for g in groups], np.int64),
            keys=np.concatenate([g.keys for g in parts]),
            lanes=np.concatenate([g.lanes for g in parts]),
        )

    @classmethod
    def assemble(
        cls,
        q_len: int,
        kv_len: int,
        heads: int | None,
        *,
        head: Int64s,
        phase: Int64s,
        width: Int64s,
        row_counts: Int64s,
        rows: npt.NDArray[Any],
        run_counts: Int64s,
        runs: npt.NDArray[Any],
        key_counts: Int64s,
        keys: npt.NDArray[Any],
        lanes: Words,
    ) -> AttentionPlan:
        """The plan of groups given as concatenated arrays: ``rows`` (sum of row_counts), ``runs`` (·, 3), ``keys``.

        Groups are sorted, and their partial keys by falling number of vectors, so that keys that concern the same
        lanes are together; empty phases vanish. Raises PlanError if the groups do not make a plan.
        """
        if max(q_len, kv_len, len(rows), len(runs), len(keys)) > _LARGEST:
            raise PlanError(
                f"a plan for {q_len} x {kv_len} with {len(keys)} partial keys is too large for 32-bit indices"
            )
        total = np.zeros(len(head), np.int64)
        np.add.at(total, np.repeat(np.arange(len(head)), run_counts), runs[:, 1].astype(np.int64))
        phase = np.unique(phase, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((-(width * (total + key_counts)), phase, head))
        pick_rows, pick_runs, pick_keys = (segments(c, order) for c in (row_counts, run_counts, key_counts))
        head, phase, width = head[order], phase[order], width[order]
        row_counts, run_counts, key_counts = row_counts[order], run_counts[order], key_counts[order]
        pick_keys = pick_keys[_by_vectors(lanes[pick_keys], key_counts)]
        rows, runs, keys, lanes = rows[pick_rows], runs[pick_runs], keys[pick_keys], lanes[pick_keys]

        phases = int(phase.max()) + 1 if len(phase) else 1
        group = np.repeat(np.arange(len(head)), row_counts)
        slot, resume, finish = _merges(rows.astype(np.int64), group, ramp(row_counts), head, phase, q_len)
        sizes = np.bincount(head * phases + phase, minlength=(heads or 1) * phases)
        slots = int(slot.max()) + 1 if len(slot) else 0
        header = [FORMAT, q_len, kv_len, heads or 0, phases, len(head), slots, len(rows), len(runs), len(keys)]
        words = [np.array(header, np.int64), lanes.astype(np.uint64), resume, finish]
        halves = [
            *map(pointers, (row_counts, run_counts, key_counts)),
            width,
            head,
            phase,
            sizes,
            rows,
            slot,
            runs,
            keys,
        ]
        plan = cls(np.concatenate([*(w.view(np.int64) for w in words), *map(_as_words, halves)]))
        plan._check(merges=False)
        return plan

    def for_keys(self, kv_len: int) -> AttentionPlan:
        """The plan of so many keys, of this one in which all groups see one run of all keys there are. Raises PlanError
        for more than 32-bit indices reach."""
        if kv_len > _LARGEST:
            raise PlanError(f"a plan for {kv_len} keys is too large for 32-bit indices")
        array = self.array.copy()
        array[_HEADER.index("kv_len")] = kv_len
        _parts(array)["run"][1::3] = kv_len
        return AttentionPlan(array)

    @classmethod
    def from_bytes(cls, data: bytes) -> AttentionPlan:
        """The inverse of ``to_bytes``. Raises PlanError for anything that is not a plan of this format."""
        if len(data) % 8 or len(data) < 8 * len(_HEADER):
            raise PlanError(f"{len(data)} bytes are not a plan")
        plan = cls(np.frombuffer(data, np.int64).copy())
        plan._check()
        return plan

    def to_bytes(self) -> bytes:
        return self.array.tobytes()

    @functools.cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the content."""
        return hashlib.sha256(self.array.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionPlan) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        shape = f"{self.q_len} x {self.kv_len}" + (f", {self.heads} heads" if self.heads else "")
        return f"AttentionPlan({shape}, {len(self)} groups, {self.phases} phases, work ratio {self.work_ratio:.3g})"

    def __len__(self) -> int:
        """Number of groups."""
        return int(self.array[5])

    @property
    def q_len(self) -> int:
        return int(self.array[1])

    @property
    def kv_len(self) -> int:
        return int(self.array[2])

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows and keys."""
        return self.q_len, self.kv_len

    @property
    def heads(self) -> int | None:
        """Number of heads that have groups of their own, or None if all share them."""
        return int(self.array[3]) or None

    @property
    def phases(self) -> int:
        return int(self.array[4])

    @property
    def slots(self) -> int:
        """Rows of a head that several phases share, each of which needs a place for its partial result."""
        return int(self.array[6])

    def group(self, index: int) -> Group:
        a = self._arrays
        (r0, r1), (n0, n1), (k0, k1) = (a[name][index : index + 2] for name in ("row_ptr", "run_ptr", "key_ptr"))
        return Group(
            a["row"][r0:r1],
            a["run"].reshape(-1, 3)[n0:n1],
            a["key"][k0:k1],
            a["lanes"].view(np.uint64)[k0:k1],
            int(a["width"][index]),
            int(a["phase"][index]),
            int(a["head"][index]),
        )

    def __iter__(self) -> Iterator[Group]:
        return map(self.group, range(len(self)))

    @functools.cached_property
    def pairs_allowed(self) -> int:
        """Pairs that rows see, summed over the heads of a plan that has heads."""
        a = self._arrays
        rows = np.diff(a["row_ptr"]).astype(np.int64)
        lanes = np.unpackbits(np.ascontiguousarray(a["lanes"]).view(np.uint8)).sum(dtype=np.int64)
        return int((rows * self._run_totals).sum() + lanes)

    @functools.cached_property
    def pairs_computed(self) -> int:
        """Pairs that a kernel computes: for each key of a group the vectors of 16 lanes that it concerns, whole, or all
        rows of a group of few."""
        a = self._arrays
        counts = np.diff(a["row_ptr"]).astype(np.int64)
        few = counts <= FEW_ROWS
        whole = np.where(few, counts, -(-counts // 16) * 16)
        first, last = vectors(a["lanes"].view(np.uint64))
        owner = np.repeat(np.arange(len(self)), np.diff(a["key_ptr"]))
        partial = np.where(few[owner], counts[owner], 16 * (last - first).astype(np.int64))
        return int((whole * self._run_totals).sum() + partial.sum())

    @functools.cached_property
    def most_keys(self) -> int:
        """Keys of the group that has most."""
        return int((self._run_totals + np.diff(self._arrays["key_ptr"])).max(initial=0))

    @property
    def work_ratio(self) -> float:
        """Pairs computed over pairs allowed; 1.0 where none are allowed."""
        return self.pairs_computed / self.pairs_allowed if self.pairs_allowed else 1.0

    def tiles(self, head: int = 0) -> Iterator[tuple[Int64s, Int64s, Bools | None]]:
        """Tiles (rows (R,), keys (K,), bits) of one head; ``bits`` is bool (R, K), or None where every pair counts."""
        for group in self:
            if self.heads is not None and group.head != head:
                continue
            rows = group.rows.astype(np.int64)
            if len(full := group.run_keys):
                yield rows, full, None
            if len(group.keys):
                yield rows, group.keys.astype(np.int64), group.allowed

    def validate(self, mask: Mask) -> None:
        """Raise PlanError unless every pair that ``mask`` allows is in exactly one tile and no other pair is in any."""
        n, m = self.q_len, self.kv_len
        if mask.heads is not None and mask.heads != self.heads:
            raise PlanError(f"the mask has {mask.heads} heads, the plan {self.heads or 'one for all'}")
        step = max(1, (1 << 24) // max(1, m))
        for head in range(self.heads or 1):
            tiles = list(self.tiles(head))
            for start in range(0, n, step):
                stop = min(start + step, n)
                count = np.zeros((stop - start, m), np.uint8)
                for rows, keys, bits in tiles:
                    inside = (rows >= start) & (rows < stop)
                    if inside.any():
                        if len(np.unique(keys)) != len(keys):
                            raise PlanError(f"a tile of head {head} with rows {rows[:4]}… lists a key twice")
                        block = np.ix_(rows[inside] - start, keys)
                        count[block] += 1 if bits is None else bits[inside]
                allowed = mask.head(head).rows(start, stop, n, m).numpy()
                if (wrong := np.argwhere(count != allowed)).size:
                    row, key = wrong[0]
                    raise PlanError(
                        f"{len(wrong)} pairs of head {head} in rows {start}:{stop} are wrong; ({row + start}, {key}) "
                        f"is in {count[row, key]} tiles and {'allowed' if allowed[row, key] else 'not allowed'}"
                    )

    def draw(self, path: str | Path, head: int = 0, pixels: int = 1024) -> None:
        """Write a PNG picture of one head: hue by phase, shade by group, white where nothing is computed.

        Above ``pixels`` rows or keys a pixel stands for several pairs, one of which is drawn. Needs matplotlib.
        """
        from matplotlib import colormaps, image

        n, m = self.q_len, self.kv_len
        scale = max(1, -(-max(n, m) // pixels))
        picture = np.ones((-(-max(n, 1) // scale), -(-max(m, 1) // scale), 3))
        hues = colormaps["tab10"]
        for index, group in enumerate(self):
            if self.heads is not None and group.head != head:
                continue
            # Golden-ratio steps give neighbouring groups different shades.
            shade = 0.55 + 0.45 * (index * 0.618034 % 1.0)
            colour = 1.0 - shade * (1.0 - np.array(hues(group.phase % 10)[:3]))
            rows = group.rows // scale
            picture[np.ix_(rows, group.run_keys // scale)] = colour
            lane, key = np.nonzero(group.allowed)
            picture[rows[lane], group.keys[key] // scale] = colour
        image.imsave(
            Path(path), np.kron(picture, np.ones((max(1, pixels // (2 * max(picture.shape[:2]))),) * 2 + (1,)))
        )

    @functools.cached_property
    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Views of the parts of ``array``, by name."""
        return _parts(self.array)

    @functools.cached_property
    def _run_totals(self) -> Int64s:
        """For every group, the number of keys in its runs."""
        a = self._arrays
        ends = np.concatenate([[0], np.cumsum(a["run"].reshape(-1, 3)[:, 1], dtype=np.int64)])
        totals: Int64s = ends[a["run_ptr"][1:]] - ends[a["run_ptr"][:-1]]
        return totals

    def _check(self, merges: bool = True) -> None:
        """Raise PlanError unless a kernel can run this plan without reading or writing out of bounds; without
        ``merges``, of one whose rows are known to resume where they left off."""
        if self.array[0] != FORMAT:
            raise PlanError(f"a plan of format {self.array[0]} cannot be read; this version of fuser writes {FORMAT}")
        if (self.array[1:10] < 0).any() or (self.array[1:10] > _LARGEST).any() or self.array[4] < 1:
            raise PlanError(f"the header of the plan is damaged: {self.array[:10].tolist()}")
        a, n, m = self._arrays, self.q_len, self.kv_len
        run = a["run"].reshape(-1, 3).astype(np.int64)
        for name, size in (("row_ptr", len(a["row"])), ("run_ptr", len(run)), ("key_ptr", len(a["key"]))):
            pointer = a[name]
            _require(pointer[0] == 0 and pointer[-1] == size and (np.diff(pointer) >= 0).all(), "pointers must ascend")
        rows = np.diff(a["row_ptr"])
        _require(np.logical_or.reduce([a["width"] == width for width in WIDTHS]).all(), f"widths must be of {WIDTHS}")
        _require(((rows > 0) & (rows <= a["width"])).all(), "a group must have from one row to as many as it has lanes")
        _require(_within(a["row"], n), f"rows must lie in [0, {n})")
        last = run[:, 0] + (run[:, 1] - 1) * run[:, 2]
        inside = (run[:, 1] > 0).all() and _within(run[:, 0], m) and _within(last, m)
        _require(inside and _within(a["key"], m), f"keys must lie in [0, {m})")
        _require(
            _within(a["head"], self.heads or 1) and _within(a["phase"], self.phases), "heads and phases must exist"
        )
        head_phase = a["head"].astype(np.int64) * self.phases + a["phase"]
        _require((np.diff(head_phase) >= 0).all(), "groups must be sorted by head and phase")
        sizes = np.bincount(head_phase, minlength=len(a["sizes"]))
        _require(np.array_equal(sizes, a["sizes"]), "the sizes of phases must be right")
        unused = np.repeat(~low_bits(rows), np.diff(a["key_ptr"]))
        _require(not (a["lanes"].view(np.uint64) & unused).any(), "lanes without a row must not be set")
        _require((a["lanes"] != 0).all(), "a partial key must have a row that sees it")
        if merges:
            slot, resume, finish = _merges(
                a["row"].astype(np.int64), np.repeat(np.arange(len(self)), rows), ramp(rows), a["head"], a["phase"], n
            )
            _require(
                np.array_equal(slot, a["slot"])
                and np.array_equal(resume.view(np.int64), a["resume"])
                and np.array_equal(finish.view(np.int64), a["finish"])
                and self.slots == (int(slot.max()) + 1 if len(slot) else 0),
                "rows must resume where they left off",
            )
        _require((self.heads or 1) * n <= len(a["row"]), "every row must be in a group")
        covered = np.zeros((self.heads or 1, n), np.bool_)
        covered[np.repeat(a["head"], rows), a["row"]] = True
        if not covered.all():
            head, row = np.argwhere(~covered)[0]
            raise PlanError(f"not a plan: row {row} of head {head} is in no group")


def _require(kept: bool | np.bool_, rule: str) -> None:
    if not kept:
        raise PlanError(f"not a plan: {rule}")


def _within(values: npt.NDArray[Any], stop: int) -> bool:
    return not len(values) or bool(values.min() >= 0 and values.max() < stop)


def low_bits(counts: npt.NDArray[Any]) -> Words:
    """Words with the lowest ``counts`` (1 to 64) bits set."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - counts).astype(np.uint64)


_FIRST = np.array([0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0], np.uint8)
_LAST = np.array([0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4], np.uint8)
"""The lowest bit of every number of four bits, and one more than the highest."""


def ramp(counts: npt.NDArray[Any]) -> Int64s:
    """0, 1, … counts[0] - 1, 0, 1, … counts[1] - 1, …"""
    ends = np.cumsum(counts, dtype=np.int64)
    steps: Int64s = np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - counts, counts)
    return steps


def vectors(lanes: Words) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The vectors of 16 lanes, from the first to before the last, in which each word has its bits; (0, 0) for none."""
    used = lanes.astype("<u8", copy=False).view("<u2").reshape(len(lanes), 4) != 0
    # The four bytes of a word, each 0 or 1, become its four highest bits.
    code = (used.view("<u4").reshape(-1) * np.uint32(0x10204080)) >> np.uint32(28)
    return _FIRST[code], _LAST[code]


def _by_vectors(lanes: Words, counts: Int64s) -> Int64s:
    """The order that sorts the keys of each group by falling number of vectors, then by the first of them."""
    first, last = vectors(lanes)
    kind = 4 * (4 - (last - first)) + first
    if not len(kind) or (kind == kind[0]).all():
        return np.arange(len(lanes))
    place = np.repeat(20 * np.arange(len(counts)), counts) + kind
    # Sixteen bits are sorted by counting.
    return np.argsort(place.astype(np.uint16) if 20 * len(counts) <= 1 << 16 else place, kind="stable")


def pointers(counts: npt.NDArray[Any]) -> Int64s:
    """Start of every segment, and the end of the last."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def segments(counts: Int64s, order: npt.NDArray[Any]) -> Int64s:
    """Positions of the elements of segments of these sizes when the segments are put in ``order``."""
    return np.repeat(pointers(counts)[:-1][order], counts[order]) + ramp(counts[order])


def _as_words(values: npt.NDArray[Any]) -> Int64s:
    padded = np.zeros(2 * ((values.size + 1) // 2), np.int32)
    padded[: values.size] = values.ravel()
    return padded.view(np.int64)


def _merges(
    rows: Int64s, group: Int64s, lane: Int64s, head: npt.NDArray[Any], phase: npt.NDArray[Any], q_len: int
) -> tuple[Int64s, Words, Words]:
    """State slot of every member, and for every group the lanes that resume an earlier phase and those that finish.

    Raises PlanError if a row is twice in one phase of a head.
    """
    key = head[group].astype(np.int64) * q_len + rows
    if not phase.any() and len(key) and np.bincount(key).max() == 1:
        return np.full(len(key), -1, np.int64), np.zeros(len(head), np.uint64), low_bits(np.bincount(group))
    heads, phases = (int(values.max(initial=0)) + 1 for values in (head, phase))
    stage, cells = phase[group], heads * q_len
    present = np.zeros((phases, cells), np.bool_)
    present[stage, key] = True
    if np.count_nonzero(present) < len(key):
        times = np.bincount(stage * np.int64(cells) + key)
        at = int(np.argmax(times > 1)) % cells
        raise PlanError(f"not a plan: row {at % q_len} of head {at // q_len} is in two groups of one phase")
    seen = np.logical_or.accumulate(present)
    earlier, later = seen[:-1], np.logical_or.accumulate(present[::-1])[-2::-1]
    resumes, finishes = np.zeros(len(key), np.bool_), np.ones(len(key), np.bool_)
    again, before = stage > 0, stage < phases - 1
    resumes[again] = earlier[stage[again] - 1, key[again]]
    finishes[before] = ~later[stage[before], key[before]]
    # A slot for every row of a head that is not done in one phase.
    shared = (present.sum(axis=0) > 1).reshape(heads, q_len)
    number = np.where(shared, np.cumsum(shared, axis=1) - 1, -1).reshape(-1)
    starts = pointers(np.bincount(group, minlength=len(head)))[:-1]
    bits = np.uint64(1) << lane.astype(np.uint64)
    resume, finish = (np.bitwise_or.reduceat(np.where(flags, bits, 0), starts) for flags in (resumes, finishes))
    return number[key], resume, finish


def _parts(array: Int64s) -> dict[str, npt.NDArray[Any]]:
    """Views of the parts of a plan's array by name, as the kernel sees them."""
    _, _, _, heads, phases, groups, _, members, runs, keys = map(int, array[: len(_HEADER)])
    words = {"lanes": keys, "resume": groups, "finish": groups}
    halves = dict.fromkeys(("row_ptr", "run_ptr", "key_ptr"), groups + 1)
    halves |= {"width": groups, "head": groups, "phase": groups, "sizes": (heads or 1) * phases}
    halves |= {"row": members, "slot": members, "run": 3 * runs, "key": keys}
    at = len(_HEADER)
    views: dict[str, npt.NDArray[Any]] = {}
    for name, size in words.items():
        views[name] = array[at : at + size]
        at += size
    for name, size in halves.items():
        views[name] = array[at : at + (size + 1) // 2].view(np.int32)[:size]
        at += (size + 1) // 2
    if at != len(array):
        raise PlanError(f"a plan of {len(array)} words should have {at}")
    return views
