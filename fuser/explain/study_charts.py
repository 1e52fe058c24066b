"""Charts of a search as SVG images: convergence, kernels before and after, the cost model, importance."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from fuser.explain.drawing import colours, duration
from fuser.explain.report import Group
from fuser.explain.study_summary import RegionResult, StudySummary, best_so_far

_STRATEGY_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#ca8a04", "#db2777", "#475569")
_GREY = "#64748b"
_DECADES = 20
"""Times that differ by more than this factor get logarithmic axes."""
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": "#0f172a",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    # Names of operators and reasons are text, whatever characters they hold.
    "text.parse_math": False,
    "svg.hashsalt": "fuser",
}


def charts(study: StudySummary) -> dict[str, str]:
    """Data URIs by name: ``"convergence"``, ``"model"``, ``"importance"`` and the region's hash for every region.

    Charts without anything to show are left out; all of them are without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn: dict[str, str] = {}

    def draw(name: str, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        drawn[name] = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"

    with matplotlib.rc_context(_STYLE):
        if study.best is not None:
            draw("convergence", (12.4, 3.9), lambda figure: _convergence(figure, study))
        if len(_pairs(study)) > 1:
            draw("model", (5, 3.9), lambda figure: _model(figure, study))
        if study.importance:
            draw("importance", (7, 0.9 + 0.28 * len(study.importance)), lambda figure: _importance(figure, study))
        for region in study.regions:
            draw(region.hash, (12.4, 2.3), lambda figure, region=region: _kernels(figure, region))  # type: ignore[misc]
    return drawn


def _convergence(figure: Any, study: StudySummary) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    curves = [(study.strategy, study.trials), *((curve.label, curve.trials) for curve in study.compared)]
    for number, (label, trials) in enumerate(curves):
        line = best_so_far(trials)
        for axes, at in ((left, 0), (right, 1)):
            axes.step(
                [p[at] for p in line],
                [1e3 * p[2] for p in line],
                where="post",
                color=_STRATEGY_COLOURS[number % len(_STRATEGY_COLOURS)],
                marker="o" if len(line) == 1 else "",
                linewidth=1.8,
                label=f"best of {label}",
            )
    for number, strategy in enumerate(study.strategies, len(curves)):
        colour = _STRATEGY_COLOURS[number % len(_STRATEGY_COLOURS)]
        done = [
            (count, trial.elapsed, 1e3 * trial.seconds)
            for count, trial in enumerate(study.trials, 1)
            if trial.seconds is not None and trial.strategy == strategy
        ]
        for axes, at in ((left, 0), (right, 1)):
            label = f"trials: {strategy}"
            axes.scatter([d[at] for d in done], [d[2] for d in done], s=14, color=colour, alpha=0.5, lw=0, label=label)
    for axes, text in ((left, "trials"), (right, "seconds of search")):
        if study.before is not None:
            axes.axhline(1e3 * study.before, color=_GREY, linestyle="--", linewidth=1, label="default scheme")
        axes.set_xlabel(text)
        axes.grid(axis="y")
    # A few bad schemes are many times slower: what matters is near the best.
    times = sorted(1e3 * t.seconds for _, trials in curves for t in trials if t.seconds is not None)
    low, high = times[0], max(times[int(0.9 * (len(times) - 1))], 1e3 * (study.before or 0.0))
    if high > low:
        left.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))
    left.set_ylabel("time of one call, ms")
    left.set_title("Best time so far")
    right.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)


def _pairs(study: StudySummary) -> list[tuple[float, float]]:
    return [(1e3 * t.predicted, 1e3 * t.seconds) for t in study.trials if t.predicted and t.seconds]


def _model(figure: Any, study: StudySummary) -> None:
    pairs = _pairs(study)
    axes = figure.subplots()
    axes.scatter(
        [p[0] for p in pairs], [p[1] for p in pairs], s=14, color=_STRATEGY_COLOURS[0], alpha=0.5, linewidths=0
    )
    ends = min(min(p) for p in pairs), max(max(p) for p in pairs)
    axes.plot(ends, ends, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate("equal", (ends[1], ends[1]), (-4, -12), textcoords="offset points", color=_GREY, ha="right")
    axes.set(xlabel="predicted, ms", ylabel="measured, ms")
    if ends[1] > _DECADES * ends[0]:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Predicted and measured times")
    axes.grid(True)


def _importance(figure: Any, study: StudySummary) -> None:
    ordered = sorted(study.importance.items(), key=lambda item: item[1])
    axes = figure.subplots()
    bars = axes.barh([_cut(name, 56) for name, _ in ordered], [100 * share for _, share in ordered], color="#93c5fd")
    axes.bar_label(bars, [f"{100 * share:.1f} %" for _, share in ordered], padding=3, color="#334155")
    axes.set_xlim(0, 115 * max(max(study.importance.values()), 1e-9))
    axes.set_xlabel("share, % (PED-ANOVA)")
    figure.suptitle("What makes a program one of the fastest", x=0.01, ha="left", fontsize=11, fontweight="bold")


def _kernels(figure: Any, region: RegionResult) -> None:
    axes = figure.subplots()
    longest = max(region.seconds_before, region.seconds_after)
    rows: Sequence[tuple[str, tuple[Group, ...]]] = (("default", region.before), ("best found", region.after))
    for number, (name, kernels) in enumerate(rows):
        start = 0.0
        for kernel in kernels:
            fill, line = colours(kernel.family)
            axes.barh(name, 1e3 * kernel.seconds, left=1e3 * start, color=fill, edgecolor=line, linewidth=1.2)
            share = kernel.seconds / longest if longest else 0.0
            if share > 0.05:
                text = f"{kernel.family}\n{duration(kernel.seconds)}" if share > 0.08 else duration(kernel.seconds)
                middle = 1e3 * (start + kernel.seconds / 2)
                axes.text(middle, number, text, ha="center", va="center", fontsize=8.5, color=line)
            start += kernel.seconds
        axes.text(1e3 * start, number, f"  {duration(start)}", va="center", fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12e3 * longest if longest else 1)
    axes.set_xlabel("time of the kernels of one region, ms")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
