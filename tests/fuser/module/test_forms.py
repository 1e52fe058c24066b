"""A model that is captured once serves calls of all sizes, as the model itself does."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser import masks
from fuser.ir.errors import MaskError

WIDTH, HEADS = 32, 2
TOLERANCE = 1e-5
"""Relative to the largest number: rounding of fp32 through two layers."""


class Block(nn.Module):
    """A transformer layer whose attention is written out, with a mask that ``allowed`` makes of indices."""

    def __init__(self, allowed: Any = None, positions: int = 64) -> None:
        super().__init__()
        self.allowed = allowed
        self.embed = nn.Embedding(50, WIDTH)
        self.places = nn.Embedding(positions, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        b, s = ids.shape
        at = torch.arange(s)
        x = self.embed(ids) + self.places(at)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed(at[:, None], at), -math.inf)
        if padding is not None:
            scores = scores.masked_fill(~padding[:, None, None], -math.inf)
        x = self.norm(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, WIDTH)))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


MASKS = {
    "none": None,
    "causal": lambda i, j: j <= i,
    "window": lambda i, j: (i - j).abs() <= 2,
    "global": lambda i, j: ((i - j).abs() <= 1) | (j < 1) | (i < 1),
}


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def agree(found: Tensor, model: nn.Module, *given: Tensor) -> None:
    expected = copy.deepcopy(model).double()(*given)
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()) if expected.numel() else 0
    )


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_one_capture_serves_all_sizes(mask: str, captures: list[str]) -> None:
    model = Block(MASKS[mask]).eval()
    fast = fuser.optimize(model, search="model")
    for batch, length in [(3, 7), (2, 8), (4, 4), (7, 3), (2, 2), (2, 33), (3, 7)]:
        ids = ids_of(batch, length)
        agree(fast(ids), model, ids)
    assert captures == ["all"]
    assert fast.fallbacks == () and fast.specialized == () and fast.unfused == ()
    assert {tuple(p.sizes.values()) for p in fast.programs} == {(3, 7), (2, 8), (4, 4), (7, 3), (2, 2), (2, 33)}


@torch.no_grad()
def test_sizes_of_one_and_zero_are_right(captures: list[str]) -> None:
    model = Block(MASKS["causal"]).eval()
    fast = fuser.optimize(model, search="model")
    for batch, length in [(1, 1), (1, 9), (3, 1), (1, 10), (4, 1), (2, 5), (0, 5), (2, 0)]:
        ids = ids_of(batch, length)
        agree(fast(ids), model, ids)
    # One for each of: one token, one sequence, one token of several; several, and empty ones.
    assert captures.count("all") <= 6


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_a_padding_mask_of_any_size(calls: list[tuple[int, int]]) -> None:
    for batch, length in calls:
        ids = ids_of(batch, length)
        padding = torch.arange(length) < 1 + torch.arange(batch)[:, None] % length
        agree(PADDED[1](ids, padding), PADDED[0], ids, padding)
    assert PADDED[1].fallbacks == ()


PADDED = (model := Block(MASKS["causal"]).eval(), fuser.optimize(model, search="model"))


@torch.no_grad()
def test_a_model_that_does_something_else_from_some_length_on_does_so(captures: list[str]) -> None:
    class Long(Block):
        def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
            out = super().forward(ids)
            return out * 2.0 if ids.shape[1] > 8 else out

    model = Long().eval()
    fast = fuser.optimize(model, search="model")
    for length in (6, 8, 9, 12, 7, 10):
        agree(fast(ids_of(2, length)), model, ids_of(2, length))
    assert captures == ["all", "all"] and fast.fallbacks == ()


@torch.no_grad()
def test_why_a_length_was_captured_alone_is_said(captures: list[str]) -> None:
    class Mean(Block):
        def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
            return super().forward(ids) / math.sqrt(ids.shape[1])

    model = Mean().eval()
    fast = fuser.optimize(model, search="model")
    for length in (6, 8, 9):
        agree(fast(ids_of(2, length)), model, ids_of(2, length))
    assert captures == ["all"] * 3 and len(fast.specialized) == 3
    assert "not captured for all sizes" in fast.report()
    agree(fast(ids_of(5, 9)), model, ids_of(5, 9))
    assert captures == ["all"] * 3


@torch.no_grad()
def test_lengths_beyond_the_positions_raise_the_model_s_own_error() -> None:
    model = Block(positions=12).eval()
    fast = fuser.optimize(model, search="model")
    agree(fast(ids_of(2, 7)), model, ids_of(2, 7))
    with pytest.raises(IndexError):
        fast(ids_of(2, 13))
    agree(fast(ids_of(2, 12)), model, ids_of(2, 12))


@torch.no_grad()
def test_new_weights_reach_the_programs_of_all_sizes() -> None:
    model = Block(MASKS["window"]).eval()
    fast = fuser.optimize(model, search="model")
    fast(ids_of(2, 7)), fast(ids_of(3, 9))
    model.qkv.weight.mul_(1.5)
    model.places.weight.add_(0.5)
    for batch, length in [(2, 7), (3, 9), (2, 10)]:
        agree(fast(ids_of(batch, length)), model, ids_of(batch, length))


@torch.no_grad()
def test_a_mask_in_a_buffer_is_read_again_when_it_changes(captures: list[str]) -> None:
    class Buffered(Block):
        def __init__(self) -> None:
            super().__init__(lambda i, j: self.seen[: i.shape[0], : j.shape[0]])
            self.register_buffer("seen", torch.ones(64, 64, dtype=torch.bool).tril())

    model = Buffered().eval()
    fast = fuser.optimize(model, search="model")
    for length in (5, 9, 6):
        agree(fast(ids_of(2, length)), model, ids_of(2, length))
    assert captures == ["all"]
    model.seen.copy_(torch.ones(64, 64, dtype=torch.bool).tril(1))
    for length in (5, 9, 7):
        agree(fast(ids_of(2, length)), model, ids_of(2, length))


@torch.no_grad()
def test_which_dimensions_differ_can_be_said(captures: list[str]) -> None:
    class Images(nn.Module):
        def forward(self, *, images: Tensor, scale: Tensor) -> Tensor:
            return images.flatten(2).softmax(-1) * scale

    model = Images().eval()
    fixed, fast = fuser.optimize(model), fuser.optimize(model, dynamic={"images": (0, -1)})
    for width in (5, 6, 7):
        given = {"images": torch.randn(2, 3, 4, width), "scale": torch.ones(1)}
        for optimized in (fixed, fast):
            torch.testing.assert_close(optimized(**given), model(**given), rtol=1e-5, atol=1e-7)
    assert captures == ["all"] * 4 and fast.specialized == ()
    one = fuser.optimize(model, dynamic=False)
    assert one(images=torch.randn(2, 3, 4, 4), scale=torch.ones(1)).shape == (2, 3, 16)
    assert captures[4:] == ["one"]
    with pytest.raises(TypeError, match="dynamic"):
        fuser.optimize(model, dynamic=3)  # type: ignore[arg-type]


@torch.no_grad()
def test_programs_of_many_sizes_are_bounded_and_bind_without_kernels_being_built(captures: list[str]) -> None:
    model = Block().eval()
    fast = fuser.optimize(model, search="model")
    for length in (*range(2, 60), *range(2, 60)):
        out = fast(ids_of(3, length))
        assert out.shape == (3, length, WIDTH)
    agree(fast(ids_of(5, 31)), model, ids_of(5, 31))
    assert captures == ["all"] and len(fast.programs) <= 64


@torch.no_grad()
def test_threads_with_sizes_of_their_own() -> None:
    model = Block(MASKS["causal"]).eval()
    fast = fuser.optimize(model, search="model")
    expected = {(b, s): model(ids_of(b, s)) for b in (1, 2, 3) for s in range(2, 12)}
    wrong: list[Any] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(seed)).tolist()
            for i in order:
                size = list(expected)[i]
                try:
                    torch.testing.assert_close(fast(ids_of(*size)), expected[size], rtol=1e-4, atol=1e-5)
                except Exception as error:
                    wrong.append((size, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_sparse_attention_inside_a_model_is_bound_to_every_length() -> None:
    class Sparse(nn.Module):
        def __init__(self, mask: masks.Mask) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.mask = nn.Linear(64, 192), mask

        def forward(self, x: Tensor) -> Any:
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return fuser.sparse_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)

    model = Sparse(masks.SlidingWindow(5, 2)).eval()
    fast = fuser.optimize(model, search="model")
    for length in (30, 41, 55):
        x = torch.randn(2, length, 64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(fast.programs) == 3 and all(compiled.sizes for compiled in fast.programs)
    assert len({id(compiled.captured) for compiled in fast.programs}) == 1
    fixed = fuser.optimize(Sparse(masks.from_dense(torch.ones(30, 30, dtype=torch.bool).tril())).eval(), search="model")
    x = torch.randn(2, 30, 64)
    torch.testing.assert_close(fixed(x), fixed._model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(MaskError, match="30x30"):
        fixed(torch.randn(2, 31, 64))
