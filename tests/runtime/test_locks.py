"""Locks across a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from fuser.runtime.locks import ForkSafeLock, ForkSafeRLock

KINDS = pytest.mark.parametrize("kind", [ForkSafeLock, ForkSafeRLock])


def _in_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@KINDS
def test_a_child_can_take_a_lock_that_another_thread_held_at_the_fork(kind: type[ForkSafeLock]) -> None:
    lock, taken, done = kind(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(30)
    try:
        assert lock.taken() and not lock.held()
        assert _in_child(lambda: not lock.taken() and lock.acquire(timeout=5) and lock.held() and lock.taken())
        assert not lock.acquire(blocking=False), "the parent's thread still holds it"
    finally:
        done.set()
        holder.join()
    assert lock.acquire(timeout=5)


@KINDS
def test_the_thread_that_forks_keeps_what_it_holds_and_can_release_it(kind: type[ForkSafeLock]) -> None:
    lock = kind()

    def excluded() -> bool:
        found = []
        thread = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        return found == [False]

    def check() -> bool:
        outside = excluded()
        lock.release()
        return outside and not lock.held() and lock.acquire(timeout=5)

    with lock:
        assert _in_child(check)
    assert not lock.held()


def test_only_the_reentrant_lock_is_taken_twice_and_is_free_after_as_many_releases() -> None:
    plain, again = ForkSafeLock(), ForkSafeRLock()
    with plain:
        assert not plain.acquire(blocking=False)
    with again, again:
        assert again.held()
    assert not again.held()
    for lock in (plain, again):
        with pytest.raises(RuntimeError):
            lock.release()


@KINDS
def test_only_one_thread_at_a_time_is_inside(kind: type[ForkSafeLock]) -> None:
    lock, inside, most = kind(), [0], [0]

    def work() -> None:
        for _ in range(2000):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == ([0], [1])
