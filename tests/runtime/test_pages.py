"""Memory in large pages."""

from __future__ import annotations

import errno
import gc
import mmap
import weakref

import pytest
import torch
from torch import Tensor

from fuser.runtime.pages import Shelf, pages


@pytest.mark.parametrize("size", [1, 4096, (2 << 20) - 1, (5 << 20) + 3])
def test_pages_begin_at_a_large_page(size: int) -> None:
    room = pages(size)
    assert room.dtype == torch.uint8 and len(room) == size and room.data_ptr() % (2 << 20) == 0
    assert not room.any()
    room.fill_(7)
    assert int(room.sum()) == 7 * size


def test_systems_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not pages(1 << 20).any()


def test_a_shelf_keeps_copies_apart() -> None:
    shelf = Shelf()
    given = [torch.randint(-100, 100, shape, dtype=torch.int8) for shape in ((300, 301), (70_001,), (4, 128, 256))]
    given += [torch.randn(129, 257), torch.randn(200, 300).bfloat16(), torch.randn(17 << 20)]
    moved = [shelf.moved(t) for t in given]
    for before, after in zip(given, moved, strict=True):
        assert after.data_ptr() != before.data_ptr() and after.data_ptr() % 64 == 0
        assert after.dtype == before.dtype and torch.equal(after, before)
    moved[0].zero_()
    assert all(torch.equal(before, after) for before, after in zip(given[1:], moved[1:], strict=True))


def test_what_is_small_strided_or_elsewhere_stays() -> None:
    shelf = Shelf()
    for tensor in (torch.ones(10), torch.ones(500, 400).t(), torch.ones(1 << 20, device="meta"), torch.empty(0)):
        assert shelf.moved(tensor) is tensor


def test_without_room_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Tensor:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("fuser.runtime.pages.pages", refuse)
    tensor = torch.ones(1 << 18)
    assert Shelf().moved(tensor) is tensor


def test_memory_goes_with_its_tensors() -> None:
    shelf = Shelf()
    kept = shelf.moved(torch.ones(1 << 18))
    storage = weakref.ref(kept.untyped_storage())
    assert storage() is not None
    del kept, shelf
    gc.collect()
    assert storage() is None
