"""Collections of garbage while a capture or a program is made."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

from fuser.runtime.locks import ForkSafeLock

_lock = ForkSafeLock()
_makers = 0
_frozen = False


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Let collections of garbage look only at objects that are made from now on: to look at all of a process takes as
    long as the trace of a small model. What a process has set aside itself stays so."""
    global _makers, _frozen
    with _lock:
        _makers += 1
        if _makers == 1 and not gc.get_freeze_count():
            gc.freeze()
            _frozen = True
    try:
        yield
    finally:
        with _lock:
            _makers = max(_makers - 1, 0)
        if not _makers:
            bring_back()


def bring_back() -> None:
    """Let collections look at all objects again."""
    global _frozen
    with _lock:
        if _frozen:
            _frozen = False
            gc.unfreeze()


def _after_fork() -> None:
    # Of those that made something only the thread that forked exists in the child.
    global _makers
    _makers = 0
    bring_back()


os.register_at_fork(after_in_child=_after_fork)
