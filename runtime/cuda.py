"""NVIDIA GPUs: the driver, what a device is, and what its errors mean."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fuser.ir.errors import CacheError, FuserError, KernelError
from fuser.ir.target import CUDA_ARCHS, Target, cuda_target
from fuser.runtime.cache import KernelCache, default_cache

logger = logging.getLogger("fuser")
PROBE_VERSION = 1
CUDA_ERROR = 1000
"""Kernels return this much more than the CUDA error that their launch ended with."""
_PROBE_BYTES = 1 << 28
_PROBE_WIDTH = 4096
_INSUFFICIENT_DRIVER = 35
_NO_KERNEL_IMAGE = 209
_OUT_OF_MEMORY = 2
_ADVICE = {
    _OUT_OF_MEMORY: "the GPU's memory is full; free some, or use smaller batches",
    _INSUFFICIENT_DRIVER: "the driver is missing or older than the CUDA toolkit that built the kernels; update the "
    "driver, or build with a toolkit of the driver's major release",
    98: "the kernel library holds no code for this GPU; run `fuserc cache verify`",
    _NO_KERNEL_IMAGE: "the kernel was built for another architecture than this GPU; compile the model here",
    701: "the kernel asks for more registers or shared memory than this GPU has",
}


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The latest CUDA release that this machine's driver runs, or None without a driver."""
    driver = _driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value <= 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def kernel_error(symbol: str, status: int) -> KernelError:
    """What to raise when the kernel ``symbol`` returns ``status``, at least :data:`CUDA_ERROR`."""
    code = status - CUDA_ERROR
    advice = _ADVICE.get(code, "run with CUDA_LAUNCH_BLOCKING=1 and compute-sanitizer to find out more")
    return KernelError(f"the kernel {symbol} could not be launched: CUDA error {code}{_name(code)}; {advice}")


def architecture(device: torch.device) -> str:
    """The architecture that kernels for this GPU are built for.

    Raises FuserError if there are no templates for it.
    """
    major, minor = torch.cuda.get_device_capability(device)
    # sm_90a has the instructions of Hopper alone, and runs on nothing else.
    arch = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    if arch not in CUDA_ARCHS:
        raise FuserError(
            f"{torch.cuda.get_device_name(device)} has the architecture {arch}, and fuser has CUDA kernels for "
            f"{', '.join(CUDA_ARCHS)} only; run the model without fuser, or on the CPU"
        )
    return arch


def gpu_target(device: torch.device, *, cache: KernelCache | None = None, recalibrate: bool = False) -> Target:
    """This GPU as a target; its rates are measured once and then remembered in the cache.

    Raises FuserError without a usable GPU or for an architecture without templates.
    """
    device = resolve_device(device)
    if recalibrate:
        _cached_target.cache_clear()
        return _measured_target(device, default_cache() if cache is None else cache, True)
    return _cached_target(device, default_cache() if cache is None else cache)


def resolve_device(device: torch.device) -> torch.device:
    """The device with its number. Raises FuserError that says why there is no such GPU."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise FuserError("this build of PyTorch has no CUDA; install one that has (https://pytorch.org)")
        driver = driver_version()
        if driver is None:
            raise FuserError("this machine has no NVIDIA driver; install one, or run on the CPU")
        if driver[0] < int(torch.version.cuda.split(".")[0]):
            raise FuserError(
                f"the NVIDIA driver is too old: it runs CUDA up to {driver[0]}.{driver[1]}, and this PyTorch was built "
                f"with CUDA {torch.version.cuda}; update the driver, or install a PyTorch for CUDA {driver[0]}"
            )
        raise FuserError("PyTorch finds no usable GPU: is there one, and is CUDA_VISIBLE_DEVICES right?")
    index = torch.cuda.current_device() if device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        raise FuserError(f"there is no device cuda:{index}; this process sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


@functools.lru_cache(maxsize=16)
def _cached_target(device: torch.device, cache: KernelCache) -> Target:
    return _measured_target(device, cache, False)


def _measured_target(device: torch.device, cache: KernelCache, recalibrate: bool) -> Target:
    known = torch.cuda.get_device_properties(device)
    target = cuda_target(
        architecture(device),
        cores=known.multi_processor_count,
        l2_bytes=getattr(known, "L2_cache_size", None),
        shared_bytes=getattr(known, "shared_memory_per_block_optin", None),
    )
    key = "\0".join([str(PROBE_VERSION), known.name, target.arch, str(target.cores), str(torch.version.cuda)])
    record = None if recalibrate else cache.read_record("calibration", key)
    rates = _parse(record)
    if rates is None:
        try:
            rates = measure(device)
        except RuntimeError as error:
            logger.warning("cannot measure %s, so the cost model assumes its data sheet's rates: %s", known.name, error)
            return target
        with contextlib.suppress(CacheError):
            cache.write_record("calibration", key, dataclasses.asdict(rates))
    return cuda_target(
        target.arch,
        cores=target.cores,
        l2_bytes=target.cache_bytes[1],
        shared_bytes=target.shared_bytes,
        peak_flops=rates.flops / target.cores,
        tensor_flops=rates.tensor_flops / target.cores,
        bandwidth=rates.bandwidth,
    )


@dataclass(frozen=True)
class GpuRates:
    """Measured limits of a whole GPU: fp32 and fp16 tensor-core products in flop/s, a copy in bytes/s."""

    flops: float
    tensor_flops: float
    bandwidth: float


def measure(device: torch.device) -> GpuRates:
    """Measure the rates of a GPU with PyTorch's own products and copies (some 50 ms).

    Raises RuntimeError, as PyTorch does, when there is not enough memory for it.
    """
    with torch.cuda.device(device), torch.no_grad():
        source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source), 5)
        seconds = []
        for dtype in (torch.float32, torch.float16):
            # Random numbers: a GPU draws less power for zeros, and runs faster.
            a, b = (torch.randn(_PROBE_WIDTH, _PROBE_WIDTH, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                seconds.append(_fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 3))  # type: ignore[misc]
            finally:
                torch.set_float32_matmul_precision(precision)
        product = 2.0 * _PROBE_WIDTH**3
        return GpuRates(product / seconds[0], product / seconds[1], 2.0 * _PROBE_BYTES / copy)


def _fastest(run: Callable[[], object], rounds: int) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _parse(record: Mapping[str, Any] | None) -> GpuRates | None:
    names = [field.name for field in dataclasses.fields(GpuRates)]
    values = [record.get(name) for name in names] if record is not None else []
    rates = [v for v in values if isinstance(v, float) and 0 < v < float("inf")]
    return GpuRates(*rates) if len(rates) == len(names) else None


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _name(code: int) -> str:
    """The driver's name for an error, in parentheses."""
    driver, text = _driver(), ctypes.c_char_p()
    if driver is None or driver.cuGetErrorName(code, ctypes.byref(text)) != 0 or text.value is None:
        return ""
    return f" ({text.value.decode(errors='replace')})"
