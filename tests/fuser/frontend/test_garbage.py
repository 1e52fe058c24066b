"""What collections of garbage look at while something is made."""

from __future__ import annotations

import gc
import threading

import pytest

from fuser.frontend.garbage import bring_back, set_aside


def test_older_objects_are_set_aside_until_the_last_maker_is_done() -> None:
    started, done = threading.Event(), threading.Event()

    def other() -> None:
        with set_aside():
            started.set()
            done.wait()

    thread = threading.Thread(target=other)
    with set_aside():
        assert gc.get_freeze_count() > 0
        thread.start()
        started.wait()
    assert gc.get_freeze_count() > 0
    done.set()
    thread.join()
    assert gc.get_freeze_count() == 0


def test_an_error_ends_it() -> None:
    with pytest.raises(ValueError, match="x"), set_aside(), set_aside():
        raise ValueError("x")
    assert gc.get_freeze_count() == 0


def test_collections_can_look_at_everything_earlier() -> None:
    with set_aside():
        bring_back()
        assert gc.get_freeze_count() == 0
    assert gc.get_freeze_count() == 0
