"""What this machine is: its instruction set, cores and caches, and the rates that the cost model needs."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import logging
import math
import mmap
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.errors import CacheError, FuserError
from fuser.ir.target import VECTOR_BYTES, Isa, Target
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.library import Kernel, load

PROBE_VERSION = 1
_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"})
_AVX512_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_EXTENSIONS = {
    Isa.AVX512: frozenset({"avx512_bf16", "avx512_vnni"}),
    Isa.AVX2: frozenset({"avx_vnni"}),
    Isa.NEON: frozenset({"asimddp", "bf16", "i8mm"}),
    Isa.PORTABLE: frozenset[str](),
}
_LOWER = {Isa.AVX512: (Isa.AVX2, Isa.PORTABLE), Isa.AVX2: (Isa.PORTABLE,), Isa.NEON: (Isa.PORTABLE,), Isa.PORTABLE: ()}
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# What a cache level that cannot be read is taken to be: L1 data, L2, L3 in bytes.
_TYPICAL_CACHES = (32 << 10, 1 << 20, 16 << 20)
# One FMA a cycle at 2.5 GHz; the cost model needs only the right order of magnitude.
_ASSUMED_CLOCK = 2.5e9
_ASSUMED_BANDWIDTH = 10e9
_ASSUMED_LAUNCH = 5e-6
_SLOWEST_LAUNCH = 2e-5
_SLICE_SECONDS = 1e-4

logger = logging.getLogger("fuser")

_FLOPS_PROBE = r"""
#include "abi.h"
// extents: rounds of independent fused multiply-adds: more chains than a latency of 5 on two ports needs.
typedef float vec __attribute__((vector_size(FUSER_VECTOR_BYTES)));
extern "C" int fuser_probe_flops(const FuserArgs* args, void*) {
    constexpr int chains = FUSER_VECTOR_BYTES >= 64 ? 16 : 12;
    float* out = static_cast<float*>(args->tensors[0]);
    vec scale = vec{} + 0.999f, shift = vec{} + 0.001f, sum[chains];
    asm volatile("" : "+x"(scale), "+x"(shift));
    for (int c = 0; c < chains; ++c) sum[c] = vec{} + float(c);
    for (int64_t i = 0; i < static_cast<const int64_t*>(args->extents)[0]; ++i)
        for (int c = 0; c < chains; ++c) sum[c] = sum[c] * scale + shift;
    vec total = vec{};
    for (int c = 0; c < chains; ++c) total += sum[c];
    out[0] = total[0];
    out[1] = float(chains);
    return 0;
}
"""

_COPY_PROBE = r"""
#include "abi.h"
// tensors: source and destination of as many floats as the extent says; scaled, since a plain copy would become memcpy.
extern "C" int fuser_probe_copy(const FuserArgs* args, void*) {
    const float* __restrict source = static_cast<const float*>(args->tensors[0]);
    float* __restrict target = static_cast<float*>(args->tensors[1]);
    const int64_t count = static_cast<const int64_t*>(args->extents)[0];
    #pragma omp parallel for simd num_threads(args->threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) target[i] = 0.5f * source[i];
    return 0;
}
"""

_LAUNCH_PROBE = r"""
#include "abi.h"
#include <chrono>
// The shortest of many calls of an empty kernel through the ABI, one parallel region each, in seconds. Every call is
// timed by itself, since on a busy machine one can take a time slice of the scheduler. extents: calls, nanoseconds.
static int empty(const FuserArgs* args, void*) {
    #pragma omp parallel num_threads(args->threads)
    { asm volatile("" ::: "memory"); }
    return 0;
}
extern "C" int fuser_probe_launch(const FuserArgs* args, void* stream) {
    const FuserStep step = {empty, args};
    const volatile FuserStep* hidden = &step;
    using clock = std::chrono::steady_clock;
    const auto* extents = static_cast<const int64_t*>(args->extents);
    const clock::time_point start = clock::now(), end = start + std::chrono::nanoseconds(extents[1]);
    double best = 1.0;
    clock::time_point before = start;
    for (int64_t i = 0; i < extents[0] && before < end; ++i) {
        if (int status = hidden->kernel(hidden->args, stream)) return status;
        const clock::time_point after = clock::now();
        const double seconds = std::chrono::duration<double>(after - before).count();
        best = seconds < best ? seconds : best;
        before = after;
    }
    *static_cast<double*>(args->tensors[0]) = best;
    return 0;
}
"""


@dataclass(frozen=True)
class Rates:
    """Measured limits: ``peak_flops`` of one core in flop/s, ``bandwidth`` of all in bytes/s, ``launch_seconds``."""

    peak_flops: float
    bandwidth: float
    launch_seconds: float


def cpu_target(isa: Isa | None = None, *, cache: KernelCache | None = None, recalibrate: bool = False) -> Target:
    """This machine's CPU as a target, with rates that are measured once and then remembered in the cache.

    ``isa`` (default: ``$FUSER_ISA`` if set, else the best that there is) may name a lower instruction set than the
    CPU's. Without a compiler the rates are conservative guesses. Raises :class:`FuserError` for an instruction set
    that the CPU lacks.
    """
    chosen = _choose(isa)
    cache = default_cache() if cache is None else cache
    if recalibrate:
        _cached_target.cache_clear()
        return _measured_target(chosen, cache, True)
    return _cached_target(chosen, cache, os.getpid())


def detect_isa() -> Isa:
    """The best instruction set of this CPU that the templates know."""
    return _isa_of(cpu_flags(), platform.machine())


def lacking(target: Target) -> str:
    """What keeps this CPU from running kernels built for ``target``, as the end of "this CPU …"; empty if nothing."""
    best, isa = detect_isa(), Isa(target.arch)
    if isa is not best and isa not in _LOWER[best]:
        return f"({cpu_name()}) has no {isa.value}; its best is {best.value}"
    if missing := sorted(target.features - cpu_flags()):
        return f"({cpu_name()}) has no {', '.join(missing)}"
    return ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Names of this CPU's extensions as Linux spells them, and the operating system allows them."""
    fields = _cpuinfo()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def cpu_name() -> str:
    """The CPU's model, for people and for the key of its calibration."""
    fields = _cpuinfo()
    names = [
        fields[name] for name in ("model name", "cpu family", "model", "CPU implementer", "CPU part") if name in fields
    ]
    return " ".join(names) or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may use: those of its affinity mask, within the container's quota."""
    cpus = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    quota = _cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def cache_sizes() -> tuple[int, int, int]:
    """Bytes of (L1 data, L2 of one core, shared L3); a level that the system does not tell is a typical one."""
    cpu = min(os.sched_getaffinity(0))
    sizes: dict[int, int] = {}
    for folder in (_CPUS / f"cpu{cpu}" / "cache").glob("index*"):
        level, kind = _read(folder / "level"), _read(folder / "type")
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / "size") or "")
        if size and level.isdecimal() and kind in ("Data", "Unified") and int(size[1]) > 0:
            sizes[int(level)] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    l1 = sizes.get(1, _TYPICAL_CACHES[0])
    l2 = sizes.get(2, _TYPICAL_CACHES[1])
    # A CPU that tells its L2 but no L3 has none: its L2 is the last level.
    l3 = sizes.get(3, l2 if 2 in sizes else _TYPICAL_CACHES[2])
    return l1, l2, l3


def calibrate(target: Target, cache: KernelCache) -> Rates:
    """Measure the rates of ``target`` on this machine with three small kernels (under 1.5 s in all).

    Raises :class:`FuserError` if the kernels cannot be built or run.
    """
    probes = {"fuser_probe_flops": _FLOPS_PROBE, "fuser_probe_copy": _COPY_PROBE, "fuser_probe_launch": _LAUNCH_PROBE}
    sources = [Source(symbol, text) for symbol, text in probes.items()]
    headers = Path(__file__).parent.parent / "templates" / "cpu"
    paths = build(sources, target, headers=headers, cache=cache)
    flops, copy, launch = (load(paths[symbol], symbol) for symbol in probes)
    return Rates(
        peak_flops=_measure_flops(flops, target),
        bandwidth=_measure_copy(copy, target),
        launch_seconds=_measure_launch(launch, target.cores),
    )


def _choose(isa: Isa | None) -> Isa:
    best = detect_isa()
    if isa is None:
        name = os.environ.get("FUSER_ISA", "").strip().lower()
        if not name:
            return best
        try:
            isa = Isa(name)
        except ValueError:
            names = ", ".join(known.value for known in Isa)
            raise FuserError(f"FUSER_ISA is {name!r}; it can be one of {names}") from None
    if isa is not best and isa not in _LOWER[best]:
        raise FuserError(
            f"this CPU ({cpu_name()}) does not have the instruction set {isa.value}; its best is {best.value}"
        )
    return isa


@functools.lru_cache(maxsize=16)
def _cached_target(isa: Isa, cache: KernelCache, process: int) -> Target:
    # The process is part of the key since a forked child may have other cores to run on.
    return _measured_target(isa, cache, False)


def _measured_target(isa: Isa, cache: KernelCache, recalibrate: bool) -> Target:
    features = cpu_flags() & _EXTENSIONS[isa]
    assumed = Rates(2 * (VECTOR_BYTES[isa] // 4) * _ASSUMED_CLOCK, _ASSUMED_BANDWIDTH, _ASSUMED_LAUNCH)
    target = Target(
        kind="cpu",
        arch=isa.value,
        features=features,
        cores=usable_cores(),
        cache_bytes=cache_sizes(),
        **dataclasses.asdict(assumed),
    )
    key = calibration_key(target)
    rates = None if recalibrate else _parse_rates(cache.read_record("calibration", key))
    if rates is None:
        try:
            rates = calibrate(target, cache)
        except FuserError as error:
            logger.warning("cannot measure this CPU, so the cost model assumes typical rates: %s", error)
            return target
        try:
            cache.write_record("calibration", key, dataclasses.asdict(rates))
        except CacheError as error:
            logger.warning("the measured rates of this CPU are not remembered: %s", error)
    # More is the delay of a machine busy with something else, by which nothing should be decided.
    launch = min(rates.launch_seconds, _SLOWEST_LAUNCH)
    return dataclasses.replace(target, **{**dataclasses.asdict(rates), "launch_seconds": launch})


def calibration_key(target: Target) -> str:
    """The key of the calibration record of ``target`` on this machine."""
    parts = [PROBE_VERSION, cpu_name(), target.key, target.cores, *target.cache_bytes]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _parse_rates(record: dict[str, object] | None) -> Rates | None:
    if record is None:
        return None
    values = [record.get(field.name) for field in dataclasses.fields(Rates)]
    numbers = [
        float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    ]
    return Rates(*numbers) if len(numbers) == len(values) else None


def _isa_of(flags: frozenset[str], machine: str) -> Isa:
    if machine in ("x86_64", "AMD64"):
        if not flags:
            import torch

            # Some sandboxes hide /proc/cpuinfo; torch asks the CPU itself.
            capability = str(torch.backends.cpu.get_cpu_capability())
            return {"AVX512": Isa.AVX512, "AVX2": Isa.AVX2}.get(capability, Isa.PORTABLE)
        if flags >= _AVX512_FLAGS:
            return Isa.AVX512
        return Isa.AVX2 if flags >= _AVX2_FLAGS else Isa.PORTABLE
    return Isa.NEON if machine in ("aarch64", "arm64") else Isa.PORTABLE


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _cgroup_quota() -> float | None:
    """CPUs that the container may keep busy (cgroup v2, then v1), or None for no limit."""
    pairs = [_read(_CGROUP / "cpu.max").split()]
    pairs.append([_read(_CGROUP / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")])
    for pair in pairs:
        if len(pair) == 2 and all(text.isdecimal() for text in pair) and int(pair[1]) > 0:
            return int(pair[0]) / int(pair[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
