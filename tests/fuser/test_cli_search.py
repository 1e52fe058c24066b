"""``fuserc search`` and ``fuserc report``: results, resuming, interruption, and bad input in one line.

Times are the cost model's, so nothing is built or measured; one test at the end measures.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from fuser.ir.target import emulated_target
from fuser.runtime.device import cpu_target
from fuser.search.ledger import open_study
from fuser.search.objective import AdditiveObjective, Outcome
from fuser.search.results import Progress
from fuser.search.space import Point

TINY = ["--model", "transformer-encoder", "--layers", "2", "--hidden", "32", "--heads", "2", "--intermediate", "64"]
SEARCH = ["search", *TINY, "--seq", "16"]


class Predicted(AdditiveObjective):
    """The cost model as the objective, in the place of the clock."""

    def __init__(self, space: Any, cache: Any = None) -> None:
        super().__init__(space)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies are in the cache by default, and so are records of what was found. The target is the same everywhere: a
    new cache would have it measured anew."""
    target = cpu_target()
    monkeypatch.setattr("fuser.runtime.device.cpu_target", lambda: target)
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def predicted(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.search.measured.MeasuredObjective", Predicted)


@pytest.mark.usefixtures("predicted")
def test_search_prints_what_it_found(run: Any) -> None:
    code, out, err = run(*SEARCH, "--mask", "strided", "--trials", "8", "--study", "first")
    assert code == 0
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert facts["study"].startswith("first in ")
    assert "distinct programs of" in facts["space"]
    assert facts["trials"].startswith("8: 8 measured and 0 remembered by this run, 0 failed; ended by trials")
    # The objective is the cost model itself: its ranking is perfect, and the default cannot be beaten.
    assert "rank correlation with the cost model 1.000" in facts["kernels"]
    assert ", 1.000 times as fast" in facts["best"]
    assert "predicted to take over" in facts["pruned"]
    assert facts["report"] == "fuserc report first"
    assert "resume" not in facts
    assert err.startswith("build 0/8")


@pytest.mark.usefixtures("predicted")
def test_search_as_json(run: Any) -> None:
    code, out, _ = run(*SEARCH, "--trials", "5", "--strategy", "random", "--seed", "3", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["trials"] == found["measured"] == 5
    assert found["strategy"] == "random" and found["stopped"] == "trials"
    assert int(found["programs"]) > int(found["schemes"]) > 100
    assert found["seconds"] <= found["default_seconds"]
    assert all(scheme.split(":")[1] == region for region, scheme in found["best"].items())
    again = json.loads(run(*SEARCH, "--trials", "5", "--strategy", "random", "--seed", "3", "--json")[1])
    assert again["study"] != found["study"]
    first, second = (open_study(name) for name in (found["study"], again["study"]))
    assert [t.point for t in first.trials] == [t.point for t in second.trials]


@pytest.mark.usefixtures("predicted")
def test_resume_needs_no_other_argument(run: Any) -> None:
    assert run(*SEARCH, "--mask", "fixed:4", "--trials", "4", "--strategy", "random", "--seed", "5")[0] == 0
    code, out, _ = run("search", "--resume", "--trials", "9", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["trials"], found["measured"], found["strategy"]) == (9, 5, "random")
    # Interrupted or not, the same seed tries the same programs.
    whole = json.loads(
        run(*SEARCH, "--mask", "fixed:4", "--trials", "9", "--strategy", "random", "--seed", "5", "--json")[1]
    )
    resumed, straight = (open_study(name) for name in (found["study"], whole["study"]))
    assert [t.point for t in resumed.trials] == [t.point for t in straight.trials]


@pytest.mark.usefixtures("own_cache")
def test_interrupted_search_keeps_what_it_found_and_says_how_to_go_on(run: Any, monkeypatch: Any) -> None:
    calls = itertools.count(1)

    class Interrupted(Predicted):
        def __call__(self, point: Point) -> Outcome:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(point)

    monkeypatch.setattr("fuser.search.measured.MeasuredObjective", Interrupted)
    code, out, _ = run(*SEARCH, "--trials", "6", "--strategy", "random", "--study", "night")
    assert code == 130
    assert "ended by interrupted" in out
    assert "resume    fuserc search --resume --study night" in out
    code, out, _ = run("search", "--resume", "--study", "night", "--json")
    assert code == 0
    assert json.loads(out)["trials"] == 6
    assert [t.state for t in open_study("night").trials].count("complete") == 6


@pytest.mark.usefixtures("own_cache")
def test_failed_trials_are_listed_with_reasons(run: Any, monkeypatch: Any) -> None:
    calls = itertools.count(1)

    class Failing(Predicted):
        def __call__(self, point: Point) -> Outcome:
            return Outcome(None, "wrong <numbers>") if next(calls) % 3 == 0 else super().__call__(point)

    monkeypatch.setattr("fuser.search.measured.MeasuredObjective", Failing)
    code, out, _ = run(*SEARCH, "--trials", "6", "--strategy", "random", "--study", "f")
    assert code == 0
    assert "2 failed" in out and out.count(": wrong <numbers>") == 2
    code, out, _ = run("report", "f", "--out", "f.html")
    assert code == 0
    assert "2 trials: wrong <numbers>" in out
    assert "wrong &lt;numbers&gt;" in Path("f.html").read_text()


@pytest.mark.usefixtures("predicted")
def test_report_of_a_study(run: Any) -> None:
    for strategy in ("default", "random"):
        assert run(*SEARCH, "--trials", "8", "--strategy", strategy, "--study", strategy)[0] == 0
    code, out, _ = run("report", "default", "random")
    assert code == 0
    assert "8 of strategy default: 8 complete; ended by trials" in out
    html = Path("default.html").read_text(encoding="utf-8")
    # Both kinds of regions are drawn, though the model is not at hand.
    assert html.count("<svg") == 2 and "merge heads" in html
    assert "transformer-encoder, seq 16, layers 2" in html
    newest = json.loads(run("report", "--json")[1])
    assert newest["name"] == "random" and newest["file"] is None
    assert not Path("random.html").exists()
    found = json.loads(run("report", "default", "--json")[1])
    view = open_study("default")
    assert found["best"]["seconds"] == pytest.approx(min(t.seconds for t in view.trials if t.seconds))
    assert found["trials"][0]["predicted"] == pytest.approx(found["trials"][0]["seconds"])
    for row, region in zip(found["regions"], view.space["regions"], strict=True):
        names = sorted(name for kernel in row["after"] for name in kernel["operators"])
        assert names == sorted(operator["name"] for operator in region["operators"])
        assert row["scheme_after"].startswith(f"1:{region['hash']}:")
    assert sum(b["count"] * sum(k["seconds"] for k in b["after"]) for b in found["regions"]) == pytest.approx(
        found["best"]["seconds"]
    )


@pytest.mark.usefixtures("predicted")
def test_report_of_different_models_is_refused(run: Any) -> None:
    assert run(*SEARCH, "--trials", "2", "--study", "a")[0] == 0
    assert run("search", *TINY, "--seq", "32", "--trials", "2", "--study", "b")[0] == 0
    code, _, err = run("report", "a", "b")
    assert code == 1 and "cannot be compared" in err
    # Nor can one study hold both.
    code, _, err = run("search", *TINY, "--seq", "32", "--trials", "4", "--study", "a")
    assert code == 1 and "of another model, mask or shape" in err
    code, _, err = run("search", "--resume", *TINY, "--seq", "32", "--study", "a")
    assert code == 1 and "of another model, mask or shape" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["search"],
        [*SEARCH, "--trials", "0"],
        [*SEARCH, "--trials", "many"],
        [*SEARCH, "--strategy", "luck"],
        [*SEARCH, "--seed", "-1"],
        [*SEARCH, "--batch", "0"],
    ],
)
def test_wrong_usage_exits_with_2(run: Any, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


@pytest.mark.usefixtures("predicted")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--model", "no-such-model"], "no built-in configuration"),
        ([*SEARCH, "--mask", "triangle"], "no mask 'triangle'"),
        ([*SEARCH, "--timeout", "0"], "timeout must be a positive number"),
        ([*SEARCH, "--target", "gpu"], "there is no target 'gpu'"),
        ([*SEARCH, "--offline"], "no kernels to build offline"),
        ([*SEARCH, "--storage", "/dev/null/studies.journal"], "the storage /dev/null/studies.journal failed"),
        ([*SEARCH, "--storage", "nonsense://somewhere"], "the storage nonsense://somewhere failed"),
        (["search", "--resume"], "there is no study to resume"),
        (["search", "--resume", "--storage", "gone.journal"], "there are no studies at"),
        (["search", "--resume", "--storage", "gone.db"], "there are no studies at"),
        (["search", "--resume", "--study", "x", "--storage", "gone.db"], "there are no studies at"),
        (["report"], "there is no study to report"),
        (["report", "x", "--storage", "sqlite:///gone.db"], "there are no studies at"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(run: Any, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 1 and out == ""
    assert err.startswith("fuserc: ") and message in err
    assert "Traceback" not in err and err.count("\n") == 1


@pytest.mark.usefixtures("predicted")
def test_cuda_targets(run: Any) -> None:
    small = [*SEARCH, "--layers", "1", "--trials", "2", "--dtype", "float16"]
    code, out, _ = run(*small, "--target", "cuda:emulated", "--json")
    assert code == 0
    view = open_study(json.loads(out)["study"])
    assert view.context["target"] == emulated_target().key and view.context["threads"] == 1
    assert view.attributes["title"].endswith("target cuda:emulated, float16")
    assert {k["family"] for region in view.space["regions"] for ks in region["kernels"].values() for k in ks} >= {
        "attention",
        "gemm",
        "rowwise",
    }
    # The study knows its target.
    assert json.loads(run("search", "--resume", "--trials", "3", "--json")[1])["trials"] == 3
    if not torch.cuda.is_available():
        code, _, err = run(*small, "--target", "cuda")
        assert code == 1 and err.startswith("fuserc: this ") and ("CUDA" in err or "driver" in err)


@pytest.mark.usefixtures("predicted")
def test_storage_that_is_none(run: Any) -> None:
    Path("garbage.journal").write_text("not a journal\n")
    Path("garbage.db").write_text(
        "not a database, though it is longer than a header of one hundred bytes would be " * 3
    )
    for name in ("garbage.journal", "garbage.db"):
        code, _, err = run(*SEARCH, "--trials", "2", "--storage", name)
        assert code == 1 and err.startswith("fuserc: ") and name in err and err.count("\n") == 1


@pytest.mark.usefixtures("predicted")
def test_storage_of_another_version(run: Any) -> None:
    assert run(*SEARCH, "--trials", "2", "--storage", "studies.db", "--study", "a")[0] == 0
    with sqlite3.connect("studies.db") as database:
        database.execute("UPDATE version_info SET schema_version = 1")
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    database.close()
    code, _, err = run("report", "a", "--storage", "studies.db")
    assert code == 1 and "version" in err and err.count("\n") == 1


@pytest.mark.usefixtures("predicted")
def test_unknown_study_and_a_report_that_cannot_be_written(run: Any) -> None:
    assert run(*SEARCH, "--trials", "2", "--study", "known")[0] == 0
    code, _, err = run("report", "unknown")
    assert code == 1 and "there is no study 'unknown'" in err and "known" in err
    code, _, err = run("report", "known", "--out", "missing/folder/out.html")
    assert code == 1 and "cannot write the report" in err
    assert json.loads(run("report", "unknown", "--json")[1])["kind"] == "SearchError"


def test_progress_in_one_line() -> None:
    from fuser.cli.search import clock, facts

    state = Progress("trials", "s", 3, 10, 1, 0, 0.028, 0.030, 65.0, 150.0, 12, 40, "trial 2: 28.000 ms")
    text = "best 28 ms  default 30 ms  12 kernels measured  1 failed  1:05  ETA 2:30  trial 2: 28.000 ms"
    assert facts(state) == text
    assert clock(3725) == "1:02:05"


def test_measured_search(run: Any) -> None:
    """The whole way, in a child process on the clock."""
    where = ["--storage", "m.journal"]
    sizes = ["--layers", "1", "--hidden", "16", "--heads", "1", "--intermediate", "16", "--seq", "8"]
    code, out, err = run(
        "search", "--model", "transformer-encoder", *sizes, *where, "--trials", "2", "--study", "m", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["measured"] + found["remembered"] == 2
    assert min(found["seconds"], found["default_seconds"]) > 0
    report = json.loads(run("report", "m", *where, "--json")[1])
    assert any(kernel["measured"] for region in report["regions"] for kernel in region["after"])
