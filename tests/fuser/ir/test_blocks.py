"""Masks of blocks against their tables entry by entry, and FlexAttention's block masks against its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

import fuser
from fuser.ir.errors import MaskError
from fuser.ir.masks import Causal, PerBatch, from_block_indices, from_block_mask, from_blocks
from fuser.ir.masks.blocks import Blocks

sizes = st.integers(1, 7)


@st.composite
def tables(draw: Any) -> tuple[int, int, np.ndarray, tuple[int, int]]:
    n, m = draw(st.integers(0, 24)), draw(st.integers(0, 24))
    block = draw(sizes), draw(sizes)
    heads = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*heads, -(-n // block[0]), -(-m // block[1]))
    return n, m, draw(arrays.arrays(np.bool_, shape)), block


def written_out(table: np.ndarray, block: tuple[int, int], n: int, m: int) -> torch.Tensor:
    entries = [[table[..., i // block[0], j // block[1]] for j in range(m)] for i in range(n)]
    return torch.from_numpy(np.array(entries, np.bool_).reshape(n, m, *table.shape[:-2])).movedim((0, 1), (-2, -1))


@settings(max_examples=150, deadline=None)
@given(tables())
def test_blocks_are_their_tables(case: Any) -> None:
    n, m, table, block = case
    mask = from_blocks(torch.from_numpy(table), block)
    exact = written_out(table, block, n, m)
    assert torch.equal(mask.dense(n, m), exact)
    assert mask.count(n, m) == int(exact.sum())
    for h in range(mask.heads or 1):
        one, entries = mask.head(h), exact if mask.heads is None else exact[h]
        found = one.columns(range(n), n, m)
        assert [found.indices[a:b].tolist() for a, b in zip(found.indptr, found.indptr[1:], strict=False)] == [
            row.nonzero()[:, 0].tolist() for row in entries
        ]
        assert torch.equal((one & Causal()).dense(n, m), entries & Causal().dense(n, m))
    assert (
        mask
        == from_blocks(torch.from_numpy(table.copy()), block)
        == pickle.loads(pickle.dumps(mask))
        == copy.deepcopy(mask)
    )
    assert mask.hash == pickle.loads(pickle.dumps(mask)).hash
    if table.size:
        changed = table.copy()
        changed.flat[0] ^= True
        other = from_blocks(torch.from_numpy(changed), block)
        assert other != mask and other.hash != mask.hash


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_chosen_blocks_and_csr_are_the_same_tables(data: Any) -> None:
    rows, columns, chosen = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    indices = data.draw(arrays.arrays(np.int64, (rows, chosen), elements=st.integers(-1, columns - 1)))
    table = np.zeros((rows, columns), np.bool_)
    for row, listed in enumerate(indices):
        table[row, listed[listed >= 0]] = True
    mask = from_blocks(torch.from_numpy(table), (2, 3))
    assert from_block_indices(torch.from_numpy(indices), (2, 3), 3 * columns) == mask
    assert from_blocks(torch.from_numpy(table).float().to_sparse_csr(), (2, 3)) == mask


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() <= 40


def by_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k <= 30 * (h + 1))


def by_batch(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q // (50 + 20 * b) == k // (50 + 20 * b)


@pytest.mark.parametrize("mod", [flex.noop_mask, window, by_head, by_batch])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (129, 260)])
@pytest.mark.parametrize("block", [128, 64])
def test_block_masks_of_flex_attention_allow_what_they_allow_there(mod: Any, n: int, m: int, block: int) -> None:
    batch, heads = 2 if mod is by_batch else None, 3 if mod is by_head else None
    made = flex.create_block_mask(mod, batch, heads, n, m, device="cpu", BLOCK_SIZE=block)
    exact = flex.create_mask(mod, batch, heads, n, m, device="cpu")
    mask = from_block_mask(made)
    assert isinstance(mask, PerBatch) == (mod is by_batch)
    for b in range(batch or 1):
        found = (mask.entries[b] if isinstance(mask, PerBatch) else mask).dense(n, m)
        assert torch.equal(found if heads else found[None], exact[b])


def test_attention_takes_block_masks_as_flex_attention_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for mod, batch, heads in ((window, None, None), (by_head, None, 3), (by_batch, 2, None)):
        q, k, v = (torch.randn(2, 3, 200, 16, generator=generator) for _ in range(3))
        made = flex.create_block_mask(mod, batch, heads, 200, 200, device="cpu")
        exact = flex.flex_attention(*(t.double() for t in (q, k, v)), block_mask=made)
        torch.testing.assert_close(fuser.sparse_attention(q, k, v, made).double(), exact, rtol=0, atol=1e-5)


def test_optimize_takes_a_block_mask() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 100, 32)
    made = flex.create_block_mask(window, None, None, 100, 100, device="cpu")
    with torch.no_grad():
        got = fuser.optimize(layer, attention=made, search="model")(x)
        want = layer(x, src_mask=~from_block_mask(made).dense(100))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_errors() -> None:
    table = torch.ones(2, 3, dtype=torch.bool)
    mask = from_blocks(table, 4)
    assert isinstance(mask, Blocks) and "2x3 blocks of 4x4" in mask.name
    with pytest.raises(MaskError, match="2 x 3 blocks of 4 x 4, and q_len = 9, kv_len = 12 are 3 x 3"):
        mask.dense(9, 12)
    for wrong in (table.float(), table[None, None], table[0], "blocks", torch.ones(0, 2, 3, dtype=torch.bool)):
        with pytest.raises(MaskError):
            from_blocks(wrong, 4)  # type: ignore[arg-type]
    for block in (0, -1, 2.5, (4, 0), "4", (1, 2, 3)):
        with pytest.raises(MaskError):
            from_blocks(table, block)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="block 3 of 3 blocks of keys"):
        from_block_indices(torch.tensor([[3]]), 4, 12)
    for indices in (torch.tensor([[0.5]]), torch.tensor([1]), [[1]]):
        with pytest.raises(MaskError):
            from_block_indices(indices, 4, 12)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="takes a BlockMask of torch, got Tensor"):
        from_block_mask(table)
    with pytest.raises(MaskError, match="got str"):
        fuser.sparse_attention(*(torch.zeros(1, 1, 4, 8) for _ in range(3)), "causal")  # type: ignore[arg-type]
