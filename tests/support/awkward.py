"""Awkward models, and the comparison of their compiled calls with eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fuser
from fuser.module.optimized import OptimizedModule

WIDTH = 32
NAN, INF = math.nan, math.inf
LOWEST = torch.finfo(torch.float32).min
B, H, S, D = 2, 3, 24, 16


class Model(nn.Module):
    """A model given by its forward function, which may use one linear layer."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def optimize(model: nn.Module, **settings: Any) -> OptimizedModule:
    return fuser.optimize(model.eval(), **{"search": "model", **settings})


def assert_same(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    """Same structure, shapes, dtypes, NaN and infinities; finite numbers within the rounding of fp32."""
    mine, spec = pytree.tree_flatten(ours)
    eager, expected = pytree.tree_flatten(theirs)
    assert spec == expected
    for a, b in zip(mine, eager, strict=True):
        if not isinstance(b, Tensor):
            assert type(a) is type(b) and (a == b or a != a)
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if not b.is_floating_point():
            assert torch.equal(a, b)
            continue
        assert torch.equal(a.isnan(), b.isnan())
        finite = b.isfinite()
        assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()])
        bound = tolerance * {torch.bfloat16: 1e4, torch.float16: 2e3}.get(b.dtype, 1)
        error = (a - b)[finite].double().norm()
        assert float(error) <= bound * float(b[finite].double().norm())


def check(model: nn.Module, *args: Any, tolerance: float = 2e-6, **kwargs: Any) -> OptimizedModule:
    """The optimized model agrees with the model, twice, and leaves its inputs alone."""
    fast = optimize(model)
    expected = model(*args, **kwargs)
    before = [t.clone() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    for _ in range(2):
        assert_same(fast(*args, **kwargs), expected, tolerance)
    after = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    assert_same(after, before, 0.0)
    return fast


X = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def qkv(heads: int = H, kv_heads: int | None = None, q_len: int = S, kv_len: int = S) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    kv = kv_heads or heads
    shapes = ((heads, q_len), (kv, kv_len), (kv, kv_len))
    return tuple(torch.randn(B, h, s, D, generator=g) for h, s in shapes)


SDPA = Model(lambda m, q, k, v, *mask, **more: F.scaled_dot_product_attention(q, k, v, *mask, **more))
