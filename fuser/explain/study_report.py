"""Reports of a search: what was tried, what was found and what it brings, as text and as one HTML file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fuser.explain.drawing import COLOURS, Outline, draw_outline, duration
from fuser.explain.report import Group, render_page
from fuser.explain.study_charts import charts
from fuser.explain.study_summary import COMPLETE, Curve, RegionResult, StudySummary, TrialRow, changes
from fuser.ir.errors import SearchError

if TYPE_CHECKING:
    from fuser.search.ledger import StudyView, TrialView

_TEMPLATE = "study.html.j2"
_IMPORTANT = 12
"""Parameters whose importance is shown."""


def count_text(number: int) -> str:
    """A number of programs: with all its digits, or as a power of ten where nobody would count them."""
    if number < 10**9:
        return f"{number:,}"
    exponent = len(str(number)) - 1
    return f"{number / 10**exponent:.2f} · 10^{exponent}"


def render_text(found: StudySummary) -> str:
    """The report as plain text."""
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    stopped = f"; ended by {found.stopped}" if found.stopped else ""
    lines = [
        f"study     {found.name}",
        f"storage   {found.storage}",
        f"model     {found.model}",
        f"target    {found.target}, {found.threads} threads",
        f"space     {found.distinct_programs} distinct programs",
        f"trials    {len(found.trials)} of strategy {found.strategy}: {counts}{stopped}",
    ]
    if found.before is not None:
        lines.append(f"default   {duration(found.before)}")
    if found.after is not None:
        gain = f", {found.speedup:.3f} times as fast as the default scheme" if found.speedup else ""
        again = f", {found.verified:.3f} times when measured again in a fresh process" if found.verified else ""
        lines.append(f"best      {duration(found.after)}{gain}{again}")
    if found.rank_correlation is not None:
        lines.append(f"kernels   rank correlation of predicted and measured times {found.rank_correlation:.3f}")
    if found.spent:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.spent.items())
        lines.append(f"time      {duration(sum(found.spent.values()))}: {spent}")
    lines += [f"pruned    {count} kernels: {reason}" for reason, count in found.pruned.items()]
    lines += [f"{s:<9} {count} trials: {reason or 'no reason given'}" for (s, reason), count in found.reasons.items()]
    for region in found.regions:
        lines += [
            "",
            f"region × {region.count}   {duration(region.seconds_before)} → {duration(region.seconds_after)} each",
        ]
        lines += [f"  default {region.scheme_before}", f"  best    {region.scheme_after}"]
        for kernel in region.after:
            time = f"{'' if kernel.measured else '≈ '}{duration(kernel.seconds)}"
            lines.append(f"    {kernel.family:<10} {time:>10}  {', '.join(kernel.operators)}")
    return "\n".join(lines)


def render_html(found: StudySummary) -> str:
    """The report as one HTML document with its pictures inside; without matplotlib it has no charts and says so."""
    return render_page(
        _TEMPLATE,
        study=found,
        counts=found.counts,
        best=found.best,
        charts=charts(found),
        changes={region.hash: changes(region) for region in found.regions},
        colours=COLOURS,
        families=sorted({kernel.family for region in found.regions for kernel in region.after}),
    )


# ---- from a study


def summarize(view: StudyView, others: Sequence[StudyView] = ()) -> StudySummary:
    """The summary of a study; the trials of ``others`` are drawn beside its own.

    Raises SearchError when one of ``others`` had another model or machine, so that times cannot be compared.
    """
    from fuser.search.storage import shown

    for other in others:
        if other.space["hash"] != view.space["hash"]:
            raise SearchError(
                f"the studies {view.name} and {other.name} are of different models, sizes or machines, so their times "
                "cannot be compared; write a report for each"
            )
    result, context = view.result, view.context
    best = _best(view)
    importance, note = _importance(view)
    spent = {name: result.get(f"seconds_{name}") for name in ("building", "measuring", "searching")}
    exact = "" if view.space["exact"] else "at least "
    return StudySummary(
        name=view.name,
        model=str(view.attributes.get("title", view.name)),
        strategy=view.strategy,
        target=str(view.attributes.get("machine", context.get("target", ""))),
        threads=int(context.get("threads", 0)),
        storage=shown(view.storage),
        trials=_rows(view),
        regions=tuple(_regions(view)),
        before=view.default.seconds if view.default else None,
        after=best.seconds if best else None,
        verified=result.get("speedup"),
        distinct_programs=f"{exact}{count_text(int(view.space['programs']))}",
        rank_correlation=result.get("rank_correlation"),
        pruned=dict(result.get("pruned", view.space["pruned"])),
        spent={name: float(seconds) for name, seconds in spent.items() if seconds is not None},
        importance=importance,
        importance_note=note,
        stopped=str(result.get("stopped", "")),
        winner=best.number if best else None,
        compared=tuple(Curve(f"{other.strategy} ({other.name})", _rows(other)) for other in others),
    )


def _best(view: StudyView) -> TrialView | None:
    """The program that won when the fastest ones were measured again; before that the fastest trial."""
    won = view.result.get("best")
    return next((t for t in view.trials if t.state == COMPLETE and t.point == won), view.best)


def _rows(view: StudyView) -> tuple[TrialRow, ...]:
    counts = [region["count"] for region in view.space["regions"]]
    rows = []
    for trial, elapsed in zip(view.trials, _elapsed(view), strict=True):
        predicted = None
        if trial.kernels:
            predicted = math.fsum(
                count * kernel["predicted"]
                for count, kernels in zip(counts, trial.kernels, strict=True)
                for kernel in kernels
            )
        rows.append(
            TrialRow(
                trial.number, trial.strategy, trial.state, trial.seconds, predicted, elapsed, trial.point, trial.failure
            )
        )
    return tuple(rows)


def _elapsed(view: StudyView) -> Iterator[float]:
    """Seconds of search up to the end of every trial: the time in which any process worked on the study, so without
    the pauses before it was resumed."""
    spans: dict[str, tuple[float, float]] = {}
    for trial in view.trials:
        begin, end = spans.get(trial.owner, (trial.started, trial.started))
        spans[trial.owner] = min(begin, trial.started), max(end, trial.finished or trial.started)
    ordered = sorted(spans.values())
    if ordered:
        # Kernels are measured before the first trial.
        ordered[0] = min(view.created, ordered[0][0]), ordered[0][1]
    for trial in view.trials:
        at = trial.finished or trial.started
        total, covered = 0.0, -math.inf
        for begin, end in ordered:
            begin = max(begin, covered)
            total += max(min(end, at) - begin, 0.0)
            covered = max(covered, end)
        yield total


def _regions(view: StudyView) -> Iterator[RegionResult]:
    best, default = _best(view), view.default
    if best is None:
        return
    outlines = view.attributes.get("outlines", {})
    for at, region in enumerate(view.space["regions"]):
        after = _kernels(best, at)
        before = _kernels(default or best, at)
        outline = outlines.get(region["hash"])
        picture = ""
        if outline is not None:
            drawn = [(k.family, f"{'' if k.measured else '≈ '}{duration(k.seconds)}", k.operators) for k in after]
            picture = draw_outline(Outline.from_json(outline), drawn)
        yield RegionResult(
            region["hash"],
            region["count"],
            _scheme(region, before),
            _scheme(region, after),
            before,
            after,
            picture,
        )


def _kernels(trial: TrialView, at: int) -> tuple[Group, ...]:
    found = []
    for kernel in trial.kernels[at]:
        measured = kernel["seconds"] is not None
        seconds = float(kernel["seconds"] if measured else kernel["predicted"])
        found.append(Group(kernel["family"], tuple(kernel["operators"]), seconds, measured))
    return tuple(found)


def _scheme(region: Mapping[str, Any], kernels: Sequence[Group]) -> str:
    """The scheme of a region as text, see :class:`fuser.ir.scheme.Scheme`."""
    from fuser.ir.scheme import Scheme

    owner = {name: number for number, kernel in enumerate(kernels) for name in kernel.operators}
    names = [operator["name"] for operator in region["operators"]]
    return str(Scheme(region["hash"], tuple(owner[names[a]] == owner[names[b]] for a, b in region["edges"])))


def _importance(view: StudyView) -> tuple[dict[str, float], str]:
    """The most important parameters with readable names, or why they are not known."""
    import optuna

    times = {trial.seconds for trial in view.trials if trial.state == COMPLETE}
    if len(times) < 4:
        return {}, "it needs at least four trials with different times"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(view.optuna)
    except (ValueError, RuntimeError, ImportError) as error:
        return {}, str(error)
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {_readable(name, view.space): share for name, share in ordered[:_IMPORTANT] if share > 0}, ""


def _readable(name: str, space: Mapping[str, Any]) -> str:
    """``gemm → bias`` for the parameter of an edge, ``kernel of gemm … norm`` for that of a group."""
    number, _, what = name.partition(".")
    region = space["regions"][int(number)]
    operators = [operator["name"] for operator in region["operators"]]
    if what.startswith("e"):
        a, b = region["edges"][int(what[1:])]
        return f"{operators[a]} → {operators[b]}"
    members = int(what[1:], 16)
    names = [operator for i, operator in enumerate(operators) if members >> i & 1]
    return f"kernel of {names[0]} … {names[-1]}" if len(names) > 1 else f"kernel of {names[0]}"
