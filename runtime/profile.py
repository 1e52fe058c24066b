"""Where the time of a program goes: its steps timed one by one, in place, beside whole calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fuser.runtime.program import Program


@dataclass(frozen=True)
class Profile:
    """Medians in seconds: ``steps`` of every step of the plan in order, ``call`` of a whole call with its Python.

    ``timer`` is what timing a step costs by itself; it has been taken off the steps.
    """

    steps: tuple[float, ...]
    call: float
    timer: float
    rounds: int


def profile(program: Program, inputs: Sequence[Tensor], rounds: int = 20) -> Profile:
    """Time ``program`` on ``inputs``.

    Every round makes one ordinary call, then runs the steps in order with a clock around each, so that steps see the
    caches and the values that they see in a call.
    """
    timer = statistics.median(_seconds(_nothing) for _ in range(200))
    calls: list[float] = []
    steps: list[list[float]] = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        program(inputs)
        call = time.perf_counter() - start
        with program.stepping(inputs) as (runs, _):
            times = [_seconds(run) for run in runs]
        if number:  # the first round touches memory for the first time
            calls.append(call)
            steps.append(times)
    medians = tuple(max(0.0, statistics.median(times) - timer) for times in zip(*steps, strict=True))
    return Profile(medians, statistics.median(calls), timer, rounds)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _nothing() -> None:
    pass
