"""Kernel caches for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuser.runtime.cache import KernelCache, default_cache


def with_own_records(folder: Path, patch: pytest.MonkeyPatch) -> KernelCache:
    """The session's kernels with records in ``folder``."""
    kept = KernelCache(folder / "records")
    shared = default_cache()
    for name in ("read_record", "write_record", "records"):
        patch.setattr(shared, name, getattr(kept, name))
    return shared
