from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from fuser.ir.errors import FuserError
from fuser.ir.target import Isa, Target
from fuser.runtime import device
from fuser.runtime.cache import KernelCache
from fuser.runtime.device import Rates, calibration_key, cpu_target, detect_isa

AVX2 = device._AVX2_FLAGS
AVX512 = device._AVX512_FLAGS


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """Replace the measurement by fixed rates; the targets that were measured."""
    measured: list[Target] = []

    def fake(target: Target, cache: KernelCache) -> Rates:
        measured.append(target)
        return Rates(1e9 + len(measured), 2e9, 3e-6)

    monkeypatch.setattr(device, "calibrate", fake)
    return measured


def forget() -> None:
    """What a new process would not know."""
    device._cached_target.cache_clear()


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
    assert device._isa_of(flags, machine) is isa


@pytest.mark.parametrize(("capability", "isa"), [("AVX512", Isa.AVX512), ("AVX2", Isa.AVX2), ("NO AVX", Isa.PORTABLE)])
def test_torch_is_asked_where_the_system_hides_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, isa: Isa
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert device._isa_of(frozenset(), "x86_64") is isa


def test_this_machine_is_measured_once(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cpu_target(cache=cache)
    assert target.kind == "cpu" and target.arch == detect_isa().value
    assert 1 <= target.cores <= len(os.sched_getaffinity(0))
    assert target.cache_bytes[0] <= target.cache_bytes[1] <= target.cache_bytes[2]
    # Wide bounds: one vector FMA every four cycles at 0.5 GHz, and four every cycle at 8 GHz.
    assert target.vector_lanes * 2 * 0.5e9 / 4 < target.peak_flops < target.vector_lanes * 2 * 4 * 8e9
    assert 1e8 < target.bandwidth < 1e13
    assert 1e-9 < target.launch_seconds < 1e-1
    assert cache.read_record("calibration", calibration_key(target)) is not None
    forget()

    def again(*_: object) -> Rates:
        raise AssertionError("measured twice")

    monkeypatch.setattr(device, "calibrate", again)
    assert cpu_target(cache=cache) == target
    assert cpu_target(cache=KernelCache(cache.root)) == target


def test_a_lower_instruction_set(cache: KernelCache, monkeypatch: pytest.MonkeyPatch, counted: list[Target]) -> None:
    assert cpu_target(Isa.PORTABLE, cache=cache).arch == "portable"
    monkeypatch.setenv("FUSER_ISA", "Portable")
    lowered = cpu_target(cache=cache)
    assert lowered.arch == "portable" and lowered.features == frozenset() and lowered.vector_bytes == 16
    monkeypatch.delenv("FUSER_ISA")
    assert cpu_target(cache=cache).arch == detect_isa().value
    if detect_isa() is not Isa.PORTABLE:
        assert [target.arch for target in counted] == ["portable", detect_isa().value]
    monkeypatch.setenv("FUSER_ISA", "sse9")
    with pytest.raises(FuserError, match=r"'sse9'.*avx512, avx2, neon, portable"):
        cpu_target(cache=cache)


def test_an_instruction_set_that_the_cpu_lacks(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "detect_isa", lambda: Isa.AVX2)
    monkeypatch.setenv("FUSER_ISA", "avx512")
    with pytest.raises(FuserError, match=r"does not have the instruction set avx512; its best is avx2"):
        cpu_target(cache=cache)
    with pytest.raises(FuserError, match="neon"):
        cpu_target(Isa.NEON, cache=cache)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"peak_flops": 1.0, "bandwidth": 1.0},
        {"peak_flops": "fast", "bandwidth": 1.0, "launch_seconds": 1.0},
        {"peak_flops": -1.0, "bandwidth": 1.0, "launch_seconds": 1.0},
        {"peak_flops": 0, "bandwidth": 1.0, "launch_seconds": 1.0},
        {"peak_flops": math.inf, "bandwidth": 1.0, "launch_seconds": 1.0},
    ],
)
def test_senseless_rates_are_measured_again(
    cache: KernelCache, counted: list[Target], record: dict[str, object]
) -> None:
    target = cpu_target(cache=cache)
    cache.write_record("calibration", calibration_key(target), record)
    forget()
    assert cpu_target(cache=cache).peak_flops == 1e9 + 2
    forget()
    assert cpu_target(cache=cache).peak_flops == 1e9 + 2 and len(counted) == 2


def test_damaged_rates_are_measured_again(cache: KernelCache, counted: list[Target]) -> None:
    cpu_target(cache=cache)
    for file in (cache.root / "records" / "calibration").iterdir():
        file.write_text("{")
    forget()
    assert cpu_target(cache=cache).peak_flops == 1e9 + 2


def test_measuring_again_on_request(cache: KernelCache, counted: list[Target]) -> None:
    cpu_target(cache=cache)
    assert cpu_target(cache=cache, recalibrate=True).peak_flops == 1e9 + 2
    assert cpu_target(cache=cache).peak_flops == 1e9 + 2 and len(counted) == 2


def test_rates_belong_to_a_machine(cache: KernelCache, counted: list[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    target = cpu_target(cache=cache)
    key = calibration_key(target)
    for change in (
        {"cores": target.cores + 1},
        {"arch": "neon"},
        {"features": frozenset({"x"})},
        {"cache_bytes": (1, 2, 3)},
    ):
        assert calibration_key(dataclasses.replace(target, **change)) != key
    assert calibration_key(dataclasses.replace(target, peak_flops=1.0)) == key
    monkeypatch.setattr(device, "cpu_name", lambda: "another CPU")
    assert calibration_key(target) != key


def test_without_a_compiler_rates_are_assumed(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    target = cpu_target(cache=cache)
    assert 0 < target.peak_flops < 1e12 and target.bandwidth == device._ASSUMED_BANDWIDTH
    assert "cannot measure" in caplog.text and "nowhere" in caplog.text
    # The guess is not remembered: it is replaced as soon as there is a compiler.
    assert cache.read_record("calibration", calibration_key(target)) is None


# Reading the system


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
        ({}, device._TYPICAL_CACHES),
        ({"l1d": "", "l2": "0K", "l3": "many"}, device._TYPICAL_CACHES),
    ],
)
def test_cache_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: dict[str, str], sizes: tuple[int, int, int]
) -> None:
    write(tmp_path, cache_files(min(os.sched_getaffinity(0)), **levels))
    monkeypatch.setattr(device, "_CPUS", tmp_path)
    assert device.cache_sizes() == sizes


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
    monkeypatch.setattr(device, "_CPUS", tmp_path)
    monkeypatch.setattr(device, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    assert device.usable_cores() == cores


def test_this_cpu_has_a_name() -> None:
    assert device.cpu_name() and device.cpu_name() != platform.machine()


# Doctor


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuser.runtime.doctor import diagnose

    checks = diagnose()
    assert [check.name for check in checks] == [
        *(
            "torch",
            "instruction set",
            "OpenMP runtime",
            "kernel cache",
            "disk space",
            "ninja",
            "C++ compiler",
            "target",
            "GPU",
        ),
    ]
    assert [check for check in checks if not check.ok or not check.detail or check.advice] == []


@pytest.mark.parametrize("trouble", ["compiler", "cache file", "unsafe cache", "isa", "disk", "damage", "ninja"])
def test_trouble_is_named(
    trouble: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: list[Target],
    compiler: Callable[[str], Path],
) -> None:
    from fuser.runtime import doctor
    from fuser.runtime.cache import default_cache

    root = tmp_path / "default-cache"
    expected = {trouble}
    if trouble == "compiler":
        compiler("echo out of order >&2; exit 1")
        expected = {"C++ compiler"}
    elif trouble == "cache file":
        root.write_text("")
        expected = {"kernel cache"}
    elif trouble == "unsafe cache":
        root.mkdir()
        root.chmod(0o777)
        expected = {"kernel cache", "target"}
    elif trouble == "isa":
        monkeypatch.setenv("FUSER_ISA", "sse9")
        expected = {"target"}
    elif trouble == "disk":
        monkeypatch.setattr(doctor, "_LOW_DISK_BYTES", 1 << 80)
        expected = {"disk space"}
    elif trouble == "damage":
        default_cache().write_record("tuning", "a", {})
        next((root / "records" / "tuning").iterdir()).write_text("")
        expected = {"kernel cache"}
    elif trouble == "ninja":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("ninja.BIN_DIR", str(tmp_path))
        expected = {"ninja", "C++ compiler"}
    checks = {check.name: check for check in doctor.diagnose()}
    assert {name for name, check in checks.items() if not check.ok} == expected
    assert all(checks[name].advice for name in expected)


@pytest.mark.parametrize(
    ("driver", "usable", "nvcc", "ok", "words"),
    [
        (None, False, "", True, "no NVIDIA driver"),
        ((13, 0), False, "", False, "torch cannot use it"),
        ((13, 0), True, "#!/bin/sh\nexit 1\n", False, "no nvcc here can build for sm_90a"),
    ],
)
def test_what_is_said_of_a_gpu(
    driver: tuple[int, int] | None,
    usable: bool,
    nvcc: str,
    ok: bool,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fuser.runtime import cuda, doctor

    broken = tmp_path / "nvcc"
    broken.write_text(nvcc)
    broken.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(broken))
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    (check,) = (check for check in doctor.diagnose() if check.name == "GPU")
    assert check.ok is ok and words in check.detail
    assert bool(check.advice) is not ok
