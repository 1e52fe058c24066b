"""Models that cannot be captured, or that remember: they run as they are, and are said to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import WIDTH, Model, X, assert_same, check, optimize
from torch import Tensor, nn

import fuser

pytestmark = pytest.mark.usefixtures("no_grad")


@torch.library.custom_op("fuser_tests::twice_", mutates_args=("x",))
def twice_(x: Tensor) -> None:
    x.mul_(2)


def custom_mutation(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    twice_(y)
    return model.linear(y)


def asserting(model: Any, x: Tensor) -> Tensor:
    torch._assert_async(x.sum() < 1e9, "too large")
    return model.linear(x)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.linear(x) if x.sum() > 0 else m.linear(-x), "could not be captured"),
        (lambda m, x: m.linear(x) * x.sum().item(), "makes a number from the values"),
        (lambda m, x: m.linear(x)[x > 0], "depends on the values"),
        (lambda m, x: m.linear(x).relu().nonzero(), "depends on the values"),
        (lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), "cannot look into"),
        (lambda m, x: m.linear(x).to_sparse().to_dense(), "layout torch.sparse_coo"),
        (custom_mutation, "cannot look into"),
        (asserting, "checks or changes"),
        (lambda m, x: {"hidden": Opaque(m.linear(x)).tensor, "opaque": OPAQUE}, "returns a Opaque"),
    ],
    ids=["branch", "item", "mask", "nonzero", "cond", "sparse", "mutation", "assertion", "object"],
)
def test_a_model_that_cannot_be_captured_runs_as_it_is(run: Callable[..., Any], reason: str) -> None:
    fast = check(Model(run), X)
    assert len(fast.programs) == 0
    assert len(fast.fallbacks) == 1 and reason in fast.fallbacks[0]
    assert fast.unfused == (("*", fast.fallbacks[0]),)
    assert reason in fast.report()


class Opaque:
    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor


OPAQUE = Opaque(None)


def test_assertions_of_a_model_stay() -> None:
    with pytest.raises(RuntimeError, match="too large"):
        optimize(Model(asserting))(X + 1e9)


class Counting(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        if plain:
            self.count = torch.zeros(())
        else:
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) * self.count


class Remembering(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(WIDTH, WIDTH), how
        self.calls, self.last, self.history, self.named = 0, None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls += self.how == "number"
        if self.how == "tensor":
            y, self.last = (y if self.last is None else y + self.last), y
        elif self.how == "list":
            self.history.append(y)
        elif self.how == "dict":
            self.named[len(self.named)] = y
        return y * (self.calls + 1) + len(self.history) + len(self.named)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Counting(False),
        lambda: Counting(True),
        lambda: Remembering("number"),
        lambda: Remembering("tensor"),
        lambda: Remembering("list"),
        lambda: Remembering("dict"),
        lambda: nn.Embedding(50, WIDTH, max_norm=1.0),
        lambda: nn.BatchNorm1d(16).train(),
    ],
    ids=["buffer", "constant", "number", "tensor", "list", "dict", "max_norm", "batch norm"],
)
def test_a_model_with_a_memory_keeps_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    twin = make()
    if not model.training:
        model.eval(), twin.eval()
    # A layer in training mode inside a model in evaluation mode.
    holder = nn.Sequential(model)
    holder.training = False
    fast = fuser.optimize(holder, search="model")
    x = torch.tensor([[1, 7, 1]]) if isinstance(model, nn.Embedding) else X
    for _ in range(4):
        assert_same(fast(x), twin(x))
    assert fast.programs == ()
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def test_a_model_that_fills_a_cache_is_fused_afterwards() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cache = nn.Linear(WIDTH, WIDTH), None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.arange(WIDTH).float()
            return self.linear(x) + self.cache

    model = Caching()
    fast = optimize(model)
    for _ in range(3):
        assert_same(fast(X), model(X))
    assert len(fast.programs) == 1
