"""``fuserc cache``: the kernels and plans on disk."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fuser.cli.output import Json, console, print_json, table
from fuser.ir.errors import FuserError

if TYPE_CHECKING:
    from fuser.runtime.cache import KernelCache

app = typer.Typer(
    help="The kernel cache: list, verify, prune, and move kernels to machines without a compiler. "
    "It lies in [bold]$FUSER_CACHE_DIR[/], else in the user's cache directory.",
    no_args_is_help=True,
)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30}


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the kernels and attention plans, most recently used first."""
    from fuser.explain.report import size_text
    from fuser.runtime.cache import default_cache

    cache = default_cache()
    entries, plans = cache.entries(), cache.plans()
    if json:
        lists = {"kernels": [dataclasses.asdict(e) for e in entries], "plans": [dataclasses.asdict(p) for p in plans]}
        print_json({"root": str(cache.home), "bytes": cache.size(), "max_bytes": cache.max_bytes, **lists})
        return
    rows = [
        (entry.symbol, entry.key[:12], size_text(entry.size), _age(entry.created), entry.compiler.partition("\n")[0])
        for entry in entries
    ]
    out = console()
    if rows:
        out.print(table("", ("kernel", "key", ">size", ">built", "compiler"), rows))
    if plans:
        listed = [(plan.title, plan.name[:12], size_text(plan.size), _age(plan.used)) for plan in plans]
        out.print(table("", ("plan", "key", ">size", ">used"), listed))
    used = f"{size_text(cache.size())} of {size_text(cache.max_bytes)}"
    text = f"{len(entries)} kernels and {len(plans)} plans in {cache.home}, {used}"
    out.print(text, markup=False, soft_wrap=True)


@app.command("verify")
def verify(json: Json = False) -> None:
    """Check every kernel, plan and record against its checksum. Exits with 1 when one is damaged.

    Damaged kernels and plans are never used: they are made again when they are needed.
    """
    from fuser.explain.report import size_text
    from fuser.runtime.cache import default_cache

    cache = default_cache()
    report = cache.verify()
    if json:
        print_json({"root": str(cache.home), **dataclasses.asdict(report)})
    else:
        out = console()
        kernels = f"{report.kernels} kernels ({size_text(report.bytes)})"
        text = f"{kernels}, {report.plans} plans and {report.records} records are intact"
        out.print(f"{text} in {cache.home}", markup=False, soft_wrap=True)
        for name, reason in report.damaged:
            out.print(f"damaged: {name}: {reason}", markup=False, soft_wrap=True)
    if report.damaged:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    max_size: Annotated[
        str, typer.Option("--max-size", help="Keep at most this much: bytes, or with a unit as in 500M or 2G.")
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all kernels, plans, tuning results and kept failures.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove the least recently used kernels and plans."""
    from fuser.explain.report import size_text
    from fuser.runtime.cache import default_cache

    limit = _bytes(max_size) if max_size else None
    cache = default_cache()
    before = cache.size()
    _kept(cache)
    if everything:
        removed = [*(entry.key for entry in cache.entries()), *(plan.name for plan in cache.plans())]
        cache.clear()
    else:
        removed = cache.prune(limit)
    freed = before - cache.size()
    if json:
        print_json({"root": str(cache.home), "removed": removed, "freed": freed, "bytes": cache.size()})
    else:
        count = sum(name.endswith(".plan") for name in removed)
        text = f"removed {len(removed) - count} kernels and {count} plans, {size_text(freed)}"
        console().print(f"{text}; {size_text(cache.size())} are left")


@app.command("export")
def export(
    path: Annotated[Path, typer.Argument(help="The file to write.", dir_okay=False)], json: Json = False
) -> None:
    """Write all kernels and tuning results to one file, for machines of the same kind that have no compiler."""
    from fuser.runtime.cache import default_cache

    count = default_cache().export(path)
    if json:
        print_json({"path": str(path), "kernels": count, "bytes": path.stat().st_size})
    else:
        console().print(f"wrote {count} kernels to {path}", markup=False, soft_wrap=True)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A file that `fuserc cache export` wrote.", dir_okay=False)],
    max_size: Annotated[
        str, typer.Option("--max-size", help="What the file may unpack to; default: 64M or 64 times its size.")
    ] = "",
    json: Json = False,
) -> None:
    """Add the kernels, tuning results and attention plans of a file; what is here already stays.

    Kernels are code that runs as you: import only files from people you trust.
    """
    from fuser.runtime.cache import default_cache

    cache = default_cache()
    _kept(cache)
    report = cache.import_(path, _bytes(max_size) if max_size else None)
    _kept(cache)
    if json:
        values = {**dataclasses.asdict(report), "targets": sorted(report.targets)}
        print_json(values)
    else:
        added = f"{len(report.kernels)} kernels, {report.records} records and {report.plans} plans"
        console().print(f"added {added}; {report.present} were here already")


def _kept(cache: KernelCache) -> None:
    """Raise FuserError where what is done to the cache is lost with this process."""
    from fuser.runtime.store import remedy

    if cache.refusal is not None:
        raise FuserError(f"the kernel cache {cache.home} cannot be written ({cache.refusal}): {remedy(cache.refusal)}")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not a size: write bytes, or a number with K, M or G", param_hint="--max-size"
        )
    return int(float(found[1]) * (1 << _UNITS[found[2]]))


def _age(created: float) -> str:
    seconds = max(0.0, time.time() - created)
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
