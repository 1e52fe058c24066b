"""Reports of a search: what was tried, what was found and what it brings, as values, as text and as one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from fuser.drawing import COLOURS, duration
from fuser.study_charts import charts

_TEMPLATE = "study.html.j2"
COMPLETE, FAILED, PRUNED = "complete", "failed", "pruned"


@dataclass(frozen=True)
class TrialRow:
    """One trial. ``seconds`` is the measured time of one call (None unless ``state`` is ``"complete"``), ``predicted``
    the cost model's time of it, ``elapsed`` the seconds of search up to its end; ``reason`` says why a trial failed or
    was pruned."""

    number: int
    strategy: str
    state: str
    seconds: float | None
    predicted: float | None
    elapsed: float
    scheme: str
    reason: str = ""


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a block and the seconds of one call; ``measured`` is False for predictions."""

    family: str
    operators: tuple[str, ...]
    seconds: float
    measured: bool


@dataclass(frozen=True)
class BlockResult:
    """Equal regions: ``count`` of them, with the kernels of the default scheme and of the best one found.

    ``picture`` is the best scheme as SVG, empty where the model is not at hand.
    """

    region: str
    count: int
    scheme_before: str
    scheme_after: str
    before: tuple[KernelTime, ...]
    after: tuple[KernelTime, ...]
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
class StudySummary:
    """Everything that a report of a search says, as plain values.

    ``before`` and ``after`` are the measured seconds of one call with the default and with the best scheme, None before
    both are known. ``rank_correlation`` is Spearman's, of predicted and measured times. ``pruned_unmeasured`` counts
    programs that the cost model ruled out, by reason, before they became a trial. ``spent`` gives the seconds of the
    search by what they were spent on. ``importance`` is the share of each parameter in the variance of the times;
    ``importance_note`` says why there is none.
    """

    name: str
    model: str
    target: str
    threads: int
    storage: str
    trials: tuple[TrialRow, ...]
    blocks: tuple[BlockResult, ...]
    before: float | None
    after: float | None
    distinct_programs: int | None
    rank_correlation: float | None
    pruned_unmeasured: Mapping[str, int]
    spent: Mapping[str, float]
    importance: Mapping[str, float]
    importance_note: str = ""

    @property
    def counts(self) -> Mapping[str, int]:
        """Trials by state."""
        return Counter(trial.state for trial in self.trials)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies in the order of their first trial."""
        return tuple(dict.fromkeys(trial.strategy for trial in self.trials))

    @property
    def best(self) -> TrialRow | None:
        """The fastest complete trial, the first of equals."""
        done = [trial for trial in self.trials if trial.seconds is not None]
        return min(done, key=lambda trial: (trial.seconds or 0.0, trial.number), default=None)

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
        """The summary as JSON values, without pictures."""
        values = asdict(self)
        for block in values["blocks"]:
            del block["picture"]
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
    before: tuple[KernelTime, ...]
    after: tuple[KernelTime, ...]

    @property
    def seconds_before(self) -> float:
        return sum(kernel.seconds for kernel in self.before)

    @property
    def seconds_after(self) -> float:
        return sum(kernel.seconds for kernel in self.after)


def changes(block: BlockResult) -> tuple[Change, ...]:
    """The finest sets of operators that neither scheme cuts, with their kernels before and after, in order."""
    sets: list[set[str]] = []
    for kernel in (*block.before, *block.after):
        joined = set(kernel.operators)
        apart = []
        for other in sets:
            if other & joined:
                joined |= other
            else:
                apart.append(other)
        sets = [*apart, joined]
    order = [name for kernel in block.before for name in kernel.operators]
    sets.sort(key=lambda names: min(order.index(name) for name in names if name in order))
    return tuple(
        Change(
            tuple(name for name in order if name in names),
            tuple(k for k in block.before if set(k.operators) <= names),
            tuple(k for k in block.after if set(k.operators) <= names),
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


def render_text(found: StudySummary) -> str:
    """The report as plain text."""
    counts = found.counts
    lines = [
        f"study     {found.name}",
        f"model     {found.model}",
        f"target    {found.target}, {found.threads} threads",
    ]
    lines.append(f"storage   {found.storage}")
    lines.append(
        f"trials    {len(found.trials)}: {counts.get(COMPLETE, 0)} complete, {counts.get(FAILED, 0)} failed, "
        f"{counts.get(PRUNED, 0)} pruned"
    )
    if found.distinct_programs is not None:
        lines.append(f"space     {found.distinct_programs:,} distinct programs")
    if found.before is not None:
        lines.append(f"default   {duration(found.before)}")
    if found.after is not None:
        gain = f", {found.speedup:.3f} times as fast as the default scheme" if found.speedup else ""
        lines.append(f"best      {duration(found.after)}{gain}")
    if found.rank_correlation is not None:
        lines.append(f"model     rank correlation of predicted and measured times {found.rank_correlation:.3f}")
    if found.spent:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.spent.items())
        lines.append(f"time      {duration(sum(found.spent.values()))}: {spent}")
    for reason, count in found.pruned_unmeasured.items():
        lines.append(f"pruned    {count} programs before a trial: {reason}")
    for (state, reason), count in found.reasons.items():
        lines.append(f"{state:<9} {count} trials: {reason or 'no reason given'}")
    for block in found.blocks:
        lines += [
            "",
            f"block × {block.count}   {duration(block.seconds_before)} → {duration(block.seconds_after)} each",
        ]
        lines += [f"  default {block.scheme_before}", f"  best    {block.scheme_after}"]
        for kernel in block.after:
            time = f"{'' if kernel.measured else '≈ '}{duration(kernel.seconds)}"
            lines.append(f"    {kernel.family:<10} {time:>10}  {', '.join(kernel.operators)}")
    return "\n".join(lines)


def render_html(found: StudySummary) -> str:
    """The report as one HTML document with its pictures inside; without matplotlib it has no charts and says so."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "data"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration)
    return environment.get_template(_TEMPLATE).render(
        study=found,
        counts=found.counts,
        best=found.best,
        charts=charts(found),
        changes={block.region: changes(block) for block in found.blocks},
        colours=COLOURS,
        families=sorted({kernel.family for block in found.blocks for kernel in block.after}),
    )
