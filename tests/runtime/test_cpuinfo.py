from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from fuser.ir.target import Isa
from fuser.runtime import cpuinfo

AVX2 = cpuinfo._AVX2_FLAGS
AVX512 = cpuinfo._AVX512_FLAGS


@pytest.mark.parametrize(
    ("flags", "machine", "isa"),
    [
        (AVX512, "x86_64", Isa.AVX512),
        (AVX512 | {"avx512_vnni"}, "x86_64", Isa.AVX512),
        (AVX512 - {"avx512bw"}, "x86_64", Isa.AVX2),
        (AVX2, "x86_64", Isa.AVX2),
        (AVX2 - {"fma"}, "x86_64", Isa.PORTABLE),
        (frozenset({"sse2"}), "x86_64", Isa.PORTABLE),
        (frozenset({"asimd"}), "aarch64", Isa.NEON),
        (frozenset(), "riscv64", Isa.PORTABLE),
    ],
)
def test_instruction_sets(flags: frozenset[str], machine: str, isa: Isa) -> None:
    assert cpuinfo._isa_of(flags, machine) is isa


@pytest.mark.parametrize(("capability", "isa"), [("AVX512", Isa.AVX512), ("AVX2", Isa.AVX2), ("NO AVX", Isa.PORTABLE)])
def test_torch_is_asked_where_the_system_hides_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, isa: Isa
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert cpuinfo._isa_of(frozenset(), "x86_64") is isa


@pytest.mark.parametrize("granted", [True, False])
def test_matrix_tiles_are_there_where_the_system_grants_them(monkeypatch: pytest.MonkeyPatch, granted: bool) -> None:
    found = {"flags": " ".join((*AVX512, "amx_tile", "amx_int8", "avx512_vnni"))}
    monkeypatch.setattr(cpuinfo, "_cpuinfo", lambda: found)
    monkeypatch.setattr(cpuinfo, "_may_use_tiles", lambda: granted)
    cpuinfo.cpu_flags.cache_clear()
    try:
        wanted = {"avx512_vnni", *(["amx_tile", "amx_int8"] if granted else [])}
        assert cpuinfo.features(Isa.AVX512) == wanted
    finally:
        cpuinfo.cpu_flags.cache_clear()


def test_asking_for_tiles_is_answered_on_every_machine() -> None:
    assert cpuinfo._may_use_tiles() in (True, False)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def cache_files(cpu: int, **levels: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for index, (name, size) in enumerate(levels.items()):
        folder = f"cpu{cpu}/cache/index{index}"
        kind = {"i": "Instruction", "d": "Data"}.get(name[2:], "Unified")
        files |= {f"{folder}/level": name[1], f"{folder}/type": kind, f"{folder}/size": size}
    return files


@pytest.mark.parametrize(
    ("levels", "sizes"),
    [
        ({"l1d": "48K", "l1i": "64K", "l2": "2048K", "l3": "105M"}, (48 << 10, 2 << 20, 105 << 20)),
        ({"l1i": "64K", "l1d": "128K", "l2": "12M"}, (128 << 10, 12 << 20, 12 << 20)),
        ({}, cpuinfo._TYPICAL_CACHES),
        ({"l1d": "", "l2": "0K", "l3": "many"}, cpuinfo._TYPICAL_CACHES),
    ],
)
def test_cache_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: dict[str, str], sizes: tuple[int, int, int]
) -> None:
    write(tmp_path, cache_files(min(os.sched_getaffinity(0)), **levels))
    monkeypatch.setattr(cpuinfo, "_CPUS", tmp_path)
    assert cpuinfo.cache_sizes() == sizes


@pytest.mark.parametrize(
    ("affinity", "siblings", "files", "cores"),
    [
        ({0, 1, 2, 3}, ["0,2", "1,3", "0,2", "1,3"], {}, 2),
        ({0, 2}, ["0,2", "1,3", "0,2", "1,3"], {}, 1),
        ({0, 1, 2}, ["0", "1", "2"], {}, 3),
        ({0, 1, 2}, [], {}, 3),
        ({0, 1, 2, 3}, [], {"cpu.max": "250000 100000"}, 3),
        ({0, 1}, [], {"cpu.max": "800000 100000"}, 2),
        ({0, 1}, [], {"cpu.max": "max 100000"}, 2),
        ({0, 1}, [], {"cpu.max": "10000 100000"}, 1),
        ({0, 1}, [], {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({0, 1}, [], {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_usable_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    affinity: set[int],
    siblings: list[str],
    files: dict[str, str],
    cores: int,
) -> None:
    write(tmp_path, {f"cpu{i}/topology/thread_siblings_list": text for i, text in enumerate(siblings)})
    write(tmp_path / "cgroup", files)
    monkeypatch.setattr(cpuinfo, "_CPUS", tmp_path)
    monkeypatch.setattr(cpuinfo, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    assert cpuinfo.usable_cores() == cores


def test_this_cpu_has_a_name() -> None:
    assert cpuinfo.cpu_name() and cpuinfo.cpu_name() != platform.machine()
