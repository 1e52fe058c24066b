"""Attention plans as tiles for tensor cores: 64 or 128 gathered query rows against steps of 64 gathered keys.

A tile's rows are those of one or two groups of the plan, sixteen a warp; its keys are theirs, sorted and cut into steps
of 64. For every warp a step is skipped, full, or partial with one 32-bit word a lane: the lane's part of the 16 x 64
bits, in the order in which the lane holds scores. Long lists of keys are cut into tiles of their own, so that few
rows with many keys keep a whole GPU busy; rows that are in several tiles are merged by log-sum-exp.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuser.kernels.plan import AttentionPlan, Int32s, Int64s, Words, pointers, ramp

STEP = 64
"""Keys of a step."""
_GROUP = 64
_WARP = 16
_STRETCH = 512
"""Keys from which a run becomes steps without being listed."""
_CHUNK = 4096
"""Steps whose bits are unpacked together."""
_SKIP, _PARTIAL, _FULL = 0, 1, 2

Bytes = npt.NDArray[np.uint8]


class BitOrder(enum.Enum):
    """Which (row, key) of a warp's 16 x 64 scores bit ``b`` of a lane's word stands for.

    ``MMA``: accumulators of m16n8: row ``lane / 4 + 8 * (b / 2 % 2)``, key ``8 * (b / 4) + 2 * (lane % 4) + b % 2``.
    ``VECTOR``: row ``4 * (lane / 8) + b % 4``, key ``8 * (b / 4) + lane % 8``.
    """

    MMA = "mma"
    VECTOR = "vector"


@dataclass(frozen=True, eq=False)
class Tiles:
    """``array`` (int32, read-only) holds, each from a multiple of four on, in this order:

    ``items`` x 4: first record, steps, head, a bit for every warp with partial steps; tiles with most steps first;
    ``items`` x ``rows`` x 4: row (-1 where idle), first state, part, parts of the row;
    records x 4: first key (or, where the next is 0, first entry of the key lists), distance of keys,
    ``steps << 16 | two bits for every warp (0 skips, 1 partial, 2 full)``, and the block of masks;
    key lists: 64 a step, the largest key again beyond the last; masks: ``rows * 2`` words a block, 32 a warp.

    Parts of a row are numbered from 0 in the order in which they are to be merged; their partial results are the states
    ``first state + part`` of ``states``.
    """

    array: Int32s
    rows: int
    items: int
    states: int
    heads: int | None
    offsets: tuple[int, int, int, int]
    steps: int
    pairs_computed: int

    def __post_init__(self) -> None:
        self.array.setflags(write=False)

    @functools.cached_property
    def key(self) -> str:
        """A name that tells tiles apart."""
        return f"tiles:{hashlib.sha256(self.array.tobytes()).hexdigest()}"

    @property
    def most_steps(self) -> int:
        """Steps of the longest tile."""
        return int(self.array[1]) if self.items else 0


@functools.lru_cache(maxsize=64)
def tiles(plan: AttentionPlan, rows: int, order: BitOrder, most_steps: int) -> Tiles:
    """The tiles of ``plan`` with ``rows`` (64 or 128) rows and at most ``most_steps`` steps."""
    a = plan._arrays
    halves = rows // _GROUP
    groups = len(plan)
    counts = np.diff(a["row_ptr"]).astype(np.int64)
    item, half = _paired(plan, halves)
    items = int(item.max()) + 1 if groups else 0
    first = np.zeros(items, np.int64)
    first[item[::-1]] = np.arange(groups)[::-1]

    members = np.full((items, rows), -1, np.int64)
    owner = np.repeat(np.arange(groups), counts)
    members[item[owner], half[owner] * _GROUP + ramp(counts)] = a["row"]
    valid = (members >= 0).reshape(items, rows // _WARP, _WARP)

    stretch_item, stretch_first, stretch_steps, rest = _stretches(plan, item, half, items, halves)
    keys, lanes, step_item = _steps(plan, item, half, items, halves, rest)
    words, flags = _masks(lanes, valid, step_item, order)
    blocks, block_of = _distinct(words, (flags == _PARTIAL).any(axis=1))
    listed, list_of, distance = _lists(keys)

    bits = 2 * np.arange(rows // _WARP)
    full = np.where(valid.any(axis=2), _FULL, _SKIP)
    records = np.concatenate(
        [
            np.stack(
                [
                    stretch_item,
                    stretch_first,
                    np.ones_like(stretch_first),
                    stretch_steps,
                    (full[stretch_item] << bits).sum(axis=1),
                    np.zeros_like(stretch_first),
                ],
                axis=1,
            ),
            np.stack(
                [
                    step_item,
                    np.where(distance > 0, keys[:, 0], list_of * STEP),
                    distance,
                    np.ones_like(step_item),
                    (flags.astype(np.int64) << bits).sum(axis=1),
                    block_of,
                ],
                axis=1,
            ),
        ]
    )
    records = records[np.argsort(records[:, 0], kind="stable")]
    part_item, part_steps, records, record_counts = _split(records, items, most_steps)

    heads = a["head"].astype(np.int64)[first][part_item] if items else np.zeros(0, np.int64)
    phases = a["phase"].astype(np.int64)[first][part_item] if items else np.zeros(0, np.int64)
    member_rows = members[part_item]
    member, states = _states(member_rows, heads, phases, plan.q_len)
    longest = np.argsort(-part_steps, kind="stable")
    record_first = pointers(record_counts)[:-1]
    packed = np.stack([records[:, 1], records[:, 2], records[:, 3] << 16 | records[:, 4], records[:, 5]], axis=1)
    table = np.stack([record_first, part_steps, heads, _partial(records, record_counts, bits)], axis=1)[longest]
    pieces = [table, member[longest], packed, listed, blocks.view(np.int32)]
    sizes = [-(-piece.size // 4) * 4 for piece in pieces]
    offsets = pointers(np.array(sizes, np.int64))
    array = np.zeros(max(4, int(offsets[-1])), np.int32)
    for at, piece in zip(offsets.tolist(), pieces, strict=False):
        array[at : at + piece.size] = piece.reshape(-1)
    computed = int((flags != _SKIP).sum()) + int((np.count_nonzero(full, axis=1)[stretch_item] * stretch_steps).sum())
    return Tiles(
        array,
        rows,
        len(part_item),
        states,
        plan.heads,
        (int(offsets[1]), int(offsets[2]), int(offsets[3]), int(offsets[4])),
        int(part_steps.sum()),
        computed * _WARP * STEP,
    )


def _paired(plan: AttentionPlan, halves: int) -> tuple[Int64s, Int64s]:
    """Tile and half of every group: neighbours of one head and phase share a tile."""
    a = plan._arrays
    groups = len(plan)
    if halves == 1 or not groups:
        return np.arange(groups), np.zeros(groups, np.int64)
    phase = a["head"].astype(np.int64) * plan.phases + a["phase"]
    order = np.lexsort((a["row"][a["row_ptr"][:-1]], phase))
    place = np.empty(groups, np.int64)
    place[order] = ramp(np.bincount(phase))
    sizes = -(-np.bincount(phase) // halves)
    return pointers(sizes)[:-1][phase] + place // halves, place % halves


def _stretches(
    plan: AttentionPlan, item: Int64s, half: Int64s, items: int, halves: int
) -> tuple[Int64s, Int64s, Int64s, npt.NDArray[np.int64]]:
    """Whole steps of neighbouring keys that all groups of a tile see in full: tile, first key, steps.

    Last, the runs (N, 4) that remain to be listed: group, start, count, step.
    """
    a = plan._arrays
    run = a["run"].reshape(-1, 3).astype(np.int64)
    group = np.repeat(np.arange(len(plan)), np.diff(a["run_ptr"]))
    table = np.concatenate([group[:, None], run], axis=1)
    low, high = np.zeros((items, halves), np.int64), np.zeros((items, halves), np.int64)
    long = np.flatnonzero((run[:, 1] >= _STRETCH) & (run[:, 2] == 1))
    # The longest of a group, which is written last.
    long = long[np.argsort(run[long, 1], kind="stable")]
    at = item[group[long]], half[group[long]]
    low[at], high[at] = run[long, 0], run[long, 0] + run[long, 1]
    chosen = np.full((items, halves), -1, np.int64)
    chosen[at] = long
    # A tile whose second half is idle has its first half's stretch.
    idle = np.ones((items, halves), np.bool_)
    idle[item, half] = False
    first = np.where(idle, 0, low).max(axis=1, initial=0)
    last = np.where(idle, np.iinfo(np.int64).max, high).min(axis=1, initial=np.iinfo(np.int64).max)
    steps = np.maximum(0, last - first) // STEP
    steps[((chosen < 0) & ~idle).any(axis=1)] = 0
    used = np.flatnonzero(steps)
    cut = chosen[used]
    cut = cut[cut >= 0]
    owner = item[group[cut]]
    begin, end = first[owner], first[owner] + steps[owner] * STEP
    before, after = table[cut], table[cut]
    before[:, 2] = begin - before[:, 1]
    after[:, 2] = after[:, 1] + after[:, 2] - end
    after[:, 1] = end
    table[cut] = before
    table = np.concatenate([table, after])
    return used, first[used], steps[used], table[table[:, 2] > 0]


def _steps(
    plan: AttentionPlan, item: Int64s, half: Int64s, items: int, halves: int, rest: Int64s
) -> tuple[Int64s, Words, Int64s]:
    """Keys (N, 64), -1 beyond the last, lanes (N, 64, halves), and the tile of every step."""
    a = plan._arrays
    counts = np.diff(a["row_ptr"]).astype(np.int64)
    every = np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - counts).astype(np.uint64)
    group = np.concatenate([np.repeat(rest[:, 0], rest[:, 2]), np.repeat(np.arange(len(plan)), np.diff(a["key_ptr"]))])
    run_keys = np.repeat(rest[:, 1], rest[:, 2]) + ramp(rest[:, 2]) * np.repeat(rest[:, 3], rest[:, 2])
    key = np.concatenate([run_keys, a["key"].astype(np.int64)])
    lane = np.concatenate([np.repeat(every[rest[:, 0]], rest[:, 2]), a["lanes"].view(np.uint64)])
    place = item[group] * max(1, plan.kv_len) + key
    sort = np.argsort(place, kind="stable")
    place = place[sort]
    new = np.diff(place, prepend=-1) != 0
    column = np.cumsum(new) - 1
    owner, key = np.divmod(place[new], max(1, plan.kv_len))
    sizes = np.bincount(owner, minlength=items)
    step_counts = -(-sizes // STEP)
    index = pointers(step_counts)[:-1][owner] * STEP + ramp(sizes)
    keys = np.full(int(step_counts.sum()) * STEP, -1, np.int64)
    keys[index] = key
    lanes = np.zeros((len(keys), halves), np.uint64)
    np.bitwise_or.at(lanes, (index[column], half[group[sort]]), lane[sort])
    return keys.reshape(-1, STEP), lanes.reshape(-1, STEP, halves), np.repeat(np.arange(items), step_counts)


def _masks(lanes: Words, valid: npt.NDArray[np.bool_], step_item: Int64s, order: BitOrder) -> tuple[Bytes, Bytes]:
    """The words of every step as bytes (N, warps * 128), and what each warp does: (N, warps)."""
    steps, _, halves = lanes.shape
    warps = halves * _GROUP // _WARP
    words = np.zeros((steps, warps * 128), np.uint8)
    flags = np.zeros((steps, warps), np.uint8)
    for start in range(0, steps, _CHUNK):
        part = np.ascontiguousarray(lanes[start : start + _CHUNK])
        n = len(part)
        bits = np.unpackbits(part.view(np.uint8).reshape(n, STEP, halves * 8), axis=2, bitorder="little")
        by_warp = bits.reshape(n, STEP, warps, _WARP)
        here = valid[step_item[start : start + n]]
        some = by_warp.any(axis=(1, 3))
        # What an idle row sees does not matter.
        full = (by_warp.all(axis=1) | ~here).all(axis=2)
        flags[start : start + n] = np.where(some, np.where(full, _FULL, _PARTIAL), _SKIP)
        if order is BitOrder.MMA:
            shaped = by_warp.reshape(n, 8, 4, 2, warps, 2, 8).transpose(0, 4, 6, 2, 1, 5, 3)
        else:
            shaped = by_warp.reshape(n, 8, 8, warps, 4, 4).transpose(0, 3, 4, 2, 1, 5)
        words[start : start + n] = np.packbits(shaped.reshape(n, -1), axis=1, bitorder="little")
    return words, flags


def _distinct(words: Bytes, needed: npt.NDArray[np.bool_]) -> tuple[Bytes, Int64s]:
    """The masks that differ, and the number of each step's among them."""
    number = np.zeros(len(words), np.int64)
    wanted = np.ascontiguousarray(words[needed])
    if not len(wanted):
        return wanted, number
    _, first, inverse = np.unique(
        wanted.view(np.dtype((np.void, wanted.shape[1]))).reshape(-1), return_index=True, return_inverse=True
    )
    number[needed] = inverse.reshape(-1)
    return np.ascontiguousarray(wanted[first]), number


def _lists(keys: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Lists of keys that are no progression, each step's number among them, and the distance of those that are one."""
    distance = keys[:, 1] - keys[:, 0]
    regular = (np.diff(keys, axis=1) == distance[:, None]).all(axis=1) & (distance > 0) & (keys[:, -1] >= 0)
    listed = keys[~regular]
    # Places beyond the last key repeat it, so that what is read there exists; their bits are zero.
    listed = np.where(listed < 0, listed.max(axis=1, keepdims=True, initial=0), listed)
    return listed, np.cumsum(~regular) - 1, np.where(regular, distance, 0)


def _split(records: Int64s, items: int, most: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Tiles with at most ``most`` steps: the tile that each is part of, its steps, all records, and records of each."""
    total = np.bincount(records[:, 0], weights=records[:, 3], minlength=items).astype(np.int64)
    parts = np.maximum(1, -(-total // most))
    size = np.maximum(1, -(-total // parts))
    parts = np.maximum(1, -(-total // size))
    before = pointers(records[:, 3])[:-1]
    per_item = pointers(total)[:-1]
    begin = before - per_item[records[:, 0]]
    end = begin + records[:, 3]
    width = size[records[:, 0]]
    pieces = (end - 1) // width - begin // width + 1
    which = np.repeat(np.arange(len(records)), pieces)
    part = (begin // width)[which] + ramp(pieces)
    low = np.maximum(begin[which], part * width[which])
    high = np.minimum(end[which], (part + 1) * width[which])
    cut = records[which]
    cut[:, 1] += (low - begin[which]) * STEP * cut[:, 2]
    cut[:, 3] = high - low
    index = pointers(parts)[:-1][cut[:, 0]] + part
    item = np.repeat(np.arange(items), parts)
    steps = np.bincount(index, weights=cut[:, 3], minlength=len(item)).astype(np.int64)
    return item, steps, cut, np.bincount(index, minlength=len(item))


def _partial(records: Int64s, counts: Int64s, bits: Int64s) -> Int64s:
    """For every tile the warps that have partial steps."""
    out = np.zeros(len(counts), np.int64)
    marks = (((records[:, 4:5] >> bits & 3) == _PARTIAL).astype(np.int64) << np.arange(len(bits))).sum(axis=1)
    np.bitwise_or.at(out, np.repeat(np.arange(len(counts)), counts), marks)
    return out


def _states(rows: Int64s, heads: Int64s, phases: Int64s, q_len: int) -> tuple[Int64s, int]:
    """(tiles, rows, 4) of row, first state, part and parts, and the number of states."""
    out = np.zeros((*rows.shape, 4), np.int64)
    out[..., 0], out[..., 1], out[..., 3] = rows, -1, 1
    tile, lane = np.nonzero(rows >= 0)
    key = heads[tile] * max(1, q_len) + rows[tile, lane]
    order = np.lexsort((tile, phases[tile], key))
    tile, lane, key = tile[order], lane[order], key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    counts = np.diff(np.append(starts, len(key)))
    shared = np.where(counts > 1, counts, 0)
    states = int(shared.sum())
    first = np.where(counts > 1, pointers(shared)[:-1], -1)
    out[tile, lane, 1] = np.repeat(first, counts)
    out[tile, lane, 2] = ramp(counts)
    out[tile, lane, 3] = np.repeat(counts, counts)
    return out, states
