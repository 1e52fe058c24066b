"""CQS: attention divided among W workers by a cyclic quorum set, so that each needs only about N / sqrt(W) tokens.

The sequence is cut into W groups of tokens (queries and keys apart, where there are not as many). Worker w holds the
groups of its *quorum*, the *base set* shifted by w, and owns W of the W x W (query group, key group) blocks, all inside
its quorum; every block has exactly one owner. After Bian and Somani, "CQS-Attention", IEEE Access 13 (2025),
doi:10.1109/ACCESS.2025.3544550; even W are divided more evenly here than there: of the two blocks at distance W / 2,
each worker owns one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fuser.ir.errors import PlanError
from fuser.ir.masks import Columns, Dense, Mask, Progressions
from fuser.ir.masks.algebra import Derived
from fuser.ir.masks.columns import Bools, Ints, integer
from fuser.ir.target import Target
from fuser.kernels.plan import AttentionPlan, Group
from fuser.kernels.planner import plan as plan_mask

_MINIMAL = """
0
0 1
0 1
0 1 2
0 1 2
0 1 3
0 1 3
0 1 2 4
0 1 2 4
0 1 2 5
0 1 2 5
0 1 3 7
0 1 3 9
0 1 2 3 7
0 1 2 3 7
0 1 2 5 8
0 1 2 4 12
0 1 2 5 11
0 1 2 6 9
0 1 2 3 6 10
0 1 4 14 16
0 1 2 3 7 11
0 1 2 3 7 11
0 1 2 3 7 15
0 1 2 3 8 12
0 1 2 5 9 15
0 1 2 5 13 22
0 1 4 15 20 22
0 1 2 3 4 9 14
0 1 2 3 4 9 19
0 1 3 8 12 18
0 1 2 3 7 11 19
0 1 2 3 6 16 27
0 1 2 3 7 12 20
0 1 2 3 8 12 21
0 1 2 5 12 14 20
0 1 2 4 10 15 22
0 1 2 3 4 8 14 23
0 1 2 4 13 18 33
0 1 2 3 4 9 14 24
0 1 2 3 4 9 15 25
0 1 2 3 4 9 15 25
0 1 2 3 4 10 15 26
0 1 2 3 6 16 27 38
0 1 2 3 5 12 18 26
0 1 2 3 6 18 25 38
0 1 2 3 5 16 22 40
0 1 2 5 9 20 26 36
0 1 2 5 24 33 36 44
0 1 3 8 17 28 32 38
0 1 2 5 11 18 30 38
0 1 2 3 4 6 14 21 30
0 1 2 3 4 7 21 29 44
0 1 2 3 4 9 15 21 31
0 1 2 3 4 6 19 26 47
0 1 2 3 4 11 16 33 39
0 1 3 13 32 36 43 52
0 1 2 3 7 21 33 37 50
0 1 2 3 6 13 21 35 44
0 1 2 4 9 15 25 30 42
0 1 2 3 7 15 25 36 45
0 1 2 4 10 32 39 46 51
0 1 2 6 8 20 38 41 54
0 1 2 5 14 16 34 42 59
"""
"""A smallest base set for 1, 2, … 64 workers, one a line; found by exhaustive search."""

TABLE: tuple[tuple[int, ...], ...] = tuple(tuple(map(int, line.split())) for line in _MINIMAL.split("\n") if line)
_SEARCH_TRIES = 200_000
"""Sets that the search for more workers than the table has looks at, for each size: about a second."""
_LARGEST_FIELD = 40
"""Largest order of the finite field of a Singer set that is constructed."""


# ---- base sets


def check_base(workers: int, base: Sequence[int]) -> tuple[int, ...]:
    """``base`` as a base set for ``workers``, reduced modulo it and sorted.

    Raises PlanError unless every distance 1 … workers // 2 is that of two of its members on a circle of ``workers``.
    """
    workers = _workers(workers)
    try:
        members = tuple(sorted({integer("a member of the base set", a, None) % workers for a in base}))
    except (TypeError, ValueError) as error:
        raise PlanError(f"a base set is a sequence of integers, got {base!r}") from error
    found = {min(d, workers - d) for a, b in itertools.combinations(members, 2) for d in [b - a]}
    missing = sorted(set(range(1, workers // 2 + 1)) - found)
    if missing or not members:
        raise PlanError(
            f"{members} is no base set for {workers} workers: no two of its members are "
            f"{', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''} apart (modulo {workers}), "
            "so some blocks of the attention matrix would have no owner"
        )
    return members


@functools.cache
def base_set(workers: int) -> tuple[int, ...]:
    """A small base set: a smallest one up to 64 workers and where a Singer set exists, else the best of a search.

    The members ascend and start with 0 (and 1, where there are two). Raises PlanError for fewer than one worker.
    """
    workers = _workers(workers)
    if workers <= len(TABLE):
        return TABLE[workers - 1]
    order = next((q for q in range(2, _LARGEST_FIELD) if q * q + q + 1 == workers), None)
    if order is not None and _prime_of(order):
        return singer_set(order)
    best = _ruler(workers)
    while found := search(workers, len(best) - 1, _SEARCH_TRIES):
        best = found
    return best


def search(workers: int, size: int, tries: int | None = None) -> tuple[int, ...] | None:
    """The lexicographically first base set with ``size`` members, two of which are 0 and 1; None if there is none.

    With ``tries``, also None once that many sets have been looked at. Depth first; a branch ends when more pairs of
    members repeat a distance than can be spared.
    """
    half = workers // 2
    every = (1 << half + 1) - 2
    slack = size * (size - 1) // 2 - half
    left = float("inf") if tries is None else tries

    def extend(chosen: tuple[int, ...], covered: int) -> tuple[int, ...] | None:
        nonlocal left
        if len(chosen) == size:
            return chosen if covered == every else None
        for x in range(chosen[-1] + 1, workers):
            left -= 1
            if left < 0:
                return None
            more = covered
            for s in chosen:
                more |= 1 << min(x - s, workers - x + s)
            if (len(chosen) + 1) * len(chosen) // 2 - more.bit_count() <= slack:
                found = extend((*chosen, x), more)
                if found:
                    return found
        return None

    if workers < 3 or slack < 0:
        return tuple(range(workers)) if size == workers < 3 else None
    return extend((0, 1), 2)


def singer_set(order: int) -> tuple[int, ...]:
    """The perfect base set of ``order + 1`` members for order² + order + 1 workers; ``order`` is a power of a prime.

    Exponents i with Tr(aⁱ) = 0, where a generates the field of order³ elements and Tr is the trace to that of
    ``order``: a line of the projective plane (Singer 1938). Raises PlanError for other orders.
    """
    prime = _prime_of(order)
    if prime is None:
        raise PlanError(f"a Singer set needs the power of a prime, got {order}")
    workers, last = order * order + order + 1, order**3 - 1
    degree = next(d for d in itertools.count(1) if prime**d == order) * 3
    powers = np.array(_powers(prime, degree), np.int64)
    i = np.arange(workers)
    traces = (powers[i] + powers[i * order % last] + powers[i * order * order % last]) % prime
    members = np.flatnonzero(~traces.any(axis=1))
    # Some two members are neighbours; start there.
    first = next(int(a) for a in members if (a + 1) % workers in members)
    return check_base(workers, [int(a) - first for a in members])


def _powers(prime: int, degree: int) -> list[tuple[int, ...]]:
    """All powers of a generator of the field with prime^degree elements, as coefficients, from the 0th."""
    last = prime**degree - 1
    one = (1,) + (0,) * (degree - 1)
    for tail in itertools.product(range(prime), repeat=degree):
        if tail[0] == 0:
            continue
        # x^degree = tail[0] + tail[1] x + …; x generates the field if it takes `last` steps back to 1.
        powers, element = [one], one
        while True:
            carry = element[-1]
            element = tuple((a + carry * t) % prime for a, t in zip((0, *element[:-1]), tail, strict=True))
            if element == one or len(powers) == last:
                break
            powers.append(element)
        if element == one and len(powers) == last:
            return powers
    raise PlanError(f"there is no field of {prime}^{degree} elements")


def _prime_of(order: int) -> int | None:
    """The prime whose power ``order`` is, or None."""
    prime = next((p for p in range(2, order + 1) if order % p == 0), None)
    while prime is not None and order % prime == 0:
        order //= prime
    return prime if order == 1 else None


def _ruler(workers: int) -> tuple[int, ...]:
    """About sqrt(1.5 workers) members in closed form: a Wichmann ruler that measures every length up to workers / 2."""
    best: tuple[int, ...] | None = None
    for r, s in itertools.product(range(int(workers**0.5) + 2), range(int(workers**0.5) + 2)):
        if 4 * r * (r + s + 2) + 3 * (s + 1) >= workers // 2 and (best is None or 4 * r + s + 3 < len(best)):
            steps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
            best = tuple(itertools.accumulate(steps, initial=0))
    if best is None:
        raise PlanError(f"no ruler for {workers} workers")
    members = sorted({a % workers for a in best})
    first = next((a for a in members if (a + 1) % workers in members), 0)
    return check_base(workers, [a - first for a in members])


def _workers(workers: int) -> int:
    try:
        return integer("workers", workers, 1)
    except ValueError as error:
        raise PlanError(str(error)) from error


# ---- the partition


@dataclass(frozen=True)
class Share:
    """What one worker has: its ``groups``, how many ``tokens`` they hold, and how many (query, key) ``pairs`` it owns.

    ``pairs_visible`` counts only pairs that a mask allows; ``fraction`` is tokens over the length of the sequence. Of
    rectangular problems ``tokens`` are the queries; the keys are ``keys`` in any case.
    """

    worker: int
    groups: tuple[int, ...]
    tokens: int
    fraction: float
    pairs: int
    pairs_visible: int
    keys: int


@dataclass(frozen=True)
class Partition:
    """The division of ``seq_len`` x ``kv_len`` pairs among ``workers``; made by :func:`partition`."""

    workers: int
    seq_len: int
    base: tuple[int, ...]
    kv_len: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", check_base(self.workers, self.base))
        least = min(integer("seq_len", self.seq_len, 1), integer("kv_len", self.kv_len, 1))
        if least < self.workers:
            raise PlanError(f"{self.workers} workers cannot share {least} tokens: use {least} workers or fewer")

    @property
    def quorums(self) -> tuple[tuple[int, ...], ...]:
        """For every worker the groups of its quorum, in the order of the base set."""
        return tuple(tuple((a + w) % self.workers for a in self.base) for w in range(self.workers))

    @functools.cached_property
    def bounds(self) -> Ints:
        """(W + 1,) int64: group g is tokens bounds[g] to bounds[g + 1]; the last N mod W groups have one more."""
        return _bounds(self.seq_len, self.workers)

    @functools.cached_property
    def key_bounds(self) -> Ints:
        """As ``bounds``, for the keys."""
        return _bounds(self.kv_len, self.workers)

    @functools.cached_property
    def roles(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Blocks as members of the base set: one tuple for each member a, of the pairs (a, b) that every worker owns.

        Worker w owns block (a + w, b + w) mod W for each of them.
        """
        w = self.workers
        pairs = {(self.base[0], self.base[0])}
        for d in range(1, w // 2 + 1):
            a, b = next(p for p in itertools.combinations(self.base, 2) if min(p[1] - p[0], w - p[1] + p[0]) == d)
            # At distance W / 2 the opposite worker owns the transpose.
            pairs |= {(a, b)} if 2 * d == w else {(a, b), (b, a)}
        return tuple(tuple(sorted(p for p in pairs if p[0] == a)) for a in self.base)

    def blocks(self, worker: int) -> tuple[tuple[int, int], ...]:
        """The W blocks (query group, key group) that ``worker`` owns, sorted."""
        w, shift = self.workers, self._worker(worker)
        return tuple(sorted(((a + shift) % w, (b + shift) % w) for role in self.roles for a, b in role))

    def groups(self, worker: int) -> tuple[int, ...]:
        """The groups that ``worker`` needs, ascending."""
        return tuple(sorted({group for block in self.blocks(worker) for group in block}))

    def ranges(self, worker: int) -> tuple[tuple[int, int], ...]:
        """The tokens of :meth:`groups` as one range (start, stop) a group."""
        return tuple((int(self.bounds[g]), int(self.bounds[g + 1])) for g in self.groups(worker))

    def key_ranges(self, worker: int) -> tuple[tuple[int, int], ...]:
        """As :meth:`ranges`, for the keys."""
        return tuple((int(self.key_bounds[g]), int(self.key_bounds[g + 1])) for g in self.groups(worker))

    def tokens(self, worker: int) -> Ints:
        """The tokens that ``worker`` needs, int64, ascending."""
        return np.concatenate([np.arange(*r) for r in self.ranges(worker)])

    @property
    def owners(self) -> Ints:
        """(W, W) int64: the worker that owns the block (query group, key group)."""
        owners = np.full((self.workers, self.workers), -1, np.int64)
        for worker in range(self.workers):
            query, key = np.array(self.blocks(worker)).T
            owners[query, key] = worker
        return owners

    def shares(self, mask: Mask | None = None) -> tuple[Share, ...]:
        """What each worker has; with ``mask``, ``pairs_visible`` counts its pairs (summed over heads if it has any)."""
        sizes, key_sizes = np.diff(self.bounds), np.diff(self.key_bounds)
        shares = []
        for worker in range(self.workers):
            blocks = np.array(self.blocks(worker))
            pairs = int((sizes[blocks[:, 0]] * key_sizes[blocks[:, 1]]).sum())
            tokens, keys = (sum(b - a for a, b in r) for r in (self.ranges(worker), self.key_ranges(worker)))
            visible = pairs
            if mask is not None:
                visible = local_mask(self, worker, mask).count(tokens, keys)
            shares.append(Share(worker, self.groups(worker), tokens, tokens / self.seq_len, pairs, visible, keys))
        return tuple(shares)

    @property
    def responsibility_ratio(self) -> float:
        """All pairs over those of the busiest worker: the speed-up that the division allows, at most W."""
        return self.seq_len * self.kv_len / max(share.pairs for share in self.shares())

    def draw(self, path: str | Path) -> None:
        """Write a PNG: the attention matrix, every block in the colour of its owner. Needs matplotlib.

        Up to 31 workers the number of its owner stands in each block.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.colors import hsv_to_rgb
            from matplotlib.figure import Figure
        except ImportError as error:
            raise PlanError("drawing needs matplotlib: pip install matplotlib") from error
        w, owners, edges, key_edges = self.workers, self.owners, self.bounds, self.key_bounds
        # Golden-ratio steps keep the hues of neighbouring workers apart.
        hues = np.arange(w) * 0.618034 % 1.0
        colours = hsv_to_rgb(np.stack([hues, np.full(w, 0.5), 0.75 + 0.25 * (np.arange(w) % 2)], axis=1))
        figure = Figure(figsize=(7, 7.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.pcolormesh(key_edges, edges, colours[owners])
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        longest = max(share.fraction for share in self.shares())
        axes.set_title(
            f"{w} workers, {self.seq_len} x {self.kv_len} tokens, base set {{{', '.join(map(str, self.base))}}}\n"
            f"each worker holds up to {longest:.1%} of the tokens",
            fontsize=10,
        )
        if w <= 31:
            centres, key_centres = ((e[1:] + e[:-1]) / 2 for e in (edges, key_edges))
            for i, j in np.ndindex(w, w):
                x, y, size = float(key_centres[j]), float(centres[i]), max(4, 11 - w / 4)
                axes.text(x, y, str(owners[i, j]), ha="center", va="center", fontsize=size)
        figure.savefig(Path(path), format="png", dpi=150)

    def _worker(self, worker: int) -> int:
        number = integer("worker", worker, 0)
        if number >= self.workers:
            raise PlanError(f"worker {number} of {self.workers} (they count from 0)")
        return number


def partition(workers: int, seq_len: int, base: Sequence[int] | None = None, kv_len: int | None = None) -> Partition:
    """The division of attention over ``seq_len`` tokens (and ``kv_len`` keys, default as many) among ``workers``.

    ``base`` defaults to :func:`base_set`. Raises PlanError for more workers than tokens, or if ``base`` is no base set.
    """
    workers = _workers(workers)
    try:
        seq_len = integer("seq_len", seq_len, 1)
        kv_len = seq_len if kv_len is None else integer("kv_len", kv_len, 1)
    except ValueError as error:
        raise PlanError(str(error)) from error
    least = min(seq_len, kv_len)
    if least < workers:
        raise PlanError(f"{workers} workers cannot share {least} tokens: use {least} workers or fewer")
    return Partition(workers, seq_len, base_set(workers) if base is None else check_base(workers, base), kv_len)


def _bounds(length: int, workers: int) -> Ints:
    size, extra = divmod(length, workers)
    sizes = np.full(workers, size)
    sizes[workers - extra :] += 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


# ---- masks of parts of the matrix


@dataclass(frozen=True)
class Gathered(Derived):
    """Part of ``operand``, a mask of ``size`` = (rows, columns), for gathered rows and columns.

    Row and column positions count through the ascending, disjoint token ranges ``queries`` and ``keys``; row range r
    sees the column ranges ``visible[r]`` (ascending positions in ``keys``), as far as the operand allows.
    """

    size: tuple[int, int]
    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    visible: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return f"part of {self.operand.name} ({len(self.queries)} x {len(self.keys)} ranges)"

    @property
    def q_len(self) -> int:
        return sum(stop - start for start, stop in self.queries)

    @property
    def kv_len(self) -> int:
        return sum(stop - start for start, stop in self.keys)

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        (row, query), (column, key) = _global(self.queries, i), _global(self.keys, j)
        table = np.zeros((len(self.queries), len(self.keys)), np.bool_)
        for r, seen in enumerate(self.visible):
            table[r, list(seen)] = True
        return table[row, column] & self.operand._allowed(query, key, *self.size)

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        row, query = _global(self.queries, i)
        part = self.operand._progressions(query, *self.size)
        if part is None:
            return None
        # Every progression (R, K, 1) meets every visible range (R, 1, C) of its row.
        width = max(1, *map(len, self.visible))
        ends = np.zeros((len(self.queries), width, 3), np.int64)
        local = 0
        offsets = []
        for low, high in self.keys:
            offsets.append(local - low)
            local += high - low
        for r, seen in enumerate(self.visible):
            for at, column in enumerate(seen):
                ends[r, at] = (*self.keys[column], offsets[column])
        first, stop_, shift = (ends[row, None, :, k] for k in range(3))
        start, count, step = (a[:, :, None] for a in (part.start, part.count, part.step))
        begin = start + np.maximum(0, -((start - first) // step)) * step
        last = np.minimum(start + (count - 1) * step, stop_ - 1)
        kept = np.maximum(0, (last - begin) // step + 1)
        shape = (len(i), begin.shape[1] * begin.shape[2])
        steps = np.broadcast_to(step, begin.shape).reshape(shape)
        return Progressions((begin + shift).reshape(shape), kept.reshape(shape), np.ascontiguousarray(steps))

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        closed = self._progressions(i, n, m)
        if closed is not None:
            return closed.columns()
        if not self.structured:
            return super()._columns(i, n, m)
        row, query = _global(self.queries, i)
        found = self.operand._columns(query, *self.size)
        of = np.repeat(np.arange(len(i)), np.diff(found.indptr))
        starts = np.array([start for start, _ in self.keys])
        stops = np.array([stop for _, stop in self.keys])
        offsets = np.cumsum(stops - starts) - stops
        column = np.maximum(0, np.searchsorted(starts, found.indices, side="right") - 1)
        table = np.zeros((len(self.queries), len(self.keys)), np.bool_)
        for r, seen in enumerate(self.visible):
            table[r, list(seen)] = True
        inside = (found.indices >= starts[column]) & (found.indices < stops[column])
        keep = inside & table[row[of], column]
        lengths = np.bincount(of[keep], minlength=len(i))
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return Columns(indptr, found.indices[keep] + offsets[column[keep]])

    def _check(self, n: int, m: int) -> None:
        if (n, m) != (self.q_len, self.kv_len):
            raise PlanError(f"{self.name} is for {self.q_len} x {self.kv_len}, not {n} x {m}")
        self.operand._check(*self.size)

    def _head(self, index: int) -> Mask:
        return replace(self, operand=self.operand.head(index))

    def _key(self) -> Any:
        return self._part(self.operand._key())

    def _shape_key(self, n: int, m: int) -> Any:
        return self._part(self.operand._shape_key(*self.size))

    def _part(self, key: Any) -> Any:
        return ["gathered", self.size, self.queries, self.keys, self.visible, key]


def _global(ranges: tuple[tuple[int, int], ...], local: Ints) -> tuple[Ints, Ints]:
    """Range and token of every position in the concatenation of ``ranges``."""
    starts = np.array([start for start, _ in ranges], np.int64)
    sizes = np.array([stop - start for start, stop in ranges], np.int64)
    begins = np.cumsum(sizes) - sizes
    which = np.searchsorted(begins, local, side="right") - 1
    return which, local + (starts - begins)[which]


def local_mask(partition: Partition, worker: int, mask: Mask | None = None) -> Gathered:
    """The pairs that ``worker`` owns and ``mask`` allows, at the positions of the worker's own tokens."""
    groups, blocks = partition.groups(worker), partition.blocks(worker)
    visible = tuple(tuple(c for c, key in enumerate(groups) if (query, key) in blocks) for query in groups)
    ranges = partition.ranges(worker), partition.key_ranges(worker)
    return Gathered(mask or Dense(), (partition.seq_len, partition.kv_len), *ranges, visible)


def pieces(partition: Partition, worker: int, mask: Mask | None = None) -> Iterator[Gathered]:
    """:func:`local_mask` a query group at a time: one row range each, with only the key groups that it sees."""
    bounds, key_bounds = partition.bounds.tolist(), partition.key_bounds.tolist()
    size = partition.seq_len, partition.kv_len
    for query, part in itertools.groupby(partition.blocks(worker), key=lambda block: block[0]):
        columns = tuple((key_bounds[key], key_bounds[key + 1]) for _, key in part)
        row = (bounds[query], bounds[query + 1])
        yield Gathered(mask or Dense(), size, (row,), columns, (tuple(range(len(columns))),))


def plan(partition: Partition, mask: Mask | None = None, target: Target | None = None) -> AttentionPlan:
    """All workers as one plan. For every query group, the p-th member of the base set has one worker, in whose quorum
    the group is the p-th; the blocks of each such role share phases, so there are about as many as members.

    Raises MaskError if ``mask`` does not fit the lengths.
    """
    mask = mask or Dense()
    n, m, w = partition.seq_len, partition.kv_len, partition.workers
    mask.validate(n, m)
    queries, keys = (tuple(itertools.pairwise(b.tolist())) for b in (partition.bounds, partition.key_bounds))
    groups: list[Group] = []
    phases = 0
    for role in partition.roles:
        if role:
            visible = tuple(tuple(sorted((i + b - a) % w for a, b in role)) for i in range(w))
            part = plan_mask(Gathered(mask, (n, m), queries, keys, visible), n, m, target)
            # The first role has the diagonal blocks and keeps the rows that see nothing at all.
            groups += [g._replace(phase=phases + g.phase) for g in part if phases == 0 or len(g.runs) or len(g.keys)]
            phases += part.phases
    return AttentionPlan.of(n, m, groups, mask.heads)
