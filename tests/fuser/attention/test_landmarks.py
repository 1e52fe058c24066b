"""What LARA consists of, under fuser.optimize and by itself: averages with their sums, and importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.attention.landmarks import averages, importance_attention, log_sums


class Called(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, exact: Tensor) -> None:
    # Sums of fp32.
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6)


def families(model: nn.Module) -> list[str]:
    return [kernel.family for kernel in model.kernels for _ in range(kernel.calls)]


@pytest.mark.parametrize(("queries", "keys"), [(49, 300), (5, 37), (1, 1)])
def test_averages_and_their_sums_are_one_kernel(queries: int, keys: int) -> None:
    q, k, v, bias = normal(2, 3, queries, 16), normal(2, 3, keys, 16), normal(2, 3, keys, 24), normal(2, 3, 1, keys)
    bias[0, 1] = -math.inf
    fast = fuser.optimize(Called(averages).eval(), search="model", dynamic=False)
    out, sums = fast(q, k, v, bias)
    scores = q.double() @ k.double().mT / 4 + bias.double()
    exact = scores.exp()
    close(out, exact @ v.double() / exact.sum(-1, keepdim=True).clamp(min=1e-300))
    close(sums, scores.logsumexp(-1))
    assert families(fast) == ["attention"] and fast.fallbacks == ()


@pytest.mark.parametrize("masked", [False, True])
def test_sums_alone_need_no_values(masked: bool) -> None:
    q, k, more = normal(2, 3, 49, 16), normal(2, 3, 130, 16), [normal(2, 3, 1, 130)] if masked else []
    fast = fuser.optimize(Called(log_sums).eval(), search="model", dynamic=False)
    scores = q.double() @ k.double().mT / 4 + (more[0].double() if masked else 0.0)
    close(fast(q, k, *more), scores.logsumexp(-1))
    assert families(fast) == ["attention"] and fast.fallbacks == ()


def test_sums_lie_as_queries_do() -> None:
    """Tokens before heads, so that elementwise operators read them beside what else is made of the queries."""

    def function(q: Tensor, k: Tensor) -> Tensor:
        return log_sums(q, k) - q.square().sum(-1)

    q, k = normal(2, 49, 3, 16).transpose(1, 2), normal(2, 3, 130, 16)
    fast = fuser.optimize(Called(function).eval(), search="model", dynamic=False)
    close(fast(q, k), (q.double() @ k.double().mT / 4).logsumexp(-1) - q.double().square().sum(-1))
    assert sorted(families(fast)) == ["attention", "pointwise", "rowwise"] and not fast.unfused


def weighted(q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, *rest: Tensor) -> Tensor:
    return importance_attention(q, k, v, landmarks, *rest, 2.0)


def operands(tokens: int, landmarks: int) -> list[Tensor]:
    shapes = [(2, 3, tokens, 16), *[(2, 3, landmarks, 16)] * 3]
    parts = [normal(*shape) for shape in shapes]
    sums = (parts[0] @ parts[3].mT / 4).logsumexp(-2)
    return [*parts, sums, normal(2, 3, landmarks).abs() / 9, normal(2, 3, landmarks)]


@pytest.mark.parametrize(("tokens", "landmarks"), [(300, 49), (70, 5), (3, 1), (65, 130)])
def test_importance_weights_are_made_inside_of_attention(tokens: int, landmarks: int) -> None:
    q, k, v, marks, sums, heuristic, offset = given = operands(tokens, landmarks)
    fast = fuser.optimize(Called(weighted).eval(), search="model", dynamic=False)
    near = (q.double() @ marks.double().mT / 4 - sums.double()[:, :, None]).exp()
    alpha = heuristic.double()[:, :, None] + 2 * (near - near.sum(-1, keepdim=True) / landmarks)
    assert (alpha < 1e-8).any() or landmarks == 1
    weights = alpha.clamp(min=1e-8) * (q.double() @ k.double().mT / 4 + offset.double()[:, :, None]).exp()
    close(fast(*given), weights @ v.double() / weights.sum(-1, keepdim=True))
    assert families(fast) == ["attention"] and fast.fallbacks == ()


def test_more_landmarks_than_a_block_holds_are_right_as_well() -> None:
    given = operands(40, 300)
    fast = fuser.optimize(Called(weighted).eval(), search="model", dynamic=False)
    close(fast(*given), weighted(*(t.double() for t in given)))


def test_what_lara_consists_of_has_gradients() -> None:
    q, k, v, marks, sums, heuristic, offset = (t[:1, :1].double() for t in operands(5, 3))
    # Weights that are clamped have none.
    given = [t.requires_grad_() for t in (q, k, v, marks, sums, heuristic + 3, offset)]
    assert torch.autograd.gradcheck(weighted, given)
    assert torch.autograd.gradcheck(
        averages, [t.detach().clone().requires_grad_() for t in (k, q, q, q[..., 0].unsqueeze(-2))]
    )
