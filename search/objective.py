"""What a search minimizes: seconds of a program, measured or added up from the costs of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fuser.search.space import Costs, Groups, Point, Space


@dataclass(frozen=True)
class RegionTime:
    """Median seconds of one region's program, the interquartile range and the number of runs behind it.

    ``early`` tells that measuring ended early because the program was clearly slower than the best, ``remembered`` that
    the time was known before.
    """

    region: str
    seconds: float
    spread: float = 0.0
    runs: int = 0
    early: bool = False
    remembered: bool = False


@dataclass(frozen=True)
class KernelTime:
    """What is known about one kernel of a space: measured seconds, or why it cannot be used. ``building`` is how long
    it took to build."""

    region: int
    members: int
    kernel: int
    seconds: float | None
    spread: float = 0.0
    failure: str = ""
    building: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of one trial: seconds of the whole model, or why there are none.

    ``regions`` hold the parts: each counts as often as the model has the region. ``building`` and ``measuring`` are
    seconds spent for it.
    """

    seconds: float | None
    failure: str = ""
    regions: tuple[RegionTime, ...] = ()
    building: float = 0.0
    measuring: float = 0.0

    @property
    def is_remembered(self) -> bool:
        """Whether nothing new was measured."""
        return bool(self.regions) and all(time.remembered for time in self.regions)


class Objective(Protocol):
    """Seconds of points of one space. Implementations never raise for a point that cannot be built or run: that is an
    :class:`Outcome` with a failure."""

    deadline: float
    """Of ``time.perf_counter``, when the search's time ends."""

    def expect(self, points: Iterable[Point]) -> None:
        """Points that will be asked for soon, so that their kernels can be built ahead."""

    def __call__(self, point: Point) -> Outcome:
        """The time of a point. Raises TimeoutError when the search's time ends before it is known."""

    def kernel(self, region: int, members: int, kernel: int) -> KernelTime:
        """The time of one kernel alone. Raises TimeoutError when the search's time ends before it is known."""

    def costs(self, region: int, members: int, kernel: int) -> float:
        """What is known about a kernel: its measured time, infinity when it failed, else the scaled prediction."""

    def compare(self, points: list[Point]) -> list[float] | None:
        """Seconds of some points measured against each other once more, in a fresh process; None without a clock."""

    def close(self) -> None:
        """Give back processes and memory."""


class AdditiveObjective:
    """Times that are sums of the costs of kernels, for proofs and experiments without a clock. ``costs`` defaults to
    the cost model's predictions."""

    def __init__(self, space: Space, costs: Costs | None = None) -> None:
        self.space = space
        self._costs = space.predicted if costs is None else costs
        self.deadline = math.inf
        self.evaluated = 0

    def expect(self, points: Iterable[Point]) -> None:
        """Nothing has to be built."""

    def __call__(self, point: Point) -> Outcome:
        self.evaluated += 1
        return Outcome(
            self.space.additive(point, self._costs),
            regions=tuple(self._time(at, program) for at, program in enumerate(point.regions)),
        )

    def _time(self, at: int, program: Groups) -> RegionTime:
        seconds = sum(self._costs(at, members, kernel) for members, kernel in program)
        return RegionTime(self.space.regions[at].region.hash, seconds, runs=1)

    def kernel(self, region: int, members: int, kernel: int) -> KernelTime:
        return KernelTime(region, members, kernel, self._costs(region, members, kernel))

    def costs(self, region: int, members: int, kernel: int) -> float:
        return self._costs(region, members, kernel)

    def compare(self, points: list[Point]) -> list[float] | None:
        return None

    def close(self) -> None:
        """Nothing to give back."""
