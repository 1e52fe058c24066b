"""Checks of the machine that a user can run when something does not work (``fuserc doctor``)."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fuser.ir.errors import FuserError
from fuser.ir.target import Isa, Target, cuda_target
from fuser.runtime import cuda
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.compilers import INSTALL_COMPILER, INSTALL_NINJA, find_ninja, find_toolchain
from fuser.runtime.cpuinfo import cpu_name, detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import loaded_runtimes, openmp_runtime
from fuser.runtime.nvcc import INSTALL_NVCC, find_nvcc
from fuser.runtime.store import default_root

_LOW_DISK_BYTES = 256 << 20
_OLDEST_TORCH = (2, 6)


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is as it should be, what was found, and what to do if it is not."""

    name: str
    ok: bool
    detail: str
    advice: str = ""


def diagnose() -> list[Check]:
    """All checks, in the order in which a problem in one explains the next. Raises nothing that a check can say."""
    checks = [_guard("torch", _torch), _guard("instruction set", _isa), _guard("OpenMP runtime", _openmp)]
    checks.append(_guard("kernel cache", _cache, "set FUSER_CACHE_DIR to a directory that only you can write to"))
    try:
        cache: KernelCache | None = default_cache()
    except FuserError:
        cache = None
    if cache is not None:
        checks.append(_guard("disk space", lambda: _disk(cache)))
    checks.append(_guard("ninja", _ninja, INSTALL_NINJA))
    try:
        target = cpu_target(cache=cache)
    except FuserError as error:
        return [*checks, Check("target", False, str(error), "correct FUSER_ISA or FUSER_CACHE_DIR")]
    checks.append(_guard("C++ compiler", lambda: _compiler(target), INSTALL_COMPILER))
    checks.append(_guard("target", lambda: _rates(target)))
    checks.append(_guard("GPU", _gpu, INSTALL_NVCC))
    return checks


def _guard(name: str, check: Callable[[], Check], advice: str = "") -> Check:
    try:
        found = check()
        return dataclasses.replace(found, advice="") if found.ok else found
    except (FuserError, OSError) as error:
        return Check(name, False, str(error), advice)


def _torch() -> Check:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    detail = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    return Check("torch", version >= _OLDEST_TORCH, detail, "install torch 2.6 or newer")


def _isa() -> Check:
    isa = detect_isa()
    advice = "kernels run, but without wide vectors; use an x86-64 CPU with AVX2 or a 64-bit Arm CPU for speed"
    chosen = os.environ.get("FUSER_ISA")
    return Check(
        "instruction set",
        isa is not Isa.PORTABLE,
        f"{cpu_name()}: {isa.value}" + (f", lowered to {chosen}" if chosen else ""),
        advice,
    )


def _openmp() -> Check:
    runtime = openmp_runtime()
    loaded = loaded_runtimes()
    others = [str(path) for path in loaded if path != runtime.path]
    detail = f"{runtime.path}" + (f"; also loaded: {', '.join(others)}" if others else "")
    advice = "two OpenMP runtimes in one process fight over its cores: find the package that brings the second one"
    return Check("OpenMP runtime", not others, detail, advice)


def _cache() -> Check:
    wanted, cache = default_root(), default_cache()
    if cache.root != wanted:
        advice = "set FUSER_CACHE_DIR to a writable directory, or kernels are compiled again in every process"
        return Check(
            "kernel cache", False, f"{wanted} cannot be written; using {cache.root} until the process ends", advice
        )
    report = cache.verify()
    mode = stat.S_IMODE(cache.root.stat().st_mode)
    detail = (
        f"{cache.root} (mode {mode:o}): {report.kernels} kernels and {report.records} records, "
        f"{cache.size() / 2**20:.1f} of {cache.max_bytes / 2**20:.0f} MiB"
    )
    if report.damaged:
        names = ", ".join(name for name, _ in report.damaged[:5])
        return Check(
            "kernel cache", False, f"{detail}; {len(report.damaged)} damaged: {names}", "they are rebuilt when needed"
        )
    return Check("kernel cache", True, detail)


def _disk(cache: KernelCache) -> Check:
    free = shutil.disk_usage(cache.root).free
    return Check(
        "disk space", free >= _LOW_DISK_BYTES, f"{free / 2**30:.1f} GiB free for {cache.root}", "free some space"
    )


def _ninja() -> Check:
    return Check("ninja", True, str(find_ninja()))


def _compiler(target: Target) -> Check:
    # Without the cache: a compiler that worked once may have been broken since.
    toolchain = find_toolchain(target)
    return Check("C++ compiler", True, f"{toolchain.name}; builds C++17 with OpenMP for {target.arch}")


def _rates(target: Target) -> Check:
    features = f" with {', '.join(sorted(target.features))}" if target.features else ""
    l1, l2, l3 = target.cache_bytes
    detail = (
        f"{target.cores} cores, {target.arch}{features}, caches {l1 >> 10} KiB / {l2 >> 10} KiB / {l3 >> 20} MiB, "
        f"{target.peak_flops / 1e9:.0f} Gflop/s a core, {target.bandwidth / 1e9:.1f} GB/s, "
        f"{target.launch_seconds * 1e6:.2f} µs a launch"
    )
    return Check("target", True, detail)


def _gpu() -> Check:
    """Whether kernels can be built for the GPU, where there is one: a machine without is as it should be, too."""
    driver = cuda.driver_version()
    if driver is None:
        return Check("GPU", True, "no NVIDIA driver: kernels run on the CPU")
    if not torch.cuda.is_available():
        advice = "install a build of torch for CUDA that this driver can run"
        return Check("GPU", False, f"a driver for CUDA {driver[0]}.{driver[1]}, but torch cannot use it", advice)
    device = torch.device("cuda", torch.cuda.current_device())
    arch = cuda.architecture(device)
    compiler = find_nvcc(cuda_target(arch))
    name = torch.cuda.get_device_name(device)
    return Check("GPU", True, f"{name} ({arch}), a driver for CUDA {driver[0]}.{driver[1]}, {compiler.name}")
