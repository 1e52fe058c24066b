"""Masks with a closed form. Each class gives the rule for one pair and, row by row, the same set as progressions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from math import isqrt
from typing import Any, ClassVar

import numpy as np

from fuser.ir.masks.base import Mask
from fuser.ir.masks.columns import Bools, Ints, Progressions, integer, spans


@dataclass(frozen=True)
class _Pattern(Mask):
    """A mask defined by integer parameters, the fields of its class; ``least`` gives their smallest legal values."""

    kind: ClassVar[str]
    least: ClassVar[dict[str, int | None]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in self.optional:
                continue
            number = integer(f"{type(self).__name__}: {field.name}", value, self.least[field.name])
            object.__setattr__(self, field.name, number)

    @property
    def name(self) -> str:
        shown = [
            f"{self.label.get(field.name, field.name)}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        ]
        return f"{self.kind}({', '.join(shown)})" if shown else self.kind

    def _key(self) -> Any:
        return [self.kind, {field.name: getattr(self, field.name) for field in fields(self)}]


@dataclass(frozen=True)
class Dense(_Pattern):
    """All pairs. Neutral for ``&``; ``~Dense()`` allows none."""

    kind = "dense"

    @property
    def allows_all(self) -> bool:
        return True

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return np.ones((1,) * i.ndim, np.bool_)

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return spans(len(i), m, (0, m - 1, 1))


@dataclass(frozen=True)
class Causal(_Pattern):
    """j <= i + offset. With offset 0 the diagonal starts top left, as in torch; kv_len - q_len is for a full cache."""

    offset: int = 0

    kind = "causal"
    least = {"offset": None}  # noqa: RUF012

    @property
    def name(self) -> str:
        return f"causal(offset={self.offset})" if self.offset else "causal"

    def shift(self, offset: int) -> Mask:
        return Causal(self.offset + integer("offset", offset, 0))

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        allowed: Bools = j <= i + self.offset
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return spans(len(i), m, (0, i + self.offset, 1))


@dataclass(frozen=True)
class SlidingWindow(_Pattern):
    """-left <= j - i <= right."""

    left: int
    right: int

    kind = "sliding_window"
    least = {"left": 0, "right": 0}  # noqa: RUF012

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        allowed: Bools = (i - j <= self.left) & (j - i <= self.right)
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        return spans(len(i), m, (i - self.left, i + self.right, 1))


@dataclass(frozen=True)
class _Stepped(_Pattern):
    """Base of the two masks of Child et al. 2019 (arXiv 1904.10509), in AToffer's form."""

    step: int | None = None

    least = {"step": 1}  # noqa: RUF012
    optional = frozenset({"step"})

    def _step(self, kv_len: int) -> int:
        return self.step or max(1, isqrt(kv_len))


@dataclass(frozen=True)
class Strided(_Stepped):
    """j <= i and ((i - j) mod step = 0 or j > i - step); step is floor(sqrt(kv_len)) where it is None."""

    kind = "strided"

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        step = self._step(m)
        back = i - j
        allowed: Bools = (back >= 0) & ((back % step == 0) | (back < step))
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        step = self._step(m)
        return spans(len(i), m, (i % step, i - step, step), (i - step + 1, i, 1))


@dataclass(frozen=True)
class Fixed(_Stepped):
    """j <= i and (j mod step = step - 1 or j > i + (j mod step) - step); step is floor(sqrt(kv_len)) where it is None.

    That is the part of i's own block of ``step`` keys up to i, and the last key of every earlier block.
    """

    kind = "fixed"

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        step = self._step(m)
        place = j % step
        allowed: Bools = (j <= i) & ((place == step - 1) | (j > i + place - step))
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        step = self._step(m)
        block = i - i % step
        return spans(len(i), m, (step - 1, block - 1, step), (block, i, 1))


@dataclass(frozen=True)
class Dilated(_Pattern):
    """|i - j| <= window * dilation and (i - j) mod dilation = 0: ``window`` keys on each side, ``dilation`` apart."""

    window: int
    dilation: int

    kind = "dilated"
    least = {"window": 0, "dilation": 1}  # noqa: RUF012

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        apart = i - j
        allowed: Bools = (abs(apart) <= self.window * self.dilation) & (apart % self.dilation == 0)
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        reach = self.window * self.dilation
        return spans(len(i), m, (i - reach, i + reach, self.dilation))


@dataclass(frozen=True)
class Longformer(_Pattern):
    """|i - j| <= window or i < global_tokens or j < global_tokens (Beltagy et al. 2020, arXiv 2004.05150)."""

    window: int
    global_tokens: int

    kind = "longformer"
    least = {"window": 0, "global_tokens": 0}  # noqa: RUF012
    label = {"global_tokens": "global"}  # noqa: RUF012

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return (abs(i - j) <= self.window) | (i < self.global_tokens) | (j < self.global_tokens)

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        first = self.global_tokens
        last = np.where(i < first, m - 1, i + self.window)
        begin = np.where(i < first, first, np.maximum(first, i - self.window))
        return spans(len(i), m, (0, first - 1, 1), (begin, last, 1))


@dataclass(frozen=True)
class WindowsAndChunks(_Pattern):
    """The window of a query and, as further keys, summaries of chunks of tokens (EVA, Zheng et al. 2023).

    Keys are ``q_len`` tokens, ``gap`` keys that nobody sees, and one key for each chunk. A query in window w of
    ``window`` tokens sees the tokens of the window, ``before`` and ``after`` of it, and all chunks. With a ``chunk``
    above zero it is causal: no token behind the query, and the chunks of so many tokens that end before the query's own
    begins. If ``backwards``, keys and summaries are in reverse order each, so that where a key is, added to where the
    query is, says how far they are apart.
    """

    window: int
    before: int = 0
    after: int = 0
    chunk: int = 0
    gap: int = 0
    backwards: int = 0

    kind = "windows_and_chunks"
    least = {"window": 1, "before": 0, "after": 0, "chunk": 0, "gap": 0, "backwards": 0}  # noqa: RUF012

    def _seen(self, i: Ints, n: int, m: int) -> tuple[Ints, Ints, Ints]:
        """The first and the last token that each query sees, and how many chunks."""
        start = i - i % self.window
        last = i if self.chunk else start + self.window - 1 + self.after
        chunks = max(m - n - self.gap, 0)
        count = np.minimum(i // self.chunk, chunks) if self.chunk else np.full_like(i, chunks)
        return np.maximum(start - self.before, 0), np.minimum(last, n - 1), count

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        first, last, count = self._seen(i, n, m)
        token = n - 1 - j if self.backwards else j
        chunk = m - 1 - j if self.backwards else j - n - self.gap
        near: Bools = (j < n) & (first <= token) & (token <= last)
        return near | ((j >= n + self.gap) & (chunk < count))

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        first, last, count = self._seen(i, n, m)
        if self.backwards:
            return spans(len(i), m, (n - 1 - last, n - 1 - first, 1), (m - count, m - 1, 1))
        return spans(len(i), m, (first, last, 1), (n + self.gap, n + self.gap + count - 1, 1))


@dataclass(frozen=True)
class GridWindows(_Pattern):
    """As :class:`WindowsAndChunks`, of tokens in the rows of a grid of ``width`` columns: a query sees the tokens of
    its square of ``window`` × ``window`` and of ``extension`` around it, and all chunks."""

    width: int
    window: int
    extension: int = 0
    gap: int = 0
    backwards: int = 0

    kind = "grid_windows"
    least = {"width": 1, "window": 1, "extension": 0, "gap": 0, "backwards": 0}  # noqa: RUF012

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        token = n - 1 - j if self.backwards else j
        near: Bools = (j < n) & (token >= 0)
        for query, key in ((i // self.width, token // self.width), (i % self.width, token % self.width)):
            start = query - query % self.window
            near = near & (key >= start - self.extension) & (key < start + self.window + self.extension)
        return near | (j >= n + self.gap)


@dataclass(frozen=True)
class GridChunks(_Pattern):
    """Query c sees the tokens of chunk c: squares of ``size`` × ``size`` tokens of a grid of ``width`` columns."""

    width: int
    size: int

    kind = "grid_chunks"
    least = {"width": 1, "size": 1}  # noqa: RUF012

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        across = max(self.width // self.size, 1)
        row, column = j // self.width // self.size, j % self.width // self.size
        allowed: Bools = (column < across) & (row * across + column == i)
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        across = max(self.width // self.size, 1)
        first = i // across * self.size * self.width + i % across * self.size
        last = np.minimum(self.size, self.width) - 1
        rows = (first + line * self.width for line in range(self.size))
        return spans(len(i), m, *((start, start + last, 1) for start in rows))


@lru_cache(maxsize=64)
def _random_blocks(seed: int, block_rows: int, block_cols: int, count: int) -> Ints:
    """For each block row, ``count`` distinct block columns: (block_rows, count), drawn row after row."""
    rng = np.random.default_rng(seed)
    picks = np.empty((block_rows, count), np.int64)
    for row in picks:
        row[:] = rng.choice(block_cols, count, replace=False)
    picks.setflags(write=False)
    return picks


@dataclass(frozen=True)
class BigBird(_Pattern):
    """Blocks of ``block`` x ``block`` pairs (Zaheer et al. 2020, arXiv 2007.14062), cut off at the lengths.

    Allowed are the ``window`` blocks centred on the diagonal (an even number has its extra block on the left), the
    first ``globals`` block rows and block columns, and for each block row, in order, ``random`` distinct blocks of all
    block columns from ``numpy.random.default_rng(seed).choice``, or all where there are fewer. The random ones may
    coincide with the others. They depend on the number of block columns and on earlier rows, but not on later rows.
    """

    block: int
    window: int
    globals: int
    random: int
    seed: int = 0

    kind = "bigbird"
    least = {"block": 1, "window": 0, "globals": 0, "random": 0, "seed": 0}  # noqa: RUF012

    def _picks(self, n: int, m: int) -> Ints:
        block_rows, block_cols = -(-n // self.block), -(-m // self.block)
        return _random_blocks(self.seed, block_rows, block_cols, min(self.random, block_cols))

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        row, col = i // self.block, j // self.block
        allowed = (row < self.globals) | (col < self.globals)
        allowed = allowed | ((row - col <= self.window // 2) & (col - row < (self.window + 1) // 2))
        for pick in self._picks(n, m).T:
            allowed |= pick[row] == col
        return allowed

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        row = i // self.block
        picks = self._picks(n, m)[row].T
        # A global row is the window from the first block that is not global to the last.
        begin = np.where(row < self.globals, self.globals, np.maximum(self.globals, row - self.window // 2))
        end = np.where(row < self.globals, m, row + (self.window + 1) // 2)
        fresh = (picks >= self.globals) & ((picks < begin) | (picks >= end))
        first = np.stack([np.zeros_like(row), begin, *picks])
        stop = np.stack([np.full_like(row, self.globals), end, *np.where(fresh, picks + 1, picks)])
        order = np.argsort(first, axis=0, kind="stable")
        first, stop = np.take_along_axis(first, order, 0), np.take_along_axis(stop, order, 0)
        return spans(len(i), m, *((a * self.block, b * self.block - 1, 1) for a, b in zip(first, stop, strict=True)))

    def _shape_key(self, n: int, m: int) -> Any:
        # numpy may change its random streams between versions, so that the seed alone does not fix the entries.
        return [self._key(), hashlib.sha256(self._picks(n, m).tobytes()).hexdigest()]


@dataclass(frozen=True)
class GlobalBlocks(_Pattern):
    """Keys of the ``first`` first and ``last`` last blocks of ``block``, of which the very last one is cut off."""

    block: int
    first: int
    last: int

    kind = "global_blocks"
    least = {"block": 1, "first": 0, "last": 0}  # noqa: RUF012

    def _bounds(self, m: int) -> tuple[int, int]:
        """The end of the first blocks and the start of the last ones."""
        return self.first * self.block, (-(-m // self.block) - self.last) * self.block

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        end, start = self._bounds(m)
        return np.broadcast_to((j < end) | (j >= start), np.broadcast_shapes(i.shape, j.shape))

    def _progressions(self, i: Ints, n: int, m: int) -> Progressions | None:
        end, start = self._bounds(m)
        return spans(len(i), m, (0, end - 1, 1), (max(end, start), m - 1, 1))
