"""CQS partitions: base sets, ownership, and plans of all workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser import masks
from fuser.ir.errors import PlanError
from fuser.ir.masks import Mask
from fuser.kernels import cqs
from fuser.kernels.plan import AttentionPlan


@pytest.mark.parametrize("workers", range(1, 65))
def test_every_block_has_one_owner(workers: int) -> None:
    part = cqs.partition(workers, 3 * workers + workers // 2)
    count = np.zeros((workers, workers), np.int64)
    for worker in range(workers):
        blocks = part.blocks(worker)
        assert len(blocks) == workers
        assert {g for block in blocks for g in block} <= set(part.quorums[worker])
        for block in blocks:
            count[block] += 1
    assert (count == 1).all()
    assert sum(share.pairs for share in part.shares()) == part.seq_len**2
    distances = {(a - b) % workers for a, b in itertools.product(part.base, repeat=2)}
    assert distances == set(range(workers))


@pytest.mark.parametrize(("workers", "share"), [(4, 0.75), (7, 0.4287), (8, 0.5), (31, 0.1937)])
def test_shares_of_the_paper(workers: int, share: float) -> None:
    assert max(s.fraction for s in cqs.partition(workers, 10_000).shares()) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("order", [2, 3, 4, 5, 7, 8, 9])
def test_singer_sets_are_perfect(order: int) -> None:
    found = cqs.singer_set(order)
    workers = order * order + order + 1
    differences = sorted((a - b) % workers for a, b in itertools.permutations(found, 2))
    assert differences == list(range(1, workers))


def test_search_finds_the_table() -> None:
    for workers in range(3, 20):
        assert cqs.search(workers, len(cqs.TABLE[workers - 1])) == cqs.TABLE[workers - 1]


@pytest.mark.parametrize("workers", [65, 80])
def test_sets_beyond_the_table(workers: int) -> None:
    assert len(cqs.check_base(workers, cqs.base_set(workers))) <= 1.5 * workers**0.5


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="8 workers cannot share 7 tokens"):
        cqs.partition(8, 7)
    with pytest.raises(PlanError, match="8 workers cannot share 7 tokens"):
        cqs.partition(8, 70, kv_len=7)
    with pytest.raises(PlanError, match="no base set for 7 workers"):
        cqs.partition(7, 70, base=(0, 1, 2))
    with pytest.raises(PlanError, match="at least 1"):
        cqs.partition(0, 7)


def times_covered(made: AttentionPlan) -> np.ndarray:
    """How many tiles hold each pair."""
    count = np.zeros((made.q_len, made.kv_len), np.int64)
    for rows, keys, bits in made.tiles():
        np.add.at(count, np.ix_(rows, keys), 1 if bits is None else bits)
    return count


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(
    "mask", [masks.Dense(), masks.Causal(), masks.Strided(7), masks.Longformer(9, 3), ~masks.Causal()], ids=str
)
def test_plans_are_exact(mask: Mask, workers: int) -> None:
    made = cqs.plan(cqs.partition(workers, 150), mask)
    assert np.array_equal(times_covered(made), mask.dense(150).numpy())
    made.validate(mask)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_allowed_pair_has_one_worker(data: st.DataObject) -> None:
    """For any mask, lengths and workers: the union of the workers' parts is the mask, and no two of them meet."""
    q_len, kv_len = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    part = cqs.partition(data.draw(st.integers(1, min(q_len, kv_len, 24))), q_len, kv_len=kv_len)
    seed, density = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.02, 0.3, 0.97]))
    table = torch.rand(q_len, kv_len, generator=torch.Generator().manual_seed(seed)) < density
    mask = data.draw(
        st.sampled_from([masks.from_dense(table), masks.Strided(5), masks.Longformer(4, 2), masks.Dense()])
    )
    count, apart = np.zeros((2, q_len, kv_len), np.int64)
    for worker in range(part.workers):
        rows, keys = (np.concatenate([np.arange(*r) for r in f(worker)]) for f in (part.ranges, part.key_ranges))
        local = cqs.local_mask(part, worker, mask)
        count[np.ix_(rows, keys)] += local.dense(len(rows), len(keys)).numpy()
        assert local.count(len(rows), len(keys)) == part.shares(mask)[worker].pairs_visible
        for piece in cqs.pieces(part, worker, mask):
            rows, keys = (np.concatenate([np.arange(*r) for r in ranges]) for ranges in (piece.queries, piece.keys))
            apart[np.ix_(rows, keys)] += piece.dense(len(rows), len(keys)).numpy()
    allowed = mask.dense(q_len, kv_len).numpy()
    assert np.array_equal(count, allowed)
    assert np.array_equal(apart, allowed)
    assert np.array_equal(times_covered(cqs.plan(part, mask)), allowed)
