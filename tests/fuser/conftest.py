"""What tests of the command line share."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import fuser.cli


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
