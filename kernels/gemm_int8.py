"""Products in int8: rows of activations rounded as they are packed, weights rounded once.

The epilogue, the register tile and the blocks are those of :mod:`fuser.kernels.gemm`. A step of the inner loop
multiplies as many elements as an instruction of the target sums into 32 bits: four where it has the dot products of
VNNI or the tiles of AMX, whose first factors are unsigned, so that 128 is added to activations and the sums of the
weights' columns are taken off again; else two, widened to 16 bits. All sum exactly, so that all targets give the same
numbers, which are those of :class:`fuser.ir.operators.QuantizedGemm`. CPUs have no products of other codes.
Rows that the kernel before has rounded come as integers with their scales (:class:`fuser.ir.operators.CodeGemm`).
Weights that are stored as integers are taken as they are (:class:`fuser.ir.operators.Int8Gemm`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import CodedProduct, CodeGemm, Int8Gemm, QuantizedGemm
from fuser.ir.quantization import MAX_TERMS, MOST, quantize_rows
from fuser.ir.target import Isa, Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.gemm import (
    GatedGemmParameters,
    GemmExtents,
    GemmFamily,
    GemmMatch,
    int8_fields,
    matrix_tiles,
    pack,
    product_cost,
    register_tiles,
    share_of,
)

_OFFSET = 128
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_DEPTHS = (512, 256)
_PAIR_TILES = ((6, 2), (5, 2))


@dataclass(frozen=True)
class QuantizedGemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for products in codes of eight bits."""

    name = "quantized_gemm"
    kind = QuantizedGemm


@dataclass(frozen=True)
class CodeGemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for rows that are codes of eight bits with scales."""

    name = "code_gemm"
    kind = CodeGemm
    codes = frozenset(MOST)
    constants = slice(1, -1)

    def match(self, group: OperatorGroup, target: Target) -> GemmMatch | None:
        found = super().match(group, target)
        if found is None or group.graph.values[found.a].dtype != codes_of(found):
            return None
        return found if group.graph.values[found.gemm.inputs[-1]].is_contiguous else None


@dataclass(frozen=True)
class StoredInt8GemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for rows that are rounded to int8 and weights that are stored so."""

    name = "int8_gemm"
    kind = Int8Gemm
    weights = frozenset({torch.int8})
    constants = slice(1, 3)


@dataclass(frozen=True)
class Int8Layout(Layout):
    """A weight, and the factors of its K rows if it has some, as int8 panels for steps of ``width`` elements, with the
    scale of every column and what its sum has to be changed by where 128 is added to A: (panels, parts, steps, nr,
    width) int8, (panels, parts, nr) float32 and int32."""

    nr: int
    transposed: bool
    width: int
    parts: int = 1
    tiles: bool = False

    @property
    def offset(self) -> int:
        """What a column's sum is changed by for each of the sum of its weights."""
        return -_OFFSET if self.width == 4 else 0

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = []
        for integers, scales in self.rounded(*tensors):
            offsets = integers.sum(-1, keepdim=True, dtype=torch.int32) * self.offset
            columns = [pack(x, self.nr).flatten(1) for x in (scales, offsets)]
            found.append((pack(integers, self.nr, width=self.width, tiles=self.tiles), *columns))
        return tuple(torch.stack(parts, 1) for parts in zip(*found, strict=True))

    def rounded(self, *tensors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The integers (N, K) of every part and their scales (N, 1)."""
        weight, *factors = tensors
        for part in weight.chunk(self.parts, 0 if self.transposed else 1):
            yield quantize_rows(part if self.transposed else part.t(), *(1 / f for f in factors))


@dataclass(frozen=True)
class StoredInt8Layout(Int8Layout):
    """As :class:`Int8Layout`, of a weight that is integers and the scales (N,) of its outputs."""

    def rounded(self, *tensors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        integers, scales = tensors
        parts = integers.chunk(self.parts, 0 if self.transposed else 1)
        for part, own in zip(parts, scales.float().chunk(self.parts), strict=True):
            yield part if self.transposed else part.t(), own[:, None]


@dataclass(frozen=True)
class ShiftedInt8Layout(StoredInt8Layout):
    """As :class:`StoredInt8Layout`, with the sum of every column's weights, for zero points that are known later."""

    @property
    def offset(self) -> int:
        return 1


@dataclass(frozen=True)
class Int8GemmParameters(GatedGemmParameters):
    """As :class:`GatedGemmParameters`, for integers with scales: a step multiplies four elements along K where it is of
    ``quads``, else two. With ``factors``, elements of A are multiplied by those of a (K,) tensor before they are
    rounded."""

    quads: bool = False
    factors: bool = False

    kernel: ClassVar[str] = "quantized_gemm"
    layout: ClassVar[type[Int8Layout]] = Int8Layout

    @property
    def width(self) -> int:
        return 4 if self.quads else 2

    @property
    def integer(self) -> bool:
        return True

    @property
    def ranged(self) -> bool:
        """Whether rows are rounded to a range of integers, as :class:`StoredInt8GemmParameters` say."""
        return False


@dataclass(frozen=True)
class CodeGemmParameters(Int8GemmParameters):
    """As :class:`Int8GemmParameters`, for an A that is integers with scales."""

    kernel: ClassVar[str] = "code_gemm"

    @property
    def coded(self) -> bool:
        return True


@dataclass(frozen=True)
class StoredInt8GemmParameters(Int8GemmParameters):
    """As :class:`Int8GemmParameters`, with rows of A rounded to the integers from ``low`` to ``high`` and scales of
    ``least`` or more (:func:`fuser.ir.quantization.round_rows`)."""

    low: int = -128
    high: int = 127
    least: float | None = 2.0**-23

    kernel: ClassVar[str] = "int8_gemm"
    layout: ClassVar[type[Int8Layout]] = StoredInt8Layout

    @property
    def ranged(self) -> bool:
        return True

    @property
    def half(self) -> float:
        """The magnitude that is divided by the scale of its row is no larger."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ShiftedInt8GemmParameters(StoredInt8GemmParameters):
    """As :class:`StoredInt8GemmParameters`, with zero points: of rows, or, without ``least``, one that is given with
    the scale of all of A (:func:`fuser.ir.quantization.round_tensor`)."""

    layout: ClassVar[type[Int8Layout]] = ShiftedInt8Layout

    @property
    def shifted(self) -> bool:
        return True

    @property
    def given(self) -> bool:
        return self.least is None


class CpuInt8Gemm(Implementation[GemmMatch, Int8GemmParameters]):
    """Our template on CPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[Int8GemmParameters]:
        """Register tiles of the instruction set, the one that wastes the fewest columns first; a deeper pass."""
        if codes_of(match) != torch.int8 or not 0 < match.k <= MAX_TERMS:
            return []
        return self.choices(match, target)

    def choices(self, match: GemmMatch, target: Target) -> list[Int8GemmParameters]:
        """The :meth:`space` of products whose sums fit."""
        tiles = _tiles(match.n, target)
        choices = [(tile, depth, True) for tile in matrix_tiles(match.n, target, "amx_int8") for depth in _DEPTHS]
        choices += [(tile, _DEPTHS[0], False) for tile in tiles] + [(tiles[0], _DEPTHS[1], False)]
        return [*dict.fromkeys(int8_parameters(match, target, *choice) for choice in choices)]

    def cost(self, match: GemmMatch, parameters: Int8GemmParameters, target: Target) -> Cost:
        """Roofline of the padded product with weights of one byte, its epilogue, and every tensor touched once."""
        share = share_of(parameters, target, "amx_int8", 0.8)
        return product_cost(match, target, nr=parameters.nr, share=share, passes=1, launches=1, multiplied=torch.int8)

    def call(self, match: GemmMatch, parameters: Int8GemmParameters, target: Target, threads: int) -> KernelCall:
        program, (_, *constants) = match.program, match.gemm.inputs
        own = [constants.pop()] if parameters.coded else []
        layout = parameters.layout(parameters.nr, match.transposed, parameters.width, match.products, parameters.tiles)
        weights, given = (constants[:2], constants[2:]) if parameters.given else (constants, own)
        factors = weights[1:] if parameters.factors else given
        packed = (Packed(tuple(weights), layout, i) for i in range(3))
        return KernelCall(
            KernelSpec(parameters.kernel, "cpu/gemm.cpp.j2", parameters),
            (match.a, *packed, *factors, *program.tensors),
            GemmExtents(program.rows, match.row_stride, program.operand_extents, program.output_strides),
            program.outputs,
            parameters.workspace_bytes(threads),
        )


class CpuCodeGemm(CpuInt8Gemm):
    """The same on rows that are integers."""

    def choices(self, match: GemmMatch, target: Target) -> list[Int8GemmParameters]:
        return [CodeGemmParameters(**{**vars(p), "factors": False}) for p in super().choices(match, target)]


class CpuStoredInt8Gemm(CpuInt8Gemm):
    """The same on weights that are stored as integers."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[Int8GemmParameters]:
        semantics = match.gemm.semantics
        assert isinstance(semantics, Int8Gemm)
        if not 0 < match.k <= semantics.max_terms:
            return []
        return [stored_parameters(match, found) for found in self.choices(match, target)]


def codes_of(match: GemmMatch) -> torch.dtype:
    """What the factors of a product are rounded to."""
    semantics = match.gemm.semantics
    assert isinstance(semantics, CodedProduct)
    return semantics.codes


def int8_parameters(
    match: GemmMatch, target: Target, tile: tuple[int, int], depth: int, tiles: bool = False
) -> Int8GemmParameters:
    """Parameters with blocks that fit the caches, for a register ``tile`` of rows and vectors, or matrix ``tiles``."""
    quads = tiles or _has_quads(target)
    fields = int8_fields(match, target, tile, depth, 4 if quads else 2, tiles)
    return Int8GemmParameters(**fields, quads=quads, factors=len(match.gemm.inputs) > 2)


def stored_parameters(match: GemmMatch, parameters: Int8GemmParameters) -> StoredInt8GemmParameters:
    """The same for a weight that is stored as integers."""
    semantics = match.gemm.semantics
    assert isinstance(semantics, Int8Gemm)
    own = {"factors": False, "low": semantics.low, "high": semantics.high, "least": semantics.least}
    kind = ShiftedInt8GemmParameters if semantics.shifted else StoredInt8GemmParameters
    return kind(**{**vars(parameters), **own})


def _has_quads(target: Target) -> bool:
    """Whether four products at a time are summed; the portable vectors do it in any width, so they take what is less
    memory traffic."""
    return bool(_VNNI & target.features) or Isa(target.arch) in (Isa.PORTABLE, Isa.NEON)


def _tiles(n: int, target: Target) -> list[tuple[int, int]]:
    """Register tiles (rows, vectors). Without dot products one more register holds the products of pairs."""
    pairs = Isa(target.arch) is Isa.AVX2 and not _has_quads(target)
    return register_tiles(n, target, _PAIR_TILES if pairs else None)
