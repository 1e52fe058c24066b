"""Kernel caches for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fuser.runtime.cache import KernelCache, default_cache


def with_own_records(folder: Path, patch: pytest.MonkeyPatch) -> KernelCache:
    """The session's kernels with records in ``folder``."""
    kept = KernelCache(folder / "records")
    shared = default_cache()
    for name in ("read_record", "write_record", "records"):
        patch.setattr(shared, name, getattr(kept, name))
    return shared


def refuse(monkeypatch: pytest.MonkeyPatch, root: Path, code: int) -> None:
    """Let every attempt to create something below ``root`` fail with ``code``."""
    real_open, real_mkdir = os.open, os.mkdir

    def below(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(root)

    def fake_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if below(path) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *rest, **options)

    def fake_mkdir(path: Any, *rest: Any, **options: Any) -> None:
        if below(path) and not Path(path).exists():
            raise OSError(code, os.strerror(code), str(path))
        real_mkdir(path, *rest, **options)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "mkdir", fake_mkdir)
