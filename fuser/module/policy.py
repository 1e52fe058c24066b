"""When a call is compiled and when the original model runs: decisions on numbers of calls and seconds alone.

Compiling pays only for what is called again. Nothing here looks at a model or at a clock, so every rule can be tested
with numbers.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

AT_ONCE = 8
"""Calls of a model (combinations of shapes, dtypes and plain arguments) that compile when they are first met."""
ATTEMPTS = 5
"""Failures in a row after which calls of one form are not captured any more."""
_SPACING = 4
_ROUNDS = 5
_REMEMBERED = 256
_REASONS = 5


@dataclass
class _Waiting:
    """A call without a program: how often and how long the original ran it, and the times of its last two requests."""

    label: str
    calls: int = 0
    seconds: float = 0.0
    last: int = -1
    previous: int = -1


@dataclass
class _Failures:
    """Failures of a form in a row, and its requests since the last one."""

    count: int = 0
    requests: int = 0


class CompilationPolicy:
    """Which calls without a program are compiled.

    The first ``at_once`` calls are. Another one is when the original model has spent as long on it as compiling takes
    (the median of the last compilations): whatever comes, waiting and compiling together cost at most twice the better
    of the two. Where all places for programs are taken, the program that has not run for longest gives way only if it
    has not run between the last two requests of the newcomer, so that calls in turn, one more than there are places, do
    not drive each other out.

    A form is what calls have in common that differ in sizes and numbers alone. What a model cannot be compiled for
    seldom depends on those: after failures in a row, 4, 16 and 64 requests of a form pass before its next attempts, and
    after five no more are made. Kin are calls that differ in floats alone, which may take any value: only the first of
    them compiles at once; calls without floats have none.

    Keys, forms and kin are any hashable values; ``now`` and ``oldest`` are readings of a counter that grows with every
    request and every run of a program.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._compile_seconds: deque[float] = deque(maxlen=AT_ONCE)
        self._compiled = 0
        self._waiting: dict[Hashable, _Waiting] = {}
        self._failures: dict[Hashable, _Failures] = {}
        self._kin: dict[Hashable, None] = {}

    @property
    def expected_seconds(self) -> float:
        """What compiling another call takes; zero before the first."""
        return statistics.median(self._compile_seconds) if self._compile_seconds else 0.0

    def admits(
        self,
        key: Hashable,
        form: Hashable,
        kin: Hashable,
        *,
        label: str,
        now: int,
        oldest: int | None = None,
        at_once: int = AT_ONCE,
    ) -> bool:
        """Whether to compile the call ``key`` now, which has no program.

        ``label`` is its name in reports. ``oldest`` is when the program that must give way did run last, None while
        there are places. ``at_once`` lowers the limit of that name for this request.
        """
        if not self.attempts(form):
            return False
        if self._compiled < min(at_once, self._at_once) and (kin is None or kin not in self._kin):
            return True
        waiting = self._waiting.pop(key, None) or _Waiting(label)
        waiting.previous, waiting.last = waiting.last, now
        _remember(self._waiting, key, waiting)
        if not waiting.calls or waiting.seconds < self.expected_seconds:
            return False
        return oldest is None or oldest < waiting.previous

    def attempts(self, form: Hashable) -> bool:
        """Whether a request of this form is worth a try after the failures that there were."""
        failures = self._failures.get(form)
        if failures is None:
            return True
        failures.requests += 1
        distance = _SPACING ** (failures.count - 1) if failures.count > 1 else 0
        return failures.count < ATTEMPTS and failures.requests > distance

    def compiled(self, key: Hashable, kin: Hashable, seconds: float) -> None:
        """The call was compiled, in so many seconds."""
        self._compiled += 1
        self._compile_seconds.append(seconds)
        self._waiting.pop(key, None)
        if kin is not None:
            _remember(self._kin, kin, None)

    def succeeded(self, form: Hashable) -> None:
        """A program of this form is worth keeping."""
        self._failures.pop(form, None)

    def failed(self, key: Hashable, form: Hashable) -> None:
        """The call could not be compiled, or its program was slower than the original."""
        self._waiting.pop(key, None)
        failures = self._failures.get(form) or _Failures()
        failures.count += 1
        failures.requests = 0
        _remember(self._failures, form, failures)

    def ran_original(self, key: Hashable, seconds: float) -> None:
        """The original model ran the call, for so many seconds."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.calls += 1
            waiting.seconds += seconds

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why calls wait, those first that have taken longest."""
        waiting = sorted((w for w in list(self._waiting.values()) if w.calls), key=lambda w: -w.seconds)
        found = [self._reason(w) for w in waiting[:_REASONS]]
        if len(waiting) > _REASONS:
            found.append(f"{len(waiting) - _REASONS} more calls wait until compiling them pays")
        return tuple(found)

    def _reason(self, waiting: _Waiting) -> str:
        times = "once" if waiting.calls == 1 else f"{waiting.calls} times"
        return (
            f"{waiting.label} was called {times} and took {waiting.seconds:.2g} s; it is compiled when that reaches "
            f"{self.expected_seconds:.2g} s, which compiling takes"
        )


def _remember(table: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Set ``key``, the latest now, and forget what is too old."""
    table.pop(key, None)
    table[key] = value
    while len(table) > _REMEMBERED:
        del table[next(iter(table))]


class Comparison:
    """A program and the original model take turns at the first calls, until their medians tell which is faster.

    The first turn of each is not counted, since memory and caches are new to it.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def original_is_next(self) -> bool:
        """Whose turn it is."""
        return len(self._seconds[True]) < len(self._seconds[False])

    def add(self, seconds: float, *, original: bool) -> None:
        """One run took so long."""
        self._seconds[original].append(seconds)

    @property
    def is_complete(self) -> bool:
        """Whether enough turns have been taken."""
        return all(len(seconds) > _ROUNDS for seconds in self._seconds.values())

    @property
    def medians(self) -> Mapping[bool, float]:
        """Median seconds of the original (True) and of the program (False)."""
        return {original: statistics.median(seconds[1:]) for original, seconds in self._seconds.items()}

    @property
    def original_is_faster(self) -> bool:
        """Whether the program loses."""
        medians = self.medians
        return medians[True] < medians[False]
