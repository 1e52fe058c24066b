"""The attentions that experiments compare, and how much each of them computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fuser
from fuser.attention import attend
from fuser.ir.masks import Mask
from fuser.ir.score_quantization import ScoreQuantization

FULL_BITS = 32
"""Bits of a product in full; one of codes with b bits counts as b / 32 of it."""


@dataclass(frozen=True)
class Arm:
    """An attention: dense, under a static mask, or with few bits."""

    name: str
    mask: Mask | None = None
    quantize: ScoreQuantization | None = None
    fine_tuned: bool = False


@dataclass
class Counted:
    """Pairs that may attend, scores computed in full, and pairs whose values are multiplied, over all calls."""

    allowed: int = 0
    full: int = 0
    kept: int = 0
    bits: int = 0
    high_bits: int = FULL_BITS

    @property
    def share(self) -> float:
        """Of the scores that dense attention computes, those computed in full."""
        return self.full / self.allowed if self.allowed else 0.0

    @property
    def work(self) -> float:
        """Both products of attention relative to dense attention, a product of codes by its bits."""
        predicted = self.bits / FULL_BITS
        high = self.share * self.high_bits / FULL_BITS
        return (predicted + high + self.kept / self.allowed) / 2 if self.allowed else 0.0


@dataclass
class Attention:
    """Attention of an arm, a callable; ``counting`` it makes decisions once more by the reference, to count them."""

    arm: Arm
    counted: Counted = field(default_factory=Counted)
    counting: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, runtime: Tensor | None, causal: bool, scale: float) -> Tensor:
        if self.counting:
            self.count(q, k, v, runtime, causal, scale)
        arm = self.arm
        return attend(q, k, v, arm.mask, runtime, causal=causal, quantize=arm.quantize, scale=scale)

    def count(self, q: Tensor, k: Tensor, v: Tensor, runtime: Tensor | None, causal: bool, scale: float) -> None:
        """Add what a call computes; decisions are those of the reference."""
        rows, keys = q.shape[2], k.shape[2]
        allowed = torch.ones(q.shape[0], q.shape[1], rows, keys, dtype=torch.bool)
        if causal:
            allowed = allowed.tril()
        if runtime is not None:
            allowed = allowed & (runtime if runtime.dtype == torch.bool else ~torch.isneginf(runtime))
        found, how = self.counted, self.arm.quantize
        found.allowed += int(allowed.sum())
        if self.arm.mask is not None:
            allowed = allowed & self.arm.mask.dense(rows, keys)
        kept = int(allowed.sum())
        full = kept
        if how is not None:
            added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
            chosen = how.reference(q, k, v, additive_mask=added, scale=scale)[1] & allowed
            full, found.bits, found.high_bits = int(chosen.sum()), how.bits, how.high_bits or FULL_BITS
            kept = full if how.prunes else kept
        found.full += full
        found.kept += kept


def register(attention: Attention) -> str:
    """Make an attention known to transformers, under the name that is returned."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        scale = given.get("scaling") or query.shape[-1] ** -0.5
        out = attention(query, key, value, attention_mask, False, scale)
        return out.transpose(1, 2).contiguous(), None

    name = f"experiment_{attention.arm.name}"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def sliding(share: float, length: int) -> Mask:
    """A causal window over about a ``share`` of the pairs of causal attention over ``length`` tokens."""
    pairs = length * (length + 1) / 2
    width = min(range(1, length + 1), key=lambda w: abs(w * (w + 1) / 2 + (length - w) * w - share * pairs))
    return fuser.masks.SlidingWindow(width - 1, 0) & fuser.masks.Causal()


def counting(attentions: list[Attention], run: Callable[[], object]) -> None:
    """Run once and count what attentions compute."""
    for attention in attentions:
        attention.counting = True
    with torch.no_grad():
        run()
    for attention in attentions:
        attention.counting = False
