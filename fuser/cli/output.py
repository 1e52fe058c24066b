"""What all commands share: the console, tables, and values as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def console() -> Console:
    """Standard output; colours only on a terminal, and no line is cut where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def progress(text: str) -> AbstractContextManager[object]:
    """Say on the terminal what takes time, without a trace in the output."""
    return Console(stderr=True, highlight=False).status(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table; columns whose name starts with ">" are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        numeric = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        made.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    return made


def print_json(value: Any) -> None:
    """Print ``value`` on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))
