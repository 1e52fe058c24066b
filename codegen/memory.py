"""Arena planning: buffers that are never alive together share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``size`` bytes that is alive from step ``first`` to step ``last``, both included."""

    name: str
    size: int
    first: int
    last: int


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets of all buffers, aligned to cache lines, and the bytes needed in all.

    Greedy by size: large buffers first, each at the lowest offset that is free during its life (Pisarchyk & Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020, "Greedy by Size").
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for buffer in sorted(lifetimes, key=lambda b: (-b.size, b.first, b.name)):
        size = -(-buffer.size // ALIGNMENT) * ALIGNMENT
        offset = 0
        for start, end, other in placed:
            if other.first <= buffer.last and buffer.first <= other.last and start < offset + size and offset < end:
                offset = end
        placed.append((offset, offset + size, buffer))
        placed.sort(key=lambda p: p[0])
        offsets[buffer.name] = offset
    return offsets, max((end for _, end, _ in placed), default=0)
