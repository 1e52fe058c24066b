"""The `depthwise` family: convolutions of every channel by itself where channels lie beside each other, as those of
tokens do, and everything elementwise or row-wise that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.ir.expression import Expression
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGroup
from fuser.ir.operators import Depthwise
from fuser.ir.target import Target
from fuser.kernels.base import (
    STORAGE,
    Access,
    Cost,
    DType,
    Implementation,
    KernelCall,
    KernelSpec,
    Layout,
    Operand,
    Packed,
    TensorRef,
    floating,
)
from fuser.kernels.compose import RowProgram, compose
from fuser.kernels.operands import OperandExtents

_MAX_OPERANDS = 16
_MAX_TAPS = 128
_MAX_COLUMNS = 4096
_PIXELS = 4
_BLOCK = 512  # sums of a few pixels that stay in the first cache


@dataclass(frozen=True)
class TapsLayout(Layout):
    """A weight (C, 1, kh, kw) as (kh · kw, C) in fp32."""

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (weight,) = tensors
        return (weight.flatten(1).mT.to(torch.float32).contiguous(),)


@dataclass(frozen=True)
class DepthwiseExtents(Extents):
    """Pixels of the result; lines and columns of x and of the result; elements between entries of the batch, lines and
    columns of x; the epilogue's operands, and elements between the pixels of every output."""

    rows: int
    grid: tuple[int, int]
    out: tuple[int, int]
    x: tuple[int, int, int]
    operands: tuple[OperandExtents, ...]
    output_strides: tuple[int, ...]


@dataclass(frozen=True)
class DepthwiseParameters:
    """``columns`` channels, lines and columns of ``kernel``, ``stride``, ``padding`` and ``dilation``. ``epilogue`` has
    the sums as input 0 and ``operands`` as the others. ``block`` channels of ``pixels`` pixels are summed at a time,
    before the epilogue sees them; on a GPU, one."""

    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    x: DType
    epilogue: Expression
    operands: tuple[Operand, ...]
    outputs: tuple[DType, ...]
    pixels: int = 1
    block: int = 1

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return DepthwiseExtents.declaration(operands=len(self.operands), output_strides=len(self.outputs))

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """Operands of the epilogue's inputs, the sums first."""
        return (Operand(Access.MATRIX, DType.F32), *self.operands)


@dataclass(frozen=True)
class DepthwiseMatch:
    """A convolution and the row program of what follows it."""

    group: OperatorGroup
    convolution: Operator[Depthwise]
    program: RowProgram

    def parameters(self, **chosen: Any) -> DepthwiseParameters:
        """The parameters with what an implementation has ``chosen``."""
        graph, how, program = self.group.graph, self.convolution.semantics, self.program
        x, weight = (graph.values[value] for value in self.convolution.inputs)
        _, _, lines, columns = weight.shape
        return DepthwiseParameters(
            columns=program.columns,
            kernel=(lines, columns),
            stride=how.stride,
            padding=how.padding,
            dilation=how.dilation,
            x=STORAGE[x.dtype],
            epilogue=program.expression,
            operands=program.operands,
            outputs=program.output_dtypes,
            **chosen,
        )

    def cost(self) -> Cost:
        """Every number touched once, since neighbouring lines stay in the caches."""
        graph, program = self.group.graph, self.program
        flops = graph.flops(self.convolution) + program.rows * program.columns * program.expression.flops
        moved = graph.values[self.convolution.inputs[0]].nbytes + program.bytes(graph)
        return Cost(float(flops), float(moved), efficiency=0.3)

    def call(self, template: str, parameters: DepthwiseParameters) -> KernelCall:
        """The launch of a template."""
        graph, program = self.group.graph, self.program
        value, weight = self.convolution.inputs
        x, out = graph.values[value], graph.values[self.convolution.output]
        (_, height, width, _), (batch_step, line_step, step, _) = x.shape, x.strides
        extents = DepthwiseExtents(
            program.rows,
            (height, width),
            (out.shape[1], out.shape[2]),
            (batch_step, line_step, step),
            program.operand_extents,
            program.output_strides,
        )
        tensors: tuple[TensorRef, ...] = (value, Packed((weight,), TapsLayout()), *program.tensors)
        return KernelCall(KernelSpec("depthwise", template, parameters), tensors, extents, program.outputs)


class DepthwiseFamily:
    """One depthwise convolution with a constant weight and contiguous channels, and the elementwise operators and norms
    that read its result."""

    name = "depthwise"

    def match(self, group: OperatorGroup, target: Target) -> DepthwiseMatch | None:
        """The group as a convolution and the row program of its epilogue; None when a part of it is something else."""
        graph, found = group.graph, group.of(Depthwise)
        others = [op for op in group.operators if op not in found]
        if len(found) != 1 or any(op.expression is None for op in others):
            return None
        (op,) = found
        value, constant = op.inputs
        if constant not in graph.constants or group.produces(value):
            return None
        x, weight, out = (graph.values[v] for v in (value, constant, op.output))
        stored = floating(target)
        if not {x.dtype, weight.dtype, out.dtype} <= stored or x.strides[-1] != 1:
            return None
        program = compose(group, others, seeds=(op.output,), storage=stored)
        if program is None or program.gathers or len(program.bounds) > _MAX_OPERANDS:
            return None
        return DepthwiseMatch(group, op, program)


def _is_unrolled(match: DepthwiseMatch) -> bool:
    """Whether kernels are made for so many taps and channels."""
    *_, lines, columns = match.group.graph.values[match.convolution.inputs[1]].shape
    return lines * columns <= _MAX_TAPS


class CpuDepthwise(Implementation[DepthwiseMatch, DepthwiseParameters]):
    """Vectors of channels, for a few pixels at once so that a tap's weights are read once for them."""

    def space(self, match: DepthwiseMatch, target: Target) -> Sequence[DepthwiseParameters]:
        """One choice, since the kernel is bound by memory."""
        program = match.program
        if not _is_unrolled(match) or program.columns > _MAX_COLUMNS:
            return []
        whole = program.expression.has_reduction or program.columns <= _BLOCK
        return [match.parameters(pixels=_PIXELS, block=program.columns if whole else _BLOCK)]

    def cost(self, match: DepthwiseMatch, parameters: DepthwiseParameters, target: Target) -> Cost:
        return match.cost()

    def call(self, match: DepthwiseMatch, parameters: DepthwiseParameters, target: Target, threads: int) -> KernelCall:
        return match.call("cpu/depthwise.cpp.j2", parameters)


class CudaDepthwise(Implementation[DepthwiseMatch, DepthwiseParameters]):
    """A thread for every element, where the epilogue is elementwise."""

    def space(self, match: DepthwiseMatch, target: Target) -> Sequence[DepthwiseParameters]:
        if not _is_unrolled(match) or match.program.expression.has_reduction:
            return []
        return [match.parameters()]

    def cost(self, match: DepthwiseMatch, parameters: DepthwiseParameters, target: Target) -> Cost:
        return match.cost()

    def call(self, match: DepthwiseMatch, parameters: DepthwiseParameters, target: Target, threads: int) -> KernelCall:
        return match.call("cuda/depthwise.cu.j2", parameters)
