"""One process's part in a study: the phases of a search, from the default scheme to the verified best program."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fuser.ir.errors import CacheError, SearchError
from fuser.runtime.cache import KernelCache, default_cache
from fuser.search import records
from fuser.search.history import History, KernelTimes
from fuser.search.ledger import Ledger
from fuser.search.objective import Objective, Outcome
from fuser.search.proposals import Proposal, Proposals, parameters
from fuser.search.results import Phase, Progress, SearchResult
from fuser.search.space import Point, Space

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger("fuser")
_AHEAD = 2
_CONTENDERS = 3


@dataclass(frozen=True)
class Limits:
    """When a search ends: with ``trials`` of the study, ``timeout`` seconds after its start, or when ``plateau`` trials
    in a row, or a few that took ``patience`` seconds, brought nothing better."""

    trials: int
    timeout: float | None = None
    plateau: int | None = None
    patience: float = math.inf


class _Stop(Exception):  # noqa: N818
    """Ends a search, with its reason."""


class Run:
    """One process's part in one study; ``sampler`` is None for the strategy ``"exact"``."""

    def __init__(
        self,
        ledger: Ledger,
        space: Space,
        objective: Objective,
        strategy: str,
        sampler: optuna.samplers.BaseSampler | None,
        limits: Limits,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.ledger = ledger
        self.space = space
        self.objective = objective
        self.strategy = strategy
        self.limits = limits
        self.progress = progress
        self.history = History()
        self.kernels = KernelTimes(space)
        self.proposals = Proposals(space, sampler)
        self.deadline = math.inf if limits.timeout is None else self.history.started + limits.timeout
        self.phase: Phase = "build"
        self.imported: set[int] = set()
        self.waiting: list[Proposal] = []

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
                if text not in self.history.times and self._has_trials:
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
        for proposal in self.waiting:
            self.proposals.end(proposal)
        if self.history.best is None:
            raise self._nothing(stopped)
        return self._result(stopped)

    def _nothing(self, stopped: str) -> SearchError:
        name = self.ledger.name
        if stopped == "timeout":
            return SearchError(
                f"the timeout of {self.limits.timeout:g} s ended before one program was built and measured; give it "
                f"more time (what was built is kept, so the study {name!r} can be resumed)"
            )
        if stopped == "interrupted":
            return SearchError(f"interrupted before one program was measured; resume the study {name!r}")
        reasons = "; ".join(dict.fromkeys(reason for _, reason in self.history.failures[:3]))
        return SearchError(f"no program of this model could be measured: {reasons or 'no trials'}")

    def _start(self) -> None:
        """The default scheme, which everything is compared with."""
        self.phase = "build"
        self._report("building the default scheme")
        default = self.space.default()
        if str(default) not in self.history.times:
            self._attempt(default, "start")
        self.history.default = self.history.times.get(str(default))
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
            missing = list(self.kernels.missing(point))
            if not missing:
                break
            self.objective.expect([point])
            for kernel in missing:
                self._check_time()
                self._kernel(*kernel)
        self._note_kernels()
        self.phase = "trials"
        if str(point) not in self.history.times and self._has_trials:
            self._attempt(point, "exact")

    def _kernel(self, at: int, members: int, kernel: int) -> None:
        clock = time.perf_counter()
        try:
            found = self.objective.kernel(at, members, kernel)
        except TimeoutError:
            raise _Stop("timeout") from None
        self.history.building += found.building
        self.history.measuring += time.perf_counter() - clock - found.building
        self.kernels[at, members, kernel] = found
        self._report(f"kernel {len(self.kernels)}")

    def _explore(self) -> None:
        """Ask the sampler, with a few programs being built ahead of the one that is measured."""
        from fuser.search.samplers import ExhaustedError

        self.phase = "trials"
        self.history.wait()
        exhausted = False
        while True:
            self._check_time()
            room = min(_AHEAD, self.limits.trials - self.history.trials)
            while not exhausted and len(self.waiting) < room:
                pending = [str(proposal.point) for proposal in self.waiting]
                try:
                    self.waiting.append(self.proposals.next(self.history.times, pending))
                except ExhaustedError:
                    exhausted = True
            if not self.waiting or not self._has_trials:
                raise _Stop("exhausted" if exhausted and self._has_trials else "trials")
            self.objective.expect([proposal.point for proposal in self.waiting])
            proposal = self.waiting.pop(0)
            self._attempt(proposal.point, self.strategy, proposal)
            self._sync()
            if self.history.is_plateau(self.limits.plateau, self.limits.patience):
                raise _Stop("plateau")

    # ---- one trial

    def _attempt(self, point: Point, strategy: str, proposal: Proposal | None = None) -> None:
        from fuser.search.samplers import GROUP

        notes = {} if proposal is None else self.proposals.notes(proposal)
        attrs = {"point": str(point), "strategy": strategy, "group": str(notes.get(GROUP, "")), "notes": notes}
        number = self.ledger.claim(attrs, *parameters(self.space, point))
        self.imported.add(number)
        if strategy != "start" and not self.proposals.repeats and self._is_taken(number, point):
            self.ledger.finish(number, None, {"failure": "another process has this program"}, duplicate=True)
            self.history.duplicates += 1
            if proposal is not None:
                self.proposals.end(proposal)
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
        self.history.building += outcome.building
        self.history.measuring += outcome.measuring
        self.ledger.finish(number, outcome.seconds, _details(outcome))
        if outcome.is_remembered:
            self.history.remembered += 1
        else:
            self.history.measured += 1
        self.history.learn(number, point, outcome.seconds, outcome.failure)
        if proposal is not None:
            self.proposals.end(proposal, outcome.seconds)
        else:
            self.proposals.add(point, outcome.seconds, notes)
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
                self.proposals.add(point, value, trial.user_attrs.get("notes", {}))
            except Exception as error:
                raise self.ledger.damaged(error) from error
            self.history.learn(trial.number, point, value, str(details.get("failure", "")))

    # ---- ends

    @property
    def _has_trials(self) -> bool:
        """Whether there are trials left."""
        return self.history.trials < self.limits.trials

    def _check_time(self) -> None:
        if time.perf_counter() >= self.deadline:
            raise _Stop("timeout")

    def _verified(self, best: tuple[float, Point]) -> tuple[float, Point, float | None]:
        """The fastest of the default program and the best others, which are measured against each other once more, its
        time, and how many times faster than the default one it is; ``best`` and None where nothing could be compared.
        """
        default = self.space.default()
        contenders = [default, *self.history.fastest(_CONTENDERS, default)]
        if len(contenders) == 1 or self.history.default is None:
            return *best, None
        self.phase = "verify"
        self._report("measuring the best programs again in a fresh process")
        clock = time.perf_counter()
        try:
            again = self.objective.compare(contenders)
        finally:
            self.history.measuring += time.perf_counter() - clock
        if again is None or not math.isfinite(min(again)):
            return *best, None
        at = int(np.argmin(again))
        return self.history.times[str(contenders[at])] or again[at], contenders[at], again[0] / again[at]

    def _result(self, stopped: str) -> SearchResult:
        history = self.history
        assert history.best is not None
        (seconds, best), speedup = history.best, None
        if stopped != "interrupted":
            try:
                seconds, best, speedup = self._verified(history.best)
            except KeyboardInterrupt:
                stopped = "interrupted"
        self._note_kernels()
        result = SearchResult(
            study=self.ledger.name,
            storage=self.ledger.storage,
            strategy=self.strategy,
            space=self.space,
            best=best,
            choices=self.kernels.choices(best),
            seconds=seconds,
            default_seconds=history.default if history.default is not None else math.inf,
            speedup=speedup,
            trials=history.trials,
            measured=history.measured,
            remembered=history.remembered,
            failures=tuple(history.failures),
            pruned=dict(self.space.pruned),
            rank_correlation=self.kernels.rank_correlation(),
            kernels_measured=len(self.kernels),
            programs=self.space.programs,
            schemes=self.space.schemes,
            stopped=stopped,
            seconds_building=history.building,
            seconds_measuring=history.measuring,
            seconds_searching=history.searching,
            seconds_total=history.elapsed,
        )
        self.ledger.note("result", result.record)
        return result

    def _note_kernels(self) -> None:
        if len(self.kernels):
            self.ledger.note("kernels", self.kernels.record())

    def _report(self, message: str) -> None:
        if self.progress is None:
            return
        history = self.history
        eta = None
        if self.phase == "trials" and history.measured + history.remembered:
            each = history.elapsed / (history.measured + history.remembered)
            eta = each * max(self.limits.trials - history.trials, 0)
            eta = min(eta, max(self.deadline - time.perf_counter(), 0.0))
        self.progress(
            Progress(
                phase=self.phase,
                study=self.ledger.name,
                trials=history.trials,
                of=self.limits.trials,
                failures=len(history.failures),
                duplicates=history.duplicates,
                best=None if history.best is None else history.best[0],
                default=history.default,
                elapsed=history.elapsed,
                eta=eta,
                kernels_measured=len(self.kernels),
                kernels_total=self.kernels.total,
                message=message,
            )
        )


def remember(result: SearchResult, cache: KernelCache | None) -> None:
    """Keep the best program as the tuning of its regions, once it was compared with the default one, or has none to be
    compared with."""
    if result.speedup is None and not (math.isinf(result.default_seconds) and result.stopped != "interrupted"):
        return
    cache = default_cache() if cache is None else cache
    details = {"study": result.study, "speedup": result.speedup, "trials": result.trials}
    for space in result.space.regions:
        choice = result.choices[space.region.hash]
        try:
            records.write(cache, space.region, choice, result.space.target, result.space.threads, details)
        except CacheError as error:
            logger.warning("what the search found could not be remembered: %s", error)


def _details(outcome: Outcome) -> dict[str, Any]:
    return {
        "failure": outcome.failure,
        "remembered": outcome.is_remembered,
        "building": outcome.building,
        "measuring": outcome.measuring,
        "regions": [dataclasses.asdict(time) for time in outcome.regions],
    }
