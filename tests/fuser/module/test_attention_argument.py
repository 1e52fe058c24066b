"""``optimize(model, attention=mask)`` restricts attention or raises: nothing runs without the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.ir.errors import MaskError

WINDOW = fuser.masks.SlidingWindow(1, 1)
X = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))


def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()


class Branching(nn.Module):
    """Depends on the values of its input, so that it cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Any:
        return self.layer(x + 1 if float(x.sum()) > 0 else x)


class Filling(nn.Module):
    """Fills a cache of tensors in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return self.layer(x + self.table)


def masked(x: Tensor) -> Tensor:
    result: Tensor = layer()(x, src_mask=~WINDOW.dense(8))
    return result


@torch.no_grad()
def test_a_model_that_cannot_be_captured_raises_with_the_reason_at_every_call() -> None:
    fast = fuser.optimize(Branching().eval(), attention=WINDOW)
    for _ in range(2):
        with pytest.raises(MaskError, match=r"knows nothing of the mask.*could not be captured"):
            fast(X)
    with pytest.raises(MaskError, match="could not be captured"):
        fuser.optimize(Branching().eval(), (X,), attention=WINDOW)


@torch.no_grad()
def test_a_model_that_fills_a_cache_first_is_masked_from_its_first_call() -> None:
    model = Filling().eval()
    got = fuser.optimize(model, attention=WINDOW)(X)
    torch.testing.assert_close(got, masked(X + model.table), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, Callable[[fuser.OptimizedModule], Any]] = {
    "training mode": lambda fast: fast.train()(X),
    "a nested tensor": lambda fast: fast(torch.nested.as_nested_tensor([X[0]])),
    "gradients": lambda fast: fast(X).sum().backward(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_only_the_original_can_do_raises(what: str) -> None:
    with pytest.raises(MaskError, match="knows nothing of the mask"):
        REFUSED[what](fuser.optimize(layer(), attention=WINDOW))


def test_a_method_that_runs_parts_of_the_model_raises() -> None:
    class Encoder(nn.Sequential):
        def encode(self, x: Tensor) -> Any:
            return self[0](x)

    with pytest.raises(MaskError, match="method encode"):
        fuser.optimize(Encoder(layer()).eval(), attention=WINDOW).encode(X)


@torch.no_grad()
@pytest.mark.parametrize("outer", ["module", "optimized", "torch.compile"])
def test_inside_of_another_model_the_mask_stays(outer: str) -> None:
    fast = fuser.optimize(layer(), attention=WINDOW)
    model = nn.Sequential(fast).eval()
    run: Any = model
    if outer == "optimized":
        run = fuser.optimize(model)
    elif outer == "torch.compile":
        run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(X), masked(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_backend_of_torch_compile_keeps_the_mask(gradients: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer(), backend="fuser", options={"attention": WINDOW})
    with torch.set_grad_enabled(gradients):
        got = compiled(X)
    torch.testing.assert_close(got.detach(), masked(X).detach(), rtol=1e-5, atol=1e-5)
    if gradients:
        with pytest.raises(MaskError, match="gradients are found by calling it again"):
            got.sum().backward()


class Cross(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])


@torch.no_grad()
def test_a_model_in_which_nothing_takes_the_mask_raises() -> None:
    with pytest.raises(MaskError, match="found no attention"):
        fuser.optimize(nn.Linear(32, 32).eval(), attention=WINDOW)(X)
    with pytest.raises(MaskError, match="other numbers of keys than queries"):
        fuser.optimize(Cross().eval(), attention=WINDOW)(X[:, :1], X)


class Sigmoid(nn.Module):
    """A layer of attention that is known, and another whose weights are no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return torch.sigmoid(x @ x.mT) @ x


@torch.no_grad()
def test_a_second_attention_that_would_miss_the_mask_raises() -> None:
    with pytest.raises(MaskError, match=r"may be attention in a form that fuser does not know"):
        fuser.optimize(Sigmoid().eval(), attention=WINDOW)(X)


@torch.no_grad()
def test_a_graph_of_dynamo_without_attention_raises() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), layer()

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    torch._dynamo.reset()
    with pytest.raises(MaskError, match=r"attention between its graphs would miss the mask.*fullgraph=True"):
        torch.compile(Broken().eval(), backend="fuser", options={"attention": WINDOW})(X)
