"""Compiled headers: made once, used where they are what they should be, and never part of what comes out."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

import fuser.templates
from fuser.ir.target import Target, emulated_target
from fuser.runtime import build as building
from fuser.runtime import emulator
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import CompilationError, Source, build, build_and_load
from fuser.runtime.cache import KernelCache
from fuser.runtime.compilers import STANDARD_HEADERS, find_toolchain
from fuser.runtime.emulator import ENGINE

TEXT = """
#include "abi.h"
#include <algorithm>
#include <cmath>
extern "C" int {symbol}(const FuserArgs* args, void*) {{
    float* x = static_cast<float*>(args->tensors[0]);
    for (int i = 0; i < 64; ++i) x[i] = std::sqrt(std::max(x[i], {value}.0f));
    return 0;
}}
"""


def sources(count: int) -> list[Source]:
    return [Source(f"kernel{i}", TEXT.format(symbol=f"kernel{i}", value=i)) for i in range(count)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without compiled headers."""

    def found(target: Target, cache: KernelCache | None = None) -> object:
        return dataclasses.replace(find_toolchain(target, cache), standard_headers="")

    monkeypatch.setattr(building, "find_toolchain", found)


def libraries(paths: dict[str, Path]) -> dict[str, bytes]:
    return {symbol: path.read_bytes() for symbol, path in paths.items()}


def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every build.ninja from now on."""
    seen: list[str] = []
    run = building._run_ninja

    def watched(command: object, folder: Path, *more: object) -> str:
        seen.append((folder / "build.ninja").read_text())
        return run(command, folder, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "_run_ninja", watched)
    return seen


def test_headers_are_compiled_with_the_first_kernels_and_used_by_the_next(
    target: Target, cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = commands(monkeypatch)
    build(sources(2), target, headers=headers, cache=cache)
    assert "-include" not in seen[0] and not list((cache.root / "headers").iterdir())
    build(sources(5), target, headers=headers, cache=cache)
    (kept,) = (cache.root / "headers").iterdir()
    assert "c++-header" in seen[1] and seen[1].count("-include") == 3
    build(sources(6), target, headers=headers, cache=KernelCache(cache.root))
    assert "c++-header" not in seen[2] and seen[2].count("-include") == 1
    assert list((cache.root / "headers").iterdir()) == [kept]
    assert cache.size() > kept.stat().st_size
    cache.prune(0)
    assert not list((cache.root / "headers").iterdir())


@pytest.mark.usefixtures("plain")
def test_what_comes_out_is_the_same_to_the_bit(
    target: Target, cache: KernelCache, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = libraries(build(sources(3), target, headers=headers, cache=cache))
    assert not list((cache.root / "headers").iterdir())
    monkeypatch.undo()
    other = KernelCache(tmp_path / "other")
    assert libraries(build(sources(3), target, headers=headers, cache=other)) == alone
    assert list((other.root / "headers").iterdir())


@pytest.fixture(scope="module")
def warm(target: Target, headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with compiled headers."""
    cache = KernelCache(tmp_path_factory.mktemp("warm") / "cache")
    build(sources(3), target, headers=headers, cache=cache)
    return cache.root


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "a folder", "of others"])
def test_damage_costs_time_only(target: Target, warm: Path, tmp_path: Path, headers: Path, damage: str) -> None:
    cache = KernelCache(shutil.copytree(warm, tmp_path / "cache"))
    (kept,) = (cache.root / "headers").iterdir()
    content = kept.read_bytes()
    if damage in ("cut", "empty"):
        kept.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif damage == "changed":
        kept.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "a folder":
        kept.unlink()
        kept.mkdir()
    else:
        kept.chmod(0o666)
    paths = build(sources(4), target, headers=headers, cache=KernelCache(cache.root))
    assert len(paths) == 4 and all(path.is_file() for path in paths.values())


def test_headers_that_cannot_be_compiled_are_left_to_kernels(
    target: Target, cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(target: Target, cache: KernelCache | None = None) -> object:
        return dataclasses.replace(find_toolchain(target, cache), standard_headers="#include <no_such_header>")

    monkeypatch.setattr(building, "find_toolchain", found)
    assert len(build(sources(3), target, headers=headers, cache=cache)) == 3
    assert not list((cache.root / "headers").iterdir())


def test_kernels_of_the_emulator_use_them(cache: KernelCache, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = commands(monkeypatch)
    text = '#include "cuda/device.cuh"\nFUSER_EXPORT int {}(const FuserArgs*, void*) {{ return {}; }}\n'
    kernels = [Source(f"kernel{i}", text.format(f"kernel{i}", i), ".cu") for i in range(3)]
    build(kernels, emulated_target(), headers=headers.parent, cache=cache)
    assert "c++-header" in seen[0]
    assert sorted(path.suffix for path in (cache.root / "headers").iterdir()) == [".gch", ".o"]


def test_the_emulators_own_code_is_compiled_once(
    cache: KernelCache, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "templates"
    shutil.copytree(headers.parent, folder)
    seen = commands(monkeypatch)
    text = '#include "cuda/device.cuh"\nFUSER_EXPORT int {}(const FuserArgs*, void*) {{ return 7; }}\n'

    def status(symbol: str) -> int:
        source = Source(symbol, text.format(symbol), ".cu")
        kernel = build_and_load([source], emulated_target(), headers=folder, cache=cache)[symbol]
        return kernel.status(KernelArgs.pack([], [], 1))

    assert [status("first"), status("second")] == [7, 7]
    assert [ENGINE in project for project in seen] == [True, False]
    # Other code is another kernel.
    engine = folder / ENGINE
    engine.write_text(engine.read_text() + "\n")
    assert status("second") == 7
    assert ENGINE in seen[2]
    # Damage costs time only.
    for path in (cache.root / "headers").iterdir():
        path.write_bytes(b"")
    assert status("third") == 7


def test_code_of_the_emulator_that_does_not_compile_is_told(cache: KernelCache, headers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "templates"
    shutil.copytree(headers.parent, folder)
    (folder / ENGINE).write_text("#error nothing here")
    source = Source("kernel", '#include "cuda/device.cuh"\n', ".cu")
    with pytest.raises(CompilationError, match="#error nothing here"):
        build([source], emulated_target(), headers=folder, cache=cache)


@pytest.mark.parametrize(("kind", "listed"), [("cpu", STANDARD_HEADERS), ("cuda", emulator.STANDARD_HEADERS)])
def test_the_list_has_all_that_templates_include(kind: str, listed: str) -> None:
    folder = Path(fuser.templates.__file__).parent / kind
    files = [path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".j2")]
    included = {name for path in files for name in re.findall(r"#include <([^>]+)>", path.read_text())}
    assert included - {"sched.h", "cuda_runtime.h"} <= set(re.findall(r"#include <([^>]+)>", listed))
