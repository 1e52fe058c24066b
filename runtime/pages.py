"""Memory in large pages, since walks through page tables are what limits kernels that read much and compute little."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
_LEAST_BYTES = 64 << 10
_LINE_BYTES = 64


def pages(size: int) -> Tensor:
    """``size`` bytes (uint8) of this process alone, in pages of 2 MiB where the system has them (Linux with transparent
    huge pages). What nobody writes takes no memory. Raises OSError or OverflowError where there is no room."""
    memory = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Kernels may be built without.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    return room[-room.data_ptr() % _PAGE_BYTES :][:size]


class Shelf:
    """Large tensors one behind the other in such pages, which go when none of them is left."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor of the CPU here, if it is large and there is room, else the tensor."""
        if tensor.device.type != "cpu" or tensor.nbytes < _LEAST_BYTES or not tensor.is_contiguous():
            return tensor
        if len(self._free) < tensor.nbytes:
            try:
                self._free = pages(max(tensor.nbytes, _CHUNK_BYTES))
            except (OSError, OverflowError):
                return tensor
        copy = self._free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._free = self._free[-(-tensor.nbytes // _LINE_BYTES) * _LINE_BYTES :]
        return copy
