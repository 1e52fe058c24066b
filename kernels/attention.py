"""The `attention` family: q · kᵀ, scale, mask, softmax and · v as one kernel that runs an attention plan."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from fuser.kernels.base import DType, KernelSpec
from fuser.kernels.plan import AttentionPlan

TEMPLATE = "cpu/attention.cpp.j2"
HEADS_IN_FLIGHT = 2


@dataclass(frozen=True)
class AttentionParameters:
    """``mask`` is the storage of the run-time mask: BOOL (True = may attend), F32 or BF16 (added to scores), or None.

    ``key_block`` keys are scored before their probabilities meet the values; ``lse`` adds the log-sum-exp output.
    """

    head_dim: int
    value_dim: int
    dtype: DType = DType.F32
    mask: DType | None = None
    lse: bool = False
    key_block: int = 48

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("attention", TEMPLATE, self)


def extents(
    batch: int,
    heads: int,
    key_heads: int,
    plan: AttentionPlan,
    scale: float,
    strides: Sequence[Sequence[int]],
    mask_strides: Sequence[int] | None = None,
    in_flight: int = HEADS_IN_FLIGHT,
) -> tuple[int, ...]:
    """The template's extents: ``strides`` are (batch, head, row) of q, k, v and out, in elements, and ``mask_strides``
    (batch, head, row, key) of the run-time mask, 0 where it is broadcast."""
    (bits,) = struct.unpack("<q", struct.pack("<d", scale))
    flat = [stride for tensor in strides for stride in tensor]
    return (batch, heads, key_heads, plan.q_len, plan.kv_len, bits, in_flight, *flat, *(mask_strides or ()))


def workspace_bytes(
    batch: int, heads: int, value_dim: int, plan: AttentionPlan, in_flight: int = HEADS_IN_FLIGHT
) -> int:
    """Scratch memory of one launch: counters, and partial results of rows that several phases share."""
    if plan.phases == 1:
        return 0
    counters = -(-batch * heads * plan.phases // 8) * 64
    return counters + min(in_flight, batch * heads) * plan.slots * (value_dim + 2) * 4
