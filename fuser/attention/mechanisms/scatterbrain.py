"""Scatterbrain: exact attention inside windows, random features for all that is outside of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fuser.attention.mechanisms.configuration import Configuration, ScatterbrainConfiguration
from fuser.attention.mechanisms.features import half_norms, projected, wide
from fuser.attention.mechanisms.local import LocalAttention
from fuser.attention.mechanisms.performer import Directions
from fuser.attention.mechanisms.windows import Far, heads_of, qkv_of, windows


class ScatterbrainAttention(LocalAttention, Directions):
    """Sparse and low-rank attention in one softmax (Chen et al., NeurIPS 2021).

    Each random feature c is a far key of window g, with the value (Σ_all φ_c(k) v - Σ_g φ_c(k) v) over (Σ_all φ_c(k) -
    Σ_g φ_c(k)), and with the logarithm of that denominator, plus the feature of the query, as its score.
    """

    configuration_type: ClassVar[type[Configuration]] = ScatterbrainConfiguration

    def __init__(self, configuration: ScatterbrainConfiguration) -> None:
        super().__init__(configuration)
        self.keep_directions(configuration)

    def joins(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> bool:
        """Never: each window has features of its own."""
        return False

    def far(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Far:
        directions = self.directions()
        count = directions.shape[-2]
        q, k, v = (wide(t) for t in qkv_of(qkv, self.num_heads))
        log_phi = projected(k, directions) - half_norms(k) - math.log(count) / 2
        if hidden is not None:
            log_phi = log_phi.masked_fill(hidden[:, None, :, None], -math.inf)
        # (B, H, 1, M); finite also where all is padding.
        top = log_phi.amax(2, keepdim=True).clamp(min=torch.finfo(log_phi.dtype).min)
        phi = torch.exp(log_phi - top)
        inside, values = (self._windows(t, grid, self.extension) for t in (phi, v))
        of_window, mixed_inside = inside.sum(3), inside.mT @ values
        if self.extension:
            total, mixed_total = phi.sum(2)[:, None], (phi.mT @ v)[:, None]
        else:
            # Each token is in one window.
            total, mixed_total = of_window.sum(1, keepdim=True), mixed_inside.sum(1, keepdim=True)
        outside, mixed = total - of_window, mixed_total - mixed_inside
        # The reference's constants keep the difference from vanishing, relative to the largest of features and to the
        # window's or whole sum.
        whole = torch.maximum(total, of_window).clamp(min=torch.finfo(phi.dtype).tiny)
        score = whole.log() + torch.log(outside / whole + 1e-5) + top.transpose(1, 2)
        bias = score.unsqueeze(3) - half_norms(self._windows(q, grid, 0)) - math.log(count) / 2
        keys = directions * self.head_dim**0.25
        return Far(keys[None, None], mixed / outside.clamp(min=1e-3).unsqueeze(-1), bias.to(qkv.dtype))

    def _windows(self, x: Tensor, grid: Sequence[int], extension: int) -> Tensor:
        """Extended windows of what each head has of each token, (B, H, N, F) → (B, G, H, L, F)."""
        split = windows(x.transpose(1, 2).flatten(2), grid, self.window_size, extension, extension)
        return heads_of(split, x.shape[1])
