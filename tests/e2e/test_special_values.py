"""Infinities, values that are no number, and the ends of the range: as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from awkward import INF, NAN, SDPA, WIDTH, B, Model, S, X, assert_same, check, optimize, qkv
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("no_grad")


SPECIAL = torch.tensor(
    [NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, 3.4e38, -3.4e38, 88.8, -88.8, 100, -200, 1e-45, 0.5, -1, 20]
)
ONE = (NAN, INF, -INF, 1e-40)


@pytest.mark.parametrize(
    "function",
    [
        *(torch.relu, F.silu, torch.tanh, torch.sigmoid, torch.exp, torch.log, torch.erf, torch.sqrt, torch.rsqrt),
        *(torch.reciprocal, torch.neg, torch.abs, torch.square, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_special_values_through_elementwise_operators(function: Callable[[Tensor], Tensor]) -> None:
    x = SPECIAL.repeat(2, 1)
    ours, eager = optimize(Model(lambda m, x: function(x)))(x), function(x)
    assert torch.equal(ours.isnan(), eager.isnan())
    close = (ours == eager) | eager.isnan() | ((ours - eager).abs() <= 3e-6 * eager.abs() + 1e-30)
    assert bool(close.all()), (x[~close], ours[~close], eager[~close])


def test_special_values_through_gelu() -> None:
    # PyTorch's own vectorized GELU makes NaN of infinity, so the truth is float64.
    x = SPECIAL[3:].repeat(2, 1)
    ours, exact = optimize(Model(lambda m, x: F.gelu(x)))(x), F.gelu(x.double())
    assert bool(((ours - exact).abs() <= 1e-6 * exact.abs() + 1e-15).all())
    assert bool(optimize(Model(lambda m, x: F.gelu(x)))(torch.full((2, 19), NAN)).isnan().all())


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum])
def test_special_values_in_pairs(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    n = len(SPECIAL)
    a, b = SPECIAL[:, None].expand(n, n).contiguous(), SPECIAL[None].expand(n, n).contiguous()
    ours, eager = optimize(Model(lambda m, a, b: function(a, b)))(a, b), function(a, b)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours[~eager.isnan()], eager[~eager.isnan()])


def test_one_special_value_spreads_as_in_eager() -> None:
    torch.manual_seed(0)
    for model in (
        Model(lambda m, x: F.softmax(x, -1)),
        Model(lambda m, x: torch.logsumexp(x, -1)),
        nn.LayerNorm(WIDTH),
        nn.RMSNorm(WIDTH),
        Model(lambda m, x: m.linear(x)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
    ):
        fast = optimize(model)
        for value in ONE:
            x = X.clone()
            x[0, 3, 5] = value
            assert_same(fast(x), model(x))
    plain, masked = optimize(SDPA), optimize(SDPA)
    for value in ONE:
        for i in range(3):
            operands = [t.clone() for t in qkv()]
            operands[i][0, 1, 4, 3] = value
            assert_same(plain(*operands), SDPA(*operands))
        mask = torch.zeros(B, 1, S, S)
        mask[0, 0, 2, 7] = value
        assert_same(masked(*qkv(), mask), SDPA(*qkv(), mask))


def test_nothing_but_extremes() -> None:
    check(Model(lambda m, x: F.softmax(x, -1)), torch.full((2, 4, WIDTH), -INF))
    check(Model(lambda m, x: F.softmax(x.transpose(1, 2), -1)), torch.full((2, 4, WIDTH), -INF))
    check(Model(lambda m, x: F.softmax(x, -1)), X * 1e30)
    for value in (-INF, INF, -3e38, 3e38):
        check(Model(lambda m, x: torch.logsumexp(x, -1, keepdim=True)), torch.full((2, 4, WIDTH), value))
    check(nn.LayerNorm(WIDTH), torch.full((2, 4, WIDTH), 5.0))
    check(nn.LayerNorm(WIDTH), X * 1e18)
    check(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), X * 1e-42)
