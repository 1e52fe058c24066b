"""Masks of attention's scores (B, H, Sq, Sk)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.expression import Expression
from fuser.ir.masks import Mask
from fuser.ir.operators.base import Semantics, Shape, kind
from fuser.ir.operators.rowwise import ADD, RowWise


class ScoreMask(Semantics):
    """What lets scores through or not; their second input, if they have one, is a mask given at run time."""


@kind("mask")
@dataclass(frozen=True)
class PatternMask(ScoreMask):
    """-inf for pairs that the constant ``pattern`` forbids, and for keys behind the query if it is ``causal``."""

    causal: bool = False
    pattern: Mask | None = None

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (scores,) = inputs
        q_len, kv_len = scores.shape[-2:]
        if self.causal:
            allowed = torch.ones(q_len, kv_len, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if self.pattern is not None:
            scores = scores.masked_fill(~self.pattern.dense(q_len, kv_len).to(scores.device), -math.inf)
        return (scores,)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        pattern = "" if self.pattern is None else str(self.pattern)
        return ", ".join(part for part in ("causal" if self.causal else "", pattern) if part)


@kind("mask")
@dataclass(frozen=True)
class BooleanMask(ScoreMask):
    """-inf where its second input, which broadcasts to the scores, is False."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, allowed = inputs
        return (scores.masked_fill(~allowed, -math.inf),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "given at run time"


@kind("mask")
@dataclass(frozen=True)
class AdditiveMask(ScoreMask, RowWise):
    """The sum with its second input, which broadcasts to the scores."""

    @property
    def expression(self) -> Expression:
        return ADD

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "given at run time"


@kind("mask")
@dataclass(frozen=True)
class BiasByDistance(ScoreMask):
    """The sum with a bias of which query i and key j have element ``first`` + i - j, or + j where keys are
    ``reversed``: the second input, (1 or H, distances). Masked scores may have none."""

    first: int
    reversed: bool = False

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, row = inputs
        query, key = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        element = self.first + query[:, None] + (key if self.reversed else -key)
        return (scores + row[:, element.clamp(0, row.shape[1] - 1)],)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "a bias by distance"


@kind("mask")
@dataclass(frozen=True)
class DocumentMask(ScoreMask):
    """-inf for pairs of rows that are not of one document, or that the document's own mask forbids: its ``pattern``,
    and what is behind the query if it is ``causal``.

    Inputs are the scores, the ``rows`` (S,) and ``length`` (1,), both int64, ``is_key`` (S,) bool, and a plan of the
    same pairs (see :mod:`fuser.kernels.plan`), which attention kernels read in their place. Row r is position r %
    length of document r // length. How long the plan is, is known when it is there.
    """

    causal: bool = False
    pattern: Mask | None = None

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, rows, length, is_key, _ = inputs
        return (scores.masked_fill(~self.allowed(rows, length, is_key), -math.inf),)

    def allowed(self, rows: Tensor, length: Tensor, is_key: Tensor) -> Tensor:
        """Which rows see which: (S, S) bool, or (H, S, S) where the pattern has heads."""
        size = int(length)
        document, at = rows // size, rows % size
        allowed = (document[:, None] == document) & is_key
        if self.causal:
            allowed = allowed & (at[:, None] >= at)
        if self.pattern is not None:
            allowed = allowed & self.pattern.dense(size, size).to(rows.device)[..., at[:, None], at]
        return allowed

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        pattern = "" if self.pattern is None else str(self.pattern)
        return ", ".join(part for part in ("packed", "causal" if self.causal else "", pattern) if part)
