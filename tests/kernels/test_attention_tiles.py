"""Tiles of attention plans: what they compute is the mask, whatever their size, order of bits and cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser import masks
from fuser.ir.target import cuda_target
from fuser.kernels.attention_tiles import STEP, BitOrder, Tiles, tiles
from fuser.kernels.planner import plan

TARGET = cuda_target("sm_80")
LANE, BIT = np.arange(32)[:, None], np.arange(32)[None, :]
# Rows and keys of (lane, bit), as the kernels hold their scores.
PLACES = {
    BitOrder.MMA: (LANE // 4 + 8 * (BIT // 2 % 2), 8 * (BIT // 4) + 2 * (LANE % 4) + BIT % 2),
    BitOrder.VECTOR: (4 * (LANE // 8) + BIT % 4, 8 * (BIT // 4) + LANE % 8),
}


def counts(made: Tiles, order: BitOrder, q_len: int, kv_len: int) -> np.ndarray:
    """How often each (head, row, key) is computed."""
    members, records, lists, masks_at = made.offsets
    array = made.array.astype(np.int64)
    items = array[: made.items * 4].reshape(-1, 4)
    rows = array[members : members + made.items * made.rows * 4].reshape(made.items, made.rows, 4)[..., 0]
    table, keys, words = array[records:lists].reshape(-1, 4), array[lists:masks_at], made.array[masks_at:]
    row_of, key_of = PLACES[order]
    out = np.zeros((made.heads or 1, q_len, kv_len), np.int64)
    for (record, steps, head, partial), members_of in zip(items.tolist(), rows, strict=True):
        done, seen = 0, 0
        while done < steps:
            first, distance, packed, block = table[record].tolist()
            record += 1
            for step in range(packed >> 16):
                columns = first + (step * STEP + np.arange(STEP)) * distance if distance else keys[first:][:STEP]
                for warp in range(made.rows // 16):
                    kind = packed >> 2 * warp & 3
                    seen |= int(kind == 1) << warp
                    word = words[(block * made.rows // 16 + warp) * 32 :][:32].view(np.uint32) if kind == 1 else None
                    bits = np.ones((32, 32), bool) if word is None else (word[:, None] >> BIT.astype(np.uint32)) & 1 > 0
                    row = members_of[16 * warp + row_of]
                    chosen = bits & (row >= 0) & (kind != 0)
                    np.add.at(out[head], (row[chosen], columns[key_of][chosen]), 1)
            done += packed >> 16
        assert done == steps
        assert seen == partial
    return out


CASES = [
    masks.Dense(),
    masks.Causal(),
    masks.Strided(13),
    masks.Fixed(),
    masks.SlidingWindow(32, 32),
    masks.Dilated(64, 4),
    masks.Longformer(8, 3),
    masks.BigBird(16, 3, 1, 2, 0),
    ~masks.Dense(),
    masks.per_head([masks.Causal(), masks.Strided(5)]),
]


@pytest.mark.parametrize("order", BitOrder)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("mask", CASES, ids=str)
def test_every_allowed_pair_is_computed_once(mask: masks.Mask, rows: int, order: BitOrder) -> None:
    for q_len, kv_len in ((150, 150), (90, 700)):
        for most in (1, 3, 1000):
            made = tiles(plan(mask, q_len, kv_len, TARGET), rows, order, most)
            assert (counts(made, order, q_len, kv_len) == mask.dense(q_len, kv_len).numpy()).all()
            assert made.most_steps <= most


@given(st.integers(0, 2**32 - 1), st.integers(0, 140), st.integers(1, 140), st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_opaque_masks(seed: int, q_len: int, kv_len: int, density: float, most: int) -> None:
    allowed = np.random.default_rng(seed).random((q_len, kv_len)) < density
    made = tiles(plan(masks.from_dense(torch.from_numpy(allowed)), q_len, kv_len, TARGET), 64, BitOrder.MMA, most)
    assert (counts(made, BitOrder.MMA, q_len, kv_len)[0] == allowed).all()


def test_parts_of_rows_are_numbered_in_the_order_of_their_states() -> None:
    made = tiles(plan(masks.Dense(), 100, 1000, TARGET), 64, BitOrder.MMA, 3)
    members = made.array[made.offsets[0] :][: made.items * 64 * 4].reshape(-1, 4)
    members = members[members[:, 0] >= 0]
    assert made.states == 100 * 6
    for row in range(100):
        _, first, part, parts = members[members[:, 0] == row].T
        assert sorted(part) == list(range(6))
        assert (parts == 6).all()
        assert (first == first[0]).all()
    states = members[:, 1] + members[:, 2]
    assert sorted(states) == list(range(600))


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.Strided(),
        masks.Fixed(),
        masks.SlidingWindow(128, 128),
        masks.Dilated(64, 4),
        masks.Longformer(128, 16),
        masks.BigBird(64, 3, 2, 3, 0),
    ],
    ids=str,
)
def test_work_ratio_of_warps_at_4096(mask: masks.Mask) -> None:
    made = plan(mask, 4096, 4096, TARGET)
    assert tiles(made, 64, BitOrder.MMA, 1 << 20).pairs_computed < 2.5 * made.pairs_allowed


def test_long_runs_are_not_listed() -> None:
    made = tiles(plan(masks.Causal(), 1 << 16, 1 << 16, TARGET), 128, BitOrder.MMA, 1 << 20)
    assert made.steps == sum(2 * (i + 1) for i in range(512))
    assert made.array.nbytes < 4 << 20
