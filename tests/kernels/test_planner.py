"""The planner: any mask becomes an exact partition, named masks one with little waste, from their definition alone."""

from __future__ import annotations

import functools
import itertools
import operator
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuser
from fuser import masks
from fuser.ir.errors import MaskError
from fuser.ir.masks.structure import whole
from fuser.ir.target import Target, emulated_target
from fuser.kernels import planner
from fuser.kernels.cover import COSTS, _Spans, from_parts, identity
from fuser.kernels.plan import AttentionPlan
from fuser.kernels.planner import plan, stored_plan

NAMED = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(128, 128),
    "longformer": masks.Longformer(128, 16),
    "bigbird": masks.BigBird(64, 3, 2, 3),
    "dilated": masks.Dilated(64, 4),
    "strided": masks.Strided(),
    "fixed": masks.Fixed(),
}
UNIONS = {f"{a} | {b}": NAMED[a] | NAMED[b] for a, b in itertools.combinations(NAMED, 2)}

SMALL = st.integers(0, 12)
STEP = st.integers(1, 12)
LEAVES = st.one_of(
    st.builds(masks.Causal, st.integers(-20, 20)),
    st.builds(masks.SlidingWindow, SMALL, SMALL),
    st.builds(masks.Longformer, SMALL, SMALL),
    st.builds(masks.BigBird, STEP, st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    st.builds(masks.Dilated, SMALL, STEP),
    st.builds(masks.Strided, st.none() | STEP),
    st.builds(masks.Fixed, st.none() | STEP),
    st.just(masks.Dense()),
)
COMBINED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        inner.map(lambda mask: ~mask),
        st.tuples(inner, st.integers(0, 30)).map(lambda pair: pair[0].shift(pair[1])),
    ),
    max_leaves=4,
)
LENGTH = st.integers(1, 150)


@pytest.mark.parametrize("target", [None, emulated_target()], ids=["cpu", "cuda"])
@pytest.mark.parametrize("keys", [1, 7, 500])
def test_rows_that_see_all_keys_are_divided_as_costs_say(keys: int, target: Target | None) -> None:
    costs = COSTS["cuda" if target else "cpu"]
    for rows in range(1, 131):
        found = plan(masks.Dense(), rows, keys, target)
        found.validate(masks.Dense())
        order = identity(rows)
        cover, _ = from_parts(whole(rows, keys), order, costs)
        assert cover is not None
        assert sorted(group.width for group in found) == sorted(cover.width.tolist())


@pytest.mark.parametrize("keys", [1, 2, 70, 4097])
def test_one_row_that_sees_all_keys_has_one_run_of_them(keys: int) -> None:
    found = plan(masks.Dense(), 1, keys)
    (group,) = found
    assert group.runs.tolist() == [[0, keys, 1]] and group.rows.tolist() == [0] and not len(group.keys)
    assert AttentionPlan.of(1, keys, [group]) == found == AttentionPlan.from_bytes(found.to_bytes())


def covered(made: AttentionPlan, head: int = 0) -> np.ndarray:
    """How many tiles hold each pair, counted apart from ``validate``."""
    count = np.zeros((made.q_len, made.kv_len), np.int64)
    for rows, keys, bits in made.tiles(head):
        np.add.at(count, np.ix_(rows, keys), 1 if bits is None else bits)
    return count


@given(COMBINED, LENGTH, LENGTH)
@settings(max_examples=150, deadline=None)
def test_combined_masks_are_partitioned(mask: masks.Mask, q_len: int, kv_len: int) -> None:
    made, allowed = plan(mask, q_len, kv_len), mask.dense(q_len, kv_len).numpy()
    assert np.array_equal(covered(made), allowed)
    assert mask.count(q_len, kv_len) == made.pairs_allowed == allowed.sum()
    made.validate(mask)


@given(COMBINED, LENGTH, LENGTH)
@settings(max_examples=60, deadline=None)
def test_entries_alone_are_partitioned(mask: masks.Mask, q_len: int, kv_len: int) -> None:
    allowed = mask.dense(q_len, kv_len)
    assert np.array_equal(covered(plan(masks.from_dense(allowed), q_len, kv_len)), allowed.numpy())


@given(COMBINED, COMBINED, LENGTH)
@settings(max_examples=20, deadline=None)
def test_heads_and_functions_are_partitioned(first: masks.Mask, second: masks.Mask, length: int) -> None:
    table = first.dense(length) ^ second.dense(length)
    function = masks.from_mask_mod(lambda b, h, i, j: table[i, j])
    mask = masks.per_head([first, function, second & function])
    made = plan(mask, length)
    for head, expected in enumerate((first.dense(length), table, second.dense(length) & table)):
        assert np.array_equal(covered(made, head), expected.numpy())


@given(COMBINED, LENGTH, LENGTH)
@settings(max_examples=100, deadline=None)
def test_progressions_are_the_mask(mask: masks.Mask, q_len: int, kv_len: int) -> None:
    parts = mask.parts(q_len, kv_len)
    if parts is None:
        return
    count = np.zeros((q_len, kv_len), np.int64)
    for part in parts:
        for row in range(q_len):
            last = part.start[row] + part.count[row] * part.step
            count[row, part.start[row] : last : part.step] += part.count[row] > 0
    assert np.array_equal(count, mask.dense(q_len, kv_len).numpy())


@pytest.mark.parametrize("length", [1024, 4096, 16384])
@pytest.mark.parametrize("name", [*NAMED, *UNIONS])
def test_little_is_computed_in_vain(name: str, length: int) -> None:
    mask = (NAMED | UNIONS)[name]
    made = plan(mask, length)
    assert made.work_ratio < 1.6
    if length == 1024:
        made.validate(mask)


@pytest.mark.parametrize("name", ["dilated", "strided", "fixed", "dilated | strided", "longformer | strided"])
def test_structure_is_found_in_entries(name: str) -> None:
    mask = masks.from_dense((NAMED | UNIONS)[name].dense(1024))
    made = plan(mask, 1024)
    assert made.work_ratio < 1.8
    made.validate(mask)


def test_rows_with_like_keys_meet_wherever_they_are() -> None:
    """Rows of 40 kinds in any order, each kind with random keys: neighbours share nothing."""
    rng = np.random.default_rng(0)
    kinds = rng.random((40, 1024)) < 0.05
    mask = masks.from_dense(torch.from_numpy(kinds[rng.integers(0, 40, 1024)]))
    made = plan(mask, 1024)
    made.validate(mask)
    assert made.work_ratio < 4
    # Rows as they are would take almost every key for each 16 rows.
    assert made.pairs_computed < 0.4 * 1024**2


def test_lengths_that_steps_do_not_divide() -> None:
    for mask in (masks.Strided(), masks.Dilated(64, 5), masks.Fixed(37), masks.Strided(29) | masks.Dilated(30, 7)):
        made = plan(mask, 1000, 1100)
        made.validate(mask)
        assert made.work_ratio < 2.5


@pytest.mark.parametrize("name", ["strided", "dilated", "dilated | strided", "longformer | fixed"])
def test_planning_memory_is_far_below_the_matrix(name: str) -> None:
    length = 16384
    tracemalloc.start()
    try:
        made = plan((NAMED | UNIONS)[name], length)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < length**2 / 4
    assert made.work_ratio < 1.6


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_planning_memory_of_entries_follows_the_plan(density: float) -> None:
    """What planning needs beside the entries: a slice of them, and a few times the plan."""
    length = 8192
    mask = masks.from_dense(torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < density)
    tracemalloc.start()
    try:
        made = plan(mask, length)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.pairs_allowed == mask.count(length)
    assert peak < 4 * length**2 + 6 * made.array.nbytes


def test_rows_without_keys_add_no_phase() -> None:
    mask = masks.Dilated(40, 16) & ~masks.Longformer(0, 200)
    made = plan(mask, 1024)
    made.validate(mask)
    assert made.phases == 1


class Store(dict[str, bytes]):
    """Plans in memory."""

    def read(self, key: str) -> bytes | None:
        return self.get(key)

    def write(self, key: str, title: str, content: bytes) -> None:
        self[key] = content


TABLE = torch.rand(70, 80, generator=torch.Generator().manual_seed(0)) < 0.3


@pytest.mark.parametrize(
    "mask",
    [
        masks.Longformer(9, 2) | masks.Strided(),
        masks.from_dense(TABLE),
        masks.from_mask_mod(lambda b, h, i, j: TABLE[i, j]),
        masks.per_head([masks.Causal(), masks.from_dense(TABLE)]),
    ],
    ids=["structured", "entries", "function", "heads"],
)
def test_stored_plans_are_not_made_again(mask: masks.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    made = stored_plan(mask, 70, 80, None, store)
    made.validate(mask)
    monkeypatch.setattr(planner, "plan", None)
    assert stored_plan(mask, 70, 80, None, store) == made
    assert len(store) == 1


def test_what_a_plan_depends_on_is_in_its_key() -> None:
    store = Store()
    mask = masks.Dilated(5, 3)
    for lengths in ((60, 60), (60, 61), (61, 60)):
        stored_plan(mask, *lengths, None, store).validate(mask)
    stored_plan(masks.Dilated(5, 4), 60, 60, None, store)
    assert len(store) == 4


@pytest.mark.parametrize(
    "content", [b"", b"rubbish!", plan(masks.Causal(), 61, 60).to_bytes(), plan(masks.Causal(), 60).to_bytes()[:-8]]
)
def test_stored_rubbish_is_planned_anew(content: bytes) -> None:
    store, mask = Store(), masks.Causal()
    made = stored_plan(mask, 60, 60, None, store)
    (key,) = store
    store[key] = content
    assert stored_plan(mask, 60, 60, None, store) == made
    assert store[key] == made.to_bytes()


def test_steps_whose_products_are_too_large_for_words() -> None:
    many = functools.reduce(operator.and_, (masks.Dilated(1000, d) for d in (97, 101, 103, 107, 109)))
    huge = functools.reduce(operator.and_, (masks.Dilated(5, (1 << 31) - d) for d in (1, 19, 61)))
    for mask in (many, huge, masks.Dilated(1000, 7) & ~many, masks.Strided(7) | huge):
        made = plan(mask, 90, 80)
        made.validate(mask)
        assert mask.count(90, 80) == int(mask.dense(90, 80).sum()) == made.pairs_allowed


@pytest.mark.parametrize("mask", [torch.ones(4, 4, dtype=torch.bool), "causal", None])
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(MaskError, match=f"one of fuser.masks.*{type(mask).__name__}"):
        plan(mask, 4)


def test_plan_is_public() -> None:
    assert fuser.plan(masks.Strided(), 100) == plan(masks.Strided(), 100, 100)


@pytest.mark.parametrize("mask", [masks.SlidingWindow(256, 256), masks.Longformer(512, 16)], ids=lambda mask: mask.name)
def test_spans_that_repeat_are_covered_once(mask: masks.Mask) -> None:
    parts = mask.parts(4096)
    assert parts is not None
    spans = _Spans.of(parts, identity(4096))
    kinds, which = spans.kinds()
    assert len(kinds) < 20 < len(which) == 64
    # Where their keys lie is found again.
    seen = np.broadcast_to(np.arange(64)[None, :, None], spans.count.shape)[spans.count > 0]
    back = spans._back(spans.start[spans.count > 0], seen)
    want = np.stack([part.start.reshape(64, 64) for part in parts])[spans.count > 0]
    assert np.array_equal(back, want)
