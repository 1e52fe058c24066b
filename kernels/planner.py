"""From a mask to a plan: the arrangement of rows, the division in phases and the widths of groups that cost least.

Masks that are defined by progressions are planned from these, in time and memory proportional to rows: keys without
gaps by neighbouring rows, keys a step apart by rows of one residue class where that is cheaper. Other masks are planned
from their entries (:mod:`fuser.kernels.detection`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from fuser.ir.errors import MaskError, PlanError
from fuser.ir.masks import Dense, Mask, MaskMod, TensorMask, from_dense
from fuser.ir.masks.structure import Part
from fuser.ir.target import Target
from fuser.kernels.cover import COSTS, SPAN, Cover, GroupCost, by_class, from_parts, identity
from fuser.kernels.detection import detect
from fuser.kernels.plan import FORMAT, WIDTHS, AttentionPlan, Int64s

_SAMPLE = 48
"""Spans of rows on which arrangements are compared."""


_VERSION = 1
"""Counts the rules by which plans are made, so that stored ones of older rules are made anew."""


class PlanStore(Protocol):
    """A place that outlives the process and keeps plans as bytes; it may forget any of them at any time."""

    def read(self, key: str) -> bytes | None:
        """What was written for ``key``, intact, or None."""

    def write(self, key: str, title: str, content: bytes) -> None:
        """Keep ``content`` for ``key``; ``title`` is for people."""


class _Piece(NamedTuple):
    """A cover, in one phase, with the rows of its groups."""

    phase: int
    rows: Int64s
    counts: Int64s
    cover: Cover


def plan(
    mask: Mask, q_len: int, kv_len: int | None = None, target: Target | None = None, *, one_phase: bool = False
) -> AttentionPlan:
    """The plan that computes ``mask`` for these lengths (``kv_len`` defaults to ``q_len``), with ``one_phase`` the best
    that needs no scratch memory.

    Raises MaskError when the mask does not fit the lengths. The result is exact: each allowed pair is in one tile.
    """
    if not isinstance(mask, Mask):
        raise MaskError(f"mask must be one of fuser.masks (of a tensor: from_dense), got {type(mask).__name__}")
    m = q_len if kv_len is None else kv_len
    mask.validate(q_len, m)
    model = COSTS["cpu" if target is None else target.kind]
    if q_len > 0 and m > 0 and isinstance(mask, Dense):
        return _whole(q_len, m, model)
    if mask.heads is None:
        return _assemble(q_len, m, None, [(0, piece) for piece in _pieces(mask, q_len, m, model, one_phase)])
    masks = [mask.head(h) for h in range(mask.heads)]
    known: dict[Mask, list[_Piece]] = {}
    for part in masks:
        if part not in known:
            known[part] = list(_pieces(part, q_len, m, model, one_phase))
    return _assemble(q_len, m, mask.heads, [(h, piece) for h, part in enumerate(masks) for piece in known[part]])


def _whole(n: int, m: int, model: GroupCost) -> AttentionPlan:
    """The plan of rows that all see all keys, as there is for every step of decoding and every padded batch."""
    rest = -(-(n % SPAN) // min(WIDTHS)) * min(WIDTHS)
    narrow = np.array([width for width in WIDTHS if rest & width], np.int64)
    none, keys = np.zeros(len(narrow), np.int64), np.full(len(narrow), m)
    together = model(np.array([SPAN]), keys[:1], none[:1], none[:1], none[:1]).sum()
    if together <= model(narrow, keys, none, none, none).sum():
        narrow = np.array([SPAN] * (rest > 0), np.int64)
    return _of_rows(n, tuple(narrow.tolist())).for_keys(m)


@functools.lru_cache(maxsize=64)
def _of_rows(n: int, rest: tuple[int, ...]) -> AttentionPlan:
    """That of one key, the rows behind the last whole span in groups of the widths ``rest``."""
    width = np.array([SPAN] * (n // SPAN) + [*rest[::-1]], np.int64)
    ends = np.minimum(np.cumsum(width), n)
    none = np.zeros(len(width), np.int64)
    return AttentionPlan.assemble(
        n,
        1,
        None,
        head=none,
        phase=none,
        width=width,
        row_counts=np.diff(ends, prepend=0),
        rows=np.arange(n),
        run_counts=none + 1,
        runs=np.stack([none, none + 1, none + 1], axis=1),
        key_counts=none,
        keys=none[:0],
        lanes=np.zeros(0, np.uint64),
    )


def stored_plan(mask: Mask, q_len: int, kv_len: int, target: Target | None, store: PlanStore | None) -> AttentionPlan:
    """:func:`plan`, from ``store`` where it has one; what is made is written to it.

    The key covers the entries of the mask, the lengths, the costs of the target and the format. A stored plan that
    cannot be read, or is one of other lengths or heads, is made anew.
    """
    if store is None or isinstance(mask, Dense):
        return plan(mask, q_len, kv_len, target)
    mask.validate(q_len, kv_len)
    if isinstance(mask, MaskMod):
        # A function is opaque: its entries are the key and what is planned, and are taken once.
        mask = from_dense(mask.dense(q_len, kv_len))
    costs = dataclasses.asdict(COSTS["cpu" if target is None else target.kind])
    key = json.dumps([FORMAT, _VERSION, q_len, kv_len, mask.fingerprint(q_len, kv_len), costs], sort_keys=True)
    content = store.read(key)
    if content is not None:
        try:
            found = AttentionPlan.from_bytes(content)
        except PlanError:
            pass
        else:
            if (found.q_len, found.kv_len, found.heads) == (q_len, kv_len, mask.heads):
                return found
    made = plan(mask, q_len, kv_len, target)
    store.write(key, f"{mask.name}, {q_len} x {kv_len}", made.to_bytes())
    return made


def _assemble(q_len: int, kv_len: int, heads: int | None, pieces: list[tuple[int, _Piece]]) -> AttentionPlan:
    none = np.zeros(0, np.int64)
    covers = [piece.cover for _, piece in pieces]
    sizes = [len(cover.width) for cover in covers]
    repeat = np.repeat
    return AttentionPlan.assemble(
        q_len,
        kv_len,
        heads,
        head=repeat(np.array([h for h, _ in pieces], np.int64), sizes),
        phase=repeat(np.array([piece.phase for _, piece in pieces], np.int64), sizes),
        width=np.concatenate([none, *(cover.width for cover in covers)]),
        row_counts=np.concatenate([none, *(piece.counts for _, piece in pieces)]),
        rows=np.concatenate([none, *(piece.rows for _, piece in pieces)]),
        run_counts=np.concatenate([none, *(cover.run_counts for cover in covers)]),
        runs=np.concatenate([np.zeros((0, 3), np.int64), *(cover.runs for cover in covers)]),
        key_counts=np.concatenate([none, *(cover.key_counts for cover in covers)]),
        keys=np.concatenate([none, *(cover.keys for cover in covers)]),
        lanes=np.concatenate([np.zeros(0, np.uint64), *(cover.lanes for cover in covers)]),
    )


def _pieces(mask: Mask, n: int, m: int, model: GroupCost, one_phase: bool) -> Iterator[_Piece]:
    """The groups of all rows of a mask that has no heads."""
    covered, phases = np.zeros(n, np.bool_), set()
    parts = mask.parts(n, m)
    found: Iterator[tuple[Int64s, int, Cover | None]]
    if parts is None or one_phase:
        entries = mask.array if isinstance(mask, TensorMask) else mask.dense(n, m).numpy()
        found = detect(entries, model, one_phase=one_phase)
    else:
        found = _arranged(parts, n, model)
    for order, phase, cover in found:
        if cover is not None and len(cover.width):
            rows = order[cover.slots[:, None] + np.arange(SPAN) % cover.width[:, None]]
            used = (rows >= 0) & (np.arange(SPAN) < cover.width[:, None])
            piece = _Piece(phase, rows[used], np.count_nonzero(used, axis=1), cover)
            covered[piece.rows] = True
            phases.add(phase)
            yield piece
    rest = np.flatnonzero(~covered)
    if len(rest):
        yield _without_keys(rest, min(phases, default=0))


def _without_keys(rows: Int64s, phase: int) -> _Piece:
    """Groups that give zeros."""
    groups = -(-len(rows) // SPAN)
    counts = np.minimum(SPAN, len(rows) - np.arange(groups) * SPAN)
    none = np.zeros(groups, np.int64)
    empty = np.zeros(0, np.int64)
    cover = Cover(np.full(groups, SPAN), none, none, np.zeros((0, 3), np.int64), none, empty, np.zeros(0, np.uint64))
    return _Piece(phase, rows, counts, cover)


class _Layer(NamedTuple):
    """Parts whose rows are grouped alike: ``labels`` (N,) is the class of each row, -1 for rows without keys."""

    period: int
    labels: Int64s
    parts: list[Part]


def _arranged(parts: list[Part], n: int, model: GroupCost) -> Iterator[tuple[Int64s, int, Cover | None]]:
    """Order, phase and cover: neighbouring rows first, then classes of rows where they are cheaper."""
    plain, layers = [part for part in parts if part.period == 1], _layers(parts)
    order = identity(n)
    spans = order.reshape(-1, SPAN)
    some = spans[np.unique(np.linspace(0, max(0, len(spans) - 1), _SAMPLE, dtype=np.int64))] if layers else spans
    sample, share = some.reshape(-1), len(some) / max(1, len(spans))
    apart = []
    near = from_parts(plain, order, model)
    for layer in layers:
        rows = np.flatnonzero(layer.labels >= 0)
        classes = by_class(rows, layer.labels[rows])
        cover, cost = from_parts(layer.parts, classes, model)
        if _least(layer, order, model) - near[1] <= cost:
            before, together = (from_parts(these, sample, model)[1] for these in (plain, [*plain, *layer.parts]))
            if together - before <= share * cost:
                plain = [*plain, *layer.parts]
                near = from_parts(plain, order, model)
                continue
        apart.append((classes, cover))
    yield order, 0, near[0]
    for phase, (classes, cover) in enumerate(apart, 1):
        yield classes, phase, cover


def _least(layer: _Layer, order: Int64s, model: GroupCost) -> float:
    """What the keys of the rows in ``order`` cost in any case: rows of one class may share theirs, others do not."""
    rows, count = np.maximum(order, 0), np.max([part.count for part in layer.parts], axis=0)
    seen = np.where(order >= 0, count[rows], 0)
    group = np.arange(len(order)) // SPAN * layer.period + np.maximum(layer.labels[rows], 0)
    sort = np.argsort(group)
    heads = np.flatnonzero(np.diff(group[sort], prepend=-1))
    return (1.0 + model.key) * float(np.maximum.reduceat(seen[sort], heads).sum())


def _layers(parts: list[Part]) -> list[_Layer]:
    """Parts with a period, those that agree on the class of every row together."""
    layers: list[_Layer] = []
    for part in parts:
        if part.period == 1:
            continue
        labels = np.where(part.count > 0, part.start % part.period, -1)
        for at, layer in enumerate(layers):
            both = (labels >= 0) & (layer.labels >= 0)
            if layer.period == part.period and np.array_equal(labels[both], layer.labels[both]):
                layers[at] = _Layer(part.period, np.maximum(labels, layer.labels), [*layer.parts, part])
                break
        else:
            layers.append(_Layer(part.period, labels, [part]))
    return layers
