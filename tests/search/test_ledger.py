"""Studies in their storages: claims, ends, what died, and what reports read of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from fuser.ir.errors import SearchError
from fuser.search import ledger as module
from fuser.search.ledger import VERSION, Ledger, list_studies, open_study

KERNELS = {"1": [{"name": "gemm a"}, {"name": "gemm b"}], "2": [{"name": "norm"}], "3": [{"name": "both"}]}
REGION = {"hash": "1", "operators": [{"name": "product"}, {"name": "norm"}], "kernels": KERNELS}
HEADER: dict[str, Any] = {
    "version": VERSION,
    "created": 5.0,
    "space": {"hash": "0", "regions": [REGION]},
    "strategy": "random",
    "seed": 7,
    "trials": 3,
    "context": {"threads": 2},
    "attributes": {"model": "bert"},
}


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / getattr(request, "param", "s.journal"))


both_storages = pytest.mark.parametrize("storage", ["s.journal", "s.db"], indirect=True)


@pytest.fixture
def ledger(storage: str) -> Ledger:
    return Ledger.create("s", storage, HEADER)


def claim(ledger: Ledger, point: str = "1.1,2.0", **attrs: Any) -> int:
    return ledger.claim({"point": point, "strategy": "random", **attrs}, {}, {})


def own(ledger: Ledger, number: int, owner: str) -> None:
    """Let somebody else have claimed a trial."""
    trial = ledger.trials()[number]
    optuna.trial.Trial(ledger.study, trial._trial_id).set_user_attr("owner", owner)


@both_storages
def test_a_study_is_read_as_it_was_written(ledger: Ledger, storage: str) -> None:
    before = time.time()
    first = claim(ledger, strategy="start")
    ledger.finish(first, 0.25, {"regions": [{"seconds": 0.25}], "remembered": True})
    second = claim(ledger, "3.0", group="attention")
    ledger.finish(second, None, {"failure": "it crashed"})
    third = claim(ledger)
    ledger.finish(third, None, {"failure": "another process has this program"}, duplicate=True)
    fourth = claim(ledger)
    ledger.note("kernels", [{"region": 0, "members": "1", "kernel": 1, "seconds": 0.125}])
    ledger.note("result", {"speedup": 2.0})

    view = open_study("s", storage)
    assert (view.name, view.created, view.strategy, view.seed, view.trials_wanted) == ("s", 5.0, "random", 7, 3)
    assert view.context == {"threads": 2} and view.attributes == {"model": "bert"} and view.result == {"speedup": 2.0}
    assert [t.number for t in view.trials] == [first, second, third, fourth] == [0, 1, 2, 3]
    assert [t.state for t in view.trials] == ["complete", "failed", "duplicate", "running"]
    assert [t.seconds for t in view.trials] == [0.25, None, None, None]
    assert [t.failure for t in view.trials] == ["", "it crashed", "another process has this program", ""]
    assert [t.remembered for t in view.trials] == [True, False, False, False]
    assert view.best == view.default == view.trials[0] and view.trials[1].group == "attention"
    assert view.trials[0].regions == ({"seconds": 0.25},)
    # Of the kernels of a point the names of their operators, and times where they were measured.
    product, norm = view.trials[0].kernels[0]
    assert product == {"name": "gemm b", "operators": ["product"], "members": "1", "seconds": 0.125}
    assert norm == {"name": "norm", "operators": ["norm"], "members": "2", "seconds": None}
    ((both,),) = view.trials[1].kernels
    assert both["operators"] == ["product", "norm"]
    assert all(t.owner == f"{socket.gethostname()}:{os.getpid()}" for t in view.trials)
    for trial in view.trials:
        # Databases keep whole seconds.
        assert before - 1 <= trial.started <= (trial.finished or trial.started) <= time.time() + 1
        assert (trial.finished is None) == (trial.state == "running")


def test_the_fastest_trial_is_the_best_and_of_equal_ones_the_first(ledger: Ledger) -> None:
    assert ledger.view().best is None and ledger.view().default is None
    for seconds in (3.0, 1.0, 1.0, None, 2.0):
        ledger.finish(claim(ledger), seconds, {})
    best = ledger.view().best
    assert best is not None and (best.number, best.seconds) == (1, 1.0)


def test_a_trial_ends_once(ledger: Ledger) -> None:
    number = claim(ledger)
    ledger.finish(number, 1.0, {"regions": []})
    ledger.finish(number, 2.0, {"regions": [1]})
    ledger.finish(number, None, {"failure": "late"})
    (trial,) = ledger.view().trials
    assert (trial.state, trial.seconds, trial.failure, trial.regions) == ("complete", 1.0, "", ())


def test_who_comes_second_gets_the_study_of_who_came_first(ledger: Ledger, storage: str) -> None:
    second = Ledger.create("s", storage, {**HEADER, "seed": 8})
    assert second.header == HEADER
    number = claim(second)
    assert claim(ledger) == number + 1
    assert [t.number for t in second.trials()] == [0, 1]


@both_storages
def test_what_a_process_that_died_was_at_is_failed_and_returned(ledger: Ledger) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = int(child.stdout)
    mine, its, reused, far = (claim(ledger, f"{i}.0") for i in (1, 2, 1, 2))
    ended = claim(ledger)
    own(ledger, ended, f"{socket.gethostname()}:{dead}:1")
    ledger.finish(ended, 1.0, {})
    own(ledger, its, f"{socket.gethostname()}:{dead}:1")
    # A process of that number lives, but it started at another time.
    own(ledger, reused, f"{socket.gethostname()}:{os.getpid()}:1")
    own(ledger, far, "another-machine:1:1")
    assert ledger.fail_stale() == ["2.0", "1.0"]
    states = {t.number: (t.state, t.failure) for t in ledger.view().trials}
    assert states[mine] == states[far] == ("running", "")
    assert states[its] == ("failed", f"the process {dead} that ran it has died")
    assert states[reused] == ("failed", f"the process {os.getpid()} that ran it has died")
    assert states[ended] == ("complete", "")
    assert ledger.fail_stale() == []


def test_another_machine_is_believed_dead_after_a_while_only(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    own(ledger, claim(ledger), "another-machine:1:1")
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 600)
    assert ledger.fail_stale() == []
    monkeypatch.setattr(module.time, "time", lambda: now + 1000)
    assert ledger.fail_stale() == ["1.1,2.0"]
    assert ledger.view().trials[0].failure == "another-machine has not ended it in 15 minutes"


def test_a_study_that_somebody_else_made_is_left_alone(storage: str) -> None:
    Ledger.create("ours", storage, HEADER)
    found, _ = module_storage(storage)
    theirs = optuna.create_study(study_name="theirs", storage=found)
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(SearchError, match="not made by fuser"):
        Ledger.create("theirs", storage, HEADER)
    with pytest.raises(SearchError, match="not made by fuser"):
        Ledger.open("theirs", storage)
    assert list_studies(storage) == ["ours"]
    assert "fuser" not in optuna.load_study(study_name="theirs", storage=found).user_attrs


def module_storage(storage: str) -> tuple[Any, str]:
    from fuser.search.storage import open_storage

    return open_storage(storage, create=False)


def test_a_study_that_is_not_there_is_one_error_that_names_those_that_are(ledger: Ledger, storage: str) -> None:
    with pytest.raises(SearchError, match=r"no study 'other' in .*; the newest there: s"):
        open_study("other", storage)


def test_a_study_of_another_version_says_which(storage: str) -> None:
    with pytest.raises(SearchError, match=rf"has version 99, this fuser reads {VERSION}"):
        Ledger.create("s", storage, {**HEADER, "version": 99})
