"""Products in int8 on GPUs, by the template of :mod:`fuser.kernels.gemm_cuda`.

:class:`CudaInt8Gemm` multiplies integers with ``mma.sync``: a kernel before it rounds the rows of A, sums are exact
also where blocks share them, and numbers are those of :class:`fuser.ir.operators.Int8Gemm`, as on CPUs.
:class:`CudaInt8WeightGemm` has only weights in int8, which are widened to A's type on their way to shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fuser.ir.quantization import MAX_TERMS, quantize_rows
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import (
    CudaGatedGemmParameters,
    CudaGemmExtents,
    cost_of,
    has_tensor_cores,
    match_seconds,
    match_tiles,
    product_dtype,
)

_ALIGNMENT = 16
"""Bytes to a multiple of which rows of integers start, so that they are copied in vectors."""


@dataclass(frozen=True)
class CudaInt8GemmParameters(CudaGatedGemmParameters):
    """As :class:`~fuser.kernels.gemm_cuda.CudaGemmParameters`, with ``parts`` products of integers, which an A of
    ``a_dtype`` is rounded to; with ``factors``, its elements are multiplied by those of a (K,) tensor before."""

    a_dtype: DType = DType.F32
    factors: bool = False

    @property
    def integer(self) -> bool:
        return True

    @property
    def depth_bytes(self) -> int:
        """Bytes of a row's integers in the workspace."""
        return _rounded(self.k)

    @property
    def row_bytes(self) -> int:
        """Bytes between the rows in the workspace: integers, then the scale."""
        return self.depth_bytes + _ALIGNMENT

    def workspace_bytes(self, rows: int) -> int:
        return rows * self.row_bytes + super().workspace_bytes(rows)


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
class Int8RowLayout(Layout):
    """A weight, and the factors of its K rows if it has some, as int8 (N, K) in rows that are padded with zeros, and
    the scale of each (N,)."""

    transposed: bool

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        weight, *factors = tensors
        integers, scales = quantize_rows(weight if self.transposed else weight.t(), *(1 / f for f in factors))
        return _padded(integers), scales[:, 0].contiguous()


@dataclass(frozen=True)
class Int8WeightRowLayout(Layout):
    """Integers and their scales as :class:`Int8RowLayout` has them."""

    transposed: bool

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        integers, scales = tensors
        return _padded(integers if self.transposed else integers.t()), scales.float().contiguous()


class CudaInt8Gemm(Implementation[GemmMatch, CudaInt8GemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaInt8GemmParameters]:
        """The tiles with the least predicted time."""
        if not 0 < match.k <= MAX_TERMS:
            return []
        a_dtype = STORAGE[match.group.graph.values[match.a].dtype]
        return [
            CudaInt8GemmParameters(
                match.n,
                match.k,
                DType.I8,
                True,
                match.program.expression,
                match.program.operands,
                match.program.output_dtypes,
                tile,
                match.products,
                a_dtype,
                len(match.gemm.inputs) > 2,
            )
            for tile in match_tiles(match, DType.I8, True, target)
        ]

    def cost(self, match: GemmMatch, parameters: CudaInt8GemmParameters, target: Target) -> Cost:
        """Whole tiles on whole SMs, every tensor touched once, the integers of A twice, and another launch for them."""
        seconds = match_seconds(match, parameters, target)
        seconds += 2.0 * match.program.rows * match.k / (target.l2_bandwidth * target.cores)
        return cost_of(match, seconds, 3 if parameters.separate else 2, target, DType.I8)

    def call(self, match: GemmMatch, parameters: CudaInt8GemmParameters, target: Target, threads: int) -> KernelCall:
        _, weight, *factors = match.gemm.inputs
        tensors = (weight, *factors), Int8RowLayout(match.transposed)
        return _call(match, parameters, tensors, factors, "int8_gemm")


class CudaInt8WeightGemm(Implementation[GemmMatch, CudaInt8WeightGemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaInt8WeightGemmParameters]:
        """The tiles with the least predicted time."""
        if match.k == 0:
            return []
        dtype = product_dtype(match)
        tensor_cores = has_tensor_cores(dtype, target)
        return [
            CudaInt8WeightGemmParameters(
                match.n,
                match.k,
                dtype,
                tensor_cores,
                match.program.expression,
                match.program.operands,
                match.program.output_dtypes,
                tile,
                match.products,
            )
            for tile in match_tiles(match, dtype, tensor_cores, target)
        ]

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
    factors: Sequence[str],
    family: str,
) -> KernelCall:
    program = match.program
    return KernelCall(
        KernelSpec(family, "cuda/gemm.cu.j2", parameters),
        (match.a, *(Packed(*weights, i) for i in range(2)), *factors, *program.tensors),
        CudaGemmExtents(
            program.rows, match.row_stride, _rounded(match.k), program.operand_extents, program.output_strides
        ),
        program.outputs,
        parameters.workspace_bytes(program.rows),
    )


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(integers: Tensor) -> Tensor:
    padded = integers.new_zeros(len(integers), _rounded(integers.shape[1]))
    padded[:, : integers.shape[1]] = integers
    return padded
