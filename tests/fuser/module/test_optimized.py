"""Which of program and original runs, and what the report says of it; times are fed, not taken."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser
from fuser.module.compiler import Compiled
from fuser.module.optimized import OptimizedModule
from fuser.module.policy import AT_ONCE, CompilationPolicy
from fuser.runtime.program import Program

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


class Clock:
    """Seconds that pass only where a test says so; in a slot, where nobody takes them for a setting of the model."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model(nn.Module):
    """Takes ``seconds`` of a clock wherever its Python code runs, which in a program it does not."""

    def __init__(self, clock: Clock, seconds: float = 0.125) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.clock, self.seconds = nn.Linear(32, 32), clock, seconds

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            self.clock.now += self.seconds
        return F.relu(self.linear(x)) * scale


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def optimize(model: nn.Module, clock: Clock, compile_seconds: float = 0.5, dynamic: bool = False) -> OptimizedModule:
    """The model optimized for one shape at a time, with compilations that take ``compile_seconds``."""
    fast = fuser.optimize(model.eval(), search="model", dynamic=dynamic)
    compile_it = fast._engine.compile

    def compiling(*arguments: Any) -> Compiled:
        clock.now += compile_seconds
        return compile_it(*arguments)

    fast._engine.compile, fast._engine.clock = compiling, clock  # type: ignore[method-assign]
    return fast


def same(fast: OptimizedModule, model: nn.Module, *arguments: Any) -> None:
    torch.testing.assert_close(fast(*arguments), model(*arguments))


def test_a_stream_of_shapes_runs_the_original_and_says_so(clock: Clock) -> None:
    model = Model(clock)
    fast = optimize(model, clock)
    for rows in range(1, 14):
        same(fast, model, X[:rows])
    assert len(fast.programs) == AT_ONCE
    assert fast.fallbacks[0] == (
        "(float32 (9, 32)) was called once and took 0.12 s; "
        "it is compiled when that reaches 0.5 s, which compiling takes"
    )
    assert "the original model ran: (float32 (9, 32)) was called once" in fast.report()


def test_a_shape_that_comes_often_is_compiled(clock: Clock) -> None:
    model = Model(clock)
    fast = optimize(model, clock)
    for rows in range(1, AT_ONCE + 1):
        fast(X[:rows])
    for _ in range(4):
        assert len(fast.programs) == AT_ONCE
        same(fast, model, X)
    same(fast, model, X)
    assert len(fast.programs) == AT_ONCE + 1 and fast.fallbacks == ()


def test_example_inputs_compile_whatever_came_before(clock: Clock) -> None:
    fast = fuser.optimize(Model(clock).eval(), (X,), search="model")
    assert len(fast.programs) == 1


def test_another_float_waits(clock: Clock) -> None:
    model = Model(clock)
    fast = optimize(model, clock)
    for scale in (0.5, 0.25, 0.125, 0.5):
        same(fast, model, X, scale)
    assert len(fast.programs) == 1
    assert [reason.split(" was")[0] for reason in fast.fallbacks] == [
        "(float32 (16, 32), 0.25)",
        "(float32 (16, 32), 0.125)",
    ]


def test_what_cannot_be_captured_is_not_tried_for_every_shape(clock: Clock) -> None:
    class Branching(Model):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self.linear(x)

    model = Branching(clock)
    fast = optimize(model, clock, compile_seconds=1.0)
    for rows in range(1, 17):
        same(fast, model, X[:rows])
    compilations = clock.now - 2 * model.seconds * sum(float(X[:rows].sum()) > 0 for rows in range(1, 17))
    assert round(compilations) == 3
    assert fast.programs == () and len(fast.fallbacks) == 1
    # Another kind of call may be captured.
    assert len(fast._engine.policy._failures) == 1


class Unfused(Model):
    """Ten operators that no kernel family runs, around one that some does."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x)
        for _ in range(10):
            y = torch.cumsum(y, 0) / 2
        return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_that_is_slower_gives_way_to_the_original(dynamic: bool, clock: Clock) -> None:
    model = Unfused(clock, seconds=0.001)
    fast = optimize(model, clock, dynamic=dynamic)
    fast(X)
    (compiled,) = fast.programs
    assert compiled.may_be_slower
    run = compiled.program.__call__

    class Slow(Program):
        def __call__(self, inputs: Any) -> list[Tensor]:
            clock.now += 0.002
            return run(inputs)

    compiled.program.__class__ = Slow
    for _ in range(11):
        assert len(fast.programs) == 1
        same(fast, model, X)
    assert fast.programs == () and fast._engine.store.made_bytes == 0
    before = clock.now
    same(fast, model, X)
    assert clock.now == pytest.approx(before + 2 * model.seconds)
    (reason,) = fast.fallbacks
    assert reason.startswith("(float32 (16, 32)) took 2 ms as a program and 1 ms in the original; ")
    assert fast.unfused == (("*", reason),)


def test_a_program_that_is_faster_stays(clock: Clock) -> None:
    model = Unfused(clock)
    fast = optimize(model, clock)
    for _ in range(14):
        same(fast, model, X)
    before = clock.now
    fast(X)
    assert clock.now == before and len(fast.programs) == 1 and fast.fallbacks == ()


def test_what_is_fused_is_never_compared(clock: Clock) -> None:
    model = Model(clock)
    fast = optimize(model, clock)
    fast(X)
    before = clock.now
    for _ in range(20):
        fast(X)
    assert clock.now == before


def test_a_mask_is_not_dropped_while_a_call_waits() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    fast = fuser.optimize(layer, attention=fuser.masks.SlidingWindow(1, 1), search="model")
    fast._engine.policy = CompilationPolicy(at_once=0)
    fast(X[None])
    assert len(fast.programs) == 1 and fast.fallbacks == ()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_that_gave_way_leaves_nothing_behind(dynamic: bool, clock: Clock) -> None:
    fast = optimize(Model(clock), clock, dynamic=dynamic)
    fast._engine.programs.places = 1

    def alive() -> dict[str, int]:
        gc.collect()
        found = [type(o).__name__ for o in gc.get_objects() if isinstance(o, (Compiled, Program, torch.fx.GraphModule))]
        return {name: found.count(name) for name in found}

    fast(X[:2])
    before = alive()
    for rows in range(3, 6):
        fast(X[:rows])
    assert len(fast.programs) == 1
    assert alive() == before
