"""Masks of whole blocks: tables of blocks, chosen blocks of each row, and FlexAttention's ``BlockMask``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fuser.ir.errors import MaskError
from fuser.ir.masks.base import Mask
from fuser.ir.masks.batch import PerBatch
from fuser.ir.masks.columns import Bools, Columns, Ints, digest, indptr_of, integer
from fuser.ir.masks.opaque import from_mask_mod

_FLEX = "torch.nn.attention.flex_attention"


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """Blocks of ``block`` = (queries, keys) pairs as ``table`` says, ([heads,] blocks of queries, blocks of keys); the
    last of each may be cut. Made by ``from_blocks`` and its kin. Equal to any other with the same blocks."""

    table: Bools
    block: tuple[int, int]

    def __post_init__(self) -> None:
        self.table.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Blocks, (np.array(self.table), self.block)

    def __repr__(self) -> str:
        return f"Blocks({self.table.shape}, {self.block}, sha256={self._digest})"

    @property
    def heads(self) -> int | None:
        return self.table.shape[0] if self.table.ndim == 3 else None

    @property
    def name(self) -> str:
        rows, columns = self.table.shape[-2:]
        return f"{rows}x{columns} blocks of {self.block[0]}x{self.block[1]} ({self._digest[:8]})"

    @cached_property
    def _digest(self) -> str:
        return digest([list(self.table.shape), list(self.block), np.packbits(self.table).tobytes().hex()])

    def _allowed(self, i: Ints, j: Ints, n: int, m: int) -> Bools:
        return self.table[..., i // self.block[0], j // self.block[1]]

    def _block(self, i: Ints, n: int, m: int) -> Bools:
        # Blocks may be far larger than the mask: FlexAttention makes one of all pairs of 2³⁰ by 2³⁰.
        return self.table[..., (i // self.block[0])[:, None], np.arange(m) // self.block[1]]

    def _columns(self, i: Ints, n: int, m: int) -> Columns:
        width = self.block[1]
        rows, found = np.nonzero(self.table[i // self.block[0]])
        lengths = np.minimum(width, m - found * width)
        # Neighbouring indices differ by one within a block.
        steps = np.ones(int(lengths.sum()), np.int64)
        first = np.cumsum(lengths) - lengths
        steps[first] = found * width - np.concatenate([[0], (found * width + lengths - 1)[:-1]])
        return Columns(indptr_of(np.bincount(rows, lengths, len(i)).astype(np.int64)), np.cumsum(steps))

    def _check(self, n: int, m: int) -> None:
        fits = tuple(-(-length // size) for length, size in zip((n, m), self.block, strict=True))
        if fits != self.table.shape[-2:]:
            raise MaskError(
                f"the mask has {self.table.shape[-2]} x {self.table.shape[-1]} blocks of {self.block[0]} x "
                f"{self.block[1]}, and q_len = {n}, kv_len = {m} are {fits[0]} x {fits[1]} of these"
            )

    def _head(self, index: int) -> Mask:
        return Blocks(self.table[index], self.block)

    def _key(self) -> Any:
        return ["blocks", self._digest]


def from_blocks(blocks: torch.Tensor, block: int | tuple[int, int]) -> Blocks:
    """A mask from a table of blocks of ``block`` = (queries, keys) pairs, or squares of that many.

    ``blocks`` is bool, (blocks of queries, blocks of keys) or with heads in front, True = allowed; or a CSR tensor
    (``torch.sparse_csr``) of such a shape, whose entries other than zero are allowed. It is copied. Raises MaskError
    for other shapes, dtypes and sizes.
    """
    if not isinstance(blocks, torch.Tensor):
        raise MaskError(f"from_blocks takes a torch.Tensor, got {type(blocks).__name__}")
    if blocks.layout == torch.sparse_csr:
        blocks = blocks.detach().cpu().to_dense() != 0
    if blocks.layout != torch.strided or blocks.dtype != torch.bool or blocks.is_meta:
        raise MaskError(f"from_blocks takes bool or CSR tables with data, got {blocks.dtype} ({blocks.layout})")
    return _blocks(np.array(blocks.detach().cpu().numpy()), block)


def from_block_indices(indices: torch.Tensor, block: int | tuple[int, int], kv_len: int) -> Blocks:
    """A mask from the blocks of keys that each block of queries may see, such as the best few that a router chose.

    ``indices`` are integers ([heads,] blocks of queries, chosen), in any order; negative ones choose nothing. Raises
    MaskError for other dtypes and shapes, and for blocks behind the last key.
    """
    if not isinstance(indices, torch.Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise MaskError("from_block_indices takes a tensor of integers")
    if indices.ndim not in (2, 3) or indices.is_meta:
        raise MaskError(f"from_block_indices takes ([heads,] blocks, chosen) with data, got {tuple(indices.shape)}")
    count = -(-integer("kv_len", kv_len, 0) // _sizes(block)[1])
    chosen = indices.detach().cpu().numpy()
    if chosen.size and chosen.max() >= count:
        raise MaskError(f"block {chosen.max()} of {count} blocks of keys")
    table = np.zeros((*chosen.shape[:-1], count + 1), np.bool_)
    # What chooses nothing goes to a column that is cut off.
    np.put_along_axis(table, np.where(chosen < 0, count, chosen), True, -1)
    return _blocks(table[..., :count], block)


def from_block_mask(mask: Any) -> Mask | PerBatch:
    """The mask that a ``BlockMask`` of FlexAttention stands for: its full blocks, and its partial ones under its
    ``mask_mod``. One made for a batch gives a :class:`~fuser.masks.PerBatch`.

    Raises MaskError for anything else.
    """
    if not is_block_mask(mask):
        raise MaskError(f"from_block_mask takes a BlockMask of torch, got {type(mask).__name__}")
    batch, heads, rows = mask.kv_num_blocks.shape
    columns = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])

    def tables(counts: torch.Tensor | None, indices: torch.Tensor | None) -> Bools:
        table = np.zeros((batch, heads, rows, columns + 1), np.bool_)
        if counts is not None and indices is not None:
            listed = indices.detach().cpu().numpy().astype(np.int64)
            used = np.arange(listed.shape[-1]) < counts.detach().cpu().numpy()[..., None]
            np.put_along_axis(table, np.where(used, listed, columns), True, -1)
        return table[..., :columns] if heads > 1 else table[:, 0, :, :columns]

    partial = tables(mask.kv_num_blocks, mask.kv_indices)
    full = tables(mask.full_kv_num_blocks, mask.full_kv_indices)
    device = mask.kv_indices.device
    function = from_mask_mod(mask.mask_mod, heads if heads > 1 else None, batch=batch, device=device)
    whole = mask.mask_mod is sys.modules[_FLEX].noop_mask
    entries = []
    for b in range(batch):
        blocks = [Blocks(table[b], tuple(mask.BLOCK_SIZE)) for table in (partial, full)]
        cut = blocks[0] if whole or not partial[b].any() else blocks[0] & function.entries[b]
        entries.append(cut if not full[b].any() else cut | blocks[1])
    return entries[0] if batch == 1 else PerBatch(tuple(entries))


def is_block_mask(value: Any) -> bool:
    """Whether a value is a ``BlockMask`` of FlexAttention, which is not imported to find out."""
    flex = sys.modules.get(_FLEX)
    return flex is not None and isinstance(value, flex.BlockMask)


def _blocks(table: Bools, block: int | tuple[int, int]) -> Blocks:
    if table.ndim not in (2, 3) or (table.ndim == 3 and table.shape[0] == 0):
        raise MaskError(f"a table of blocks is ([heads,] blocks of queries, blocks of keys), got shape {table.shape}")
    return Blocks(table, _sizes(block))


def _sizes(block: int | tuple[int, int]) -> tuple[int, int]:
    queries, keys = block if isinstance(block, (tuple, list)) and len(block) == 2 else (block, block)
    return integer("block", queries, 1), integer("block", keys, 1)
