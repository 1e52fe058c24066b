"""``fuser.sparse_attention`` against float64: masks, layouts, dtypes, threads, errors."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_cases import LAYOUTS, check, inputs
from attention_reference import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fuser
from fuser import masks, sparse_attention
from fuser.attention import launch
from fuser.ir.errors import BuildError, MaskError

MASKS = {
    "dense": masks.Dense(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5, 9),
    "strided": masks.Strided(7),
    "longformer": masks.Longformer(4, 3),
    "bigbird": masks.BigBird(16, 1, 1, 1, 0),
    "tensor": masks.from_dense(torch.rand(70, 90, generator=torch.Generator().manual_seed(1)) > 0.7),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i + j) % 3 == 0),
    "per head": masks.per_head([masks.Causal(), masks.Dense(), masks.Dilated(3, 2), masks.Fixed(8)]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(name: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in inputs())
    out = sparse_attention(q, k, v, MASKS[name])
    assert isinstance(out, Tensor) and out.dtype == dtype and out.shape == q.shape
    check(out, q, k, v, MASKS[name].dense(70, 90))


@pytest.mark.parametrize("size", [1, 30])
def test_errors_of_large_scores_are_those_of_their_rounding(size: int) -> None:
    """A score s is rounded by some units of 2⁻²⁴ |s|, which is the relative error of its weight: that is the bound, and
    PyTorch's kernels have the same, though not in the same cases."""
    ours, theirs = [], []
    for seed in range(24):
        q, k, v = inputs(1, 2, 2, (5, 33, 70)[seed % 3], 90, (8, 32, 80)[seed // 8], seed)
        q = q * size
        want, sums = exact(q, k, v)
        unit = 2.0**-24 * (1 + float(sums.abs().max())) * float(v.abs().max())
        ours.append(float((sparse_attention(q, k, v) - want).abs().max()) / unit)  # type: ignore[operator]
        theirs.append(float((F.scaled_dot_product_attention(q, k, v) - want).abs().max()) / unit)
    assert max(ours) < 8
    assert statistics.median(ours) < 1.5 * statistics.median(theirs)


def test_log_sum_exp() -> None:
    q, k, v = inputs()
    mask = masks.SlidingWindow(3, 3) & masks.from_dense((torch.arange(70) % 5 > 0)[:, None].expand(70, 90))
    out, lse = sparse_attention(q, k, v, mask, scale=0.3, return_lse=True)
    want, sums = exact(q, k, v, mask.dense(70, 90), scale=0.3)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    seen = mask.dense(70, 90).any(-1)
    assert not seen.all()
    # Single precision: the scores have some units, the sums ten keys.
    torch.testing.assert_close(lse[..., seen].double(), sums[..., seen], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    assert bool(torch.isneginf(lse[..., ~seen]).all()) and not out[..., ~seen, :].any()


@pytest.mark.parametrize("shape", [(90,), (70, 90), (4, 70, 90), (2, 1, 1, 90), (2, 4, 70, 90), (2, 1, 70, 1)])
def test_tensor_masks(shape: tuple[int, ...]) -> None:
    q, k, v = inputs()
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    check(sparse_attention(q, k, v, allowed), q, k, v, allowed.broadcast_to(2, 4, 70, 90))  # type: ignore[arg-type]
    if len(shape) != 2:
        return
    bias = torch.randn(shape).masked_fill(~allowed, -math.inf)
    everything = torch.ones(70, 90, dtype=torch.bool)
    check(sparse_attention(q, k, v, bias), q, k, v, everything, bias)  # type: ignore[arg-type]


def test_tensor_mask_with_a_row_that_sees_nothing() -> None:
    q, k, v = inputs()
    allowed = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    allowed[1] = False
    out, lse = sparse_attention(q, k, v, allowed, return_lse=True)
    assert not out[1].any() and bool(torch.isneginf(lse[1]).all()) and bool(out[0].any())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    q, k, v = inputs()
    want = sparse_attention(q, k, v, masks.Causal())
    out = sparse_attention(*(LAYOUTS[layout](t) for t in (q, k, v)), masks.Causal())
    assert torch.equal(out, want)  # type: ignore[arg-type]
    if layout == "heads inside tokens":
        assert out.transpose(1, 2).is_contiguous()  # type: ignore[union-attr]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_outputs_are_laid_out_as_queries(order: tuple[int, ...]) -> None:
    """In memory, from the outermost dimension to the innermost: what PyTorch's attention promises."""
    q, k, v = inputs()
    q = q.permute(*order, 3).contiguous().permute(*(order.index(d) for d in range(3)), 3)
    different = masks.per_batch([masks.Causal(), masks.SlidingWindow(5, 5)])
    compiled = torch.compile(sparse_attention, backend="eager", fullgraph=True)
    for out in (
        sparse_attention(q, k, v, masks.Causal()),
        sparse_attention(q, k, v, different),
        fuser.flat.attention(q, k, v),
        fuser.linear_attention(q, k[:, :, :70], v[:, :, :70]),
        compiled(q, k, v),
    ):
        assert sorted(range(4), key=out.stride, reverse=True) == [*order, 3]  # type: ignore[union-attr]
    check(sparse_attention(q, k, v, different), q, k, v, different.dense(70, 90)[:, None])


def test_negative_views() -> None:
    """The imaginary part of a conjugate shares memory with its opposite."""
    clean = inputs()
    q, k, v = (torch.complex(t, -t).conj().imag for t in clean)
    assert all(t.is_neg() for t in (q, k, v)) and torch.equal(q, clean[0])
    want = sparse_attention(*clean, masks.Causal())
    for out in (
        sparse_attention(q, k, v, masks.Causal()),
        fuser.cqs.attention(q, k, v, 3, mask=masks.Causal()),
        fuser.flat.attention(q, k, v, mask=masks.Causal()),
    ):
        torch.testing.assert_close(out, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("layout", ["heads inside tokens", "slice of a wider tensor"])
@pytest.mark.parametrize("heads", [None, 4])
def test_a_document_layout_for_each_batch_entry(layout: str, heads: int | None) -> None:
    q, k, v = (LAYOUTS[layout](t) for t in inputs(3))
    ids = torch.arange(90) // torch.tensor([[9], [30], [90]])

    def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids[b, i] == ids[b, j]) & (i + (0 if heads is None else h) >= j)

    for _ in range(2):
        mask = masks.SlidingWindow(20, 5) & masks.from_mask_mod(documents, heads, batch=3)
        head = torch.zeros(1, dtype=torch.int64) if heads is None else torch.arange(4)
        i, j = torch.arange(70)[:, None], torch.arange(90)
        want = (ids[:, None, :70, None] == ids[:, None, None]) & (i + head[:, None, None] >= j)
        want &= masks.SlidingWindow(20, 5).dense(70, 90)
        out, lse = sparse_attention(q, k, v, mask, return_lse=True)
        check(out, q, k, v, want)
        assert lse.shape == q.shape[:3] and out.stride() == sparse_attention(q, k, v).stride()  # type: ignore[union-attr]
        assert torch.equal(sparse_attention(q, k, v, mask), out)  # type: ignore[arg-type]
        ids[0] = torch.arange(90) // 4


def test_neighbours_with_equal_masks_are_one_call() -> None:
    q, k, v = inputs(3)
    mask = masks.per_batch([masks.Causal(), masks.Causal(), masks.Dense()])
    check(sparse_attention(q, k, v, mask), q, k, v, mask.dense(70, 90)[:, None])  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="for 3 batch entries and q has 2"):
        sparse_attention(*inputs(2), mask)
    with pytest.raises(MaskError, match="at least one"):
        masks.per_batch([])
    with pytest.raises(MaskError, match="3 and 1"):
        mask & masks.per_batch([masks.Dense()])


def test_expanded_batch() -> None:
    q, k, v = inputs(batch=1)
    out = sparse_attention(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), masks.Causal())
    one = sparse_attention(q, k, v, masks.Causal())
    assert torch.equal(out, one.expand(3, -1, -1, -1))  # type: ignore[union-attr,arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(0, 2**32 - 1),
)
def test_any_lengths(batch: int, kv_heads: int, group: int, q_len: int, kv_len: int, seed: int) -> None:
    q, k, v = inputs(batch, kv_heads * group, kv_heads, q_len, kv_len, seed=seed)
    g = torch.Generator().manual_seed(seed)
    allowed = torch.rand(q_len, kv_len, generator=g) < torch.rand(1, generator=g)
    out, lse = sparse_attention(q, k, v, masks.from_dense(allowed), return_lse=True)
    want, sums = exact(q, k, v, allowed) if kv_len else (torch.zeros_like(q), torch.full(q.shape[:3], -math.inf))
    torch.testing.assert_close(out.double(), want.double(), rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.double(), sums.double(), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_plain_pytorch_takes_other_dtypes(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    launch.say.cache_clear()
    q, k, v = (t.to(dtype) for t in inputs())
    with caplog.at_level(logging.WARNING, "fuser"):
        for _ in range(2):
            out, lse = sparse_attention(q, k, v, masks.Causal(), return_lse=True)
    assert [str(dtype) in message for message in caplog.messages] == [True]
    want, sums = exact(q, k, v, masks.Causal().dense(70, 90))
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half precision: one rounding of the result, whose values reach 4.
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-3)
    torch.testing.assert_close(lse.double(), sums, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise BuildError("the compiler is broken")

    launch.say.cache_clear()
    monkeypatch.setattr(launch, "launch", broken)
    q, k, v = inputs()
    with caplog.at_level(logging.WARNING, "fuser"):
        out = sparse_attention(q, k, v, masks.Causal())
    assert "the compiler is broken" in caplog.text
    torch.testing.assert_close(out.double(), exact(q, k, v, masks.Causal().dense(70, 90))[0], rtol=0, atol=5e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("given", ["mask", "tensor", "bias"])
def test_poison_reaches_only_rows_that_may_see_it(given: str, poison: float, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in inputs(kv_heads=4))
    allowed = masks.Strided(7).dense(70, 90)
    mask = {"mask": masks.Strided(7), "tensor": allowed, "bias": torch.where(allowed, 0.0, -math.inf).to(dtype)}[given]
    sees = allowed[:, 21]
    clean = sparse_attention(q, k, v, mask)
    for poisoned in (k, v):
        poisoned[:, :, 21] = math.nan
        out = sparse_attention(q, k, v, mask)
        torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
        assert out[:, :, sees].isnan().all()
        poisoned[:, :, 21] = 0.0
        clean = sparse_attention(q, k, v, mask)
    v[:, :, 21] = poison
    out = sparse_attention(q, k, v, mask)
    torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
    assert not out[:, :, sees].isfinite().any()


def _segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    raise KeyError("segment")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_segment, r"mask_mod\(_segment\) raised KeyError: 'segment'"),
        (lambda b, h, i, j: bool(i > j), "use & | ~ and torch.where"),
        (lambda b, h, i, j: torch.rand((i + j).shape) < 0.5, r"must return one value|different answers"),
        (lambda b, h, i, j: (i >= j) & (j < torch.tensor([5])[b]), "depends on b"),
        (lambda b, h, i, j: i - j, "must return a bool tensor"),
    ],
    ids=["raises", "branches", "random", "batch", "dtype"],
)
def test_functions_that_are_no_masks(function: Any, message: str) -> None:
    mask = masks.from_mask_mod(function)
    for use in (lambda: sparse_attention(*inputs(), mask), lambda: fuser.plan(mask, 70, 90)):
        with pytest.raises(MaskError, match=message):
            use()


def test_threads_change_nothing() -> None:
    q, k, v = inputs()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sparse_attention(q, k, v, masks.Longformer(4, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)  # type: ignore[arg-type]


# ---- errors


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), r"takes q \(B, H, Sq, D\).*\(2, 4, 8\)"),
        (((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)), "batch sizes differ"),
        (((2, 4, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16)), "multiple"),
        (((2, 4, 8, 16), (2, 2, 8, 16), (2, 4, 8, 16)), "multiple"),
        (((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 9, 16)), "as many rows"),
        (((2, 4, 8, 16), (2, 4, 8, 12), (2, 4, 8, 16)), "one width"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(*(torch.zeros(s) for s in shapes), masks.Causal())


def test_dtypes_that_do_not_fit() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"one floating-point dtype.*bfloat16"):
        sparse_attention(q, k.bfloat16(), v, masks.Causal())
    with pytest.raises(ValueError, match="floating-point"):
        sparse_attention(q.long(), k.long(), v.long(), masks.Causal())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("causal", "must be one of fuser.masks"),
        (
            torch.ones(2, 90, dtype=torch.bool),
            r"\(2, 90\) does not broadcast.*\(2, 4, 70, 90\).*mask\[:, None, None, :\]",
        ),
        (torch.ones(70, 90, dtype=torch.int64), "int64"),
        (torch.ones(1, 2, 4, 70, 90, dtype=torch.bool), "does not broadcast"),
        (masks.from_dense(torch.ones(70, 80, dtype=torch.bool)), "kv_len = 90"),
        (masks.per_head([masks.Causal(), masks.Dense()]), r"2 heads and q 4.*\(2, 4, 70, 32\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        sparse_attention(*inputs(), mask)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q", lambda t, cu: sparse_attention(None, t, t)),  # type: ignore[arg-type]
        ("k", lambda t, cu: sparse_attention(t, t.tolist(), t)),
        ("k", lambda t, cu: fuser.flat.attention(t, 1.0, t)),  # type: ignore[arg-type]
        ("q", lambda t, cu: fuser.linear_attention([], t, t)),  # type: ignore[arg-type]
        ("decay", lambda t, cu: fuser.linear_attention(t, t, t, decay=-0.1)),  # type: ignore[arg-type]
        ("v", lambda t, cu: fuser.varlen_attention(t[0], t[0], None, cu)),  # type: ignore[arg-type]
        ("cu_seqlens_q", lambda t, cu: fuser.varlen_attention(t[0], t[0], t[0], [0, 2])),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_tensor_is_named(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a tensor"):
        call(torch.zeros(1, 2, 2, 8), torch.tensor([0, 2]))
