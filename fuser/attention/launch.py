"""Which kernel takes given tensors, and running it on them."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fuser.codegen.launch import launch
from fuser.ir.errors import FuserError
from fuser.ir.graph import TensorSpec
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.target import Target
from fuser.kernels import attention_cuda
from fuser.kernels.attention import (
    LARGEST_HEAD,
    AttentionParameters,
    Operands,
    PlanParameters,
    call_of,
    keep_plans,
)
from fuser.kernels.attention_cuda import CudaAttentionParameters
from fuser.kernels.attention_predicted import takes
from fuser.kernels.attention_quantized import quantized
from fuser.kernels.attention_quantized_cuda import (
    CudaQuantizedAttention,
    CudaQuantizedParameters,
    quantized_choices,
)
from fuser.kernels.base import STORAGE, DType, Literal, floating
from fuser.kernels.plan import AttentionPlan
from fuser.plans import CachedPlans
from fuser.runtime.targets import target_of, threads_now, with_tf32

logger = logging.getLogger("fuser")

keep_plans(CachedPlans())


class NoKernelError(Exception):
    """Why no kernel can take these tensors."""


def target_for(q: Tensor, v: Tensor, attn_mask: Tensor | None, quantize: ScoreQuantization | None = None) -> Target:
    """The target of the tensors' device. Raises NoKernelError if it has no kernel for them, or for ``quantize``."""
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
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, *floats):
        raise NoKernelError(f"there is no kernel for masks of {attn_mask.dtype}")
    mask = None if attn_mask is None else STORAGE[attn_mask.dtype]
    if target.kind == "cuda" and not _choices(
        (q.shape[3], v.shape[3], STORAGE[q.dtype], mask, False), None, quantize, target
    ):
        raise NoKernelError(
            f"heads of {q.shape[3]} and {v.shape[3]} {q.dtype} numbers do not fit the shared memory of this GPU"
        )
    if quantize is not None and not takes(quantize, None if attn_mask is None else attn_mask.dtype):
        raise NoKernelError("quantize= has no kernel that compares scores without the mask that is added to them")
    return target


def unsupported(q: Tensor, v: Tensor, attn_mask: Tensor | None) -> str:
    """Why no kernel can take these tensors, or an empty string."""
    try:
        target_for(q, v, attn_mask)
    except NoKernelError as error:
        return str(error)
    return ""


@functools.cache
def say(reason: str) -> None:
    logger.warning("attention runs in plain PyTorch, with all scores in memory: %s", reason)


def run_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    attn_mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    target: Target | None = None,
    rule: ScoreRule | None = None,
    quantize: ScoreQuantization | None = None,
    documents: tuple[Literal, Literal] | None = None,
) -> None:
    """Run the kernel for ``plan``, the score ``rule`` and ``quantize`` on checked tensors, into ``out`` and, where it
    is given, ``lse``. ``documents`` says of which one each key is, as rows and length of a :class:`DocumentMask` do,
    where ``quantize`` has to know it.

    ``target`` is that of the tensors' device, or ``emulated_target()`` for the CUDA kernel on CPU tensors. Raises
    BuildError, ToolchainError or CacheError when there is no kernel.
    """
    target = target_of(q.device) if target is None else target
    # Kernels read memory, which holds the opposite of a negative view.
    q, k, v = (t.detach().resolve_neg() for t in (q, k, v))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    reads, writes = {"q": q, "k": k, "v": v}, {"out": out}
    if attn_mask is not None:
        reads["mask"] = attn_mask.detach().resolve_neg().expand(*q.shape[:3], k.shape[2])
    specs = {name: TensorSpec(t.shape, t.dtype, t.stride()) for name, t in (reads | writes).items()}
    operands = Operands(specs["q"], specs["k"], specs["v"], specs["out"], specs.get("mask"))
    if lse is not None:
        writes["lse"] = lse
    parameters = _parameters(operands, lse is not None, rule, quantize, plan, target, documents is not None)
    threads = 1 if target.kind == "cuda" else threads_now()
    call = call_of(plan, operands, tuple(reads), tuple(writes), scale, parameters, target, threads)
    if documents is not None:
        call = call.reading(*documents)
    launch(call, reads | writes, target, threads)


def _parameters(
    operands: Operands,
    lse: bool,
    rule: ScoreRule | None,
    quantize: ScoreQuantization | None,
    plan: AttentionPlan,
    target: Target,
    packed: bool,
) -> PlanParameters:
    q, v, mask = operands.q, operands.v, operands.mask
    kernel = q.shape[3], v.shape[3], STORAGE[q.dtype], None if mask is None else STORAGE[mask.dtype], lse
    if target.kind == "cuda":
        chosen = _cheapest(kernel, rule, quantize, plan, *q.shape[:2], with_tf32(target))
        if quantize is None:
            return chosen
        assert isinstance(chosen, CudaQuantizedParameters)
        return CudaQuantizedAttention(chosen, quantize)
    if quantize is not None:
        return quantized(quantize, *kernel, rule, packed=packed)
    return AttentionParameters(*kernel, rule=rule)


_Kernel = tuple[int, int, DType, DType | None, bool]
"""Widths of keys and values, storage of tensors and of the run-time mask, and whether the log-sum-exp is wanted."""


def _choices(
    kernel: _Kernel, rule: ScoreRule | None, quantize: ScoreQuantization | None, target: Target
) -> list[CudaAttentionParameters]:
    """The parameters that there are on a GPU."""
    given = *kernel, target, rule
    return attention_cuda.choices(*given) if quantize is None else quantized_choices(quantize, *given)


@functools.lru_cache(maxsize=256)
def _cheapest(
    kernel: _Kernel,
    rule: ScoreRule | None,
    quantize: ScoreQuantization | None,
    plan: AttentionPlan,
    batch: int,
    heads: int,
    target: Target,
) -> CudaAttentionParameters:
    """The parameters of the least predicted cost."""
    found = _choices(kernel, rule, quantize, target)
    return min(found, key=lambda p: attention_cuda.cost(p, plan, batch, heads, 0, target).seconds(target))
