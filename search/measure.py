"""Measuring kernels as they will run: real extents, weights that are not in the cache, candidates interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.partition import GroupChoice
from fuser.codegen.render import header_folder
from fuser.ir.graph import OperatorGraph, TensorSpec
from fuser.ir.target import Target
from fuser.kernels.base import Literal, Packed, TensorRef
from fuser.kernels.families import materialize
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import load
from fuser.runtime.program import Program
from fuser.search.standalone import subgraph

_BUDGET_SECONDS = 0.1
_MOST_COPIES = 6
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 15


@dataclass(frozen=True)
class Measurement:
    """Median seconds of a run, the spread (largest minus smallest) and how many runs."""

    seconds: float
    spread: float
    runs: int


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
    in turn, so that a change of the machine's speed meets them all.
    """
    graphs, assemblies, paths = prepare(candidates, target, threads, cache)
    runs: list[list[Program]] = []
    inputs: list[list[Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for graph, assembly in zip(graphs, assemblies, strict=True):
        kernels = {s.symbol: load(paths[s.symbol], s.symbol) for s in assembly.sources}
        weights = {v: random_tensor(graph.values[v], generator) for v in graph.constants}
        size = sum(t.nbytes for t in weights.values())
        copies = min(max(-(-3 * target.cache_bytes[2] // (2 * max(size, 1))), 1), _MOST_COPIES)
        programs = []
        for _ in range(copies):
            constants = [constant(ref, weights).clone() for ref in assembly.plan.constants]
            programs.append(Program(assembly.plan, kernels, constants))
        runs.append(programs)
        inputs.append([random_tensor(graph.values[v], generator) for v in graph.inputs])
    return _interleaved(runs, inputs)


def _interleaved(runs: Sequence[Sequence[Program]], inputs: Sequence[Sequence[Tensor]]) -> list[Measurement]:
    times: list[list[float]] = [[] for _ in runs]
    rounds = _LEAST_ROUNDS
    done = -1
    while done < rounds:
        for i, programs in enumerate(runs):
            for program in programs:
                start = time.perf_counter()
                program(inputs[i])
                elapsed = time.perf_counter() - start
                # The first round loads code and data.
                if done >= 0:
                    times[i].append(elapsed)
        done += 1
        if done == 1:
            longest = max((sum(t) for t in times), default=0.0)
            rounds = min(max(int(_BUDGET_SECONDS / max(longest, 1e-6)), _LEAST_ROUNDS), _MOST_ROUNDS)
    return [Measurement(statistics.median(t), max(t) - min(t), len(t)) for t in times]


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Contents for an input or weight: small normal numbers, all True, or index zero."""
    if spec.dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(spec.dtype) * 0.1
    if spec.dtype is torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool)
    return torch.zeros(spec.shape, dtype=spec.dtype)


def constant(ref: TensorRef, weights: Mapping[str, Tensor]) -> Tensor:
    """A constant of a plan, packed if it is to be, made from ``weights`` by name."""
    if isinstance(ref, Literal):
        return materialize(ref, None)
    return materialize(ref, weights[ref.value]) if isinstance(ref, Packed) else weights[ref]
