"""The benchmark of searches: its exhaustive search is one, and it counts what a search measured."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts import load_script

from fuser.ir.target import Target
from fuser.schemes import bert_layer
from fuser.search.ledger import open_study
from fuser.search.objective import AdditiveObjective
from fuser.search.space import Space
from fuser.search.study import search

TARGET = Target("cpu", "avx2", frozenset(), 2, (32768, 2**20, 2**25), 5e10, 1e10, 1e-6)
SPACE = Space.of([bert_layer(1, 16, 32, 2, 64)], TARGET, 2)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("search")


def costs(region: int, members: int, kernel: int) -> float:
    return SPACE.predicted(region, members, kernel) * (1 + np.random.default_rng([members, kernel]).random() / 3)


def test_the_exhaustive_search_is_one(benchmark: ModuleType) -> None:
    small = SPACE.prune(1.0000001, costs)
    (region,) = small.regions
    assert 1 <= region.remaining < 10_000
    objective = AdditiveObjective(small, costs)
    best, kernels = benchmark.exhaustive(small, objective)
    totals = [math.fsum(costs(0, m, k) for m, k in program) for program in region.enumerate()]
    assert small.additive(best, costs) == min(totals)
    assert kernels == SPACE.kernels


def test_evaluations_are_counted_until_the_best_is_near(benchmark: ModuleType, tmp_path: Path) -> None:
    storage = str(tmp_path / "s.journal")
    found = search(
        [SPACE.regions[0].region],
        TARGET,
        2,
        trials=8,
        study="s",
        storage=storage,
        objective=AdditiveObjective(SPACE, costs),
        space=SPACE,
    )
    view = open_study("s", storage)
    near = [t.strategy for t in view.trials if t.seconds is not None and t.seconds <= 1.02 * found.seconds]
    count = benchmark.evaluations_until_close(view)
    assert count == 1 if near[0] == "start" else count == found.kernels_measured + 2
