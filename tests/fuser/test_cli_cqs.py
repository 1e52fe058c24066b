"""``fuserc cqs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fuser.cli
from fuser import cqs
from fuser.ir.errors import PlanError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(fuser.cli.app, ["cqs", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_json_is_the_partition() -> None:
    found = json.loads(run("--workers", "7", "--seq", "4096", "--width", "32", "--json"))
    part = cqs.partition(7, 4096)
    assert found["base"] == [0, 1, 3] == list(part.base)
    assert (found["workers"], found["seq_len"], found["kv_len"]) == (7, 4096, 4096)
    assert found["responsibility_ratio"] == pytest.approx(part.responsibility_ratio)
    for share, wanted in zip(found["shares"], part.shares(), strict=True):
        assert (share["tokens"], share["pairs"], share["groups"]) == (wanted.tokens, wanted.pairs, list(wanted.groups))
        # q, k, v and the output of so many tokens, and their log-sum-exp.
        assert share["bytes"] == 4 * (4 * 32 + 1) * wanted.tokens
    assert sum(share["pairs"] for share in found["shares"]) == 4096**2


def test_rectangular() -> None:
    found = json.loads(run("--workers", "3", "--seq", "30", "--kv", "12", "--width", "8", "--json"))
    assert sum(share["pairs"] for share in found["shares"]) == 30 * 12
    assert [(s["tokens"], s["keys"], s["bytes"]) for s in found["shares"]] == [(20, 8, 4 * (20 * 17 + 8 * 16))] * 3


def test_table_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "owners.png"
    text = run("--workers", "5", "--seq", "100", "--draw", str(picture))
    assert "5 workers, 100 tokens, base set 0 1 2" in text
    assert "60.00%" in text
    assert "all pairs over those of the busiest worker: 5.0000" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_more_workers_than_tokens() -> None:
    with pytest.raises(PlanError, match="8 workers cannot share 7 tokens"):
        run("--workers", "8", "--seq", "7")
