"""Operands of row expressions: the rows and columns that kernels read are the elements that PyTorch broadcasts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.ir.graph import TensorSpec
from fuser.kernels.base import Access, DType
from fuser.kernels.operands import bind, row_stride, rows_and_columns

F32 = torch.float32


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[TensorSpec, tuple[int, ...]]:
    """A tensor with gaps, in any order of its dimensions, and a shape that it broadcasts to."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    own = tuple(1 if draw(st.booleans()) else size for size in shape[draw(st.integers(0, len(shape))) :])
    order = draw(st.permutations(range(len(own)))) if draw(st.booleans()) else list(range(len(own)))
    strides, step = [0] * len(own), 1
    for d in reversed(order):
        strides[d] = 0 if draw(st.integers(0, 9)) == 0 else step
        step *= own[d] + (draw(st.integers(0, 4)) == 0)
    return TensorSpec(own, F32, tuple(strides)), shape


def positions(spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
    """(rows, columns) of where each element lies."""
    memory = torch.arange(max(spec.extent, 1))
    return memory.as_strided(spec.shape, spec.strides).broadcast_to(shape).reshape(rows_and_columns(shape))


@settings(max_examples=400, deadline=None)
@given(broadcasts())
def test_a_bound_operand_reads_what_pytorch_broadcasts(case: tuple[TensorSpec, tuple[int, ...]]) -> None:
    spec, shape = case
    bound = bind("x", spec, shape)
    if bound is None:
        return
    rows, columns = rows_and_columns(shape)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    assert bound.operand.periodic or bound.period >= rows or bound.stride == 0
    read = row % bound.period * bound.stride + (column if bound.operand.access is Access.MATRIX else 0 * column)
    assert torch.equal(read, positions(spec, shape))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
def test_contiguous_tensors_and_rows_for_all_are_never_refused(shape: tuple[int, ...]) -> None:
    assert bind("x", TensorSpec.contiguous(shape, F32), shape) is not None
    assert bind("x", TensorSpec.contiguous(shape[-1:], F32), shape) is not None
    assert bind("x", TensorSpec.contiguous(shape[1:], F32), shape) is not None


@pytest.mark.parametrize(
    ("spec", "access", "stride", "period", "periodic"),
    [
        (TensorSpec.contiguous((2, 3, 8), F32), Access.MATRIX, 8, 6, False),
        (TensorSpec((2, 3, 8), F32, (48, 16, 1)), Access.MATRIX, 16, 6, False),
        (TensorSpec.contiguous((8,), F32), Access.MATRIX, 0, 6, False),
        (TensorSpec.contiguous((3, 8), F32), Access.MATRIX, 8, 3, True),
        (TensorSpec.contiguous((2, 3, 1), F32), Access.COLUMN, 1, 6, False),
        (TensorSpec.contiguous((3, 1), F32), Access.COLUMN, 1, 3, True),
        (TensorSpec.contiguous((), F32), Access.COLUMN, 0, 6, False),
    ],
)
def test_how_operands_of_a_cube_are_read(
    spec: TensorSpec, access: Access, stride: int, period: int, periodic: bool
) -> None:
    bound = bind("x", spec, (2, 3, 8))
    assert bound is not None
    assert (bound.operand.access, bound.stride, bound.period) == (access, stride, period)
    assert (bound.operand.periodic, bound.operand.dtype) == (periodic, DType.F32)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec((2, 3, 8), F32, (24, 1, 3)),
        TensorSpec.contiguous((2, 1, 8), F32),
        TensorSpec((2, 3, 8), F32, (8, 16, 1)),
        TensorSpec.contiguous((1, 2, 3, 8), F32),
        TensorSpec.contiguous((4,), F32),
        TensorSpec.contiguous((2, 3, 8), torch.complex64),
    ],
    ids=["columns apart", "repeated rows", "rows out of order", "more dimensions", "other columns", "other dtype"],
)
def test_what_no_stride_and_period_describe_is_refused(spec: TensorSpec) -> None:
    assert bind("x", spec, (2, 3, 8)) is None


def test_row_stride_is_that_of_whole_rows() -> None:
    assert row_stride(TensorSpec((2, 3, 8), F32, (60, 20, 1))) == 20
    assert row_stride(TensorSpec((2, 3, 8), F32, (80, 20, 1))) is None
    assert row_stride(TensorSpec((2, 3, 8), F32, (0, 8, 1))) is None
    assert rows_and_columns((2, 3, 8)) == (6, 8) and rows_and_columns(()) == (1, 1)
    assert math.prod(rows_and_columns((5,))) == 5
