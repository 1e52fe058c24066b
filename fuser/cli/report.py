"""``fuserc report``: what a search tried and found, as text, as JSON or as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fuser.cli.output import Json, print_json
from fuser.cli.search import Storage
from fuser.ir.errors import FuserError


def report(
    study: Annotated[
        list[str] | None,
        typer.Argument(
            help="Name of the study; further ones of the same model are drawn beside it.",
            show_default="the newest",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write.", dir_okay=False, show_default="STUDY.html")
    ] = None,
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Write a report of STUDY as one HTML file: convergence, the best scheme, kernels before and after, failures.

    With --json and without --out only the numbers are printed.
    """
    from fuser.explain.study_report import render_html, render_text, summarize
    from fuser.search.ledger import list_studies, open_study

    names = study or list_studies(storage)[-1:]
    if not names:
        raise FuserError("there is no study to report; start one with fuserc search --model MODEL")
    first, *others = [open_study(name, storage) for name in dict.fromkeys(names)]
    found = summarize(first, others)
    path = None if json and out is None else out or Path(f"{found.name.replace('/', '-')}.html")
    if path is not None:
        try:
            path.write_text(render_html(found), encoding="utf-8")
        except OSError as error:
            raise FuserError(f"cannot write the report to {path}: {error.strerror}") from error
    if json:
        print_json({**found.as_dict(), "file": None if path is None else str(path)})
    else:
        typer.echo(render_text(found))
        typer.echo(f"\nwritten: {path}")
