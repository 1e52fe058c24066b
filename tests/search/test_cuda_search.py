"""Searching for CUDA targets: on the emulator from the search to the compiled program, and the clock on a GPU that is
made of Python."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import with_own_records
from torch import nn

from fuser.codegen.choice import GroupChoice
from fuser.codegen.render import header_folder
from fuser.frontend.calls import flatten_call
from fuser.ir.errors import DeviceMemoryError, FuserError, SearchError
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import Target, cuda_target, emulated_target
from fuser.kernels import gemm_cutlass
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import CublasParameters, CudaGemm, CudaGemmParameters, Tile
from fuser.kernels.gemm_cutlass import CutlassParameters
from fuser.module.compiler import Compiled, compile_call
from fuser.module.options import Options
from fuser.module.weights import WeightStore
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.device import cpu_target
from fuser.search import measure, records
from fuser.search.measured import MeasuredObjective
from fuser.search.partition import alternatives
from fuser.search.results import SearchResult
from fuser.search.space import Point, Space
from fuser.search.tuning import tuner_for
from fuser.searching import graph_of, search_model, team_of

EMULATED = emulated_target()
SLOW = Tile(16, 64, 32, 1, 4, 2, 1)
"""A legal tile that the space of so small a product does not have."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 24)).eval().half()


def given() -> torch.Tensor:
    return torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).half()


def graph(target: Target) -> OperatorGraph:
    return graph_of(model(), (given(),), options=Options(target=target))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    return with_own_records(tmp_path, monkeypatch)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the emulator in the place of those that take a minute to build."""

    def space(self: CudaGemm, match: GemmMatch, target: Target) -> Sequence[CudaGemmParameters]:
        return [dataclasses.replace(self.space(match, target)[0], tile=SLOW)]

    monkeypatch.setattr(CudaGemm, "offline_space", space)


def built(sources: Sequence[Source]) -> Mapping[str, Path]:
    return build(list(sources), EMULATED, headers=header_folder(EMULATED), cache=default_cache())


def searched(space: Space, folder: Path, **options: Any) -> SearchResult:
    return search_model(
        model(),
        (given(),),
        target="cuda:emulated",
        space=space,
        objective=MeasuredObjective(space, builder=built),
        storage=str(folder / "s.journal"),
        **options,
    )


def compiled(search: str | int = "cached") -> Compiled:
    """As ``optimize`` compiles for the emulator."""
    tuner = tuner_for(search, EMULATED, 1)
    source = model()
    with torch.no_grad():
        call = flatten_call((given(),), {})
        return compile_call(source, call, WeightStore(source), EMULATED, 1, tuner=tuner)


def is_right(program: Compiled) -> bool:
    with torch.no_grad():
        exact = model().double()(given().double())
    (found,) = program.program([given()])
    return float((found.double() - exact).norm() / exact.norm()) < 1e-3


def parameters(choices: Sequence[GroupChoice]) -> list[Any]:
    return [choice.parameters for choice in choices]


def test_what_a_search_finds_is_what_is_compiled(cache: KernelCache, tmp_path: Path) -> None:
    space = Space.of(graph(EMULATED), EMULATED, team_of(EMULATED))
    found = searched(space, tmp_path, trials=3, strategy="random", seed=2)
    assert found.measured == 3 and not found.failures
    (record,) = cache.records(records.RECORD)
    assert record["target"] == EMULATED.key and record["threads"] == 1
    # Another than the default, whatever the emulator's times are.
    (region,) = space.regions
    sets = region.repair([False] * len(region.region.edges))
    apart = region.choice(tuple((members, len(region.kernels[members]) - 1) for members in sets))
    records.write(cache, region.region, apart, EMULATED, 1, {})
    program = compiled()
    (choice,) = program.choices.values()
    assert [parameters(choice.groups)] == [parameters(apart.groups)]
    assert CublasParameters(bias=False) in parameters(choice.groups)
    assert is_right(program)
    (plain,) = compiled("model").choices.values()
    assert len(plain.groups) < len(choice.groups)


def test_the_emulator_is_not_timed_against_libraries(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.search.tuning.measure", None)
    (cached,), (predicted,) = (compiled(search).choices.values() for search in ("cached", "model"))
    assert parameters(cached.groups) == parameters(predicted.groups)


def test_kernels_to_build_offline_are_proposed_when_asked_for(offline: None) -> None:
    plain = Space.of(graph(EMULATED), EMULATED, 4)
    more = Space.of(graph(EMULATED), EMULATED, 4, offline=True)
    (before,), (after,) = plain.regions, more.regions
    assert not any(choice.offline for choices in before.kernels.values() for choice in choices)
    slow = [choice for choices in after.kernels.values() for choice in choices if choice.offline]
    assert slow and {choice.parameters.tile for choice in slow} == {SLOW}
    assert more.programs > plain.programs and more.hash != plain.hash


def test_a_kernel_that_was_built_offline_is_remembered(
    cache: KernelCache, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space.of(graph(EMULATED), EMULATED, 1, offline=True)
    (region,) = space.regions
    sets = region.repair([False] * len(region.region.edges))
    kernels = {members: next((k for k, c in enumerate(region.kernels[members]) if c.offline), 0) for members in sets}
    point = Point((tuple(kernels.items()),))
    objective = MeasuredObjective(space, builder=built)
    try:
        assert objective(point).failure == ""
    finally:
        objective.close()
    won = region.choice(point.regions[0])
    records.write(cache, region.region, won, EMULATED, 1, {})
    program = compiled()
    (choice,) = program.choices.values()
    assert parameters(choice.groups) == parameters(won.groups)
    assert [group.offline for group in choice.groups].count(True) == 2
    assert is_right(program)
    # Where such kernels cannot be built, the cost model chooses among the others.
    monkeypatch.setattr(CudaGemm, "offline_space", lambda *arguments: [])
    (choice,) = compiled().choices.values()
    assert len(choice.groups) == len(won.groups)
    for group in choice.groups:
        assert group.kernel is not None and not group.offline
        assert group.kernel in alternatives(group.kernel, IMPLEMENTATIONS, EMULATED)


def test_cutlass_is_offered_on_hopper_where_its_headers_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hopper = cuda_target("sm_90a")
    monkeypatch.setattr(gemm_cutlass, "version", lambda: (4, 2, 0))
    monkeypatch.setattr(gemm_cutlass, "include_folder", lambda: tmp_path)
    space = Space.of(graph(hopper), hopper, hopper.cores, offline=True)
    kernels = [choice for region in space.regions for choices in region.kernels.values() for choice in choices]
    assert {isinstance(choice.parameters, CutlassParameters) for choice in kernels if choice.offline} == {True}
    assert not any(isinstance(c.parameters, CutlassParameters) for c in kernels if not c.offline)
    monkeypatch.setattr(gemm_cutlass, "include_folder", lambda: None)
    with pytest.raises(SearchError, match=r"pip install 'sparse-fuser\[cuda\]'"):
        Space.of(graph(hopper), hopper, hopper.cores, offline=True)
    for target in (cuda_target("sm_80"), EMULATED):
        with pytest.raises(SearchError, match="sm_90a"):
            Space.of(graph(target), target, 2, offline=True)


def test_searches_are_for_the_target_that_the_inputs_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("fuser.searching.search", lambda *arguments, **options: asked.append(arguments))
    search_model(model().float(), (given().float(),), threads=2)
    search_model(model(), (given(),), target="cuda:emulated", threads=2)
    assert [(target.kind, threads) for _, target, threads in asked] == [("cpu", 2), ("cuda", 1)]
    with pytest.raises(FuserError, match="inputs are on cpu, this target's tensors on cuda"):
        search_model(model(), (given(),), target=cuda_target("sm_80"))


def test_weights_take_turns_until_they_have_left_the_cache() -> None:
    small = graph(EMULATED)
    weights, passing = 2 * (40 * 72 + 72 + 72 * 24 + 24), 2 * 9 * (40 + 24)
    for copies in (2, 38, 64):
        hopper = cuda_target("sm_90a", l2_bytes=2 * (copies * weights + passing) // 3)
        assert measure.copies_of(small, hopper) == copies
    assert measure.copies_of(small, cuda_target("sm_90a", l2_bytes=passing // 2)) == 1
    assert measure.copies_of(small, cuda_target("sm_90a")) == 64
    assert measure.copies_of(small, dataclasses.replace(cpu_target(), cache_bytes=(1 << 15, 1 << 20, 1 << 25))) == 6
    assert measure.copies_of(small, EMULATED) == 1


# ---- the clock of a GPU


class FakeGpu:
    """A GPU with a clock: a kernel takes 3 µs, and launching one from Python takes the CPU 20 µs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.captured: list[int] | None = None
        self.refuse: Exception | None = None
        self.launches = 0
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def program(self) -> Any:
        return FakeProgram(self)

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        self.captured = graph.kernels
        try:
            yield
            if self.refuse is not None:
                raise self.refuse
        finally:
            self.captured = None


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.kernels: list[int] = []

    def replay(self) -> None:
        self.gpu.now += 3e-6 * len(self.kernels)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.at = 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def synchronize(self) -> None:
        assert self.at == self.gpu.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


class FakeProgram:
    device = SimpleNamespace(type="cuda")

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def __call__(self, inputs: Any) -> None:
        if self.gpu.captured is not None:
            self.gpu.captured.append(1)
        else:
            self.gpu.launches += 1
            self.gpu.now += 20e-6


def test_a_gpu_is_timed_without_the_launches_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 6, 64):
        gpu = FakeGpu(monkeypatch)
        run = measure.timer([gpu.program() for _ in range(count)], [])
        launched = gpu.launches
        assert run() == [pytest.approx(3e-6)] and gpu.launches == launched
        before = gpu.now
        run()
        # So many calls that the way to the first hardly counts, and all copies as often.
        calls = round((gpu.now - before) / 3e-6)
        assert calls >= 32 and calls % count == 0


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing")])
def test_what_no_graph_can_hold_is_timed_with_its_launches(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.refuse = error
    run = measure.timer([gpu.program(), gpu.program()], [])
    assert run() == [pytest.approx(20e-6)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), DeviceMemoryError("full")])
def test_a_gpu_without_memory_has_no_time(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.refuse = error
    with pytest.raises(type(error), match="full"):
        measure.timer([gpu.program()], [])
