"""Nested tensors with ``layout=torch.jagged``: documents one behind the other, and where they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def offsets_of(name: str, tensor: Any) -> Tensor:
    """Where the entries of a nested tensor (B, *, …) begin in its ``values()``, (B + 1,). Raises ValueError for one of
    another layout, with another ragged dimension, or with gaps between entries."""
    if tensor.layout is not torch.jagged:
        raise ValueError(f"{name} is a nested tensor of the layout {tensor.layout}: make it with layout=torch.jagged")
    if getattr(tensor, "_ragged_idx", 1) != 1:
        raise ValueError(f"{name} must be (batch, lengths, …), with lengths in the second dimension")
    if getattr(tensor, "_lengths", None) is not None:
        raise ValueError(f"{name} has gaps between its entries: call contiguous() on it")
    offsets: Tensor = tensor.offsets()
    return offsets
