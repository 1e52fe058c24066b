"""Studies in files that something has damaged: one error that names the file, or the study as it was."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuser.ir.errors import SearchError
from fuser.search.ledger import VERSION, Ledger, list_studies, open_study

HEADER: dict[str, Any] = {
    "version": VERSION,
    "created": 1.0,
    "space": {"hash": "0", "regions": [{"hash": "1", "operators": [{"name": "a"}], "kernels": {"1": [{"name": "k"}]}}]},
    "strategy": "random",
    "seed": 0,
    "trials": 3,
    "context": {},
}
SETTINGS = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def make(path: Path) -> None:
    ledger = Ledger.create("s", str(path), HEADER)
    for seconds in (1.0, None, 3.0):
        number = ledger.claim({"point": "1.0", "strategy": "start"}, {}, {})
        ledger.finish(number, seconds, {"failure": "no"} if seconds is None else {"regions": []})
    ledger.note("kernels", [{"region": 0, "members": "1", "kernel": 0, "seconds": 0.5}])


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("study") / "s.journal"
    make(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("study") / "s.db"
    make(path)
    return path.read_bytes()


def opened(path: Path) -> None:
    """Use a study in every way that reads it, and write to it; only SearchError, which names the file, may come."""
    for use in (
        lambda: open_study("s", str(path)),
        lambda: list_studies(str(path)),
        lambda: Ledger.create("s", str(path), HEADER).note("x", 1),
        lambda: Ledger.open("s", str(path)).fail_stale(),
    ):
        try:
            use()
        except SearchError as error:
            assert str(path) in str(error)


def broken(content: bytes, data: st.DataObject) -> bytes:
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "twice"]))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at:]
    return content[:at] + content[at + data.draw(st.integers(1, 400)) :] if kind == "drop" else content[:at] + content


@SETTINGS
@given(st.data())
def test_whatever_happens_to_the_bytes_of_a_journal(journal: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "s.journal"
    path.write_bytes(broken(journal, data))
    opened(path)


@SETTINGS
@given(st.data())
def test_whatever_a_line_of_a_journal_says(journal: bytes, tmp_path: Path, data: st.DataObject) -> None:
    lines = [json.loads(line) for line in journal.splitlines()]
    line = data.draw(st.sampled_from(lines))
    where = data.draw(st.sampled_from(sorted(line)))
    inner = line[where] if isinstance(line[where], dict) and line[where] and data.draw(st.booleans()) else line
    inner[where if inner is line else data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
    path = tmp_path / "s.journal"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened(path)


@settings(SETTINGS, max_examples=4)
@given(st.data())
def test_whatever_happens_to_the_bytes_of_a_database(database: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(broken(database, data))
    opened(path)


@settings(SETTINGS, max_examples=4)
@example(None, "point")
@example("x", "point")
@given(VALUES, st.sampled_from(["fuser", "kernels", "result", "point", "details", "strategy"]))
def test_whatever_a_database_says(database: bytes, tmp_path: Path, value: Any, key: str) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(database)
    with sqlite3.connect(path) as connection:
        for table in ("study_user_attributes", "trial_user_attributes"):
            connection.execute(f"UPDATE {table} SET value_json = ? WHERE key = ?", (json.dumps(value), key))
    connection.close()
    opened(path)


@pytest.mark.parametrize("name", ["s.journal", "s.db"])
@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 999,
        b"[" * 100_000,
        b'{"op_code": 0, "worker_id": ' + b"[" * 100_000 + b"\n\n",
        b'{"op_code": 4}\n',
        b"\x89PNG\r\n\x1a\n",
        b'{"op_code": 99, "worker_id": "a"}\n',
        random.Random(0).randbytes(4096),
    ],
    ids=range(7),
)
def test_files_of_other_kinds(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    opened(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(content[:16])


@pytest.mark.parametrize("name", ["s.journal", "s.db"])
def test_a_pipe_or_a_folder_in_the_place_of_a_study_does_not_hang(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    opened(tmp_path / name)
    with pytest.raises(SearchError, match="not a file"):
        Ledger.create("s", str(tmp_path / name), HEADER)
