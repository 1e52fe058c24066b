"""Programs on a GPU, with a GPU that is made of Python: streams, captures, replays, memory and errors that arrive late.

Kernels of the fake GPU see what kernels of a real one see: the arguments by value at the time of the launch. A capture
keeps these, and a replay runs them again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser.ir.errors import DeviceMemoryError, FuserError, IndexRangeError, KernelError
from fuser.runtime import cuda, cuda_program
from fuser.runtime.abi import KernelArgs, Step
from fuser.runtime.cuda_program import CudaProgram, DeviceArena, program_of
from fuser.runtime.program import CPU, RUNNER, Memory, NativeStep, ProgramPlan, Slot, TorchStep

Launch = Callable[[], None]


@dataclass(eq=False)
class FakeStream:
    cuda_stream: int
    waited_for: list[FakeStream] = field(default_factory=list)

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


class FakeGpu:
    """What of PyTorch's CUDA a program uses. Launches run at once, unless they are captured."""

    def __init__(self) -> None:
        self.stream = FakeStream(0x10)
        self.capturing: list[Launch] | None = None
        self.outer_capture = False
        self.launches: list[int | None] = []
        self.written: list[int] = []
        self.captures = self.replays = self.synchronizations = 0
        self.status = 0
        self.devices: list[Any] = []
        self.refuse_capture = False

    def launch(self, work: Launch, stream: int | None) -> None:
        self.launches.append(stream)
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            work()

    # ---- torch.cuda

    def is_current_stream_capturing(self) -> bool:
        return self.capturing is not None or self.outer_capture

    def synchronize(self, device: Any = None) -> None:
        assert not self.is_current_stream_capturing(), "a capture must not synchronize"
        self.synchronizations += 1

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.devices.append(device)
        yield

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.captures += 1
        self.capturing = []
        try:
            yield
            graph.work = self.capturing
        finally:
            self.capturing = None
        if self.refuse_capture:
            raise RuntimeError("operation not permitted when stream is capturing")


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.work: list[Launch] = []

    def replay(self) -> None:
        self.gpu.replays += 1
        for work in self.work:
            work()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    for name in ("is_current_stream_capturing", "synchronize", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(fake))
    monkeypatch.delenv("FUSER_CUDA_GRAPHS", raising=False)
    return fake


def floats(address: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(address)


def integer(address: int | None) -> int:
    return ctypes.c_int64.from_address(address or 0).value


class Runner:
    """The step runner and the one kernel there is: y = x + c, for extents[0] numbers."""

    path = Path("fake")

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.address = 1

    def status(self, args: KernelArgs, stream: int | None = None) -> int:
        steps = ctypes.cast(args.tensors[0], ctypes.POINTER(Step))
        for i in range(integer(args.extents)):
            given = steps[i].args.contents
            x, c, y = (given.tensors[j] for j in range(3))
            self.gpu.written.append(y or 0)
            self.gpu.launch(self.addition(x or 0, c or 0, y or 0, integer(given.extents), given.status), stream)
            if self.gpu.status:
                return (i + 1) << 16 | self.gpu.status
        return 0

    @staticmethod
    def addition(x: int, c: int, y: int, count: int, status: int) -> Launch:
        def work() -> None:
            for i, value in enumerate(floats(x, count)):
                floats(y, count)[i] = value + floats(c, 1)[0]
                if value == 13.0:
                    ctypes.c_int32.from_address(status).value = 1

        return work


def slot(memory: Memory, index: int, size: int) -> Slot:
    return Slot(memory, index, 0, (size,), (1,), torch.float32)


def plan(size: int = 6, between: Callable[[Tensor], tuple[Tensor, ...]] | None = None) -> ProgramPlan:
    """(x + c) + c by way of the arena; with ``between``, PyTorch works on the sum in the middle."""
    x, c, out = slot(Memory.INPUT, 0, size), slot(Memory.CONSTANT, 0, 1), slot(Memory.OUTPUT, 0, size)
    middle = slot(Memory.ARENA, 0, size)
    result = slot(Memory.RESULT, 0, size)
    steps: list[NativeStep | TorchStep] = [NativeStep("add", (x, c, middle), (size,))]
    if between is not None:
        steps.append(TorchStep(between, (middle,), (result,)))
    steps.append(NativeStep("add", (middle if between is None else result, c, out), (size,)))
    return ProgramPlan(tuple(steps), (x,), (out,), (out,), ("c",), int(between is not None), 4 * size, 4 * size, 7)


Made = Callable[..., CudaProgram]


@pytest.fixture
def make(gpu: FakeGpu) -> Made:
    runner: Any = Runner(gpu)

    def made(given: ProgramPlan | None = None, arena: DeviceArena | None = None, graphs: bool = True) -> CudaProgram:
        kernels = {RUNNER: runner, "add": runner}
        return CudaProgram(given or plan(), kernels, [torch.tensor([1.0])], arena or DeviceArena(CPU), graphs)

    return made


def numbers(start: float, size: int = 6) -> Tensor:
    return torch.arange(size).float() * 0.5 + start


def test_the_second_call_captures_and_later_ones_replay(gpu: FakeGpu, make: Made) -> None:
    program = make()
    kept = []
    for call in range(4):
        # Other memory in every call.
        x = numbers(call * 100)
        (out,) = program([x])
        assert torch.equal(out, x + 2)
        kept.append((x, out))
        assert (gpu.captures, gpu.replays) == (min(call, 1), call)
    # Every call has results of its own.
    assert all(torch.equal(out, x + 2) for x, out in kept)
    assert len({out.data_ptr() for _, out in kept}) == 4


def counting() -> ProgramPlan:
    """A state that every call adds the constant to, and what it is with the constant added once more."""
    state, c, out = slot(Memory.STATE, 0, 6), slot(Memory.CONSTANT, 0, 1), slot(Memory.OUTPUT, 0, 6)
    steps = (NativeStep("add", (state, c, state), (6,)), NativeStep("add", (state, c, out), (6,)))
    return ProgramPlan(steps, (), (out,), (out,), ("c",), 0, 0, 0, 7, states={"count": state})


def test_captured_and_replayed_calls_each_write_a_state_once(gpu: FakeGpu, make: Made) -> None:
    program = make(counting())
    for call in range(1, 5):
        (out,) = program([])
        assert out.tolist() == [call + 1.0] * 6 and program.states["count"].tolist() == [float(call)] * 6
    assert (gpu.captures, gpu.replays) == (1, 3)
    program.states.reset()
    assert program([])[0].tolist() == [2.0] * 6
    assert (gpu.captures, gpu.replays) == (1, 4)


def test_a_reset_waits_for_the_stream_of_the_last_call(gpu: FakeGpu, make: Made) -> None:
    program, first = make(counting(), graphs=False), gpu.stream
    program([])
    gpu.stream = FakeStream(0x99)
    program.states.reset()
    assert gpu.stream.waited_for == [first]


def test_kernels_run_on_the_current_stream_of_the_right_device(gpu: FakeGpu, make: Made) -> None:
    program = make(graphs=False)
    program([numbers(0)])
    gpu.stream = FakeStream(0x99)
    program([numbers(0)])
    assert gpu.launches == [0x10, 0x10, 0x99, 0x99]
    assert set(gpu.devices) == {program.device}
    assert gpu.captures == 0


def test_streams_that_share_an_arena_wait_for_each_other(gpu: FakeGpu, make: Made) -> None:
    program, first = make(graphs=False), gpu.stream
    recorded: list[Any] = []
    program([numbers(0)])
    gpu.stream = FakeStream(0x99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
        program([numbers(0)])
    assert gpu.stream.waited_for == [first] and recorded == [gpu.stream]


@pytest.fixture(autouse=True)
def _record(monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory of the CPU knows no streams.
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)


def test_transposed_negated_and_inference_inputs(make: Made) -> None:
    program = make()
    for _ in range(3):
        x = torch.arange(12).float().view(6, 2)[:, 1]
        assert torch.equal(program([x])[0], x + 2)
        negated = torch._neg_view(numbers(3))
        assert torch.equal(program([negated])[0], negated + 2)
        with torch.inference_mode():
            assert torch.equal(program([numbers(5)])[0], numbers(5) + 2)


def test_new_constants_are_captured_anew(gpu: FakeGpu, make: Made) -> None:
    program = make()
    for _ in range(3):
        program([numbers(0)])
    before = gpu.synchronizations
    program.set_constants([torch.tensor([10.0])])
    assert gpu.synchronizations > before
    assert torch.equal(program([numbers(0)])[0], numbers(0) + 20)
    assert gpu.captures == 2


def test_an_arena_that_grew_is_captured_anew(gpu: FakeGpu, make: Made) -> None:
    arena = DeviceArena(CPU)
    small, large = make(plan(6), arena), make(plan(4000), arena)
    for _ in range(3):
        assert torch.equal(small([numbers(0)])[0], numbers(0) + 2)
    large([numbers(0, 4000)])
    # Nothing holds on to the memory that the arena had.
    assert small._buffer.numel() == 0 and small._graph is None
    assert torch.equal(small([numbers(1)])[0], numbers(1) + 2)
    assert gpu.captures == 2


def test_a_program_that_is_made_beside_a_capture_lets_memory_go_later(gpu: FakeGpu, make: Made) -> None:
    arena = DeviceArena(CPU)
    before = make(plan(6), arena)
    with arena.lock, arena.aside():
        made = make(plan(6), arena)
    assert set(arena.programs) == {before, made}


def test_opting_out(gpu: FakeGpu, make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CUDA_GRAPHS", "0")
    programs = [make()]
    monkeypatch.delenv("FUSER_CUDA_GRAPHS")
    programs.append(make(graphs=False))
    monkeypatch.setattr(cuda_program, "GRAPH_BYTES", 47)
    programs.append(make())
    for program in programs:
        for _ in range(3):
            assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)
    assert gpu.captures == 0


@pytest.mark.parametrize("graphs", [True, False])
def test_inside_of_a_capture_of_the_caller_kernels_are_only_launched(gpu: FakeGpu, make: Made, graphs: bool) -> None:
    """In memory that the arena's other work, growth and release do not touch."""
    program = make(graphs=graphs)
    for _ in range(3):
        program([numbers(0)])
    captures, buffer = gpu.captures, program._arena.buffer
    gpu.outer_capture = True
    gpu.stream = FakeStream(0x77)
    gpu.written.clear()
    assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)
    assert gpu.captures == captures and gpu.stream.waited_for == [] and gpu.launches[-1] == 0x77
    assert not any(buffer.data_ptr() <= y < buffer.data_ptr() + buffer.numel() for y in gpu.written)
    gpu.outer_capture = False
    # The program and its own graph are what they were.
    assert program._arena.buffer is buffer
    assert torch.equal(program([numbers(1)])[0], numbers(1) + 2)
    assert gpu.captures == captures


def test_without_memory_a_capture_of_the_caller_leaves_the_arena(gpu: FakeGpu, make: Made) -> None:
    program = make()
    for _ in range(2):
        program([numbers(0)])
    buffer, gpu.outer_capture = program._arena.buffer, True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_strided", full)
        with pytest.raises(DeviceMemoryError):
            program([numbers(0)])
    gpu.outer_capture = False
    assert program._arena.buffer is buffer
    assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)


def full(*size: Any, **options: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("what", ["arena", "results", "capture"])
def test_without_memory_for_the_program_itself(what: str, gpu: FakeGpu, make: Made) -> None:
    arena = DeviceArena(CPU)
    program, other = make(arena=arena), make(arena=arena)
    if what != "arena":
        program([numbers(0)])
    if what == "results":
        program([numbers(0)])
    with pytest.MonkeyPatch.context() as patch:
        if what == "arena":
            patch.setattr(arena, "buffer", torch.empty(0, dtype=torch.uint8))
            empty = torch.empty
            patch.setattr(torch, "empty", lambda size, **options: full() if size else empty(size, **options))
        else:
            patch.setattr(torch, "empty_strided", full)
        with pytest.raises(DeviceMemoryError, match="smaller batches"):
            program([numbers(0)])
    assert arena.buffer.numel() == 0 and program._graph is None
    for one in (program, other):
        assert torch.equal(one([numbers(0)])[0], numbers(0) + 2)


def test_what_cannot_be_captured_runs_kernel_by_kernel(gpu: FakeGpu, make: Made) -> None:
    program = make()
    gpu.refuse_capture = True
    for _ in range(4):
        assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)
    assert gpu.captures == 1 and gpu.replays == 0
    assert "not permitted" in program.graph_error


def test_without_memory_the_arena_is_given_back(make: Made) -> None:
    full = True

    def between(x: Tensor) -> tuple[Tensor, ...]:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return (x * 1,)

    program = make(plan(6, between), graphs=False)
    with pytest.raises(DeviceMemoryError, match=r"smaller batches.*2\.00 GiB") as caught:
        program([numbers(0)])
    assert isinstance(caught.value, MemoryError)
    assert program._arena.buffer.numel() == 0 and program._buffer.numel() == 0
    full = False
    assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)


def test_an_index_outside_its_table_is_raised_by_the_next_call(make: Made) -> None:
    for graphs in (False, True):
        program = make(graphs=graphs)
        program([numbers(0)])
        program([torch.full((6,), 13.0)])
        with pytest.raises(IndexRangeError, match="in an earlier call"):
            program([numbers(0)])
        assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)


@pytest.mark.parametrize(
    ("status", "message"),
    [(1035, "driver is missing or older"), (1209, "another architecture"), (2, "smaller batches"), (1002, "memory")],
)
def test_failed_launches_say_why(status: int, message: str, gpu: FakeGpu, make: Made) -> None:
    program = make()
    gpu.status = status
    with pytest.raises(KernelError, match=message) as caught:
        program([numbers(0)])
    assert "add" in str(caught.value)
    gpu.status = 0
    assert torch.equal(program([numbers(0)])[0], numbers(0) + 2)


def test_single_steps_for_profiles(gpu: FakeGpu, make: Made) -> None:
    program = make()
    before = gpu.synchronizations
    with program.stepping([numbers(0)]) as (steps, results):
        for step in steps:
            step()
        assert torch.equal(results()[0], numbers(0) + 2)
    assert len(steps) == 2 and gpu.synchronizations == before + 2


def test_a_target_chooses_its_program(make: Made, gpu: FakeGpu) -> None:
    from fuser.ir.target import cuda_target, emulated_target

    runner: Any = Runner(gpu)
    kernels = {RUNNER: runner, "add": runner}
    constants = [torch.tensor([1.0])]
    found = program_of(plan(), kernels, constants, cuda_target("sm_80"), DeviceArena(CPU), graphs=False)
    assert isinstance(found, CudaProgram) and not found._graphs
    emulated = program_of(plan(), kernels, constants, emulated_target(), cuda_program.arena_of(CPU))
    with pytest.raises(IndexRangeError) as caught:
        emulated([torch.full((6,), 13.0)])
    assert "earlier" not in str(caught.value)


# ---- devices


def test_no_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(FuserError, match="has no CUDA"):
        cuda.resolve_device(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "driver_version", lambda: None)
    with pytest.raises(FuserError, match="no NVIDIA driver"):
        cuda.resolve_device(torch.device("cuda"))
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 4))
    with pytest.raises(FuserError, match=r"too old: it runs CUDA up to 12\.4, .* CUDA 13\.0"):
        cuda.resolve_device(torch.device("cuda"))
    monkeypatch.setattr(cuda, "driver_version", lambda: (13, 0))
    with pytest.raises(FuserError, match="CUDA_VISIBLE_DEVICES"):
        cuda.resolve_device(torch.device("cuda"))


@dataclass
class Properties:
    name: str = "Fake H200"
    multi_processor_count: int = 132
    L2_cache_size: int = 60 << 20
    shared_memory_per_block_optin: int = 227 << 10


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._cached_target.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())


def test_a_gpu_is_measured_once(machine: None, monkeypatch: pytest.MonkeyPatch, cache: Any) -> None:
    measured = []

    def measure(device: torch.device) -> cuda.GpuRates:
        measured.append(device)
        return cuda.GpuRates(66e12, 800e12, 4.3e12)

    monkeypatch.setattr(cuda, "measure", measure)
    for _ in range(2):
        found = cuda.gpu_target(torch.device("cuda"), cache=cache)
        cuda._cached_target.cache_clear()
    assert measured == [torch.device("cuda", 1)]
    assert (found.arch, found.cores, found.bandwidth) == ("sm_90a", 132, 4.3e12)
    assert found.peak_flops * 132 == pytest.approx(66e12) and found.tensor_flops * 132 == pytest.approx(800e12)
    assert found.cache_bytes[1] == 60 << 20 and found.shared_bytes == 227 << 10


def test_a_gpu_that_cannot_be_measured_has_its_data_sheet(
    machine: None, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    def measure(device: torch.device) -> cuda.GpuRates:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(cuda, "measure", measure)
    assert cuda.gpu_target(torch.device("cuda", 0), cache=cache).bandwidth > 3e12


def test_devices_that_are_not_there_or_not_known(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FuserError, match="sees 2 GPUs"):
        cuda.resolve_device(torch.device("cuda", 2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(FuserError, match="sm_75"):
        cuda.gpu_target(torch.device("cuda", 0))
