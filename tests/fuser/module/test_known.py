"""Masks given at run time that return: planned by their entries, and never taken for another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser
from fuser.module.known import KnownMasks, fingerprint
from fuser.module.optimized import OptimizedModule

LENGTH, HEADS, WIDTH = 512, 2, 32
X = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
STRIDED = fuser.masks.Strided(64).dense(LENGTH)
WINDOW = fuser.masks.SlidingWindow(16, 16).dense(LENGTH).contiguous()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.fixture
def fast() -> OptimizedModule:
    return fuser.optimize(Attention().eval(), search="model")


def check(fast: OptimizedModule, mask: Tensor, x: Tensor = X) -> None:
    exact = Attention().double()
    exact.load_state_dict({name: value.double() for name, value in fast.state_dict().items()})
    number = mask if mask.dtype == torch.bool else mask.double()
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask).double(), exact(x.double(), number), rtol=0, atol=5e-6)


def planned(fast: OptimizedModule) -> int:
    """Programs that were made for the entries of a mask."""
    return sum(bool(compiled.captured.known) for compiled in fast.programs)


def settled(fast: OptimizedModule, *masks: Tensor) -> None:
    """Bring masks until they are planned."""
    for _ in range(6):
        for mask in masks:
            check(fast, mask)
    assert planned(fast) == len(masks)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_that_returns_is_planned_and_a_copy_of_it_is_the_same(fast: OptimizedModule, additive: bool) -> None:
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~STRIDED, -torch.inf) if additive else STRIDED
    settled(fast, mask)
    check(fast, mask.clone())
    assert planned(fast) == 1
    (compiled,) = (c for c in fast.programs if c.captured.known)
    assert any(
        "mask" in op.name and op.semantics.pattern is not None
        for op in compiled.graph.operators
        if hasattr(op.semantics, "pattern")
    )


def test_a_mask_that_changes_in_place_is_another(fast: OptimizedModule) -> None:
    mask = STRIDED.clone()
    settled(fast, mask)
    for change in (lambda: mask[:, :300].logical_not_(), lambda: mask.copy_(WINDOW), lambda: mask.fill_(True)):
        change()
        check(fast, mask)
    # Not even PyTorch knows of these.
    mask.numpy()[5] = False
    mask.numpy()[5, 7] = True
    check(fast, mask)
    mask.copy_(STRIDED)
    check(fast, mask)


def test_another_mask_in_the_same_memory_is_another(fast: OptimizedModule) -> None:
    memory = torch.empty(STRIDED.numel(), dtype=torch.bool)
    settled(fast, memory.copy_(STRIDED.flatten()).view_as(STRIDED))
    for mask in (WINDOW, STRIDED, WINDOW):
        check(fast, memory.copy_(mask.flatten()).view_as(mask))


def test_several_masks_and_weights_that_change(fast: OptimizedModule) -> None:
    settled(fast, STRIDED, WINDOW)
    with torch.no_grad():
        fast.qkv.weight.mul_(1.5)
    for mask in (STRIDED, WINDOW, STRIDED | WINDOW):
        check(fast, mask)
    fast.refresh()
    check(fast, STRIDED)
    assert planned(fast) == 0


BIAS = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("mask", [BIAS, torch.stack([STRIDED, WINDOW])[:, None]], ids=["bias", "of samples"])
def test_what_no_plan_makes_faster_is_tried_once(fast: OptimizedModule, mask: Tensor) -> None:
    for _ in range(8):
        check(fast, mask)
    assert planned(fast) == 0 and len(fast.programs) == 1


def test_gradients_to_a_mask_arrive() -> None:
    model = Attention().eval()
    fast = fuser.optimize(model, search="model")
    results = []
    for run in (model, fast):
        for _ in range(4):
            bias = torch.zeros(LENGTH, LENGTH).masked_fill(~STRIDED, -torch.inf).requires_grad_()
            run(X, bias).square().sum().backward()
        results.append(bias.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_masks_that_never_return_are_looked_at_ever_less() -> None:
    known = KnownMasks()
    looks = 0
    for i in range(1000):
        if known.looks_at("call"):
            looks += 1
            assert not known.returns("call", i)
    assert looks < 40
    assert len(known._seen) <= 32
    # One that returns is looked at each time again.
    assert not known.returns("call", "mask") and known.returns("call", "mask")
    known.tried("mask")
    assert not known.returns("call", "mask")


def test_fingerprints_are_of_contents() -> None:
    expanded = STRIDED.expand(4, 2, -1, -1)
    assert fingerprint(STRIDED) == fingerprint(STRIDED.clone()) != fingerprint(WINDOW)
    assert fingerprint(expanded) == fingerprint(STRIDED.clone().expand(4, 2, -1, -1)) != fingerprint(STRIDED)
    assert fingerprint(STRIDED.float()) != fingerprint(STRIDED.double())
    assert fingerprint(STRIDED.T) == fingerprint(STRIDED.T.contiguous())
    assert fingerprint(STRIDED.float().requires_grad_()) is None
    assert fingerprint(STRIDED.to("meta")) is None


class Biased(Attention):
    """With a bias that follows from the tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, (x @ x.mT / WIDTH)[:, None] + mask)


def test_tokens_that_biases_are_computed_from_are_no_masks() -> None:
    fast = fuser.optimize(Biased().eval(), search="model")
    x, mask = torch.randn(8, LENGTH, 2 * WIDTH)[..., :WIDTH], torch.zeros(LENGTH, LENGTH)
    with torch.no_grad():
        fast(torch.cat([x] * 4), mask)
    (program,) = fast.programs
    assert program.mask_inputs == (1,)
