"""One process's part in a study: the phases of a search, from the default scheme to the verified best program."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fuser.codegen.partition import Choice
from fuser.ir.errors import CacheError, SearchError
from fuser.runtime.cache import KernelCache, default_cache
from fuser.search import records
from fuser.search.ledger import Ledger
from fuser.search.objective import KernelTime, Objective, Outcome
from fuser.search.space import Point, Space

if TYPE_CHECKING:
    import optuna

    from fuser.search.samplers import Decode

logger = logging.getLogger("fuser")
_AHEAD = 2
_REPEATS = 200
_CONTENDERS = 3
_FEW_TRIALS = 8
_GAIN = 0.005
"""Of many measured programs some are this much faster by chance."""
Phase = str
"""``"build"``, ``"kernels"``, ``"trials"`` or ``"verify"``."""


@dataclass(frozen=True)
class Progress:
    """Where a search stands. Times in seconds; ``best`` and ``default`` are of the whole model."""

    phase: Phase
    study: str
    trials: int
    of: int
    failures: int
    duplicates: int
    best: float | None
    default: float | None
    elapsed: float
    eta: float | None
    kernels_measured: int
    kernels_total: int
    message: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found. ``choices`` are by region hash; ``seconds`` and ``default_seconds`` of the whole model;
    ``speedup`` is default over best, both measured once more against each other in a fresh process (None when that was
    not done). ``trials`` counts all of the study, ``measured`` and ``remembered`` those of this call.
    ``rank_correlation`` is Spearman's, of predicted and measured kernel times."""

    study: str
    storage: str
    strategy: str
    space: Space
    best: Point
    choices: Mapping[str, Choice]
    seconds: float
    default_seconds: float
    speedup: float | None
    trials: int
    measured: int
    remembered: int
    failures: tuple[tuple[int, str], ...]
    pruned: Mapping[str, int]
    rank_correlation: float | None
    kernels_measured: int
    programs: int
    schemes: int
    stopped: str
    seconds_building: float
    seconds_measuring: float
    seconds_searching: float
    seconds_total: float

    def summary(self) -> str:
        """The result in a few lines."""
        gain = self.default_seconds / self.seconds if self.seconds else 1.0
        default = f"the default scheme {self.default_seconds * 1e3:.3f} ms ({gain:.3f}×"
        default += f"{'' if self.speedup is None else f'; {self.speedup:.3f}× when measured again'})"
        if math.isinf(self.default_seconds):
            default = "the default scheme failed"
        exact = "" if self.space.is_exact else "at least "
        lines = [
            f"{self.study}: {self.seconds * 1e3:.3f} ms, {default}",
            f"{exact}{self.programs} distinct programs of {exact}{self.schemes} schemes; {self.trials} trials, "
            f"{self.measured} measured and {self.remembered} remembered now, {len(self.failures)} failed; "
            f"ended by {self.stopped}",
            f"{self.seconds_total:.1f} s: building {self.seconds_building:.1f}, "
            f"measuring {self.seconds_measuring:.1f}, searching {self.seconds_searching:.1f}",
        ]
        if self.rank_correlation is not None:
            lines.append(
                f"{self.kernels_measured} kernels measured; rank correlation with the cost model "
                f"{self.rank_correlation:.2f}"
            )
        lines += [f"{count} kernels left out: {reason}" for reason, count in self.pruned.items()]
        return "\n".join(lines)


class _Stop(Exception):  # noqa: N818
    """Ends a search, with its reason."""


class Run:
    """One process's part in one study."""

    def __init__(
        self,
        ledger: Ledger,
        space: Space,
        objective: Objective,
        strategy: str,
        seed: int,
        trials: int,
        timeout: float | None,
        plateau: int | None,
        patience: float,
        progress: Callable[[Progress], None] | None,
        decode: Decode | None,
        cache: KernelCache | None,
    ) -> None:
        import optuna

        from fuser.search.samplers import make_sampler

        self.ledger = ledger
        self.space = space
        self.objective = objective
        self.strategy = strategy
        self.trials = trials
        self.plateau = plateau
        self.patience = patience
        self.progress = progress
        self.cache = cache
        self.started = time.perf_counter()
        self.deadline = math.inf if timeout is None else self.started + timeout
        self.timeout = timeout
        # Samplers work on a copy in memory: a proposal is dozens of writes, and the storage sees it as one.
        self.mirror = optuna.create_study()
        if strategy != "exact":
            self.mirror.sampler = make_sampler(strategy, space, seed, objective.costs, decode)
        self.imported: set[int] = set()
        self.values: dict[str, float | None] = {}
        """Programs that have ended, here or elsewhere, with their time or None when they failed."""
        self.counted = 0
        self.failures: list[tuple[int, str]] = []
        self.duplicates = 0
        self.best: tuple[float, Point] | None = None
        self.default: float | None = None
        self.since_gain = 0
        self.gained = math.inf
        """The best time when it last fell by more than noise."""
        self.gained_at = self.started
        self.measured = 0
        self.remembered = 0
        self.kernel_times: dict[tuple[int, int, int], KernelTime] = {}
        self.building = 0.0
        self.measuring = 0.0
        self.phase: Phase = "build"
        self.waiting: list[tuple[optuna.Trial, Point]] = []

    # ---- the whole

    def run(self) -> SearchResult:
        stopped = "trials"
        try:
            died = self.ledger.fail_stale()
            self._sync()
            self.objective.deadline = self.deadline
            self._start()
            for text in died:
                # A proposal is not lost with the process that made it.
                if text not in self.values and self.counted < self.trials:
                    self._check_time()
                    self._attempt(Point.parse(text), self.strategy)
            if self.strategy in ("default", "exact"):
                self._shortest_path()
            if self.strategy != "exact":
                self._explore()
        except _Stop as reason:
            stopped = str(reason)
        except KeyboardInterrupt:
            stopped = "interrupted"
        for trial, _ in self.waiting:
            self.mirror.tell(trial, state=_state("FAIL"))
        if self.best is None:
            raise self._nothing(stopped)
        return self._result(stopped)

    def _nothing(self, stopped: str) -> SearchError:
        if stopped == "timeout":
            return SearchError(
                f"the timeout of {self.timeout:g} s ended before one program was built and measured; give it more time "
                f"(what was built is kept, so the study {self.ledger.name!r} can be resumed)"
            )
        if stopped == "interrupted":
            return SearchError(f"interrupted before one program was measured; resume the study {self.ledger.name!r}")
        reasons = "; ".join(dict.fromkeys(reason for _, reason in self.failures[:3]))
        return SearchError(f"no program of this model could be measured: {reasons or 'no trials'}")

    def _start(self) -> None:
        """The default scheme, which everything is compared with."""
        self.phase = "build"
        self._report("building the default scheme")
        default = self.space.default()
        if str(default) not in self.values:
            self._attempt(default, "start")
        self.default = self.values.get(str(default))
        self.phase = "trials"

    def _shortest_path(self) -> None:
        """Measure the kernels on the cheapest path, predictions standing in for what was not measured, until all on it
        are measured: where predictions are bounds, no other path is cheaper."""
        while True:
            self._check_time()
            self.phase = "kernels"
            try:
                point = self.space.shortest(self.objective.costs)
            except SearchError:
                return
            missing = [
                (at, mask, kernel)
                for at, program in enumerate(point.regions)
                for mask, kernel in program
                if (at, mask, kernel) not in self.kernel_times
            ]
            if not missing:
                break
            self.objective.expect([point])
            for at, mask, kernel in missing:
                self._check_time()
                self._kernel(at, mask, kernel)
        self._note_kernels()
        self.phase = "trials"
        if str(point) not in self.values and self.counted < self.trials:
            self._attempt(point, "exact")

    def _kernel(self, at: int, mask: int, kernel: int) -> None:
        clock = time.perf_counter()
        try:
            found = self.objective.kernel(at, mask, kernel)
        except TimeoutError:
            raise _Stop("timeout") from None
        self.building += found.building
        self.measuring += time.perf_counter() - clock - found.building
        self.kernel_times[at, mask, kernel] = found
        self._report(f"kernel {len(self.kernel_times)}")

    def _explore(self) -> None:
        """Ask the sampler, with a few programs being built ahead of the one that is measured."""
        from fuser.search.samplers import ExhaustedError

        self.phase = "trials"
        self.gained_at = time.perf_counter()
        exhausted = False
        while True:
            self._check_time()
            while not exhausted and len(self.waiting) < _AHEAD and self.counted + len(self.waiting) < self.trials:
                try:
                    self.waiting.append(self._propose())
                except ExhaustedError:
                    exhausted = True
            if not self.waiting or self.counted >= self.trials:
                raise _Stop("exhausted" if exhausted and self.counted < self.trials else "trials")
            self.objective.expect([point for _, point in self.waiting])
            trial, point = self.waiting.pop(0)
            self._attempt(point, self.strategy, trial)
            self._sync()
            if self._is_plateau():
                raise _Stop("plateau")

    def _is_plateau(self) -> bool:
        """Whether trials have brought nothing for so many, or a few of them for so long."""
        waited = time.perf_counter() - self.gained_at
        return (self.plateau is not None and self.since_gain >= self.plateau) or (
            self.since_gain >= _FEW_TRIALS and waited > self.patience
        )

    def _propose(self) -> tuple[optuna.Trial, Point]:
        """A trial of the mirror with a program that is new, unless the sampler means to repeat."""
        from fuser.search.samplers import ExhaustedError, suggest

        pending = {str(point) for _, point in self.waiting}
        for _ in range(_REPEATS):
            trial = self.mirror.ask()
            try:
                point = suggest(trial, self.space)
            except ExhaustedError:
                self.mirror.tell(trial, state=_state("FAIL"))
                raise
            known = str(point)
            if getattr(self.mirror.sampler, "repeats", False) or (known not in self.values and known not in pending):
                return trial, point
            value = self.values.get(known)
            self.mirror.tell(trial, value, state=None if value is not None else _state("FAIL"))
        raise ExhaustedError

    # ---- one trial

    def _attempt(self, point: Point, strategy: str, trial: optuna.Trial | None = None) -> None:
        from fuser.search.samplers import GROUP, distributions, encode

        notes = dict(self.mirror.get_trials(deepcopy=False)[trial.number].system_attrs) if trial is not None else {}
        params = encode(self.space, point)
        known = distributions(self.space)
        attrs = {"point": str(point), "strategy": strategy, "group": str(notes.get(GROUP, "")), "notes": notes}
        number = self.ledger.claim(attrs, params, {name: known[name] for name in params})
        self.imported.add(number)
        if strategy != "start" and not getattr(self.mirror.sampler, "repeats", False) and self._is_taken(number, point):
            self.ledger.finish(number, None, {"failure": "another process has this program"}, duplicate=True)
            self.duplicates += 1
            if trial is not None:
                self.mirror.tell(trial, state=_state("FAIL"))
            return
        try:
            outcome = self.objective(point)
        except TimeoutError:
            self.ledger.finish(number, None, {"failure": "the search's time was over", "died": True})
            raise _Stop("timeout") from None
        except BaseException as error:
            with contextlib.suppress(SearchError):
                self.ledger.finish(number, None, {"failure": f"interrupted: {type(error).__name__}", "died": True})
            raise
        self.building += outcome.building
        self.measuring += outcome.measuring
        self.ledger.finish(number, outcome.seconds, _details(outcome))
        if outcome.is_remembered:
            self.remembered += 1
        else:
            self.measured += 1
        self._learn(number, point, outcome.seconds, outcome.failure)
        if trial is not None:
            self.mirror.tell(trial, outcome.seconds, state=None if outcome.seconds is not None else _state("FAIL"))
        else:
            self._add_to_mirror(point, outcome.seconds, notes)
        what = f"{outcome.seconds * 1e3:.3f} ms" if outcome.seconds is not None else outcome.failure
        self._report(f"trial {number}: {what}")

    def _is_taken(self, number: int, point: Point) -> bool:
        """Whether an earlier trial has this program and did not fail by dying. Claims are numbered as they are made, so
        of several processes with one program exactly one, the first, goes on."""
        text = str(point)
        return any(
            t.number < number
            and t.user_attrs.get("point") == text
            and t.state.name in ("RUNNING", "COMPLETE", "FAIL")
            and not t.user_attrs.get("details", {}).get("died")
            for t in self.ledger.trials()
        )

    def _learn(self, number: int, point: Point, seconds: float | None, failure: str) -> None:
        self.values[str(point)] = seconds
        self.counted += 1
        self.since_gain += 1
        if seconds is None:
            self.failures.append((number, failure))
        elif self.best is None or seconds < self.best[0]:
            self.best = (seconds, point)
            if seconds < self.gained * (1 - _GAIN):
                self.gained, self.gained_at, self.since_gain = seconds, time.perf_counter(), 0

    def _add_to_mirror(self, point: Point, seconds: float | None, notes: Mapping[str, Any]) -> None:
        import optuna

        from fuser.search.samplers import distributions, encode

        params = encode(self.space, point)
        known = distributions(self.space)
        self.mirror.add_trial(
            optuna.trial.create_trial(
                state=_state("COMPLETE" if seconds is not None else "FAIL"),
                value=seconds,
                params=params,
                distributions={name: known[name] for name in params},
                user_attrs={"point": str(point)},
                system_attrs=dict(notes),
            )
        )

    def _sync(self) -> None:
        """Learn from trials that other processes, or earlier ones, have ended."""
        for trial in self.ledger.trials():
            if trial.number in self.imported or not trial.state.is_finished() or "point" not in trial.user_attrs:
                continue
            self.imported.add(trial.number)
            try:
                details = trial.user_attrs.get("details", {})
                if trial.state.name == "PRUNED" or details.get("died"):
                    continue
                point = Point.parse(trial.user_attrs["point"])
                value = trial.value if trial.state.name == "COMPLETE" else None
                self._add_to_mirror(point, value, trial.user_attrs.get("notes", {}))
            except Exception as error:
                raise self.ledger.damaged(error) from error
            self._learn(trial.number, point, value, str(details.get("failure", "")))

    # ---- ends

    def _check_time(self) -> None:
        if time.perf_counter() >= self.deadline:
            raise _Stop("timeout")

    def _contenders(self) -> list[Point]:
        """The default program and the fastest others."""
        default = self.space.default()
        ranked = sorted((v, p) for p, v in self.values.items() if v is not None and p != str(default))
        return [default, *(Point.parse(p) for _, p in ranked[:_CONTENDERS])]

    def _result(self, stopped: str) -> SearchResult:
        assert self.best is not None
        seconds, best = self.best
        speedup = None
        contenders = self._contenders()
        if stopped != "interrupted" and len(contenders) > 1 and self.default is not None:
            self.phase = "verify"
            self._report("measuring the best programs again in a fresh process")
            clock = time.perf_counter()
            again = None
            try:
                again = self.objective.compare(contenders)
            except KeyboardInterrupt:
                stopped = "interrupted"
            self.measuring += time.perf_counter() - clock
            if again is not None and math.isfinite(min(again)):
                at = int(np.argmin(again))
                best, speedup = contenders[at], again[0] / again[at]
                seconds = self.values[str(best)] or again[at]
        self._note_kernels()
        result = SearchResult(
            study=self.ledger.name,
            storage=self.ledger.storage,
            strategy=self.strategy,
            space=self.space,
            best=best,
            choices=self._choices(best),
            seconds=seconds,
            default_seconds=self.default if self.default is not None else math.inf,
            speedup=speedup,
            trials=self.counted,
            measured=self.measured,
            remembered=self.remembered,
            failures=tuple(self.failures),
            pruned=dict(self.space.pruned),
            rank_correlation=self.rank_correlation(),
            kernels_measured=len(self.kernel_times),
            programs=self.space.programs,
            schemes=self.space.schemes,
            stopped=stopped,
            seconds_building=self.building,
            seconds_measuring=self.measuring,
            seconds_searching=max(time.perf_counter() - self.started - self.building - self.measuring, 0.0),
            seconds_total=time.perf_counter() - self.started,
        )
        plain = {
            f.name: getattr(result, f.name)
            for f in dataclasses.fields(result)
            if f.name not in ("space", "best", "choices", "programs", "schemes", "failures")
        }
        plain["best"] = str(best)
        if math.isinf(plain["default_seconds"]):
            plain["default_seconds"] = None
        self.ledger.note("result", plain)
        if speedup is not None or (self.default is None and stopped != "interrupted"):
            self._remember(result)
        return result

    def _choices(self, point: Point) -> dict[str, Choice]:
        """The choices of a point, with the times of kernels that were measured."""
        found = {}
        for at, (space, program) in enumerate(zip(self.space.regions, point.regions, strict=True)):
            choice = space.choice(program)
            kernels = []
            for (mask, kernel), group in zip(program, choice.groups, strict=True):
                known = self.kernel_times.get((at, mask, kernel))
                if known is not None and known.seconds is not None:
                    group = dataclasses.replace(group, seconds=known.seconds, measured=True)
                kernels.append(group)
            found[space.region.hash] = Choice(choice.scheme, tuple(kernels))
        return found

    def _remember(self, result: SearchResult) -> None:
        """Keep the best program as the tuning of its regions."""
        cache = default_cache() if self.cache is None else self.cache
        details = {"study": result.study, "speedup": result.speedup, "trials": result.trials}
        for space in self.space.regions:
            choice = result.choices[space.region.hash]
            try:
                records.write(cache, space.region, choice, self.space.target, self.space.threads, details)
            except CacheError as error:
                logger.warning("what the search found could not be remembered: %s", error)

    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted and measured times of kernels; None for fewer than three."""
        pairs = [
            (self.space.predicted(*key), time.seconds)
            for key, time in self.kernel_times.items()
            if time.seconds is not None
        ]
        return spearman([p for p, _ in pairs], [m for _, m in pairs])

    def _note_kernels(self) -> None:
        kernels = [
            {
                "region": at,
                "mask": f"{mask:x}",
                "kernel": kernel,
                "predicted": self.space.predicted(at, mask, kernel),
                "seconds": time.seconds,
                "spread": time.spread,
                "failure": time.failure,
            }
            for (at, mask, kernel), time in self.kernel_times.items()
        ]
        if kernels:
            self.ledger.note("kernels", kernels)

    def _report(self, message: str) -> None:
        if self.progress is None:
            return
        elapsed = time.perf_counter() - self.started
        eta = None
        if self.phase == "trials" and self.measured + self.remembered:
            eta = elapsed / (self.measured + self.remembered) * max(self.trials - self.counted, 0)
            eta = min(eta, max(self.deadline - time.perf_counter(), 0.0))
        self.progress(
            Progress(
                phase=self.phase,
                study=self.ledger.name,
                trials=self.counted,
                of=self.trials,
                failures=len(self.failures),
                duplicates=self.duplicates,
                best=None if self.best is None else self.best[0],
                default=self.default,
                elapsed=elapsed,
                eta=eta,
                kernels_measured=len(self.kernel_times),
                kernels_total=sum(len(k) for space in self.space.regions for k in space.allowed.values()),
                message=message,
            )
        )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None for fewer than three pairs or constant ranks."""
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = ((ends - counts + ends - 1) / 2.0)[inverse]
    return ranks


def _state(name: str) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[name]


def _details(outcome: Outcome) -> dict[str, Any]:
    return {
        "failure": outcome.failure,
        "remembered": outcome.is_remembered,
        "building": outcome.building,
        "measuring": outcome.measuring,
        "regions": [dataclasses.asdict(time) for time in outcome.regions],
    }
