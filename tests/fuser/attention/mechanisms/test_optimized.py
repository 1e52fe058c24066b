"""Mechanisms under ``fuser.optimize``: the numbers of the module, and attention in fused kernels."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from mechanism_cases import BatchFirst
from torch import nn

import fuser
from fuser.attention import build

WIDTH = 32
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "local": ("local", {"window_size": 8, "overlap_window": True, "use_rpe": True}, 1),
    "performer": ("performer", {"approx_attn_dim": 16}, 0),
    "ra": ("ra", {"num_samples": -1}, 2),
    "lara": ("lara", {"num_landmarks": 4, "proposal_gen": "pool-mixed"}, 5),
    "scatterbrain": ("scatterbrain", {"window_size": 8, "approx_attn_dim": 16}, 1),
    "eva": ("eva", {"window_size": 4, "num_landmarks": 4, "attn_2d": True, "use_rpe": True}, 2),
    "causal_eva": ("causal_eva", {"window_size": 8, "chunk_size": 4, "causal": True, "use_t5_rpe": True}, 2),
}
"""A mechanism, its arguments, and how many attentions it consists of, each of which must be one kernel."""


@pytest.mark.parametrize("case", CASES)
def test_optimized_mechanisms_fuse_their_attention(case: str) -> None:
    name, arguments, attentions = CASES[case]
    torch.manual_seed(0)
    module = build(name, **{"embed_dim" if name == "causal_eva" else "dim": WIDTH}, num_heads=2, **arguments).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = BatchFirst(module).eval() if name == "causal_eva" else module
    fast, exact = fuser.optimize(model, search="model", dynamic=False), copy.deepcopy(model).double()
    with torch.no_grad():
        x = torch.randn((2, 8, 8, WIDTH) if case in ("lara", "eva") else (2, 32, WIDTH))
        want = exact(x.double())
        mine, eager = (float((out - want).norm() / want.norm()) for out in (fast(x), model(x)))
    assert mine < max(3 * eager, 1e-6)
    assert fast.fallbacks == ()
    calls = collections.Counter(family for kernel in fast.kernels for family in [kernel.family] * kernel.calls)
    assert calls["attention"] == attentions
    if name == "performer":
        assert calls == {"gemm": 2, "features": 2, "linear_attention": 1}


LARA: list[tuple[str, str, str, tuple[int, ...]]] = [
    ("pool", "mis-opt", "light", (8, 8)),
    ("pool", "mis-bh", "dense", (8, 8)),
    ("no-param-pool", "mis-biased", "light", (8, 8)),
    ("pool-mixed", "mis-bh", "dense", (8, 8)),
    ("no-param-pool-mixed", "mis-opt", "light", (10, 8)),
    ("pool-vmixed", "mis-biased", "light", (8, 8)),
    ("no-param-pool-vmixed", "mis-opt", "dense", (8, 8)),
    ("adaptive-1d", "mis-opt", "light", (32,)),
    ("adaptive-1d", "mis-biased", "light", (37,)),
]
"""Proposals, weights, whether heads are pooled together, and a grid or length that landmarks divide or not."""


@pytest.mark.parametrize(("proposals", "weights", "pool", "tokens"), LARA)
def test_all_of_lara_is_kernels(proposals: str, weights: str, pool: str, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    how = {"proposal_gen": proposals, "mis_type": weights, "pool_module_type": pool, "num_landmarks": 4}
    module = build("lara", dim=WIDTH, num_heads=2, **how).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    fast, exact = fuser.optimize(module, search="model", dynamic=False), copy.deepcopy(module).double()
    x = torch.randn(2, *tokens, WIDTH)
    with torch.no_grad():
        want = exact(x.double())
        mine, eager = (float((out - want).norm() / want.norm()) for out in (fast(x), module(x)))
    assert mine < max(3 * eager, 1e-6)
    assert fast.fallbacks == fast.unfused == fast.outside == ()


@pytest.mark.parametrize("overlap", [False, True])
def test_products_of_windows_are_what_scatterbrain_leaves_to_pytorch(overlap: bool) -> None:
    torch.manual_seed(0)
    how = {"window_size": 4, "attn_2d": True, "use_rpe": True, "approx_attn_dim": 32, "overlap_window": overlap}
    module = build("scatterbrain", dim=2 * WIDTH, num_heads=2, **how).eval()
    fast, exact = fuser.optimize(module, search="model", dynamic=False), copy.deepcopy(module).double()
    x = torch.randn(1, 64, 2 * WIDTH)
    with torch.no_grad():
        want = exact(x.double())
        mine, eager = (float((out - want).norm() / want.norm()) for out in (fast(x), module(x)))
    assert mine < max(3 * eager, 1e-6)
    if not overlap:
        assert [reason for _, reason in fast.unfused] == ["no kernel family knows aten.matmul.default"]
        assert fast.fallbacks == fast.outside == ()


PADDED: dict[str, dict[str, Any]] = {
    "performer": {"approx_attn_dim": 16},
    "ra": {"num_samples": -1},
    "lara": {"num_landmarks": 4, "proposal_gen": "adaptive-1d"},
    "eva": {"window_size": 8, "num_landmarks": 4},
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_the_same_when_fused_also_where_all_is_padding(name: str) -> None:
    torch.manual_seed(0)
    module = build(name, dim=WIDTH, num_heads=2, **PADDED[name]).eval()
    fast, exact = fuser.optimize(module, search="model", dynamic=False), copy.deepcopy(module).double()
    x, padding = torch.randn(3, 32, WIDTH), torch.zeros(3, 32, dtype=torch.bool)
    padding[0, 17:], padding[1, :3], padding[2] = True, True, True
    with torch.no_grad():
        # Rounding of fp32.
        torch.testing.assert_close(fast(x, padding).double(), exact(x.double(), padding), rtol=1e-5, atol=2e-6)
    assert fast.fallbacks == ()


ANY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {"window_size": 8, "overlap_window": True}),
    "performer": ("performer", {"approx_attn_dim": 16}),
    "eva": ("eva", {"window_size": 8, "num_landmarks": 4, "use_t5_rpe": True}),
    "eva, overlapping": ("eva", {"window_size": 8, "num_landmarks": 4, "overlap_window": True}),
    "causal_eva": ("causal_eva", {"window_size": 8, "chunk_size": 4, "causal": True, "use_t5_rpe": True}),
}


@pytest.mark.parametrize("case", ANY_LENGTH)
def test_one_capture_serves_all_lengths(case: str, captures: list[str]) -> None:
    name, arguments = ANY_LENGTH[case]
    torch.manual_seed(0)
    module = build(name, **{"embed_dim" if name == "causal_eva" else "dim": WIDTH}, num_heads=2, **arguments).eval()
    model = BatchFirst(module).eval() if name == "causal_eva" else module
    fast, exact = fuser.optimize(model, search="model"), copy.deepcopy(model).double()
    for tokens in (37, 40, 64, 81, 21):
        x = torch.randn(2, tokens, WIDTH)
        with torch.no_grad():
            # Rounding of fp32.
            torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=1e-5, atol=2e-6)
    assert captures == ["all"] and fast.fallbacks == ()
