from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fuser.ir.errors import FuserError
from fuser.ir.target import Isa, Target
from fuser.runtime import calibration, cpuinfo, device
from fuser.runtime.cache import KernelCache
from fuser.runtime.calibration import Rates, calibration_key
from fuser.runtime.cpuinfo import detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import openmp_runtime


@pytest.fixture(autouse=True)
def one_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that other tests import, such as scikit-learn, bring OpenMP runtimes of their own."""
    from fuser.runtime import doctor

    monkeypatch.setattr(doctor, "loaded_runtimes", lambda: (openmp_runtime().path,))


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
    for module in (cpuinfo, device):
        monkeypatch.setattr(module, "detect_isa", lambda: Isa.AVX2)
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
    monkeypatch.setattr(calibration, "cpu_name", lambda: "another CPU")
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
