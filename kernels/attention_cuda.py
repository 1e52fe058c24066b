"""The `attention` family on GPUs: parameters, their choice and cost, and the call of ``cuda/attention.cu.j2``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fuser.ir.extents import Extents
from fuser.ir.scores import ScoreRule
from fuser.ir.target import TF32, Target
from fuser.kernels.attention import (
    AnyPlan,
    AttentionMatch,
    Distances,
    HeadStrides,
    Launch,
    MaskStrides,
    Operands,
    ScorePolicy,
)
from fuser.kernels.attention_tiles import STEP, BitOrder, Tiles, tiles
from fuser.kernels.base import Cost, DType, Implementation, KernelCall, KernelSpec, Literal
from fuser.kernels.plan import AttentionPlan

TEMPLATE = "cuda/attention.cu.j2"
_SHORTEST_PART = 8
"""Steps below which a tile is not cut into parts, since merging them would cost as much."""
_WAVES = 8
"""Tiles in flight for every multiprocessor: enough for an even end, with states that fit the cache."""
_TILE_STEPS = 2.0
"""What a tile costs besides its steps, in steps."""
_BLOCKS = 2
"""Blocks that share a multiprocessor and hide each other's waits."""
_STAGES = (2, 3)
# Of what tensor cores, fused multiply-adds and L2 can reach: softmax runs between the products, and keys are gathered
# row by row. Estimates: no kernel has been measured on a GPU.
_MMA_SHARE = 0.6
_FMA_SHARE = 0.5
_GATHER_SHARE = 2 / 3
_CODE_FLOPS = 8.0
"""What a score of codes takes besides its product: a conversion, and the multiplication with two steps."""


@dataclass(frozen=True)
class CudaAttentionParameters:
    """``mask`` is the storage of the run-time mask: BOOL (True = may attend), or the type of one added to scores,
    ``distances`` that of a bias by distance.

    ``rows`` (64 or 128) query rows make a tile, sixteen a warp; ``keys`` (16, 32 or 64) travel together through
    ``stages`` buffers; ``blocks`` a multiprocessor are what registers are limited for. fp32 is computed with fused
    multiply-adds, or with ``tf32`` on tensor cores with operands rounded to 11 bits; 16-bit types use tensor cores.
    ``lse`` adds the log-sum-exp output; ``rule`` changes scaled scores before masks do.
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
    rule: ScoreRule | None = None
    distances: DType | None = None

    few_bits: ClassVar[bool] = False
    """Whether scores are made of fewer bits than ``dtype`` has."""

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec("attention", TEMPLATE, self)

    @property
    def extents_kind(self) -> type[CudaAttentionExtents]:
        return CudaAttentionExtents

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return self.extents_kind.declaration()

    @property
    def extents_type(self) -> str:
        """The struct of the extents in C."""
        return self.extents_kind.__name__

    @property
    def policy(self) -> ScorePolicy:
        return ScorePolicy("Products")

    @property
    def codes(self) -> int:
        """How many kinds of codes a row of q or k has, 0 where rows are as they are given."""
        return 0

    @property
    def given(self) -> bool:
        """Whether rows of codes have those of q or k as given behind them."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether limits of rows are found before scores are."""
        return False

    @property
    def constants(self) -> Mapping[str, int | bool | float]:
        """What the configuration says to the policy, by its names in C++."""
        return {}

    @property
    def order(self) -> BitOrder:
        return BitOrder.VECTOR if self.dtype is DType.F32 and not self.tf32 else BitOrder.MMA

    @property
    def padded_value_dim(self) -> int:
        """Width of the results that are kept between tiles."""
        step = 32 if self.order is BitOrder.VECTOR else 16
        return -(-self.value_dim // step) * step

    @property
    def given_bytes(self) -> int:
        """Bytes of a row of q or k as given, with zeros up to whole products."""
        return -(-self.head_dim * self.dtype.bytes // 32) * 32

    @property
    def key_bytes(self) -> int:
        """Bytes between rows of q and k in shared memory."""
        return self.given_bytes + 16

    @property
    def shares_queries(self) -> bool:
        """Whether registers do not hold the rows of q."""
        return self.order is BitOrder.VECTOR or self.key_bytes > 256 + 16

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        size = self.dtype.bytes
        total = self.stages * self.keys * (self.key_bytes + self.padded_value_dim * size + 16)
        if self.shares_queries:
            total += self.rows * self.key_bytes
        if self.order is BitOrder.VECTOR:
            total += self.rows * (self.keys + 4) * 4
        slots = 4 if self.stages < 4 else 8
        return total + slots * (self.keys * 4 + 16) + (slots * self.keys * 4 if self.mask else 0) + 16

    def launch(self, plan: AnyPlan, operands: Operands, scale: float, target: Target, threads: int) -> Launch:
        assert isinstance(plan, AttentionPlan), "how many tiles a launch has follows from its plan"
        batch, heads, key_heads = operands.heads
        chosen = schedule(plan, self, batch, heads, target.cores)
        return Launch(
            Literal(chosen.tiles.key, chosen.tiles.array),
            extents(
                *(batch, heads, key_heads, plan, chosen, scale, target.cores),
                *(operands.strides, operands.mask_strides, operands.distances, operands.lse_strides),
            ),
            chosen.workspace_bytes,
        )


def choices(
    head_dim: int,
    value_dim: int,
    dtype: DType,
    mask: DType | None,
    lse: bool,
    target: Target,
    rule: ScoreRule | None = None,
    distances: DType | None = None,
    kind: Callable[..., CudaAttentionParameters] = CudaAttentionParameters,
    most_keys: int = 64,
) -> list[CudaAttentionParameters]:
    """Legal parameters of a ``kind`` on ``target``: both sizes of tiles, with as many keys, up to ``most_keys``, and
    blocks as registers allow.

    None where its shared memory is too small: for wide fp32 heads on GPUs with 99 KiB a block.
    """
    tf32 = dtype is DType.F32 and TF32 in target.features
    vector = dtype is DType.F32 and not tf32
    widest = max(head_dim, value_dim)
    # A lane holds half a column's results and half a key's scores, besides its queries.
    keys = (32 if widest <= 128 else 16) if vector else 64 if widest <= (64 if tf32 else 128) else 32
    keys = min(keys, most_keys)
    blocks = 1 if widest > 128 or (tf32 and widest > 64) else 3 if widest <= 64 and dtype is not DType.F32 else 2
    found = []
    for rows in (64, 128):
        if rows > 64 and blocks == 1:
            continue
        for stages in _STAGES:
            for fewer in sorted({keys, 16}, reverse=True):
                made = kind(
                    *(head_dim, value_dim, dtype, mask, lse, tf32, rows, fewer, stages),
                    *(max(1, blocks * 64 // rows), rule, distances),
                )
                if made.shared_bytes <= target.shared_bytes:
                    found.append(made)
                    break
    return found


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


@dataclass(frozen=True)
class CudaAttentionExtents(Extents):
    """``items``, ``states`` and where members, records, lists and words are in the array are those of a
    :class:`Tiles`; ``per_head`` is 1 where heads have tiles of their own, ``in_flight`` how many units are at work
    together, ``multiprocessors`` how many the GPU has, and ``mask`` zero where there is no run-time mask."""

    batch: int
    heads: int
    key_heads: int
    q_len: int
    kv_len: int
    scale: float
    items: int
    states: int
    per_head: int
    in_flight: int
    multiprocessors: int
    members_at: int
    records_at: int
    lists_at: int
    words_at: int
    q: HeadStrides
    k: HeadStrides
    v: HeadStrides
    out: HeadStrides
    lse: HeadStrides
    mask: MaskStrides
    distances: Distances


def extents(
    batch: int,
    heads: int,
    key_heads: int,
    plan: AttentionPlan,
    chosen: Schedule,
    scale: float,
    multiprocessors: int,
    strides: Sequence[Sequence[int]],
    mask_strides: Sequence[int] | None = None,
    distances: Distances | None = None,
    lse: Sequence[int] | None = None,
) -> CudaAttentionExtents:
    """The kernel's extents: ``strides`` are (batch, head, row) of q, k, v and out, in elements, ``mask_strides``
    (batch, head, row, key) of the run-time mask, 0 where it is broadcast, ``distances`` of a bias by distance, ``lse``
    (batch, head, row) of that output, unless it is contiguous."""
    cut = chosen.tiles
    sizes = (batch, heads, key_heads, plan.q_len, plan.kv_len, float(scale))
    of_tiles = (cut.items, cut.states, int(cut.heads is not None), chosen.in_flight, multiprocessors, *cut.offsets)
    contiguous = (heads * plan.q_len, plan.q_len, 1)
    q, k, v, out, sums = (HeadStrides(*tensor) for tensor in (*strides, lse or contiguous))
    masks = MaskStrides(*(mask_strides or (0, 0, 0, 0)))
    return CudaAttentionExtents(*sizes, *of_tiles, q, k, v, out, sums, masks, distances or Distances(0, 0, 0))


def cost(
    parameters: CudaAttentionParameters, plan: AttentionPlan, batch: int, heads: int, moved: int, target: Target
) -> Cost:
    """The cost of one launch that reads and writes ``moved`` bytes: steps by products or by gathered bytes, whichever
    takes longer, and no less than the longest tile, which a block computes alone."""
    cut = schedule(plan, parameters, batch, heads, target.cores).tiles
    units = batch if plan.heads else batch * heads
    width = parameters.head_dim + parameters.value_dim
    if parameters.order is BitOrder.VECTOR:
        rate = target.peak_flops * _FMA_SHARE
    else:
        rate = target.mma_rate(parameters.dtype.torch, _MMA_SHARE)
    pairs = units * cut.pairs_computed
    steps = units * max(1, cut.steps)
    gathered = STEP * width * parameters.dtype.bytes
    products = 2.0 * width / rate
    if parameters.codes:
        kinds = parameters.codes + parameters.surveys
        of_code = 2.0 * parameters.head_dim / target.mma_rate(torch.int8, _MMA_SHARE)
        of_code += _CODE_FLOPS / (target.peak_flops * _FMA_SHARE)
        in_full = parameters.value_dim + parameters.given * parameters.head_dim
        products = kinds * of_code + 2.0 * in_full / rate
        gathered = STEP * (kinds * parameters.head_dim + in_full * parameters.dtype.bytes)
    step = max(pairs * products / steps, gathered / (target.l2_bandwidth * _GATHER_SHARE))
    whole = (steps + _TILE_STEPS * units * cut.items) * step / target.cores
    longest = (cut.most_steps + _TILE_STEPS) * step * _BLOCKS
    seconds = max(whole, longest)
    flops = max(1.0, pairs * 2.0 * width)
    return Cost(flops, float(moved), efficiency=flops / (seconds * target.peak_flops * target.cores))


class CudaAttention(Implementation[AttentionMatch, CudaAttentionParameters]):
    """Attention plans on GPUs."""

    def space(self, match: AttentionMatch, target: Target) -> Sequence[CudaAttentionParameters]:
        """What shared memory and registers hold: see :func:`choices`. None where the plan is known at run time: how
        many tiles a launch has follows from it; nor for sums without values, biases and keys that are not stored."""
        if match.table is not None or match.out is None or not match.is_plain:
            return ()
        lse = match.lse is not None
        return choices(*match.widths, match.dtype, match.mask_dtype, lse, target, **match.of_scores)

    def cost(self, match: AttentionMatch, parameters: CudaAttentionParameters, target: Target) -> Cost:
        batch, heads, _, _ = match.group.graph.values[match.q].shape
        return cost(parameters, match.plan(target), batch, heads, match.moved_bytes, target)

    def call(
        self, match: AttentionMatch, parameters: CudaAttentionParameters, target: Target, threads: int
    ) -> KernelCall:
        return match.call(parameters, target, threads)
