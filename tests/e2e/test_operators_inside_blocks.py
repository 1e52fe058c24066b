"""Operators that no kernel runs, between those that kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import INF, NAN, WIDTH, Model, X, assert_same, check, optimize
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_grad")


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x.clone().add_(1))
    y[:, 0] = 0
    y.relu_()
    return m.linear(y)


@torch.library.custom_op("fuser_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "run",
    [
        in_place,
        lambda m, x: m.linear(torch.cumsum(m.linear(x), 1)).relu(),
        lambda m, x: m.linear(torch.topk(m.linear(x), WIDTH).values),
        lambda m, x: m.linear(torch.fft.fft(m.linear(x)).conj().imag),
        lambda m, x: m.linear(twice(m.linear(x))),
        lambda m, x: torch.add(m.linear(x), x, alpha=2),
        lambda m, x: m.linear(x) * 1e300 + 1e-300,
        lambda m, x: (m.linear(x) ** 0, x**1.5, x**-1, x**3, x**0.5),
        lambda m, x: (m.linear(x).relu() + INF, x * NAN, x + True, x / 3, 3 / x, 1 - x),
        lambda m, x: (m.linear(x[0, 0]), m.linear(x[None, :, None])),
        lambda m, x: (m.linear(x).double().float(), m.linear(x).half().float(), (9 * m.linear(x)).int().float()),
        lambda m, x: F.layer_norm(m.linear(x).transpose(1, 2), (16,)),
        lambda m, x: (m.linear(x).softmax(1), m.linear(x).transpose(0, 2).softmax(-1)),
        lambda m, x: F.dropout(m.linear(x), 0.5, m.training),
    ],
    ids=[
        "in place",
        "cumsum",
        "topk",
        "conjugate",
        "custom",
        "alpha",
        "huge",
        "powers",
        "constants",
        "dims",
        "casts",
        "strided norm",
        "other softmax",
        "dropout",
    ],
)
def test_operators_inside_blocks(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X)
    assert fast.fallbacks == ()
    assert len(fast.kernels) > 0


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.linear(m.linear(x).amax(-1, True) + m.linear(x)[:, :1]),
        lambda m, x: m.linear(m.linear(x)[:, :1] - m.linear(x).amax(-1, True)),
        lambda m, x: m.linear(m.linear(x)[:1] * m.linear(x)[:, 3:4]),
    ],
    ids=["column and row", "row and column", "of samples and tokens"],
)
def test_what_broadcasts_from_both_sides_is_a_kernel(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X)
    assert fast.fallbacks == () and fast.unfused == () and fast.outside == ()


KEPT = torch.rand(2, 16, generator=torch.Generator().manual_seed(5)) > 0.4


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x, kept: m.linear(m.linear(x).masked_fill(kept[..., None], 0)),
        lambda m, x, kept: m.linear(m.linear(x).masked_fill(kept[..., None], torch.tensor(-2.0))),
        lambda m, x, kept: m.linear(torch.where(kept[..., None], m.linear(x), x)),
        lambda m, x, kept: m.linear(torch.where(kept[..., None], NAN * x, m.linear(x)).masked_fill(kept[..., None], 1)),
        lambda m, x, kept: m.linear(torch.where(kept[:1, :, None], -1.0, m.linear(x).relu())),
        lambda m, x, kept: m.linear(torch.where(kept[:, None, :], m.linear(x).mT, 3.0).mT),
        lambda m, x, kept: F.layer_norm(torch.where(kept[0], x[:, :, :16], x[:, :, 16:]), (16,)),
        lambda m, x, kept: m.linear(torch.where(kept[..., None], m.linear(x).bfloat16(), x).float()),
    ],
    ids=["filled", "by a tensor", "of two", "not chosen", "of samples", "transposed", "by column", "of two dtypes"],
)
def test_conditions_choose_inside_of_kernels(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X, KEPT)
    assert fast.fallbacks == () and fast.unfused == () and fast.outside == ()


def test_random_numbers_are_drawn_in_the_order_of_the_model() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.linear(x)
        noisy = F.dropout(y.cumsum(1), 0.5, True) + torch.rand_like(y)
        torch.rand(5)
        return noisy, torch.rand(3), torch.randn_like(x)

    model = Model(run)
    fast = optimize(model)
    fast(X)
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert_same(fast(X), expected)
    assert fast.fallbacks == ()
