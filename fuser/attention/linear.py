"""Linear attention as an operator of torch: :func:`linear_attention`, and the feature maps before it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fuser.attention.checks import check_tensors
from fuser.attention.launch import NoKernelError, logger
from fuser.attention.operators import TAGS
from fuser.attention.reference import arithmetic_dtype, empty_out, is_forward_differentiated
from fuser.codegen.launch import launch
from fuser.ir.errors import BuildError, CacheError, FuserError, MechanismError, ToolchainError
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.operators import LinearAttention
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall
from fuser.kernels.linear_attention import CpuLinearAttention, LinearAttentionFamily
from fuser.kernels.linear_attention_cuda import CudaLinearAttention
from fuser.runtime.targets import target_of, threads_now

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state"
_NUMBERS = "float scale, bool causal, float? floor"
torch.library.define(
    "fuser::linear_attention", f"({_OPERANDS}, {_NUMBERS}, bool return_state) -> (Tensor, Tensor)", tags=TAGS
)
torch.library.define(
    "fuser::linear_attention_backward",
    f"(Tensor grad, Tensor? grad_state, {_OPERANDS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
torch.library.define("fuser::features", "(Tensor x, Tensor directions, str map) -> Tensor", tags=TAGS)

_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    state: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    normalize: float | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention without a softmax: each query reads a sum of k · vᵀ, whose size does not depend on the length.

    Token by token, S = diag(exp(decay)) S + k uᵀ and o = scale · Sᵀ q, where u = v, or with ``beta`` u = beta · (v -
    (diag(exp(decay)) S)ᵀ k). These are the recurrences of RetNet, GLA, DeltaNet and gated DeltaNet, and of ONNX's
    operator LinearAttention.

    Args:
        q: (B, H, Sq, D), features of the queries.
        k: (B, Hkv, Sk, D); H is a multiple of Hkv, and each of k's heads serves H / Hkv heads of q in a row. Sq = Sk
            where it is causal.
        v: (B, Hkv, Sk, Dv).
        decay: in log space, so mostly negative; broadcastable to (B, Hkv, Sk, D), one number for all columns of a key
            or one for each.
        beta: how much of a value is written, broadcastable to (B, Hkv, Sk, 1).
        state: the state before the first token, (B, Hkv, D, Dv) in fp32 (float64 for float64 values), or (B, Hkv, D, Dv
            + 1) with ``normalize``; zeros if None.
        causal: whether a query reads the tokens up to its own; otherwise it reads all.
        scale: default 1 / sqrt(D), or 1 with ``normalize``.
        normalize: divide by q · Σ k, the sum that decays as the state does, but by no less than this number.
        return_state: also return the state behind the last token, with which the next call goes on.

    Returns (B, H, Sq, Dv) in the dtype of ``v``. All sums are at least in fp32.

    Cost is linear in the length: one kernel that keeps the state in registers, for fp32 and bf16 (on GPUs fp16, too);
    everything else, the backward pass and forward-mode differentiation are chunks of matrix products in plain PyTorch.
    It runs as ``torch.ops.fuser.linear_attention``: eager, exported, compiled, and as a part of fused programs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
        MechanismError: ``decay`` or ``beta`` without ``causal``, or ``beta`` with ``normalize``.
    """
    check_tensors(q=q)
    if scale is None:
        scale = 1.0 if normalize is not None else 1.0 / math.sqrt(max(q.shape[-1], 1))
    rule = Recurrence(float(scale), causal, decay is not None, beta is not None, normalize)
    operands = _checked(rule, q, k, v, decay, beta, state)
    if is_forward_differentiated():
        out, last = rule.evaluate(*operands)
    else:
        out, last = torch.ops.fuser.linear_attention(*operands, rule.scale, causal, normalize, return_state)
    return (out, last) if return_state else out


def _checked(
    rule: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
) -> _Operands:
    """The operands, those that are broadcast expanded. Raises ValueError unless they fit."""
    check_tensors(k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"linear attention takes q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv), got {shapes}"
        )
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"batches and widths of q and k, and all but the last size of k and v, must be equal: {shapes}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1] or not k.shape[3]:
        raise ValueError(f"the heads of q must be a multiple of those of k, and both must be wider than zero: {shapes}")
    if rule.causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal linear attention needs as many queries as keys: {shapes}")
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}
    for name, t in given.items():
        if t is None:
            continue
        check_tensors(**{name: t})
        if not t.is_floating_point() or t.device != q.device:
            raise ValueError(f"{name} must be floating-point and on {q.device}, got {t.dtype} on {t.device}")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    tokens = k.shape[:3]
    width = k.shape[3] if decay is not None and decay.dim() and decay.shape[-1] != 1 else 1
    decay = None if decay is None else _expanded("decay", decay, (*tokens, width))
    beta = None if beta is None else _expanded("beta", beta, (*tokens, 1))
    if state is not None:
        wanted = (*k.shape[:2], k.shape[3], v.shape[3] + rule.more_columns)
        if tuple(state.shape) != wanted or state.dtype != arithmetic_dtype(v):
            raise ValueError(f"state must be {arithmetic_dtype(v)} {wanted}, got {state.dtype} {tuple(state.shape)}")
    return q, k, v, decay, beta, state


def _expanded(name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} of shape {tuple(t.shape)} does not broadcast to {shape}") from error


# ---- the operator


@torch.library.impl("fuser::linear_attention", "default")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    causal: bool,
    floor: float | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    rule = Recurrence(scale, causal, decay is not None, beta is not None, floor)
    out, last = _empty(q, k, v, rule, return_state)
    if out.numel():
        try:
            _run(rule, (q, k, v, decay, beta, state), out, last if return_state else None)
            return out, last
        except (NoKernelError, BuildError, ToolchainError, CacheError) as error:
            _say(str(error))
    exact, state = rule.evaluate(q, k, v, decay, beta, state)
    # What is returned may not be what was given.
    return out.copy_(exact), last.copy_(state) if return_state else last


@functools.cache
def _say(reason: str) -> None:
    logger.info("linear attention runs in plain PyTorch: %s", reason)


def _empty(q: Tensor, k: Tensor, v: Tensor, rule: Recurrence, return_state: bool) -> tuple[Tensor, Tensor]:
    """Room for the output, laid out as ``q`` is, and for the last state, which is empty if it is not asked for."""
    shape = (*k.shape[:2], k.shape[3], v.shape[3] + rule.more_columns) if return_state else (0,)
    return empty_out(q, v), v.new_empty(shape, dtype=arithmetic_dtype(v))


@torch.library.register_fake("fuser::linear_attention")  # type: ignore[untyped-decorator]
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    causal: bool,
    floor: float | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    return _empty(q, k, v, Recurrence(scale, causal, False, False, floor), return_state)


def _run(rule: Recurrence, operands: _Operands, out: Tensor, last: Tensor | None, target: Target | None = None) -> None:
    """Run the kernel on checked tensors, into ``out`` and, where it is given, ``last``.

    ``target`` is that of the tensors' device, or ``emulated_target()`` for the CUDA kernel on CPU tensors. Raises
    NoKernelError if there is none for them.
    """
    if out.device.type not in ("cpu", "cuda") or out.layout is not torch.strided:
        raise NoKernelError(f"there is no kernel for {out.device.type} tensors")
    try:
        target = target_of(out.device) if target is None else target
    except FuserError as error:
        raise NoKernelError(str(error)) from error
    reads = {}
    for name, t in zip(("q", "k", "v", "decay", "beta", "first"), operands, strict=True):
        if t is not None:
            # Kernels read memory, which holds the opposite of a negative view.
            t = t.detach().resolve_neg()
            reads[name] = t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
    writes = {"out": out} if last is None else {"out": out, "last": last}
    specs = tuple((name, TensorSpec(t.shape, t.dtype, t.stride())) for name, t in (reads | writes).items())
    threads = 1 if target.kind == "cuda" else threads_now()
    call = _call(LinearAttention(rule, operands[-1] is not None, last is not None), specs, target, threads)
    if call is None:
        raise NoKernelError(f"there is no kernel for {out.dtype} values and {reads['k'].shape[3]} columns of keys")
    launch(call, reads | writes, target, threads)


@functools.lru_cache(maxsize=256)
def _call(
    semantics: LinearAttention, specs: tuple[tuple[str, TensorSpec], ...], target: Target, threads: int
) -> KernelCall | None:
    """The kernel's launch for tensors of these layouts, by name."""
    values = dict(specs)
    outputs = tuple(name for name in ("out", "last") if name in values)
    inputs = tuple(name for name in values if name not in outputs)
    op = Operator("out", semantics, inputs, outputs)
    graph = OperatorGraph((op,), values, inputs, outputs, {})
    match = LinearAttentionFamily().match(graph.group((op,)), target)
    if match is None:
        return None
    kernel: Any = CudaLinearAttention() if target.kind == "cuda" else CpuLinearAttention()
    choices = kernel.space(match, target)
    call: KernelCall | None = kernel.call(match, choices[0], target, threads) if choices else None
    return call


# ---- the backward pass


@torch.library.impl("fuser::linear_attention_backward", "default")
def _gradients(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    causal: bool,
    floor: float | None,
) -> tuple[Tensor, ...]:
    rule = Recurrence(scale, causal, decay is not None, beta is not None, floor)
    given = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, decay, beta, state)]
    there = [t for t in given if t is not None]
    with torch.enable_grad():
        out, last = rule.evaluate(*given)  # type: ignore[arg-type]
        results, grads = ([out], [grad]) if grad_state is None else ([out, last], [grad, grad_state])
        found = iter(torch.autograd.grad(results, there, grads, allow_unused=True, materialize_grads=True))
    return tuple(q.new_empty(0) if t is None else next(found).contiguous() for t in given)


@torch.library.register_fake("fuser::linear_attention_backward")  # type: ignore[untyped-decorator]
def _fake_gradients(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    causal: bool,
    floor: float | None,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, decay, beta, state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers, ctx.return_state = inputs[6:9], inputs[9]


def _backward(ctx: Any, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    grad_state = grad_state if ctx.return_state else None
    found = torch.ops.fuser.linear_attention_backward(grad, grad_state, *operands, *ctx.numbers)
    return (*(None if t is None else g for t, g in zip(operands, found, strict=True)), None, None, None, None)


torch.library.register_autograd("fuser::linear_attention", _backward, setup_context=_keep)


# ---- feature maps


@torch.library.impl("fuser::features", "CompositeImplicitAutograd")
def _features(x: Tensor, directions: Tensor, map: str) -> Tensor:
    return FeatureMap(map).evaluate(x, directions)


def features(x: Tensor, directions: Tensor, map: FeatureMap) -> Tensor:
    """What a feature map makes of x (B, H, N, D) with directions (H, M, D): (B, H, N, M), at least in fp32.

    It is ``torch.ops.fuser.features``, which is plain PyTorch but for fused programs. Raises MechanismError for shapes
    that do not fit.
    """
    if x.dim() != 4 or directions.dim() != 3 or (x.shape[1], x.shape[3]) != (directions.shape[0], directions.shape[2]):
        raise MechanismError(
            f"features need x (B, H, N, D) and directions (H, M, D), got {tuple(x.shape)} and {tuple(directions.shape)}"
        )
    mapped: Tensor = torch.ops.fuser.features(x, directions, map.value)
    return mapped
