"""Randomized attention and its linear version, LARA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuser.attention.landmarks import averages, importance_attention, log_sums
from fuser.attention.mechanisms.configuration import Configuration, LaraConfiguration, RandomizedConfiguration
from fuser.attention.mechanisms.features import attend, attend_features, half_norms, wide
from fuser.attention.mechanisms.softmax import SoftmaxAttention, for_scores, initialize, projection
from fuser.attention.mechanisms.windows import heads_of, qkv_of
from fuser.ir.errors import MechanismError


class RandomizedAttention(SoftmaxAttention):
    """Randomized attention (Zheng et al., ICML 2022): an unbiased estimate of softmax attention when it samples.

    softmax over keys of (w_i · k_j / √D - ‖k_j‖² / (2 √D)), times values, for one w_i a query: q_i plus a key, with
    standard normal noise in training. The key is sampled with the weights of attention (``num_samples`` ≥ 1, also in
    evaluation; more than one is as one), their expectation (-1) or the mean of all keys (0). Quadratic in the length.
    """

    configuration_type: ClassVar[type[Configuration]] = RandomizedConfiguration

    def __init__(self, configuration: RandomizedConfiguration) -> None:
        super().__init__(configuration)
        self.num_samples = configuration.num_samples

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        w = q + self._key(q, k, hidden)
        if self.training:
            w = w + torch.randn_like(w)
        return attend_features(w, k, v, for_scores(hidden))

    def _key(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
        if self.num_samples == -1:
            return attend(q, k, k, for_scores(hidden))
        if self.num_samples == 0:
            if hidden is None:
                return k.mean(2, keepdim=True)
            seen = ~hidden[:, None, :, None]
            return (k * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
        with torch.no_grad():
            scores = wide(q) @ wide(k).mT * self.scale
            if hidden is not None:
                # Where all is padding, which key is sampled does not matter: it weighs nothing.
                scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
            chosen = torch.multinomial(scores.softmax(-1).flatten(0, 2), 1).view(*q.shape[:3], 1)
        return k.gather(2, chosen.expand(-1, -1, -1, k.shape[3]))


class Tokens(nn.Module):
    """An image (B, C, rows, columns) as tokens (B, rows · columns, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


class LaraAttention(SoftmaxAttention):
    """Linear randomized attention (Zheng et al., ICML 2022): linear in the length, for encoders.

    Landmarks q̄_c and k̄_c give C proposals μ_c = q̄_c + k̄_c, with noise ω_c in training. KV_c = Σ_n softmax_n(φ(k_n,
    ω_c)) v_n with φ(x, ω) = ω · x / √D - ‖x‖² / (2 √D), and the output is Σ_c softmax_c(log α_nc + φ(q_n, ω_c) + log
    Σ_n exp φ(k_n, ω_c) - log p_c) KV_c. ``mis_type`` says what the weights α and the densities p are.

    Landmarks of a grid are pooled to √num_landmarks along each side, of a sequence are means of segments; then
    ``proposal_gen`` projects them or not and mixes the keys' ones or not. Padding counts as zeros in landmarks of a
    sequence, and as it is in those of a grid.
    """

    configuration_type: ClassVar[type[Configuration]] = LaraConfiguration

    def __init__(self, configuration: LaraConfiguration) -> None:
        super().__init__(configuration)
        self.num_landmarks, self.proposal_gen = configuration.num_landmarks, configuration.proposal_gen
        self.dense = configuration.pool_module_type == "dense"
        self.mis_type, self.alpha_coeff = configuration.mis_type, configuration.alpha_coeff
        self.use_antithetics, self.use_multisample = configuration.use_antithetics, configuration.use_multisample
        self.q_bar_gen, self.k_bar_gen = (self._generator() for _ in range(2))

    def _generator(self) -> nn.Sequential:
        learned = (
            () if self.proposal_gen.startswith("no-param") else projection(self.dim if self.dense else self.head_dim)
        )
        pool = () if self.proposal_gen == "adaptive-1d" else (nn.AdaptiveAvgPool2d(self._side()), Tokens())
        return nn.Sequential(*pool, *learned).apply(initialize)

    def _side(self) -> int:
        return math.isqrt(self.num_landmarks)

    def grid(self, shape: Sequence[int]) -> Sequence[int]:
        if len(shape) == 2 and self.proposal_gen == "adaptive-1d":
            raise MechanismError(
                "adaptive-1d makes landmarks of a sequence (B, N, C); choose another proposal_gen for grids"
            )
        return shape

    def mix(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Tensor:
        q, k, v = qkv_of(qkv, self.num_heads)
        if len(grid) == 2:
            q_bar, k_bar = self._landmarks_of_grid(q, k, v, grid)
        else:
            if hidden is not None:
                q, k, v = (t.masked_fill(hidden[:, None, :, None], 0) for t in (q, k, v))
            q_bar, k_bar = self._landmarks_of_sequence(q), self._landmarks_of_sequence(k, keys=True)
        return self._estimate(q, k, v, q_bar, k_bar, for_scores(hidden)).transpose(1, 2).flatten(2)

    def _landmarks_of_sequence(self, x: Tensor, keys: bool = False) -> Tensor:
        """Means of segments whose lengths differ by at most one, (B, H, N, D) → (B, H, C, D)."""
        if self.proposal_gen == "adaptive-1d":
            x = self.k_bar_gen(x) if keys else self.q_bar_gen(x)
        count, tokens = self.num_landmarks, x.shape[2]
        if tokens <= count:
            return x
        size, longer = tokens // count, tokens % count
        if not longer:
            return torch.unflatten(x, 2, (count, size)).mean(3)
        split = (count - longer) * size
        parts = x.split([split, tokens - split], 2)  # type: ignore[no-untyped-call]
        halves = zip(parts, (size, size + 1), strict=True)
        return torch.cat([torch.unflatten(half, 2, (-1, length)).mean(3) for half, length in halves], 2)

    def _landmarks_of_grid(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        q_bar = self._pooled(q, grid, self.q_bar_gen, self.dense)
        k_bar = self._pooled(k, grid, self.k_bar_gen, self.dense)
        if self.proposal_gen.endswith("mixed"):
            bias = None
            if self.proposal_gen.endswith("vmixed"):
                pool = nn.Sequential(nn.AdaptiveAvgPool2d(self._side()), Tokens())
                v_bar = self._pooled(v, grid, pool, dense=False)
                bias = torch.log(v_bar.norm(dim=-1) + 1e-4).unsqueeze(-2)
            k_bar = attend(k_bar, k_bar, k_bar, bias=bias)
        return q_bar, k_bar

    def _pooled(self, x: Tensor, grid: Sequence[int], generator: nn.Module, dense: bool) -> Tensor:
        """Landmarks (B, H, C, D) of heads (B, H, N, D) on a grid, each by itself or all together."""
        side = self._side()
        if not any(length % side for length in grid):
            # Equal rectangles, whose tokens stay where they are.
            rows, columns = (length // side for length in grid)
            means = torch.unflatten(x, 2, (side, rows, side, columns)).mean((3, 5)).flatten(2, 3)
            means = means.transpose(1, 2).flatten(2) if dense else means
            for layer in list(generator.children())[2:]:
                means = layer(means)
            return heads_of(means, self.num_heads) if dense else means
        channels = x.mT.flatten(1, 2) if dense else x.mT.flatten(0, 1)
        pooled: Tensor = generator(torch.unflatten(channels, -1, tuple(grid)))
        return heads_of(pooled, self.num_heads) if dense else torch.unflatten(pooled, 0, x.shape[:2])

    def _estimate(self, q: Tensor, k: Tensor, v: Tensor, q_bar: Tensor, k_bar: Tensor, hidden: Tensor | None) -> Tensor:
        """The estimate from landmarks (B, H, C, D), at least in fp32. φ(q_n, ω_c) enters as a product of attention to
        ω: what of it is alike for all c cancels."""
        dtype = q.dtype
        q, k, v, q_bar, mu = wide(q), wide(k), wide(v), wide(q_bar), wide(q_bar) + wide(k_bar)
        omega, copies = self._sample(mu)
        bias = (-half_norms(k)).mT
        if hidden is not None:
            bias = bias.masked_fill(hidden, -math.inf)
        # (B, H, C, D) and (B, H, C).
        values, mass = averages(omega, k, v, bias)
        if copies > 1:
            mu, q_bar = (x.repeat(1, 1, copies, 1) for x in (mu, q_bar))
        lengths = (-half_norms(mu)).mT
        # log Σ_m exp φ(μ_m, ω_c), (B, H, C).
        density = log_sums(omega, mu, lengths)
        if self.mis_type == "mis-opt":
            own = (omega * mu).sum(-1) * (1 / math.sqrt(mu.shape[-1])) + lengths.squeeze(-2)
            heuristic = torch.exp(own - density)
            # How close a landmark is to all queries together.
            sums = log_sums(q_bar, q)
            return importance_attention(q, omega, values, q_bar, sums, heuristic, mass - own, self.alpha_coeff).to(
                dtype
            )
        offset = (mass - density).unsqueeze(-2)
        return attend(q, omega + mu if self.mis_type == "mis-biased" else omega, values, bias=offset).to(dtype)

    def _sample(self, mu: Tensor) -> tuple[Tensor, int]:
        """Proposals ω (B, H, copies · C, D), and how often each of ``mu`` is among them."""
        if not self.training:
            return mu, 1
        if self.use_multisample:
            twice = mu.repeat(1, 1, 2, 1)
            return twice + torch.randn_like(twice), 2
        noise = torch.randn_like(mu)
        if self.use_antithetics:
            return torch.cat([mu + noise, mu - noise], 2), 2
        return mu + noise, 1
