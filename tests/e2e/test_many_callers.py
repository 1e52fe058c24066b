"""Threads that call and compile at once, and compilations that are interrupted."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import Model, X, assert_same, encoder, optimize

pytestmark = pytest.mark.usefixtures("no_grad")


def in_four_threads(work: Callable[[int], None]) -> None:
    """Run ``work`` with 0 to 3, all at once."""
    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_threads_call_and_compile_at_once() -> None:
    model = encoder()
    fast = optimize(model)
    lengths = (3, 7, 12, 16)
    expected = {length: model(X[:, :length]) for length in lengths}
    uncapturable = Model(lambda m, x: m.linear(x) if x.shape[1] == 16 or x.sum() > -1e9 else x)
    other = optimize(uncapturable)
    truth = {length: uncapturable(X[:, :length]) for length in lengths}
    wrong: list[object] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(12):
                length = lengths[(first + i) % 4]
                try:
                    assert_same(fast(X[:, :length]), expected[length])
                    assert_same(other(X[:, :length]), truth[length])
                except Exception as error:
                    wrong.append(error)

    in_four_threads(work)
    assert wrong == []
    assert len(fast.programs) == 4


def test_calls_run_at_once_when_asked() -> None:
    model = encoder()
    fast = optimize(model, concurrency=3)
    inputs = [X[:, :length] for length in (16, 5, 12)]
    expected = [model(x) for x in inputs]
    wrong: list[object] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(first, first + 30):
                try:
                    assert_same(fast(inputs[i % 3]), expected[i % 3])
                except Exception as error:
                    wrong.append(error)

    in_four_threads(work)
    assert wrong == []
    # Weights that change reach every lane.
    model.layers[0].norm1.weight.mul_(2)
    assert_same(fast(X), model(X))


def test_what_runs_beside_others_gives_the_same_bits() -> None:
    model = encoder()
    fast = optimize(model, concurrency=4)
    alone = fast(X)
    arena = fast._engine._states_of(X.device).arena
    with contextlib.ExitStack() as others:
        for _ in range(3):
            others.enter_context(arena.lane())
            assert torch.equal(fast(X), alone)


@pytest.mark.parametrize(("cores", "lanes"), [(1, 1), (2, 2), (64, 4)])
def test_as_many_calls_run_at_once_as_there_are_cores_and_at_most_four(
    monkeypatch: pytest.MonkeyPatch, cores: int, lanes: int
) -> None:
    monkeypatch.setattr("fuser.runtime.cuda_program.usable_cores", lambda: cores)
    fast = optimize(encoder())
    arena = fast._engine._states_of(X.device).arena
    with contextlib.ExitStack() as taken:
        held = {id(taken.enter_context(arena.lane())) for _ in range(lanes)}
        assert len(held) == lanes and all(lane.lock.taken() for lane in arena._lanes)


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "2"])
def test_a_concurrency_that_is_no_positive_number_is_refused(concurrency: Any) -> None:
    with pytest.raises(ValueError, match="positive number of calls"):
        optimize(encoder(), concurrency=concurrency)


def test_another_number_of_threads_is_followed() -> None:
    model = encoder()
    fast = optimize(model)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            assert_same(fast(X), model(X))
    finally:
        torch.set_num_threads(before)
    assert len(fast.programs) == 3
    assert len({id(compiled.captured) for compiled in fast.programs}) == 1


def test_forks_beside_compilations_and_garbage_collection() -> None:
    model = encoder()
    fast = optimize(model)
    expected = model(X)
    done = threading.Event()

    def compile_again() -> None:
        with torch.no_grad():
            while not done.is_set():
                fast.refresh()
                fast(X)

    compiling = threading.Thread(target=compile_again)
    compiling.start()
    try:
        codes = []
        for i in range(6):
            gc.collect(i % 3)
            pid = os.fork()
            if pid == 0:
                os._exit(_wrong_in_a_child(model, fast, expected, compiles=i == 3))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        done.set()
        compiling.join()
    assert codes == [0] * 6
    assert_same(fast(X), expected)


def _wrong_in_a_child(model: Any, fast: Any, expected: Any, compiles: bool) -> int:
    # A child has one thread; a deadlock is to be seen as one.
    signal.alarm(60)
    torch.set_num_threads(1)
    try:
        gc.collect()
        assert_same(model(X), expected)
        if compiles:
            fast.refresh()
        if compiles or fast.programs:
            assert_same(fast(X), expected)
        return int(not all(p.data_ptr() for p in fast.parameters()))
    except BaseException:
        return 2


def test_an_interrupted_compilation_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    fast = optimize(model)
    identities = [id(p) for p in model.parameters()]
    from fuser.module import forms

    for stage in ("capture", "raise_graph", "assemble", "load_kernels", "program_of"):

        def interrupt(*args: Any, **kwargs: Any) -> Any:
            # A callback of the garbage collector would swallow the interrupt.
            gc.disable()
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the signal comes first")

        with monkeypatch.context() as patch:
            patch.setattr(forms, stage, interrupt)
            with pytest.raises(KeyboardInterrupt):
                fast(X)
            gc.enable()
        assert [id(p) for p in model.parameters()] == identities
        assert torch.backends.mha.get_fastpath_enabled()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1 and fast.fallbacks == ()
