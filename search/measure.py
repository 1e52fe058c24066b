"""Measuring kernels as they will run: real extents, weights that are not in the cache, candidates interleaved."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.choice import GroupChoice
from fuser.codegen.render import header_folder
from fuser.ir.errors import DeviceMemoryError, KernelError
from fuser.ir.graph import OperatorGraph, TensorSpec
from fuser.ir.target import Target
from fuser.kernels.base import materialized
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache
from fuser.runtime.cuda import resolve_device
from fuser.runtime.cuda_program import arena_of, program_of
from fuser.runtime.library import load
from fuser.runtime.program import CPU, Program
from fuser.search.standalone import subgraph

_BUDGET_SECONDS = 0.1
# Kernels of a GPU are so quick and its L2 is so large that it takes more sets of weights.
_MOST_COPIES = {"cpu": 6, "cuda": 64}
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 15
_WARM_SECONDS = 0.01
_SPAN_SECONDS = 1e-3
_SPAN_CALLS = 32

Timer = Callable[[], list[float]]
"""Runs some programs once more, and gives the seconds of each run, or on a GPU their mean alone."""


@dataclass(frozen=True)
class Measurement:
    """Seconds of a run, the lower quartile, the spread (largest minus smallest) and how many runs.

    What else runs on the machine makes runs longer, never shorter, and with several threads many times as long, since
    they wait for each other: of small kernels more than half can be hit.
    """

    seconds: float
    spread: float
    runs: int


def device_of(target: Target) -> torch.device:
    """Where programs for ``target`` run, of several GPUs on the current one. Raises FuserError when there is none."""
    return resolve_device(torch.device("cuda")) if target.device == "cuda" else CPU


def prepare(
    candidates: Sequence[Sequence[GroupChoice]], target: Target, threads: int, cache: KernelCache
) -> tuple[list[OperatorGraph], list[Assembly], dict[str, Path]]:
    """Graphs, assemblies and built kernels of all candidates. Raises BuildError when a kernel does not compile."""
    graphs = [subgraph(candidate) for candidate in candidates]
    assemblies = [
        assemble(graph, candidate, target, threads) for graph, candidate in zip(graphs, candidates, strict=True)
    ]
    sources = {s.symbol: s for assembly in assemblies for s in assembly.sources}
    paths = build(list(sources.values()), target, headers=header_folder(target), cache=cache)
    return graphs, assemblies, paths


def measure(
    candidates: Sequence[Sequence[GroupChoice]], target: Target, threads: int, cache: KernelCache
) -> list[Measurement]:
    """Time of each candidate, a sequence of groups that do the same work.

    Several copies of the weights take turns, so that they come from memory as they do in a model, and candidates run
    in turn, so that a change of the machine's speed meets them all. Raises BuildError when a kernel does not compile,
    KernelError when one does not run, and torch.OutOfMemoryError when a GPU has not enough free memory.
    """
    graphs, assemblies, paths = prepare(candidates, target, threads, cache)
    device = device_of(target)
    timers: list[Timer] = []
    generator = torch.Generator(device).manual_seed(0)
    for graph, assembly in zip(graphs, assemblies, strict=True):
        kernels = {s.symbol: load(paths[s.symbol], s.symbol) for s in assembly.sources}
        weights: dict[str, Tensor] = {}
        for name in reversed(graph.with_sources(graph.constants)):
            if name not in weights:
                weights[name] = random_constant(graph, name, weights, generator)
        arena, programs = arena_of(device), []
        made = [tensor.to(device) for tensor in materialized(assembly.plan.constants, weights)]
        for _ in range(copies_of(graph, target)):
            constants = [tensor.clone() for tensor in made]
            programs.append(program_of(assembly.plan, kernels, constants, target, arena, graphs=False))
        timers.append(timer(programs, [random_tensor(graph.values[v], generator) for v in graph.inputs]))
    return _interleaved(timers)


def _interleaved(timers: Sequence[Timer]) -> list[Measurement]:
    times: list[list[float]] = [[] for _ in timers]
    rounds = _LEAST_ROUNDS
    done = -1
    while done < rounds:
        longest = 0.0
        for i, run in enumerate(timers):
            start = time.perf_counter()
            found = run()
            longest = max(longest, time.perf_counter() - start)
            # The first round loads code and data.
            if done >= 0:
                times[i] += found
        done += 1
        if done == 1:
            rounds = min(max(int(_BUDGET_SECONDS / max(longest, 1e-6)), _LEAST_ROUNDS), _MOST_ROUNDS)
    return [Measurement(sorted(t)[len(t) // 4], max(t) - min(t), len(t)) for t in times]


def copies_of(graph: OperatorGraph, target: Target) -> int:
    """How many sets of a graph's weights must take turns so that each has left the last-level cache when its turn
    comes, as far as that is worth the memory; one where there are no weights, and on the emulator, whose caches are not
    the target's."""
    weights = weight_bytes(graph)
    most = 1 if target.emulated or weights == 0 else _MOST_COPIES[target.device]
    # Inputs and results, the same in every turn, take their part of the cache once.
    passing = sum(graph.values[v].nbytes for v in {*graph.inputs, *graph.outputs})
    return min(max(-(-(3 * target.cache_bytes[2] // 2 - passing) // max(weights, 1)), 1), most)


def weight_bytes(graph: OperatorGraph) -> int:
    """Bytes of the constants that operators read."""
    return sum(graph.values[v].nbytes for v in graph.constants if graph.consumers[v])


def timer(programs: Sequence[Program], inputs: Sequence[Tensor]) -> Timer:
    """The timer of programs that do the same work, run one after the other."""
    if programs[0].device.type == "cuda":
        return _GpuTimer(programs, inputs)

    def run() -> list[float]:
        times = []
        for program in programs:
            start = time.perf_counter()
            program(inputs)
            times.append(time.perf_counter() - start)
        return times

    return run


class _GpuTimer:
    """Time between two events around a CUDA graph of many calls: what they take in a model, which is a graph too.

    The graph has the addresses of the programs' arena: a timer ends when another program makes that grow.
    """

    def __init__(self, programs: Sequence[Program], inputs: Sequence[Tensor]) -> None:
        self._programs = programs
        self._inputs = inputs
        self._device = programs[0].device
        with torch.cuda.device(self._device):
            # Loads code, and lets libraries allocate, which a capture may not.
            self._launch(1)
            once = self._elapsed(functools.partial(self._launch, 1))
            rounds = min(math.ceil(_SPAN_SECONDS / max(once, 1e-9)), math.ceil(_SPAN_CALLS / len(programs)))
            self._calls = max(rounds, 1) * len(programs)
            self._run = self._captured(max(rounds, 1))
            started = time.perf_counter()
            while time.perf_counter() - started < _WARM_SECONDS:
                # An idle GPU has a low clock.
                self._elapsed(self._run)

    def __call__(self) -> list[float]:
        with torch.cuda.device(self._device):
            return [self._elapsed(self._run) / self._calls]

    def _launch(self, rounds: int) -> None:
        for _ in range(rounds):
            for program in self._programs:
                program(self._inputs)

    def _captured(self, rounds: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch(rounds)
        except (torch.OutOfMemoryError, DeviceMemoryError):
            raise
        except (RuntimeError, KernelError):
            # PyTorch does something between the kernels that no graph can: in the model they are launched, too.
            torch.cuda.synchronize(self._device)
            return functools.partial(self._launch, rounds)
        return graph.replay

    @staticmethod
    def _elapsed(run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Contents for an input or weight on the generator's device: small normal numbers, 8-bit integers,
    all True, or index zero."""
    device = generator.device
    if spec.dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator, device=device).to(spec.dtype) * 0.1
    if spec.dtype in (torch.int8, torch.uint8):
        limits = torch.iinfo(spec.dtype)
        return torch.randint(limits.min, limits.max + 1, spec.shape, generator=generator, device=device).to(spec.dtype)
    if spec.dtype is torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool, device=device)
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


def random_constant(
    graph: OperatorGraph, name: str, sources: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Contents for a constant of a graph: as derived from its ``sources`` by name, which kernels may read in its place,
    with numbers where random sources give none."""
    constant = graph.constants[name]
    if constant.call is None:
        return random_tensor(graph.values[name], generator)
    return torch.nan_to_num(constant.evaluate([sources[source] for source in constant.sources]))
