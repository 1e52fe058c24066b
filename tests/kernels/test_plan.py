"""Plans and the planner: exact partition, honest work figures, serialization, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser import masks
from fuser.ir.errors import MaskError, PlanError
from fuser.kernels.plan import WIDTHS, AttentionPlan, Group
from fuser.kernels.planner import plan

STRUCTURED = [
    masks.Dense(),
    ~masks.Dense(),
    masks.Causal(),
    masks.Causal(-3),
    masks.SlidingWindow(20, 3),
    masks.Longformer(7, 5),
    masks.BigBird(8, 3, 1, 2, seed=3),
    masks.Strided(),
    masks.Fixed(6),
    masks.Dilated(4, 3),
    masks.Causal() & masks.Longformer(9, 2),
    masks.Strided(5) | masks.SlidingWindow(2, 2),
    ~masks.SlidingWindow(4, 4),
]
LENGTHS = [(1, 1), (7, 40), (63, 64), (65, 65), (130, 90), (64, 200), (0, 5), (5, 0)]


def group(
    rows: list[int],
    runs: list[tuple[int, int, int]] | None = None,
    partial: dict[int, int] | None = None,
    width: int = 16,
    phase: int = 0,
    head: int = 0,
) -> Group:
    partial = partial or {}
    return Group(
        np.array(rows, np.int32),
        np.array(runs or [], np.int32).reshape(-1, 3),
        np.array(list(partial), np.int32),
        np.array(list(partial.values()), np.uint64),
        width,
        phase,
        head,
    )


@pytest.mark.parametrize("mask", STRUCTURED, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_planner_covers_each_allowed_pair_once(mask: masks.Mask, q_len: int, kv_len: int) -> None:
    made = plan(mask, q_len, kv_len)
    made.validate(mask)
    assert made.pairs_allowed == int(mask.dense(q_len, kv_len).sum()) <= made.pairs_computed
    assert (made.q_len, made.kv_len, made.heads) == (q_len, kv_len, None)


@given(st.integers(0, 2**32 - 1), st.integers(1, 140), st.integers(1, 100), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_planner_covers_any_tensor(seed: int, q_len: int, kv_len: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    allowed = rng.random((q_len, kv_len)) < density
    allowed[rng.random(q_len) < 0.1] = False
    allowed[:, rng.random(kv_len) < 0.1] = True
    mask = masks.from_dense(torch.from_numpy(allowed))
    made = plan(mask, q_len, kv_len)
    # Counted here from the tiles, apart from `validate`.
    count = np.zeros((q_len, kv_len), np.int64)
    for rows, keys, bits in made.tiles():
        np.add.at(count, np.ix_(rows, keys), 1 if bits is None else bits)
    assert np.array_equal(count, allowed)
    made.validate(mask)


def test_heads_have_plans_of_their_own() -> None:
    mask = masks.per_head([masks.Causal(), masks.Strided(5), masks.Causal()])
    made = plan(mask, 90, 70)
    made.validate(mask)
    assert made.heads == 3
    assert made.pairs_allowed == mask.count(90, 70)
    for head in range(3):
        covered = sum(int(bits.sum()) if bits is not None else len(r) * len(k) for r, k, bits in made.tiles(head))
        assert covered == mask.head(head).count(90, 70)
    with pytest.raises(PlanError, match="2 heads"):
        made.validate(masks.per_head([masks.Causal(), masks.Causal()]))


def test_structure_is_planned_without_listing_pairs() -> None:
    n = 1 << 16
    # A word for every row and partial key is far below the 2 GiB that the causal pairs would take.
    assert plan(masks.Dense(), n).array.nbytes < 20 * n
    assert plan(masks.Causal(), n).array.nbytes < 60 * n
    assert plan(masks.SlidingWindow(256, 0), n).array.nbytes < 60 * n
    assert len(plan(masks.Dense(), n)) == n // 64


def test_vectors_that_no_row_needs_are_left_out() -> None:
    banded = plan(masks.SlidingWindow(8, 8), 256)
    computed = 0
    for group in banded:
        vectors = [sorted({row // 16 for row in np.flatnonzero(seen)}) for seen in group.allowed.T]
        ranges = [v[-1] - v[0] + 1 for v in vectors]
        assert ranges == sorted(ranges, reverse=True)
        computed += 16 * (sum(ranges) + -(-len(group.rows) // 16) * len(group.run_keys))
    assert banded.pairs_computed == computed
    assert banded.work_ratio < 2.0


def test_work_figures_count_idle_lanes() -> None:
    made = AttentionPlan.of(40, 8, [group(list(range(40)), [(0, 3, 2)], {1: 0b101}, width=64)])
    assert made.pairs_allowed == 40 * 3 + 2
    assert made.pairs_computed == 48 * 3 + 16
    assert made.work_ratio == pytest.approx(160 / 122)
    assert plan(~masks.Dense(), 4).work_ratio == 1.0


def test_phases_merge_in_order_and_rows_get_slots() -> None:
    made = AttentionPlan.of(
        4,
        6,
        [group([3, 1], [(5, 1, 1)], phase=7), group([0, 1, 2, 3], [(0, 2, 1)]), group([3], [(2, 1, 1)], phase=4)],
    )
    assert made.phases == 3
    assert made.slots == 2
    assert [g.phase for g in made] == [0, 1, 2]
    arrays = made._arrays
    # Lanes of [0 1 2 3], [3], [3 1]: rows 1 and 3 wait for later phases, 0 and 2 finish at once.
    assert arrays["resume"].tolist() == [0, 0b1, 0b11]
    assert arrays["finish"].tolist() == [0b0101, 0, 0b11]
    assert arrays["slot"].tolist() == [-1, 0, -1, 1, 1, 1, 0]


def test_bytes_round_trip() -> None:
    made = plan(masks.Longformer(9, 3), 150, 120)
    again = AttentionPlan.from_bytes(made.to_bytes())
    assert again == made
    assert hash(again) == hash(made)
    assert again.hash == made.hash != plan(masks.Longformer(9, 4), 150, 120).hash
    assert not again.array.flags.writeable


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever passes the check stays inside the bounds that a kernel relies on."""
    made = plan(masks.Strided(5), 40, 30)
    words = made.array.view(np.int32).copy()
    at = data.draw(st.integers(0, len(words) - 1))
    words[at] = data.draw(st.integers(-(2**31), 2**31 - 1))
    try:
        damaged = AttentionPlan.from_bytes(words.tobytes())
    except PlanError:
        return
    for g in damaged:
        assert len(g.rows) <= g.width in WIDTHS
        assert (g.rows >= 0).all() and (g.rows < damaged.q_len).all()
        for keys in (g.keys, g.run_keys):
            assert (keys >= 0).all() and (keys < damaged.kv_len).all()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group([0, 1])], "every row must be in a group"),
        ([group([0, 1]), group([1], phase=1)], "row 2 of head 0 is in no group"),
        ([group([0, 1, 2]), group([1])], "row 1 of head 0 is in two groups of one phase"),
        ([group([0, 1, 3])], r"rows must lie in \[0, 3\)"),
        ([group([0, 1, 2], [(0, 5, 1)])], r"keys must lie in \[0, 4\)"),
        ([group([0, 1, 2], [(3, 2, -4)])], r"keys must lie in \[0, 4\)"),
        ([group([0, 1, 2], partial={4: 1})], r"keys must lie in \[0, 4\)"),
        ([group([0, 1, 2], partial={1: 0b1000})], "lanes without a row"),
        ([group([0, 1, 2], partial={1: 0})], "a row that sees it"),
        ([group([0, 1, 2], width=48)], "widths"),
        ([group([0, 1, 2], head=1)], "heads and phases must exist"),
    ],
)
def test_what_is_not_a_plan_is_refused(groups: list[Group], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        AttentionPlan.of(3, 4, groups)


def test_validate_finds_missing_extra_and_repeated_pairs() -> None:
    mask = masks.Causal()
    made = plan(mask, 70)
    groups = list(made)
    at = next(i for i, g in enumerate(groups) if len(g.keys) > 2 and len(g.runs))
    g = groups[at]
    lanes = g.lanes.copy()
    lanes[1] ^= np.uint64(1)
    wrong = {
        "0 tiles and allowed": g._replace(keys=g.keys[:-1], lanes=g.lanes[:-1]),
        "is in": g._replace(lanes=lanes),
        "2 tiles": g._replace(
            keys=np.append(g.keys, g.run_keys[:1]).astype(np.int32), lanes=np.append(g.lanes, lanes[:1])
        ),
        "lists a key twice": g._replace(keys=np.append(g.keys, g.keys[:1]), lanes=np.append(g.lanes, g.lanes[:1])),
    }
    for message, other in wrong.items():
        with pytest.raises(PlanError, match=message):
            AttentionPlan.of(70, 70, [*groups[:at], other, *groups[at + 1 :]]).validate(mask)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MaskError, match="5x6"):
        plan(masks.from_dense(torch.ones(5, 6, dtype=torch.bool)), 6, 5)


def test_drawing_shows_each_pair(tmp_path: Path) -> None:
    from matplotlib import image

    mask = masks.Fixed(4)
    plan(mask, 20, 12).draw(tmp_path / "plan.png", pixels=20)
    picture = image.imread(tmp_path / "plan.png")[..., :3]
    assert picture.shape == (20, 12, 3)
    assert np.array_equal((picture < 0.99).any(-1), mask.dense(20, 12).numpy())


def test_plans_are_immutable() -> None:
    made = plan(masks.Causal(), 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.array = made.array  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        made.array[0] = 1


def test_lengths_beyond_32_bits_are_refused() -> None:
    none, words = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    groups = dict.fromkeys(("head", "phase", "width", "row_counts", "rows", "run_counts", "key_counts", "keys"), none)
    with pytest.raises(PlanError, match="too large for 32-bit indices"):
        AttentionPlan.assemble(1 << 31, 4, None, runs=np.zeros((0, 3), np.int64), lanes=words, **groups)
