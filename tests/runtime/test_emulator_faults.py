"""Planted faults: the emulator names the kernel, the block, the thread, the line and what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuser.templates
from fuser.ir.target import emulated_target
from fuser.runtime.build import Source, build
from fuser.runtime.cache import default_cache
from fuser.runtime.emulator import EmulationError, run

SOURCE = Path(__file__).with_name("faults.cu").read_text()
HEADERS = Path(fuser.templates.__file__).parent

NEEDS_CHECKS = {
    "missing_barrier": "race on 'tile'",
    "missing_second_barrier": "race on 'tile'",
    "warp_instead_of_block": "race on 'tile'",
    "shuffle_as_barrier": "race on 'tile'",
    "atomic_and_plain": "race on 'count'",
    "ldmatrix_race": "race on array 0 of dynamic shared memory",
    "static_index": "out of bounds: index 32 of an array of type 'float [32]'",
    "static_pointer": "out of bounds: writes 4 bytes",
    "template_pointer": "out of bounds: writes 4 bytes",
    "dynamic_index": "behind the end of an array; its last byte is array 0",
    "in_front": "in front of dynamic shared memory",
    "wrong_fragment": "out of bounds: reads 16 bytes",
    "global_index": "writes 4 bytes of global memory, 4 bytes behind the end of tensor 0",
    "async_global_index": "reads 4 bytes of global memory, 4 bytes behind the end of tensor 0",
    "early_read": "before the asynchronous copy to it",
    "wrong_group": "before the asynchronous copy to it",
    "wait_without_barrier": "race on array 0",
    "bulk_early": "before the asynchronous copy to it",
    "misaligned_vector": "misaligned: an access of type",
}
ALWAYS = {
    "misaligned_copy": "is not aligned to 16 bytes",
    "misaligned_row": "is not aligned to 16 bytes",
    "divergent_barrier": "divergent barrier",
    "barrier_and_warp": "deadlock (divergent barrier)",
    "lanes_disagree": "lanes of a warp disagree",
    "not_in_mask": "lane 16 is not in its own mask 0x0000ffff",
    "half_warp_mma": "mma needs all 32 lanes",
    "too_few_arrivals": "the phase of an mbarrier never completes",
    "no_mbarrier": "is not initialized",
    "wrong_barrier_count": "waited for by",
    "too_little_shared": "an array of 128 bytes behind 128 others; the kernel was launched with 248",
    "division": "integer division by zero",
    "trap": "called __trap",
}
REFUSED = {
    "too_many_threads": "a block of (32, 33, 1) threads",
    "too_much_shared": "245760 bytes of dynamic shared memory",
    "too_large_grid": "a grid of (1, 70000, 1) blocks",
}


@pytest.fixture(scope="module")
def plain() -> Path:
    return _build()


@pytest.fixture(scope="module")
def checked() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSER_EMULATOR_CHECKED", "1")
        return _build()


def _build() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        return build(
            [Source("with_barrier", SOURCE, ".cu")], emulated_target(), headers=HEADERS, cache=default_cache()
        )["with_barrier"]


def caught(library: Path, name: str) -> EmulationError:
    with pytest.raises(EmulationError) as info:
        run(library, name, [np.arange(64, dtype=np.float32)])
    return info.value


def faulty_lines(name: str) -> set[int]:
    return {i for i, line in enumerate(SOURCE.splitlines(), 1) if line.endswith(f"// {name}")}


def lines_of(error: EmulationError) -> set[int]:
    return {error.line} | {int(number) for number in re.findall(r"line (\d+)", error.fault)}


@pytest.mark.parametrize("name", [*NEEDS_CHECKS, *ALWAYS])
def test_fault_is_found_with_its_place(checked: Path, name: str) -> None:
    error = caught(checked, name)
    assert error.kernel == name
    assert {**NEEDS_CHECKS, **ALWAYS}[name] in error.fault
    assert name in str(error) and f"thread {error.thread}" in str(error) and f"block {error.block}" in str(error)
    # A race has two sides, and either may come second.
    assert lines_of(error) and lines_of(error) <= faulty_lines(name)
    assert Path(error.file).read_text() == SOURCE


@pytest.mark.parametrize("name", ALWAYS)
def test_fault_that_needs_no_checks(plain: Path, name: str) -> None:
    error = caught(plain, name)
    assert ALWAYS[name] in error.fault
    if name != "division":  # found by the processor: a line needs debug information
        assert lines_of(error) <= faulty_lines(name)


def test_both_sides_of_a_race_are_told(checked: Path) -> None:
    error = caught(checked, "missing_barrier")
    assert lines_of(error) == faulty_lines("missing_barrier")
    assert error.thread[0] in range(64)


@pytest.mark.parametrize("library", ["plain", "checked"])
@pytest.mark.parametrize(("name", "words"), [("wild_pointer", "no memory"), ("null_pointer", "no memory")])
def test_wild_memory_does_not_end_the_process(
    request: pytest.FixtureRequest, library: str, name: str, words: str
) -> None:
    error = caught(request.getfixturevalue(library), name)
    if library == "checked":
        assert "of global memory" in error.fault
        assert lines_of(error) == faulty_lines(name)
    else:
        assert words in error.fault


@pytest.mark.parametrize("library", ["plain", "checked"])
def test_local_memory_is_bounded(request: pytest.FixtureRequest, library: str) -> None:
    assert "KiB of local memory" in caught(request.getfixturevalue(library), "local_memory").fault


@pytest.mark.parametrize("library", ["plain", "checked"])
def test_endless_loop_is_stopped(request: pytest.FixtureRequest, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_TIMEOUT", "0.5")
    assert "runs for 0.5 s without coming to a barrier" in caught(request.getfixturevalue(library), "endless").fault


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_launch_that_no_gpu_would_take(plain: Path, name: str, words: str) -> None:
    error = caught(plain, name)
    assert words in error.fault
    assert error.line == 0


def test_empty_grid_runs_nothing(plain: Path) -> None:
    out = np.zeros(64, dtype=np.float32)
    run(plain, "empty_grid", [out])
    assert not out.any()


def test_right_kernel_after_a_fault(checked: Path) -> None:
    """A fault leaves nothing behind: the workers that were stopped serve the next launch."""
    for _ in range(3):
        caught(checked, "missing_barrier")
        caught(checked, "barrier_and_warp")
        out = np.arange(128, dtype=np.float32)
        run(checked, "with_barrier", [out])
        np.testing.assert_array_equal(out, np.arange(128).reshape(2, 64)[:, ::-1].ravel())


def test_faults_are_quiet_without_checks(plain: Path) -> None:
    """What only the checking mode finds must at least not crash without it."""
    for name in NEEDS_CHECKS:
        run(plain, name, [np.zeros(65, dtype=np.float32)])


def test_signals_of_the_process_are_its_own_again(plain: Path) -> None:
    """After a launch a segmentation fault of the process ends it, as it would have before."""
    code = f"""
import ctypes, numpy as np
from pathlib import Path
from fuser.runtime.emulator import EmulationError, run
try:
    run(Path({str(plain)!r}), "wild_pointer", [np.zeros(64, dtype=np.float32)])
except EmulationError as error:
    print("caught", flush=True)
ctypes.string_at(0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "caught"
    assert result.returncode == -11
