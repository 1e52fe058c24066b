"""Searches as studies: proposed, measured and kept so that they can be stopped, resumed, shared and reported."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fuser.codegen.partition import Choice
from fuser.ir.errors import CacheError, SearchError
from fuser.ir.graph import OperatorGraph, Region
from fuser.ir.target import Target
from fuser.runtime.cache import KernelCache, default_cache
from fuser.search import records
from fuser.search.objective import KernelTime, Objective, Outcome
from fuser.search.space import Point, Space

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from fuser.search.samplers import Decode

logger = logging.getLogger("fuser")
STRATEGIES = ("default", "exact", "reward", "random", "anneal", "tpe", "gp", "atoffer", "atoffer-published")
"""``default`` is the shortest path over measured kernels, then group rewards around it; ``exact`` the shortest path
alone; the others propose every program by themselves, from the default scheme on."""
VERSION = 1
_SLACK = 1.5
_PLATEAU = 60
_AHEAD = 2
_REPEATS = 200
_STALE_SECONDS = 900.0
_CONTENDERS = 3
_OURS = "fuser"
Phase = str
"""``"build"``, ``"kernels"``, ``"trials"`` or ``"verify"``."""


@dataclass(frozen=True)
class TrialView:
    """One trial of a study.

    ``state`` is ``"complete"``, ``"failed"``, ``"duplicate"`` (another process had the same program) or ``"running"``;
    ``seconds`` the whole model's, regions counted as often as they occur; ``group`` the natural group that the reward
    sampler drew anew; ``regions`` and ``kernels`` the parts, see :class:`~fuser.search.objective.RegionTime`.
    ``started`` and ``finished`` are in seconds since 1970.
    """

    number: int
    state: str
    seconds: float | None
    point: str
    strategy: str
    group: str
    failure: str
    regions: tuple[Mapping[str, Any], ...]
    kernels: tuple[tuple[Mapping[str, Any], ...], ...]
    started: float
    finished: float | None
    owner: str
    remembered: bool


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
    last: TrialView | None = None


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
        exact = "" if self.space.is_exact else "at least "
        lines = [
            f"{self.study}: {self.seconds * 1e3:.3f} ms, the default scheme {self.default_seconds * 1e3:.3f} ms "
            f"({gain:.3f}×{'' if self.speedup is None else f'; {self.speedup:.3f}× when measured again'})",
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


@dataclass(frozen=True)
class StudyView:
    """A study as it is in its storage, for reports; ``space`` is :meth:`Space.describe`, ``kernels`` the measured
    kernels, ``result`` the numbers of the last finished search, empty before; ``attributes`` what whoever started it
    keeps with it."""

    name: str
    storage: str
    created: float
    strategy: str
    seed: int
    trials_wanted: int
    space: Mapping[str, Any]
    context: Mapping[str, Any]
    attributes: Mapping[str, Any]
    trials: tuple[TrialView, ...]
    kernels: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any]
    optuna: Any = field(repr=False)

    @property
    def best(self) -> TrialView | None:
        """The fastest complete trial."""
        done = [t for t in self.trials if t.state == "complete" and t.seconds is not None]
        return min(done, key=lambda t: (t.seconds, t.number), default=None)

    @property
    def default(self) -> TrialView | None:
        """The trial of the default scheme."""
        return next((t for t in self.trials if t.strategy == "start" and t.state == "complete"), None)


def list_studies(storage: str | None = None) -> list[str]:
    """Names of all studies of fuser in a storage, the newest last; none when there is no storage yet."""
    import optuna

    from fuser.search.storage import default_storage, open_storage, studies_in, translated

    folder = Path(default_storage() if storage is None else storage).expanduser()
    if storage is None or ("://" not in storage and folder.is_dir()):
        return studies_in(folder)
    found, name = open_storage(storage, create=False)
    with translated(name):
        summaries = optuna.get_all_study_summaries(found)
        ours = [s for s in summaries if _OURS in s.user_attrs]
        return [s.study_name for s in sorted(ours, key=lambda s: float(s.user_attrs[_OURS]["created"]))]


def open_study(name: str, storage: str | None = None) -> StudyView:
    """The study called ``name``. Raises SearchError when there is none, or it is of another version of fuser."""
    ledger = Ledger.open(name, storage)
    return ledger.view()


class Ledger:
    """One study in its storage. Every method may raise SearchError when the storage fails."""

    def __init__(self, study: optuna.Study, storage: str) -> None:
        self.study = study
        self.storage = storage

    @property
    def name(self) -> str:
        return str(self.study.study_name)

    @classmethod
    def open(cls, name: str, storage: str | None) -> Ledger:
        """The study called ``name``, which must exist."""
        import optuna

        from fuser.search.storage import located, open_storage, shown, translated

        place = located(storage, name)
        if place != storage and not Path(place).exists():
            known = ", ".join(list_studies(storage)[-5:]) or "none"
            raise SearchError(f"there is no study {name!r} in {Path(place).parent}; the newest there: {known}")
        found, where = open_storage(place, create=False)
        with translated(where):
            try:
                study = optuna.load_study(study_name=name, storage=found)
            except KeyError as error:
                known = ", ".join(list_studies(storage)[-5:]) or "none"
                raise SearchError(f"there is no study {name!r} in {shown(where)}; the newest there: {known}") from error
        ledger = cls(study, where)
        ledger._check_version()
        return ledger

    @classmethod
    def create(cls, name: str, storage: str | None, header: Mapping[str, Any]) -> Ledger:
        """The study called ``name``, made with ``header`` unless another process was first."""
        import optuna

        from fuser.search.storage import located, open_storage, translated

        found, where = open_storage(located(storage, name))
        with translated(where):
            study = optuna.create_study(study_name=name, storage=found, load_if_exists=True)
            ledger = cls(study, where)
            if _OURS not in study.user_attrs:
                # Read again: another process may have made the study, its header and a trial in this order.
                if study.get_trials(deepcopy=False) and _OURS not in study.user_attrs:
                    raise SearchError(f"the study {name!r} in {where} was not made by fuser; choose another name")
                study.set_user_attr(_OURS, dict(header))
        ledger._check_version()
        return ledger

    def _check_version(self) -> None:
        version = self.header.get("version")
        if version != VERSION:
            what = "was not made by fuser" if version is None else f"has version {version}, this fuser reads {VERSION}"
            raise SearchError(f"the study {self.name!r} {what}; start a new one")

    @property
    def header(self) -> dict[str, Any]:
        """What the study was made with."""
        with self._translated():
            return dict(self.study.user_attrs.get(_OURS, {}))

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        from fuser.search.storage import translated

        return translated(self.storage)

    def note(self, key: str, value: Any) -> None:
        """Keep something with the study."""
        with self._translated():
            self.study.set_user_attr(key, value)

    def trials(self) -> list[FrozenTrial]:
        """All trials by number."""
        with self._translated():
            return sorted(self.study.get_trials(deepcopy=False), key=lambda t: t.number)

    def claim(self, attrs: Mapping[str, Any], params: Mapping[str, Any], distributions: Mapping[str, Any]) -> int:
        """Start a trial in one write; its number."""
        import optuna

        claim = uuid.uuid4().hex
        with self._translated():
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=dict(params),
                    distributions=dict(distributions),
                    user_attrs={**attrs, "claim": claim, "owner": _owner()},
                )
            )
            return next(
                t.number for t in reversed(self.study.get_trials(deepcopy=False)) if t.user_attrs.get("claim") == claim
            )

    def finish(
        self, number: int, seconds: float | None, details: Mapping[str, Any], *, duplicate: bool = False
    ) -> None:
        """End a trial: complete with its time, failed with ``details["failure"]``, or another process's duplicate."""
        import optuna

        states = optuna.trial.TrialState
        with self._translated():
            trial = next(t for t in self.study.get_trials(deepcopy=False) if t.number == number)
            if trial.state.is_finished():
                return
            optuna.trial.Trial(self.study, trial._trial_id).set_user_attr("details", dict(details))
            if seconds is not None:
                self.study.tell(number, seconds)
            else:
                self.study.tell(number, state=states.PRUNED if duplicate else states.FAIL)

    def fail_stale(self) -> list[str]:
        """Fail the running trials whose process is gone, and return their programs, which may be tried again."""
        found = []
        now = time.time()
        for trial in self.trials():
            if trial.state.is_finished():
                continue
            reason = _gone(trial.user_attrs.get("owner", ""), now - _seconds(trial.datetime_start))
            if reason:
                self.finish(trial.number, None, {"failure": reason, "died": True})
                if "point" in trial.user_attrs:
                    found.append(str(trial.user_attrs["point"]))
        return found

    def view(self) -> StudyView:
        """Everything about the study, read."""
        header = self.header
        with self._translated():
            attrs = self.study.user_attrs
        space = header["space"]
        kernels = [dict(k) for k in attrs.get("kernels", [])]
        known = {(k["region"], k["mask"], k["kernel"]): k["seconds"] for k in kernels}
        return StudyView(
            name=self.name,
            storage=self.storage,
            created=float(header["created"]),
            strategy=header["strategy"],
            seed=int(header["seed"]),
            trials_wanted=int(header["trials"]),
            space=space,
            context=header["context"],
            attributes=header.get("attributes", {}),
            trials=tuple(_trial_view(t, space, known) for t in self.trials()),
            kernels=tuple(kernels),
            result=dict(attrs.get("result", {})),
            optuna=self.study,
        )


def _owner() -> str:
    """Host, process and when the process started, which tells a dead one from another with its number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_process_start(os.getpid())}"


def _process_start(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _gone(owner: str, age: float) -> str:
    """Why the process that runs a trial is believed to be dead, empty when it is not."""
    host, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if host == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return f"the process {pid} that ran it has died"
        except PermissionError:
            pass
        if started and _process_start(int(pid)) != started:
            return f"the process {pid} that ran it has died"
        return ""
    return (
        f"{host or 'its process'} has not ended it in {_STALE_SECONDS / 60:.0f} minutes" if age > _STALE_SECONDS else ""
    )


def _seconds(moment: Any) -> float:
    return float(moment.timestamp()) if moment is not None else time.time()


def _trial_view(
    trial: FrozenTrial, space: Mapping[str, Any], known: Mapping[tuple[int, str, int], float | None]
) -> TrialView:
    names = {"COMPLETE": "complete", "FAIL": "failed", "PRUNED": "duplicate"}
    details = trial.user_attrs.get("details", {})
    text = str(trial.user_attrs.get("point", ""))
    kernels = []
    if text:
        for at, (region, program) in enumerate(zip(space["regions"], Point.parse(text).regions, strict=True)):
            found = []
            for mask, kernel in program:
                operators = [op["name"] for i, op in enumerate(region["operators"]) if mask >> i & 1]
                entry = region["kernels"][f"{mask:x}"][kernel]
                seconds = known.get((at, f"{mask:x}", kernel))
                found.append({**entry, "operators": operators, "mask": f"{mask:x}", "seconds": seconds})
            kernels.append(tuple(found))
    return TrialView(
        number=trial.number,
        state=names.get(trial.state.name, "running"),
        seconds=trial.value if trial.state.name == "COMPLETE" else None,
        point=text,
        strategy=str(trial.user_attrs.get("strategy", "")),
        group=str(trial.user_attrs.get("group", "")),
        failure=str(details.get("failure", "")),
        regions=tuple(details.get("regions", ())),
        kernels=tuple(kernels),
        started=_seconds(trial.datetime_start),
        finished=None if trial.datetime_complete is None else _seconds(trial.datetime_complete),
        owner=":".join(str(trial.user_attrs.get("owner", "")).split(":")[:2]),
        remembered=bool(details.get("remembered", False)),
    )


def search(
    graph: OperatorGraph | Sequence[Region],
    target: Target,
    threads: int,
    *,
    trials: int | None = 200,
    timeout: float | None = None,
    strategy: str = "default",
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    resume: bool = False,
    plateau: int | None = None,
    label: str = "",
    cache: KernelCache | None = None,
    progress: Callable[[Progress], None] | None = None,
    decode: Decode | None = None,
    objective: Objective | None = None,
    space: Space | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search the programs of a model's graph (or of some regions) for the fastest.

    Args:
        trials: total of the study's trials; None: what the study was made with (200 for a new one).
        timeout: seconds after which this call stops proposing and measuring.
        strategy: one of :data:`STRATEGIES`.
        seed: the same seed proposes the same programs for the same measured times.
        storage: a journal file or SQLite file by its path, a folder, which keeps a journal file for each study, or a
            database URL; None: the folder ``studies`` of the kernel cache.
        study: the study's name; an existing one is joined, so that processes and machines share its trials. None: a new
            one, or with ``resume`` the newest of this model in the storage.
        plateau: stop after so many trials in a row without a better one; the default strategy after 60, others never.
        label: part of a new study's name.
        progress: called with the state after every step.
        decode: ``fuser.schemes.from_atoffer``, for the atoffer strategies.
        objective: what to minimize; default: time measured in a child process.
        space: the space of ``graph`` if it is known already.
        attributes: JSON values that are kept with a new study, see :attr:`StudyView.attributes`.

    Ctrl-C ends the search as a timeout does, with everything kept. The best program, measured again against the default
    one in a fresh process, is remembered in the cache as the tuning of its regions.

    Raises SearchError for arguments, storages and studies that do not fit, or when no program could be measured.
    """
    if trials is not None and trials < 1:
        raise SearchError(f"a search needs at least one trial, not {trials}")
    if timeout is not None and not timeout > 0:
        raise SearchError(f"the timeout must be a positive number of seconds, not {timeout:g}")
    if strategy not in STRATEGIES:
        raise SearchError(f"there is no strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    space = Space.of(graph, target, threads) if space is None else space
    if strategy in ("default", "exact", "reward"):
        space = space.prune(_SLACK)
    ledger = _ledger(space, storage, study, resume, strategy, seed, trials, label, attributes or {})
    trials = int(ledger.header["trials"]) if trials is None else trials
    if objective is None:
        from fuser.search.measured import MeasuredObjective

        objective = MeasuredObjective(space, cache=cache)
    if plateau is None and strategy == "default":
        plateau = _PLATEAU
    run = _Run(ledger, space, objective, strategy, seed, trials, timeout, plateau, progress, decode, cache)
    try:
        return run.run()
    finally:
        objective.close()


def context_of(target: Target, threads: int) -> dict[str, Any]:
    """What measured times depend on beside the program."""
    return {
        "target": target.key,
        "cores": target.cores,
        "threads": threads,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _ledger(
    space: Space,
    storage: str | None,
    name: str | None,
    resume: bool,
    strategy: str,
    seed: int,
    trials: int | None,
    label: str,
    attributes: Mapping[str, Any],
) -> Ledger:
    if name is None and resume:
        for known in reversed(list_studies(storage)):
            ledger = Ledger.open(known, storage)
            if ledger.header["space"]["hash"] == space.hash:
                return ledger
        raise SearchError("there is no study of this model, target and number of threads to resume; start a new one")
    if name is not None and resume:
        ledger = Ledger.open(name, storage)
    else:
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        header = {
            "version": VERSION,
            "created": now,
            "space": space.describe(),
            "strategy": strategy,
            "seed": seed,
            "trials": 200 if trials is None else trials,
            "context": context_of(space.target, space.threads),
            "attributes": dict(attributes),
        }
        unique = "-".join(filter(None, [label or "model", stamp, uuid.uuid4().hex[:4]]))
        ledger = Ledger.create(name or unique, storage, header)
    theirs = ledger.header["space"]
    if theirs["hash"] != space.hash:
        same = [r["hash"] for r in theirs["regions"]] == [r.region.hash for r in space.regions]
        what = "machine, number of threads or version of fuser" if same else "model, mask or shape of inputs"
        raise SearchError(f"the study {ledger.name!r} is of another {what}; use a new name")
    return ledger


class _Stop(Exception):  # noqa: N818
    """Ends a search, with its reason."""


class _Run:
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
        self.since_best = 0
        self.measured = 0
        self.remembered = 0
        self.kernel_times: dict[tuple[int, int, int], KernelTime] = {}
        self.building = 0.0
        self.measuring = 0.0
        self.phase: Phase = "build"
        self.last: TrialView | None = None
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
        are measured: as predictions are not beaten, no other path is cheaper."""
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
        self.measuring += time.perf_counter() - clock
        self.kernel_times[at, mask, kernel] = found
        self._report(f"kernel {len(self.kernel_times)}")

    def _explore(self) -> None:
        """Ask the sampler, with a few programs being built ahead of the one that is measured."""
        from fuser.search.samplers import ExhaustedError

        self.phase = "trials"
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
            if self.plateau is not None and self.since_best >= self.plateau:
                raise _Stop("plateau")

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
        self.since_best += 1
        if seconds is None:
            self.failures.append((number, failure))
        elif self.best is None or seconds < self.best[0]:
            self.best = (seconds, point)
            self.since_best = 0

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
            details = trial.user_attrs.get("details", {})
            if trial.number in self.imported or not trial.state.is_finished() or "point" not in trial.user_attrs:
                continue
            self.imported.add(trial.number)
            if trial.state.name == "PRUNED" or details.get("died"):
                continue
            point = Point.parse(trial.user_attrs["point"])
            value = trial.value if trial.state.name == "COMPLETE" else None
            self._learn(trial.number, point, value, str(details.get("failure", "")))
            self._add_to_mirror(point, value, trial.user_attrs.get("notes", {}))

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
            again = self.objective.compare(contenders)
            self.measuring += time.perf_counter() - clock
            if again is not None:
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
                last=self.last,
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
