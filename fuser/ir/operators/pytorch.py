"""Operators that PyTorch runs: what no kernel computes, and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fuser.ir.operators.base import Semantics, Shape, TorchCall, kind, laid_out

_ELEMENTWISE = frozenset(
    {
        *(torch.add, torch.logical_and, torch.logical_not),
        *(torch.ops.aten.where.ScalarOther, torch.ops.aten.where.ScalarSelf, torch.ops.aten.where.Scalar),
        *(torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten._to_copy.default),
    }
)
"""Functions that PyTorch does not mark as what they are."""


@dataclass(frozen=True)
class _Called(Semantics):
    call: TorchCall

    fusible = False

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.call.target, "tags", ())

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.call(*inputs)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        """What is known to: elementwise functions, copies, and rows put together of parts of rows."""
        target = self.call.target
        if target is torch.ops.aten.cat.default:
            dim: int = dict(zip(("tensors", "dim"), self.call.args, strict=False)).get("dim", 0)
            return dim % len(output) == len(output) - 1
        return target is laid_out or self.is_elementwise

    @property
    def is_elementwise(self) -> bool:
        """Whether it is known to compute every element from those in the same place."""
        pointwise = torch.Tag.pointwise in getattr(self.call.target, "tags", ()) and not self.is_random
        return pointwise or self.call.target in _ELEMENTWISE

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        """Unknown, and so not counted."""
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""

    def __str__(self) -> str:
        return str(self.call)


@kind("extern")
@dataclass(frozen=True)
class Extern(_Called):
    """What PyTorch runs as it is, for a ``reason`` that the report gives."""

    reason: str


@kind("view")
@dataclass(frozen=True)
class View(_Called):
    """Another shape of the same storage, which costs nothing."""

    part_of_reader: ClassVar[bool] = False
    """Whether a report counts it to the kernel that reads through it."""
    part_of_writer: ClassVar[bool] = False
    """Whether a report counts it to the kernel that writes through it."""


@kind("split_heads")
@dataclass(frozen=True)
class SplitHeads(View):
    """(B, S, H·D) seen as (B, H, S, D)."""

    part_of_reader = True

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "split heads"


@kind("merge_heads")
@dataclass(frozen=True)
class MergeHeads(View):
    """(B, H, S, D) seen as (B, S, H·D)."""

    part_of_writer = True

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "merge heads"
