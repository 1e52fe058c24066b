"""The experiment counts and pays what a strategy asked, and nothing of what others did."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from fuser.ir.target import Target
from fuser.schemes import bert_layer
from fuser.search.objective import AdditiveObjective
from fuser.search.space import Space

TARGET = Target("cpu", "avx2", frozenset(), 2, (32768, 2**20, 2**25), 5e10, 1e10, 1e-6)


@pytest.fixture(scope="module")
def run() -> ModuleType:
    return load_script("atoffer/run")


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of([bert_layer(1, 16, 32, 2, 64)], TARGET, 2)


def test_a_round_pays_once_and_counts_every_evaluation(run: ModuleType) -> None:
    log = [
        run.Evaluation("p", 0.004, (("0: a", 1.0), ("1: b", 2.0)), True),
        run.Evaluation("k", None, (("kernel", 0.5),), False),
        run.Evaluation("q", 0.003, (("0: a", 1.0), ("1: c", 4.0)), True),
        run.Evaluation("p", 0.004, (("0: a", 1.0), ("1: b", 2.0)), True),
    ]
    found = run.summarized(log, 0.25)
    assert found.curve == ((3.0, 4.0), (3.5, 4.0), (7.5, 3.0), (7.5, 3.0))
    assert found.best == "q"
    assert (found.programs, found.kernels, found.measuring, found.searcher) == (2, 1, 7.5, 0.25)
    assert run.at(found, 2) == (3.5, 4.0) and run.at(found, 99) == (7.5, 3.0)
    kept = run.record([found, found])
    assert kept["best_ms_after"] == {"1": 4.0, "4": 3.0}
    assert kept["searcher_share"] == pytest.approx(0.25 / 7.75, abs=1e-5)


def test_reaching_is_a_median_of_those_that_do(run: ModuleType) -> None:
    def made(*best: float) -> Any:
        return run.Round(tuple((0.0, b) for b in best), 1, 0, 0.0, 0.0)

    assert run.reaching([made(3, 2), made(3, 3), made(2, 2)], 2.0) == 1
    assert run.reaching([made(3, 2), made(3, 3), made(3, 3)], 2.0) is None


def test_a_table_pays_for_regions_by_themselves(run: ModuleType, space: Space) -> None:
    table = run.Table(space, lambda: AdditiveObjective(space))
    table.start()
    assert table(table.default).seconds == pytest.approx(space.additive(table.default, space.predicted))
    point = run.program(space, run.loops.START)
    assert table.milliseconds(run.loops.START) == pytest.approx(1e3 * space.additive(point, space.predicted))
    assert [found.is_program for found in table.log] == [True, True]
    members, kernel = point.regions[0][0]
    assert table.kernel(0, members, kernel).seconds == space.predicted(0, members, kernel)
    assert not table.log[-1].is_program
    first = dict(table.log[1].parts)
    table.start()
    assert table.log == []
    table(point)
    # Another strategy pays what the first one did.
    assert dict(table.log[0].parts) == first


@pytest.mark.parametrize("strategy", ["fuser", "fuser-reward", "atoffer", "random", "annealing"])
def test_every_strategy_has_the_same_number_of_evaluations(run: ModuleType, space: Space, strategy: str) -> None:
    table = run.Table(space, lambda: AdditiveObjective(space))
    found = run.run_round(strategy, table, TARGET, 2, 0, 24)
    assert len(found.curve) == 24
    bests = [best for _, best in found.curve]
    assert bests == sorted(bests, reverse=True)
    # The default scheme is a shortest path under this very objective.
    assert bests[-1] >= 1e3 * space.additive(table.default, space.predicted) * (1 - 1e-12)


def test_new_results_replace_old_ones_of_their_setting(run: ModuleType) -> None:
    def made(mask: str, length: int, value: int) -> dict[str, Any]:
        return {"mask": mask, "batch": 1, "length": length, "value": value}

    old = {"results": [made("strided", 64, 1), made("fixed", 64, 1)]}
    found = run.merged(old, [made("strided", 64, 2), made("fixed", 512, 2)])
    assert [(r["mask"], r["length"], r["value"]) for r in found] == [
        ("fixed", 64, 1),
        ("fixed", 512, 2),
        ("strided", 64, 2),
    ]
    assert run.merged(None, [made("fixed", 64, 1)]) == [made("fixed", 64, 1)]


def test_a_setting_on_the_cost_model(run: ModuleType) -> None:
    options = argparse.Namespace(
        batch=1, evaluations=16, rounds=2, strategies=["fuser", "atoffer"], objective="predicted"
    )
    found, rounds = run.setting("strided", 16, options, TARGET)
    assert int(found["programs"]) > int(found["schemes"]) > 1000
    assert found["best_ms_of_all"] == min(min(s["best_ms"]) for s in found["strategies"].values())
    # Under the additive model nothing beats the shortest path, which comes first.
    assert found["strategies"]["fuser"]["evaluations_to_within_2_percent"] == 1
    assert set(rounds) == {"fuser", "atoffer"}
