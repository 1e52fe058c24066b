"""Programs: steps over one planned arena, run without Python between kernels."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fuser.ir.errors import IndexRangeError, KernelError, ResultError
from fuser.ir.extents import Extents
from fuser.runtime.abi import ARGS_ROW, STEP_ROW, KernelArgs, extents_buffer
from fuser.runtime.cpuinfo import usable_cores
from fuser.runtime.library import Kernel, run_after_fork
from fuser.runtime.locks import ForkSafeLock
from fuser.runtime.pages import pages

RUNNER = "fuser_run_steps"
INDEX_STATUS = 1
"""What templates return for an index outside its table."""
CPU = torch.device("cpu")
_POINTER = ctypes.sizeof(ctypes.c_void_p)


class Memory(enum.Enum):
    """Where a tensor lives: in the arena, in an input or constant, in storage allocated for one call (outputs), in what
    a PyTorch step returned, or in a state, which lives across calls."""

    ARENA = "arena"
    INPUT = "input"
    CONSTANT = "constant"
    OUTPUT = "output"
    RESULT = "result"
    STATE = "state"

    # That of an enum hashes its name in Python, several times a step.
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Slot:
    """A strided tensor: ``index`` numbers the input, constant, output, result or state; ``offset`` is in bytes from its
    start (or the arena's)."""

    memory: Memory
    index: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class NativeStep:
    """One generated kernel: addresses in the template's order and run-time extents (see :meth:`KernelArgs.pack`)."""

    symbol: str
    tensors: tuple[Slot, ...]
    extents: Extents | tuple[int, ...]


@dataclass(frozen=True)
class TorchStep:
    """What PyTorch runs: ``call(*inputs)`` gives the tensors of the RESULT slots ``results``, or, with ``out``, writes
    its last argument."""

    call: Callable[..., Any]
    inputs: tuple[Slot, ...]
    results: tuple[Slot, ...]
    out: Slot | None = None


@dataclass(frozen=True)
class ProgramPlan:
    """Everything about a program but its memory and its kernels' addresses.

    ``inputs`` are the shapes and dtypes expected (contiguous); ``outputs`` the storages to allocate for each call;
    ``returns`` the tensors to return, or, for positions in ``aliases``, the input or constant that the view functions
    there are applied to. ``workspace_offset`` is where the kernels' scratch starts in the arena. ``states`` are the
    values that live across calls by the names that programs share them by, numbered in this order. ``appended`` are the
    outputs that are the rows of an input and others behind or among them, with the positions of these inputs: where
    there is room in the input's memory, that is the output's. A call leaves the inputs that ``updated`` gives with the
    contents of the results at its positions, the last of ``returns``, which are not returned.
    """

    steps: tuple[NativeStep | TorchStep, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    returns: tuple[Slot, ...]
    constants: tuple[Any, ...]
    result_count: int
    arena_bytes: int
    workspace_offset: int
    threads: int
    aliases: Mapping[int, Sequence[tuple[Callable[..., Sequence[Tensor]], int]]] = field(default_factory=dict)
    states: Mapping[str, Slot] = field(default_factory=dict)
    appended: Mapping[int, int] = field(default_factory=dict)
    updated: Mapping[int, int] = field(default_factory=dict)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Kernels that the program needs, each once, with the step runner."""
        names = dict.fromkeys(step.symbol for step in self.steps if isinstance(step, NativeStep))
        return (*names, RUNNER)


class Rebound(NamedTuple):
    """A plan of the same steps for other sizes, and the constants that are others in it, by position."""

    plan: ProgramPlan
    constants: Mapping[int, Tensor]


class _StepTable:
    """The kernel steps of a plan as C code reads them: the addresses of their tensors, one step's behind the other's,
    their arguments, and the pairs of a kernel and its arguments."""

    def __init__(self, plan: ProgramPlan, kernels: Mapping[str, Kernel], status: int) -> None:
        steps = [step for step in plan.steps if isinstance(step, NativeStep)]
        starts = list(itertools.accumulate((max(len(step.tensors), 1) for step in steps), initial=0))
        self._threads = plan.threads
        self._addresses = (ctypes.c_void_p * starts[-1])()
        self._starts = starts
        self._args = np.zeros(len(steps), ARGS_ROW)
        self._args["tensors"] = np.array(starts[:-1], np.int64) * _POINTER + ctypes.addressof(self._addresses)
        self._args["threads"], self._args["status"] = plan.threads, status
        self._steps = np.zeros(len(steps), STEP_ROW)
        self._steps["kernel"] = [kernels[step.symbol].address for step in steps]
        self._steps["args"] = self._args.ctypes.data + np.arange(len(steps)) * ARGS_ROW.itemsize
        self._buffers: list[Any] = [None] * len(steps)
        made: dict[int, Any] = {}
        for row, step in enumerate(steps):
            self.set_extents(row, step, made)
        self.place(steps)

    def run(self, first: int, count: int) -> KernelArgs:
        """What the step runner takes to run so many rows from the ``first`` on."""
        return KernelArgs.pack((self._steps.ctypes.data + first * STEP_ROW.itemsize,), (count,), self._threads)

    def set_extents(self, row: int, step: NativeStep, made: dict[int, Any]) -> None:
        """Give a step its run-time sizes; ``made`` knows those of equal layers, which share them."""
        buffer = made.get(id(step.extents))
        if buffer is None:
            buffer = made[id(step.extents)] = extents_buffer(step.extents)
        self._buffers[row] = buffer
        self._args["extents"][row] = ctypes.addressof(buffer)

    def place(self, steps: Sequence[NativeStep]) -> None:
        """Take over where in their memory the tensors of the steps are."""
        self._patches: dict[tuple[Memory, int], list[tuple[int, int]]] = {}
        for start, step in zip(self._starts, steps, strict=False):
            for position, slot in enumerate(step.tensors, start):
                self._patches.setdefault((slot.memory, slot.index), []).append((position, slot.offset))

    def patch(self, memory: Memory, index: int, address: int) -> None:
        """The memory starts at this ``address``."""
        for position, offset in self._patches.get((memory, index), ()):
            self._addresses[position] = address + offset

    def set_threads(self, threads: int) -> None:
        """Use teams of at most as many threads as the plan has."""
        if threads != self._threads:
            self._args["threads"] = self._threads = threads

    def set_workspace(self, address: int) -> None:
        self._args["workspace"] = address


class Arena:
    """The memory that programs of one model compute in, one program at a time; it grows to the largest's need. With
    ``concurrency`` there are as many arenas in all, and as many programs at a time, which share the cores."""

    def __init__(self, device: torch.device = CPU, concurrency: int = 1) -> None:
        self.device = device
        self.lock = ForkSafeLock()
        self._lanes = (self, *(type(self)(device) for _ in range(concurrency - 1)))
        self._turns = itertools.cycle(self._lanes)
        self._queue = ForkSafeLock()
        # Programs are made while others run.
        self._counting = ForkSafeLock()
        self._cores = usable_cores() if concurrency > 1 else 1
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.programs: weakref.WeakSet[Program] = weakref.WeakSet()

    def require(self, size: int) -> Tensor:
        """At least ``size`` bytes from a multiple of 64; call with the lock held."""
        if self.buffer.numel() < size:
            self.release()
            # Made outside of inference mode, whose tensors PyTorch refuses to write to later.
            with torch.inference_mode(False):
                self.buffer = self._room(size)
        return self.buffer

    def _room(self, size: int) -> Tensor:
        # A reservation: what no program has written yet takes no memory, and the next larger one keeps the rest.
        for reserved in (1 << (size - 1).bit_length(), size):
            with contextlib.suppress(OSError, OverflowError):
                return pages(reserved)
        return aligned(size, self.device)

    def release(self) -> None:
        """Give the memory back; call with the lock held."""
        with self._counting:
            programs = list(self.programs)
        for program in programs:
            program.leave()
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def add(self, program: Program) -> None:
        """Tell ``program`` when the memory goes."""
        with self._counting:
            self.programs.add(program)

    @contextlib.contextmanager
    def lane(self) -> Iterator[Arena]:
        """One of the arenas with its lock held: the first that is free, or, if none is, whichever is next."""
        arena = self._free_lane() or self._next_lane()
        try:
            yield arena
        finally:
            arena.lock.release()

    def team(self, threads: int) -> int:
        """How many of its ``threads`` a program uses that runs beside those in the other lanes; call in a lane."""
        if len(self._lanes) == 1:
            return threads
        running = sum(arena.lock.taken() for arena in self._lanes)
        return min(threads, max(1, max(self._cores, threads) // max(1, running)))

    def _free_lane(self) -> Arena | None:
        return next((arena for arena in self._lanes if arena.lock.acquire(blocking=False)), None)

    def _next_lane(self) -> Arena:
        if len(self._lanes) == 1:
            self.lock.acquire()
            return self
        # One call looks for lanes, the others for its place: they would wake up for nothing.
        with self._queue:
            while True:
                if (arena := self._free_lane()) is not None:
                    return arena
                if (turn := next(self._turns)).lock.acquire(timeout=_PATIENCE_SECONDS):
                    return turn

    def join(self) -> None:
        """Let what the current stream gets from here on wait for what others do here; call with the lock held."""


def aligned(size: int, device: torch.device) -> Tensor:
    """Memory of PyTorch's, from a multiple of 64."""
    room = torch.empty(size + _CACHE_LINE, dtype=torch.uint8, device=device)
    return room[-room.data_ptr() % _CACHE_LINE :]


class States:
    """The values of programs that live across calls, by name: zeros at first, then what kernels write, in place.

    Who gives one to several programs makes them share these values, as those for a prompt and for single tokens do;
    they must compute in one ``arena``, so that only one of them runs at a time. Replacing constants, growing arenas and
    forks (which copy memory) leave the values alone; :meth:`reset` clears them. A call that raises leaves them as far
    as it came.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._tensors: dict[str, Tensor] = {}

    def require(self, states: Mapping[str, Slot]) -> list[Tensor]:
        """The tensors of these states, in this order; new ones are zeros. Raises KernelError where one is there with
        another shape, layout or dtype."""
        with self.arena.lock:
            for name, slot in states.items():
                there = self._tensors.get(name)
                if there is not None and _described(there) != _described(slot):
                    raise KernelError(
                        f"the state {name} is {_described(there)} and the program takes {_described(slot)}: programs "
                        "for other sizes need States of their own"
                    )
            self.arena.join()
            for name, slot in states.items():
                if name not in self._tensors:
                    # Made outside of inference mode, whose tensors PyTorch refuses to write to later.
                    with torch.inference_mode(False):
                        storage = torch.zeros(_bytes(slot), dtype=torch.uint8, device=self.arena.device)
                        self._tensors[name] = storage.view(slot.dtype).as_strided(slot.shape, slot.strides)
            return [self._tensors[name] for name in states]

    def reset(self) -> None:
        """Fill all of them with zeros, after the calls that were made before."""
        with self.arena.lock, torch.no_grad():
            self.arena.join()
            for tensor in self._tensors.values():
                tensor.zero_()

    def __getitem__(self, name: str) -> Tensor:
        """The very memory that programs read and write."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)


def _described(tensor: Tensor | Slot) -> str:
    strides = tensor.strides if isinstance(tensor, Slot) else tensor.stride()
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tuple(strides)}"


_CACHE_LINE = 64
_PATIENCE_SECONDS = 0.001
"""How long a call waits for one lane before it looks for others."""


class Program:
    """A plan with its arena, its constants, its states and its loaded kernels.

    Calls of programs that share an ``arena`` (default: one of its own) run one after the other, or as many at once as
    that has lanes, unless the program has states. ``states`` (default: some of its own) are of that arena.
    """

    # Where the step runner's status has the number of the step.
    _step_shift = 8
    # Whether it can compute in all lanes of its arena.
    _concurrent = True

    def __init__(
        self,
        plan: ProgramPlan,
        kernels: Mapping[str, Kernel],
        constants: Sequence[Tensor],
        arena: Arena | None = None,
        states: States | None = None,
        *,
        status: int = 0,
    ) -> None:
        self.plan = plan
        self._kernels = kernels
        self._arena = arena or Arena()
        self.states = States(self._arena) if states is None else states
        if self.states.arena is not self._arena:
            raise ValueError("programs that share states must share the arena of these")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._table = _StepTable(plan, kernels, status)
        self._given: list[Tensor] = []
        self._segments: list[tuple[Any, int, int] | TorchStep] = []
        # By number of the step: the row of a kernel, or the place of a PyTorch step.
        self._places: dict[int, int] = {}
        # By identity of the plan's slots: hashing all that a slot says would take as long as a small operator.
        self._arena_views: dict[int, Tensor] = {}
        self._constant_views: dict[int, Tensor] = {}
        self._runner = kernels[RUNNER]
        # The same program in the other lanes of its arena.
        self._twins: dict[Arena, Program] = {}
        self._arena.add(self)
        self._assemble()
        self._state_tensors = self.states.require(plan.states) if plan.states else []
        for i, tensor in enumerate(self._state_tensors):
            self._patch(Memory.STATE, i, tensor)
        self._set_constants(constants)

    @property
    def device(self) -> torch.device:
        """Where inputs, constants and outputs live."""
        return self._arena.device

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """The loaded kernels by symbol."""
        return self._kernels

    def set_constants(self, constants: Sequence[Tensor]) -> None:
        """Use these tensors for the plan's constants, in its order; they must stay as they are until replaced."""
        with self._arena.lock:
            self._set_constants(constants)

    def _set_constants(self, constants: Sequence[Tensor]) -> None:
        self._given = list(constants)
        self._twins = {}
        self._constant_views = {}
        for i, tensor in enumerate(constants):
            self._patch(Memory.CONSTANT, i, tensor)

    def __call__(self, inputs: Sequence[Tensor], rebound: Rebound | None = None) -> list[Tensor]:
        """Run on tensors that match ``plan.inputs``; returns the tensors of ``plan.returns``, in fresh storage unless
        the model itself returns its inputs or parameters, or views of them. On a CPU, the plan may be ``rebound``.

        Raises IndexRangeError for an index outside its table, and KernelError for other failures of kernels.
        """
        # A PyTorch step would wait for threads that a fork has ended, just as a kernel would.
        if rebound is None:
            return run_after_fork(self._run, inputs)
        return run_after_fork(self._run, inputs, rebound)

    def _run(self, inputs: Sequence[Tensor], rebound: Rebound | None = None) -> list[Tensor]:
        if self.plan.states or not self._concurrent:
            with self._arena.lock:
                return self._run_alone(inputs, rebound)
        # In this order: constants that are replaced meanwhile leave these to nobody.
        twins, constants = self._twins, self._given
        while True:
            with self._arena.lane() as arena:
                program = self if arena is self._arena else twins.get(arena)
                if program is not None:
                    program._table.set_threads(self._arena.team(self.plan.threads))
                    return program._run_alone(inputs, rebound)
            # Another call may be in this lane by the time the twin is made, and others be free.
            twins[arena] = Program(self.plan, self._kernels, constants, arena)

    def _run_alone(self, inputs: Sequence[Tensor], rebound: Rebound | None = None) -> list[Tensor]:
        if rebound is not None and rebound.plan is not self.plan:
            self._rebind(rebound)
        held = self._bind(inputs)
        self._execute(held)
        return self._results(held, inputs)

    def _execute(self, held: dict[tuple[Memory, int], Tensor]) -> None:
        for segment in self._segments:
            if isinstance(segment, TorchStep):
                self._run_torch(segment, held)
            else:
                self._run_native(segment)

    @contextlib.contextmanager
    def stepping(
        self, inputs: Sequence[Tensor]
    ) -> Iterator[tuple[list[Callable[[], None]], Callable[[], list[Tensor]]]]:
        """The steps of ``plan.steps`` as functions that run one step each, to be called in order, and a function that
        then gives the results; for profiles. Other calls of this program wait until the context is left.
        """
        with self._arena.lock:
            self._table.set_threads(self.plan.threads)
            held = self._bind(inputs)
            runs = [run for segment in self._segments for run in self._singly(segment, held)]
            yield runs, lambda: self._results(held, inputs)

    def _results(self, held: dict[tuple[Memory, int], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        results = []
        for position, slot in enumerate(self.plan.returns):
            calls = self.plan.aliases.get(position)
            if calls is None:
                results.append(self._tensor(slot, held))
                continue
            tensor = inputs[slot.index] if slot.memory is Memory.INPUT else self._given[slot.index]
            for call, index in calls:
                tensor = call(tensor)[index]
            results.append(tensor)
        if not self.plan.updated:
            return results
        with torch.no_grad():
            for position, i in self.plan.updated.items():
                if results[position].data_ptr() != inputs[i].data_ptr():
                    inputs[i].copy_(results[position])
                elif not inputs[i].is_inference():
                    torch.autograd.graph.increment_version(inputs[i])
        return results[: -len(self.plan.updated)]

    def _singly(
        self, segment: tuple[Any, int, int] | TorchStep, held: dict[tuple[Memory, int], Tensor]
    ) -> list[Callable[[], None]]:
        if isinstance(segment, TorchStep):
            return [functools.partial(self._run_torch, segment, held)]
        _, first, count = segment
        return [
            functools.partial(self._run_native, (self._table.run(self._places[i], 1), i, 1))
            for i in range(first, first + count)
        ]

    def _bind(self, inputs: Sequence[Tensor]) -> dict[tuple[Memory, int], Tensor]:
        """Point the steps at these inputs and at fresh outputs, which are returned by slot."""
        held: dict[tuple[Memory, int], Tensor] = {}
        buffer = self._arena.require(self.plan.arena_bytes)
        if buffer is not self._buffer:
            self._settle(buffer)
        extended = self._extended(inputs) if self.plan.appended else {}
        for i, tensor in enumerate(inputs):
            # Kernels read memory as it lies: without the negation that PyTorch keeps as a flag.
            given = tensor.detach()
            if i not in extended:
                given = given.resolve_neg().contiguous()
            held[Memory.INPUT, i] = given
            self._patch(Memory.INPUT, i, given)
        for i, slot in enumerate(self.plan.outputs):
            source = self.plan.appended.get(i)
            if source is None:
                fresh = torch.empty_strided(slot.shape, slot.strides, dtype=slot.dtype, device=self._arena.device)
            else:
                fresh = extended[source] if source in extended else _with_room(slot, self._arena.device)
            held[Memory.OUTPUT, i] = fresh
            self._patch(Memory.OUTPUT, i, fresh)
        return held

    def _extended(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """For inputs that rows are appended to, by position, more rows of their memory, where that has room and nobody
        else sees it; those that rows are written to for good are these themselves."""
        found: dict[int, Tensor] = {}
        used: set[int] = set()
        updated = set(self.plan.updated.values())
        for i, source in self.plan.appended.items():
            slot, tensor = self.plan.outputs[i], inputs[source]
            if source in updated:
                if tensor.is_contiguous() and not tensor.is_neg():
                    found[source] = tensor.detach()
                continue
            if tensor.stride() != slot.strides or tensor.is_neg() or tensor.requires_grad or tensor._base is not None:
                continue
            # Before the storage has a name here.
            if not is_exclusive(tensor):
                continue
            storage = tensor.untyped_storage()
            offset = int(tensor.storage_offset())
            end = offset + slot.shape[0] * slot.strides[0]
            place = storage.data_ptr()
            if place in used or storage.nbytes() < end * slot.dtype.itemsize:
                continue
            used.add(place)
            found[source] = _of_storage(storage, slot, offset)
        return found

    def _settle(self, buffer: Tensor) -> None:
        """Move into this arena."""
        self._buffer = buffer
        self._patch(Memory.ARENA, 0, buffer)
        self._table.set_workspace(buffer.data_ptr() + self.plan.workspace_offset)
        self._arena_views = {}

    def leave(self) -> None:
        """Keep nothing of the arena's memory alive; call with its lock held."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._arena_views = {}

    # ---- setting up

    def _rebind(self, rebound: Rebound) -> None:
        """Take over a plan, of which the parts that have not changed are the very objects of the one before."""
        before, plan = self.plan, rebound.plan
        extents: dict[int, Any] = {}
        moved = plan.workspace_offset != before.workspace_offset
        for i, (old, step) in enumerate(zip(before.steps, plan.steps, strict=True)):
            if step is old:
                continue
            if isinstance(step, TorchStep):
                self._segments[self._places[i]] = step
                continue
            assert isinstance(old, NativeStep)
            if step.extents is not old.extents:
                self._table.set_extents(self._places[i], step, extents)
            moved = moved or any(
                a is not b and (a.memory, a.index, a.offset) != (b.memory, b.index, b.offset)
                for a, b in zip(old.tensors, step.tensors, strict=True)
            )
        self.plan = plan
        # Known by the identity of slots, of which some have gone.
        self._arena_views, self._constant_views = {}, {}
        for i, tensor in rebound.constants.items():
            self._given[i] = tensor
        if moved:
            self._table.place([step for step in plan.steps if isinstance(step, NativeStep)])
            self._settle(self._arena.require(plan.arena_bytes))
            for i, tensor in enumerate(self._state_tensors):
                self._patch(Memory.STATE, i, tensor)
        for i in range(len(self._given)) if moved else rebound.constants:
            self._patch(Memory.CONSTANT, i, self._given[i])

    def _assemble(self) -> None:
        rows = 0
        for native, steps in itertools.groupby(enumerate(self.plan.steps), lambda at: isinstance(at[1], NativeStep)):
            found = list(steps)
            if not native:
                for number, step in found:
                    assert isinstance(step, TorchStep)
                    self._places[number] = len(self._segments)
                    self._segments.append(step)
                continue
            self._segments.append((self._table.run(rows, len(found)), found[0][0], len(found)))
            self._places.update((number, rows + i) for i, (number, _) in enumerate(found))
            rows += len(found)

    # ---- running

    def _patch(self, memory: Memory, index: int, tensor: Tensor) -> None:
        self._table.patch(memory, index, tensor.data_ptr())

    def _run_native(self, segment: tuple[Any, int, int]) -> None:
        args, first, _ = segment
        status = self._runner.status(args, self._stream())
        if status:
            step = self.plan.steps[first + (status >> self._step_shift) - 1]
            symbol = step.symbol if isinstance(step, NativeStep) else "?"
            raise self._error(symbol, status & ((1 << self._step_shift) - 1))

    def _stream(self) -> int | None:
        """The CUDA stream to run on."""
        return None

    def _error(self, symbol: str, status: int) -> KernelError:
        """What the status of the kernel ``symbol`` means."""
        if status == INDEX_STATUS:
            return IndexRangeError(f"an index is outside the table that it looks up (kernel {symbol})")
        return KernelError(f"the kernel {symbol} failed with status {status}")

    def _run_torch(self, step: TorchStep, held: dict[tuple[Memory, int], Tensor]) -> None:
        arguments = [self._tensor(slot, held) for slot in step.inputs]
        if step.out is not None:
            step.call(*arguments, self._tensor(step.out, held))
            return
        for slot, result in zip(step.results, step.call(*arguments), strict=True):
            if result.shape != slot.shape or result.dtype != slot.dtype:
                raise ResultError(
                    f"{step.call} returned {result.dtype} {tuple(result.shape)} where the captured model had "
                    f"{slot.dtype} {slot.shape}; the model's behaviour depends on the values of its inputs"
                )
            if result.stride() != slot.strides:
                own = torch.empty_strided(slot.shape, slot.strides, dtype=slot.dtype, device=result.device)
                result = own.copy_(result)
            elif any(_share_memory(result, state) for state in self._state_tensors):
                # A view of a state would change when a later step writes it.
                result = result.clone()
            held[Memory.RESULT, slot.index] = result
            self._patch(Memory.RESULT, slot.index, result)

    def _tensor(self, slot: Slot, held: dict[tuple[Memory, int], Tensor]) -> Tensor:
        if slot.memory is Memory.ARENA:
            view = self._arena_views.get(id(slot))
            if view is None:
                with torch.inference_mode(False):
                    typed = self._buffer[slot.offset : slot.offset + _bytes(slot)].view(slot.dtype)
                    view = self._arena_views[id(slot)] = typed.as_strided(slot.shape, slot.strides)
            return view
        if slot.memory is Memory.CONSTANT:
            view = self._constant_views.get(id(slot))
            if view is None:
                view = self._constant_views[id(slot)] = _strided(self._given[slot.index].detach(), slot)
            return view
        if slot.memory is Memory.STATE:
            return _strided(self._state_tensors[slot.index], slot)
        return _strided(held[slot.memory, slot.index], slot)


def _bytes(slot: Slot) -> int:
    last = sum((size - 1) * stride for size, stride in zip(slot.shape, slot.strides, strict=True))
    return (last + 1) * slot.dtype.itemsize if 0 not in slot.shape else 0


def _with_room(slot: Slot, device: torch.device) -> Tensor:
    """A new tensor with the memory that its outermost strides span."""
    memory = torch.empty(slot.shape[0] * slot.strides[0], dtype=slot.dtype, device=device)
    return _of_storage(memory.untyped_storage(), slot, 0)


def _of_storage(storage: torch.UntypedStorage, slot: Slot, offset: int) -> Tensor:
    """A tensor that is no view of another."""
    made = torch.empty(0, dtype=slot.dtype, device=storage.device)
    return made.set_(storage, offset, slot.shape, slot.strides)


def is_exclusive(tensor: Tensor) -> bool:
    """Whether no other tensor, array or process sees the memory of a tensor that is no view, and nothing but Python's
    names for it the tensor."""
    storage = tensor.untyped_storage()
    # Memory that PyTorch has not allocated itself is not resizable.
    return storage.resizable() and not storage.is_shared() and _users(tensor) == _alone()


def _users(tensor: Tensor) -> tuple[int, ...]:
    """How often a tensor, its storage and the object for that are in use, this function among others."""
    storage = tensor.untyped_storage()
    return (
        tensor._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )


@functools.cache
def _alone() -> tuple[int, ...]:
    """What :func:`_users` is, called by :func:`is_exclusive`, for a tensor that nobody else knows."""
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return _users(tensor) if storage.resizable() else ()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _strided(tensor: Tensor, slot: Slot) -> Tensor:
    if slot.offset == 0 and tensor.shape == slot.shape and tensor.stride() == slot.strides:
        return tensor
    offset = tensor.storage_offset() + slot.offset // slot.dtype.itemsize
    return tensor.as_strided(slot.shape, slot.strides, offset)
