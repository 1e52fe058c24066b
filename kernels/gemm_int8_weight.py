"""Products with weights in int8 and the rest in floating point: for few rows, where reading weights is the work.

The template is that of :mod:`fuser.kernels.gemm`; a step widens the numbers of a row of W to fp32, and finished sums
are multiplied with the scales of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.operators import Int8WeightGemm
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.gemm import (
    GatedGemmParameters,
    GemmExtents,
    GemmFamily,
    GemmMatch,
    int8_fields,
    pack,
    register_tiles,
)

_DEPTH = 256
_SHARE = 0.85
"""Of the peak of fp32: widening takes a port that multiply-adds leave free."""


@dataclass(frozen=True)
class Int8WeightGemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for weights in int8 with scales."""

    name = "int8_weight_gemm"
    kind = Int8WeightGemm
    weights = frozenset({torch.int8})


@dataclass(frozen=True)
class Int8WeightGemmParameters(GatedGemmParameters):
    """As :class:`GatedGemmParameters`, with sums that are scaled."""

    @property
    def scaled(self) -> bool:
        return True


@dataclass(frozen=True)
class Int8WeightLayout(Layout):
    """Integers and scales by panels: (panels, parts, K, nr) int8 and (panels, parts, nr) float32."""

    nr: int
    transposed: bool
    parts: int = 1

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        integers, scales = tensors
        weights = integers.chunk(self.parts, 0 if self.transposed else 1)
        columns = scales.chunk(self.parts)
        return (
            torch.stack([pack(part, self.nr, self.transposed) for part in weights], 1),
            torch.stack([pack(part[:, None], self.nr).flatten(1) for part in columns], 1),
        )


class CpuInt8WeightGemm(Implementation[GemmMatch, Int8WeightGemmParameters]):
    """Our template on CPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[Int8WeightGemmParameters]:
        """Register tiles of the instruction set, the one that wastes the fewest columns first."""
        if match.k == 0:
            return []
        fields = (int8_fields(match, target, tile, _DEPTH, 1) for tile in register_tiles(match.n, target))
        return [*dict.fromkeys(Int8WeightGemmParameters(**found) for found in fields)]

    def cost(self, match: GemmMatch, parameters: Int8WeightGemmParameters, target: Target) -> Cost:
        """Roofline of the padded product in fp32 with weights of one byte, its epilogue, and every tensor touched
        once."""
        program, values = match.program, match.group.graph.values
        padded = parameters.panels * parameters.nr * match.products
        flops = program.rows * (2.0 * match.k * padded + 2.0 * match.n * program.expression.flops)
        efficiency = _SHARE * min(1.0, max(program.rows, 1) * (parameters.nr // target.vector_lanes) / 8)
        moved = values[match.a].nbytes + padded * match.k + program.bytes(match.group.graph)
        return Cost(flops, float(moved), 1, efficiency)

    def call(self, match: GemmMatch, parameters: Int8WeightGemmParameters, target: Target, threads: int) -> KernelCall:
        program, weights = match.program, match.gemm.inputs[1:]
        layout = Int8WeightLayout(parameters.nr, match.transposed, match.products)
        return KernelCall(
            KernelSpec("int8_weight_gemm", "cpu/gemm.cpp.j2", parameters),
            (match.a, *(Packed(weights, layout, i) for i in range(2)), *program.tensors),
            GemmExtents(program.rows, match.row_stride, program.operand_extents, program.output_strides),
            program.outputs,
            parameters.workspace_bytes(threads),
        )
