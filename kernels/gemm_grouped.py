"""Products of groups of rows, each with a weight of its own, as of the experts of a mixture.

The template is that of :mod:`fuser.kernels.gemm`, and so is what may follow a product. Where groups end is known at run
time: threads share the panels of all blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import GroupedGemm
from fuser.ir.size import minimum
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec, Layout, Packed
from fuser.kernels.gemm import (
    GatedGemmParameters,
    GatedLayout,
    GemmExtents,
    GemmFamily,
    GemmMatch,
    PanelLayout,
    parameters,
    register_tiles,
)

_SHARE = 0.85
"""Of the peak: groups are of few rows, and end within register tiles."""


@dataclass(frozen=True)
class GroupedGemmFamily(GemmFamily):
    """As :class:`GemmFamily`, for groups of rows with constant weights of their own; no norm may follow."""

    name = "grouped_gemm"
    kind = GroupedGemm
    constants: ClassVar[slice] = slice(1, 2)
    dims = 3

    def match(self, group: OperatorGroup, target: Target) -> GemmMatch | None:
        found = super().match(group, target)
        if found is None or found.program.expression.has_reduction or found.k == 0:
            return None
        ends = group.graph.values[found.gemm.inputs[2]]
        return found if ends.dtype in (torch.int32, torch.int64) and ends.is_contiguous else None


@dataclass(frozen=True, kw_only=True)
class GroupedGemmParameters(GatedGemmParameters):
    """As :class:`GatedGemmParameters`, for so many ``groups``, whose ends are stored as ``ends``."""

    groups: int
    ends: DType

    @property
    def grouped(self) -> bool:
        return True


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """The weights of all groups, each as ``each`` lays it out."""

    each: GatedLayout

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (weights,) = tensors
        if not len(weights):
            return (weights,)
        (first,) = self.each.pack(weights[0])
        packed = first.new_empty(len(weights), *first.shape)
        packed[0] = first
        for i in range(1, len(weights)):
            packed[i] = self.each.pack(weights[i])[0]
        return (packed,)


class CpuGroupedGemm(Implementation[GemmMatch, GroupedGemmParameters]):
    """Our template on CPUs."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[GroupedGemmParameters]:
        """Register tiles of the instruction set, the one that wastes the fewest columns first."""
        values, program = match.group.graph.values, match.program
        weight, ends = (values[v] for v in match.gemm.inputs[1:])
        found = []
        for mr, vectors in register_tiles(match.n, target):
            plain = parameters(
                match.n,
                match.k,
                program.expression,
                program.operands,
                program.output_dtypes,
                target,
                a_dtype=STORAGE[values[match.a].dtype],
                w_dtype=STORAGE[weight.dtype],
                mr=mr,
                vectors=vectors,
                products=match.products,
            )
            fields = {**vars(plain), "parts": match.products}
            found.append(GroupedGemmParameters(**fields, groups=weight.shape[0], ends=STORAGE[ends.dtype]))
        return [*dict.fromkeys(found)]

    def cost(self, match: GemmMatch, parameters: GroupedGemmParameters, target: Target) -> Cost:
        """Roofline of the padded product, its epilogue, every tensor touched once, and of the weights those of as many
        groups as there can be."""
        program, values, p = match.program, match.group.graph.values, parameters
        padded = p.panels * p.nr * match.products
        busy = minimum([p.groups, program.rows])
        flops = program.rows * (2.0 * match.k * padded + 2.0 * match.n * program.expression.flops)
        share = program.rows / max(busy, 1) * (p.nr // target.vector_lanes) / 8
        moved = values[match.a].nbytes + busy * padded * match.k * p.w_dtype.bytes + program.bytes(match.group.graph)
        same = values[match.a].dtype if values[match.a].dtype == values[match.weight].dtype else None
        return Cost(flops, float(moved), 1, _SHARE * min(1.0, share), same)

    def call(self, match: GemmMatch, parameters: GroupedGemmParameters, target: Target, threads: int) -> KernelCall:
        program, p = match.program, parameters
        panels = PanelLayout(p.nr, match.transposed, p.w_dtype, p.pairs)
        packed = Packed((match.weight,), GroupedLayout(GatedLayout(panels, match.products)))
        return KernelCall(
            KernelSpec("grouped_gemm", "cpu/gemm.cpp.j2", p),
            (match.a, packed, match.gemm.inputs[2], *program.tensors),
            GemmExtents(program.rows, match.row_stride, program.operand_extents, program.output_strides),
            program.outputs,
            p.workspace_bytes(threads),
        )
