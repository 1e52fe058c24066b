"""Measured time: kernels that crash, hang or are wrong end their trial and nothing else; times are remembered."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fuser.codegen.render import TEMPLATES
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import BuildError, CacheError, SearchError
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.device import cpu_target
from fuser.search.ledger import open_study
from fuser.search.measured import KERNEL_RECORD, PROGRAM_RECORD, MeasuredObjective
from fuser.search.objective import KernelTime
from fuser.search.space import Point, Space
from fuser.search.standalone import subgraph
from fuser.search.study import search
from fuser.search.worker import TOLERANCES, Timing, Unit, relative_error

TARGET = dataclasses.replace(cpu_target(), peak_flops=1e11, bandwidth=1e10, launch_seconds=1e-6)
SPOILT = {
    "crash": "__builtin_trap();",
    "hang": "for (;;) { volatile int x = 0; (void)x; }",
    "wrong": "return 0;",
    "status": "return 7;",
}


def graph_of(rows: int = 9, dtype: torch.dtype = torch.float32) -> OperatorGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 24)).eval().to(dtype)
    return raise_graph(capture(model, flatten_call((torch.randn(rows, 40, dtype=dtype),), {})))


def built(sources: Sequence[Source]) -> Mapping[str, Path]:
    """Kernels from the session's cache, so that no test compiles what another has."""
    return build(list(sources), TARGET, headers=TEMPLATES / "cpu", cache=default_cache())


@pytest.fixture
def space() -> Space:
    return Space.of(graph_of(), TARGET, 2)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


class Spoiler:
    """Builds the kernels of ``point``'s first group as ``body`` and all others as they are."""

    def __init__(self, space: Space, point: Point, body: str, folder: Path) -> None:
        at, (members, kernel) = 0, point.regions[0][0]
        choice = space.regions[at].kernels[members][kernel]
        self.symbol = choice.call(TARGET, 2).spec.symbol  # type: ignore[union-attr]
        self.library = folder / "spoilt.so"
        text = f'extern "C" int {self.symbol}(const void*, void*) {{ {body} }}'
        compiler = shutil.which("g++") or shutil.which("c++")
        command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-O0", "-o", str(self.library)]
        subprocess.run(command, input=text.encode(), check=True)

    def __call__(self, sources: Sequence[Source]) -> Mapping[str, Path]:
        return {s: self.library if s == self.symbol else path for s, path in built(sources).items()}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("crash", "SIGILL|SIGTRAP|SIGSEGV"), ("hang", "hung"), ("wrong", "wrong numbers"), ("status", "7")],
)
def test_a_bad_kernel_ends_its_trial_alone(
    fault: str, reason: str, space: Space, cache: KernelCache, tmp_path: Path
) -> None:
    default = space.default()
    spoiler = Spoiler(space, default, SPOILT[fault], tmp_path)
    objective = MeasuredObjective(space, cache, builder=spoiler, answer_seconds=3.0)
    try:
        outcome = objective(default)
        assert outcome.seconds is None
        assert re.search(reason, outcome.failure), outcome.failure
        # Not asked again.
        starts = objective.worker.starts
        assert objective(default).failure == outcome.failure
        assert objective.worker.starts == starts
        members, kernel = default.regions[0][0]
        assert objective.kernel(0, members, kernel).seconds is None
        assert objective.costs(0, members, kernel) == float("inf")
        assert (members, kernel) not in space.shortest(objective.costs).regions[0]
    finally:
        objective.close()


def test_a_search_survives_a_kernel_that_crashes(space: Space, cache: KernelCache, tmp_path: Path) -> None:
    spoiler = Spoiler(space, space.default(), SPOILT["crash"], tmp_path)
    objective = MeasuredObjective(space, cache, builder=spoiler)
    storage = str(tmp_path / "studies.journal")
    found = search([], TARGET, 2, trials=5, storage=storage, study="s", space=space, objective=objective, cache=cache)
    assert found.failures and all("crashed the process" in reason for _, reason in found.failures)
    members, kernel = space.default().regions[0][0]
    assert (members, kernel) not in found.best.regions[0]
    view = open_study("s", storage)
    failed = [t for t in view.trials if t.state == "failed"]
    assert failed and "crashed the process" in failed[0].failure
    assert any(k["failure"] for k in view.kernels)


def test_nothing_is_measured_twice(space: Space, cache: KernelCache) -> None:
    first = MeasuredObjective(space, cache, builder=built)
    default = space.default()
    members, kernel = default.regions[0][0]
    try:
        outcome, alone = first(default), first.kernel(0, members, kernel)
        assert not outcome.is_remembered and outcome.regions[0].runs >= 3
        assert first(default).is_remembered
    finally:
        first.close()
    second = MeasuredObjective(space, cache, builder=built)
    try:
        again = second(default)
        assert again.is_remembered and again.seconds == outcome.seconds
        assert second.kernel(0, members, kernel).seconds == alone.seconds
        assert second.worker.starts == 0
    finally:
        second.close()
    for kind in (PROGRAM_RECORD, KERNEL_RECORD):
        (record,) = cache.records(kind)
        assert record["target"] == TARGET.key and record["threads"] == 2 and record["torch"] == torch.__version__


def test_luck_does_not_add_up(space: Space, cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = MeasuredObjective(space, cache, builder=lambda sources: {})

    def lucky(units: Sequence[Unit], budget: float, **options: object) -> list[Timing]:
        return [Timing(1e-3, runs=5), Timing(0.99e-3, runs=5, ratio=0.99)][-len(units) :]

    monkeypatch.setattr(objective.worker, "time", lucky)
    generator = np.random.default_rng(0)
    points = list(dict.fromkeys(space.random(generator) for _ in range(40)))
    times = [objective(point).seconds or 0.0 for point in points]
    assert len(points) > 10
    first = sum(region.count * objective._first[at][1] for at, region in enumerate(space.regions))
    assert min(times) == pytest.approx(0.99 * first, rel=1e-9)
    objective.close()


def test_kernels_that_were_not_measured_are_predicted_from_their_family(
    space: Space, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = MeasuredObjective(space, cache, builder=built)
    keys = [
        (at, members, kernel)
        for at, region in enumerate(space.regions)
        for members, kernels in region.kernels.items()
        for kernel, choice in enumerate(kernels)
        if choice.family == "gemm"
    ]
    times = {key: space.predicted(*key) * factor for key, factor in zip(keys, (1.5, 1.1, 3.0, 1.2, 1.4), strict=False)}
    monkeypatch.setattr(objective, "_kernel", lambda *key: KernelTime(*key, times[key]))
    assert objective.costs(*keys[0]) == space.predicted(*keys[0])
    for key in times:
        objective.kernel(*key)
        assert objective.costs(*key) == times[key]
    rest = keys[len(times) :]
    assert rest and all(objective.costs(*key) == pytest.approx(1.2 * space.predicted(*key)) for key in rest)
    objective.close()


def test_other_threads_are_measured_anew(space: Space, cache: KernelCache) -> None:
    one = Space.of(graph_of(), TARGET, 1)
    keys = {
        MeasuredObjective(s, cache, builder=built)._record_key(0, p.regions[0])
        for s in (space, one)
        for p in (s.default(),)
    }
    assert len(keys) == 2


def test_a_kernel_that_does_not_build_is_a_failed_trial(space: Space, cache: KernelCache) -> None:
    def refuse(sources: Sequence[Source]) -> Mapping[str, Path]:
        raise BuildError("gemm.cpp:1: no such instruction")

    objective = MeasuredObjective(space, cache, builder=refuse)
    outcome = objective(space.default())
    objective.close()
    assert outcome.seconds is None and "no such instruction" in outcome.failure


def test_nothing_that_builds_is_one_clear_error(space: Space, cache: KernelCache, tmp_path: Path) -> None:
    def full(sources: Sequence[Source]) -> Mapping[str, Path]:
        raise CacheError("the disk is full; free some space")

    objective = MeasuredObjective(space, cache, builder=full)
    with pytest.raises(SearchError, match="disk is full"):
        search([], TARGET, 2, trials=3, storage=str(tmp_path / "s.journal"), space=space, objective=objective)


def test_a_disk_that_is_full_for_records_does_not_end_a_search(
    space: Space, cache: KernelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(kind: str, key: str, value: object) -> None:
        raise CacheError("no space left on device")

    monkeypatch.setattr(cache, "write_record", full)
    objective = MeasuredObjective(space, cache, builder=built)
    try:
        assert objective(space.default()).seconds is not None
    finally:
        objective.close()
    assert "could not be remembered" in caplog.text


def test_a_timeout_shorter_than_a_build_is_one_clear_error(space: Space, cache: KernelCache, tmp_path: Path) -> None:
    def slow(sources: Sequence[Source]) -> Mapping[str, Path]:
        time.sleep(1.5)
        return built(sources)

    objective = MeasuredObjective(space, cache, builder=slow)
    storage = str(tmp_path / "s.journal")
    with pytest.raises(SearchError, match=r"timeout of 0\.2 s ended before"):
        search([], TARGET, 2, timeout=0.2, storage=storage, study="s", space=space, objective=objective)
    assert all(t.state != "running" for t in open_study("s", storage).trials)


def test_the_reference_is_pytorch_in_double_precision() -> None:
    graph = graph_of()
    region = Space.of(graph, TARGET, 2).regions[0]
    alone = subgraph(region.choice(Space.of(graph, TARGET, 2).default().regions[0]).groups)
    torch.manual_seed(1)
    values = {v: torch.randn(alone.values[v].shape, dtype=torch.float64) for v in (*alone.inputs, *alone.constants)}
    (result,) = evaluate(alone, values, torch.float64).values()
    w0, b0, w1, b1 = (values[v] for v in _linear_constants(alone))
    (x,) = (values[v] for v in alone.inputs)
    expected = torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(x, w0, b0)), w1, b1)
    assert relative_error(result, expected) < 1e-12


def _linear_constants(graph: OperatorGraph) -> list[str]:
    """Weight and bias of both layers, known by their shapes."""
    shapes = {graph.values[v].shape: v for v in graph.constants}
    return [shapes[shape] for shape in ((72, 40), (72,), (24, 72), (24,))]


def test_errors_are_relative_and_find_what_is_not_finite() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), want) == float("inf")
    infinite = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, float("-inf")]), infinite) == 0.0
    assert TOLERANCES[torch.float32] < 1e-4


def test_closing_ends_compilers(space: Space, cache: KernelCache) -> None:
    objective = MeasuredObjective(space, cache)
    text = "#include <regex>\n" + "\n".join(f'static std::regex r{i}(".*");' for i in range(400))
    slow = Source("fuser_slow", text + '\nextern "C" int fuser_slow(const void*, void*) { return 0; }')
    future = objective._pool.submit(objective._build_quietly, (slow,))
    time.sleep(0.5)
    objective.close()
    with pytest.raises(BuildError, match="stopped"):
        future.result()
