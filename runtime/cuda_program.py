"""Programs of CUDA kernels: on the current stream of their GPU, as a CUDA graph where that pays, and by the emulator.

Kernels run asynchronously. What they find wrong (an index outside its table) they write to a word in pinned memory, and
the next call raises it; the rows concerned are NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.ir.errors import DeviceMemoryError, IndexRangeError, KernelError
from fuser.ir.target import Target
from fuser.runtime import cuda
from fuser.runtime.cpuinfo import usable_cores
from fuser.runtime.library import Kernel
from fuser.runtime.program import INDEX_STATUS, Arena, Memory, Program, ProgramPlan, Rebound, States, aligned

logger = logging.getLogger("fuser")
GRAPH_BYTES = 64 << 20
"""Inputs and outputs of a graph are copied to and from its memory; above this, launches cost less than copies."""
_UNSUPPORTED_STATUS = 2
_INDEX_MESSAGE = "an index is outside the table that it looks up"
Held = dict[tuple[Memory, int], Tensor]


_AT_ONCE = 4
"""Programs that a CPU runs at a time where nobody says how many: each more of them has an arena of its own."""


def arena_of(device: torch.device, concurrency: int | None = None) -> Arena:
    """An arena for programs on ``device``, of which a CPU may run ``concurrency`` at a time (default: one for each
    core, and at most four)."""
    if device.type == "cuda":
        return DeviceArena(device)
    return Arena(device, concurrency or min(usable_cores(), _AT_ONCE))


def program_of(
    plan: ProgramPlan,
    kernels: Mapping[str, Kernel],
    constants: Sequence[Tensor],
    target: Target,
    arena: Arena,
    graphs: bool = True,
    states: States | None = None,
) -> Program:
    """The program of ``plan`` for ``target``, in the memory of ``arena``, with ``states`` of that arena (default: some
    of its own); ``graphs``: whether it may become a CUDA graph."""
    if target.kind != "cuda":
        return Program(plan, kernels, constants, arena, states)
    if target.emulated:
        return EmulatedProgram(plan, kernels, constants, arena, states)
    return CudaProgram(plan, kernels, constants, arena, graphs, states)


def graphs_wanted() -> bool:
    """Whether programs may become CUDA graphs: unless ``FUSER_CUDA_GRAPHS`` is ``0``."""
    return os.environ.get("FUSER_CUDA_GRAPHS", "1") != "0"


class _KernelProgram(Program):
    """What programs of CUDA kernels have in common: a word for errors that arrive late."""

    _step_shift = 16
    _concurrent = False

    def __init__(
        self,
        plan: ProgramPlan,
        kernels: Mapping[str, Kernel],
        constants: Sequence[Tensor],
        arena: Arena,
        states: States | None = None,
    ) -> None:
        with torch.inference_mode(False):
            # Pinned memory has one address for the CPU and the GPU.
            self._word = torch.zeros(1, dtype=torch.int32, pin_memory=arena.device.type == "cuda")
        self._late = ctypes.c_int32.from_address(self._word.data_ptr())
        super().__init__(plan, kernels, constants, arena, states, status=self._word.data_ptr())

    def _raise_late(self, when: str = "") -> None:
        """Raise what kernels have reported since the last time."""
        status, self._late.value = self._late.value, 0
        if status:
            if status == INDEX_STATUS:
                raise IndexRangeError(_INDEX_MESSAGE + when)
            raise KernelError(f"a kernel reported status {status}{when}")

    def _error(self, symbol: str, status: int) -> KernelError:
        if status >= cuda.CUDA_ERROR:
            return cuda.kernel_error(symbol, status)
        if status == _UNSUPPORTED_STATUS:
            return KernelError(
                f"the kernel {symbol} cannot run tensors as large as these (status {status}): a grid has at most 2^31 "
                "blocks, and rows of attention are at most 2^28 elements apart; use smaller batches"
            )
        return super()._error(symbol, status)


class EmulatedProgram(_KernelProgram):
    """CUDA kernels on the CPU; errors arrive at once."""

    def _run(self, inputs: Sequence[Tensor], rebound: Rebound | None = None) -> list[Tensor]:
        results = super()._run(inputs, rebound)
        self._raise_late()
        return results

    def _error(self, symbol: str, status: int) -> KernelError:
        from fuser.runtime import emulator

        if status == emulator.FAULT_STATUS:
            return emulator.fault(self.kernels[symbol].path, symbol)
        return super()._error(symbol, status)


class DeviceArena(Arena):
    """Memory on a GPU. Work of several streams in it runs in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream: torch.cuda.Stream | None = None

    def join(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
        self._record()

    def _room(self, size: int) -> Tensor:
        return aligned(size, self.device)

    def require(self, size: int) -> Tensor:
        before = self.buffer
        if super().require(size) is not before:
            self._record()
        return self.buffer

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While this lasts, memory comes from a place of its own and nothing is released; call with the lock held.

        A graph that the caller captures may be replayed at any time, also when this arena has other work or is gone.
        What it is given meanwhile, PyTorch keeps for it.
        """
        buffer, programs = self.buffer, self.programs
        with self._counting:
            self.buffer, self.programs = torch.empty(0, dtype=torch.uint8), weakref.WeakSet()
        try:
            yield
        finally:
            with self._counting:
                # Those that were made meanwhile.
                programs.update(self.programs)
                self.buffer, self.programs = buffer, programs

    def _record(self) -> None:
        # When the memory is given back, the allocator must not hand it on before this stream is done with it.
        if self._stream is not None and self.buffer.numel() and not torch.cuda.is_current_stream_capturing():
            self.buffer.record_stream(self._stream)


@dataclass(frozen=True)
class _Graph:
    """A captured run and the memory of its inputs and results."""

    graph: Any
    inputs: tuple[Tensor, ...]
    held: Held


class CudaProgram(_KernelProgram):
    """A program on a GPU.

    It runs on PyTorch's current stream, on its own device whichever is current. From the second call on it is a CUDA
    graph, replayed on copies of the inputs, unless ``FUSER_CUDA_GRAPHS=0``, the inputs and outputs are large, or what
    PyTorch does between the kernels cannot be captured. Inside of a capture that the caller has begun it only launches,
    in memory of that graph.
    """

    def __init__(
        self,
        plan: ProgramPlan,
        kernels: Mapping[str, Kernel],
        constants: Sequence[Tensor],
        arena: Arena,
        graphs: bool = True,
        states: States | None = None,
    ) -> None:
        self._graph: _Graph | None = None
        self._calls = 0
        self._graphs = graphs and graphs_wanted() and _copied_bytes(plan) <= GRAPH_BYTES
        self.graph_error = ""
        """Why the program is not a CUDA graph although it might be."""
        with torch.cuda.device(arena.device):
            super().__init__(plan, kernels, constants, arena, states)

    def set_constants(self, constants: Sequence[Tensor]) -> None:
        # The old ones may still be read, and the new ones be on their way, on any stream.
        self._drop_graph()
        torch.cuda.synchronize(self.device)
        super().set_constants(constants)

    def leave(self) -> None:
        self._drop_graph()
        super().leave()

    def _drop_graph(self) -> None:
        if self._graph is not None:
            # Its memory must not be handed on while it runs.
            torch.cuda.synchronize(self.device)
            self._graph = None

    def _run(self, inputs: Sequence[Tensor], rebound: Rebound | None = None) -> list[Tensor]:
        if rebound is not None:
            raise ValueError("plans of programs on GPUs are bound once")
        with self._arena.lock, self._running():
            self._raise_late(" (in an earlier call)")
            if torch.cuda.is_current_stream_capturing():
                return self._launched_aside(inputs)
            return self._replayed(inputs) if self._graphs else self._launched(inputs)

    @contextlib.contextmanager
    def stepping(
        self, inputs: Sequence[Tensor]
    ) -> Iterator[tuple[list[Callable[[], None]], Callable[[], list[Tensor]]]]:
        with self._running(), super().stepping(inputs) as (steps, results):
            yield [functools.partial(self._finished, step) for step in steps], results

    def _finished(self, step: Callable[[], None]) -> None:
        step()
        torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """With this program's device current, after what other streams do in the arena; without memory, release it."""
        arena = self._arena
        with torch.cuda.device(self.device):
            try:
                arena.join()
                yield
            except torch.OutOfMemoryError as error:
                if not torch.cuda.is_current_stream_capturing():
                    arena.release()
                raise DeviceMemoryError(
                    f"{self.device} has not enough free memory: this call needs {self.plan.arena_bytes >> 20} MiB for "
                    f"intermediate results beside its inputs and outputs; use smaller batches, or free memory ({error})"
                ) from error

    def _launched(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        held = self._bind(inputs)
        self._execute(held)
        return self._results(held, inputs)

    def _launched_aside(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            if isinstance(self._arena, DeviceArena):
                stack.enter_context(self._arena.aside())
            # The next call must move back.
            stack.callback(super().leave)
            return self._launched(inputs)

    # ---- graphs

    def _replayed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._calls += 1
        self._arena.require(self.plan.arena_bytes)
        if self._graph is None and self._calls > 1:
            self._graph = self._captured(inputs)
        if self._graph is None:
            # The first call loads kernels and makes libraries allocate, neither of which a capture may do.
            return self._launched(inputs)
        held: Held = {}
        for i, (own, given) in enumerate(zip(self._graph.inputs, inputs, strict=True)):
            held[Memory.INPUT, i] = given.detach().resolve_neg().contiguous()
            own.copy_(held[Memory.INPUT, i], non_blocking=True)
        self._graph.graph.replay()
        for slot in self.plan.returns:
            key = (slot.memory, slot.index)
            if key in self._graph.held and key not in held:
                source = self._graph.held[key]
                fresh = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=source.device)
                held[key] = fresh.copy_(source, non_blocking=True)
        return self._results(held, inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> _Graph | None:
        try:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                own = tuple(t.detach().resolve_neg().clone(memory_format=torch.contiguous_format) for t in inputs)
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using the GPU.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    held = self._bind(own)
                    self._execute(held)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KernelError) as error:
            self._graphs = False
            self.graph_error = str(error)
            logger.info("the program runs kernel by kernel, since it cannot be captured as a CUDA graph: %s", error)
            return None
        return _Graph(graph, own, held)

    def _stream(self) -> int | None:
        return int(torch.cuda.current_stream(self.device).cuda_stream)


def _copied_bytes(plan: ProgramPlan) -> int:
    """Bytes that a graph copies in and out."""
    total = 0
    for slot in (*plan.inputs, *plan.outputs):
        size = 1
        for extent in slot.shape:
            size *= extent
        total += size * slot.dtype.itemsize
    return total
