"""How many threads programs run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fuser.runtime import cpuinfo, targets


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = torch.get_num_threads()
    targets._threads_at_first.cache_clear()
    yield
    torch.set_num_threads(before)
    targets._threads_at_first.cache_clear()


@pytest.mark.parametrize(
    ("quota", "chosen", "variable", "expected"),
    [
        ("200000 100000", None, None, 2),  # 8 CPUs to see, 2 of them to use
        ("250000 100000", None, None, 3),
        ("20000 100000", None, None, 1),
        ("max 100000", None, None, 8),
        ("1600000 100000", None, None, 8),
        ("200000 100000", 5, None, 5),  # torch.set_num_threads
        ("200000 100000", None, "8", 8),  # OMP_NUM_THREADS
    ],
)
def test_a_container_s_quota_decides_unless_somebody_has(
    quota: str,
    chosen: int | None,
    variable: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpuinfo, "_CGROUP", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(8)
    monkeypatch.setattr(targets, "_AT_FIRST", 8)
    if chosen is not None:
        torch.set_num_threads(chosen)
    assert targets.threads_now() == expected
