"""What one process knows of a study: programs and their times, kernels and theirs, and how long it has waited."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fuser.codegen.choice import Choice
from fuser.search.objective import KernelTime
from fuser.search.space import Point, Space
from fuser.search.statistics import spearman

_FEW_TRIALS = 8
_GAIN = 0.005
"""Of many measured programs some are this much faster by chance."""


@dataclass
class History:
    """Trials that have ended, here or in other processes, and where this process's time went, in seconds."""

    times: dict[str, float | None] = field(default_factory=dict)
    """Of programs, None for one that failed."""
    trials: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    duplicates: int = 0
    measured: int = 0
    """Trials of this process."""
    remembered: int = 0
    """Trials of this process whose times an earlier search had kept."""
    best: tuple[float, Point] | None = None
    default: float | None = None
    """The time of the default scheme."""
    building: float = 0.0
    measuring: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _gained: float | None = None
    """The best time when it last fell by more than noise."""
    _since_gain: int = 0
    _waiting_since: float = field(default_factory=time.perf_counter)

    def learn(self, number: int, point: Point, seconds: float | None, failure: str) -> None:
        """The end of a trial: its time, or why it failed."""
        self.times[str(point)] = seconds
        self.trials += 1
        self._since_gain += 1
        if seconds is None:
            self.failures.append((number, failure))
        elif self.best is None or seconds < self.best[0]:
            self.best = (seconds, point)
            if self._gained is None or seconds < self._gained * (1 - _GAIN):
                self._gained, self._since_gain = seconds, 0
                self.wait()

    def wait(self) -> None:
        """From now on it is waited for a better program."""
        self._waiting_since = time.perf_counter()

    def is_plateau(self, trials: int | None, patience: float) -> bool:
        """Whether so many trials have brought nothing, or a few of them for ``patience`` seconds."""
        waited = time.perf_counter() - self._waiting_since
        return (trials is not None and self._since_gain >= trials) or (
            self._since_gain >= _FEW_TRIALS and waited > patience
        )

    def fastest(self, count: int, but: Point) -> list[Point]:
        """The fastest programs other than ``but``."""
        ranked = sorted((v, p) for p, v in self.times.items() if v is not None and p != str(but))
        return [Point.parse(p) for _, p in ranked[:count]]

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def searching(self) -> float:
        """Time that neither building nor measuring took."""
        return max(self.elapsed - self.building - self.measuring, 0.0)


class KernelTimes:
    """Times of single kernels of a space, by region, operators and number of the kernel."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._times: dict[tuple[int, int, int], KernelTime] = {}

    def __len__(self) -> int:
        return len(self._times)

    def __setitem__(self, kernel: tuple[int, int, int], measured: KernelTime) -> None:
        self._times[kernel] = measured

    @property
    def total(self) -> int:
        """Kernels of the space that may be measured."""
        return sum(len(kernels) for space in self.space.regions for kernels in space.allowed.values())

    def missing(self, point: Point) -> Iterator[tuple[int, int, int]]:
        """The kernels of a program that have no time yet."""
        for at, program in enumerate(point.regions):
            yield from ((at, *kernel) for kernel in program if (at, *kernel) not in self._times)

    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted and measured times; None for fewer than three."""
        pairs = [(self.space.predicted(*key), t.seconds) for key, t in self._times.items() if t.seconds is not None]
        return spearman([p for p, _ in pairs], [m for _, m in pairs])

    def choices(self, point: Point) -> dict[str, Choice]:
        """The choices of a program by region hash, with the times of kernels that were measured."""
        found = {}
        for at, (space, program) in enumerate(zip(self.space.regions, point.regions, strict=True)):
            choice = space.choice(program)
            kernels = []
            for kernel, group in zip(program, choice.groups, strict=True):
                known = self._times.get((at, *kernel))
                if known is not None and known.seconds is not None:
                    group = dataclasses.replace(group, seconds=known.seconds, measured=True)
                kernels.append(group)
            found[space.region.hash] = Choice(choice.scheme, tuple(kernels))
        return found

    def record(self) -> list[dict[str, Any]]:
        """What the study keeps of them."""
        return [
            {
                "region": at,
                "members": f"{members:x}",
                "kernel": kernel,
                "predicted": self.space.predicted(at, members, kernel),
                "seconds": measured.seconds,
                "spread": measured.spread,
                "failure": measured.failure,
            }
            for (at, members, kernel), measured in self._times.items()
        ]
