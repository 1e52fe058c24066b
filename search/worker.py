"""A process that runs kernels which nobody has run before, so that a crash or a hang of theirs ends only it.

:class:`Worker` is the side of the search: it starts the process, sends it candidates and restarts it when it dies. The
process loads the candidates' kernels, compares their numbers with PyTorch's in double precision, and times them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.choice import GroupChoice
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.operators import QuantizeRows
from fuser.ir.target import TF32, Target
from fuser.kernels.base import Literal, Packed, TensorRef
from fuser.runtime.cuda_program import arena_of, program_of
from fuser.runtime.library import load
from fuser.runtime.program import Program
from fuser.search.measure import copies_of, device_of, random_constant, random_tensor, timer, weight_bytes
from fuser.search.standalone import subgraph

logger = logging.getLogger("fuser")

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest relative L2 error against double precision, by the least precise dtype of the operators: twenty times what
eager PyTorch shows on layers of transformers, a thousandth of what a wrong kernel does."""
CODE_TOLERANCES = {torch.int8: 1e-2, torch.float8_e4m3fn: 6e-2}
"""The same where operators round rows to codes: an element beside the border between two may become the other, which is
a step of 127ths of the largest, or of 16ths."""
_LEAST_ROUNDS = 5
_FEW_ROUNDS = 3  # for units so slow that more would take many times the budget
_LONG = 4.0
_MOST_ROUNDS = 30
_CLEARLY = 1.08
_MEMORY = 3 << 30
_ANSWER_SECONDS = 60.0
_START_SECONDS = 180.0


@dataclass(frozen=True)
class Unit:
    """Something to time: groups of one region that are run one after the other. ``key`` is equal for equal units,
    ``region`` for units of one region; ``copies`` is how many sets of weights take turns; ``paths`` are the built
    kernels by symbol."""

    key: str
    region: str
    choices: tuple[GroupChoice, ...]
    paths: Mapping[str, Path]
    copies: int


@dataclass(frozen=True)
class Timing:
    """Median seconds of a unit, interquartile range and number of runs, or why it has none.

    ``ratio`` is the median over runs of its time to that of the first unit of its request just before; ``early`` tells
    that measuring stopped because it was clearly slower than that.
    """

    seconds: float | None
    spread: float = 0.0
    runs: int = 0
    ratio: float = 1.0
    early: bool = False
    failure: str = ""


class Worker:
    """The process and the way to it. ``timeout`` is how long, in seconds, one step of one candidate may take.

    For a GPU the process uses the one that is current here when the worker is made.
    """

    def __init__(self, target: Target, threads: int, timeout: float = _ANSWER_SECONDS) -> None:
        self.target = target
        self.threads = threads
        self.device = device_of(target)
        self.timeout = timeout
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._answers: Connection | None = None
        self._errors: Any = None

    def time(
        self, units: Sequence[Unit], budget: float, *, race: bool = False, deadline: float | None = None
    ) -> list[Timing]:
        """Times of the units, run in turn for about ``budget`` seconds; with ``race`` it ends when all others are
        clearly slower than the first.

        A unit that crashes the process, hangs or gives wrong numbers has a failure, and the others are timed without
        it. Raises TimeoutError at ``deadline`` (of ``time.perf_counter``).
        """
        failed: dict[str, Timing] = {}
        while True:
            rest = [unit for unit in units if unit.key not in failed]
            if not rest:
                return [failed[unit.key] for unit in units]
            answer = self._ask(("time", rest, budget, race), rest, deadline)
            if isinstance(answer, dict):
                return [failed[unit.key] if unit.key in failed else answer[unit.key] for unit in units]
            key, reason = answer
            if key is None:
                # Between candidates: nobody in particular is at fault, so nothing would be gained by going on.
                return [failed.get(unit.key, Timing(None, failure=reason)) for unit in units]
            failed[key] = Timing(None, failure=reason)

    def _ask(
        self, request: Any, units: Sequence[Unit], deadline: float | None
    ) -> dict[str, Timing] | tuple[str | None, str]:
        """All times, or the key of the unit that ended the process (None when it is not known) and how."""
        current: str | None = units[0].key if len(units) == 1 else None
        doing = "starting"
        try:
            connection, answers = self._started()
            connection.send(request)
            while True:
                # Importing PyTorch can take long on a busy machine, and is no fault of a kernel.
                allowed = _START_SECONDS if doing == "starting" else self.timeout
                limit = allowed if deadline is None else min(allowed, deadline - time.perf_counter())
                if not answers.poll(max(limit, 0.0)):
                    self.close()
                    if deadline is not None and time.perf_counter() >= deadline:
                        raise TimeoutError("the time of the search is over")
                    return current, f"hung: {doing} took more than {allowed:g} s"
                kind, *content = answers.recv()
                if kind == "doing":
                    current, doing = content
                elif kind == "times":
                    times: dict[str, Timing] = content[0]
                    return times
                else:
                    if kind == "lost":
                        self.close()
                    return current, content[0]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return current, f"{self._end()} while {doing}"

    def _started(self) -> tuple[Connection, Connection]:
        if self._process is not None and self._process.poll() is None:
            assert self._connection is not None and self._answers is not None
            return self._connection, self._answers
        self.close()
        self.starts += 1
        there, here = os.pipe()
        back, away = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        paths = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "PYTHONPATH": paths}
        if self.target.kind == "cpu":
            environment["OMP_NUM_THREADS"] = str(self.threads)
            if "OMP_PROC_BIND" not in environment and "GOMP_CPU_AFFINITY" not in environment:
                # Threads that wander between cores find cold caches there.
                environment |= {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
        command = [sys.executable, "-c", "from fuser.search.worker import main; main()", str(there), str(away)]
        self._process = subprocess.Popen(
            command,
            pass_fds=(there, away),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
            # Ctrl-C in a terminal is for the search, which then ends this process.
            start_new_session=True,
        )
        os.close(there)
        os.close(away)
        self._connection = Connection(here, readable=False)
        self._answers = Connection(back, writable=False)
        self._connection.send((self.target, self.threads, self.device))
        return self._connection, self._answers

    def _end(self) -> str:
        """How the process ended."""
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"crashed the process with {signal.Signals(-code).name}"
        return f"ended the process with status {code}" + (f" ({said[-1][:200]})" if said else "")

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for connection in (self._connection, self._answers, self._errors):
            if connection is not None:
                connection.close()
        self._process = self._connection = self._answers = self._errors = None


@dataclass
class _Loaded:
    programs: list[Program]
    inputs: list[Tensor]
    outputs: tuple[str, ...]


class _Bench:
    """The candidates that this process has loaded."""

    def __init__(self, target: Target, threads: int, device: torch.device, say: Any) -> None:
        self.target = target
        self.threads = threads
        self.device = device
        self.say = say
        self.arena = arena_of(device)
        self.loaded: dict[str, _Loaded] = {}
        self.wrong: dict[str, str] = {}
        self.weights: dict[tuple[str, str, int], Tensor] = {}
        self.packed: dict[tuple[str, Packed | Literal, int], tuple[Tensor, ...]] = {}
        self.references: dict[tuple[str, frozenset[str]], dict[str, Tensor]] = {}

    def time(self, units: Sequence[Unit], budget: float, race: bool) -> dict[str, Timing]:
        ready: dict[str, _Loaded] = {}
        found: dict[str, Timing] = {}
        if self._bytes() > _MEMORY:
            for kept in (self.loaded, self.weights, self.packed, self.references):
                kept.clear()
        for unit in units:
            self.say("doing", unit.key, "loading and checking it")
            try:
                if unit.key not in self.loaded and unit.key not in self.wrong:
                    self._load(unit)
            except Exception as error:
                if self.is_lost():
                    raise
                self.wrong[unit.key] = f"{type(error).__name__}: {error}"
            if unit.key in self.wrong:
                found[unit.key] = Timing(None, failure=self.wrong[unit.key])
            else:
                ready[unit.key] = self.loaded[unit.key]
        return found | self._interleaved(ready, budget, race)

    def is_lost(self) -> bool:
        """Whether a kernel has left the GPU unusable for this process, as one does that writes where it may not."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                return True
        return False

    def _bytes(self) -> int:
        found = sum(t.nbytes for made in ((*self.weights.values(),), *self.packed.values()) for t in made)
        return found + sum(t.nbytes for results in self.references.values() for t in results.values())

    def _load(self, unit: Unit) -> None:
        graph = subgraph(unit.choices)
        assembly = assemble(graph, unit.choices, self.target, self.threads)
        kernels = {s.symbol: load(unit.paths[s.symbol], s.symbol) for s in assembly.sources}
        copies = self._copies(unit, graph)
        inputs = [self._tensor(unit.region, graph, v, 0) for v in graph.inputs]
        programs = []
        for copy in range(copies):
            constants = [self._constant(unit.region, graph, ref, copy) for ref in assembly.plan.constants]
            programs.append(program_of(assembly.plan, kernels, constants, self.target, self.arena, graphs=False))
        if reason := self._error(unit, graph, assembly, programs[0], inputs):
            self.wrong[unit.key] = reason
        else:
            self.loaded[unit.key] = _Loaded(programs, inputs, graph.outputs)

    def _copies(self, unit: Unit, graph: OperatorGraph) -> int:
        """So many sets of the unit's weights that they come from memory, or stay in the cache, as in the model."""
        enough = copies_of(graph, self.target)
        model = unit.copies * weight_bytes(unit.choices[0].group.graph)
        return enough if 2 * model >= 3 * self.target.cache_bytes[2] else max(min(enough, unit.copies), 1)

    def _tensor(self, region: str, graph: OperatorGraph, name: str, copy: int) -> Tensor:
        key = (region, name, copy)
        if key not in self.weights:
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{name}\0{copy}".encode()))
            if name in graph.constants:
                sources = {s: self._tensor(region, graph, s, copy) for s in graph.constants[name].sources}
                self.weights[key] = random_constant(graph, name, sources, generator)
            else:
                self.weights[key] = random_tensor(graph.values[name], generator)
        return self.weights[key]

    def _constant(self, region: str, graph: OperatorGraph, ref: TensorRef, copy: int) -> Tensor:
        if isinstance(ref, str):
            return self._tensor(region, graph, ref, copy)
        if isinstance(ref, Literal):
            if (region, ref, 0) not in self.packed:
                self.packed[region, ref, 0] = (ref.tensor.to(self.device),)
            return self.packed[region, ref, 0][0]
        key = (region, ref.whole, copy)
        if key not in self.packed:
            self.packed[key] = ref.pack({v: self._tensor(region, graph, v, copy) for v in ref.values})
        return self.packed[key][ref.index]

    def _error(
        self, unit: Unit, graph: OperatorGraph, assembly: Assembly, program: Program, inputs: Sequence[Tensor]
    ) -> str:
        """Why the numbers of a program are wrong, empty when they are right."""
        key = (unit.region, frozenset(op.name for op in graph.compute))
        if key not in self.references:
            names = (*graph.inputs, *graph.constants, *graph.states)
            values = {name: self._tensor(unit.region, graph, name, 0) for name in names}
            self.references[key] = evaluate(graph, values, torch.float64)
        expected = self.references[key]
        program(inputs)
        for name in graph.states:
            program.states[name].copy_(self._tensor(unit.region, graph, name, 0))
        results = [*program(inputs), *(program.states[name] for name in graph.states)]
        limit = tolerance(
            (graph.values[v].dtype for op in graph.compute for v in (*op.inputs, *op.outputs)), self.target
        )
        codes = {getattr(op.semantics, "codes", None) for op in graph.compute}
        limit = max([limit, *(error for dtype, error in CODE_TOLERANCES.items() if dtype in codes)])
        rounded = {op.outputs[0]: op.outputs[1] for op in graph.compute if isinstance(op.semantics, QuantizeRows)}
        made = dict(zip((*graph.outputs, *graph.states), results, strict=True))
        for name, got in made.items():
            want = expected[name]
            if tuple(got.shape) != tuple(want.shape):
                return f"wrong numbers: {name} has the shape {tuple(got.shape)}, not {tuple(want.shape)}"
            if name in rounded:
                got, want = (t[name].double() * t[rounded[name]].double() for t in (made, expected))
            if not got.dtype.is_floating_point:
                if not torch.equal(got, want.to(got.dtype)):
                    return f"wrong numbers: {name} differs"
                continue
            error = relative_error(got, want)
            if not error <= limit:
                return f"wrong numbers: the relative error of {name} is {error:.1e}, over {limit:.0e}"
        return ""

    def _interleaved(self, ready: Mapping[str, _Loaded], budget: float, race: bool) -> dict[str, Timing]:
        times: dict[str, list[float]] = {key: [] for key in ready}
        with self.arena.lock:
            # Timers on a GPU hold addresses of the arena, which must not grow while they are used.
            self.arena.require(max((u.programs[0].plan.arena_bytes for u in ready.values()), default=0))
        timers = {}
        for key, loaded in ready.items():
            self.say("doing", key, "timing it")
            timers[key] = timer(loaded.programs, loaded.inputs)
        early: set[str] = set()
        first = next(iter(ready), None)
        started = time.perf_counter()
        done = -1
        while first is not None and done < _MOST_ROUNDS:
            for key, run in timers.items():
                if key in early:
                    continue
                self.say("doing", key, "timing it")
                found = run()
                if done >= 0:
                    # The round before the first loads code and data.
                    times[key] += found
            done += 1
            if done >= _FEW_ROUNDS and race:
                bar = statistics.median(times[first])
                for key in ready:
                    if key != first and statistics.median(times[key]) > _CLEARLY * bar and min(times[key]) > bar:
                        early.add(key)
                if len(early) == len(ready) - 1:
                    break
            spent = time.perf_counter() - started
            if spent > budget and (done >= _LEAST_ROUNDS or (done >= _FEW_ROUNDS and spent > _LONG * budget)):
                break
        return {key: _timing(times[key], times[first], key in early) for key in ready if first is not None}


def _timing(times: Sequence[float], beside: Sequence[float], early: bool) -> Timing:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    ratio = statistics.median(mine / theirs for mine, theirs in zip(times, beside, strict=False))
    return Timing(statistics.median(times), quarters[2] - quarters[0], len(times), ratio, early)


def tolerance(dtypes: Iterable[torch.dtype], target: Target) -> float:
    """The largest relative error that is right for operators with values of these types: that of the least precise."""
    found = set(dtypes)
    if TF32 in target.features and torch.float32 in found:
        # It has as many bits of mantissa.
        found.add(torch.float16)
    return max((TOLERANCES[dtype] for dtype in found if dtype in TOLERANCES), default=0.0)


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; infinity where one is finite and the other is not."""
    got = got.double()
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    scale = float(want.norm())
    difference = float((got - want).norm())
    return difference / scale if scale else difference


def main() -> None:
    """The process: ``python -c … READ WRITE`` with the numbers of two inherited pipes."""
    requests = Connection(int(sys.argv[1]), writable=False)
    answers = Connection(int(sys.argv[2]), readable=False)
    with contextlib.suppress(OSError, AttributeError):
        # A hanging kernel must not outlive a search that was killed.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        target, threads, device = requests.recv()
        if target.kind == "cpu":
            torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high" if TF32 in target.features else "highest")
        bench = _Bench(target, threads, device, lambda *message: answers.send(message))
        while True:
            _, units, budget, race = requests.recv()
            try:
                answers.send(("times", bench.time(units, budget, race)))
            except Exception as error:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                if bench.is_lost():
                    # Nothing that this process asks of the GPU from here on would be answered.
                    answers.send(("lost", f"made the GPU unusable for its process: {reason}"))
                    return
                answers.send(("failed", reason))
    except (EOFError, BrokenPipeError):
        return
