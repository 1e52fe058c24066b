"""Views as values against views of real tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.frontend.views import View
from fuser.ir.graph import TensorSpec


def elements(view: View, base: Tensor) -> Tensor:
    """What a view of ``base`` shows, element by element from its factors."""
    flat = [factor for factors in view.dims for factor in factors]
    sizes, strides = [size for size, _ in flat], [stride for _, stride in flat]
    return base.as_strided(sizes, strides, view.offset).reshape(view.shape)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def shapes(draw: Any, numel: int) -> tuple[int, ...]:
    """A shape with this many elements."""
    dims: list[int] = []
    while numel > 1 and len(dims) < 4:
        size = draw(st.sampled_from(divisors(numel)))
        dims.append(size)
        numel //= size
    if numel > 1:
        dims.append(numel)
    position = draw(st.integers(0, len(dims)))
    return (*dims[:position], *((1,) if draw(st.booleans()) else ()), *dims[position:])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_chains_of_views_show_what_pytorch_shows(data: st.DataObject) -> None:
    start = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4))
    base = torch.arange(math.prod(start)).view(start)
    storage = base.clone().view(-1)
    tensor, view = base, View.of("x", TensorSpec.contiguous(start, torch.float32))
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["reshape", "permute", "slice", "select", "diagonal", "expand"]))
        if kind == "reshape":
            shape = data.draw(shapes(tensor.numel()))
            found = view.reshape(shape)
            if found is None:
                # Factors can say more than strides, so where they cannot, PyTorch must copy too.
                if tensor.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
                    with pytest.raises(RuntimeError):
                        tensor.view(shape)
                continue
            tensor, view = tensor.reshape(shape), found
        elif kind == "permute":
            order = data.draw(st.permutations(range(tensor.dim())))
            tensor, view = tensor.permute(order), view.permute(order)
        elif kind in ("slice", "select") and tensor.dim():
            dim = data.draw(st.integers(0, tensor.dim() - 1))
            size = tensor.shape[dim]
            begin = data.draw(st.integers(0, size - 1))
            if kind == "select":
                chosen, result = view.select(dim, begin), tensor.select(dim, begin)
            else:
                step = data.draw(st.integers(1, 3))
                stop = data.draw(st.integers(begin + 1, size))
                result = tensor[(slice(None),) * dim + (slice(begin, stop, step),)]
                chosen = view.slice(dim, begin, result.shape[dim], step)
            if chosen is None:
                assert view.strides() is None
                continue
            tensor, view = result, chosen
        elif kind == "diagonal" and tensor.dim() > 1:
            dims = data.draw(st.permutations(range(tensor.dim())))[:2]
            offset = data.draw(st.integers(1 - tensor.shape[dims[0]], tensor.shape[dims[1]] - 1))
            chosen = view.diagonal(*dims, offset)
            if chosen is None:
                assert view.strides() is None
                continue
            tensor, view = tensor.diagonal(offset, *dims), chosen
        elif kind == "expand" and tensor.numel() <= 200:
            shape = tuple(3 if size == 1 and data.draw(st.booleans()) else size for size in tensor.shape)
            shape = (*((2,) if data.draw(st.booleans()) else ()), *shape)
            tensor, view = tensor.expand(shape), view.expand(shape)
        assert view.shape == tuple(tensor.shape)
        assert torch.equal(elements(view, storage), tensor)
        strides = view.strides()
        if strides is not None:
            assert torch.equal(storage.as_strided(view.shape, strides, view.offset), tensor)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=3, max_size=5), st.randoms())
def test_memory_order_walks_rows_by_falling_strides(shape: list[int], random: Any) -> None:
    order = list(range(len(shape) - 1))
    random.shuffle(order)
    view = View.of("x", TensorSpec.contiguous(shape, torch.float32)).permute([*order, len(shape) - 1])
    found = view.memory_order()
    assert sorted(found) == list(range(len(shape))) and found[-1] == len(shape) - 1
    strides = view.permute(found).strides()
    assert strides is not None
    rows = [s for s, size in zip(strides[:-1], view.permute(found).shape[:-1], strict=True) if size > 1]
    assert rows == sorted(rows, reverse=True)


def test_multihead_attentions_detour_ends_in_plain_strides() -> None:
    """(S, B, 3E) → (3, B·H, S, D) as ``nn.MultiheadAttention`` writes it, through layouts that no strides describe."""
    s, b, h, d = 5, 2, 3, 4
    tensor = torch.arange(s * b * 3 * h * d).view(s, b, 3 * h * d)
    view = View.of("x", TensorSpec.contiguous(tensor.shape, torch.float32))
    found = view.reshape((s, b, 3, h * d))
    assert found is not None
    key = found.permute((2, 0, 1, 3)).select(0, 1)
    assert key is not None
    heads = key.reshape((s, b * h, d))
    assert heads is not None
    merged = heads.permute((1, 0, 2))
    split = merged.reshape((b, h, s, d))
    assert split is not None and split.strides() is not None
    expected = tensor.view(s, b, 3, h * d)[:, :, 1].reshape(s, b * h, d).transpose(0, 1).reshape(b, h, s, d)
    assert torch.equal(elements(split, tensor.view(-1)), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 3, 2), (2, 2)])
def test_shapes_that_do_not_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    view = View.of("x", TensorSpec.contiguous((2, 3), torch.float32))
    with pytest.raises(ValueError, match="does not broadcast"):
        view.expand(shape)


def test_empty_views_are_not_reshaped() -> None:
    assert View.of("x", TensorSpec.contiguous((0, 3), torch.float32)).reshape((3, 0)) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_repeated_indices_are_known_and_can_be_left_out(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3))
    dim, count = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
    base = torch.arange(math.prod(shape)).view(shape)
    view = View.of("x", TensorSpec.contiguous(shape, torch.float32)).repeat(dim, count)
    assert torch.equal(elements(view, base), base.repeat_interleave(count, dim))
    assert view.repeats(dim) == count
    for part in divisors(count):
        fewer = view.without_repeats(dim, part)
        assert torch.equal(elements(fewer, base), base.repeat_interleave(count // part, dim))


def test_heads_that_are_expanded_and_merged_are_repeated() -> None:
    heads = View.of("x", TensorSpec.contiguous((2, 3, 5, 4), torch.float32))
    repeated = heads.reshape((2, 3, 1, 5, 4)).expand((2, 3, 2, 5, 4)).reshape((2, 6, 5, 4))  # type: ignore[union-attr]
    assert repeated is not None and repeated.strides() is None
    assert repeated.repeats(1) == 2 and repeated.repeats(2) == 1
    assert repeated.without_repeats(1, 2).strides() == heads.strides()
