from __future__ import annotations

import ctypes
import json
import logging
import math
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from fuser.ir.errors import BuildError, CacheError, ToolchainError
from fuser.ir.target import Target
from fuser.runtime import build as build_module
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import CompilationError, Source, build, build_and_load, included_headers, key_of
from fuser.runtime.cache import KernelCache
from fuser.runtime.library import load

from .conftest import team_source

Compiler = Callable[[str], Path]
Python = Callable[..., "subprocess.Popen[str]"]

LOG = 'case "$*" in *" -c k"*) echo "$@" >> $HERE/log;; esac; exec $REAL "$@"'
# Compiles of kernels wait until someone removes the file; the check of the compiler does not.
SLOW = (
    'case "$*" in *" -c k"*) echo $$ >> $HERE/log; while [ -e $HERE/wait ]; do sleep 0.05; done;; esac; exec $REAL "$@"'
)

BUILDER = """
import sys
from pathlib import Path
from fuser.ir.target import Target
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache

root, headers, arch, features, *sources = sys.argv[1:]
target = Target("cpu", arch, frozenset(features.split()), 2, (1, 1, 1), 1e11, 1e10, 1e-6)
cache = KernelCache(Path(root))
try:
    paths = build([Source(*source.split(":", 1)) for source in sources], target, headers=Path(headers), cache=cache)
except KeyboardInterrupt:
    print("interrupted", cache.verify().damaged, sorted(p.name for p in (cache.root / "tmp").iterdir()))
    sys.exit(130)
print(*paths.values())
"""


def arguments(cache: KernelCache, headers: Path, target: Target, *sources: Source) -> list[object]:
    texts = [f"{source.symbol}:{source.text}" for source in sources]
    return [cache.root, headers, target.arch, " ".join(sorted(target.features)), *texts]


def compiles(folder: Path) -> int:
    log = folder / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def value_of(path: Path, symbol: str) -> int:
    out = (ctypes.c_int32 * 2)()
    load(path, symbol)(KernelArgs.pack([ctypes.addressof(out)]))
    return out[1]


def test_all_sources_are_built_and_then_found(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler
) -> None:
    folder = compiler(LOG)
    sources = [team_source(f"kernel{i}", value=i) for i in range(5)]
    paths = build(sources, target, headers=headers, cache=cache)
    assert [value_of(paths[f"kernel{i}"], f"kernel{i}") for i in range(5)] == [0, 1, 2, 3, 4]
    assert all(path.is_relative_to(cache.root) for path in paths.values())
    assert compiles(folder) == 5
    assert build(sources, target, headers=headers, cache=KernelCache(cache.root)) == paths
    # One new source among old ones: only that one is compiled.
    build([*sources, team_source("kernel5")], target, headers=headers, cache=cache)
    assert compiles(folder) == 6
    assert list((cache.root / "tmp").iterdir()) == []
    assert build([], target, headers=headers, cache=cache) == {}


def test_entries_tell_humans_what_they_are(target: Target, cache: KernelCache, headers: Path) -> None:
    source = team_source("kernel")
    path = build([source], target, headers=headers, cache=cache)["kernel"]
    assert (path.parent / "source.cpp").read_text() == source.text
    (entry,) = cache.entries()
    assert entry.symbol == "kernel" and entry.target == target.key and "g++" in entry.compiler
    assert entry.key == key_of(source, target, headers=headers).digest
    assert "hit" in cache.explain(key_of(source, target, headers=headers))


def test_a_failing_source_does_not_keep_the_others(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler
) -> None:
    folder = compiler(LOG)
    good, bad = team_source("good"), Source("bad", '#include "abi.h"\nint x = nonsense;')
    worse = Source("worse", "#error worse")
    with pytest.raises(CompilationError) as caught:
        build([bad, good, worse], target, headers=headers, cache=cache)
    assert isinstance(caught.value, BuildError)
    assert [failure.symbol for failure in caught.value.failures] == ["bad", "worse"]
    failure = caught.value.failures[0]
    for text in ("2 generated kernels", "nonsense", failure.command, str(failure.source), "#error worse"):
        assert text in str(caught.value)
    assert failure.source.read_text() == bad.text
    again = subprocess.run(shlex.split(failure.command), capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "nonsense" in again.stderr and "abi.h" not in again.stderr
    before = compiles(folder)
    assert value_of(build([good], target, headers=headers, cache=cache)["good"], "good") == 7
    assert compiles(folder) == before
    assert cache.verify().damaged == () and list((cache.root / "tmp").iterdir()) == []


def test_undefined_functions_are_found_when_loading(target: Target, cache: KernelCache, headers: Path) -> None:
    source = Source("lost", 'extern "C" int nowhere(); extern "C" int lost() { return nowhere(); }')
    path = build([source], target, headers=headers, cache=cache)["lost"]
    with pytest.raises(CacheError, match="nowhere"):
        load(path, "lost")


def test_bad_requests_are_refused(target: Target, cache: KernelCache, headers: Path) -> None:
    for symbol in ("", "1x", "a b", "x;rm", "../x", "x" * 201, "x\n"):
        with pytest.raises(BuildError, match="identifier"):
            build([Source(symbol, "")], target, headers=headers, cache=cache)
    with pytest.raises(BuildError, match="two different sources"):
        build([team_source("a", 1), team_source("a", 2)], target, headers=headers, cache=cache)
    with pytest.raises(BuildError, match=r"\.cu"):
        build([Source("a", "", ".cu")], target, headers=headers, cache=cache)


# What a build depends on


def test_headers_are_part_of_the_key(target: Target, cache: KernelCache, tmp_path: Path) -> None:
    folder = tmp_path / "headers"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.h").write_text('#include "deep/b.h"\n')
    (folder / "deep" / "b.h").write_text('#include "c.h"\n#define VALUE (C + 1)\n')
    (folder / "deep" / "c.h").write_text("#define C 10\n")
    (folder / "unused.h").write_text("")
    (tmp_path / "outside.h").write_text("")
    source = Source("k", '#include "a.h"\n#include <vector>\nextern "C" int k() { return VALUE; }')
    assert set(included_headers(source.text, folder)) == {"a.h", "deep/b.h", "deep/c.h"}
    assert included_headers('#include "../outside.h"\n  #  include   "a.h"', folder).keys() == {
        *("a.h", "deep/b.h", "deep/c.h"),
    }
    path = build([source], target, headers=folder, cache=cache)["k"]
    assert ctypes.CDLL(str(path)).k() == 11
    (folder / "unused.h").write_text("#error")
    assert build([source], target, headers=folder, cache=cache)["k"] == path
    (folder / "deep" / "c.h").write_text("#define C 20\n")
    other = build([source], target, headers=folder, cache=cache)["k"]
    assert other != path and ctypes.CDLL(str(other)).k() == 21


def test_a_header_outside_the_folder_cannot_be_used(target: Target, cache: KernelCache, tmp_path: Path) -> None:
    (tmp_path / "headers").mkdir()
    (tmp_path / "outside.h").write_text("#define VALUE 1\n")
    source = Source("k", '#include "../outside.h"\nextern "C" int k() { return VALUE; }')
    with pytest.raises(CompilationError, match=r"outside\.h"):
        build([source], target, headers=tmp_path / "headers", cache=cache)


def test_nan_and_infinity_survive(target: Target, cache: KernelCache, headers: Path) -> None:
    text = """
    #include "abi.h"
    #include <cmath>
    extern "C" int special(const FuserArgs* args, void*) {
        const float* in = static_cast<const float*>(args->tensors[0]);
        float* out = static_cast<float*>(args->tensors[1]);
        out[0] = in[0] != in[0];
        out[1] = std::isinf(in[1]);
        out[2] = in[1] - in[1];
        out[3] = in[2] * 0.0f;
        out[4] = (in[3] + in[4]) - in[4];
        return 0;
    }"""
    path = build([Source("special", text)], target, headers=headers, cache=cache)["special"]
    values = (ctypes.c_float * 5)(math.nan, math.inf, -math.inf, 1.0, 2.0**30)
    out = (ctypes.c_float * 5)()
    load(path, "special")(KernelArgs.pack([ctypes.addressof(values), ctypes.addressof(out)]))
    assert out[0] == 1 and out[1] == 1 and math.isnan(out[2]) and math.isnan(out[3])
    assert out[4] == 0, "sums are not reordered"


# Without a compiler


def test_kernels_from_elsewhere_need_no_compiler(
    target: Target, cache: KernelCache, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [team_source("a", 1), team_source("b", 2)]
    build(sources, target, headers=headers, cache=cache)
    cache.export(tmp_path / "kernels.zip")
    other = KernelCache(tmp_path / "other")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ToolchainError, match=r"kernel a is not in the cache(.|\n)*nowhere(.|\n)*fuserc cache import"):
        build(sources, target, headers=headers, cache=other)
    other.import_(tmp_path / "kernels.zip")
    paths = build(sources, target, headers=headers, cache=other)
    assert [value_of(paths["a"], "a"), value_of(paths["b"], "b")] == [1, 2]
    with pytest.raises(ToolchainError, match="kernel c"):
        build([team_source("c")], target, headers=headers, cache=other)


def test_no_ninja(
    target: Target, cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> Path:
        raise ToolchainError("no ninja")

    monkeypatch.setattr(build_module, "find_ninja", none)
    with pytest.raises(ToolchainError, match="no ninja"):
        build([team_source("a")], target, headers=headers, cache=cache)


# Disks


def test_a_full_disk_is_called_that(target: Target, cache: KernelCache, headers: Path, compiler: Compiler) -> None:
    compiler('case "$*" in *" -c k"*) echo "k0.s: No space left on device" >&2; exit 1;; esac; exec $REAL "$@"')
    with pytest.raises(CacheError, match=r"No space left on device.*free some space"):
        build([team_source("a")], target, headers=headers, cache=cache)
    assert cache.entries() == [] and list((cache.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("said", ["k0.s: No space left on device", ""])
def test_where_the_cache_is_full_kernels_are_built_elsewhere(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Also where the disk is too full for the compiler's message."""
    first = cache.root
    compiler(f'case "$PWD $*" in {first}*" -c k"*) echo "{said}" >&2; exit 1;; esac; exec $REAL "$@"')
    usage = shutil.disk_usage
    full = usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: full if not said and p.is_relative_to(first) else usage(p))
    paths = build([team_source("a")], target, headers=headers, cache=cache)
    assert cache.root != first and paths["a"].is_relative_to(cache.root)


def test_the_cache_stays_within_its_size(target: Target, headers: Path, tmp_path: Path) -> None:
    root = tmp_path / "small"
    build([team_source("a")], target, headers=headers, cache=KernelCache(root))
    cache = KernelCache(root, max_bytes=1)
    path = build([team_source("b")], target, headers=headers, cache=cache)["b"]
    assert [entry.symbol for entry in cache.entries()] == ["b"] and path.exists()


# Messages


def test_long_builds_are_announced(
    target: Target,
    cache: KernelCache,
    headers: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_module, "_ANNOUNCE_SECONDS", 0.01)
    with caplog.at_level(logging.INFO, "fuser"):
        build([team_source("a"), team_source("b")], target, headers=headers, cache=cache)
    assert "compiling 2 kernels" in caplog.text
    assert capfd.readouterr() == ("", "")


# Many processes


def test_processes_share_one_build(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler, python: Python
) -> None:
    folder = compiler(SLOW)
    (folder / "wait").touch()
    sources = [team_source("a", 1), team_source("b", 2)]
    processes = [python(BUILDER, *arguments(cache, headers, target, *order)) for order in (sources, sources[::-1])]
    wait_until(lambda: compiles(folder) >= 1)
    time.sleep(0.3)
    (folder / "wait").unlink()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {*outputs[0][0].split()} == {*outputs[1][0].split()}
    assert compiles(folder) == 2
    paths = build(sources, target, headers=headers, cache=cache)
    assert (value_of(paths["a"], "a"), value_of(paths["b"], "b")) == (1, 2)


def test_without_locks_builds_are_still_right(
    target: Target, cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, timeout: float | None = None) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert value_of(build([team_source("a")], target, headers=headers, cache=cache)["a"], "a") == 7


def test_a_lock_that_is_held_too_long_is_ignored(
    target: Target, cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build_module, "_LOCK_SECONDS", 0.1)
    source = team_source("a")
    with filelock.FileLock(cache.lock_path(key_of(source, target, headers=headers).digest)):
        assert value_of(build([source], target, headers=headers, cache=cache)["a"], "a") == 7
    assert "building without it" in caplog.text


def test_a_killed_builder_blocks_nobody(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler, python: Python
) -> None:
    folder = compiler(SLOW)
    (folder / "wait").touch()
    source = team_source("a")
    process = python(BUILDER, *arguments(cache, headers, target, source))
    wait_until(lambda: compiles(folder) == 1)
    process.kill()
    process.communicate(timeout=30)
    assert KernelCache(cache.root).get(key_of(source, target, headers=headers).digest) is None
    (folder / "wait").unlink()
    assert value_of(build([source], target, headers=headers, cache=cache)["a"], "a") == 7
    assert cache.verify().damaged == ()


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_interrupting_a_build_leaves_nothing_behind(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler, python: Python
) -> None:
    folder = compiler(SLOW)
    (folder / "wait").touch()
    sources = [team_source("a"), team_source("b")]
    process = python(BUILDER, *arguments(cache, headers, target, *sources))
    wait_until(lambda: compiles(folder) >= 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (130, "interrupted () []"), errors
    wait_until(lambda: not any(alive(int(line)) for line in (folder / "log").read_text().split()))
    (folder / "wait").unlink()
    assert value_of(build(sources, target, headers=headers, cache=cache)["b"], "b") == 7


def test_compilers_that_ignore_the_interrupt_are_killed(
    target: Target, cache: KernelCache, headers: Path, compiler: Compiler, python: Python
) -> None:
    folder = compiler("trap '' INT TERM HUP\n" + SLOW)
    (folder / "wait").touch()
    process = python(BUILDER, *arguments(cache, headers, target, team_source("a")))
    wait_until(lambda: compiles(folder) >= 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (130, "interrupted () []"), errors
    wait_until(lambda: not any(alive(int(line)) for line in (folder / "log").read_text().split()))


def test_a_library_without_its_symbol_is_built_again(target: Target, cache: KernelCache, headers: Path) -> None:
    source = team_source("wanted")
    (path,) = build([source], target, headers=headers, cache=cache).values()
    (other,) = build([team_source("other")], target, headers=headers, cache=cache).values()
    # Its checksum is right, as of a file that another version of a toolchain made.
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["sha256"] = json.loads((other.parent / "manifest.json").read_text())["sha256"]
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    path.chmod(0o600)
    path.write_bytes(other.read_bytes())
    kernels = build_and_load([source], target, headers=headers, cache=cache)
    out = (ctypes.c_int32 * 2)()
    kernels["wanted"](KernelArgs.pack([ctypes.addressof(out)]))
    assert out[1] > 0
