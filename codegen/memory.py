"""Arena planning: buffers that are never alive together share memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuser.ir.binding import Late
from fuser.ir.size import Size, result

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``size`` bytes that is alive from step ``first`` to step ``last``, both included."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class ArenaPlanner:
    """Places buffers whose lifetimes are known, whatever their sizes turn out to be.

    Greedy by size: large buffers first, each at the lowest offset that is free during its life (Pisarchyk & Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020, "Greedy by Size").
    """

    names: tuple[str, ...]
    lives: tuple[tuple[int, int], ...]
    """First and last step of every buffer."""

    @functools.cached_property
    def _alive_with(self) -> list[list[int]]:
        return [
            [i for i, (begin, end) in enumerate(self.lives) if begin <= last and first <= end]
            for first, last in self.lives
        ]

    def __call__(self, *sizes: int) -> tuple[int, ...]:
        """Offsets of buffers of so many bytes, aligned to cache lines, and at the end the bytes needed in all."""
        ends: dict[int, int] = {}
        offsets = [0] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], self.lives[i][0], self.names[i])):
            size = -(-sizes[i] // ALIGNMENT) * ALIGNMENT
            offset = 0
            for start, end in sorted([(offsets[j], ends[j]) for j in self._alive_with[i] if j in ends]):
                if start < offset + size and offset < end:
                    offset = end
            offsets[i], ends[i] = offset, offset + size
        return (*offsets, max(ends.values(), default=0))

    def __str__(self) -> str:
        return "arena"


@dataclass(frozen=True)
class _Offset:
    """One number of a planned arena."""

    index: int
    name: str

    def __call__(self, arena: tuple[int, ...]) -> int:
        return arena[self.index]

    def __str__(self) -> str:
        return self.name


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets of all buffers, aligned to cache lines, and the bytes needed in all: sizes where those of the buffers
    are."""
    planner = ArenaPlanner(tuple(life.name for life in lifetimes), tuple((life.first, life.last) for life in lifetimes))
    sizes = tuple(life.size for life in lifetimes)
    names = [*(f"offset of {life.name}" for life in lifetimes), "arena"]
    if any(isinstance(size, Size) for size in sizes):
        arena = Late(planner, sizes)
        found: tuple[Any, ...] = tuple(result(_Offset(i, name), arena) for i, name in enumerate(names))
    else:
        found = planner(*sizes)
    return {life.name: offset for life, offset in zip(lifetimes, found, strict=False)}, found[-1]
