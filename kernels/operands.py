"""Seeing tensors as matrices: which operands a row expression can read, and with which run-time extents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.extents import Extents
from fuser.ir.graph import TensorSpec
from fuser.kernels.base import STORAGE, Access, Operand


@dataclass(frozen=True)
class OperandExtents(Extents):
    """Of one operand: elements between its rows, and rows after which it repeats (of a gather: rows of the table). Of
    one whose rows lie in groups, these are of the groups; ``group`` rows are one, ``step`` elements apart."""

    stride: int
    period: int
    group: int = 1
    step: int = 0


@dataclass(frozen=True)
class Bound:
    """An operand with its run-time extents (:class:`OperandExtents`)."""

    operand: Operand
    value: str
    stride: int
    period: int
    group: int = 1
    step: int = 0

    @property
    def extents(self) -> OperandExtents:
        return OperandExtents(self.stride, self.period, self.group, self.step)

    def distinct(self, rows: int) -> int:
        """Rows in memory that ``rows`` rows of the matrix are read from."""
        groups = min(rows // self.group, self.period) if self.stride else 1
        return groups * (self.group if self.step else 1)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: the last dimension is the column, all others together the row."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def row_stride(spec: TensorSpec, narrow: bool = False) -> int | None:
    """Distance between the rows of ``spec`` seen as a matrix, or None when rows are not evenly spaced with unit
    stride along columns; ``narrow`` says that they are one number each."""
    bound = bind("", spec, spec.shape)
    wanted = Access.COLUMN if narrow else Access.MATRIX
    if bound is None or bound.operand.access is not wanted or bound.operand.periodic:
        return None
    return bound.stride


def bind(value: str, spec: TensorSpec, shape: tuple[int, ...]) -> Bound | None:
    """How a row expression of output ``shape`` reads ``value``, broadcast as PyTorch does; None when it cannot.

    Rows may be evenly spaced, repeat with a period, or be one row for all; columns are contiguous or one number a row.
    """
    dtype = STORAGE.get(spec.dtype)
    if dtype is None or len(spec.shape) > len(shape):
        return None
    pad = len(shape) - len(spec.shape)
    sizes = (1,) * pad + spec.shape
    strides = [0 if size == 1 else stride for size, stride in zip(sizes, (0,) * pad + spec.strides, strict=True)]
    if any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        return None
    if not shape:
        return Bound(Operand(Access.COLUMN, dtype), value, 0, 1)
    rows, columns = rows_and_columns(shape)
    if columns == 1 or strides[-1] == 0:
        access = Access.COLUMN
    elif strides[-1] == 1:
        access = Access.MATRIX
    else:
        return None
    # Outermost dimensions that broadcast give the period; the rest must be evenly spaced.
    inner = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    while inner and inner[0][1] == 0:
        inner.pop(0)
    if not inner:
        return Bound(Operand(access, dtype), value, 0, max(rows, 1))
    step = inner[-1][1]
    expected = step
    for size, stride in reversed(inner):
        if stride != expected:
            return None
        expected = stride * size
    period = math.prod(size for size, _ in inner)
    return Bound(Operand(access, dtype, periodic=period != rows), value, step, max(period, 1))


def bind_groups(value: str, spec: TensorSpec, shape: tuple[int, ...]) -> Bound | None:
    """As :func:`bind`, for rows that are evenly spaced in groups, and groups that are evenly spaced among each
    other."""
    if len(spec.shape) > len(shape) or not shape:
        return None
    pad = len(shape) - len(spec.shape)
    sizes = (1,) * pad + spec.shape
    strides = (0,) * pad + spec.strides
    for first in range(len(shape) - 2, 0, -1):
        size = math.prod(shape[first:-1])
        group = bind(value, dataclasses.replace(spec, shape=sizes[first:], strides=strides[first:]), shape[first:])
        if group is None or group.operand.periodic:
            continue
        outer = dataclasses.replace(spec, shape=(*sizes[:first], sizes[-1]), strides=(*strides[:first], strides[-1]))
        found = bind(value, outer, (*shape[:first], shape[-1]))
        if found is not None:
            operand = dataclasses.replace(found.operand, grouped=True)
            return dataclasses.replace(found, operand=operand, group=max(size, 1), step=group.stride)
    return None
