"""Attention of packed rows whose plan is made at run time, as programs that leave out padding call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fuser.attention.launch import NoKernelError, run_plan, say, target_for
from fuser.attention.operators import TAGS
from fuser.attention.reference import empty_out, reference
from fuser.attention.registry import pin, spec_of
from fuser.ir.errors import BuildError, CacheError, ToolchainError
from fuser.ir.masks import Dense
from fuser.ir.operators import DocumentMask
from fuser.kernels.plan import AttentionPlan

torch.library.define(
    "fuser::document_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor length, Tensor is_key, Tensor plan, str spec, float scale)"
    " -> Tensor",
    tags=TAGS,
)


@torch.library.impl("fuser::document_attention", "default")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    length: Tensor,
    is_key: Tensor,
    plan: Tensor,
    key: str,
    scale: float,
) -> Tensor:
    """Attention of q, k and v (1, H, S, D) under the mask of ``key`` within documents.

    ``rows``, ``length``, ``is_key`` and ``plan`` are those of a :class:`~fuser.ir.operators.DocumentMask`; what a row
    becomes may depend on nothing but the keys that it sees.
    """
    spec = spec_of(key)
    out = empty_out(q, v)
    # A program knows where the plan begins, and not how long it is.
    table = plan.as_strided((plan.untyped_storage().nbytes() // plan.itemsize - plan.storage_offset(),), (1,))
    try:
        target = target_for(q, v, None, spec.quantize)
        made = AttentionPlan(table.numpy())
        run_plan(q, k, v, made, None, scale, out, None, target, spec.rule, spec.quantize)
        return out
    except (NoKernelError, BuildError, ToolchainError, CacheError) as error:
        say(str(error))
    allowed = DocumentMask(pattern=spec.mask).allowed(rows, length, is_key)
    exact, _ = reference(q, k, v, spec.of(Dense()), allowed, scale)
    return out.copy_(exact)


@torch.library.register_fake("fuser::document_attention")  # type: ignore[untyped-decorator]
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    length: Tensor,
    is_key: Tensor,
    plan: Tensor,
    key: str,
    scale: float,
) -> Tensor:
    pin(key)
    return empty_out(q, v)
