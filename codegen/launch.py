"""Running one kernel call on tensors, without a program around it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.errors import KernelError
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall, KernelSpec, Literal, Packed
from fuser.runtime.abi import KernelArgs
from fuser.runtime.library import Kernel

_ALIGNMENT = 64
_MOST_KEPT = 1 << 26
"""Bytes that a thread keeps at most."""
_KEPT = threading.local()


def launch(call: KernelCall, tensors: Mapping[str, Tensor], target: Target, threads: int) -> None:
    """Run ``call`` on ``tensors``, by the names of its values: on a GPU on the current stream of their device.

    They lie in memory as the extents of the call say, on the device of ``target``, or on the CPU for an emulated one.
    Builds the kernel if it must. Raises BuildError, ToolchainError or CacheError when there is no kernel, KernelError
    when it fails.
    """
    kernel = _kernel(call.spec, target)
    device = next(iter(tensors.values())).device
    addresses, kept = [], []
    for ref in call.tensors:
        if isinstance(ref, Packed):
            raise KernelError(f"the kernel {kernel.symbol} takes packed weights, which only a program has")
        if isinstance(ref, Literal) and device.type == "cpu":
            addresses.append(ref.array.ctypes.data)
        else:
            kept.append(_on_device(ref, device) if isinstance(ref, Literal) else tensors[ref])
            addresses.append(kept[-1].data_ptr())
    workspace = 0
    if call.workspace_bytes:
        kept.append(scratch(call.workspace_bytes + _ALIGNMENT, device))
        workspace = -(-kept[-1].data_ptr() // _ALIGNMENT) * _ALIGNMENT
    args = KernelArgs.pack(addresses, call.extents, threads, workspace)
    if target.kind == "cuda":
        _on_gpu(kernel, args, device, target)
    else:
        kernel(args)


def scratch(size: int, device: torch.device) -> Tensor:
    """``size`` bytes or more until this thread's next launch, on the device.

    On CPUs a thread keeps them for it: as large as they are, memory that is freed goes back to the system, and its next
    pages, thousands of them, would cost more than many a kernel.
    """
    if device.type != "cpu" or size > _MOST_KEPT:
        return torch.empty(size, dtype=torch.uint8, device=device)
    if getattr(_KEPT, "size", 0) < size:
        _KEPT.scratch = None  # goes before there is more
        _KEPT.scratch, _KEPT.size = torch.empty(size, dtype=torch.uint8), size
    made: Tensor = _KEPT.scratch
    return made


def _on_gpu(kernel: Kernel, args: KernelArgs, device: torch.device, target: Target) -> None:
    from fuser.runtime.cuda import CUDA_ERROR, kernel_error
    from fuser.runtime.emulator import FAULT_STATUS, fault

    if target.emulated:
        if (status := kernel.status(args)) == FAULT_STATUS:
            raise fault(kernel.path, kernel.symbol)
    else:
        with torch.cuda.device(device):
            status = kernel.status(args, torch.cuda.current_stream(device).cuda_stream)
    if status >= CUDA_ERROR:
        raise kernel_error(kernel.symbol, status)
    if status:
        raise KernelError(f"the kernel {kernel.symbol} cannot run tensors of these sizes (status {status})")


@functools.lru_cache(maxsize=64)
def _on_device(literal: Literal, device: torch.device) -> Tensor:
    return literal.tensor.to(device)


@functools.cache
def _kernel(spec: KernelSpec, target: Target) -> Kernel:
    from fuser.runtime.build import build_and_load

    (kernel,) = build_and_load([render(spec)], target, headers=header_folder(target)).values()
    return kernel
