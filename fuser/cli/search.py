"""``fuserc search``: find the fastest scheme and kernels of a model by measuring, with studies that can be resumed."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuser.cli.options import MODEL_HELP, Batch, Dtype, MaskText, Padding, Seq, Size, Threads
from fuser.cli.output import Json, console, print_json, progress
from fuser.ir.errors import FuserError

if TYPE_CHECKING:
    import torch

    from fuser.ir.graph import OperatorGraph
    from fuser.ir.target import Target
    from fuser.search.ledger import StudyView
    from fuser.search.results import Progress, SearchResult

Storage = Annotated[
    str | None,
    typer.Option(
        help="Where studies are kept: a folder or a journal file, a SQLite file (.db), or the URL of a database that "
        "several machines share (postgresql://…).",
        show_default="a folder in the kernel cache",
    ),
]
_LINE_SECONDS = 10.0
"""Least time between two lines of progress where there is no terminal."""


def search(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    batch: Batch = None,
    seq: Seq = None,
    padding: Padding = False,
    mask: MaskText = "",
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    intermediate: Size = None,
    vocabulary: Size = None,
    dtype: Dtype = "float32",
    threads: Threads = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to search for: cpu, cuda, cuda:1 …, or cuda:emulated, which runs CUDA kernels on the CPU; how "
            "long that takes says nothing about a GPU.",
            show_default="cpu",
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Also kernels that take about a minute each to build: those of CUTLASS, on sm_90a."
        ),
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Programs to try, those of earlier runs of the study included.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="default: the shortest path over measured kernels, then group rewards around it. exact: the shortest "
            "path alone. reward, random, anneal, tpe, gp, atoffer, atoffer-published: every program by that sampler.",
            show_default="default",
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the search ends.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=(1 << 32) - 1, help="Seed of the search.", show_default="0")
    ] = None,
    storage: Storage = None,
    study: Annotated[
        str | None,
        typer.Option(help="Name of the study. Processes with one name share its trials.", show_default="a new name"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with --study, else with the newest study; the model and options are the study's."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Search the fastest scheme and kernels of a model by measuring them on this machine.

    The result is kept in the kernel cache, where fuser.optimize finds it, and moves with fuserc cache export. Ctrl-C
    ends the search and keeps what was found: --resume goes on.
    """
    if model is None and not resume:
        raise typer.BadParameter("name a model, or go on with a study by --resume", param_hint="--model")
    from fuser.search.study import STRATEGIES

    if strategy is not None and strategy not in STRATEGIES:
        raise typer.BadParameter(f"{strategy!r} is none of {', '.join(STRATEGIES)}", param_hint="--strategy")
    options: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "seq": seq,
        "padding": padding,
        "mask": mask,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "threads": threads,
        "target": target,
        "offline": offline,
    }
    if resume:
        view = _resumed(study, storage)
        study = view.name
        strategy = strategy or view.strategy
        seed = view.seed if seed is None else seed
        trials = view.trials_wanted if trials is None else trials
        if model is None:
            options = _options_of(view)
    strategy = strategy or "default"
    result = _run(options, trials or 200, timeout, strategy, seed or 0, storage, study, resume)
    if json:
        print_json(as_dict(result))
    else:
        _print(result, storage)
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def _resumed(study: str | None, storage: str | None) -> StudyView:
    from fuser.search.ledger import list_studies, open_study

    if study is None:
        known = list_studies(storage)
        if not known:
            raise FuserError("there is no study to resume; start one with fuserc search --model MODEL")
        study = known[-1]
    return open_study(study, storage)


def _options_of(view: StudyView) -> dict[str, Any]:
    options = view.attributes.get("options")
    if not isinstance(options, dict):
        raise FuserError(
            f"the study {view.name} was not made by fuserc search, so it does not know its model: give --model and the "
            "options that the study was made with"
        )
    return options


def _run(
    options: Mapping[str, Any],
    trials: int,
    timeout: float | None,
    strategy: str,
    seed: int,
    storage: str | None,
    study: str | None,
    resume: bool,
) -> SearchResult:
    import torch

    from fuser.explain.report import target_text
    from fuser.runtime.cpuinfo import cpu_name
    from fuser.runtime.cuda import resolve_device
    from fuser.runtime.device import cpu_target
    from fuser.runtime.program import CPU
    from fuser.runtime.targets import named_target, on_device
    from fuser.schemes import from_atoffer
    from fuser.search.space import Space
    from fuser.search.study import search as run
    from fuser.searching import team_of

    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    wanted = options.get("target")
    target = cpu_target() if wanted is None else named_target(wanted)
    device = resolve_device(torch.device(wanted or "cpu")) if target.device == "cuda" else CPU
    threads = team_of(target)
    with on_device(device), progress(f"capturing {options['model']}"):
        graph = _graph(options, target, device)
        space = Space.of(graph, target, threads, offline=bool(options.get("offline")))
    with on_device(device), _display() as show:
        return run(
            graph,
            target,
            threads,
            space=space,
            trials=trials,
            timeout=timeout,
            strategy=strategy,
            seed=seed,
            storage=storage,
            study=study,
            resume=resume,
            label=_label(options),
            attributes={
                "title": _title(options),
                "machine": f"{cpu_name() if device == CPU else torch.cuda.get_device_name(device)}, "
                f"{target_text(target)}",
                "options": dict(options),
                "outlines": _outlines(graph),
            },
            decode=from_atoffer,
            progress=show,
        )


def _graph(options: Mapping[str, Any], target: Target, device: torch.device) -> OperatorGraph:
    from fuser.cli.models import parse_mask, resolve
    from fuser.module.options import Options
    from fuser.searching import graph_of

    names = ("batch", "seq", "layers", "hidden", "heads", "intermediate", "vocabulary")
    sizes = {name: options[name] for name in names}
    named = resolve(options["model"], sizes, padding=options["padding"], dtype=options["dtype"]).to(device)
    wanted = Options(attention=parse_mask(options["mask"]), target=target)
    return graph_of(named.model, named.args, named.kwargs, wanted)


def _outlines(graph: OperatorGraph) -> dict[str, Any]:
    """What pictures of the regions need, so that a report can be written without the model."""
    from fuser.explain.drawing import Outline

    found = {region.hash: region for region in reversed(graph.regions)}
    return {key: dataclasses.asdict(Outline.of(region)) for key, region in found.items()}


def _title(options: Mapping[str, Any]) -> str:
    parts = [str(options["model"])]
    for name in ("batch", "seq", "layers", "hidden", "heads", "intermediate", "vocabulary", "mask", "target"):
        if options.get(name):
            parts.append(f"{name} {options[name]}")
    parts += [name for name in ("padding", "offline") if options.get(name)]
    parts += [options["dtype"]] if options["dtype"] != "float32" else []
    return ", ".join(parts)


def _label(options: Mapping[str, Any]) -> str:
    """The start of the name of a new study, such as ``bert-base-b8-s512-strided``."""
    parts = [str(options["model"]).replace(":", "."), f"b{options['batch'] or 1}"]
    parts += [f"s{options['seq']}"] if options["seq"] else []
    parts += [str(options[name]).replace(":", ".") for name in ("mask", "target") if options.get(name)]
    return "-".join(parts)


@contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """Shows where a search stands: a live line on a terminal, else now and then a line. All on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    errors = Console(stderr=True, highlight=False)
    if not errors.is_terminal:
        yield _lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Bar(*columns, TextColumn("{task.fields[facts]}", markup=False), console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None, facts="")

        def show(state: Progress) -> None:
            bar.update(task, description=state.phase, completed=state.trials, total=state.of, facts=facts(state))

        yield show


def _lines() -> Callable[[Progress], None]:
    shown = -_LINE_SECONDS
    phase = ""

    def show(state: Progress) -> None:
        nonlocal shown, phase
        now = time.monotonic()
        if state.phase != phase or now - shown >= _LINE_SECONDS:
            shown, phase = now, state.phase
            typer.echo(f"{state.phase} {state.trials}/{state.of}  {facts(state)}", err=True)

    return show


def facts(state: Progress) -> str:
    """One line: the best so far, the default, what failed, time spent and left."""
    from fuser.explain.drawing import duration

    found = []
    if state.best is not None:
        found.append(f"best {duration(state.best)}")
    if state.default is not None:
        found.append(f"default {duration(state.default)}")
    found.append(f"{state.kernels_measured} kernels measured")
    found.append(f"{state.failures} failed")
    if state.duplicates:
        found.append(f"{state.duplicates} of others")
    found.append(clock(state.elapsed))
    if state.eta is not None:
        found.append(f"ETA {clock(state.eta)}")
    return "  ".join([*found, state.message])


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_dict(result: SearchResult) -> dict[str, Any]:
    """The result as JSON values. Numbers of programs are text: they can be larger than JSON readers take."""
    from fuser.search.storage import shown

    left_out = ("space", "choices", "best", "failures", "storage", "programs", "schemes", "pruned")
    plain = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in left_out}
    return {
        **plain,
        "default_seconds": None if math.isinf(result.default_seconds) else result.default_seconds,
        "storage": shown(result.storage),
        "programs": str(result.programs),
        "schemes": str(result.schemes),
        "exact": result.space.is_exact,
        "pruned": dict(result.pruned),
        "failures": [{"trial": trial, "reason": reason} for trial, reason in result.failures],
        "best": {key: str(choice.scheme) for key, choice in result.choices.items()},
        "resume": result.stopped == "interrupted",
    }


def _print(result: SearchResult, storage: str | None) -> None:
    from fuser.explain.drawing import duration
    from fuser.explain.study_report import count_text
    from fuser.search.storage import shown

    lines = [("study", f"{result.study} in {shown(result.storage)}")]
    at_least = "" if result.space.is_exact else "at least "
    programs, schemes = count_text(result.programs), count_text(result.schemes)
    lines.append(("space", f"{at_least}{programs} distinct programs of {schemes} schemes"))
    default = f"default {duration(result.default_seconds)}"
    default += f", {result.default_seconds / result.seconds:.3f} times as fast as the default's"
    if math.isinf(result.default_seconds):
        default = "the default failed"
    if result.speedup is not None:
        default += f", {result.speedup:.3f} times when measured again in a fresh process"
    lines.append(("best", f"{duration(result.seconds)}, {default}"))
    lines.append(
        (
            "trials",
            f"{result.trials}: {result.measured} measured and {result.remembered} remembered by this run, "
            f"{len(result.failures)} failed; ended by {result.stopped}",
        )
    )
    model = result.rank_correlation
    quality = f"rank correlation with the cost model {model:.3f}" if model is not None else "too few to rank"
    lines.append(("kernels", f"{result.kernels_measured} measured, {quality}"))
    lines += [("pruned", f"{count} kernels: {reason}") for reason, count in result.pruned.items()]
    lines += [("failed", f"trial {trial}: {reason}") for trial, reason in result.failures[:10]]
    if len(result.failures) > 10:
        lines.append(("failed", f"and {len(result.failures) - 10} more: see the report"))
    share = result.seconds_searching / result.seconds_total if result.seconds_total else 0.0
    lines.append(
        (
            "time",
            f"{result.seconds_total:.1f} s: building {result.seconds_building:.1f}, measuring "
            f"{result.seconds_measuring:.1f}, searching {result.seconds_searching:.1f} ({share:.1%})",
        )
    )
    where = f" --storage {shlex.quote(shown(storage))}" if storage is not None else ""
    study = shlex.quote(result.study)
    lines.append(("report", f"fuserc report {study}{where}"))
    if result.stopped in ("interrupted", "timeout"):
        lines.append(("resume", f"fuserc search --resume --study {study}{where}"))
    out = console()
    for name, text in lines:
        out.print(f"{name:<9} {text}", markup=False, soft_wrap=True)
