"""``fuserc doctor``."""

from __future__ import annotations

import dataclasses

import typer

from fuser.cli.output import Json, console, print_json


def doctor(json: Json = False) -> None:
    """Check this machine: PyTorch, CPU, OpenMP, compiler, ninja, kernel cache, and what was measured about the CPU.

    Exits with 1 when something needs attention.
    """
    from fuser.runtime.doctor import diagnose

    checks = diagnose()
    if json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        out = console()
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[red]bad [/]"
            out.print(f"{mark}[bold]{check.name:<16}[/] ", end="")
            out.print(check.detail, markup=False, soft_wrap=True)
            if not check.ok and check.advice:
                out.print(f"{'':<21}→ {check.advice}", markup=False, soft_wrap=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
