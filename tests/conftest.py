"""All tests build kernels into one cache below build/, which processes share and later runs find warm."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What tests of several folders share; they are imported by path, and so are not on it.
sys.path.append(str(Path(__file__).parent / "support"))

_cache = ROOT / "build" / "test-cache"
_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
# Before anything imports fuser, and for the processes that tests start.
os.environ["FUSER_CACHE_DIR"] = str(_cache)
# No test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Shells start background jobs with interrupts ignored, which tests of interrupts would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """Rates of an idle machine, so that what is chosen does not follow from what else this one does."""
    import dataclasses

    from fuser.ir.target import Target
    from fuser.runtime.cache import default_cache
    from fuser.runtime.calibration import Rates, calibration_key
    from fuser.runtime.cpuinfo import cache_sizes, detect_isa, features, usable_cores

    isa = detect_isa()
    rates = dataclasses.asdict(Rates(peak_flops=1e11, bandwidth=2e10, launch_seconds=2e-6))
    target = Target("cpu", isa.value, features(isa), usable_cores(), cache_sizes(), **rates)
    default_cache().write_record("calibration", calibration_key(target), rates)


class _Faults(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@pytest.fixture(autouse=True)
def faults() -> Iterator[list[str]]:
    """What fuser logs as a fault of its own, after which the original runs: nothing, in all tests that do not take it
    from here."""
    handler = _Faults()
    logging.getLogger("fuser").addHandler(handler)
    yield handler.found
    logging.getLogger("fuser").removeHandler(handler)
    assert not handler.found, handler.found[0]
