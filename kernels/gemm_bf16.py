"""Products of fp32 tensors in bf16, where the target multiplies that faster: both factors are rounded as they are
packed or copied, sums and epilogues are those of :mod:`fuser.kernels.gemm` and :mod:`fuser.kernels.gemm_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuser.ir.operators import Bf16Gemm
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, Packed
from fuser.kernels.gemm import (
    CpuGemm,
    GemmFamily,
    GemmMatch,
    GemmParameters,
    multiplies_bf16,
    product_cost,
    share_of,
)
from fuser.kernels.gemm_cuda import (
    CudaGatedGemmParameters,
    CudaGemmExtents,
    RowLayout,
    cost_of,
    gated_fields,
    match_seconds,
    match_tiles,
)


@dataclass(frozen=True)
class Bf16GemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for products in bf16."""

    name = "bf16_gemm"
    kind = Bf16Gemm


class CpuBf16Gemm(CpuGemm):
    """Our template on CPUs that multiply pairs of bf16 numbers."""

    family = "bf16_gemm"

    def space(self, match: GemmMatch, target: Target) -> Sequence[GemmParameters]:
        return self.choices(match, target, DType.BF16, pairs=True) if multiplies_bf16(target) else []

    def cost(self, match: GemmMatch, parameters: GemmParameters, target: Target) -> Cost:
        """As products of bf16 tensors; activations are read in the type that they have."""
        nr, share = parameters.nr, share_of(parameters, target, "amx_bf16", 0.9)
        return product_cost(match, target, nr=nr, share=share, passes=1, launches=1, multiplied=torch.bfloat16)


@dataclass(frozen=True)
class CudaBf16GemmParameters(CudaGatedGemmParameters):
    """As :class:`~fuser.kernels.gemm_cuda.CudaGemmParameters`, with ``parts`` products in bf16 of an A that is stored
    as ``a_dtype``."""

    a_dtype: DType = DType.F32

    @property
    def a_loaded(self) -> DType:
        return self.a_dtype


class CudaBf16Gemm(Implementation[GemmMatch, CudaBf16GemmParameters]):
    """Our template on GPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CudaBf16GemmParameters]:
        """The tiles with the least predicted time."""
        a_dtype = STORAGE[match.group.graph.values[match.a].dtype]
        tiles = match_tiles(match, DType.BF16, True, target)
        return [
            CudaBf16GemmParameters(**gated_fields(match, DType.BF16, True, tile), a_dtype=a_dtype) for tile in tiles
        ]

    def cost(self, match: GemmMatch, parameters: CudaBf16GemmParameters, target: Target) -> Cost:
        """As products of bf16 tensors; activations are read in the type that they have."""
        seconds = match_seconds(match, parameters, target)
        return cost_of(match, seconds, 2 if parameters.separate else 1, target, DType.BF16)

    def call(self, match: GemmMatch, parameters: CudaBf16GemmParameters, target: Target, threads: int) -> KernelCall:
        program = match.program
        weight = Packed((match.weight,), RowLayout(match.transposed, DType.BF16))
        return KernelCall(
            KernelSpec("bf16_gemm", "cuda/gemm.cu.j2", parameters),
            (match.a, weight, *program.tensors),
            CudaGemmExtents(program.rows, match.row_stride, match.k, program.operand_extents, program.output_strides),
            program.outputs,
            parameters.workspace_bytes(program.rows),
        )
