"""Masks against their definitions written out pair by pair, against each other, and against AToffer's generators."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

import fuser.ir.masks.columns as helpers
import fuser.ir.masks.patterns as patterns
from fuser.ir.errors import MaskError
from fuser.ir.masks import (
    And,
    BigBird,
    Causal,
    Dense,
    Dilated,
    Fixed,
    GlobalBlocks,
    GridChunks,
    GridWindows,
    Longformer,
    Mask,
    Not,
    Or,
    PerHead,
    Shifted,
    SlidingWindow,
    Strided,
    TensorMask,
    WindowsAndChunks,
    from_dense,
    from_mask_mod,
    per_head,
)
from fuser.ir.masks.picture import block_density

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "atoffer" / "masks.json").read_text())

lengths = st.tuples(st.integers(0, 24), st.integers(0, 24))
small = st.integers(0, 7)
positive = st.integers(1, 7)
optional_step = st.none() | st.integers(1, 9)

structural = st.one_of(
    st.just(Dense()),
    st.builds(Causal, st.integers(-6, 6)),
    st.builds(SlidingWindow, small, small),
    st.builds(Strided, optional_step),
    st.builds(Fixed, optional_step),
    st.builds(Dilated, small, positive),
    st.builds(Longformer, small, small),
    st.builds(WindowsAndChunks, positive, small, small, small, small, st.integers(0, 1)),
    st.builds(GridChunks, positive, positive),
    st.builds(BigBird, positive, small, st.integers(0, 3), st.integers(0, 3), st.integers(0, 99)),
    st.builds(GlobalBlocks, positive, st.integers(0, 3), st.integers(0, 3)),
)


def third(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (q + 2 * kv) % 3 == 0


def by_head(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (q - kv).abs() <= 2 * h


leaves = structural | st.just(from_mask_mod(third))
shared = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, k: a.shift(k), inner, st.integers(0, 5)),
    ),
    max_leaves=4,
)
with_heads = st.lists(shared, min_size=1, max_size=3).map(per_head)
any_mask = st.one_of(shared, with_heads, st.builds(lambda a, b: ~a & b, with_heads, shared))


def pair_by_pair(mask: Mask, n: int, m: int) -> np.ndarray:
    """The structural masks as the design defines them, in plain Python and one pair at a time."""

    def allowed(i: int, j: int) -> bool:
        if isinstance(mask, Dense):
            return True
        if isinstance(mask, Causal):
            return j <= i + mask.offset
        if isinstance(mask, SlidingWindow):
            return -mask.left <= j - i <= mask.right
        if isinstance(mask, Strided):
            s = mask.step if mask.step is not None else math.floor(math.sqrt(m))
            return j <= i and ((i - j) % s == 0 or j > i - s)
        if isinstance(mask, Fixed):
            s = mask.step if mask.step is not None else math.floor(math.sqrt(m))
            return j <= i and (j % s == s - 1 or j > i + (j % s) - s)
        if isinstance(mask, Dilated):
            return abs(i - j) <= mask.window * mask.dilation and (i - j) % mask.dilation == 0
        if isinstance(mask, Longformer):
            return abs(i - j) <= mask.window or i < mask.global_tokens or j < mask.global_tokens
        if isinstance(mask, GridChunks):
            across = max(mask.width // mask.size, 1)
            row, column = j // mask.width // mask.size, j % mask.width // mask.size
            return column < across and i == row * across + column
        if isinstance(mask, WindowsAndChunks):
            if j < n:
                token = n - 1 - j if mask.backwards else j
                start = i // mask.window * mask.window
                near = start - mask.before <= token < start + mask.window + mask.after
                return near and (mask.chunk == 0 or token <= i)
            ordinal = m - 1 - j if mask.backwards else j - n - mask.gap
            return j >= n + mask.gap and (mask.chunk == 0 or (ordinal + 1) * mask.chunk <= i // mask.chunk * mask.chunk)
        if isinstance(mask, GlobalBlocks):
            return j // mask.block < mask.first or j // mask.block >= math.ceil(m / mask.block) - mask.last
        assert isinstance(mask, BigBird)
        r, c = i // mask.block, j // mask.block
        return r < mask.globals or c < mask.globals or c in centred[r] or c in drawn[r]

    centred, drawn = {}, {}
    if isinstance(mask, BigBird):
        rng = np.random.default_rng(mask.seed)
        columns = math.ceil(m / mask.block)
        for r in range(math.ceil(n / mask.block)):
            first = r - mask.window // 2
            centred[r] = range(first, first + mask.window)
            drawn[r] = rng.choice(columns, min(mask.random, columns), replace=False).tolist()
    return np.array([[allowed(i, j) for j in range(m)] for i in range(n)], dtype=bool).reshape(n, m)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['mask']}-{case['length']}")
def test_atoffer_golden(case: dict[str, Any]) -> None:
    pattern = {"strided": Strided, "fixed": Fixed}[case["mask"]]
    for mask in (pattern(), pattern(case["step"])):
        assert mask.count(case["length"]) == case["allowed"]
        bits = np.packbits(mask.dense(case["length"]).numpy())
        assert hashlib.sha256(bits.tobytes()).hexdigest() == case["sha256_packbits"]


@settings(max_examples=300, deadline=None)
@given(structural, lengths)
def test_dense_is_the_definition(mask: Mask, shape: tuple[int, int]) -> None:
    dense = mask.dense(*shape)
    assert dense.dtype == torch.bool
    np.testing.assert_array_equal(dense.numpy(), pair_by_pair(mask, *shape))


@pytest.mark.parametrize("backwards", [0, 1])
def test_windows_of_a_grid(backwards: int) -> None:
    mask = GridWindows(width=6, window=3, extension=1, gap=2, backwards=backwards)
    dense = mask.dense(36, 43)
    for i in range(36):
        top, left = (i // 6 // 3 * 3, i % 6 // 3 * 3)
        square = [(r, c) for r in range(top - 1, top + 4) for c in range(left - 1, left + 4)]
        seen = {6 * r + c for r, c in square if 0 <= r < 6 and 0 <= c < 6}
        seen = {35 - j for j in seen} if backwards else seen
        assert set(dense[i].nonzero().flatten().tolist()) == seen | set(range(38, 43))


def test_default_lengths_are_square() -> None:
    assert torch.equal(Strided().dense(20), Strided(4).dense(20, 20))
    assert Strided().count(20) == Strided(4).count(20, 20)
    assert Causal().dense(3, 5).tolist() == [[j <= i for j in range(5)] for i in range(3)]  # top left, as torch


@settings(max_examples=200, deadline=None)
@given(any_mask, lengths, st.data())
def test_every_view_shows_the_same_mask(mask: Mask, shape: tuple[int, int], data: st.DataObject) -> None:
    n, m = shape
    dense = mask.dense(n, m)
    assert dense.shape == ((n, m) if mask.heads is None else (mask.heads, n, m))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert torch.equal(mask.rows(start, stop, n, m), dense[..., start:stop, :])
    assert mask.count(n, m) == int(dense.sum())
    assert mask.density(n, m) == (pytest.approx(dense.double().mean().item()) if dense.numel() else 0.0)
    wanted_rows = data.draw(st.lists(st.integers(0, n - 1), max_size=9)) if n else []
    for h in range(mask.heads or 1):
        one = mask.head(h)
        assert one.heads is None
        matrix = dense if mask.heads is None else dense[h]
        columns = one.columns(wanted_rows, n, m)
        assert columns.indptr.dtype == columns.indices.dtype == np.int64
        assert len(columns.indptr) == len(wanted_rows) + 1
        assert columns.indptr[0] == 0 and columns.indptr[-1] == len(columns.indices)
        for r, row in enumerate(wanted_rows):
            found = columns.indices[columns.indptr[r] : columns.indptr[r + 1]]
            np.testing.assert_array_equal(found, matrix[row].nonzero()[:, 0].numpy())


@settings(max_examples=300, deadline=None)
@given(structural | st.builds(lambda a, o: a & Causal(o), structural, st.integers(-3, 9)), lengths)
def test_progressions_are_the_rows(mask: Mask, shape: tuple[int, int]) -> None:
    n, m = shape
    dense = mask.dense(n, m).numpy()
    closed = mask.progressions(range(n), n, m)
    assert closed is not None
    for row in range(n):
        listed = [
            start + t * step
            for start, count, step in zip(closed.start[row], closed.count[row], closed.step[row], strict=True)
            for t in range(count)
        ]
        assert listed == np.nonzero(dense[row])[0].tolist()  # also: ascending, disjoint, in range


@settings(max_examples=150, deadline=None)
@given(shared, shared, shared, lengths)
def test_algebra(a: Mask, b: Mask, c: Mask, shape: tuple[int, int]) -> None:
    x, y = a.dense(*shape), b.dense(*shape)
    assert torch.equal((a & b).dense(*shape), x & y)
    assert torch.equal((a | b).dense(*shape), x | y)
    assert torch.equal((~a).dense(*shape), ~x)
    assert torch.equal((~(a & b)).dense(*shape), (~a | ~b).dense(*shape))
    for left, right in (
        (a & b, b & a),
        (a | b, b | a),
        ((a & b) & c, a & (b & c)),
        ((a | b) | c, a | (b | c)),
        (a & a, a),
        (a | a, a),
        (~~a, a),
        (Dense() & a, a),
        (Dense() | a, Dense()),
        (~Dense() & a, ~Dense()),
        (~Dense() | a, a),
    ):
        assert left == right
        assert hash(left) == hash(right)


def test_simplified_forms_are_not_wrapped() -> None:
    m = Longformer(2, 1)
    assert (Dense() & m) is m and (m & m) is m and ~~m is m and m.shift(0) is m
    assert isinstance(m & Causal(), And) and isinstance(m | Causal(), Or)
    assert isinstance(~m, Not) and isinstance(m.shift(2), Shifted)
    assert Causal(2).shift(3) == Causal(5)
    assert m.shift(2).shift(3) == m.shift(5)
    with pytest.raises(TypeError):
        m & torch.ones(2, 2, dtype=torch.bool)  # type: ignore[operator]
    with pytest.raises(MaskError, match="two masks or more"):
        And((m,))


@settings(max_examples=100, deadline=None)
@given(structural, st.integers(0, 6), st.integers(0, 12), st.integers(0, 18))
def test_shift_takes_the_last_queries(mask: Mask, offset: int, n: int, m: int) -> None:
    assert torch.equal(mask.shift(offset).dense(n, m), mask.dense(n + offset, m)[offset:])


def test_shift_of_a_tensor_mask_expects_the_rest_of_the_rows() -> None:
    t = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(from_dense(t).shift(4).dense(5, 7), t[4:])
    with pytest.raises(MaskError, match="9x7"):
        from_dense(t).shift(4).dense(9, 7)


CALLS = itertools.count()


class TestPerHead:
    masks = (Causal(), SlidingWindow(2, 0), Causal())

    def test_stacks_and_broadcasts(self) -> None:
        mask = per_head(self.masks)
        assert mask.heads == 3 and mask == PerHead(self.masks) and mask == PerHead(list(self.masks))  # type: ignore[arg-type]
        stacked = torch.stack([m.dense(5, 8) for m in self.masks])
        assert torch.equal(mask.dense(5, 8), stacked)
        other = Longformer(1, 1)
        assert torch.equal((mask & other).dense(5, 8), stacked & other.dense(5, 8))
        assert torch.equal((other | ~mask).dense(5, 8), other.dense(5, 8) | ~stacked)
        assert torch.equal((mask | Dense()).dense(5, 8), torch.ones(3, 5, 8, dtype=torch.bool))
        assert torch.equal(mask.shift(2).dense(5, 8)[1], self.masks[1].dense(7, 8)[2:])

    def test_head(self) -> None:
        mask = per_head(self.masks)
        assert mask.head(1) == self.masks[1]
        assert (mask & Longformer(1, 1)).head(1) == self.masks[1] & Longformer(1, 1)
        assert (~mask).head(0) == ~Causal()
        assert Causal().head(11) == Causal()
        with pytest.raises(MaskError, match="head 3 of a mask with 3 heads"):
            mask.head(3)

    def test_errors(self) -> None:
        with pytest.raises(MaskError, match="at least one head"):
            per_head([])
        with pytest.raises(MaskError, match="already has 3 heads"):
            per_head([per_head(self.masks)])
        with pytest.raises(MaskError, match="made of masks"):
            per_head([None])  # type: ignore[list-item]
        with pytest.raises(MaskError, match=r"\[2, 3\]"):
            per_head(self.masks) & per_head(self.masks[:2])
        with pytest.raises(MaskError, match="one head at a time"):
            per_head(self.masks).columns([0], 4)


VARIED: list[list[Mask]] = [
    [Dense(), ~Dense()],
    [Causal(), Causal(1), Causal(-1)],
    [SlidingWindow(2, 3), SlidingWindow(3, 2), SlidingWindow(2, 4)],
    [Strided(), Strided(4), Strided(5)],
    [Fixed(), Fixed(4), Fixed(5)],
    [Dilated(2, 3), Dilated(3, 2), Dilated(2, 4)],
    [Longformer(2, 3), Longformer(3, 2), Longformer(2, 4)],
    [BigBird(4, 3, 1, 2, 0), BigBird(5, 3, 1, 2, 0), BigBird(4, 2, 1, 2, 0), BigBird(4, 3, 2, 2, 0)],
    [BigBird(4, 3, 1, 3, 0), BigBird(4, 3, 1, 2, 1)],
    [Causal() & Strided(), Causal() | Strided(), Causal() & Fixed(), ~(Causal() & Strided())],
    [per_head([Causal(), Strided()]), per_head([Strided(), Causal()]), per_head([Causal(), Strided(), Strided()])],
    [Strided().shift(2), Strided().shift(3), Fixed().shift(2)],
    [from_dense(torch.ones(2, 3, dtype=torch.bool)), from_dense(torch.ones(3, 2, dtype=torch.bool))],
    [from_dense(torch.ones(1, 2, 3, dtype=torch.bool)), from_dense(torch.zeros(2, 3, dtype=torch.bool))],
]
DISTINCT = [mask for group in VARIED for mask in group]


class TestIdentity:
    def test_every_parameter_is_in_hash_name_and_equality(self) -> None:
        for of in (lambda m: m.hash, lambda m: m.name, repr, lambda m: m):
            assert len({of(mask) for mask in DISTINCT}) == len(DISTINCT)

    def test_hash_is_the_same_in_another_process(self) -> None:
        code = (
            "import pickle, sys; masks = pickle.load(sys.stdin.buffer);"
            "print([(m.hash, m.fingerprint(40, 30) if m.head(0).structured else 0) for m in masks])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(DISTINCT), capture_output=True, check=True, timeout=120
        )
        here = [(m.hash, m.fingerprint(40, 30) if m.head(0).structured else 0) for m in DISTINCT]
        assert run.stdout.decode().strip() == str(here)

    def test_equal_masks_are_one_key(self) -> None:
        for mask in DISTINCT:
            twin = pickle.loads(pickle.dumps(mask))
            assert twin == mask and hash(twin) == hash(mask) and twin.hash == mask.hash
            assert {mask: 1}[twin] == 1
            assert copy.deepcopy(mask) is mask and copy.copy(mask) is mask
        assert (Causal() & Strided()).hash == (Strided() & Causal()).hash

    def test_repr_is_code_and_str_is_the_name(self) -> None:
        for mask in DISTINCT:
            if not isinstance(mask, TensorMask):
                assert eval(repr(mask)) == mask
        assert str(Longformer(256, 16)) == "longformer(window=256, global=16)"
        assert (Causal() & ~(Strided() | Fixed(4))).name == "causal & ~(strided | fixed(step=4))"
        assert per_head([Causal()] * 3 + [Dense()]).name == "per_head(3 x causal, 1 x dense)"

    def test_numpy_integers_are_integers(self) -> None:
        mask = SlidingWindow(np.int32(3), np.int64(1))  # type: ignore[arg-type]
        assert mask == SlidingWindow(3, 1) and type(mask.left) is int and mask.hash == SlidingWindow(3, 1).hash

    def test_masks_are_immutable(self) -> None:
        with pytest.raises(AttributeError):
            Strided(3).step = 4  # type: ignore[misc]
        with pytest.raises(ValueError, match="read-only"):
            from_dense(torch.ones(2, 2, dtype=torch.bool)).array[0, 0] = False

    def test_fingerprint_follows_shape_and_entries(self) -> None:
        mask = Causal() & from_mask_mod(third)
        assert mask.fingerprint(9, 7) != mask.fingerprint(7, 9) != mask.fingerprint(9, 9)
        assert mask.fingerprint(9, 9) == mask.fingerprint(9)
        same = from_mask_mod(lambda b, h, q, kv: ~((q + 2 * kv) % 3 > 0))
        assert same != from_mask_mod(third) and same.fingerprint(9, 7) == from_mask_mod(third).fingerprint(9, 7)
        other = from_mask_mod(lambda b, h, q, kv: third(b, h, q, kv) ^ ((q == 8) & (kv == 6)))
        assert other.fingerprint(9, 7) != from_mask_mod(third).fingerprint(9, 7)
        one, two = from_mask_mod(by_head, heads=1), from_mask_mod(by_head, heads=2)
        assert one.fingerprint(9, 7) != two.fingerprint(9, 7) != from_mask_mod(third).fingerprint(9, 7)

    def test_fingerprint_does_not_depend_on_the_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        masks = (from_mask_mod(third), from_mask_mod(by_head, heads=3), from_mask_mod(third) | per_head([Causal()] * 2))
        before = [mask.fingerprint(11, 13) for mask in masks]
        monkeypatch.setattr(helpers, "CHUNK", 40)
        assert [mask.fingerprint(11, 13) for mask in masks] == before

    def test_fingerprint_sees_another_random_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mask = Causal() & BigBird(4, 3, 1, 2, 0)
        before = mask.fingerprint(40)
        monkeypatch.setattr(patterns, "_random_blocks", lambda *args: np.zeros((10, 2), np.int64))
        assert mask.fingerprint(40) != before


class TestFromDense:
    def test_copies_and_keeps_entries(self) -> None:
        t = torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(1)) < 0.5
        view = t.transpose(1, 2)  # not contiguous
        mask = from_dense(view)
        kept = view.clone()
        t.logical_not_()
        assert mask.heads == 3 and torch.equal(mask.dense(5, 8), kept)
        assert mask == from_dense(kept) and mask.hash == from_dense(kept).hash and mask != from_dense(~kept)
        assert mask.head(2) == from_dense(kept[2])
        assert isinstance(mask, TensorMask) and pickle.loads(pickle.dumps(mask)) == mask

    def test_dense_is_a_copy_too(self) -> None:
        mask = from_dense(torch.ones(2, 2, dtype=torch.bool))
        mask.dense(2).zero_()
        mask.rows(0, 2, 2).zero_()
        assert mask.count(2) == 4

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(3, 3), "float32.*mask == 0"),
            (torch.ones(3, 3, dtype=torch.uint8), "uint8"),
            (torch.zeros(3, 3, requires_grad=True), "requires grad"),
            (torch.ones(3, dtype=torch.bool), r"shape \(3,\)"),
            (torch.ones(1, 1, 3, 3, dtype=torch.bool), "batch"),
            (torch.ones(0, 3, 3, dtype=torch.bool), r"\(0, 3, 3\)"),
            (torch.ones(3, 3, dtype=torch.bool, device="meta"), "meta"),
            (torch.ones(3, 3, dtype=torch.bool).to_sparse(), "sparse"),
            ([[True]], "torch.Tensor, got list"),
        ],
    )
    def test_errors(self, value: Any, message: str) -> None:
        with pytest.raises(MaskError, match=message):
            from_dense(value)

    def test_lengths_must_match(self) -> None:
        mask = from_dense(torch.ones(4, 6, dtype=torch.bool))
        mask.validate(4, 6)
        for lengths in ((6, 4), (4,), (4, 7)):
            for use in (mask.dense, mask.count, mask.validate, (mask & Causal()).fingerprint, (~mask).density):
                with pytest.raises(MaskError, match="4x6"):
                    use(*lengths)


class TestMaskMod:
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    anchors = torch.tensor([1, 4])

    @pytest.mark.parametrize(
        "function",
        [
            third,
            lambda b, h, q, kv: q >= kv,
            lambda b, h, q, kv: TestMaskMod.documents[q] == TestMaskMod.documents[kv],
            lambda b, h, q, kv: q < 3,
            lambda b, h, q, kv: kv >= 5,
            lambda b, h, q, kv: torch.ones((), dtype=torch.bool),
            # Right one pair at a time only: on whole index tensors it would broadcast to something else.
            lambda b, h, q, kv: (q == TestMaskMod.anchors).any() | (kv == TestMaskMod.anchors).any(),
            # Leaves torch, so that it runs on whole index tensors only.
            lambda b, h, q, kv: torch.from_numpy(np.asarray(q.numpy() >= kv.numpy())),
        ],
        ids=["third", "causal", "documents", "rows", "columns", "constant", "reduction", "numpy"],
    )
    def test_means_what_flex_attention_means(self, function: Any) -> None:
        n, m = 11, 7
        at = [[bool(function(*map(torch.tensor, (0, 0, i, j)))) for j in range(m)] for i in range(n)]
        mask = from_mask_mod(function)
        assert mask.dense(n, m).tolist() == at
        filtered = (SlidingWindow(3, 1) & mask).columns(range(n), n, m)  # calls on pairs, not on a block
        wanted = torch.tensor(at) & SlidingWindow(3, 1).dense(n, m)
        np.testing.assert_array_equal(filtered.indices, wanted.nonzero()[:, 1].numpy())

    def test_heads(self) -> None:
        mask = from_mask_mod(by_head, heads=3)
        assert mask.heads == 3
        assert torch.equal(mask.dense(6, 9), create_mask(by_head, None, 3, 6, 9, device="cpu")[0])
        assert torch.equal(mask.head(0).dense(6, 9), mask.dense(6, 9)[0])
        assert torch.equal(mask.head(2).dense(6, 9), mask.dense(6, 9)[2])
        assert len({mask, mask.head(0), mask.head(1)}) == 3

        def outside_torch(b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
            return torch.from_numpy(np.abs(q.numpy() - kv.numpy()) <= 2 * h.numpy())

        assert torch.equal(from_mask_mod(outside_torch, heads=3).dense(6, 9), mask.dense(6, 9))

    def test_equal_only_to_the_same_function(self) -> None:
        def copy_of_third(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return (q + 2 * kv) % 3 == 0

        assert from_mask_mod(third) == from_mask_mod(third) != from_mask_mod(third, heads=2)
        assert hash(from_mask_mod(third)) == hash(from_mask_mod(third))
        assert from_mask_mod(third) != from_mask_mod(copy_of_third)
        for opaque in (from_mask_mod(third), ~from_mask_mod(third), Causal() & from_mask_mod(third)):
            with pytest.raises(MaskError, match="fingerprint"):
                _ = opaque.hash

    def test_pickling(self) -> None:
        assert pickle.loads(pickle.dumps(from_mask_mod(third))) == from_mask_mod(third)
        mask = Causal() & from_mask_mod(lambda b, h, q, kv: q >= kv)
        with pytest.raises(MaskError, match="top level of a module"):
            pickle.dumps(mask)
        assert copy.deepcopy(mask) is mask

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda b, h, q, kv: q - kv, "bool tensor, got torch.int64"),
            (lambda b, h, q, kv: True, "bool tensor, got bool"),
            (lambda b, h, q, kv: (q >= kv)[None].expand(2), r"one value for each pair"),
            (lambda b, h, q, kv: q >= kv and kv > 0, "`and`"),
            (lambda b, h, q, kv: torch.ones(4, dtype=torch.bool)[b + 9], "IndexError"),
            (lambda b, h, q, kv: (q >= kv) & (b == 0), "depends on b"),
            (lambda b, h, q, kv: kv < torch.tensor([5])[b], "depends on b"),
            (lambda b, h, q, kv: (q >= kv) | (h == 1), "depends on h: pass from_mask_mod"),
            (lambda b, h, q, kv: kv == next(CALLS) % 7, "different answers"),
        ],
    )
    def test_errors(self, function: Any, message: str) -> None:
        mask = from_mask_mod(function)
        for use in (mask.validate, mask.dense, (Causal() & mask).validate):
            with pytest.raises(MaskError, match=message):
                use(6, 7)

    def test_the_users_own_error_is_chained(self) -> None:
        def broken(b: Any, h: Any, q: Any, kv: Any) -> Any:
            raise KeyError("segment")

        with pytest.raises(MaskError, match=r"broken.*KeyError.*segment") as caught:
            from_mask_mod(broken).count(4)
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(MaskError, match="takes a function"):
            from_mask_mod(torch.ones(2, 2))  # type: ignore[arg-type]
        with pytest.raises(MaskError, match="heads must be at least 1"):
            from_mask_mod(third, heads=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(-1, 2), "SlidingWindow: left must be at least 0, got -1"),
        (
            lambda: SlidingWindow(1, 2.5),  # type: ignore[arg-type]
            "right must be an integer, got 2.5",
        ),
        (lambda: SlidingWindow(True, 2), "left must be an integer, got True"),
        (lambda: Strided(0), "Strided: step must be at least 1, got 0"),
        (lambda: Fixed(-3), "Fixed: step must be at least 1"),
        (lambda: Dilated(-1, 1), "window must be at least 0"),
        (lambda: Dilated(1, 0), "dilation must be at least 1"),
        (lambda: Longformer(-1, 0), "window"),
        (lambda: Longformer(0, -1), "global_tokens"),
        (lambda: BigBird(0, 3, 1, 1), "block must be at least 1"),
        (lambda: BigBird(4, 3, 1, -1), "random"),
        (lambda: BigBird(4, 3, 1, 1, -1), "seed"),
        (
            lambda: Causal(None),  # type: ignore[arg-type]
            "offset must be an integer, got None",
        ),
        (lambda: Causal(1 << 40), "at most"),
        (lambda: Strided().shift(-1), "offset must be at least 0"),
        (lambda: Causal().dense(-1), "q_len must be at least 0"),
        (
            lambda: Causal().dense(3, 4.0),  # type: ignore[arg-type]
            "kv_len must be an integer",
        ),
        (lambda: Causal().rows(2, 5, 4), "rows 2:5"),
        (lambda: Causal().rows(3, 2, 4), "rows 3:2"),
        (lambda: Causal().columns([0, 4], 4), r"\[0, 4\), got 0 to 4"),
        (lambda: Causal().columns([-1], 4), "got -1"),
        (lambda: Causal().columns([0.5], 4), "integers"),
        (lambda: Causal().progressions([[0]], 4), "integers"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        make()


class TestCost:
    def test_chunks_do_not_change_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        masks: list[Mask] = [
            ~Strided(),
            Strided() | Dilated(3, 2),
            from_mask_mod(third),
            ~from_mask_mod(by_head, heads=2),
            from_mask_mod(third) & ~Causal(),
            Strided() & Dilated(3, 2),
        ]
        sizes: list[int] = []
        before = [(mask.dense(19, 23), mask.count(19, 23)) for mask in masks]
        original = Mask._block

        def recorded(self: Mask, i: np.ndarray, n: int, m: int) -> np.ndarray:
            sizes.append(len(i) * m)
            return original(self, i, n, m)

        monkeypatch.setattr(Mask, "_block", recorded)
        monkeypatch.setattr(helpers, "CHUNK", 100)
        for mask, (dense, count) in zip(masks, before, strict=True):
            assert torch.equal(mask.dense(19, 23), dense)
            assert mask.count(19, 23) == count
            one = mask.head(0)
            columns = one.columns(range(19), 19, 23)
            np.testing.assert_array_equal(columns.indices, one.dense(19, 23).nonzero()[:, 1].numpy())
        assert sizes and max(sizes) <= 100

    def test_million_tokens(self) -> None:
        n = 1_000_000
        assert Causal().count(n) == n * (n + 1) // 2
        assert (~Causal()).count(n) == n * (n - 1) // 2
        assert SlidingWindow(3, 0).count(n) == 4 * n - 6
        assert (Causal() & Longformer(2, 5)).count(n) == 15 + sum(min(i + 1, 8) for i in range(5, 8)) + 8 * (n - 8)
        assert Strided(1000).rows(n - 2, n, n).sum() == 2 * 1000 + 2 * 999
        mask = Strided() & Dilated(5, 1000) & from_mask_mod(third)
        np.testing.assert_array_equal(
            mask.columns([n - 1], n).indices, [k for k in range(n - 5001, n, 1000) if (n - 1 + 2 * k) % 3 == 0]
        )

    def test_combinations_keep_their_structure(self) -> None:
        assert (Causal() & Strided() & SlidingWindow(9, 9)).progressions([0, 7], 12) is not None
        assert (Causal() & from_mask_mod(third)).structured and (Causal() | Strided()).structured
        assert not from_mask_mod(third).structured and not (Causal() | from_mask_mod(third)).structured


class TestPicture:
    @pytest.mark.parametrize("mask", [Strided(), per_head([Causal(), Strided(), Fixed(), Dense(), Longformer(9, 2)])])
    def test_writes_a_png(self, mask: Mask, tmp_path: Path) -> None:
        from matplotlib.image import imread

        path = tmp_path / "mask.png"
        mask.draw(path, 300, 700)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert np.unique(imread(path).reshape(-1, 4), axis=0).shape[0] > 10

    @pytest.mark.parametrize("shape", [(40, 30), (41, 64), (7, 9), (33, 8)])
    def test_block_density(self, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        n, m = shape
        mask = Longformer(3, 2)
        monkeypatch.setattr(helpers, "CHUNK", 3 * m)
        shares = block_density(lambda start, stop: mask.rows(start, stop, n, m).numpy(), n, m, cells=8)
        dense = mask.dense(n, m).double().numpy()
        rows, cols = ([range(k * s // c, (k + 1) * s // c) for k in range(c)] for s in shape for c in [min(8, s)])
        wanted = [[dense[np.ix_(r, c)].mean() for c in cols] for r in rows]
        np.testing.assert_allclose(shares, wanted, rtol=1e-12)

    def test_a_name_is_no_formula(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")

        def function(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return i >= j

        function.__name__ = r"$\frac{$ _^ $x$"
        for mask in (from_mask_mod(function), from_mask_mod(function, heads=2)):
            mask.draw(tmp_path / "mask.png", 8)
            assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")

    def test_errors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MaskError, match="cannot draw"):
            Causal().draw(tmp_path / "x.png", 0)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MaskError, match="pip install matplotlib"):
            Causal().draw(tmp_path / "x.png", 8)


def test_public_names_and_light_import() -> None:
    code = (
        "import sys, fuser.masks as m; assert m.Causal().count(4) == 10;"
        "loaded = [n for n in sys.modules if n.split('.')[0] == 'matplotlib' or n.startswith(('fuser.kernels', "
        "'fuser.codegen', 'fuser.runtime', 'fuser.search'))]; assert not loaded, loaded;"
        "assert all(hasattr(m, name) for name in m.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
