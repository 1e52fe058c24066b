from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fuser.ir.errors import ToolchainError
from fuser.ir.target import Isa, Target
from fuser.runtime import compilers, toolchain
from fuser.runtime.cache import KernelCache
from fuser.runtime.compilers import find_ninja, find_toolchain, target_flags
from fuser.runtime.library import OpenMPRuntime, openmp_runtime

Compiler = Callable[[str], Path]


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """Make PATH a folder that holds only these scripts and what a compiler itself needs."""
    folder.mkdir()
    for name, body in scripts.items():
        script = folder / name.replace("xx", "++")
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    for name in ("sh", "as", "ld", "cat"):
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


def test_the_compiler_of_this_machine(target: Target) -> None:
    found = find_toolchain(target)
    assert found.name and found.name == found.version.splitlines()[0]
    assert found == find_toolchain(target)
    assert find_ninja().exists()


@pytest.mark.parametrize("isa", Isa)
def test_flags_keep_kernels_portable_and_numbers_honest(target: Target, isa: Isa) -> None:
    flags = target_flags(dataclasses.replace(target, arch=isa.value, features=frozenset()))
    everything = (*compilers._COMMON, *compilers._GCC_ONLY, *flags, *compilers._LINK)
    assert not {"-ffast-math", "-Ofast", "-march=native", "-ffinite-math-only", "-funsafe-math-optimizations"} & {
        *everything
    }
    assert any(flag.startswith("-DFUSER_VECTOR_BYTES=") for flag in flags)
    assert "-fopenmp" in compilers._COMMON and "-fopenmp" not in compilers._LINK


def test_flags_follow_the_features(target: Target) -> None:
    base = dataclasses.replace(target, arch="avx512", features=frozenset())
    both = dataclasses.replace(base, features=frozenset({"avx512_bf16", "avx512_vnni"}))
    assert {*target_flags(both)} - {*target_flags(base)} == {"-mavx512bf16", "-mavx512vnni"}
    arm = dataclasses.replace(base, arch="neon", features=frozenset({"asimddp", "bf16"}))
    assert "-march=armv8.2-a+dotprod+bf16" in target_flags(arm)


def test_other_kinds_of_targets_are_refused(target: Target) -> None:
    with pytest.raises(ToolchainError, match="cuda"):
        find_toolchain(dataclasses.replace(target, kind="cuda"))


def test_no_compiler_at_all(target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_on_path(monkeypatch, tmp_path / "bin")
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler found.*apt install g\+\+"):
        find_toolchain(target)


def test_the_chosen_compiler_does_not_exist(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ToolchainError, match=r"CXX is set to '/nowhere/g\+\+'"):
        find_toolchain(target)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo cannot start >&2; exit 1", "cannot start"),
        ("echo 'warp drive 3.0'", "does not look like"),
        ("printf '\\377\\376\\000garbage'", "does not look like"),
        ("exit 0", "does not look like"),
        ("kill -9 $$", "--version"),
        ("[ $1 = --version ] && exec $REAL --version; echo 'fatal error: omp.h: No such file' >&2; exit 1", "omp.h"),
        ("[ $1 = --version ] && exec $REAL --version; exit 0", "writes no library"),
        (
            "[ $1 = --version ] && exec $REAL --version\n"
            'case "$*" in *-shared*) echo \'cannot find ld\' >&2; exit 1;; esac; exec $REAL "$@"',
            "cannot find ld",
        ),
    ],
)
def test_broken_compilers_are_explained(target: Target, compiler: Compiler, body: str, words: str) -> None:
    folder = compiler(body)
    with pytest.raises(ToolchainError) as caught:
        find_toolchain(target)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "install" in str(caught.value)


@pytest.mark.parametrize("folder", ["full", "missing"])
def test_a_folder_for_temporary_files_that_takes_none_is_not_a_broken_compiler(
    target: Target, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    said = "cc1plus: fatal error: /tmp/x.s: No space left on device"
    compiler(f"[ $1 = --version ] && exec $REAL --version; echo '{said}' >&2; exit 1")
    if folder == "missing":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ToolchainError, match="set TMPDIR") as caught:
        find_toolchain(target)
    assert ("No space left" if folder == "full" else "nowhere") in str(caught.value)
    assert "install" not in str(caught.value) and "no C++ compiler" not in str(caught.value)


def test_a_compiler_that_hangs(target: Target, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_TIMEOUT", 0.2)
    compiler("exec sleep 30")
    with pytest.raises(ToolchainError, match="timed out"):
        find_toolchain(target)


def test_a_compiler_too_old_for_the_target(target: Target, compiler: Compiler) -> None:
    compiler(
        "[ $1 = --version ] && exec $REAL --version\n"
        'echo "g++: error: unrecognized command-line option -mavx512bf16" >&2; exit 1'
    )
    with pytest.raises(ToolchainError, match=r"g\+\+ 10 or newer(.|\n)*-mavx512bf16"):
        find_toolchain(target)


def test_a_broken_compiler_gives_way_to_the_next(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: Compiler
) -> None:
    real = shutil.which("g++")
    put_on_path(monkeypatch, tmp_path / "bin", gxx="echo broken >&2; exit 1", cxx=f'exec {real} "$@"')
    assert find_toolchain(target).command == ("c++",)
    (tmp_path / "bin" / "c++").unlink()
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler works(.|\n)*broken"):
        find_toolchain(target)


def test_arguments_in_the_choice_of_compiler(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -DEXTRA")
    assert find_toolchain(target).command == ("g++", "-DEXTRA")


@pytest.mark.parametrize("llvm", [False, True])
def test_clang_needs_the_runtime_of_llvm(
    target: Target, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, llvm: bool
) -> None:
    runtime = OpenMPRuntime(openmp_runtime().path, llvm)
    monkeypatch.setattr(compilers, "openmp_runtime", lambda: runtime)
    body = "[ $1 = --version ] && { echo 'clang version 17.0.6'; exit; }\nexec $REAL \"$@\""
    compiler(body)
    if llvm:
        found = find_toolchain(target)
        assert found.name == "clang version 17.0.6" and not {*compilers._GCC_ONLY} & {*found.compile_flags}
    else:
        with pytest.raises(ToolchainError, match=r"clang.*torch has loaded .*gomp"):
            find_toolchain(target)


def count(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_compiler_is_tried_once(target: Target, compiler: Compiler, cache: KernelCache) -> None:
    folder = compiler('echo "$@" >> $HERE/log; exec $REAL "$@"')
    find_toolchain(target, cache)
    assert count(folder / "log") == 3, "its version, one object, one library"
    find_toolchain(target, cache)
    assert count(folder / "log") == 3
    # Another process asks for the version only.
    compilers._identify.cache_clear()
    toolchain._checked.clear()
    find_toolchain(target, cache)
    assert count(folder / "log") == 4
    # An upgrade in place is another compiler.
    os.utime(folder / "g++", (1, 1))
    find_toolchain(target, cache)
    assert count(folder / "log") == 7


def test_no_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ninja

    monkeypatch.setattr(ninja, "BIN_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="pip install ninja"):
        find_ninja()
    script = tmp_path / "ninja"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert find_ninja() == script
