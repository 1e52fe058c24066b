"""``fuserc show``: a model at every stage between the user's code and machine code."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuser.cli.options import MODEL_HELP, Batch, Dtype, MaskText, Padding, Scores, Seq, Size, Threads
from fuser.cli.output import Json, console, print_json, progress, table
from fuser.ir.errors import FuserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fuser.cli.models import Named
    from fuser.ir.masks import Mask
    from fuser.ir.target import Target
    from fuser.module.compiler import Compiled
    from fuser.module.optimized import OptimizedModule


class Stage(str, enum.Enum):
    """What to show."""

    FX = "fx"
    GRAPH = "graph"
    SCHEME = "scheme"
    KERNELS = "kernels"
    SOURCE = "source"
    PLAN = "plan"
    PRECISION = "precision"


def show(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    stage: Annotated[
        Stage,
        typer.Option(
            help="fx: the captured ATen graph. graph: the operators. scheme: regions and which operators share a "
            "kernel. kernels: the kernels. source: their C++. plan: steps and memory. precision: the model in int8, "
            "calibrated on its example: the numbers and the error of every kernel, and with --scores the share of "
            "scores and of tiles of 64 x 64 that every head of every attention computes in full."
        ),
    ] = Stage.KERNELS,
    profile: Annotated[
        bool, typer.Option("--profile", help="With --stage kernels: time every step beside its floor.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of --profile.")] = 20,
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
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Seed of the random weights.")] = 0,
    search: Annotated[
        str, typer.Option(help="cached: measure kernels and remember; model: trust the cost model.")
    ] = "cached",
    quality: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of --stage precision: least mean cosine.")] = 0.999,
    scores: Annotated[
        Scores | None,
        typer.Option(help="Of --stage precision: attention with fuser.Int8Attention(), fuser.DEQ() or fuser.Sanger()."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show MODEL at one stage of compilation, or time its kernels."""
    if profile and stage is not Stage.KERNELS:
        raise typer.BadParameter("only kernels can be timed: use --stage kernels", param_hint="--profile")
    if scores is not None and stage is not Stage.PRECISION:
        raise typer.BadParameter("only --stage precision shows what becomes of scores", param_hint="--scores")
    if search not in ("cached", "model"):
        raise typer.BadParameter(f"{search!r} is neither cached nor model", param_hint="--search")
    import torch

    from fuser.cli.models import parse_mask, resolve

    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {
        "batch": batch,
        "seq": seq,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
    }
    attention = parse_mask(mask)
    named = resolve(model, sizes, seed=seed, padding=padding, dtype=dtype)
    if stage in (Stage.FX, Stage.GRAPH):
        _show_capture(named, stage, attention, json)
        return
    with progress(f"compiling {named.name}"):
        optimized = _compile(named, attention, search, quality if stage is Stage.PRECISION else None, scores)
    compiled = optimized.programs[-1]
    if profile:
        _show_profile(named, compiled, optimized, rounds, json)
    elif stage is Stage.SOURCE:
        sources = {source.symbol: source.text for source in compiled.assembly.sources}
        print_json(sources) if json else typer.echo("\n".join(sources.values()))
    elif stage is Stage.PLAN:
        _show_plan(compiled, json)
    elif stage is Stage.PRECISION:
        _show_precision(optimized, named.call.tensors if scores in (Scores.DEQ, Scores.SANGER) else (), json)
    else:
        _show_report(optimized, stage, json)


def _compile(
    named: Named, attention: Mask | None, search: str, quality: float | None, scores: Scores | None
) -> OptimizedModule:
    from fuser.ir.score_quantization import ScoreQuantization
    from fuser.module.optimized import optimize
    from fuser.module.quantizing import Int8, LinearQuantization

    given, how = [named.args or named.kwargs], list[LinearQuantization | ScoreQuantization]()
    if quality is not None:
        how.append(Int8(given if quality else None, quality=quality, smooth=quality > 0))
    if scores is not None:
        how.append(scores.quantization)
    optimized = optimize(named.model, named.args or named.kwargs, attention=attention, search=search, quantize=how)
    if not optimized.programs:
        reasons = [*optimized.fallbacks, *(reason for _, reason in optimized.unfused)]
        raise FuserError("; ".join(dict.fromkeys(reasons)) or f"{named.name} was not compiled")
    return optimized


def _show_capture(named: Named, stage: Stage, attention: Mask | None, json: bool) -> None:
    from fuser.frontend.capture import capture
    from fuser.frontend.graphs import raise_graph
    from fuser.module.options import Options

    captured = capture(named.model, named.call)
    if stage is Stage.FX:
        if json:
            nodes = [
                {"name": node.name, "op": node.op, "target": str(node.target), "args": [str(a) for a in node.args]}
                for node in captured.graph.graph.nodes
            ]
            print_json({"inputs": captured.inputs, "parameters": list(captured.parameters), "nodes": nodes})
        else:
            typer.echo(captured.graph.print_readable(print_output=False))
        return
    graph = raise_graph(captured, Options(attention=attention).attention_now())
    if not json:
        typer.echo(str(graph))
        return
    operators = [
        {"name": op.name, "kind": op.kind, "inputs": op.inputs, "outputs": op.outputs, "reason": op.reason}
        for op in graph.operators
    ]
    values = {
        name: {"shape": spec.shape, "strides": spec.strides, "dtype": str(spec.dtype), "base": spec.base}
        for name, spec in graph.values.items()
    }
    regions = [{"hash": region.hash, "operators": [op.name for op in region]} for region in graph.regions]
    print_json(
        {
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "operators": operators,
            "values": values,
            "constants": list(graph.constants),
            "regions": regions,
        }
    )


def _show_report(optimized: OptimizedModule, stage: Stage, json: bool) -> None:
    from fuser.explain.drawing import duration
    from fuser.explain.report import collect

    found = collect(optimized.snapshot())
    if json:
        values = found.as_dict()
        print_json(values["regions"] if stage is Stage.SCHEME else values)
        return
    out = console()

    def time(seconds: float | None, measured: bool) -> str:
        return "–" if seconds is None else f"{'' if measured else '≈ '}{duration(seconds)}"

    if stage is Stage.SCHEME:
        for region in found.regions:
            rows = [
                (str(i), group.family, time(group.seconds, group.measured), ", ".join(group.operators))
                for i, group in enumerate(region.groups)
            ]
            title = f"{region.scheme}   × {region.count}   {duration(region.seconds)} each"
            out.print(table(title, (">", "family", ">time", "operators"), rows))
            out.print()
        return
    kernel_rows = [
        (row.name, row.family, str(row.calls), time(row.seconds, row.measured), ", ".join(row.operators))
        for row in found.kernels
    ]
    out.print(table("kernels", ("kernel", "family", ">calls", ">one call", "operators of the first use"), kernel_rows))
    for title, reasons in (("unfused", found.unfused), ("outside the regions", found.outside)):
        if reasons:
            out.print()
            out.print(table(title, ("operator", "reason"), reasons))


def _show_precision(optimized: OptimizedModule, tensors: Sequence[Tensor], json: bool) -> None:
    """``tensors``, if there are any, are the call whose scores are looked at."""
    from fuser.explain.decisions import of_program
    from fuser.explain.report import collect

    found = collect(optimized.snapshot())
    decided = of_program(optimized.programs[-1], tensors) if tensors else {}
    heads = {name: (s.elements.nanmean(0).tolist(), s.tiles.nanmean(0).tolist()) for name, s in decided.items()}
    if json:
        widths = [{"operators": w.operators, "width": w.width, "error": w.error} for w in found.widths]
        shares = [{"operator": name, "scores": scores, "tiles": tiles} for name, (scores, tiles) in heads.items()]
        print_json({"precision": found.precision, "groups": widths, "computed_in_full": shares})
        return
    out = console()
    rows = [(w.width, f"{w.error:.1e}" if w.error == w.error else "–", ", ".join(w.operators)) for w in found.widths]
    out.print(table("precision", ("numbers", ">error", "operators"), rows))
    out.print()
    if heads:
        cells = [
            (name, " ".join(f"{x:.1%}" for x in scores), " ".join(f"{x:.0%}" for x in tiles))
            for name, (scores, tiles) in heads.items()
        ]
        out.print(table("computed in full, by head", ("attention", "scores", "tiles of 64 x 64"), cells))
        out.print()
    for line in found.precision:
        out.print(line, markup=False, soft_wrap=True)


def _show_profile(named: Named, compiled: Compiled, optimized: OptimizedModule, rounds: int, json: bool) -> None:
    from fuser.explain.drawing import duration
    from fuser.explain.profiling import profile_compiled, summary
    from fuser.runtime.device import cpu_target

    target: Target = cpu_target()
    with progress("timing every step"):
        found = profile_compiled(compiled, named.call.tensors, target, rounds)
    if json:
        print_json(found.as_dict())
        return
    rows = []
    for kind in found.kinds:
        fraction = kind.fraction
        rows.append(
            (
                "+".join(kind.kinds) if kind.floor is not None else ", ".join(kind.operators),
                kind.family,
                str(kind.calls),
                duration(kind.seconds),
                duration(kind.floor) if kind.floor is not None else "–",
                kind.bound or "–",
                f"{fraction:.0%}" if fraction is not None else "–",
                f"{kind.total / found.call:.1%}",
                kind.kernel,
            )
        )
    columns = ("operators", "family", ">calls", ">one call", ">floor", "bound", ">reached", ">share", "kernel")
    out = console()
    out.print(table("", columns, rows))
    out.print()
    for line in summary(found):
        out.print(line, markup=False, soft_wrap=True)


def _show_plan(compiled: Compiled, json: bool) -> None:
    from fuser.explain.report import size_text
    from fuser.runtime.program import NativeStep

    plan, labels = compiled.assembly.plan, compiled.assembly.labels

    def where(slots: Any) -> str:
        return " ".join(
            f"{slot.memory.value}{'' if slot.memory.value == 'arena' else slot.index}+{slot.offset}"
            f"[{'×'.join(map(str, slot.shape))}]"
            for slot in slots
        )

    steps = []
    for label, step in zip(labels, plan.steps, strict=True):
        if isinstance(step, NativeStep):
            steps.append((label, step.symbol, where(step.tensors), ""))
        else:
            to = where(step.results if step.out is None else (step.out,))
            steps.append((label, str(step.call), where(step.inputs), to))
    sizes = {
        "arena_bytes": plan.arena_bytes,
        "workspace_offset": plan.workspace_offset,
        "constants": len(plan.constants),
        "threads": plan.threads,
    }
    if json:
        named = [dict(zip(("operators", "runs", "tensors", "results"), step, strict=True)) for step in steps]
        expected = [{"shape": slot.shape, "dtype": str(slot.dtype)} for slot in plan.inputs]
        print_json({"guards": expected, "steps": named, **sizes})
        return
    out = console()
    for i, (label, runs, tensors, results) in enumerate(steps):
        out.print(f"{i:>3}  {label}", markup=False, soft_wrap=True)
        out.print(f"     {runs}  {tensors}{' → ' + results if results else ''}", markup=False, soft_wrap=True)
    guards = ", ".join(f"{'×'.join(map(str, slot.shape))} {slot.dtype}" for slot in plan.inputs)
    out.print(f"guards  {guards}", markup=False, soft_wrap=True)
    scratch = size_text(plan.arena_bytes - plan.workspace_offset)
    arena = f"arena {size_text(plan.arena_bytes)} of which scratch {scratch}"
    out.print(f"memory  {arena}, {len(plan.constants)} constants, {plan.threads} threads", soft_wrap=True)
