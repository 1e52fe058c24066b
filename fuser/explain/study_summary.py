"""What a search tried and found, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fuser.explain.report import Group

COMPLETE = "complete"


@dataclass(frozen=True)
class TrialRow:
    """One trial. ``seconds`` is the measured time of one call, all regions of the model (None unless ``state`` is
    ``"complete"``), ``predicted`` the cost model's time of it, ``elapsed`` the seconds of search up to its end;
    ``reason`` says why there is no time."""

    number: int
    strategy: str
    state: str
    seconds: float | None
    predicted: float | None
    elapsed: float
    scheme: str
    reason: str = ""


@dataclass(frozen=True)
class RegionResult:
    """Equal regions: ``count`` of them, with the kernels of the default scheme and of the best one found.

    ``picture`` is the best scheme as SVG, empty where the model is not at hand.
    """

    hash: str
    count: int
    scheme_before: str
    scheme_after: str
    before: tuple[Group, ...]
    after: tuple[Group, ...]
    picture: str = ""

    @property
    def seconds_before(self) -> float:
        """Time of one region with the default scheme, kernels added up."""
        return sum(kernel.seconds for kernel in self.before)

    @property
    def seconds_after(self) -> float:
        """Time of one region with the best scheme, kernels added up."""
        return sum(kernel.seconds for kernel in self.after)


@dataclass(frozen=True)
class Curve:
    """The trials of another study with the same objective, drawn beside."""

    label: str
    trials: tuple[TrialRow, ...]


@dataclass(frozen=True)
class StudySummary:
    """Everything that a report of a search says, as plain values.

    ``before`` and ``after`` are the measured seconds of one call with the default and with the best scheme, None before
    they are known; ``verified`` is their ratio when both were measured once more in a fresh process.
    ``rank_correlation`` is Spearman's, of the predicted and measured times of kernels. ``pruned`` counts kernels that
    the cost model ruled out by reason. ``spent`` gives the seconds of the search by what they were spent on.
    ``importance`` is the share of each parameter in what makes a program one of the fastest (PED-ANOVA);
    ``importance_note`` says why there is none; ``winner`` is the number of the trial that was fastest when the best
    ones were measured again.
    """

    name: str
    model: str
    strategy: str
    target: str
    threads: int
    storage: str
    trials: tuple[TrialRow, ...]
    regions: tuple[RegionResult, ...]
    before: float | None
    after: float | None
    verified: float | None
    distinct_programs: str
    rank_correlation: float | None
    pruned: Mapping[str, int]
    spent: Mapping[str, float]
    importance: Mapping[str, float]
    importance_note: str = ""
    stopped: str = ""
    winner: int | None = None
    compared: tuple[Curve, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        """Trials by state, complete ones first."""
        found = Counter(trial.state for trial in self.trials)
        return {COMPLETE: found.pop(COMPLETE, 0), **found}

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies in the order of their first trial."""
        return tuple(dict.fromkeys(trial.strategy for trial in self.trials))

    @property
    def best(self) -> TrialRow | None:
        """The trial that won when the fastest were measured again, before that the fastest, the first of equals."""
        done = [trial for trial in self.trials if trial.seconds is not None]
        won = next((trial for trial in done if trial.number == self.winner), None)
        return won or min(done, key=lambda trial: (trial.seconds or 0.0, trial.number), default=None)

    @property
    def reasons(self) -> Mapping[tuple[str, str], int]:
        """How many trials have each (state, reason), most frequent first; complete trials are left out."""
        found = Counter((trial.state, trial.reason) for trial in self.trials if trial.state != COMPLETE)
        return dict(found.most_common())

    @property
    def speedup(self) -> float | None:
        """How many times faster than the default scheme the best one is."""
        return self.before / self.after if self.before and self.after else None

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON values, without pictures and other studies' trials."""
        values = asdict(self)
        values["compared"] = [curve.label for curve in self.compared]
        for region in values["regions"]:
            del region["picture"]
        best = self.best
        return {
            **values,
            "counts": dict(self.counts),
            "best": asdict(best) if best else None,
            "speedup": self.speedup,
            "reasons": [{"state": s, "reason": r, "count": n} for (s, r), n in self.reasons.items()],
        }


@dataclass(frozen=True)
class Change:
    """The same operators before and after: the kernels that run them, and nothing else."""

    operators: tuple[str, ...]
    before: tuple[Group, ...]
    after: tuple[Group, ...]

    @property
    def seconds_before(self) -> float:
        return sum(kernel.seconds for kernel in self.before)

    @property
    def seconds_after(self) -> float:
        return sum(kernel.seconds for kernel in self.after)


def changes(region: RegionResult) -> tuple[Change, ...]:
    """The finest sets of operators that neither scheme cuts, with their kernels before and after, in order."""
    sets: list[set[str]] = []
    for kernel in (*region.before, *region.after):
        joined = set(kernel.operators)
        apart = []
        for other in sets:
            if other & joined:
                joined |= other
            else:
                apart.append(other)
        sets = [*apart, joined]
    order = [name for kernel in region.before for name in kernel.operators]
    sets.sort(key=lambda names: min(order.index(name) for name in names if name in order))
    return tuple(
        Change(
            tuple(name for name in order if name in names),
            tuple(k for k in region.before if set(k.operators) <= names),
            tuple(k for k in region.after if set(k.operators) <= names),
        )
        for names in sets
    )


def best_so_far(trials: Sequence[TrialRow]) -> list[tuple[int, float, float]]:
    """(number of trials, seconds of search, best time) after every trial from the first complete one on."""
    found: list[tuple[int, float, float]] = []
    best = float("inf")
    for count, trial in enumerate(trials, 1):
        best = min(best, trial.seconds if trial.seconds is not None else best)
        if best < float("inf"):
            found.append((count, trial.elapsed, best))
    return found
