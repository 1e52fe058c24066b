"""The `attention` family on GPUs: parameters, their choice and cost, and the call of ``cuda/attention.cu.j2``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from fuser.kernels.attention_tiles import STEP, BitOrder, Tiles, tiles
from fuser.kernels.base import DType, KernelSpec
from fuser.kernels.plan import AttentionPlan

TEMPLATE = "cuda/attention.cu.j2"
_WARP_ROWS = 16
_SHORTEST_PART = 8
"""Steps below which a tile is not cut into parts, since merging them would cost as much."""
_WAVES = 8
"""Tiles in flight for every multiprocessor: enough for an even end, with states that fit the cache."""
_TILE_STEPS = 2.0
"""What a tile costs besides its steps, in steps."""
_BLOCKS = 2
"""Blocks that share a multiprocessor and hide each other's waits."""


@dataclass(frozen=True)
class CudaAttentionParameters:
    """``mask`` is the storage of the run-time mask: BOOL (True = may attend), or the type of one added to scores.

    ``rows`` (64 or 128) query rows make a tile, sixteen a warp; ``keys`` (16, 32 or 64) travel together through
    ``stages`` buffers; ``blocks`` a multiprocessor are what registers are limited for. fp32 is computed with fused
    multiply-adds, or with ``tf32`` on tensor cores with operands rounded to 11 bits; 16-bit types use tensor cores.
    ``lse`` adds the log-sum-exp output.
    """

    head_dim: int
    value_dim: int
    dtype: DType = DType.F16
    mask: DType | None = None
    lse: bool = False
    tf32: bool = False
    rows: int = 64
    keys: int = 64
    stages: int = 2
    blocks: int = 2

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("attention", TEMPLATE, self)

    @property
    def order(self) -> BitOrder:
        return BitOrder.VECTOR if self.dtype is DType.F32 and not self.tf32 else BitOrder.MMA

    @property
    def padded_value_dim(self) -> int:
        """Width of the results that are kept between tiles."""
        step = 32 if self.order is BitOrder.VECTOR else 16
        return -(-self.value_dim // step) * step

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        size, chunk = self.dtype.bytes, 16 // self.dtype.bytes
        width = -(-self.head_dim // (16 if size == 2 else 8)) * (16 if size == 2 else 8)
        pitch = width + chunk
        total = self.stages * self.keys * (pitch + self.padded_value_dim + chunk) * size
        if self.order is BitOrder.VECTOR or width > (128 if size == 2 else 64):
            total += self.rows * pitch * size
        if self.order is BitOrder.VECTOR:
            total += self.rows * (self.keys + 4) * 4
        slots = self.stages + 1
        return total + slots * (self.keys * 4 + 16) + (slots * self.keys * 4 if self.mask else 0) + 16


@dataclass(frozen=True)
class Schedule:
    """The tiles of one launch, how many units' are at work together, and the scratch memory in bytes.

    A unit is a (batch, head), or a batch of a plan whose heads have tiles of their own.
    """

    tiles: Tiles
    in_flight: int
    workspace_bytes: int


def schedule(plan: AttentionPlan, parameters: CudaAttentionParameters, batch: int, heads: int, cores: int) -> Schedule:
    """Tiles for a GPU with so many multiprocessors: as long as they are, unless few of them would end late."""
    units = batch if plan.heads else batch * heads
    whole = tiles(plan, parameters.rows, parameters.order, plan.kv_len + STEP)
    # Cutting a tile that takes less than the fair share of a block would not end the launch earlier.
    share = max(_SHORTEST_PART, -(-units * whole.steps // (_BLOCKS * cores)))
    cut = whole
    if whole.most_steps > share:
        cut = tiles(plan, parameters.rows, parameters.order, 1 << (share - 1).bit_length())
    in_flight = max(1, min(units, -(-_WAVES * cores // max(1, cut.items))))
    counters = -(-(2 + units + in_flight * cut.states) // 4) * 16
    return Schedule(cut, in_flight, counters + in_flight * cut.states * (parameters.padded_value_dim + 2) * 4)


def extents(
    batch: int,
    heads: int,
    key_heads: int,
    plan: AttentionPlan,
    chosen: Schedule,
    scale: float,
    strides: Sequence[Sequence[int]],
    mask_strides: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The template's extents: ``strides`` are (batch, head, row) of q, k, v and out, in elements, and ``mask_strides``
    (batch, head, row, key) of the run-time mask, 0 where it is broadcast."""
    (bits,) = struct.unpack("<q", struct.pack("<d", scale))
    cut = chosen.tiles
    of_tiles = (cut.items, cut.states, int(cut.heads is not None), chosen.in_flight, *cut.offsets)
    flat = [stride for tensor in strides for stride in tensor]
    return (batch, heads, key_heads, plan.q_len, plan.kv_len, bits, *of_tiles, *flat, *(mask_strides or ()))
