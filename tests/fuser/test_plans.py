"""Plans outlive the process that made them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import fuser.attention  # noqa: F401 sets the store
from fuser import masks
from fuser.kernels import planner
from fuser.kernels.attention import _cached_plan, cached_plan
from fuser.plans import CachedPlans
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target

PROGRAM = """
import fuser.attention
from fuser import masks
from fuser.kernels import attention, planner
from fuser.runtime.device import cpu_target
made = []
plan = planner.plan
planner.plan = lambda *a: made.append(a) or plan(*a)
print(attention.cached_plan(masks.Strided(7) | masks.Dilated(3, 5), 200, 200, cpu_target()).hash, len(made))
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "cache"))
    _cached_plan.cache_clear()
    return tmp_path / "cache"


def test_a_second_process_does_not_plan(own_cache: Path) -> None:
    def run() -> list[str]:
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    first, second = run(), run()
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("1", "0")
    (entry,) = default_cache().plans()
    assert entry.title == "strided(step=7) | dilated(window=3, dilation=5), 200 x 200"


def test_a_damaged_plan_is_made_again(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, mask = cpu_target(), masks.Strided(11)
    made = cached_plan(mask, 150, 150, target)
    (path,) = own_cache.glob("plans/*.plan")
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    _cached_plan.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fuser"):
        assert cached_plan(mask, 150, 150, target) == made
    assert "damaged" in caplog.text
    assert path.read_bytes() == intact


def test_without_a_usable_cache_plans_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "cache"))
    assert CachedPlans().read("key") is None
    CachedPlans().write("key", "title", b"content")
    made = planner.stored_plan(masks.Causal(), 40, 40, None, CachedPlans())
    made.validate(masks.Causal())
    assert not list((tmp_path / "cache").iterdir())
