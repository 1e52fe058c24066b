"""Studies: kept, resumed, shared by processes, reproducible; strategies that find what exhaustive search finds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from fuser.ir.errors import SearchError
from fuser.runtime.device import cpu_target
from fuser.schemes import bert_layer, from_atoffer
from fuser.search.ledger import VERSION, list_studies, open_study
from fuser.search.objective import AdditiveObjective, Outcome
from fuser.search.results import Progress, SearchResult
from fuser.search.space import Point, RegionSpace, Space
from fuser.search.statistics import spearman
from fuser.search.study import STRATEGIES, search

TARGET = dataclasses.replace(cpu_target(), peak_flops=1e11, bandwidth=1e10, launch_seconds=1e-6)
LAYER = bert_layer(sequence=16, hidden=64, heads=2, inner=128)
SPACE = Space.of([LAYER], TARGET, 2)


def costs(region: int, members: int, kernel: int) -> float:
    """The cost model's prediction, exceeded by up to a third."""
    return SPACE.predicted(region, members, kernel) * (1 + np.random.default_rng([members, kernel]).random() / 3)


def run(folder: Path, strategy: str = "default", *, study: str | None = "s", objective=None, **options) -> SearchResult:  # type: ignore[no-untyped-def]
    return search(
        [LAYER],
        TARGET,
        2,
        strategy=strategy,
        study=study,
        storage=options.pop("storage", str(folder / "studies.journal")),
        objective=AdditiveObjective(SPACE, costs) if objective is None else objective,
        space=SPACE,
        decode=from_atoffer,
        **options,
    )


def exhaustive() -> float:
    """The least additive time of all legal programs of the layer: of every scheme, each with its cheapest kernels."""
    (space,) = SPACE.regions
    cheapest = {m: (min(range(len(ks)), key=lambda k, m=m: costs(0, m, k)),) for m, ks in space.kernels.items()}
    schemes = RegionSpace(space.region, 1, space.kernels, cheapest)
    assert schemes.remaining == SPACE.schemes
    return min(math.fsum(costs(0, members, kernel) for members, kernel in program) for program in schemes.enumerate())


def test_the_best_of_all_programs_is_found_with_a_twentieth_of_the_measurements(tmp_path: Path) -> None:
    best = exhaustive()
    found = run(tmp_path, trials=32)
    assert found.seconds == pytest.approx(best, rel=1e-12)
    # AToffer measures 5 rounds of 128 programs.
    assert found.trials <= 640 / 20
    exact = run(tmp_path, "exact", study="exact", trials=32)
    assert exact.seconds == pytest.approx(best, rel=1e-12)
    assert exact.trials == 2
    assert found.default_seconds == pytest.approx(SPACE.additive(SPACE.default(), costs))
    assert found.programs == SPACE.programs and f"{SPACE.programs} distinct programs" in found.summary()


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("gp", "exact")])
def test_strategies_share_one_objective(strategy: str, tmp_path: Path) -> None:
    found = run(tmp_path, strategy, trials=15)
    view = open_study("s", str(tmp_path / "studies.journal"))
    assert view.strategy == strategy and view.seed == 0
    assert len(view.trials) == found.trials == 15
    assert view.default is not None and view.default.seconds == found.default_seconds
    assert view.best is not None and view.best.seconds == found.seconds
    for trial in view.trials:
        assert trial.seconds == pytest.approx(SPACE.additive(Point.parse(trial.point), costs))
        names = [name for kernels in trial.kernels for kernel in kernels for name in kernel["operators"]]
        assert sorted(names) == sorted(op.name for op in LAYER.operators)
    if "atoffer" not in strategy:
        assert len({trial.point for trial in view.trials}) == 15
    json.dumps(view.result)
    assert view.result["seconds"] == found.seconds


def test_a_seed_repeats_a_search(tmp_path: Path) -> None:
    def points(name: str, seed: int) -> list[str]:
        run(tmp_path, study=name, seed=seed, trials=25)
        return [t.point for t in open_study(name, str(tmp_path / "studies.journal")).trials]

    first = points("a", 7)
    assert points("b", 7) == first
    assert points("c", 8) != first


def test_a_study_is_resumed_to_its_number_of_trials(tmp_path: Path) -> None:
    objective = AdditiveObjective(SPACE, costs)

    def stop(progress: Progress) -> None:
        if progress.trials == 9:
            raise KeyboardInterrupt

    first = run(tmp_path, trials=20, progress=stop, objective=objective, plateau=1000)
    assert first.stopped == "interrupted" and first.trials == 9
    view = open_study("s", str(tmp_path / "studies.journal"))
    assert all(t.state != "running" for t in view.trials)
    second = run(tmp_path, study=None, resume=True, trials=None, objective=objective, plateau=1000)
    assert second.study == "s" and second.trials == 20
    assert objective.evaluated == 20, "nothing is measured twice"
    assert second.seconds <= first.seconds
    third = run(tmp_path, trials=None, objective=objective, plateau=1000)
    assert third.trials == 20 and objective.evaluated == 20


def test_failures_are_kept_with_their_reasons(tmp_path: Path) -> None:
    class Fragile(AdditiveObjective):
        def __call__(self, point: Point) -> Outcome:
            outcome = super().__call__(point)
            return Outcome(None, "crashed the process with SIGSEGV") if self.evaluated == 4 else outcome

    found = run(tmp_path, "random", trials=10, objective=Fragile(SPACE, costs))
    assert [reason for _, reason in found.failures] == ["crashed the process with SIGSEGV"]
    (failed,) = (t for t in open_study("s", str(tmp_path / "studies.journal")).trials if t.state == "failed")
    assert failed.failure == "crashed the process with SIGSEGV"


def test_a_plateau_ends_the_search(tmp_path: Path) -> None:
    found = run(tmp_path, trials=500, plateau=12)
    assert found.stopped == "plateau" and found.trials < 100


def test_gains_of_the_size_of_noise_do_not_prolong_a_search(tmp_path: Path) -> None:
    class Luckier(AdditiveObjective):
        """Every program is a little faster than those before."""

        def __call__(self, point: Point) -> Outcome:
            return dataclasses.replace(super().__call__(point), seconds=1e-3 * (1 - 1e-6 * self.evaluated))

    found = run(tmp_path, "reward", trials=500, plateau=12, objective=Luckier(SPACE, costs))
    assert found.stopped == "plateau" and found.trials == 13


def test_slow_trials_that_bring_nothing_end_the_default_search_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = run(tmp_path, study="patient", trials=500)
    monkeypatch.setattr("fuser.search.study._PATIENCE_SECONDS", 0.0)
    found = run(tmp_path, trials=500)
    assert found.stopped == patient.stopped == "plateau"
    assert 8 <= found.trials < patient.trials
    assert run(tmp_path, study="asked", trials=40, plateau=1000).trials == 40


def test_a_space_that_is_exhausted_ends_the_search(tmp_path: Path) -> None:
    small = Space.of([LAYER], TARGET, 2)
    only = [RegionSpace(r.region, 1, r.kernels, dict.fromkeys(r.kernels, (0,))) for r in small.regions]
    few = {m: ks for m, ks in only[0].allowed.items() if not m & (m - 1) or m == 0b11}
    space = dataclasses.replace(small, regions=(dataclasses.replace(only[0], allowed=few),))
    assert space.regions[0].remaining == 2
    found = search(
        [LAYER],
        TARGET,
        2,
        strategy="random",
        trials=50,
        storage=str(tmp_path / "s.journal"),
        space=space,
        objective=AdditiveObjective(space, costs),
    )
    assert found.stopped == "exhausted" and found.trials <= 3


def test_progress_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(tmp_path, trials=12, progress=seen.append)
    assert [p.trials for p in seen if p.phase == "trials"] == sorted(p.trials for p in seen if p.phase == "trials")
    assert seen[-1].trials == 12 and seen[-1].of == 12 and seen[-1].best is not None
    bests = [p.best for p in seen if p.best is not None]
    assert all(b <= a for a, b in itertools.pairwise(bests))


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import test_study as t
class Slow(t.AdditiveObjective):
    def __call__(self, point):
        print(point, flush=True)
        time.sleep({pause})
        return super().__call__(point)
print("ready", flush=True)
sys.stdin.readline()
t.search([t.LAYER], t.TARGET, 2, strategy="reward", trials={trials}, study="s", storage={storage!r},
         objective=Slow(t.SPACE, t.costs), space=t.SPACE, seed=int(sys.argv[1]))
"""


def child(storage: str, seed: int, trials: int, pause: float) -> subprocess.Popen[bytes]:
    code = CHILD.format(tests=str(Path(__file__).parent), trials=trials, storage=storage, pause=pause)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, str(seed)], stdin=pipe, stdout=pipe, stderr=pipe)


def begin(process: subprocess.Popen[bytes]) -> None:
    """Let a child that is ready start its search."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def share(storage: str) -> None:
    """Two processes on one study: together the trials that were asked for, and no program twice."""
    processes = [child(storage, seed, 24, 0.1) for seed in (1, 1)]
    measured = []
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in processes:
        begin(process)
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()[-2000:]
        measured += out.decode().split()
    view = open_study("s", storage)
    done = [t for t in view.trials if t.state == "complete"]
    assert 24 <= len(done) <= 25
    assert len({t.owner for t in done}) == 2
    # Both begin with the default scheme, which each compares its own times with.
    default = str(SPACE.default())
    others = [point for point in measured if point != default]
    assert len(others) == len(set(others))
    assert len({t.point for t in done if t.point != default}) == len([t for t in done if t.point != default])


@pytest.mark.parametrize("name", ["studies.journal", "studies.db"])
def test_processes_share_a_study_without_double_work(name: str, tmp_path: Path) -> None:
    share(str(tmp_path / name))


def test_a_killed_search_is_resumed(tmp_path: Path) -> None:
    storage = str(tmp_path / "studies.journal")
    process = child(storage, 3, 30, 0.1)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    begin(process)
    points = [process.stdout.readline().decode().strip() for _ in range(6)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    running = [t for t in open_study("s", storage).trials if t.state == "running"]
    assert [t.point for t in running] == [points[-1]]
    objective = AdditiveObjective(SPACE, costs)
    found = run(tmp_path, "reward", trials=None, objective=objective)
    assert found.trials == 30
    assert objective.evaluated == 25, "five were measured before"
    trials = open_study("s", storage).trials
    died = [t for t in trials if "has died" in t.failure]
    assert [t.number for t in died] == [t.number for t in running]
    assert [t.point for t in trials if t.state == "complete"].count(points[-1]) == 1, "what it was at is tried again"
    assert not found.failures


def test_studies_are_listed_and_opened_by_name(tmp_path: Path) -> None:
    storage = str(tmp_path / "studies.db")
    assert run(tmp_path, trials=2, storage=storage, study="one").study == "one"
    assert run(tmp_path, trials=2, storage=storage, study="two").study == "two"
    named = run(tmp_path, trials=2, storage=storage, study=None, label="bert")
    assert named.study.startswith("bert-")
    assert list_studies(storage) == ["one", "two", named.study]
    folder = tmp_path / "folder"
    folder.mkdir()
    run(tmp_path, trials=2, storage=str(folder), study="a/b")
    assert list_studies(str(folder)) == ["a/b"]
    assert open_study("a/b", str(folder)).trials_wanted == 2


# ---- what users get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "at least one trial"),
        ({"trials": -3}, "at least one trial"),
        ({"timeout": 0.0}, "positive number of seconds"),
        ({"strategy": "best"}, "no strategy 'best'"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": 1 << 32}, "seed must be between"),
        ({"study": "t", "resume": True}, "no stud"),
        ({"study": None, "resume": True, "storage": "STORAGE"}, "no study of this model|there are no studies"),
    ],
)
def test_bad_arguments_are_one_clear_error(options: dict[str, object], message: str, tmp_path: Path) -> None:
    if options.get("storage") == "STORAGE":
        options = {**options, "storage": str(tmp_path / "none.journal")}
    with pytest.raises(SearchError, match=message):
        run(tmp_path, **options)  # type: ignore[arg-type]


def test_a_study_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, trials=2)
    other = bert_layer(sequence=16, hidden=32, heads=2, inner=64)
    space = Space.of([other], TARGET, 2)
    with pytest.raises(SearchError, match="is of another model"):
        search(
            [other],
            TARGET,
            2,
            trials=2,
            study="s",
            storage=str(tmp_path / "studies.journal"),
            space=space,
            objective=AdditiveObjective(space),
        )
    space = Space.of([LAYER], TARGET, 1)
    with pytest.raises(SearchError, match="is of another machine, number of threads"):
        search(
            [LAYER],
            TARGET,
            1,
            trials=2,
            study="s",
            storage=str(tmp_path / "studies.journal"),
            space=space,
            objective=AdditiveObjective(space),
        )


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "studies.db")
    run(tmp_path, trials=2, storage=storage)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{storage}")
    study.set_user_attr("fuser", {**study.user_attrs["fuser"], "version": 99})
    with pytest.raises(SearchError, match="has version 99"):
        run(tmp_path, trials=2, storage=storage)
    optuna.create_study(study_name="foreign", storage=f"sqlite:///{storage}").ask()
    with pytest.raises(SearchError, match="was not made by fuser"):
        run(tmp_path, trials=2, storage=storage, study="foreign")
    with sqlite3.connect(storage) as database:
        database.execute("UPDATE version_info SET schema_version = 1")
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(SearchError, match="another version of Optuna"):
        run(tmp_path, trials=2, storage=storage)


def test_a_storage_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="there are no studies"):
        open_study("s", str(tmp_path / "gone.journal"))
    with pytest.raises(SearchError, match="there are no studies"):
        list_studies(f"sqlite:///{tmp_path}/gone.db")
    run(tmp_path, trials=2)
    with pytest.raises(SearchError, match="no study 'other'"):
        open_study("other", str(tmp_path / "studies.journal"))
    with pytest.raises(SearchError, match=r"127\.0\.0\.1.*failed|driver"):
        run(tmp_path, storage="postgresql://fuser:secret@127.0.0.1:9/none", trials=2)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    for password in ("secret", "top@secret"):
        with pytest.raises(SearchError) as caught:
            run(tmp_path, storage=f"postgresql://fuser:{password}@127.0.0.1:9/none", trials=2)
        assert "secret" not in str(caught.value).partition(" failed ")[0]


def test_a_damaged_journal_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "studies.journal"
    path.write_text("this is\nnot a journal\n")
    with pytest.raises(SearchError, match="damaged or no storage"):
        run(tmp_path, trials=2)


@pytest.mark.parametrize("content", ['{"a": 1}\n', "[1]\n[2]\n", "5\n", '{"a": 1}\n{"a": 2}\n'])
def test_a_file_of_something_else_is_one_clear_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "studies.journal"
    path.write_text(content)
    with pytest.raises(SearchError, match="damaged or no storage"):
        list_studies(str(path))
    with pytest.raises(SearchError, match="damaged or no storage"):
        run(tmp_path, trials=2)
    assert path.read_text() == content


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_journal_whose_last_line_was_cut_short_is_resumed(cut: int, tmp_path: Path) -> None:
    """As a full disk leaves it."""
    path = tmp_path / "studies.journal"
    run(tmp_path, "random", trials=6)
    path.write_bytes(path.read_bytes()[:-cut])
    assert run(tmp_path, "random", trials=8).trials == 8
    assert run(tmp_path, "random", trials=10).trials == 10
    assert sum(t.state == "complete" for t in open_study("s", str(path)).trials) == 10


def test_a_file_of_something_else_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "studies.journal"
    path.write_text("notes of mine without an end of line")
    with pytest.raises(SearchError, match="damaged or no storage"):
        run(tmp_path, trials=2)
    assert path.read_text() == "notes of mine without an end of line"


def test_damaged_studies_do_not_hide_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run(tmp_path, trials=2, storage=str(folder))
    (folder / "damaged.journal").write_text("not\na journal\n")
    (folder / "gone.journal").symlink_to("/nonexistent/gone.journal")
    assert sorted(list_studies(str(folder))) == ["damaged", "s"]
    assert run(tmp_path, trials=3, storage=str(folder), study=None, resume=True).study == "s"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE study_user_attributes SET value_json = 'null' WHERE key = 'fuser'",
        f"UPDATE study_user_attributes SET value_json = '{{\"version\": {VERSION}}}' WHERE key = 'fuser'",
        "UPDATE trial_user_attributes SET value_json = '\"\"' WHERE key = 'point'",
        "UPDATE trial_user_attributes SET value_json = '\"1.0\"' WHERE key = 'point'",
        "UPDATE trial_user_attributes SET value_json = '\"ffffff.9\"' WHERE key = 'point'",
        "UPDATE trial_user_attributes SET value_json = '5'",
    ],
)
def test_a_study_that_says_nonsense_is_one_clear_error(change: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "studies.db")
    run(tmp_path, trials=3, storage=storage)
    with sqlite3.connect(storage) as database:
        database.execute(change)
    database.close()
    list_studies(storage)
    with pytest.raises(SearchError, match=r"damaged|not made by fuser"):
        run(tmp_path, trials=4, storage=storage)


def test_an_interrupted_verification_keeps_what_was_found(tmp_path: Path) -> None:
    class Interrupted(AdditiveObjective):
        def compare(self, points: list[Point]) -> list[float] | None:
            raise KeyboardInterrupt

    found = run(tmp_path, "random", trials=5, objective=Interrupted(SPACE, costs))
    assert (found.stopped, found.trials, found.speedup) == ("interrupted", 5, None)
    assert open_study("s", str(tmp_path / "studies.journal")).result["stopped"] == "interrupted"


def test_a_verification_in_which_everything_fails_says_nothing(tmp_path: Path) -> None:
    class Failing(AdditiveObjective):
        def compare(self, points: list[Point]) -> list[float] | None:
            return [math.inf] * len(points)

    found = run(tmp_path, "random", trials=5, objective=Failing(SPACE, costs))
    assert found.speedup is None and math.isfinite(found.seconds)


def test_a_default_scheme_that_fails_is_said_to(tmp_path: Path) -> None:
    class Failing(AdditiveObjective):
        def __call__(self, point: Point) -> Outcome:
            return Outcome(None, "no") if point == SPACE.default() else super().__call__(point)

    found = run(tmp_path, "random", trials=5, objective=Failing(SPACE, costs))
    assert "the default scheme failed" in found.summary() and "inf" not in found.summary()


def test_a_locked_storage_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = str(tmp_path / "studies.db")
    run(tmp_path, trials=2, storage=storage)
    from fuser.search import storage as module

    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)
    with sqlite3.connect(storage) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SearchError, match="locked"):
            run(tmp_path, trials=5, storage=storage)


def test_a_full_disk_ends_the_search_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.storages.journal import JournalFileBackend

    append = JournalFileBackend.append_logs
    writes = itertools.count()

    def full(self, logs):  # type: ignore[no-untyped-def]
        if next(writes) > 20:
            raise OSError(28, "No space left on device")
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(SearchError, match=r"No space left on device.*resumed"):
            run(tmp_path, "random", trials=50)
    assert run(tmp_path, "random", trials=12).trials == 12


def test_a_timeout_ends_the_search(tmp_path: Path) -> None:
    class Slow(AdditiveObjective):
        def __call__(self, point: Point) -> Outcome:
            time.sleep(0.1)
            return super().__call__(point)

    found = run(tmp_path, "random", trials=1000, timeout=1.0, objective=Slow(SPACE, costs))
    assert found.stopped == "timeout" and 1 <= found.trials <= 10


def test_rank_correlation() -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="compares with SciPy")
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 8, 12), generator.normal(size=12)
        assert spearman(list(a), list(b)) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
