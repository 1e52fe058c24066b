from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuser.ir.errors import CacheError, KernelError
from fuser.ir.target import Target
from fuser.runtime import library
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import Kernel, load, loaded_runtimes, openmp_runtime

from .conftest import team_source

FORK = """
import ctypes, os, signal, sys
from pathlib import Path
from fuser.runtime.abi import KernelArgs
from fuser.runtime.library import load

path, order = sys.argv[1:]
out = (ctypes.c_int32 * 2)()
args = KernelArgs.pack([ctypes.addressof(out)], threads=2)
if order == "after use":
    import torch
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)
    load(Path(path), "team")(args)
    print("parent", out[0], flush=True)
child = os.fork()
if child == 0:
    signal.alarm(30)
    load(Path(path), "team")(args)
    print("child", out[0], flush=True)
    out[0] = 0
    grandchild = os.fork()
    if grandchild == 0:
        signal.alarm(30)
        load(Path(path), "team")(args)
        print("grandchild", out[0], flush=True)
        os._exit(0)
    _, status = os.waitpid(grandchild, 0)
    os._exit(status != 0)
_, status = os.waitpid(child, 0)
print("status", status)
"""


@pytest.fixture
def path(target: Target, cache: KernelCache, headers: Path) -> Path:
    return build([team_source("team")], target, headers=headers, cache=cache)["team"]


def run_team(kernel: Kernel, threads: int) -> tuple[int, int]:
    out = (ctypes.c_int32 * 2)()
    kernel(KernelArgs.pack([ctypes.addressof(out)], threads=threads))
    return out[0], out[1]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_team_has_the_size_that_was_asked_for(path: Path, threads: int) -> None:
    assert run_team(load(path, "team"), threads) == (threads, 7)


def test_kernels_share_the_openmp_runtime_of_torch(path: Path) -> None:
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = loaded_runtimes()
    run_team(load(path, "team"), 2)
    # Packages that other tests import, such as scikit-learn, bring runtimes of their own.
    assert loaded_runtimes() == before and openmp_runtime().path in before
    # Nor does the library ask for one by name, which would be a second one wherever torch brings its own file.
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "SYMTAB" in needed and not any(name in needed for name in ("libgomp", "libomp", "libiomp"))


def test_a_library_is_loaded_once(path: Path) -> None:
    assert load(path, "team") is load(path, "team")
    assert load(path, "team").address != 0


def test_a_failing_kernel_is_an_error(target: Target, cache: KernelCache, headers: Path) -> None:
    path = build([team_source("sad", status=3)], target, headers=headers, cache=cache)["sad"]
    with pytest.raises(KernelError, match="sad failed with status 3"):
        run_team(load(path, "sad"), 1)


def test_a_missing_symbol_is_an_error(path: Path) -> None:
    with pytest.raises(CacheError, match="does not define the kernel other"):
        load(path, "other")


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "damaged"), (b"not a library" * 100, "damaged"), (None, "removed from the cache")]
)
def test_what_is_not_a_library_is_an_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "kernel.so"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CacheError, match=words):
        load(file, "team")


def test_fork_after_the_pool_was_used(python: Callable[..., subprocess.Popen[str]], path: Path) -> None:
    process = python(FORK, path, "after use")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["parent 2", "child 2", "grandchild 2", "status 0"]


def test_fork_before_torch_is_loaded(python: Callable[..., subprocess.Popen[str]], path: Path) -> None:
    process = python(FORK, path, "before use")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["child 2", "grandchild 2", "status 0"]


@pytest.mark.parametrize("error", ["failed to map segment from shared object", "Operation not permitted"])
def test_advice_for_a_file_system_that_forbids_execution(path: Path, error: str) -> None:
    assert "noexec" in library._advice(path, error)


def test_advice_for_a_library_from_a_newer_system(path: Path) -> None:
    assert "newer system" in library._advice(path, "version `GLIBC_2.99' not found (required by kernel.so)")


def test_mappings_of_this_process_are_found() -> None:
    assert os.path.realpath("/proc/self/exe") in {str(path) for _, _, path in library._mappings()}
