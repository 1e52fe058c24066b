"""Plans of packed documents against block-diagonal masks, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser import masks
from fuser.ir.errors import MaskError
from fuser.ir.target import cuda_target
from fuser.kernels import documents
from fuser.kernels.documents import plan_documents
from fuser.kernels.plan import AttentionPlan
from fuser.kernels.planner import plan

BANDS = {
    "dense": masks.Dense(),
    "causal": masks.Causal(),
    "ahead": masks.Causal(5),
    "behind": masks.Causal(-70),
    "window": masks.SlidingWindow(9, 3),
    "one key": masks.SlidingWindow(0, 0),
    "wide window": masks.SlidingWindow(100, 80),
    "causal window": masks.Causal() & masks.SlidingWindow(20, 20),
}
OTHERS = {
    "longformer": masks.Longformer(6, 2),
    "strided": masks.Strided(7),
    "dilated": masks.Dilated(5, 3),
    "bigbird": masks.BigBird(8, 1, 1, 1, 0),
    "nothing": ~masks.Dense(),
    "no overlap": masks.Causal(-9) & masks.SlidingWindow(4, 4),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i + 2 * j) % 3 == 0),
    "causal function": masks.Causal() & masks.from_mask_mod(lambda b, h, i, j: (i * j) % 2 == 0),
    "per head": masks.per_head([masks.Causal(), masks.Strided(5), masks.Dense()]),
}
LENGTHS = [(0, 0), (1, 1), (64, 64), (65, 65), (3, 130), (130, 3), (200, 200), (7, 0), (0, 9), (1, 90), (64, 64)]


def bounds(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def planned(mask: masks.Mask, lengths: Sequence[tuple[int, int]]) -> AttentionPlan:
    return plan_documents(mask, bounds([n for n, _ in lengths]), bounds([m for _, m in lengths]))


def expected(mask: masks.Mask, lengths: Sequence[tuple[int, int]]) -> masks.Mask:
    """Documents side by side, each the last rows of the square that its keys make, or all pairs."""
    everything = isinstance(mask, masks.Dense)

    def matrix(mask: masks.Mask) -> Tensor:
        blocks = []
        for n, m in lengths:
            block = torch.zeros(n, m, dtype=torch.bool)
            rows = min(n, m)
            if everything:
                block[:] = True
            elif rows:
                block[n - rows :] = mask.dense(m)[m - rows :]
            blocks.append(block)
        return torch.block_diag(*blocks).bool()

    if mask.heads is None:
        return masks.from_dense(matrix(mask))
    return masks.per_head([masks.from_dense(matrix(mask.head(h))) for h in range(mask.heads)])


@pytest.mark.parametrize("name", [*BANDS, *OTHERS])
def test_documents_attend_to_themselves_alone(name: str) -> None:
    mask = (BANDS | OTHERS)[name]
    assert (documents.band(mask) is not None) == (name in BANDS)
    made = planned(mask, LENGTHS)
    made.validate(expected(mask, LENGTHS))
    assert sorted(set().union(*(group.rows.tolist() for group in made))) == list(range(sum(n for n, _ in LENGTHS)))


@pytest.mark.parametrize("name", [*BANDS, *OTHERS])
def test_rows_without_padding_take_one_phase(name: str) -> None:
    """Of documents with holes, some of whose rows nobody sees."""
    mask = (BANDS | OTHERS)[name]
    rng, length = np.random.default_rng(0), 31
    rows = np.flatnonzero(rng.random(3 * length) < 0.6)
    is_key = rng.random(len(rows)) < 0.9
    made = documents.Documents(rows, length, is_key).plan(mask)
    document, at = rows // length, rows % length
    near = torch.from_numpy((document[:, None] == document) & is_key)
    heads = [mask] if mask.heads is None else [mask.head(h) for h in range(mask.heads)]
    allowed = [masks.from_dense(head.dense(length)[at[:, None], at] & near) for head in heads]
    made.validate(allowed[0] if mask.heads is None else masks.per_head(allowed))
    assert made.phases == 1


length = st.integers(0, 140)


@given(
    st.sampled_from([*BANDS.values(), *(OTHERS[name] for name in ("longformer", "strided", "per head"))]),
    st.lists(st.tuples(length, length), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_any_lengths(mask: masks.Mask, lengths: list[tuple[int, int]]) -> None:
    lengths = [(n, m) for n, m in lengths]
    if not sum(n for n, _ in lengths):
        lengths.append((1, 1))
    planned(mask, lengths).validate(expected(mask, lengths))


@given(st.integers(-80, 80), st.integers(0, 160), st.lists(st.tuples(length, length), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_band(offset: int, width: int, lengths: list[tuple[int, int]]) -> None:
    mask = masks.Causal(offset) & masks.SlidingWindow(max(0, width - offset), 200)
    lengths.append((5, 5))
    planned(mask, lengths).validate(expected(mask, lengths))


@pytest.mark.parametrize("name", ["dense", "causal", "window"])
def test_arithmetic_wastes_no_more_than_planning(name: str) -> None:
    """Vectors of 16 rows that are computed, over the pairs that are allowed."""
    mask, lengths = BANDS[name], [(n, n) for n in (40, 128, 300, 300, 511)]
    singly = [plan(mask, n) for n, _ in lengths]
    assert planned(mask, lengths).pairs_allowed == sum(one.pairs_allowed for one in singly)
    assert planned(mask, lengths).pairs_computed <= 1.15 * sum(one.pairs_computed for one in singly)


def test_equal_lengths_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(*args: object) -> AttentionPlan:
        asked.append(args[1:3])
        return plan(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(documents, "plan", counting)
    mask = masks.Longformer(3, 1) & ~masks.SlidingWindow(0, 0)
    for lengths in ([5, 9, 5], [9, 5], [9, 9, 9]):
        planned(mask, [(n, n) for n in lengths])
    assert asked == [(5, 5), (9, 9)]
    planned(masks.SlidingWindow(4, 4), [(n, n) for n in range(300)])
    assert len(asked) == 2


def test_targets_have_costs_of_their_own() -> None:
    lengths = bounds([100, 37, 64])
    mask, target = masks.Strided(6), cuda_target("sm_80")
    made = plan_documents(mask, lengths, lengths, target)
    made.validate(expected(mask, [(100, 100), (37, 37), (64, 64)]))


def test_a_mask_that_does_not_fit_a_document_is_refused() -> None:
    fixed = masks.from_dense(torch.ones(8, 8, dtype=torch.bool).tril())
    planned(fixed, [(8, 8), (3, 8)]).validate(expected(fixed, [(8, 8), (3, 8)]))
    with pytest.raises(MaskError):
        planned(fixed, [(8, 8), (9, 9)])
