"""The operators of torch: ``torch.ops.fuser.sparse_attention`` and ``sparse_attention_lse``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuser.attention.checks import check_heads
from fuser.attention.launch import NoKernelError, run_plan, say, target_for
from fuser.attention.reference import arithmetic_dtype, empty_out, reference
from fuser.attention.registry import pin, spec_of
from fuser.ir.errors import BuildError, CacheError, ToolchainError
from fuser.kernels.attention import cached_plan

_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, str spec, Tensor? attn_mask, float scale)"
# The layout of the output follows that of q.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
TAGS = (_STRIDES, torch.Tag.pt2_compliant_tag)
torch.library.define("fuser::sparse_attention", f"{_ARGUMENTS} -> Tensor", tags=TAGS)
torch.library.define("fuser::sparse_attention_lse", f"{_ARGUMENTS} -> (Tensor, Tensor)", tags=TAGS)


KEYS = {"sparse_attention": 3, "sparse_attention_lse": 3, "varlen_attention": 5}
"""Our operators, and which of their arguments is the key of what they compute."""


def key_in(target: Any, arguments: Sequence[Any]) -> str | None:
    """The key among the arguments of a call in a graph, if ``target`` is an operator of ours that has one."""
    if getattr(target, "namespace", "") != "fuser":
        return None
    at = KEYS.get(target._schema.name.removeprefix("fuser::"))
    return None if at is None else str(arguments[at])


@torch.library.impl("fuser::sparse_attention", "default")
def _op(q: Tensor, k: Tensor, v: Tensor, spec: str, attn_mask: Tensor | None, scale: float) -> Tensor:
    return _run(q, k, v, spec, attn_mask, scale, lse=False)[0]


@torch.library.impl("fuser::sparse_attention_lse", "default")
def _op_lse(
    q: Tensor, k: Tensor, v: Tensor, spec: str, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, spec, attn_mask, scale, lse=True)


@torch.library.register_fake("fuser::sparse_attention")  # type: ignore[untyped-decorator]
def _fake(q: Tensor, k: Tensor, v: Tensor, spec: str, attn_mask: Tensor | None, scale: float) -> Tensor:
    pin(spec)
    return empty_out(q, v)


@torch.library.register_fake("fuser::sparse_attention_lse")  # type: ignore[untyped-decorator]
def _fake_lse(
    q: Tensor, k: Tensor, v: Tensor, spec: str, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    pin(spec)
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=arithmetic_dtype(q))


def _run(
    q: Tensor, k: Tensor, v: Tensor, key: str, attn_mask: Tensor | None, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor]:
    spec = spec_of(key)
    batch, heads, q_len, _ = q.shape
    check_heads(spec.mask, q)
    out = empty_out(q, v)
    sums = q.new_empty((batch, heads, q_len) if lse else (0,), dtype=arithmetic_dtype(q))
    if out.numel() == 0 and sums.numel() == 0:
        return out, sums
    if k.shape[2] == 0:
        return out.zero_(), sums.fill_(-math.inf)
    try:
        target = target_for(q, v, attn_mask, spec.quantize)
        plan = cached_plan(spec.mask, q_len, k.shape[2], target)
        run_plan(q, k, v, plan, attn_mask, scale, out, sums if lse else None, target, spec.rule, spec.quantize)
        return out, sums
    except (NoKernelError, BuildError, ToolchainError, CacheError) as error:
        say(str(error))
    exact, exact_sums = reference(q, k, v, spec, attn_mask, scale)
    return out.copy_(exact), exact_sums if lse else sums
