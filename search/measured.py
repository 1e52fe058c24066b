"""Measured time as the objective of a search: kernels built ahead, run in a process of their own, remembered."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from fuser.codegen.assemble import assemble
from fuser.codegen.render import header_folder
from fuser.ir.errors import CacheError, FuserError
from fuser.ir.graph import Region
from fuser.runtime.build import Source, build, included_headers
from fuser.runtime.cache import KernelCache, default_cache
from fuser.search.objective import KernelTime, Outcome, RegionTime
from fuser.search.space import Groups, Point, Space
from fuser.search.standalone import subgraph
from fuser.search.worker import Timing, Unit, Worker

logger = logging.getLogger("fuser")
KERNEL_RECORD = "kernel_measured"
PROGRAM_RECORD = "program_measured"
_BUDGET = 0.12
_CONFIRM_BUDGET = 0.4
_KERNEL_BUDGET = 0.06
_AGAIN_BUDGET = 1.5

Build = Callable[[Sequence[Source]], Mapping[str, Path]]
"""Libraries of sources by symbol. Raises a FuserError when one cannot be built."""


class MeasuredObjective:
    """Seconds of programs on this machine.

    A model's time is the sum of its regions', each counted as often as it occurs. A region's program is timed in turns
    with the best one known, and where it seems to win with the first one, on weights that come from memory as in the
    model; its time is the other one's times the median ratio of runs that followed each other, so that a machine that
    changes its speed does not change the ranking.
    """

    def __init__(
        self,
        space: Space,
        cache: KernelCache | None = None,
        *,
        builder: Build | None = None,
        answer_seconds: float = 60.0,
    ) -> None:
        self.space = space
        self.cache = default_cache() if cache is None else cache
        self.deadline = math.inf
        self.worker = Worker(space.target, space.threads, answer_seconds)
        self.stop = threading.Event()
        self._build = self._ninja if builder is None else builder
        # Beside kernels of a GPU runs the one thread that launches them.
        busy = 1 if space.target.device == "cuda" else space.threads
        spare = len(os.sched_getaffinity(0)) - busy if hasattr(os, "sched_getaffinity") else 0
        self._spare = max(spare, 0)
        # Without spare cores a compiler beside a measurement would be measured too.
        self._quiet = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "fuser-build")
        self._builds: dict[tuple[int, Groups], concurrent.futures.Future[Mapping[str, Path]]] = {}
        self._regions: dict[tuple[int, Groups], RegionTime] = {}
        self._failed: dict[tuple[int, Groups], str] = {}
        self._kernels: dict[tuple[int, int, int], KernelTime] = {}
        self._first: dict[int, tuple[Groups, float]] = {}
        self._best: dict[int, tuple[Groups, float]] = {}
        self._ratios: dict[str, list[float]] = {}

    # ---- the objective

    def expect(self, points: Iterable[Point]) -> None:
        """Start building what the points need and is not measured yet."""
        for point in points:
            for at, program in enumerate(point.regions):
                if (at, program) not in self._regions and (at, program) not in self._failed:
                    self._start_build(at, program)

    def __call__(self, point: Point) -> Outcome:
        building = measuring = 0.0
        times: list[RegionTime] = []
        for at, program in enumerate(point.regions):
            clock = time.perf_counter()
            found = self._remembered(at, program)
            if found is None and (at, program) not in self._failed:
                paths = self._built(at, program)
                building += time.perf_counter() - clock
                clock = time.perf_counter()
                if paths is not None:
                    found = self._measure(at, program, paths)
                measuring += time.perf_counter() - clock
            if found is None:
                name = self.space.regions[at].region.hash
                reason = f"region {name}: {self._failed[at, program]}"
                return Outcome(None, reason, tuple(times), building, measuring)
            times.append(found)
        seconds = math.fsum(space.count * t.seconds for space, t in zip(self.space.regions, times, strict=True))
        return Outcome(seconds, "", tuple(times), building, measuring)

    def kernel(self, region: int, members: int, kernel: int) -> KernelTime:
        key = (region, members, kernel)
        if key not in self._kernels:
            self._kernels[key] = self._kernel(region, members, kernel)
            known = self._kernels[key].seconds
            if known is not None:
                name = self._family(region, members, kernel)
                ratio = known / max(self.space.predicted(region, members, kernel), 1e-12)
                self._ratios.setdefault(name, []).append(ratio)
        return self._kernels[key]

    def costs(self, region: int, members: int, kernel: int) -> float:
        found = self._kernels.get((region, members, kernel))
        if found is not None:
            return math.inf if found.seconds is None else found.seconds
        ratios = self._ratios.get(self._family(region, members, kernel))
        # Hopeful, but not as much as the one kernel that the model is furthest off for: kernels differ by less than
        # predictions err, and a true bound would have nearly all of them measured.
        scale = sorted(ratios)[(len(ratios) - 1) // 4] if ratios else 1.0
        return self.space.predicted(region, members, kernel) * scale

    def compare(self, points: list[Point]) -> list[float] | None:
        """Every point's seconds, regions that differ timed in turns in a new process; infinity for what failed."""
        totals = [0.0] * len(points)
        # All of them have been built, and a search ends with what it has verified.
        self.deadline = math.inf
        self.worker.close()
        for at, space in enumerate(self.space.regions):
            programs = list(dict.fromkeys(point.regions[at] for point in points))
            known = {p: self._regions[at, p].seconds for p in programs if (at, p) in self._regions}
            if len(programs) > 1 or programs[0] not in known:
                paths = {p: found for p in programs if (found := self._built(at, p)) is not None}
                with self._measuring():
                    timings = self.worker.time([self._unit(at, p, found) for p, found in paths.items()], _AGAIN_BUDGET)
                base = next((t.seconds for t in timings if t.seconds is not None), math.inf)
                measured = {p: base * t.ratio for p, t in zip(paths, timings, strict=True) if t.seconds is not None}
                known = {p: measured.get(p, math.inf) for p in programs}
            for i, point in enumerate(points):
                totals[i] += space.count * known[point.regions[at]]
        return totals

    def close(self) -> None:
        self.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.worker.close()

    # ---- measuring

    def _remembered(self, at: int, program: Groups) -> RegionTime | None:
        key = (at, program)
        if key in self._regions:
            return _again(self._regions[key])
        record = self.cache.read_record(PROGRAM_RECORD, self._record_key(at, program))
        if record is None or not isinstance(record.get("seconds"), float):
            return None
        name = self.space.regions[at].region.hash
        found = RegionTime(name, record["seconds"], record["spread"], record["runs"], record["early"], True)
        self._learn(at, program, found)
        return found

    def _measure(self, at: int, program: Groups, paths: Mapping[str, Path]) -> RegionTime | None:
        """Time a region's program against the best one; None when it failed."""
        unit = self._unit(at, program, paths)
        best = self._best.get(at)
        timing, seconds = self._against(best, at, unit, _BUDGET, race=True)
        if best is not None and seconds is not None and seconds < best[1]:
            # Of many noisy times the least is too good, and of winners over winners the more so: what seems to win is
            # timed anew against the first program, and that time counts.
            timing, seconds = self._against(self._first[at], at, unit, _CONFIRM_BUDGET)
        if seconds is None:
            self._failed[at, program] = timing.failure
            return None
        name = self.space.regions[at].region.hash
        found = RegionTime(name, seconds, timing.spread, timing.runs, timing.early)
        self._learn(at, program, found)
        choices = self.space.regions[at].choice(program)
        self._write(
            PROGRAM_RECORD,
            self._record_key(at, program),
            {**_plain(timing), "seconds": seconds, "scheme": str(choices.scheme), "region": name, **self._context()},
        )
        return found

    def _against(
        self, rival: tuple[Groups, float] | None, at: int, unit: Unit, budget: float, *, race: bool = False
    ) -> tuple[Timing, float | None]:
        """The timing of a unit in turns with another program of known time, and its seconds by that one's."""
        paths = None if rival is None else self._built(at, rival[0])
        units = [unit] if rival is None or paths is None else [self._unit(at, rival[0], paths), unit]
        with self._measuring():
            timings = self.worker.time(units, budget, race=race, deadline=self.deadline)
        timing = timings[-1]
        if rival is not None and len(units) == 2 and timings[0].seconds and timing.seconds is not None:
            return timing, rival[1] * timing.ratio
        return timing, timing.seconds

    def _kernel(self, at: int, members: int, kernel: int) -> KernelTime:
        program = ((members, kernel),)
        key = self._record_key(at, program)
        record = self.cache.read_record(KERNEL_RECORD, key)
        if record is not None and isinstance(record.get("seconds"), float):
            return KernelTime(at, members, kernel, record["seconds"], record["spread"])
        clock = time.perf_counter()
        paths = self._built(at, program)
        building = time.perf_counter() - clock
        if paths is None:
            return KernelTime(at, members, kernel, None, failure=self._failed[at, program], building=building)
        with self._measuring():
            (timing,) = self.worker.time([self._unit(at, program, paths)], _KERNEL_BUDGET, deadline=self.deadline)
        if timing.seconds is None:
            return KernelTime(at, members, kernel, None, failure=timing.failure, building=building)
        choice = self.space.regions[at].kernels[members][kernel]
        operators = [op.kind for op in choice.group.operators]
        value = {**_plain(timing), "operators": operators, "family": self._family(at, members, kernel)}
        self._write(KERNEL_RECORD, key, {**value, **self._context()})
        return KernelTime(at, members, kernel, timing.seconds, timing.spread, building=building)

    def _learn(self, at: int, program: Groups, found: RegionTime) -> None:
        self._regions[at, program] = found
        self._first.setdefault(at, (program, found.seconds))
        if at not in self._best or found.seconds < self._best[at][1]:
            self._best[at] = (program, found.seconds)

    def _measuring(self) -> _Measuring:
        return _Measuring(None if self._spare else self._quiet, self.cache.root / "locks" / "measure.lock", self)

    def _unit(self, at: int, program: Groups, paths: Mapping[str, Path]) -> Unit:
        space = self.space.regions[at]
        choices = tuple(space.kernels[members][kernel] for members, kernel in program)
        return Unit(f"{at}:{program}", space.region.hash, choices, paths, space.count)

    # ---- building

    def _start_build(self, at: int, program: Groups) -> concurrent.futures.Future[Mapping[str, Path]]:
        key = (at, program)
        if key not in self._builds:
            self._builds[key] = self._pool.submit(self._build_quietly, self.sources(at, program))
        return self._builds[key]

    def _build_quietly(self, sources: Sequence[Source]) -> Mapping[str, Path]:
        if self._spare:
            return self._build(sources)
        with self._quiet:
            return self._build(sources)

    def _built(self, at: int, program: Groups) -> Mapping[str, Path] | None:
        """The kernels of a program; None when they could not be built. Raises TimeoutError at the deadline."""
        try:
            future = self._start_build(at, program)
            limit = None if math.isinf(self.deadline) else max(self.deadline - time.perf_counter(), 0.0)
            return future.result(limit)
        except concurrent.futures.TimeoutError:
            raise TimeoutError("the time of the search is over") from None
        except (FuserError, OSError) as error:
            self._builds.pop((at, program), None)
            self._failed[at, program] = f"could not be built: {error}"
            return None

    def _ninja(self, sources: Sequence[Source]) -> Mapping[str, Path]:
        target = self.space.target
        jobs = self._spare or None
        return build(sources, target, headers=header_folder(target), cache=self.cache, jobs=jobs, stop=self.stop)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def sources(self, at: int, program: Groups) -> tuple[Source, ...]:
        """What has to be built for some groups of a region."""
        space = self.space.regions[at]
        choices = [space.kernels[members][kernel] for members, kernel in program]
        return assemble(subgraph(choices), choices, self.space.target, self.space.threads).sources

    # ---- remembering

    def _record_key(self, at: int, program: Groups) -> str:
        """Everything that a time depends on: the work, the kernels' sources with their headers, and the machine."""
        space = self.space.regions[at]
        choices = [space.kernels[members][kernel] for members, kernel in program]
        names = {op.name for choice in choices for op in choice.group.operators}
        work = Region(space.region.graph, tuple(op for op in space.region.operators if op.name in names))
        parts = [work.hash, str(space.count), *(f"{k}={v}" for k, v in sorted(self._context().items()))]
        parts += [choice.name for choice in choices]
        parts += [_digest(source, header_folder(self.space.target)) for source in self.sources(at, program)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _context(self) -> dict[str, Any]:
        target = self.space.target
        return {
            "target": target.key,
            "cores": target.cores,
            "threads": self.space.threads,
            "torch": torch.__version__,
        }

    def _write(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        try:
            self.cache.write_record(kind, key, value)
        except CacheError as error:
            # The search itself does not need it.
            logger.warning("a measurement could not be remembered: %s", error)

    def _family(self, region: int, members: int, kernel: int) -> str:
        return self.space.regions[region].kernels[members][kernel].family


class _Measuring:
    """Alone on the machine, as far as other searches and this one's compilers go."""

    def __init__(self, quiet: threading.Lock | None, path: Path, objective: MeasuredObjective) -> None:
        self.quiet = quiet
        self.path = path
        self.objective = objective
        self.lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> None:
        if self.quiet is not None and not self.quiet.acquire(timeout=self._left()):
            raise TimeoutError("the time of the search is over")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.path)
            self.lock.acquire(timeout=self._left())
        except filelock.Timeout:
            self._release()
            raise TimeoutError("the time of the search is over") from None
        except OSError:
            # A cache that cannot be written is measured beside; what is lost is quiet, not a right answer.
            self.lock = None

    def _left(self) -> float:
        deadline = self.objective.deadline
        return -1 if math.isinf(deadline) else max(deadline - time.perf_counter(), 0.0)

    def _release(self) -> None:
        if self.quiet is not None:
            self.quiet.release()

    def __exit__(self, *exception: object) -> None:
        if self.lock is not None:
            self.lock.release()
        self._release()


def _again(found: RegionTime) -> RegionTime:
    return RegionTime(found.region, found.seconds, found.spread, found.runs, found.early, True)


def _plain(timing: Timing) -> dict[str, Any]:
    return {"seconds": timing.seconds, "spread": timing.spread, "runs": timing.runs, "early": timing.early}


@functools.lru_cache(maxsize=4096)
def _digest(source: Source, headers: Path) -> str:
    found = hashlib.sha256(source.text.encode())
    for name, content in sorted(included_headers(source.text, headers).items()):
        found.update(name.encode() + b"\0" + content)
    return found.hexdigest()
