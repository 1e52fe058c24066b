"""Locks that a forked child can take, whatever the threads of its parent were doing."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Any

_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


class ForkSafeLock:
    """A ``threading.Lock`` that is free in a forked child unless the thread that forked holds it.

    Of a parent's threads only the one that forks exists in the child, so nobody there would release what another held.
    What such a lock guards must bear that its holder vanished: write new values first, then the reference to them.
    """

    def __init__(self) -> None:
        self._lock = self._make()
        self._owner: int | None = None
        self._depth = 0
        _locks.add(self)

    def _make(self) -> Any:
        return threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; False if it could not be had in time."""
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner = threading.get_ident()
        self._depth += 1
        return True

    def release(self) -> None:
        """Give the lock back. Raises RuntimeError unless the calling thread holds it."""
        if not self.held():
            raise RuntimeError("release of a lock that this thread does not hold")
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def held(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def taken(self) -> bool:
        """Whether any thread holds the lock."""
        return self._owner is not None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _after_fork(self) -> None:
        if not self.held():
            self._lock, self._owner, self._depth = self._make(), None, 0


class ForkSafeRLock(ForkSafeLock):
    """A ``threading.RLock``, which its holder may take again, with the same promise."""

    def _make(self) -> Any:
        return threading.RLock()


def _free_all() -> None:
    for lock in list(_locks):
        lock._after_fork()


os.register_at_fork(after_in_child=_free_all)
