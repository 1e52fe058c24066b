"""Exact attention under any mask, as an operator of torch: :func:`sparse_attention`.

Operators take tensors, numbers and strings, and masks are Python values; so a mask enters a process-wide registry and
the operators take its key. A key that a trace has seen stays registered for the life of the process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import math
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.errors import BuildError, CacheError, FuserError, KernelError, MaskError, ToolchainError
from fuser.ir.masks import Causal, Dense, Mask
from fuser.ir.target import Target
from fuser.kernels import attention_cuda
from fuser.kernels.attention import LARGEST_HEAD, AttentionParameters, cached_plan, extents, keep_plans, workspace_bytes
from fuser.kernels.attention_cuda import CudaAttentionParameters
from fuser.kernels.attention_tiles import Tiles
from fuser.kernels.base import STORAGE, DType, floating
from fuser.kernels.plan import AttentionPlan
from fuser.plans import CachedPlans
from fuser.runtime.abi import KernelArgs
from fuser.runtime.library import Kernel

logger = logging.getLogger("fuser")
_REGISTERED = 64
_ALIGNMENT = 64


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q · kᵀ) · v over the pairs that ``mask`` allows.

    Args:
        q: (B, H, Sq, D).
        k: (B, Hkv, Sk, D); H is a multiple of Hkv, and each of k's heads serves H / Hkv heads of q in a row.
        v: (B, Hkv, Sk, Dv).
        mask: one of :mod:`fuser.masks`, whose forbidden pairs cost nothing; or a tensor that broadcasts to
            (B, H, Sq, Sk), bool (True = may attend) or added to the scores, which saves no work apart from keys that
            nobody sees (turn a constant one into a mask with ``fuser.masks.from_dense``); or None for all pairs.
        scale: default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores of each row, (B, H, Sq) fp32, natural logarithm.

    Returns (B, H, Sq, Dv) in the dtype of ``q``, laid out in memory as ``q`` is (heads inside tokens, or tokens inside
    heads). A row that may see nothing gives zeros, and -inf as its log-sum-exp.

    It runs as ``torch.ops.fuser.sparse_attention`` (or ``sparse_attention_lse``): eager, exported, compiled, and as
    part of a fused program under ``fuser.optimize``. The kernels take fp32 and bf16, on GPUs fp16 as well, and heads
    up to 256 wide; everything else, and the backward pass, is plain PyTorch with all Sq x Sk scores in memory, said
    once in the log. Under ``torch.compile``, make the mask outside of the compiled function: one made inside breaks the
    graph.

    Raises:
        ValueError: shapes, dtypes or devices of q, k and v do not fit each other.
        MaskError: the mask does not fit them.
    """
    if mask is not None and not isinstance(mask, (Mask, Tensor)):
        raise MaskError(f"mask must be one of fuser.masks, a tensor or None, got {type(mask).__name__}")
    pattern, runtime = (None, mask) if isinstance(mask, Tensor) else (mask, None)
    if not return_lse:
        return attend(q, k, v, pattern, runtime, scale=scale)
    operands = _operands(q, k, v, pattern, runtime, False, 0, scale)
    out, lse = torch.ops.fuser.sparse_attention_lse(*operands)
    return out, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Mask | None,
    runtime: Tensor | None,
    *,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """:func:`sparse_attention` under both a ``pattern`` and a tensor known at run time only, such as padding.

    Queries are rows ``offset`` and on of the pattern; with ``causal``, query i sees keys up to i only (counted from 0).
    """
    result: Tensor = torch.ops.fuser.sparse_attention(*_operands(q, k, v, pattern, runtime, causal, offset, scale))
    return result


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Mask | None,
    runtime: Tensor | None,
    causal: bool,
    offset: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, str, Tensor | None, float]:
    """Checked arguments of the operators."""
    _check_operands(q, k, v)
    if runtime is not None:
        runtime = _check_runtime(runtime, q, k)
    if pattern is None:
        key = CAUSAL if causal else DENSE
    else:
        # Lengths are not asked for where they do not matter, since they may be symbols of a trace.
        key = _key(pattern, causal, offset) or _key(pattern, causal, offset, q.shape[2], k.shape[2])
    return q, k, v, key, runtime, 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention takes q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv), got {shapes}")
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(f"the batch sizes differ: {shapes}")
    if k.shape[1] != v.shape[1] or (k.shape[1] == 0) != (q.shape[1] == 0) or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"the heads of q must be a multiple of those of k and v, which must be equal: {shapes}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have as many rows: {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must have heads of one width above zero: {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_runtime(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask with four dimensions."""
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() > 4 or any(
        size not in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted), strict=False)
    ):
        raise MaskError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to (B, H, Sq, Sk) = {tuple(wanted)}; "
            "padding (B, Sk) is passed as mask[:, None, None, :]"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise MaskError(f"a mask tensor is bool (True = may attend) or added to the scores, got {mask.dtype}")
    if mask.device != q.device:
        raise MaskError(f"the mask is on {mask.device}, q on {q.device}")
    return mask[(None,) * (4 - mask.dim())]


# ---- the registry

_lock = threading.Lock()
_recent: collections.OrderedDict[str, Mask] = collections.OrderedDict()
_pinned: dict[str, Mask] = {}
_known: weakref.WeakKeyDictionary[Mask, dict[tuple[int, int] | None, str]] = weakref.WeakKeyDictionary()
# A mask that somebody holds can be found, however many others are used between its key and the operator.
_alive: weakref.WeakValueDictionary[str, Mask] = weakref.WeakValueDictionary()


def register_mask(mask: Mask, q_len: int | None = None, kv_len: int | None = None) -> str:
    """Make ``mask`` known to this process for good and return its key.

    Call it before running a graph that another process has exported with this mask. ``q_len`` and ``kv_len`` are
    needed for masks that contain functions (``from_mask_mod``), whose keys hold for one pair of lengths.
    """
    key = _enter(mask, q_len, kv_len)
    _pin(key)
    return key


def mask_of(key: str) -> Mask:
    """The mask of a key. Raises MaskError if this process does not know it."""
    with _lock:
        found = _pinned.get(key) or _recent.get(key) or _alive.get(key)
    if found is None:
        raise MaskError(
            f"this process knows no mask with the key {key}: the graph was made in another one; "
            "call fuser.attention.register_mask with its mask first"
        )
    return found


def adopt_mask(key: str, mask: Mask) -> None:
    """Register ``mask`` under a key that another process gave it."""
    with _lock:
        _pinned[key] = mask


def _enter(mask: Mask, q_len: int | None, kv_len: int | None) -> str:
    with _lock:
        keys = _known.setdefault(mask, {})
    key = keys.get(None)
    if key is None:
        try:
            key = keys[None] = mask.hash
        except MaskError:
            # A function has no hash, but its entries at these lengths have.
            if q_len is None:
                raise
            lengths = (int(q_len), int(q_len if kv_len is None else kv_len))
            key = keys.get(lengths)
            if key is None:
                # An export traces all that its thread runs, and this is not part of the model.
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    key = keys[lengths] = pool.submit(mask.fingerprint, *lengths).result()
    with _lock:
        _recent[key] = _alive.setdefault(key, mask)
        _recent.move_to_end(key)
        while len(_recent) > _REGISTERED:
            _recent.popitem(last=False)
    return key


def _pin(key: str) -> None:
    mask = mask_of(key)
    with _lock:
        _pinned[key] = mask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(mask: Mask, causal: bool, offset: int, q_len: int | None = None, kv_len: int | None = None) -> str:
    """The key of a mask, a constant of whatever graph is traced; empty if it depends on lengths that are not given."""
    try:
        mask = mask.shift(offset) if offset else mask
        return _enter(mask & Causal() if causal else mask, q_len, kv_len)
    except MaskError:
        if q_len is not None:
            raise
        return ""
    except AttributeError as error:
        if torch._guards.TracingContext.try_get() is None:
            raise
        # Dynamo passes objects that are made inside the traced function before their fields are set.
        from torch._dynamo.exc import Unsupported

        raise Unsupported("a fuser mask is made inside of a compiled function; make it outside") from error


def _free_lock() -> None:
    # The thread that held the lock does not exist in a forked child, so nobody would release it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_free_lock)

DENSE = register_mask(Dense())
CAUSAL = register_mask(Causal())


# ---- the operators

_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, str mask, Tensor? runtime, float scale)"
# The layout of the output follows that of q.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_TAGS = (_STRIDES, torch.Tag.pt2_compliant_tag)
torch.library.define("fuser::sparse_attention", f"{_ARGUMENTS} -> Tensor", tags=_TAGS)
torch.library.define("fuser::sparse_attention_lse", f"{_ARGUMENTS} -> (Tensor, Tensor)", tags=_TAGS)


@torch.library.impl("fuser::sparse_attention", "default")
def _op(q: Tensor, k: Tensor, v: Tensor, mask: str, runtime: Tensor | None, scale: float) -> Tensor:
    return _run(q, k, v, mask, runtime, scale, lse=False)[0]


@torch.library.impl("fuser::sparse_attention_lse", "default")
def _op_lse(q: Tensor, k: Tensor, v: Tensor, mask: str, runtime: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, mask, runtime, scale, lse=True)


@torch.library.register_fake("fuser::sparse_attention")  # type: ignore[untyped-decorator]
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: str, runtime: Tensor | None, scale: float) -> Tensor:
    _pin(mask)
    return _empty_out(q, v)


@torch.library.register_fake("fuser::sparse_attention_lse")  # type: ignore[untyped-decorator]
def _fake_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: str, runtime: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    _pin(mask)
    return _empty_out(q, v), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    return q.new_empty(batch, heads, rows, v.shape[3])


def _run(
    q: Tensor, k: Tensor, v: Tensor, key: str, runtime: Tensor | None, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor]:
    mask = mask_of(key)
    batch, heads, q_len, _ = q.shape
    if mask.heads not in (None, heads):
        raise MaskError(f"the mask {mask.name} has {mask.heads} heads and q {heads}: {tuple(q.shape)}")
    out = _empty_out(q, v)
    sums = q.new_empty((batch, heads, q_len) if lse else (0,), dtype=_lse_dtype(q))
    if out.numel() == 0 and sums.numel() == 0:
        return out, sums
    if k.shape[2] == 0:
        return out.zero_(), sums.fill_(-math.inf)
    try:
        target = _target_for(q, v, runtime)
        tiles = cached_plan(mask, q_len, k.shape[2], target)
        run_plan(q, k, v, tiles, runtime, scale, out, sums if lse else None, target)
        return out, sums
    except (_NoKernelError, BuildError, ToolchainError, CacheError) as error:
        _say(str(error))
    exact, exact_sums = reference(q, k, v, mask, runtime, scale)
    return out.copy_(exact), exact_sums if lse else sums


class _NoKernelError(Exception):
    """Why no kernel can take these tensors."""


def _target_for(q: Tensor, v: Tensor, runtime: Tensor | None) -> Target:
    """The target of the tensors' device. Raises _NoKernelError if it has no kernel for them."""
    if q.device.type not in ("cpu", "cuda") or q.layout is not torch.strided:
        raise _NoKernelError(f"there is no kernel for {q.device.type} tensors")
    try:
        target = _target(q.device)
    except FuserError as error:
        raise _NoKernelError(str(error)) from error
    floats = floating(target)
    if q.dtype not in floats:
        raise _NoKernelError(f"there is no kernel for {q.dtype}")
    if not 0 < v.shape[3] <= LARGEST_HEAD or q.shape[3] > LARGEST_HEAD:
        raise _NoKernelError(f"there is no kernel for heads wider than {LARGEST_HEAD}")
    if runtime is not None and runtime.dtype not in (torch.bool, *floats):
        raise _NoKernelError(f"there is no kernel for masks of {runtime.dtype}")
    if target.kind == "cuda" and not attention_cuda.choices(
        q.shape[3], v.shape[3], STORAGE[q.dtype], None, False, target
    ):
        raise _NoKernelError(
            f"heads of {q.shape[3]} and {v.shape[3]} {q.dtype} numbers do not fit the shared memory of this GPU"
        )
    return target


def _unsupported(q: Tensor, v: Tensor, runtime: Tensor | None) -> str:
    """Why no kernel can take these tensors, or an empty string."""
    try:
        _target_for(q, v, runtime)
    except _NoKernelError as error:
        return str(error)
    return ""


@functools.cache
def _say(reason: str) -> None:
    logger.warning("fuser.sparse_attention runs in plain PyTorch, with all scores in memory: %s", reason)


# ---- the kernel

keep_plans(CachedPlans())


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
    # The compiler imports the raising, which imports this module.
    from fuser.compiler import threads_now, with_tf32

    target = _target(q.device) if target is None else target
    q, k, v = (t.detach() if t.stride(3) == 1 else t.detach().contiguous() for t in (q, k, v))
    batch, heads, q_len, width = q.shape
    tensors = [q, k, v]
    mask_strides: tuple[int, ...] | None = None
    if runtime is not None:
        runtime = runtime.detach().expand(batch, heads, q_len, k.shape[2])
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


def _target(device: torch.device) -> Target:
    from fuser.compiler import target_of

    return target_of(device)


@functools.cache
def _kernel(parameters: AttentionParameters | CudaAttentionParameters, target: Target) -> Kernel:
    from fuser.runtime.build import build
    from fuser.runtime.library import load

    source = render(parameters.spec)
    (path,) = build([source], target, headers=header_folder(target)).values()
    return load(path, source.symbol)


# ---- plain PyTorch


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, runtime: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in plain PyTorch, on any device and in any floating-point dtype.

    16-bit types are computed in fp32. Memory grows with B x H x Sq x Sk.
    """
    scores = _scores(q, k, mask, runtime, scale)
    probabilities, lse = _probabilities(scores)
    values = _wide(v, q.shape[1] // k.shape[1], scores.dtype)
    return weighted_sum(probabilities, values, torch.isneginf(scores)).to(q.dtype), lse


def weighted_sum(weights: Tensor, values: Tensor, forbidden: Tensor, out: Tensor | None = None) -> Tensor:
    """``weights`` (…, S, K) times ``values`` (…, K, D), where weight 0 of a ``forbidden`` (…, S, K) key keeps out NaN.

    ``out`` (…, S, D) receives the result, if it is given.
    """
    poison = ~torch.isfinite(values)
    if not poison.any():
        return torch.matmul(weights, values, out=out)
    out = torch.matmul(weights, values.masked_fill(poison, 0.0), out=out)
    for key in poison.any(-1).view(-1, values.shape[-2]).any(0).nonzero().flatten().tolist():
        one = slice(key, key + 1)
        part = weights[..., one] * values[..., one, :].where(poison[..., one, :], 0.0)
        out += part.masked_fill_(forbidden[..., one], 0.0)
    return out


def _wide(t: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Keys or values with a head for every head of q."""
    return t.to(dtype).repeat_interleave(group, 1)


def _scores(q: Tensor, k: Tensor, mask: Mask, runtime: Tensor | None, scale: float) -> Tensor:
    """(B, H, Sq, Sk); -inf for pairs that are not allowed, whatever they hold."""
    dtype = _lse_dtype(q)
    scores = (q.to(dtype) * scale) @ _wide(k, q.shape[1] // max(k.shape[1], 1), dtype).mT
    if runtime is not None and runtime.dtype != torch.bool:
        scores = (scores + runtime.to(dtype)).masked_fill(torch.isneginf(runtime), -math.inf)
    if not isinstance(mask, Dense):
        allowed = mask.dense(q.shape[2], k.shape[2]).to(q.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if runtime is not None and runtime.dtype == torch.bool:
        scores = scores.masked_fill(~runtime, -math.inf)
    return scores


def _probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over keys, zeros where there are none, and the log-sum-exp."""
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0), torch.logsumexp(scores, -1)


# ---- the backward pass

torch.library.define(
    "fuser::sparse_attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, str mask, Tensor? runtime, float scale, bool bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("fuser::sparse_attention_backward", "default")
def _gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    runtime: Tensor | None,
    scale: float,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, with ``bias``, of the tensor added to the scores; probabilities are computed again."""
    scores = _scores(q, k, mask_of(mask), runtime, scale)
    p, _ = _probabilities(scores)
    forbidden = torch.isneginf(scores)
    group = q.shape[1] // max(k.shape[1], 1)
    grad = grad.to(p.dtype)
    dp = (grad @ _wide(v, group, p.dtype).mT).masked_fill(forbidden, 0.0)
    inner = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - inner if grad_lse is None else dp - inner + grad_lse.to(p.dtype)[..., None])

    def narrow(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(1, (k.shape[1], group))  # type: ignore[no-untyped-call]
        return grouped.sum(2).to(q.dtype).contiguous()

    dq = (weighted_sum(ds, _wide(k, group, p.dtype), forbidden) * scale).to(q.dtype)
    dk, dv = narrow(ds.mT @ (q.to(p.dtype) * scale)), narrow(p.mT @ grad)
    if runtime is None or not bias:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, ds.sum_to_size(runtime.shape).to(runtime.dtype)


@torch.library.register_fake("fuser::sparse_attention_backward")  # type: ignore[untyped-decorator]
def _fake_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    runtime: Tensor | None,
    scale: float,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [q.new_empty(t.shape) for t in (q, k, v)]
    if runtime is None or not bias:
        return shapes[0], shapes[1], shapes[2], q.new_empty(0)
    return shapes[0], shapes[1], shapes[2], runtime.new_empty(runtime.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, mask, runtime, scale = inputs
    ctx.save_for_backward(q, k, v, runtime)
    # The backward pass finds the mask by its key because somebody holds it.
    ctx.mask, ctx.pattern, ctx.scale = mask, mask_of(mask), scale


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    q, k, v, runtime = ctx.saved_tensors
    bias = runtime is not None and runtime.is_floating_point() and ctx.needs_input_grad[4]
    dq, dk, dv, db = torch.ops.fuser.sparse_attention_backward(
        grad, grad_lse, q, k, v, ctx.mask, runtime, ctx.scale, bias
    )
    return dq, dk, dv, None, db if bias else None, None


for _name in ("sparse_attention", "sparse_attention_lse"):
    torch.library.register_autograd(f"fuser::{_name}", _backward, setup_context=_keep)
