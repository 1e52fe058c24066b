"""What tests of modules and of the command line share."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import fuser.cli
from fuser.module import compiler, forms


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``fuserc`` with arguments; (exit code, standard output, standard error)."""

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fuserc", *arguments])
        code = 0
        try:
            fuser.cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been captured: for all sizes, or for one shape."""
    made: list[str] = []
    for module, kind in ((forms, "all"), (compiler, "one")):

        def counting(*given: Any, capture: Any = module.capture, kind: str = kind) -> Any:
            made.append(kind)
            return capture(*given)

        monkeypatch.setattr(module, "capture", counting)
    return made
