"""The command ``fuserc``: look at what fuser does with a model, at the kernel cache and at the machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from fuser.cli import bench, cache, cqs, demo, doctor, quantize, report, search, show
from fuser.ir.errors import FuserError

app = typer.Typer(
    name="fuserc",
    help="Fuse the operators of transformers into fast kernels, and see what was fused and why.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("show")(show.show)
app.command("search")(search.search)
app.command("quantize")(quantize.quantize)
app.command("report")(report.report)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)
app.command("cqs")(cqs.cqs)


def _version(wanted: bool) -> None:
    if wanted:
        from fuser import __version__

        typer.echo(f"fuserc {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exits with 0 when all is well, 1 for an error or a finding (doctor, cache verify), 2 for wrong
    usage."""
    try:
        app()
    except FuserError as error:
        if "--json" in sys.argv[1:]:
            typer.echo(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            typer.echo(f"fuserc: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        sys.stderr.close()
        sys.exit(1)
