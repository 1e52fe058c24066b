"""Products in eight bits on GPUs, by the template of :mod:`fuser.kernels.gemm_cuda`.

:class:`CudaQuantizedGemm` multiplies codes with ``mma.sync``, which a kernel before it rounds the rows of A to, and
:class:`CudaCodeGemm` those that the kernel that makes A has rounded. Sums of
int8 are exact also where blocks share them, and numbers are those of :class:`fuser.ir.operators.QuantizedGemm`, as on
CPUs; those of e4m3 are of fp32. Tensor cores keep only 13 bits of mantissa of these (SageAttention2, arXiv:2411.10958),
so that every instruction starts from zero, and additions of fp32 join what they give.
:class:`CudaInt8WeightGemm` has only weights in int8, which are widened to A's type on their way to shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.quantization import MAX_TERMS, MOST, quantize_rows
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import (
    CudaGatedGemmParameters,
    CudaGemmExtents,
    cost_of,
    gated_fields,
    has_tensor_cores,
    match_seconds,
    match_tiles,
    product_dtype,
)
from fuser.kernels.gemm_int8 import codes_of

_ALIGNMENT = 16
"""Bytes to a multiple of which rows of codes start, so that they are copied in vectors."""


@dataclass(frozen=True)
class CudaQuantizedGemmParameters(CudaGatedGemmParameters):
    """As :class:`~fuser.kernels.gemm_cuda.CudaGemmParameters`, with ``parts`` products of codes, which an A of
    ``a_dtype`` is rounded to; with ``factors``, its elements are multiplied by those of a (K,) tensor before."""

    a_dtype: DType = DType.F32
    factors: bool = False

    @property
    def rounded(self) -> bool:
        return True

    @property
    def rounds(self) -> bool:
        return True

    @property
    def most(self) -> str:
        """The largest magnitude of a code, in C."""
        return f"{MOST[self.dtype.torch]}f"

    @property
    def depth_bytes(self) -> int:
        """Bytes of a row's codes in the workspace."""
        return _rounded(self.k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes and, behind those of all rows, of its scale in the workspace."""
        return self.depth_bytes + _ALIGNMENT

    def workspace_bytes(self, rows: int) -> int:
        return rows * self.row_bytes + super().workspace_bytes(rows)


@dataclass(frozen=True)
class CudaCodeGemmParameters(CudaGatedGemmParameters):
    """As :class:`~fuser.kernels.gemm_cuda.CudaGemmParameters`, with ``parts`` products of codes that A consists of."""

    @property
    def rounded(self) -> bool:
        return True


@dataclass(frozen=True)
class CudaInt8WeightGemmParameters(CudaGatedGemmParameters):
    """As :class:`~fuser.kernels.gemm_cuda.CudaGemmParameters`, with ``parts`` weights in int8 and sums that are
    scaled."""

    @property
    def w_dtype(self) -> DType:
        return DType.I8

    @property
    def scaled(self) -> bool:
        return True


@dataclass(frozen=True)
class QuantizedRowLayout(Layout):
    """A weight, and the factors of its K rows if it has some, as ``codes`` (N, K) in rows that are padded with zeros,
    and the scale of each (N,)."""

    transposed: bool
    codes: torch.dtype = torch.int8

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        weight, *factors = tensors
        rows = weight if self.transposed else weight.t()
        codes, scales = quantize_rows(rows, *(1 / f for f in factors), codes=self.codes)
        return _padded(codes), scales[:, 0].contiguous()


@dataclass(frozen=True)
class Int8WeightRowLayout(Layout):
    """Integers and their scales as :class:`QuantizedRowLayout` has them."""

    transposed: bool

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        integers, scales = tensors
        return _padded(integers if self.transposed else integers.t()), scales.float().contiguous()


class CudaQuantizedGemm(Implementation[GemmMatch, CudaQuantizedGemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaQuantizedGemmParameters]:
        """The tiles with the least predicted time."""
        codes = STORAGE[codes_of(match)]
        if not _fits(match, codes, target):
            return []
        a_dtype = STORAGE[match.group.graph.values[match.a].dtype]
        factors = len(match.gemm.inputs) > 2
        return [
            CudaQuantizedGemmParameters(**gated_fields(match, codes, True, tile), a_dtype=a_dtype, factors=factors)
            for tile in match_tiles(match, codes, True, target)
        ]

    def cost(self, match: GemmMatch, parameters: CudaQuantizedGemmParameters, target: Target) -> Cost:
        """Whole tiles on whole SMs, every tensor touched once, the codes of A twice, and another launch for them."""
        seconds = match_seconds(match, parameters, target)
        seconds += 2.0 * match.program.rows * match.k / (target.l2_bandwidth * target.cores)
        return cost_of(match, seconds, 3 if parameters.separate else 2, target, parameters.dtype)

    def call(
        self, match: GemmMatch, parameters: CudaQuantizedGemmParameters, target: Target, threads: int
    ) -> KernelCall:
        _, weight, *factors = match.gemm.inputs
        tensors = (weight, *factors), QuantizedRowLayout(match.transposed, parameters.dtype.torch)
        return _call(match, parameters, tensors, factors, "quantized_gemm")


class CudaCodeGemm(Implementation[GemmMatch, CudaCodeGemmParameters]):
    """The same on codes that come with their scales."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaCodeGemmParameters]:
        """The tiles with the least predicted time."""
        codes = STORAGE[codes_of(match)]
        if not _fits(match, codes, target):
            return []
        tiles = match_tiles(match, codes, True, target)
        return [CudaCodeGemmParameters(**gated_fields(match, codes, True, tile)) for tile in tiles]

    def cost(self, match: GemmMatch, parameters: CudaCodeGemmParameters, target: Target) -> Cost:
        """Whole tiles on whole SMs, every tensor touched once."""
        seconds = match_seconds(match, parameters, target)
        return cost_of(match, seconds, 2 if parameters.separate else 1, target, parameters.dtype)

    def call(self, match: GemmMatch, parameters: CudaCodeGemmParameters, target: Target, threads: int) -> KernelCall:
        _, *weights, scales = match.gemm.inputs
        tensors = tuple(weights), QuantizedRowLayout(match.transposed, parameters.dtype.torch)
        return _call(match, parameters, tensors, (scales,), "code_gemm")


class CudaInt8WeightGemm(Implementation[GemmMatch, CudaInt8WeightGemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaInt8WeightGemmParameters]:
        """The tiles with the least predicted time."""
        if match.k == 0:
            return []
        dtype = product_dtype(match)
        tensor_cores = has_tensor_cores(dtype, target)
        tiles = match_tiles(match, dtype, tensor_cores, target)
        return [CudaInt8WeightGemmParameters(**gated_fields(match, dtype, tensor_cores, tile)) for tile in tiles]

    def cost(self, match: GemmMatch, parameters: CudaInt8WeightGemmParameters, target: Target) -> Cost:
        """As products of A's type, with weights of one byte in memory."""
        seconds = match_seconds(match, parameters, target)
        return cost_of(match, seconds, 2 if parameters.separate else 1, target, DType.I8)

    def call(
        self, match: GemmMatch, parameters: CudaInt8WeightGemmParameters, target: Target, threads: int
    ) -> KernelCall:
        tensors = match.gemm.inputs[1:], Int8WeightRowLayout(match.transposed)
        return _call(match, parameters, tensors, (), "int8_weight_gemm")


def _call(
    match: GemmMatch,
    parameters: CudaGatedGemmParameters,
    weights: tuple[tuple[str, ...], Layout],
    more: Sequence[str],
    family: str,
) -> KernelCall:
    program = match.program
    return KernelCall(
        KernelSpec(family, "cuda/gemm.cu.j2", parameters),
        (match.a, *(Packed(*weights, i) for i in range(2)), *more, *program.tensors),
        CudaGemmExtents(
            program.rows, match.row_stride, _rounded(match.k), program.operand_extents, program.output_strides
        ),
        program.outputs,
        parameters.workspace_bytes(program.rows),
    )


def _fits(match: GemmMatch, codes: DType, target: Target) -> bool:
    """Whether ``target`` multiplies such codes, and as many as meet in a sum."""
    return match.k > 0 and (match.k <= MAX_TERMS if codes is DType.I8 else target.fp8)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(codes: Tensor) -> Tensor:
    padded = codes.new_zeros(len(codes), _rounded(codes.shape[1]))
    padded[:, : codes.shape[1]] = codes
    return padded
