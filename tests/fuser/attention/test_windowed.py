"""Attention to windows and summaries as one over joined keys: against all pairs, and captured for all lengths."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.attention import build
from fuser.attention.windowed import is_known_to, windowed_attention
from fuser.ir.windows import Windowed, by_sums

CASES = [
    (Windowed(8, 0, 0, 4, relative=True), 37),
    (Windowed(8, 8, 0, 2, relative=True), 64),
    (Windowed(16, 16, 0, 8), 5),
    (Windowed(8, 4, 4, relative=True), 40),
    (Windowed(4), 16),
]


def operands(how: Windowed, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 2, 2, tokens, 16, generator=generator)
    far = torch.randn(2, 2, 2, tokens // how.chunk if how.chunk else 3, 16, generator=generator)
    reach = 2 * how.window + how.before + how.after - 1
    distances = torch.randn(2, reach, generator=generator)
    # Query row and key of a window are row - key + before apart.
    row, key = torch.arange(how.window)[:, None], torch.arange(how.before + how.window + how.after)
    bias = distances[:, row - key + how.window + how.after + how.before - 1]
    return q, k, v, far[0], far[1], bias


def exact(how: Windowed, given: tuple[Tensor, ...]) -> Tensor:
    """All pairs, one at a time as the paper says which."""
    q, k, v, far_k, far_v, bias = (t.double() for t in given)
    tokens, chunks = q.shape[2], far_k.shape[2]
    scores = q @ torch.cat([k, far_k], 2).mT / math.sqrt(q.shape[3])
    for i in range(tokens):
        start = i // how.window * how.window
        for j in range(tokens):
            seen = start - how.before <= j < start + how.window + how.after and (how.chunk == 0 or j <= i)
            near = bias[:, i - start, j - start + how.before] if seen and how.relative else torch.zeros(2)
            scores[:, :, i, j] += near.double() if seen else -math.inf
        for c in range(chunks):
            if how.chunk and c >= i // how.chunk:
                scores[:, :, i, tokens + c] = -math.inf
    return scores.softmax(-1) @ torch.cat([v, far_v], 2)


class Model(nn.Module):
    """The operator on heads of one projection, with a bias that is a parameter."""

    def __init__(self, how: Windowed, bias: Tensor) -> None:
        super().__init__()
        self.how, self.bias = how, nn.Parameter(bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, far_values: Tensor) -> Tensor:
        sizes = {"window": self.how.window, "before": self.how.before, "after": self.how.after, "chunk": self.how.chunk}
        bias = self.bias if self.how.relative else None
        return windowed_attention(q, k, v, far_keys, far_values, bias, **sizes)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_and_summaries(case: tuple[Windowed, int], dtype: torch.dtype) -> None:
    how, tokens = case
    given = tuple(t.to(dtype) for t in operands(how, tokens))
    model = Model(how, given[5]).eval()
    fast = fuser.optimize(model, search="model", dynamic=False)
    want = exact(how, given)
    # Roundings of the result, and of biases and scores that are at most about 8.
    tolerance = 3e-6 if dtype == torch.float32 else 2.0**-6
    with torch.no_grad():
        for out in (model(*given[:5]), fast(*given[:5])):
            assert float((out.double() - want).norm() / want.norm()) < tolerance
    assert fast.fallbacks == () and [kernel.family for kernel in fast.kernels] == ["attention"]


def test_one_capture_serves_all_lengths() -> None:
    how = CASES[0][0]
    model = Model(how, operands(how, 40)[5]).eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        for tokens in (40, 37, 96):
            given = operands(how, tokens)[:5]
            torch.testing.assert_close(fast(*given), model(*given), rtol=1e-5, atol=1e-5)
    assert fast.fallbacks == ()


def test_joined_keys_are_where_the_mask_says() -> None:
    how, tokens = CASES[1]
    _, k, _, far, _, bias = operands(how, tokens)
    keys = how.joined(k, far)
    row = by_sums(how.by_distance(bias, tokens, far.shape[2]), tokens, keys.shape[2])
    for i, j in how.mask.dense(tokens, keys.shape[2]).nonzero().tolist():
        token = tokens - 1 - j
        if token >= 0:
            assert torch.equal(keys[:, :, j], k[:, :, token])
            start = i // how.window * how.window
            assert torch.equal(row[0, :, i, j], bias[:, i - start, token - start + how.before])
        else:
            assert torch.equal(keys[:, :, j], far[:, :, keys.shape[2] - 1 - j])
            assert not row[0, :, i, j].any()


@pytest.mark.parametrize("arguments", [{}, {"overlap_window": True}, {"exact_rpe": True, "adaptive_proj": "none"}])
def test_grids(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 2, "window_size": 4, "num_landmarks": 16, "attn_2d": True, "use_rpe": True}
    module = build("eva", **sizes, **arguments).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    fast, exact = fuser.optimize(module, search="model", dynamic=False), copy.deepcopy(module).double()
    x = torch.randn(2, 16, 16, 32)
    with torch.no_grad():
        want = exact(x.double())
        for out in (module(x), fast(x)):
            assert float((out.double() - want).norm() / want.norm()) < 1e-6
    assert fast.fallbacks == ()


def test_where_gradients_are_asked_for_modules_take_plain_windows() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert is_known_to(q) and not is_known_to(q.double()) and not is_known_to(q.requires_grad_())
