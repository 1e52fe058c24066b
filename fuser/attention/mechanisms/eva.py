"""EVA: exact attention inside windows and to one summary of every chunk of the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuser.attention.mechanisms.configuration import Configuration, EvaConfiguration
from fuser.attention.mechanisms.features import attend_features, half_norms
from fuser.attention.mechanisms.local import LocalAttention
from fuser.attention.mechanisms.positions import BucketedPositions
from fuser.attention.mechanisms.softmax import initialize, projection
from fuser.attention.mechanisms.windows import Far, check_divides, missing_tokens, padded, qkv_of, windows
from fuser.attention.windowed import attend_squares, is_known_to
from fuser.ir.errors import MechanismError

_MOST_OF_GRID = 8192


def summarize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    query: nn.Module | None,
    key: nn.Module,
    weight: float,
    noisy: bool,
) -> tuple[Tensor, Tensor]:
    """A key and a value for each chunk of queries, keys and values (B, G, H, L, D), both (B, G, H, D).

    The key is what ``key`` makes of the mean of keys. With ω = ``weight`` · (``query`` of the mean of queries + the
    key) (0 without ``query``), with standard normal noise if ``noisy``, the value is Σ softmax(ω · k / √D - ‖k‖² / (2
    √D)) v: a sampled control variate. ``hidden`` tokens (True, (B or 1, G, L, 1)) count as zeros in means and are left
    out of the sum.
    """
    if hidden is not None:
        q, k, v = (t.masked_fill(hidden.unsqueeze(2), 0) for t in (q, k, v))
    k_bar: Tensor = key(k.mean(-2))
    omega = torch.zeros_like(k_bar) if query is None else weight * (query(q.mean(-2)) + k_bar)
    if noisy:
        omega = omega + torch.randn_like(omega)
    batch, groups = k.shape[:2]
    if hidden is not None:
        hidden = hidden.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1).mT
    omega, k, v = (t.flatten(0, 1) for t in (omega.unsqueeze(-2), k, v))
    return k_bar, torch.unflatten(attend_features(omega, k, v, hidden).squeeze(-2), 0, (batch, groups))


class EvaAttention(LocalAttention):
    """Efficient attention via control variates (Zheng et al., ICLR 2023).

    softmax(q · [k, k̄]ᵀ / √D) · [v, β] over the keys of a query's window and one pair (k̄, β) for each chunk of the
    whole input (:func:`summarize`): linear in the length. A sequence has ``num_landmarks`` chunks of N //
    ``num_landmarks`` tokens, which must divide it; a grid has squares of √(N // ``num_landmarks``). Chunks overlap as
    windows do. A query's own chunk is among them, as in the reference.
    """

    configuration_type: ClassVar[type[Configuration]] = EvaConfiguration

    def __init__(self, configuration: EvaConfiguration) -> None:
        super().__init__(configuration)
        self.num_landmarks = configuration.num_landmarks
        norm = configuration.adaptive_proj != "no-ln"
        self.adaptive_mu_q = None if configuration.adaptive_proj == "none" else projection(self.head_dim, norm)
        self.adaptive_mu_k = projection(self.head_dim, norm)
        self.rel_pos_bias = None
        if configuration.use_t5_rpe:
            self.rel_pos_bias = BucketedPositions(
                self.window_size,
                self.extension,
                self.extension,
                reach=self.window_size + self.extension,
                heads=self.num_heads,
                scale=self.scale,
                causal=False,
                exact=configuration.exact_rpe,
            )
        self.apply(initialize)

    @property
    def bias_by_distance(self) -> bool:
        return self.rel_pos_bias is not None or super().bias_by_distance

    def joins(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> bool:
        """Also on a grid with no more tokens than plans look at one by one, and no fewer columns than distances."""
        if len(grid) == 1:
            return super().joins(qkv, hidden, grid)
        small = math.prod(grid) <= _MOST_OF_GRID and grid[1] > 2 * (self.window_size + self.extension)
        return hidden is None and small and is_known_to(qkv)

    def position_bias(self) -> Tensor | None:
        if self.rel_pos_bias is None:
            return super().position_bias()
        bias: Tensor = self.rel_pos_bias()
        return bias

    def far(self, qkv: Tensor, hidden: Tensor | None, grid: Sequence[int]) -> Far:
        if not self.attn_2d:
            qkv, hidden = padded(qkv, hidden, missing_tokens(qkv.shape[1], self.window_size))
            grid = (qkv.shape[1],)
        tokens = qkv.shape[1]
        size = tokens // self.num_landmarks
        if size == 0:
            raise MechanismError(f"num_landmarks = {self.num_landmarks} are more than the {tokens} tokens")
        if self.attn_2d:
            size = math.isqrt(size)
        check_divides(size, grid, f"num_landmarks = {self.num_landmarks}: chunks")
        if not self.extension and len(grid) == 2 and self.joins(qkv, hidden, grid):
            return self._far_in_place(qkv, grid, size)
        chunks = windows(qkv, grid, size, self.extension, self.extension)
        unseen = self.hidden_windows(hidden, qkv, grid, size)
        q, k, v = qkv_of(chunks, self.num_heads)
        k_bar, beta = summarize(q, k, v, unseen, self.adaptive_mu_q, self.adaptive_mu_k, 0.5, self.training)
        return Far(*(t.transpose(1, 2).unsqueeze(1) for t in (k_bar, beta)))

    def _far_in_place(self, qkv: Tensor, grid: Sequence[int], size: int) -> Far:
        """:func:`summarize` of squares of a grid, whose tokens stay where they are."""
        q, k, v = qkv_of(qkv, self.num_heads)
        rows, columns = (length // size for length in grid)

        def mean(x: Tensor) -> Tensor:
            squares = torch.unflatten(x, 2, (rows, size, columns, size))
            return squares.mean((3, 5)).flatten(2, 3)

        k_bar: Tensor = self.adaptive_mu_k(mean(k))
        omega = torch.zeros_like(k_bar)
        if self.adaptive_mu_q is not None:
            omega = 0.5 * (self.adaptive_mu_q(mean(q)) + k_bar)
        if self.training:
            omega = omega + torch.randn_like(omega)
        beta = attend_squares(omega, k, v, (-half_norms(k)).mT.to(k.dtype), columns=grid[1], size=size)
        return Far(k_bar.unsqueeze(1), beta.unsqueeze(1))
