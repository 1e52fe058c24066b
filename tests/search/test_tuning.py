"""Tuning: measured choices are remembered, respected and right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fuser
from fuser.codegen.choice import Choice, GroupChoice
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import SearchError
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import cuda_target
from fuser.kernels.base import floating
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.gemm import LibraryParameters
from fuser.module.compiler import choose_all
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.device import cpu_target
from fuser.search import tuning
from fuser.search.partition import alternatives, default_scheme
from fuser.search.results import SearchResult
from fuser.search.standalone import subgraph
from fuser.search.study import search
from fuser.search.tuning import RECORD, Tuner, tuner_for

TARGET = cpu_target()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 24)).eval()


def graph_of(model: nn.Module, rows: int = 9) -> OperatorGraph:
    return raise_graph(capture(model, flatten_call((torch.randn(rows, 40),), {})))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """The session's kernels with records of this test's own."""
    records = KernelCache(tmp_path / "records")
    shared = default_cache()
    monkeypatch.setattr(shared, "read_record", records.read_record)
    monkeypatch.setattr(shared, "write_record", records.write_record)
    monkeypatch.setattr(shared, "records", records.records)
    return shared


def chosen(graph: OperatorGraph, tuner: Tuner) -> list[Choice]:
    regions = list({r.hash: r for r in graph.regions}.values())
    return tuner.refine([(default_scheme(r, IMPLEMENTATIONS, TARGET), r) for r in regions])


def pretend(monkeypatch: pytest.MonkeyPatch, library_seconds: float) -> list[int]:
    """Replace measurement: whatever uses the library takes ``library_seconds``, anything else one second."""
    calls: list[int] = []

    def measure(candidates, target, threads, cache):  # type: ignore[no-untyped-def]
        calls.append(len(candidates))
        return [
            tuning_measurement(
                library_seconds if any(isinstance(c.parameters, LibraryParameters) for c in candidate) else 1.0
            )
            for candidate in candidates
        ]

    monkeypatch.setattr(tuning, "measure", measure)
    return calls


def tuning_measurement(seconds: float):  # type: ignore[no-untyped-def]
    from fuser.search.measure import Measurement

    return Measurement(seconds, 0.0, 5)


def test_measurements_are_made_once_and_remembered(cache: KernelCache) -> None:
    graph = graph_of(mlp())
    first, second = Tuner(TARGET, 2, cache=cache), Tuner(TARGET, 2, cache=cache)
    before = chosen(graph, first)
    after = chosen(graph, second)
    assert first.measured >= 4
    assert second.measured == 0
    assert [str(c.scheme) for c in before] == [str(c.scheme) for c in after]
    assert [g.parameters for c in before for g in c.groups] == [g.parameters for c in after for g in c.groups]


def test_other_threads_or_shapes_are_measured_anew(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, 2.0)
    chosen(graph_of(mlp()), Tuner(TARGET, 2, cache=cache))
    once = len(calls)
    chosen(graph_of(mlp()), Tuner(TARGET, 2, cache=cache))
    assert len(calls) == once
    chosen(graph_of(mlp()), Tuner(TARGET, 1, cache=cache))
    assert len(calls) == 2 * once
    chosen(graph_of(mlp(), rows=7), Tuner(TARGET, 2, cache=cache))
    assert len(calls) == 2 * once, "a neighbouring length reuses what was measured"
    chosen(graph_of(mlp(), rows=40), Tuner(TARGET, 2, cache=cache))
    assert len(calls) == 3 * once


def test_only_times_of_one_run_are_compared(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be twice as fast later; what is compared with something else then is remembered apart."""
    choice = default_scheme(graph_of(mlp()).regions[0], IMPLEMENTATIONS, TARGET)
    a, b, c = _three(choice)
    speed = iter([1.0, 0.5])

    def measure(candidates, target, threads, cache):  # type: ignore[no-untyped-def]
        now = next(speed)
        return [tuning_measurement(now * (1 + i / 10)) for i in range(len(candidates))]

    monkeypatch.setattr(tuning, "measure", measure)
    tuner = Tuner(TARGET, 2, cache=cache)
    assert tuner.compare([a, b]) == [1.0, 1.1]
    assert tuner.compare([a, c]) == [0.5, 0.55]
    assert tuner.compare([a, b]) == [1.0, 1.1]


def _three(choice: Choice) -> list[list[GroupChoice]]:
    """One group with three kernels."""
    group = next(g for g in choice.groups if g.kernel is not None)
    others = alternatives(group.kernel, IMPLEMENTATIONS, TARGET)  # type: ignore[arg-type]
    return [[tuning.predicted(group.group, kernel, TARGET)] for kernel in others[:3]]


def test_the_library_is_taken_only_where_it_is_faster(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(mlp())
    pretend(monkeypatch, 0.99)
    close = chosen(graph, Tuner(TARGET, 2, cache=cache))
    assert not any(isinstance(g.parameters, LibraryParameters) for c in close for g in c.groups)
    monkeypatch.setattr(cache, "read_record", lambda kind, key: None)
    pretend(monkeypatch, 0.5)
    won = chosen(graph, Tuner(TARGET, 2, cache=cache))
    assert sum(isinstance(g.parameters, LibraryParameters) for c in won for g in c.groups) == 2
    names = [op.name for c in won for g in c.groups for op in g.group.operators]
    assert sorted(names) == sorted(op.name for r in graph.regions for op in r.operators)


def on_gpu(cache: KernelCache) -> list[GroupChoice]:
    """What a tuner for a GPU chooses for the groups of a model."""
    target = cuda_target("sm_80")
    model = nn.Sequential(nn.Linear(40, 72), nn.GELU()).eval().half()
    graph = raise_graph(capture(model, flatten_call((torch.randn(9, 40).half(),), {})), None, floating(target))
    regions = {region.hash: region for region in graph.regions}.values()
    tuner = Tuner(target, 1, cache=cache)
    refined = tuner.refine([(default_scheme(region, IMPLEMENTATIONS, target), region) for region in regions])
    return [group for choice in refined for group in choice.groups]


def test_on_a_gpu_a_product_is_compared_with_cublas(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "prepare", lambda *arguments: None)
    pretend(monkeypatch, 0.5)
    library = [group for group in on_gpu(cache) if isinstance(group.parameters, LibraryParameters)]
    assert library
    for group in library:
        assert group.kernel is not None and group.measured
        # A record that names it is found again.
        assert group.kernel in alternatives(group.kernel, IMPLEMENTATIONS, cuda_target("sm_80"))


def test_without_memory_to_measure_in_the_model_decides(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "prepare", lambda *arguments: None)
    monkeypatch.setattr(tuning, "measure", full)
    groups = on_gpu(cache)
    assert groups and not any(group.measured for group in groups)
    assert "CUDA out of memory" in caplog.text


def test_programs_with_the_library_are_right(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0.5)
    model, x = mlp(), torch.randn(9, 40)
    fast = fuser.optimize(model, (x,))
    assert "onednn_linear" in {k.name for k in fast.kernels}
    assert fast.unfused == ()
    with torch.no_grad():
        eager = model(x)
        exact = mlp().double()(x.double())
        ours = fast(x)
        assert float((ours - exact).norm() / exact.norm()) <= 2 * float((eager - exact).norm() / exact.norm()) + 1e-7
        model[0].weight.mul_(2)
        changed = model(x)
        assert float((fast(x) - changed).norm() / changed.norm()) < 1e-6


def test_a_damaged_record_is_measured_again(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(mlp())
    calls = pretend(monkeypatch, 2.0)
    tuner = Tuner(TARGET, 2, cache=cache)
    chosen(graph, tuner)
    once = len(calls)
    root = Path(cache.read_record.__self__.root)  # type: ignore[attr-defined]
    records = [p for p in root.rglob("*") if p.is_file() and RECORD in str(p)]
    assert records
    for path in records:
        path.write_text("{")
    chosen(graph, Tuner(TARGET, 2, cache=cache))
    assert len(calls) == 2 * once


def test_trials_search_once_and_later_compilations_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[SearchResult] = []

    def count(*arguments, **options):  # type: ignore[no-untyped-def]
        searches.append(search(*arguments, **options))
        return searches[-1]

    monkeypatch.setattr(tuning, "search", count)
    cache = KernelCache(tmp_path / "cache")
    graph = graph_of(mlp())
    tuned = chosen(graph, Tuner(TARGET, 2, trials=6, cache=cache))
    (found,) = searches
    assert 1 <= found.trials <= 6
    assert [str(c.scheme) for c in tuned] == [str(c.scheme) for c in found.choices.values()]
    assert chosen(graph, Tuner(TARGET, 2, trials=6, cache=cache)) == tuned
    cached = Tuner(TARGET, 2, cache=cache)
    assert chosen(graph, cached) == tuned
    assert cached.measured == 0
    assert len(searches) == 1


def test_a_search_that_fails_leaves_the_measured_choice(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments, **options):  # type: ignore[no-untyped-def]
        raise SearchError("the storage is gone")

    monkeypatch.setattr(tuning, "search", fail)
    pretend(monkeypatch, 2.0)
    graph = graph_of(mlp())
    found = chosen(graph, Tuner(TARGET, 2, trials=5, cache=cache))
    assert "the storage is gone" in caplog.text
    assert found == chosen(graph, Tuner(TARGET, 2, cache=cache))


def test_subgraph_is_the_work_of_its_groups() -> None:
    graph = graph_of(mlp())
    choices, _ = choose_all(graph, TARGET)
    part = subgraph(choices)
    assert part.inputs == graph.inputs
    assert part.outputs == graph.outputs
    assert {op.name for op in part.compute} == {op.name for op in graph.compute}


def test_what_search_may_be() -> None:
    assert tuner_for("model", TARGET, 2) is None
    cached, more = tuner_for("cached", TARGET, 2), tuner_for(7, TARGET, 2)
    assert cached is not None and cached.trials == 0
    assert more is not None and more.trials == 7
    for wrong in ("best", -1, 0, True, 1.5):
        with pytest.raises(ValueError, match="search must be"):
            tuner_for(wrong, TARGET, 2)  # type: ignore[arg-type]
