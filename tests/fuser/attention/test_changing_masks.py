"""Document ids that are rewritten for the next batch: attention, gradients, graphs and programs follow, or say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Block, X, inputs, relative
from attention_reference import exact
from torch import Tensor

import fuser
from fuser import masks, sparse_attention
from fuser.ir.errors import MaskError

LENGTH = 50


class Documents:
    """A mask over documents, and its ids."""

    def __init__(self, size: int = 7) -> None:
        self.ids = torch.zeros(LENGTH, dtype=torch.int64)
        self.next(size)

    def next(self, size: int) -> None:
        self.ids.copy_(torch.arange(len(self.ids)) // size)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (self.ids[i] == self.ids[j]) & (i >= j)

    @property
    def dense(self) -> Tensor:
        return (self.ids[:, None] == self.ids) & torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()


def check(out: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    # Single precision: some dozen roundings of a sum of products.
    assert relative(out, exact(q, k, v, allowed)[0]) < 1e-6


@pytest.mark.parametrize("derived", [False, True])
def test_the_next_batch_has_its_own_plan(derived: bool) -> None:
    documents = Documents()
    q, k, v = inputs(1, 2, 2, LENGTH, LENGTH)
    mask: masks.Mask = masks.from_mask_mod(documents.allowed)
    mask = masks.SlidingWindow(9, 0) & mask if derived else mask
    for size in (7, 11, 7, 50):
        documents.next(size)
        window = masks.SlidingWindow(9, 0).dense(LENGTH)
        allowed = documents.dense & window if derived else documents.dense
        check(sparse_attention(q, k, v, mask), q, k, v, allowed)
        fresh = masks.from_mask_mod(documents.allowed)
        check(sparse_attention(q, k, v, fresh & masks.SlidingWindow(9, 0) if derived else fresh), q, k, v, allowed)
        check(fuser.cqs.attention(q, k, v, 3, mask=mask), q, k, v, allowed)
        check(fuser.flat.attention(q, k, v, mask=mask), q, k, v, allowed)


def test_functions_of_equal_entries_part_when_one_changes() -> None:
    q, k, v = inputs(1, 2, 2, LENGTH, LENGTH)
    one, two = Documents(), Documents()
    first, second = masks.from_mask_mod(one.allowed), masks.from_mask_mod(two.allowed)
    assert torch.equal(sparse_attention(q, k, v, first), sparse_attention(q, k, v, second))  # type: ignore[arg-type]
    one.next(20)
    check(sparse_attention(q, k, v, second), q, k, v, two.dense)
    check(sparse_attention(q, k, v, first), q, k, v, one.dense)


def test_gradients_of_a_mask_that_has_changed_are_refused() -> None:
    # Of a size that no other test has: a mask of the same entries that is what it was would do as well.
    documents = Documents(13)
    q, k, v = inputs(1, 2, 2, LENGTH, LENGTH)
    out = sparse_attention(q.requires_grad_(), k, v, masks.from_mask_mod(documents.allowed))
    documents.next(20)
    with pytest.raises(MaskError, match="until gradients have been computed"):
        out.sum().backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["model", "model, unfused", "argument"])
def test_programs_follow(where: str) -> None:
    documents = Documents()
    mask = masks.from_mask_mod(documents.allowed)
    block = Block(None if where == "argument" else mask, lse=where == "model, unfused").eval()
    fast = fuser.optimize(block, (X,), attention=mask if where == "argument" else None)
    reference = Block(mask, lse=block.lse).eval()
    for size in (7, 7, 20):
        documents.next(size)
        with torch.no_grad():
            torch.testing.assert_close(fast(X), reference(X), rtol=1e-6, atol=2e-6)
    assert fast.fallbacks == () and len(fast.programs) == 1


def test_a_graph_of_an_old_mask_says_so() -> None:
    documents = Documents(17)
    block = Block(masks.from_mask_mod(documents.allowed)).eval()
    program = torch.export.export(block, (X,)).module()
    with torch.no_grad():
        want = block(X)
        torch.testing.assert_close(program(X), want)
        documents.next(20)
        with pytest.raises(MaskError, match="trace or compile again"):
            program(X)
        documents.next(17)
        torch.testing.assert_close(program(X), want)
