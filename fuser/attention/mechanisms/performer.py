"""Linear attention with feature maps."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuser.attention.linear import features as map_features
from fuser.attention.linear import linear_attention
from fuser.attention.mechanisms import features
from fuser.attention.mechanisms.configuration import Configuration, PerformerConfiguration
from fuser.attention.mechanisms.softmax import SoftmaxAttention, initialize
from fuser.ir.linear_attention import FeatureMap

LEAST_SUM = 1e-2
"""What sums of features are not divided by less than."""


class FourierFeatures(nn.Module):
    """Learned features relu(Linear([cos(x Wᵀ), sin(x Wᵀ)] / √D)) of heads, (B, H, N, D) → (B, H, N, count)."""

    def __init__(self, heads: int, width: int, count: int) -> None:
        super().__init__()
        self.random_proj = nn.Parameter(0.02 * torch.randn(heads, count // 2, width))
        self.phi = nn.Sequential(nn.Linear(count, count), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        on = x @ self.random_proj.mT
        mapped: Tensor = self.phi(torch.cat([on.cos(), on.sin()], -1) * (1 / math.sqrt(x.shape[-1])))
        return mapped


class Directions(nn.Module):
    """Random directions of features as the reference keeps them: ``eval_proj``, or ``random_proj`` if they never
    change."""

    random_proj: Tensor
    eval_proj: Tensor

    def keep_directions(self, configuration: PerformerConfiguration) -> None:
        heads, count = configuration.num_heads, configuration.approx_attn_dim
        directions = features.orthogonal_directions(heads, count, configuration.dim // heads)
        self.sample_scheme = configuration.sample_scheme
        if self.sample_scheme == "learnable":
            self.random_proj = nn.Parameter(directions)
        else:
            self.register_buffer("eval_proj" if self.sample_scheme == "default" else "random_proj", directions)

    def directions(self) -> Tensor:
        """(H, M, D). The default scheme draws new ones, not orthogonal, whenever it trains."""
        if self.sample_scheme != "default":
            return self.random_proj
        return torch.randn_like(self.eval_proj) if self.training else self.eval_proj


class PerformerAttention(SoftmaxAttention, Directions):
    """Linear attention φ(q) · (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) (Performer, Choromanski et al., ICLR 2021).

    ``proj_method`` is the feature map φ: ``favorp`` (FAVOR+), ``fourier`` (Random Feature Attention), ``relu`` of
    random projections, ``relu-only`` and ``sigmoid-only`` without them, ``dpfp``, and ``mlp-fourier``, which is
    learned. ``cos_weighting`` is cosFormer's. Features and sums are computed at least in fp32.
    """

    configuration_type: ClassVar[type[Configuration]] = PerformerConfiguration

    def __init__(self, configuration: PerformerConfiguration) -> None:
        super().__init__(configuration)
        self.proj_method, self.cos_weighting = configuration.proj_method, configuration.cos_weighting
        count = configuration.approx_attn_dim
        self.nu = count // self.head_dim // 2
        if self.proj_method == "mlp-fourier":
            self.feature_proj = FourierFeatures(self.num_heads, self.head_dim, count)
            self.feature_proj.apply(initialize)
        elif self.proj_method in ("favorp", "relu", "fourier"):
            self.keep_directions(configuration)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            phi_q, phi_k = self.map(q, k)
        else:
            # Before the map, too: features are scaled by the largest of all tokens.
            padding = hidden[:, None, :, None]
            phi_q, phi_k = self.map(q.masked_fill(padding, 0), k.masked_fill(padding, 0))
            phi_k = phi_k.masked_fill(padding, 0)
        if self.cos_weighting:
            phi_q, phi_k = features.cosine_weighted(phi_q), features.cosine_weighted(phi_k)
        out = linear_attention(phi_q, phi_k, v, causal=False, normalize=LEAST_SUM)
        assert isinstance(out, Tensor)
        return out

    def map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys (B, H, N, D), (B, H, N, M)."""
        if self.proj_method == "mlp-fourier":
            # Its weights have the inputs' dtype, and its features are bounded before they are mapped.
            return features.wide(self.feature_proj(q)), features.wide(self.feature_proj(k))
        if self.proj_method in ("favorp", "relu"):
            maps = FeatureMap.RELU, FeatureMap.RELU
            if self.proj_method == "favorp":
                maps = FeatureMap.FAVOR_QUERIES, FeatureMap.FAVOR_KEYS
            directions = self.directions()
            return map_features(q, directions, maps[0]), map_features(k, directions, maps[1])
        q, k = features.wide(q), features.wide(k)
        if self.proj_method == "dpfp":
            return features.dpfp(q, self.nu), features.dpfp(k, self.nu)
        if self.proj_method in ("relu-only", "sigmoid-only"):
            apply = torch.relu if self.proj_method == "relu-only" else torch.sigmoid
            return apply(q) + 0.1, apply(k) + 0.1
        directions = self.directions()
        return features.fourier(q, directions), features.fourier(k, directions)
