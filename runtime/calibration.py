"""The rates of this machine's CPU, measured with the three small kernels ``templates/cpu/probe_*.cpp``."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import math
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.target import Target
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache
from fuser.runtime.cpuinfo import cpu_name
from fuser.runtime.library import Kernel, load

PROBE_VERSION = 1
_PROBES = Path(__file__).parent.parent / "templates" / "cpu"
_NAMES = ("probe_flops", "probe_copy", "probe_launch")
_SLICE_SECONDS = 1e-4


@dataclass(frozen=True)
class Rates:
    """Measured limits: ``peak_flops`` of one core in flop/s, ``bandwidth`` of all in bytes/s, ``launch_seconds``."""

    peak_flops: float
    bandwidth: float
    launch_seconds: float


def calibrate(target: Target, cache: KernelCache) -> Rates:
    """Measure the rates of ``target`` on this machine with three small kernels (under 1.5 s in all).

    Raises :class:`FuserError` if the kernels cannot be built or run.
    """
    sources = [Source(f"fuser_{name}", (_PROBES / f"{name}.cpp").read_text()) for name in _NAMES]
    paths = build(sources, target, headers=_PROBES, cache=cache)
    flops, copy, launch = (load(paths[source.symbol], source.symbol) for source in sources)
    return Rates(
        peak_flops=_measure_flops(flops, target),
        bandwidth=_measure_copy(copy, target),
        launch_seconds=_measure_launch(launch, target.cores),
    )


def calibration_key(target: Target) -> str:
    """The key of the calibration record of ``target`` on this machine."""
    parts = [PROBE_VERSION, cpu_name(), target.key, target.cores, *target.cache_bytes]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def parse_rates(record: dict[str, object] | None) -> Rates | None:
    """The rates of a calibration record; None for one that is damaged."""
    if record is None:
        return None
    values = [record.get(field.name) for field in dataclasses.fields(Rates)]
    numbers = [
        float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    ]
    return Rates(*numbers) if len(numbers) == len(values) else None


def _best_seconds(run: Callable[[], None], budget: float) -> float:
    """The shortest of as many runs as fit into ``budget`` seconds: what disturbs a run only ever makes it longer."""
    best, end = math.inf, time.perf_counter() + budget
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _measure_flops(kernel: Kernel, target: Target) -> float:
    rounds = 200_000
    out = (ctypes.c_float * 2)()
    args = KernelArgs.pack([ctypes.addressof(out)], [rounds])
    seconds = _best_seconds(lambda: kernel(args), budget=0.1)
    return rounds * out[1] * target.vector_lanes * 2 / seconds


def _measure_copy(kernel: Kernel, target: Target) -> float:
    size = min(max(3 * target.cache_bytes[2], 32 << 20), 256 << 20)
    with mmap.mmap(-1, 2 * size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(buffer)
        args = KernelArgs.pack([address, address + size], [size // 4], target.cores)
        back = KernelArgs.pack([address + size, address], [size // 4], target.cores)
        kernel(args)
        kernel(back)
        seconds = _best_seconds(lambda: kernel(args), budget=0.25)
        del buffer
    return 2 * size / seconds


def _measure_launch(kernel: Kernel, threads: int) -> float:
    found = ctypes.c_double()
    args = KernelArgs.pack([ctypes.addressof(found)], [10_000, 100_000_000], threads)
    best = math.inf
    # Until the system has moved a new thread to a core of its own, every call waits for a time slice.
    for _ in range(6):
        kernel(args)
        best = min(best, found.value)
        if best < _SLICE_SECONDS:
            break
    return best
