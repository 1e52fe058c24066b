"""A mask for each entry of a batch, as for documents packed differently in every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fuser.ir.errors import MaskError
from fuser.ir.masks.base import Mask


@dataclass(frozen=True)
class PerBatch:
    """Batch entry ``b`` uses ``entries[b]``; made by ``per_batch``, or by ``from_mask_mod`` with ``batch``.

    ``fuser.sparse_attention`` takes it, with one plan for each entry. It is no :class:`Mask`, which all entries share,
    but combines with masks by applying to every entry, and with others of its size entry by entry.
    """

    entries: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise MaskError("a mask for each batch entry needs at least one")
        for mask in self.entries:
            if not isinstance(mask, Mask):
                raise MaskError(f"the mask of a batch entry is one of fuser.masks, got {mask!r}")

    def __len__(self) -> int:
        return len(self.entries)

    def dense(self, q_len: int, kv_len: int | None = None) -> torch.Tensor:
        """The masks of all entries: bool, (B, q_len, kv_len), or (B, heads, q_len, kv_len) where all have heads."""
        return torch.stack([mask.dense(q_len, kv_len) for mask in self.entries])

    def __and__(self, other: Mask | PerBatch) -> PerBatch:
        return self._with(other, lambda a, b: a & b)

    def __or__(self, other: Mask | PerBatch) -> PerBatch:
        return self._with(other, lambda a, b: a | b)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> PerBatch:
        return PerBatch(tuple(~mask for mask in self.entries))

    def _with(self, other: Mask | PerBatch, combine: Callable[[Mask, Mask], Mask]) -> PerBatch:
        if isinstance(other, Mask):
            return PerBatch(tuple(combine(mask, other) for mask in self.entries))
        if not isinstance(other, PerBatch):
            return NotImplemented
        if len(other) != len(self):
            raise MaskError(f"cannot combine masks for {len(self)} and {len(other)} batch entries")
        return PerBatch(tuple(map(combine, self.entries, other.entries)))


def per_batch(masks: Sequence[Mask]) -> PerBatch:
    """One mask for each entry of a batch, in order. MaskError if there is none or one is no mask."""
    return PerBatch(tuple(masks))
