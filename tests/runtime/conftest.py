"""What the tests of the runtime share: a target, a private cache, tiny kernels and compilers that misbehave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fuser.templates
from fuser.ir.target import Target
from fuser.runtime import compilers, toolchain
from fuser.runtime.build import Source
from fuser.runtime.cache import KernelCache
from fuser.runtime.cpuinfo import cache_sizes, cpu_flags, detect_isa

TEAM = """
#include "abi.h"
#include <omp.h>
extern "C" int {symbol}(const FuserArgs* args, void*) {{
    int32_t* out = static_cast<int32_t*>(args->tensors[0]);
    #pragma omp parallel num_threads(args->threads)
    {{
        #pragma omp single
        out[0] = omp_get_num_threads();
    }}
    out[1] = {value};
    return {status};
}}
"""


def team_source(symbol: str, value: int = 7, status: int = 0) -> Source:
    """A kernel that writes the size of its team and ``value``, and returns ``status``."""
    return Source(symbol, TEAM.format(symbol=symbol, value=value, status=status))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "FUSER_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture(scope="session")
def headers() -> Path:
    return Path(fuser.templates.__file__).parent / "cpu"


@pytest.fixture(scope="session")
def target() -> Target:
    """This machine, with rates that nothing here depends on."""
    features = cpu_flags() & {"avx512_bf16", "avx512_vnni"}
    return Target("cpu", detect_isa().value, features, 2, cache_sizes(), 1e11, 1e10, 1e-6)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make ``CXX`` a script with the given body; in it ``$REAL`` is the real compiler. Returns its folder."""
    real = shutil.which("g++")
    assert real is not None, "these tests need g++"

    def make(body: str) -> Path:
        folder = tmp_path / "compiler"
        folder.mkdir(exist_ok=True)
        script = folder / "g++"
        script.write_text(f"#!/bin/sh\nREAL={real}\nHERE={folder}\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return folder

    # What one test learned about a script must not reach the next.
    compilers._identify.cache_clear()
    toolchain._checked.clear()
    return make


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start Python on a script with arguments; its output is captured."""

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        script = tmp_path / f"script-{abs(hash(code))}.py"
        script.write_text(code)
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )

    return start
