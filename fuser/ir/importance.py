"""The importance weights of LARA, which correct averages under several proposals at once."""

from __future__ import annotations

from torch import Tensor

LEAST_WEIGHT = 1e-8
"""Weights count as no less."""


def importance_bias(
    q: Tensor, landmarks: Tensor, sums: Tensor, heuristic: Tensor, offset: Tensor, *, coefficient: float, scale: float
) -> Tensor:
    """log(α_nc) + ``offset``_c with α_nc = ``heuristic``_c + ``coefficient`` · (t_nc - mean_c t_nc), and t_nc =
    exp(``scale`` · q_n · landmark_c - ``sums``_c): how close a query is to a landmark among all queries (Zheng et al.,
    Linear Complexity Randomized Self-attention Mechanism, ICML 2022).

    q is (B, H, N, D), landmarks (B, H, C, D), all others (B, H, C); returns (B, H, N, C).
    """
    closeness = (q @ landmarks.mT * scale - sums.unsqueeze(-2)).exp()
    alpha = heuristic.unsqueeze(-2) + coefficient * (closeness - closeness.mean(-1, keepdim=True))
    return alpha.clamp(min=LEAST_WEIGHT).log() + offset.unsqueeze(-2)
