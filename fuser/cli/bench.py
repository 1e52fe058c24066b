"""``fuserc bench``: sweeps that measure this machine."""

from __future__ import annotations

import csv
import functools
import json as json_format
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuser.cli.output import Json, console, print_json, progress, table

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(help="Measure attention on this machine.", no_args_is_help=True)
_SETTLE_SECONDS = 0.05
"""Pause before a call is timed, in which the threads of the one before stop spinning."""
_SHARE_OF_MEMORY = 0.8
_SLOWEST = 0.05
"""Share of the peak that a call is expected to reach at least, before one has been timed."""
_COLUMNS = (
    "granularity",
    "length",
    "tile",
    "median_ms",
    "low_ms",
    "high_ms",
    "runs",
    "extra_bytes",
    "predicted_bytes",
    "live_bytes",
    "skipped",
)


@app.callback()
def _group() -> None:
    pass


@app.command("flat")
def flat(
    start: Annotated[int, typer.Option("--from", min=1, help="Shortest sequence; it doubles up to --to.")] = 256,
    stop: Annotated[int, typer.Option("--to", min=1, help="Longest sequence.")] = 16384,
    batch: Annotated[int, typer.Option(min=1, help="Batch entries.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Query rows of a tile of row granularity.", show_default="what fits the cache"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each, in turn.")] = 5,
    max_seconds: Annotated[
        float, typer.Option(min=0.0, help="Skip what is predicted to take longer than this, all its calls together.")
    ] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder for flat.json, flat.csv and flat.png.", file_okay=False)] = Path(
        "out"
    ),
    json: Json = False,
) -> None:
    """Sweep the granularity of FLAT attention against the length of the sequence: time and memory.

    Compares whole batch entries, whole heads and rows of heads, whose logits are in memory one tile at a time, with the
    fused kernel (flash). Memory is what a call allocates beside its result.
    """
    from fuser.ir.errors import FuserError

    if stop < start:
        raise FuserError(f"--to {stop} is below --from {start}")
    results: list[dict[str, Any]] = []
    lengths = [start]
    while lengths[-1] * 2 <= stop:
        lengths.append(lengths[-1] * 2)
    for length, past in zip(lengths, [None, *lengths], strict=False):
        before = {r["granularity"]: r["median_ms"] / 1e3 for r in results if r["length"] == past and "median_ms" in r}
        with progress(f"{length} tokens …"):
            results += measure(length, batch, heads, head_dim, rows, rounds, max_seconds, before)
    report = {"benchmark": "flat", "machine": _machine(), "results": results}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "flat.json").write_text(json_format.dumps(report, indent=1) + "\n", encoding="utf-8")
        with (out / "flat.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS, restval="")
            writer.writeheader()
            writer.writerows({**r, "tile": "x".join(map(str, r["tile"]))} for r in results)
        plotted = _plot(results, out / "flat.png")
    except OSError as error:
        raise FuserError(f"cannot write to the folder {out}: {error}") from error
    files = ["flat.json", "flat.csv", *(["flat.png"] if plotted else [])]
    if json:
        print_json({**report, "files": [str(out / name) for name in files]})
        return
    shown = console()
    columns = (">tokens", "granularity", "tile", ">median", ">memory", ">predicted", ">live set")
    shown.print(table("", columns, map(_row, results)))
    for r in results:
        if "skipped" in r:
            shown.print(f"skipped {r['granularity']} at {r['length']}: {r['skipped']}", markup=False, soft_wrap=True)
    if not plotted:
        shown.print("no plot: matplotlib is not installed", markup=False)
    shown.print(f"written: {', '.join(str(out / name) for name in files)}", markup=False, soft_wrap=True)


def measure(
    length: int,
    batch: int = 1,
    heads: int = 12,
    head_dim: int = 64,
    rows: int | None = None,
    rounds: int = 5,
    max_seconds: float = 60.0,
    before: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One record a granularity at one length: times (ms), memory (bytes) and its prediction, or why it was skipped.

    ``before`` has the seconds of each granularity at half the length, from which times are predicted.
    """
    import torch

    from fuser.flat import FLASH, attention, buffer_bytes, live_bytes
    from fuser.runtime.device import cpu_target

    inputs, room = 3 * 4 * batch * heads * length * head_dim, _available_bytes()
    if room is not None and inputs > _SHARE_OF_MEMORY * room:
        reason = f"its inputs need {inputs / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"
        return [
            {"granularity": name, "length": length, "tile": [], "skipped": reason}
            for name in ("batch", "head", "row", FLASH)
        ]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3))
    target = cpu_target()
    slowest = 4 * batch * heads * length**2 * head_dim / (_SLOWEST * target.peak_flops * torch.get_num_threads())
    records: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("batch", "head", "row", FLASH):
        record: dict[str, Any] = {"granularity": name, "length": length, "tile": []}
        extra = 0
        if name != FLASH:
            tile = (1, 1, min(rows, length)) if name == "row" and rows is not None else None
            record["tile"] = list(_extents(q, k, v, name, tile))
            extra = buffer_bytes(q, k, v, granularity=name, tile=tile)
            record["predicted_bytes"] = extra
            record["live_bytes"] = live_bytes(q, k, v, granularity=name, tile=tile)
        seconds = 4 * before[name] if before and name in before else slowest
        # A call is run for its memory, before the rounds, and twice in each.
        seconds *= 2 * rounds + 2
        needed, room = extra + q.nbytes, _available_bytes()
        if room is not None and needed > _SHARE_OF_MEMORY * room:
            record["skipped"] = f"needs {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"
        elif seconds > max_seconds:
            record["skipped"] = f"would take about {seconds:.0f} s, above --max-seconds {max_seconds:g}"
        else:
            tile = None if name == FLASH else record["tile"]
            calls[name] = functools.partial(attention, q, k, v, granularity=name, tile=tile)
        records.append(record)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    memory = {name: allocated(call) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_SETTLE_SECONDS)
            call()
            begin = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - begin))
    for record in records:
        if taken := samples.get(record["granularity"]):
            low, median, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
            record |= {"median_ms": round(median, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}
            record |= {"runs": len(taken), "extra_bytes": memory[record["granularity"]]}
    return records


def _extents(q: Tensor, k: Tensor, v: Tensor, name: str, tile: tuple[int, int, int] | None) -> tuple[int, int, int]:
    from fuser.flat import tile_for

    made = tile_for(q, k, v, granularity=name, tile=tile)
    return made.batch, made.heads, made.rows


def allocated(call: Callable[[], Any]) -> int:
    """Peak bytes of tensors that a call allocates beside its result, those that PyTorch makes by itself included."""
    from torch.autograd.profiler import profile

    call()  # what is made once, such as a kernel, is not counted
    with profile(profile_memory=True) as found:
        result = call()
    now = peak = 0
    for event in sorted(found.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - int(result.nbytes)


def _available_bytes() -> int | None:
    """Memory that is free for use, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _machine() -> dict[str, Any]:
    import torch

    from fuser import __version__
    from fuser.runtime.cpuinfo import cpu_name
    from fuser.runtime.device import cpu_target

    target = cpu_target()
    return {
        "cpu": cpu_name(),
        "arch": target.arch,
        "threads": torch.get_num_threads(),
        "peak_gflops_a_core": round(target.peak_flops / 1e9, 1),
        "bandwidth_gb_s": round(target.bandwidth / 1e9, 1),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "sparse-fuser": __version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _row(record: dict[str, Any]) -> list[str]:
    memory = [
        f"{record[name] / 2**20:.2f} MiB" if name in record else "–"
        for name in ("extra_bytes", "predicted_bytes", "live_bytes")
    ]
    spent = f"{record['median_ms']:.2f} ms" if "median_ms" in record else "skipped"
    return [str(record["length"]), record["granularity"], "×".join(map(str, record["tile"])) or "–", spent, *memory]


def _plot(results: list[dict[str, Any]], path: Path) -> bool:
    """Time and memory against length, both logarithmic; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(r["granularity"] for r in results):
        timed = [r for r in results if r["granularity"] == name and "median_ms" in r]
        lengths = [r["length"] for r in timed]
        (line,) = time_axes.plot(lengths, [r["median_ms"] for r in timed], marker="o", label=name)
        memory_axes.plot(
            lengths, [max(r["extra_bytes"], 1) / 2**20 for r in timed], marker="o", color=line.get_color(), label=name
        )
        predicted = [r for r in results if r["granularity"] == name and "predicted_bytes" in r]
        memory_axes.plot(
            [r["length"] for r in predicted],
            [r["predicted_bytes"] / 2**20 for r in predicted],
            linestyle=":",
            color=line.get_color(),
        )
    for axes, label in ((time_axes, "time of a call, ms"), (memory_axes, "extra memory, MiB (dotted: predicted)")):
        axes.set(xlabel="tokens", ylabel=label)
        # There is no logarithmic scale where everything was skipped.
        if axes.dataLim.width >= 0 and axes.dataLim.y0 > 0:
            axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True
