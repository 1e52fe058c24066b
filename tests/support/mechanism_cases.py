"""Small modules of every mechanism, and what calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuser.attention import build

DIM, HEADS, TOKENS = 8, 2, 24
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "local": ("local", {"window_size": 8, "overlap_window": True, "use_rpe": True}),
    "performer-favorp": ("performer", {"approx_attn_dim": 6}),
    "performer-cos": ("performer", {"approx_attn_dim": 6, "cos_weighting": True, "sample_scheme": "learnable"}),
    "performer-relu": ("performer", {"approx_attn_dim": 6, "proj_method": "relu"}),
    "performer-fourier": ("performer", {"approx_attn_dim": 6, "proj_method": "fourier", "sample_scheme": "fixed"}),
    "performer-dpfp": ("performer", {"approx_attn_dim": 8, "proj_method": "dpfp"}),
    "performer-mlp": ("performer", {"approx_attn_dim": 6, "proj_method": "mlp-fourier"}),
    "performer-sigmoid": ("performer", {"proj_method": "sigmoid-only"}),
    "ra-mean": ("ra", {"num_samples": 0}),
    "ra-expected": ("ra", {"num_samples": -1}),
    "lara-opt": ("lara", {"num_landmarks": 5, "proposal_gen": "adaptive-1d", "alpha_coeff": 2.0}),
    "lara-biased": ("lara", {"num_landmarks": 7, "mis_type": "mis-biased", "proposal_gen": "adaptive-1d"}),
    "lara-bh": ("lara", {"num_landmarks": 6, "mis_type": "mis-bh", "proposal_gen": "no-param-pool"}),
    "scatterbrain": ("scatterbrain", {"window_size": 8, "approx_attn_dim": 6, "overlap_window": True}),
    "eva": ("eva", {"window_size": 8, "num_landmarks": 6}),
    "eva-overlap": (
        "eva",
        {"window_size": 8, "num_landmarks": 6, "overlap_window": True, "use_t5_rpe": True, "adaptive_proj": "no-ln"},
    ),
    "eva-none": ("eva", {"window_size": 8, "num_landmarks": 6, "adaptive_proj": "none"}),
    "causal_eva": ("causal_eva", {"window_size": 8, "chunk_size": 4, "causal": True, "use_t5_rpe": True}),
    "causal_eva-overlap": (
        "causal_eva",
        {"window_size": 8, "chunk_size": 2, "causal": True, "use_t5_rpe": True, "overlap_window": True},
    ),
    "causal_eva-chunks": ("causal_eva", {"window_size": 8, "num_chunks": 6, "adaptive_proj": "no-ln"}),
}
"""Mechanisms of sequences by a name for the case."""
GRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {"window_size": 2, "attn_2d": True, "use_rpe": True, "overlap_window": True}),
    "lara-light": ("lara", {"num_landmarks": 4, "proposal_gen": "pool-vmixed"}),
    "lara-dense": ("lara", {"num_landmarks": 4, "proposal_gen": "pool-mixed", "pool_module_type": "dense"}),
    "scatterbrain": ("scatterbrain", {"window_size": 2, "approx_attn_dim": 6, "attn_2d": True}),
    "eva": ("eva", {"window_size": 2, "num_landmarks": 6, "attn_2d": True, "use_rpe": True, "exact_rpe": True}),
}
"""Mechanisms of grids of 4 × 6 tokens."""


class BatchFirst(nn.Module):
    """Causal EVA on (B, N, C), as all others are."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)
        out: Tensor = self.attention(x, x, x, key_padding_mask)[0]
        return out.transpose(0, 1)


def make(name: str, **arguments: Any) -> nn.Module:
    """A mechanism with weights that are not small, as (B, N, C) → (B, N, C)."""
    torch.manual_seed(0)
    width = {"embed_dim" if name == "causal_eva" else "dim": DIM}
    module = build(name, **width, num_heads=HEADS, **arguments)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return BatchFirst(module) if name == "causal_eva" else module


def tokens(*shape: int) -> Tensor:
    """Random tokens of this shape, float64."""
    return torch.randn(*(shape or (2, TOKENS)), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
