"""Studies in their storages: trials that processes and machines share, and what reports read of them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuser.ir.errors import SearchError
from fuser.search.space import Point

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

VERSION = 2
"""Of what a study holds."""
_STALE_SECONDS = 900.0
_OURS = "fuser"


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
        ours = {s.study_name: s.user_attrs[_OURS] for s in summaries if isinstance(s.user_attrs.get(_OURS), Mapping)}
        return sorted(ours, key=lambda name: float(ours[name].get("created", 0.0)))


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
        """Raise SearchError unless the study is one of ours whose header can be used."""
        from fuser.search.storage import shown

        header = self.header
        version = header.get("version")
        if version != VERSION:
            what = "was not made by fuser" if version is None else f"has version {version}, this fuser reads {VERSION}"
            raise SearchError(f"the study {self.name!r} in {shown(self.storage)} {what}; start a new one")
        try:
            float(header["created"]), int(header["seed"]), int(header["trials"]), dict(header["context"])
            if not isinstance(header["strategy"], str):
                raise TypeError("the strategy has no name")
            for part in (header["space"], *header["space"]["regions"]):
                if not isinstance(part["hash"], str):
                    raise TypeError("a part of its space has no hash")
        except Exception as error:
            raise self.damaged(error) from error

    @property
    def header(self) -> dict[str, Any]:
        """What the study was made with."""
        with self._translated():
            found = self.study.user_attrs.get(_OURS)
            return dict(found) if isinstance(found, Mapping) else {}

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
        header, trials = self.header, self.trials()
        with self._translated():
            attrs = self.study.user_attrs
        try:
            return self._view(header, trials, attrs)
        except Exception as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> SearchError:
        """What to say of a study whose content cannot be understood."""
        from fuser.search.storage import shown

        return SearchError(
            f"the study {self.name!r} in {shown(self.storage)} is damaged ({type(error).__name__}: {error!s:.200}); "
            "start a new one, or put the file back from a copy"
        )

    def _view(self, header: Any, trials: Sequence[FrozenTrial], attrs: Any) -> StudyView:
        space = header["space"]
        kernels = [dict(k) for k in attrs.get("kernels", [])]
        known = {(k["region"], k["members"], k["kernel"]): k["seconds"] for k in kernels}
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
            trials=tuple(_trial_view(t, space, known) for t in trials),
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
            for members, kernel in program:
                operators = [op["name"] for i, op in enumerate(region["operators"]) if members >> i & 1]
                entry = region["kernels"][f"{members:x}"][kernel]
                seconds = known.get((at, f"{members:x}", kernel))
                found.append({**entry, "operators": operators, "members": f"{members:x}", "seconds": seconds})
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
