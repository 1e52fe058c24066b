from __future__ import annotations

import contextlib
import errno
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuser.codegen.assemble import runner_source
from fuser.ir.errors import IndexRangeError, KernelError
from fuser.ir.target import Target
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import Kernel, load
from fuser.runtime.program import Arena, Memory, NativeStep, Program, ProgramPlan, Slot, TorchStep

# y = x + c, through the workspace; returns its second extent.
ADD = """
#include "abi.h"
extern "C" int add(const FuserArgs* args, void*) {
  const auto* x = static_cast<const float*>(args->tensors[0]);
  const auto* c = static_cast<const float*>(args->tensors[1]);
  auto* y = static_cast<float*>(args->tensors[2]);
  auto* scratch = static_cast<float*>(args->workspace);
  const auto* extents = static_cast<const int64_t*>(args->extents);
  if (extents[1]) return int(extents[1]);
  for (int64_t i = 0; i < extents[0]; ++i) scratch[i] = x[i];
  for (int64_t i = 0; i < extents[0]; ++i) y[i] = scratch[i] + c[0];
  return 0;
}
"""

# y = the size of its team.
TEAM = """
#include "abi.h"
extern "C" int team(const FuserArgs* args, void*) {
  *static_cast<float*>(args->tensors[0]) = float(args->threads);
  return 0;
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory, target: Target, headers: Path) -> Mapping[str, Kernel]:
    cache = KernelCache(tmp_path_factory.mktemp("kernels"))
    sources = [Source("add", ADD), Source("team", TEAM), runner_source(target)]
    paths = build(sources, target, headers=headers, cache=cache)
    return {symbol: load(path, symbol) for symbol, path in paths.items()}


def slot(memory: Memory, index: int, size: int, offset: int = 0) -> Slot:
    return Slot(memory, index, offset, (size,), (1,), torch.float32)


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2,)


def chain(size: int, status: int = 0, call: Callable[[Tensor], tuple[Tensor, ...]] = double) -> ProgramPlan:
    """(2 (x + c) + c) with the first sum in the arena, the product in PyTorch's memory and the last sum returned."""
    constant = slot(Memory.CONSTANT, 0, 1)
    arena, result, out = slot(Memory.ARENA, 0, size), slot(Memory.RESULT, 0, size), slot(Memory.OUTPUT, 0, size)
    aligned = -(-size * 4 // 64) * 64
    return ProgramPlan(
        steps=(
            NativeStep("add", (slot(Memory.INPUT, 0, size), constant, arena), (size, 0)),
            TorchStep(call, (arena,), (result,)),
            NativeStep("add", (result, constant, out), (size, status)),
        ),
        inputs=(slot(Memory.INPUT, 0, size),),
        outputs=(out,),
        returns=(out,),
        constants=("c",),
        result_count=1,
        arena_bytes=2 * aligned,
        workspace_offset=aligned,
        threads=1,
    )


def expected(x: Tensor, c: float) -> Tensor:
    return 2 * (x + c) + c


def test_steps_run_in_order_over_all_kinds_of_memory(kernels: Mapping[str, Kernel]) -> None:
    program = Program(chain(40), kernels, [torch.tensor([3.0])])
    x = torch.randn(40)
    (first,) = program([x])
    (second,) = program([x + 1])
    assert torch.equal(first, expected(x, 3.0))
    assert torch.equal(second, expected(x + 1, 3.0))


def test_constants_can_be_replaced(kernels: Mapping[str, Kernel]) -> None:
    program = Program(chain(40), kernels, [torch.tensor([3.0])])
    program.set_constants([torch.tensor([5.0])])
    x = torch.randn(40)
    assert torch.equal(program([x])[0], expected(x, 5.0))


def test_programs_share_an_arena_that_grows(kernels: Mapping[str, Kernel]) -> None:
    arena, c = Arena(), torch.tensor([1.0])
    small, large = (Program(chain(size), kernels, [c], arena) for size in (10, 5000))
    for program, size in ((small, 10), (large, 5000), (small, 10), (large, 5000)):
        x = torch.randn(size)
        assert torch.equal(program([x])[0], expected(x, 1.0))
    assert arena.buffer.data_ptr() % 64 == 0
    assert arena.buffer.numel() < 2 * chain(5000).arena_bytes


def test_an_arena_that_grows_a_little_keeps_its_memory() -> None:
    arena = Arena()
    with arena.lock:
        before = arena.require(70_000)
        before.fill_(7)
        after = arena.require(before.numel())
        assert after is before and after.data_ptr() % 64 == 0
        assert arena.require(before.numel() + 1).numel() > before.numel()


@pytest.mark.parametrize("refused", [1, 2])
def test_an_arena_is_as_large_as_it_must_where_no_more_can_be_reserved(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    asked: list[int] = []

    def pages(size: int) -> Tensor:
        asked.append(size)
        if len(asked) <= refused:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr("fuser.runtime.program.pages", pages)
    arena = Arena()
    with arena.lock:
        buffer = arena.require(70_000)
    assert asked == [131_072, 70_000]
    assert 70_000 <= buffer.numel() < 70_100
    buffer.fill_(1)


def test_an_arena_made_in_inference_mode_can_be_written_outside(kernels: Mapping[str, Kernel]) -> None:
    def fill(x: Tensor, out: Tensor) -> None:
        torch.mul(x, 2, out=out)

    arena = slot(Memory.ARENA, 0, 8)
    out = slot(Memory.OUTPUT, 0, 8)
    steps = (
        TorchStep(fill, (slot(Memory.INPUT, 0, 8),), (), out=arena),
        NativeStep("add", (arena, slot(Memory.CONSTANT, 0, 1), out), (8, 0)),
    )
    plan = ProgramPlan(steps, (slot(Memory.INPUT, 0, 8),), (out,), (out,), ("c",), 0, 128, 64, 1)
    program = Program(plan, kernels, [torch.zeros(1)])
    x = torch.randn(8)
    with torch.inference_mode():
        assert torch.equal(program([x])[0], 2 * x)
    assert torch.equal(program([x])[0], 2 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(80)[::2],
        lambda: torch.randn(()).expand(40),
        lambda: torch.randn(50)[3:43],
        lambda: torch._neg_view(torch.randn(40)),
        lambda: torch.randn(40, dtype=torch.complex64).conj().imag,
        lambda: torch.randn(40, requires_grad=True),
    ],
    ids=["strided", "expanded", "offset", "negated", "conjugate", "requires grad"],
)
def test_inputs_in_every_layout(kernels: Mapping[str, Kernel], make: Callable[[], Tensor]) -> None:
    x = make()
    program = Program(chain(40), kernels, [torch.tensor([3.0])])
    assert torch.equal(program([x])[0], expected(x, 3.0))


@pytest.mark.parametrize(("status", "error"), [(1, IndexRangeError), (7, KernelError)])
def test_a_failing_step_is_an_error_and_leaves_the_program_usable(
    kernels: Mapping[str, Kernel], status: int, error: type[Exception]
) -> None:
    arena = Arena()
    program = Program(chain(10, status), kernels, [torch.zeros(1)], arena)
    for _ in range(2):
        with pytest.raises(error, match="kernel add"):
            program([torch.randn(10)])
    x = torch.randn(10)
    assert torch.equal(Program(chain(10), kernels, [torch.zeros(1)], arena)([x])[0], 2 * x)


def test_an_index_error_is_one_of_pythons() -> None:
    assert issubclass(IndexRangeError, IndexError)


def test_a_pytorch_step_with_another_shape_is_an_error(kernels: Mapping[str, Kernel]) -> None:
    program = Program(chain(10, call=lambda x: (x[:3],)), kernels, [torch.zeros(1)])
    with pytest.raises(KernelError, match="depends on the values"):
        program([torch.randn(10)])


def test_an_exception_in_a_step_leaves_the_program_usable(kernels: Mapping[str, Kernel]) -> None:
    fail = [True]

    def sometimes(x: Tensor) -> tuple[Tensor, ...]:
        if fail.pop() if fail else False:
            raise KeyboardInterrupt
        return (x * 2,)

    program = Program(chain(10, call=sometimes), kernels, [torch.zeros(1)])
    x = torch.randn(10)
    with pytest.raises(KeyboardInterrupt):
        program([x])
    assert torch.equal(program([x])[0], 2 * x)


def test_threads_share_programs_and_their_arena(kernels: Mapping[str, Kernel]) -> None:
    arena = Arena()
    programs = {size: Program(chain(size), kernels, [torch.ones(1)], arena) for size in (8, 300, 5000)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(60):
            size = (8, 300, 5000)[(seed + i) % 3]
            x = torch.randn(size, generator=generator)
            if not torch.equal(programs[size]([x])[0], expected(x, 1.0)):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_single_steps_do_what_the_program_does(kernels: Mapping[str, Kernel]) -> None:
    program = Program(chain(40), kernels, [torch.tensor([3.0])])
    x = torch.randn(40)
    with program.stepping([x]) as (steps, results):
        assert len(steps) == 3
        for step in steps:
            step()
        (y,) = results()
    assert torch.equal(y, expected(x, 3.0))


FORK = """
import os, signal, sys
import numpy
import torch
from torch import nn
import fuser

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x):
        return self.linear(torch.cumsum(self.linear(x), 1))

torch.set_num_threads(2)
torch.manual_seed(0)
model = Model().eval()
x = torch.randn(8, 64, 256)
fast = fuser.optimize(model, (x,), search="model")
with torch.no_grad():
    # The team of this thread exists before the fork.
    truth = model(x).numpy()
    ours = fast(x).numpy()
shorter = x[:4]
child = os.fork()
if child == 0:
    signal.alarm(60)
    with torch.no_grad():
        assert numpy.array_equal(fast(x).numpy(), ours)
        assert numpy.allclose(fast(shorter).numpy(), truth[:4], atol=1e-4)
    assert fast.fallbacks == () and len(fast.programs) == 2
    print("child", flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert numpy.array_equal(fast(x).detach().numpy(), ours)
print("status", status)
"""


def test_a_forked_child_runs_and_compiles(python: Callable[..., subprocess.Popen[str]]) -> None:
    process = python(FORK)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["child", "status 0"], errors


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_as_many_calls_run_at_once_as_an_arena_has_lanes(kernels: Mapping[str, Kernel], lanes: int) -> None:
    inside, most, lock = 0, 0, threading.Lock()
    everybody = threading.Barrier(lanes)

    def meet(x: Tensor) -> tuple[Tensor, ...]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        # Nobody gets on before all lanes are taken.
        everybody.wait(120)
        with lock:
            inside -= 1
        return (x * 2,)

    program = Program(chain(8, call=meet), kernels, [torch.ones(1)], Arena(concurrency=lanes))
    results: dict[int, Tensor] = {}

    def work(first: int) -> None:
        for i in range(first, 6 * lanes, lanes):
            results[i] = program([torch.full((8,), float(i))])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert most == lanes and len(results) == 6 * lanes
    assert all(torch.equal(result, torch.full((8,), 2.0 * (i + 1) + 1)) for i, result in results.items())


def of_team(threads: int) -> ProgramPlan:
    """The size of the team that a program runs with."""
    out = slot(Memory.OUTPUT, 0, 1)
    return ProgramPlan((NativeStep("team", (out,), ()),), (), (out,), (out,), (), 0, 0, 0, threads)


@pytest.mark.parametrize(
    ("cores", "threads", "teams"),
    [(8, 8, [8, 4, 2]), (2, 2, [2, 1, 1]), (8, 2, [2, 2, 2]), (2, 8, [8, 4, 2]), (9, 3, [3, 3, 3]), (1, 1, [1, 1, 1])],
)
def test_programs_in_several_lanes_share_the_cores(
    kernels: Mapping[str, Kernel], monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, teams: list[int]
) -> None:
    monkeypatch.setattr("fuser.runtime.program.usable_cores", lambda: cores)
    program = Program(of_team(threads), kernels, [], arena := Arena(concurrency=3))
    with contextlib.ExitStack() as others:
        for team in teams:
            assert program([])[0].item() == team
            others.enter_context(arena.lane())
    assert program([])[0].item() == threads


def test_a_profile_runs_with_the_whole_team(kernels: Mapping[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.runtime.program.usable_cores", lambda: 4)
    program = Program(of_team(4), kernels, [], arena := Arena(concurrency=2))
    _, other = arena._lanes
    with other.lock:
        assert program([])[0].item() == 2
    with program.stepping([]) as (steps, results):
        for step in steps:
            step()
        assert results()[0].item() == 4


def test_a_program_of_a_single_arena_has_its_whole_team(kernels: Mapping[str, Kernel]) -> None:
    assert Program(of_team(64), kernels, [], Arena())([])[0].item() == 64


def test_a_program_is_made_while_another_runs(kernels: Mapping[str, Kernel]) -> None:
    arena = Arena()
    made: list[Program] = []
    with arena.lock:
        maker = threading.Thread(target=lambda: made.append(Program(chain(8), kernels, [torch.ones(1)], arena)))
        maker.start()
        maker.join(60)
        assert made, "it waits for the arena"
    assert torch.equal(made[0]([torch.zeros(8)])[0], torch.full((8,), 3.0))


def test_programs_are_made_while_their_memory_is_released(kernels: Mapping[str, Kernel]) -> None:
    arena, wrong = Arena(), []
    done = threading.Event()

    def make() -> None:
        while not done.is_set():
            try:
                made = [Program(chain(8), kernels, [torch.ones(1)], arena) for _ in range(20)]
                assert torch.equal(made[-1]([torch.zeros(8)])[0], torch.full((8,), 3.0))
            except Exception as error:
                wrong.append(error)
                return

    makers = [threading.Thread(target=make) for _ in range(3)]
    for maker in makers:
        maker.start()
    for size in range(300):
        with arena.lock:
            arena.release()
            arena.require(64 * (size + 1))
    done.set()
    for maker in makers:
        maker.join(60)
    assert wrong == []


def test_replaced_constants_reach_all_lanes(kernels: Mapping[str, Kernel]) -> None:
    arena = Arena(concurrency=2)
    program = Program(chain(8), kernels, [torch.ones(1)], arena)
    for constant in (1.0, 3.0):
        program.set_constants([torch.full((1,), constant)])
        with arena.lock:  # so that the other lane is taken
            (result,) = program([torch.zeros(8)])
        assert torch.equal(result, torch.full((8,), 3.0 * constant))
