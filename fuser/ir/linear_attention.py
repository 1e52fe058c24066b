"""Linear attention as a recurrence over tokens, and the feature maps that make it approximate softmax attention."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.errors import MechanismError

_CHUNK = 32


@dataclass(frozen=True)
class Recurrence:
    """What linear attention computes, whatever the sizes.

    Causal, with keys k_t (D,), values v_t (Dv,) and a state S (D, Dv): S = diag(exp(g_t)) S + k_t u_tᵀ and o_t =
    ``scale`` · Sᵀ q_t. The decay g_t (in log space: RetNet, GLA) is 0 without ``decay``; u_t is v_t, and with ``delta``
    (DeltaNet, gated DeltaNet) it is beta_t · (v_t - (diag(exp(g_t)) S)ᵀ k_t). Not ``causal``, all tokens read the last
    state. With a ``floor``, values get one more column of ones, by which the others are divided where it is at least
    that, else by the floor (Katharopoulos et al., Transformers are RNNs, 2020): so the state has Dv + 1 columns.

    Raises MechanismError for parts that do not go together.
    """

    scale: float
    causal: bool = True
    decay: bool = False
    delta: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        if not self.causal and (self.decay or self.delta):
            raise MechanismError("decay and beta are those of a causal recurrence; leave them out or take causal=True")
        if self.delta and self.floor is not None:
            raise MechanismError(
                "beta corrects values by what the state has for a key, so there are no sums to divide by"
            )

    @property
    def more_columns(self) -> int:
        """Columns of the state beyond those of the values."""
        return int(self.floor is not None)

    def evaluate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        beta: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, Sq, Dv) in the dtype of ``v`` and the last state (B, Hkv, D, Dv or Dv + 1), at least in fp32.

        In chunks of matrix products (Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024).

        q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv); decay (B, Hkv, Sk, 1 or D), beta (B, Hkv, Sk, 1) and
        state are broadcast.
        """
        dtype, result = torch.promote_types(v.dtype, torch.float32), v.dtype
        batch, heads, _, width = k.shape
        q = (q.to(dtype) * self.scale).unflatten(1, (heads, -1))  # type: ignore[no-untyped-call]
        k, v = k.to(dtype), v.to(dtype)
        if self.floor is not None:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        now = k.new_zeros(()) if state is None else state.to(dtype)
        now = now.expand(batch, heads, width, v.shape[-1])
        if not self.causal:
            now = now + k.mT @ v
            out = q @ now.unsqueeze(2)
        else:
            parts = [v.new_zeros((*q.shape[:3], 0, v.shape[-1]))]
            for start in range(0, k.shape[2], _CHUNK):
                one = slice(start, start + _CHUNK)
                gates, rates = (None if t is None else t[:, :, one].to(dtype) for t in (decay, beta))
                part, now = self._chunk(q[:, :, :, one], k[:, :, one], v[:, :, one], gates, rates, now)
                parts.append(part)
            out = torch.cat(parts, 3)
        if self.floor is not None:
            out = out[..., :-1] / out[..., -1:].clamp(min=self.floor)
        return out.flatten(1, 2).to(result), now

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the queries (B, Hkv, group, S, D) of one chunk, and the state behind it."""
        size = k.shape[2]
        earlier = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()
        total = k.new_zeros(1, 1, 1, 1) if decay is None else decay.cumsum(2)
        # What is left of key s at token t, (B, Hkv, t, s, 1 or D).
        left = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(~earlier[:, :, None], -math.inf).exp()
        if decay is None or decay.shape[-1] == 1:
            own, other = k @ k.mT * left[..., 0], q @ k.mT.unsqueeze(2) * left[..., 0].unsqueeze(2)
        else:
            own = torch.einsum("bhtd,bhtsd,bhsd->bhts", k, left, k)
            other = torch.einsum("bhgtd,bhtsd,bhsd->bhgts", q, left, k)
        past = total.exp()
        if beta is not None:
            system = torch.eye(size, dtype=k.dtype, device=k.device) + beta * own.tril(-1)
            v = torch.linalg.solve_triangular(system, beta * (v - (k * past) @ state), upper=False)
        out = (q * past.unsqueeze(2)) @ state.unsqueeze(2) + other @ v.unsqueeze(2)
        last = past[:, :, -1:].mT
        return out, state * last + (k * (total[:, :, -1:] - total).exp()).mT @ v


class FeatureMap(enum.Enum):
    """Features of projections on directions, which are random and the features positive but for ``PRODUCT``.

    FAVOR+ (Choromanski et al., Performer, 2021): exp(p - ‖x‖² / (2 √D) - m) / √M + 1e-4 of the projections p = x · w /
    D^¼, where m is the largest of a query's projections, or of all of a head's keys. ``RELU``: max(p / √M, 0) + 1e-3.
    ``PRODUCT``: x · w.
    """

    FAVOR_QUERIES = "favor queries"
    FAVOR_KEYS = "favor keys"
    RELU = "relu"
    PRODUCT = "product"

    def evaluate(self, x: Tensor, directions: Tensor) -> Tensor:
        """x (B, H, N, D) and directions (H, M, D) give (B, H, N, M), at least in fp32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self is FeatureMap.PRODUCT:
            return x @ directions.mT.to(x.dtype)
        on = x @ directions.mT.to(x.dtype) * (1 / math.sqrt(math.sqrt(x.shape[-1])))
        share = 1 / math.sqrt(directions.shape[-2])
        if self is FeatureMap.RELU:
            return (on * share).relu() + 1e-3
        top = on.amax(-1 if self is FeatureMap.FAVOR_QUERIES else (-2, -1), keepdim=True)
        lengths = x.square().sum(-1, keepdim=True) * (0.5 / math.sqrt(x.shape[-1]))
        return torch.exp(on - lengths - top) * share + 1e-4
