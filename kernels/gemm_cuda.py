"""The `gemm` family on CUDA: tensor-core products with cp.async pipelines, exact fp32 on CUDA cores, and cuBLASLt.

fp16 and bf16 are multiplied by the tensor cores with fp32 sums. fp32 is exact, by fused multiply-adds, unless the
target has the feature ``"tf32"`` (what ``torch.backends.cuda.matmul.allow_tf32`` allows): then its operands are rounded
to 10 bits of mantissa and the tensor cores multiply them too.

Where M and N make too few tiles for the SMs, several blocks share the sum of a tile (split-K). Their parts, and rows
that are reduced but wider than a tile, go through fp32 memory to a second kernel that applies the epilogue; parts are
added in a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.ir.expression import Expression, Op
from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import MOST_SHARED_BYTES, REGISTERS, RESERVED_SHARED_BYTES, TF32, Target
from fuser.kernels.base import (
    STORAGE,
    Access,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Layout,
    LibraryCall,
    LibraryParameters,
    Operand,
    Packed,
    TensorRef,
)
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.operands import OperandExtents

_CHOICES = 6
_MAX_ITEMS = 8
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_SPLIT_STEPS = 4  # a part has at least so many steps along K
_DEPTHS = (64, 128)  # bytes of a tile's row
_STAGES = (2, 3, 4)
# Blocks' tiles as (rows, columns, warps along rows, warps along columns).
_TENSOR_TILES = (
    (128, 256, 2, 4),
    (256, 128, 4, 2),
    (128, 128, 2, 2),
    (128, 64, 2, 2),
    (64, 256, 1, 4),
    (64, 128, 2, 2),
    (64, 64, 2, 2),
    (32, 256, 1, 4),
    (32, 128, 1, 4),
    (32, 64, 2, 2),
    (16, 256, 1, 8),
    (16, 128, 1, 4),
    (16, 64, 1, 4),
)
_FMA_TILES = (
    (128, 128, 2, 4),
    (128, 64, 2, 2),
    (64, 256, 2, 4),
    (64, 128, 2, 2),
    (64, 64, 2, 2),
    (32, 256, 1, 8),
    (32, 64, 1, 4),
    (16, 128, 1, 4),
    (16, 64, 1, 4),
)
_CUBLAS_ACTIVATIONS = frozenset({Op.RELU, Op.GELU_TANH})
# What ranks the tiles of one product. All of these are estimates: no kernel has been measured on a GPU.
LATENCY = 7e-7
"""Seconds from asking for a tile to having it."""
_BLOCK_SECONDS = 1e-6  # start of a block and of its pipeline
_SHARE = 0.85  # of what the instructions of a product can reach
_COPY_INSTRUCTIONS = 10  # for every 16 bytes that are copied
_LIBRARY_SHARE = 0.75  # of the tensor cores' rate that a library reaches


@dataclass(frozen=True)
class Tile:
    """How a product is cut: a block's tile of C in rows and columns, elements along K of one pipeline stage, warps
    along both sides, stages, and blocks that share the sum of a tile."""

    bm: int
    bn: int
    bk: int
    warps_m: int
    warps_n: int
    stages: int
    split: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    def blocks(self, itemsize: int) -> int:
        """Blocks that an SM is to hold: as many as find room in its shared memory, if a thread can have twice the
        registers of its sums, beside which fragments and addresses need room."""
        least = 128 if self.bm * self.bn <= 64 * self.threads else 256
        shared = MOST_SHARED_BYTES // (self.shared_bytes(itemsize) + RESERVED_SHARED_BYTES)
        return min(REGISTERS // (least * self.threads), max(1, shared))

    def registers(self, itemsize: int) -> int:
        """What a thread may have, so that so many blocks fit."""
        return min(255, REGISTERS // (self.blocks(itemsize) * self.threads) // 8 * 8)

    def shared_bytes(self, itemsize: int) -> int:
        """Dynamic shared memory: the pipeline, whose place the accumulators (in padded fp32 rows) take at the end."""
        return max(self.stages * (self.bm + self.bn) * self.bk * itemsize, 4 * self.bm * (self.bn + 8))


@dataclass(frozen=True)
class CudaGemmExtents(Extents):
    """Rows of A, elements between the rows of A and of W, the epilogue's operands, and elements between the rows of
    every output."""

    rows: int
    a_stride: int
    w_stride: int
    operands: tuple[OperandExtents, ...]
    output_strides: tuple[int, ...]


@dataclass(frozen=True)
class CudaGemmParameters:
    """What the template ``cuda/gemm.cu.j2`` is rendered from.

    ``n`` and ``k`` are the weight's sizes, ``dtype`` the storage type of A and W. ``tensor_cores`` decides for fp32
    between TF32 and exact fused multiply-adds; smaller types always use them. ``epilogue`` has the accumulator as
    input 0 and ``operands`` as inputs 1, 2, …; ``out_dtypes`` are the types of its outputs.
    """

    n: int
    k: int
    dtype: DType
    tensor_cores: bool
    epilogue: Expression
    operands: tuple[Operand, ...]
    out_dtypes: tuple[DType, ...]
    tile: Tile

    @property
    def w_dtype(self) -> DType:
        """The storage type of W."""
        return self.dtype

    @property
    def a_loaded(self) -> DType:
        """The type that A has in memory when a tile of it is copied."""
        return self.dtype

    @property
    def rounded(self) -> bool:
        """Whether codes of eight bits are multiplied, which rows of A are rounded to, with scales of rows and columns
        (:mod:`fuser.kernels.gemm_int8_cuda`)."""
        return False

    @property
    def rounds(self) -> bool:
        """Whether a kernel before the product makes these codes; else A is codes, and followed by their scales."""
        return False

    @property
    def integer(self) -> bool:
        """Whether sums are integers."""
        return self.dtype is DType.I8

    @property
    def scaled(self) -> bool:
        """Whether W is int8 and sums are multiplied with a scale for every column
        (:mod:`fuser.kernels.gemm_int8_cuda`)."""
        return False

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return CudaGemmExtents.declaration(operands=len(self.operands), output_strides=len(self.out_dtypes))

    @property
    def reduces(self) -> bool:
        """Whether the epilogue needs whole rows."""
        return self.epilogue.has_reduction

    @property
    def separate(self) -> bool:
        """Whether a second kernel applies the epilogue to sums in memory."""
        return self.tile.split > 1 or (self.reduces and self.tile.bn < self.n)

    @property
    def products(self) -> int:
        """Products of ``n`` columns each that meet in the epilogue."""
        return 1

    @property
    def steps(self) -> int:
        """Pipeline stages' worth of K."""
        return -(-self.k // self.tile.bk)

    @property
    def column_tiles(self) -> int:
        return -(-self.n // (self.tile.bn // self.products))

    @property
    def pitch(self) -> int:
        """Floats between rows of sums in memory: a multiple of 16 bytes."""
        return -(-self.n // 4) * 4

    @property
    def items(self) -> int:
        """Groups of four elements of a reduced row that a lane keeps in registers from pass to pass."""
        groups = -(-self.n // 128)
        return groups if groups <= _MAX_ITEMS else 0

    @property
    def shared_bytes(self) -> int:
        return self.tile.shared_bytes(self.dtype.bytes)

    @property
    def blocks(self) -> int:
        """Blocks of an SM that registers are shared out for."""
        return self.tile.blocks(self.dtype.bytes)

    def workspace_bytes(self, rows: int) -> int:
        """Scratch for ``rows`` rows of A."""
        return 4 * self.tile.split * rows * self.pitch if self.separate else 0


@dataclass(frozen=True)
class CudaGatedGemmParameters(CudaGemmParameters):
    """As :class:`CudaGemmParameters`, with ``parts`` weights of (``n``, ``k``), whose accumulators are the first inputs
    of the epilogue. A tile has columns of all, and no other block shares its sums."""

    parts: int = 2

    @property
    def products(self) -> int:
        return self.parts


@dataclass(frozen=True)
class CublasParameters(LibraryParameters):
    """cuBLAS or cuBLASLt through PyTorch, with what they add at the end: a bias, then ReLU or tanh-GELU
    (``activation``), or instead of the bias a matrix of the result's shape (``residual``)."""

    activation: Op | None = None
    residual: bool = False


@dataclass(frozen=True)
class CublasLinear:
    """``run(a, weight, [bias or residual,] out)``: ``a`` (..., K), ``weight`` (N, K) when ``transposed``, else (K, N),
    a ``bias`` (N,) or a residual (..., N), ``out`` (..., N); one dtype, rows evenly spaced."""

    parameters: CublasParameters
    transposed: bool

    def __call__(self, a: Tensor, weight: Tensor, *rest: Tensor) -> None:
        out = _matrix(rest[-1])
        a, columns = _matrix(a), weight.t() if self.transposed else weight
        if len(rest) == 1:
            torch.mm(a, columns, out=out)
        elif self.parameters.activation is not None:
            gelu = self.parameters.activation is Op.GELU_TANH
            if gelu and not a.is_cuda:
                # PyTorch's fused GELU is the approximation by tanh on CUDA, but exact on a CPU.
                out.copy_(torch.nn.functional.gelu(torch.addmm(rest[0], a, columns), approximate="tanh"))
            else:
                torch._addmm_activation(rest[0], a, columns, use_gelu=gelu, out=out)
        else:
            torch.addmm(_matrix(rest[0]) if self.parameters.residual else rest[0], a, columns, out=out)


def _matrix(x: Tensor) -> Tensor:
    """``x`` seen as a matrix, which evenly spaced rows allow."""
    return x.view(-1, x.shape[-1])


@dataclass(frozen=True)
class Linear:
    """An epilogue that libraries have: a bias (N,), then an activation or a residual (M, N), by name of value."""

    bias: str | None = None
    activation: Op | None = None
    residual: str | None = None


def linear(match: GemmMatch) -> Linear | None:
    """The epilogue of a group as a linear layer's, None when it is another."""
    program, values = match.program, match.group.graph.values
    instructions = program.expression.instructions
    found, current = Linear(), 0
    if match.products > 1 or instructions[0].op is not Op.INPUT or instructions[0].index != 0:
        return None
    for position, i in enumerate(instructions):
        if i.op is Op.INPUT:
            continue
        if found.activation is not None or found.residual is not None or current not in i.args:
            return None
        if i.op is Op.ADD:
            other = instructions[sum(i.args) - current]
            if other.op is not Op.INPUT or other.index == 0:
                return None
            bound = program.bounds[other.index - 1]
            spec = values[bound.value]
            if bound.operand.access is not Access.MATRIX or bound.operand.periodic:
                return None
            if bound.stride == 0 and spec.shape == (match.n,) and found.bias is None:
                found = dataclasses.replace(found, bias=bound.value)
            elif bound.stride and spec.shape == values[program.outputs[0]].shape:
                found = dataclasses.replace(found, residual=bound.value)
            else:
                return None
        elif len(i.args) == 1:
            found = dataclasses.replace(found, activation=i.op)
        else:
            return None
        current = position
    return found if program.expression.outputs == (current,) else None


def weight(match: GemmMatch) -> tuple[TensorRef, int]:
    """The weight as rows (N, K) of A's type, and their stride: as it is where it is that, else packed."""
    return rows_of(match.weight, match.group.graph, match.transposed, product_dtype(match))


def rows_of(value: str, graph: OperatorGraph, transposed: bool, dtype: DType) -> tuple[TensorRef, int]:
    """A weight, (N, K) when ``transposed``, else (K, N), as rows of K elements of ``dtype``, and their stride."""
    spec = graph.values[value]
    if transposed and spec.strides[1] == 1 and STORAGE[spec.dtype] is dtype:
        return value, spec.strides[0]
    return Packed((value,), RowLayout(transposed, dtype)), spec.shape[1 if transposed else 0]


def product_dtype(match: GemmMatch) -> DType:
    """The type that A and W are multiplied in: that of A."""
    return STORAGE[match.group.graph.values[match.a].dtype]


def moved_bytes(match: GemmMatch, stored: DType | None = None) -> float:
    """Every tensor once to or from memory, the weight as it is ``stored``, by default as A is."""
    graph = match.group.graph
    weight = match.products * match.n * match.k * (stored or product_dtype(match)).bytes
    return float(graph.values[match.a].nbytes + weight + match.program.bytes(graph))


@dataclass(frozen=True)
class RowLayout(Layout):
    """The weight of a linear layer, (N, K) when ``transposed``, else (K, N), as contiguous (N, K) of ``dtype``. Shares
    memory with the weight where that is what it is already."""

    transposed: bool
    dtype: DType

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (weight,) = tensors
        return ((weight if self.transposed else weight.t()).to(self.dtype.torch).contiguous(),)


def parameters(
    n: int,
    k: int,
    dtype: DType,
    epilogue: Expression,
    operands: Sequence[Operand],
    out_dtypes: Sequence[DType],
    tile: Tile,
    tensor_cores: bool,
    products: int = 1,
) -> CudaGemmParameters:
    """Parameters of one kernel; see :class:`CudaGemmParameters`."""
    plain = CudaGemmParameters(n, k, dtype, tensor_cores, epilogue, tuple(operands), tuple(out_dtypes), tile)
    return plain if products == 1 else CudaGatedGemmParameters(**vars(plain), parts=products)


@functools.lru_cache(maxsize=4096)
def best_tiles(
    rows: int, n: int, k: int, dtype: DType, tensor_cores: bool, reduces: bool, target: Target, whole: bool = False
) -> tuple[Tile, ...]:
    """Legal tiles for a product of these sizes on ``target``, those with the least predicted time first; with
    ``whole``, only those whose sums no other block shares."""

    def seconds(tile: Tile) -> float:
        return tile_seconds(tile, rows, n, k, dtype, tensor_cores, reduces, target)

    legal = legal_tiles(n, k, dtype, tensor_cores, target)
    ranked = sorted((tile for tile in legal if tile.split == 1 or not whole), key=seconds)
    # The first of every shape: depth and stages differ less than shapes do.
    best: dict[tuple[int, int, int], Tile] = {}
    for tile in ranked:
        best.setdefault((tile.bm, tile.bn, tile.split), tile)
    return tuple(itertools.islice(best.values(), _CHOICES))


def legal_tiles(n: int, k: int, dtype: DType, tensor_cores: bool, target: Target) -> list[Tile]:
    """Every tile that fits into shared memory, for a weight (N, K) = (``n``, ``k``)."""
    tiles = []
    shapes = _TENSOR_TILES if tensor_cores else _FMA_TILES
    for (bm, bn, warps_m, warps_n), depth, stages in itertools.product(shapes, _DEPTHS, _STAGES):
        steps = -(-k * dtype.bytes // depth)
        for split in _SPLITS:
            tile = Tile(bm, bn, depth // dtype.bytes, warps_m, warps_n, stages, split)
            if split > 1 and steps < split * _SPLIT_STEPS:
                break
            if tile.shared_bytes(dtype.bytes) <= target.shared_bytes:
                tiles.append(tile)
    return tiles


def tile_seconds(
    tile: Tile, rows: int, n: int, k: int, dtype: DType, tensor_cores: bool, reduces: bool, target: Target
) -> float:
    """Predicted time of the kernels without their start: the busiest SM's tiles, each bounded by its multiply-adds,
    the fragments' way through shared memory, the tiles' way from L2, and the latency that the pipeline hides."""
    steps = -(-k // tile.bk)
    per_block = -(-steps // tile.split)
    blocks = -(-rows // tile.bm) * -(-n // tile.bn) * tile.split
    busiest = -(-blocks // target.cores)
    resident = min(busiest, resident_blocks(tile, dtype, target))
    loaded = (tile.bm + tile.bn) * tile.bk * dtype.bytes
    fragments = (tile.bm * tile.warps_n + tile.bn * tile.warps_m) * tile.bk * dtype.bytes
    flops = 2.0 * tile.bm * tile.bn * tile.bk
    if not tensor_cores:
        # Copies take the place of multiply-adds in the instruction stream.
        flops += 2.0 * _COPY_INSTRUCTIONS * loaded / 16
    step = block_seconds(flops, loaded, fragments, dtype, tensor_cores, target)
    epilogue = tile.bm * tile.bn * 8 / target.l2_bandwidth
    work = busiest * (per_block * step + epilogue)
    hidden = -(-busiest // resident) * (_BLOCK_SECONDS + per_block * LATENCY / (tile.stages - 1))
    # Neither hides the other completely.
    time = math.hypot(work, hidden)
    if tile.split > 1 or (reduces and tile.bn < n):
        moved = 8.0 * tile.split * rows * n
        spills = moved / 2 > target.cache_bytes[1] / 2
        time += target.launch_seconds + moved / (target.bandwidth if spills else target.l2_bandwidth * target.cores)
    return time


def block_seconds(
    flops: float, loaded: float, fragments: float, dtype: DType, tensor_cores: bool, target: Target
) -> float:
    """The least time that one SM takes for so many operations, bytes from L2, and bytes read from shared memory."""
    rate = target.mma_rate(dtype.torch, _SHARE) if tensor_cores else target.peak_flops * _SHARE
    return max(flops / rate, (fragments + loaded) / target.shared_bandwidth, loaded / target.l2_bandwidth)


def resident_blocks(tile: Tile, dtype: DType, target: Target) -> int:
    """Blocks that one SM runs at a time, at least one."""
    room = target.shared_bytes + RESERVED_SHARED_BYTES
    shared = room // (tile.shared_bytes(dtype.bytes) + RESERVED_SHARED_BYTES)
    return max(1, min(shared, tile.blocks(dtype.bytes)))


def has_tensor_cores(dtype: DType, target: Target) -> bool:
    return dtype is not DType.F32 or TF32 in target.features


def is_multiplied(match: GemmMatch) -> bool:
    """Whether A and W can be multiplied in the type of A: only fp32 holds every other exactly."""
    values = match.group.graph.values
    return product_dtype(match) is DType.F32 or values[match.weight].dtype == values[match.a].dtype


def cost_of(match: GemmMatch, seconds: float, launches: int, target: Target, stored: DType | None = None) -> Cost:
    """Every tensor touched once, and the product in ``seconds``; the weight is ``stored`` as A is, or otherwise."""
    flops = max(2.0 * match.program.rows * match.n * match.products * match.k, 1.0)
    efficiency = flops / (target.peak_flops * target.cores * max(seconds, 1e-9))
    return Cost(flops, moved_bytes(match, stored), launches, efficiency)


def match_tiles(match: GemmMatch, dtype: DType, tensor_cores: bool, target: Target) -> list[Tile]:
    """Legal tiles for a match whose factors are multiplied as ``dtype``, those with the least predicted time first."""
    program, columns, gated = match.program, match.n * match.products, match.products > 1
    reduces = program.expression.has_reduction
    tiles = best_tiles(program.rows, columns, match.k, dtype, tensor_cores, reduces, target, gated)
    return [tile for tile in tiles if tile.bn % (32 * match.products) == 0]


def gated_fields(match: GemmMatch, dtype: DType, tensor_cores: bool, tile: Tile) -> dict[str, Any]:
    """What parameters of products that are multiplied as ``dtype`` have in common."""
    program = match.program
    return {
        "n": match.n,
        "k": match.k,
        "dtype": dtype,
        "tensor_cores": tensor_cores,
        "epilogue": program.expression,
        "operands": program.operands,
        "out_dtypes": program.output_dtypes,
        "tile": tile,
        "parts": match.products,
    }


def match_seconds(match: GemmMatch, parameters: CudaGemmParameters, target: Target) -> float:
    """Predicted time of the product without the start of its kernels, of which the roofline adds all but one's."""
    p, columns = parameters, match.n * match.products
    rows = match.program.rows
    seconds = tile_seconds(p.tile, rows, columns, match.k, p.dtype, p.tensor_cores, p.reduces, target)
    return seconds - target.launch_seconds if p.separate else seconds


class CudaGemm(Implementation[GemmMatch, CudaGemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaGemmParameters]:
        """The tiles with the least predicted time."""
        if not is_multiplied(match):
            return []
        program, dtype = match.program, product_dtype(match)
        tensor_cores = has_tensor_cores(dtype, target)
        return [
            parameters(
                match.n,
                match.k,
                dtype,
                program.expression,
                program.operands,
                program.output_dtypes,
                tile,
                tensor_cores,
                match.products,
            )
            for tile in match_tiles(match, dtype, tensor_cores, target)
        ]

    def cost(self, match: GemmMatch, parameters: CudaGemmParameters, target: Target) -> Cost:
        """Roofline with whole tiles on whole SMs, every tensor touched once, and the epilogue's way through memory
        where a second kernel applies it."""
        return cost_of(match, match_seconds(match, parameters, target), 2 if parameters.separate else 1, target)

    def call(self, match: GemmMatch, parameters: CudaGemmParameters, target: Target, threads: int) -> KernelCall:
        program = match.program
        columns, stride = weight(match)
        return KernelCall(
            KernelSpec("gemm", "cuda/gemm.cu.j2", parameters),
            (match.a, columns, *program.tensors),
            CudaGemmExtents(program.rows, match.row_stride, stride, program.operand_extents, program.output_strides),
            program.outputs,
            parameters.workspace_bytes(program.rows),
        )


class CublasGemm(Implementation[GemmMatch, CublasParameters]):
    """cuBLAS and cuBLASLt: one type, a bias with or without an activation, or a residual."""

    from_library = True

    def space(self, match: GemmMatch, target: Target) -> Sequence[CublasParameters]:
        program, values, found = match.program, match.group.graph.values, linear(match)
        read = (match.a, match.weight, *(b.value for b in program.bounds))
        if found is None or len({values[v].dtype for v in (*read, *program.outputs)}) != 1 or match.k == 0:
            return []
        if found.bias and found.residual:
            return []
        if found.activation is not None and (found.activation not in _CUBLAS_ACTIVATIONS or found.bias is None):
            return []
        return [CublasParameters(found.bias is not None, found.activation, found.residual is not None)]

    def cost(self, match: GemmMatch, parameters: CublasParameters, target: Target) -> Cost:
        """The library is taken to find as good a tile as ours, and to feed the tensor cores of any architecture."""
        rows, dtype = match.program.rows, product_dtype(match)
        tensor_cores = has_tensor_cores(dtype, target)
        tile = best_tiles(rows, match.n, match.k, dtype, tensor_cores, False, target)[0]
        seconds = tile_seconds(tile, rows, match.n, match.k, dtype, tensor_cores, False, target)
        if tensor_cores:
            seconds *= target.mma_rate(dtype.torch, _SHARE) / (target.rate(dtype.torch) * _LIBRARY_SHARE)
        return cost_of(match, seconds, 1, target)

    def call(self, match: GemmMatch, parameters: CublasParameters, target: Target, threads: int) -> LibraryCall:
        bounds = tuple(b.value for b in match.program.bounds)
        run = CublasLinear(parameters, match.transposed)
        return LibraryCall("cublas_linear", run, (match.a, match.weight, *bounds), match.program.outputs)
