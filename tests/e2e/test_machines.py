"""Machines without a compiler, without room and without permissions: the original runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from awkward import X, assert_same, encoder, optimize

from fuser.module.optimized import OptimizedModule
from fuser.runtime import cache as runtime_cache
from fuser.runtime.device import cpu_target

pytestmark = pytest.mark.usefixtures("no_grad")


def broken_machine(monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Path | str) -> OptimizedModule:
    """An optimized encoder that has to build its kernels with this compiler into this cache."""
    target = cpu_target()
    monkeypatch.setenv("FUSER_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(compiler))
    return optimize(encoder(), target=target)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "not an executable"),
        ("#!/bin/sh\nexit 1\n", ""),
        ("#!/bin/sh\ncase \"$1\" in --version) echo 'g++ (GCC) 12.2.0';; *) exit 0;; esac\n", ""),
    ],
    ids=["missing", "failing", "idle"],
)
def test_without_a_working_compiler_the_original_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, words: str
) -> None:
    compiler = tmp_path / "g++"
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    fast = broken_machine(monkeypatch, tmp_path / "cache", compiler)
    for _ in range(2):
        assert_same(fast(X), fast._model(X))
    assert fast.programs == ()
    assert len(fast.fallbacks) == 1 and words in fast.fallbacks[0]
    assert fast.fallbacks[0] in fast.report()


def test_without_any_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast = broken_machine(monkeypatch, tmp_path / "cache", "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and "compiler" in fast.fallbacks[0]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody, not even root, can make a directory there.
    fast = broken_machine(monkeypatch, Path("/proc/fuser"), os.environ.get("CXX", "g++"))
    assert_same(fast(X), fast._model(X))
    assert len(fast.programs) == 1 or "/proc/fuser" in fast.fallbacks[0]


def test_no_place_to_write_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = broken_machine(monkeypatch, Path("/proc/fuser"), os.environ.get("CXX", "g++"))
    monkeypatch.setattr(tempfile, "tempdir", "/proc/fuser-temporary")
    # What another test found out about this directory.
    runtime_cache._open.cache_clear()
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and len(fast.fallbacks) == 1


def test_a_cache_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    fast = broken_machine(monkeypatch, shared, os.environ.get("CXX", "g++"))
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and "other users can write" in fast.fallbacks[0]
