"""Which kernel takes given tensors, and running it on them."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.errors import FuserError, KernelError
from fuser.ir.target import Target
from fuser.kernels import attention_cuda
from fuser.kernels.attention import LARGEST_HEAD, AttentionParameters, extents, keep_plans, workspace_bytes
from fuser.kernels.attention_cuda import CudaAttentionParameters
from fuser.kernels.attention_tiles import Tiles
from fuser.kernels.base import STORAGE, DType, floating
from fuser.kernels.plan import AttentionPlan
from fuser.plans import CachedPlans
from fuser.runtime.abi import KernelArgs
from fuser.runtime.library import Kernel
from fuser.runtime.targets import target_of, threads_now, with_tf32

logger = logging.getLogger("fuser")
_ALIGNMENT = 64

keep_plans(CachedPlans())


class NoKernelError(Exception):
    """Why no kernel can take these tensors."""


def target_for(q: Tensor, v: Tensor, runtime: Tensor | None) -> Target:
    """The target of the tensors' device. Raises NoKernelError if it has no kernel for them."""
    if q.device.type not in ("cpu", "cuda") or q.layout is not torch.strided:
        raise NoKernelError(f"there is no kernel for {q.device.type} tensors")
    try:
        target = target_of(q.device)
    except FuserError as error:
        raise NoKernelError(str(error)) from error
    floats = floating(target)
    if q.dtype not in floats:
        raise NoKernelError(f"there is no kernel for {q.dtype}")
    if not 0 < v.shape[3] <= LARGEST_HEAD or q.shape[3] > LARGEST_HEAD:
        raise NoKernelError(f"there is no kernel for heads wider than {LARGEST_HEAD}")
    if runtime is not None and runtime.dtype not in (torch.bool, *floats):
        raise NoKernelError(f"there is no kernel for masks of {runtime.dtype}")
    if target.kind == "cuda" and not attention_cuda.choices(
        q.shape[3], v.shape[3], STORAGE[q.dtype], None, False, target
    ):
        raise NoKernelError(
            f"heads of {q.shape[3]} and {v.shape[3]} {q.dtype} numbers do not fit the shared memory of this GPU"
        )
    return target


def unsupported(q: Tensor, v: Tensor, runtime: Tensor | None) -> str:
    """Why no kernel can take these tensors, or an empty string."""
    try:
        target_for(q, v, runtime)
    except NoKernelError as error:
        return str(error)
    return ""


@functools.cache
def say(reason: str) -> None:
    logger.warning("fuser.sparse_attention runs in plain PyTorch, with all scores in memory: %s", reason)


def run_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: AttentionPlan,
    runtime: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    target: Target | None = None,
) -> None:
    """Run the kernel for ``tiles`` on checked tensors, into ``out`` and, where it is given, ``lse``.

    ``target`` is that of the tensors' device, or ``emulated_target()`` for the CUDA kernel on CPU tensors. Raises
    BuildError, ToolchainError or CacheError when there is no kernel.
    """
    target = target_of(q.device) if target is None else target
    # Kernels read memory, which holds the opposite of a negative view.
    q, k, v = (t.detach().resolve_neg() for t in (q, k, v))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, q_len, width = q.shape
    tensors = [q, k, v]
    mask_strides: tuple[int, ...] | None = None
    if runtime is not None:
        runtime = runtime.detach().resolve_neg().expand(batch, heads, q_len, k.shape[2])
        mask_strides = runtime.stride()
        tensors.append(runtime)
    storage = None if runtime is None else STORAGE[runtime.dtype]
    if target.kind == "cuda":
        chosen = _chosen(
            width, v.shape[3], STORAGE[q.dtype], storage, lse is not None, tiles, batch, heads, with_tf32(target)
        )
        _run_on_gpu(chosen, tensors, tiles, mask_strides, scale, out, lse, target)
        return
    kernel = _kernel(AttentionParameters(width, v.shape[3], STORAGE[q.dtype], storage, lse is not None), target)
    addresses = [t.data_ptr() for t in tensors]
    addresses += [tiles.array.ctypes.data, out.data_ptr()]
    if lse is not None:
        addresses.append(lse.data_ptr())
    sizes = extents(batch, heads, k.shape[1], tiles, scale, [t.stride()[:3] for t in (q, k, v, out)], mask_strides)
    needed = workspace_bytes(batch, heads, v.shape[3], tiles)
    scratch = torch.empty(needed + _ALIGNMENT, dtype=torch.uint8) if needed else None
    workspace = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT if scratch is not None else 0
    kernel(KernelArgs.pack(addresses, sizes, threads_now(), workspace))


def _run_on_gpu(
    parameters: CudaAttentionParameters,
    tensors: list[Tensor],
    tiles: AttentionPlan,
    mask_strides: tuple[int, ...] | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    target: Target,
) -> None:
    """Run the CUDA kernel on q, k, v and the run-time mask, on the current stream of their device."""
    from fuser.runtime.cuda import CUDA_ERROR, kernel_error
    from fuser.runtime.emulator import FAULT_STATUS, fault

    q, k, v = tensors[:3]
    batch, heads = q.shape[:2]
    chosen = attention_cuda.schedule(tiles, parameters, batch, heads, target.cores)
    kernel = _kernel(parameters, target)
    tensors = [*tensors, _on_device(chosen.tiles, q.device), out, *([] if lse is None else [lse])]
    strides = [t.stride()[:3] for t in (q, k, v, out)]
    sizes = attention_cuda.extents(batch, heads, k.shape[1], tiles, chosen, scale, strides, mask_strides)
    scratch = torch.empty(chosen.workspace_bytes + _ALIGNMENT, dtype=torch.uint8, device=q.device)
    workspace = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    args = KernelArgs.pack([t.data_ptr() for t in tensors], sizes, target.cores, workspace)
    if target.emulated:
        if (status := kernel.status(args)) == FAULT_STATUS:
            raise fault(kernel.path, kernel.symbol)
    else:
        with torch.cuda.device(q.device):
            status = kernel.status(args, torch.cuda.current_stream(q.device).cuda_stream)
    if status >= CUDA_ERROR:
        raise kernel_error(kernel.symbol, status)
    if status:
        raise KernelError(f"the kernel {kernel.symbol} cannot run {tuple(q.shape)} queries (status {status})")


@functools.lru_cache(maxsize=256)
def _chosen(
    width: int,
    value_width: int,
    dtype: DType,
    mask: DType | None,
    lse: bool,
    tiles: AttentionPlan,
    batch: int,
    heads: int,
    target: Target,
) -> CudaAttentionParameters:
    """The parameters of the least predicted cost."""
    found = attention_cuda.choices(width, value_width, dtype, mask, lse, target)
    return min(found, key=lambda p: attention_cuda.cost(p, tiles, batch, heads, 0, target).seconds(target))


@functools.lru_cache(maxsize=64)
def _on_device(tiles: Tiles, device: torch.device) -> Tensor:
    return torch.from_numpy(tiles.array.copy()).to(device)


@functools.cache
def _kernel(parameters: AttentionParameters | CudaAttentionParameters, target: Target) -> Kernel:
    from fuser.runtime.build import build_and_load

    (kernel,) = build_and_load([render(parameters.spec)], target, headers=header_folder(target)).values()
    return kernel
