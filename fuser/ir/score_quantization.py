"""What computes scores of attention with few bits: the interface of :mod:`fuser.ir.prediction` and
:mod:`fuser.ir.int8_attention`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fuser.ir.scores import ScoreRule

SMALLEST = 2.0**-100
"""Rows whose size is below this are taken as zero."""
TOO_LARGE = 2.0**50
"""Rows with a magnitude of this or more have no codes of their own step, so that no product of steps overflows."""
LARGEST_BYTE = 127
"""The largest code of 8 bits."""


class ScoreQuantization(ABC):
    """How scores of attention are made of *codes*, whole numbers times a step, and which of them are not.

    A row of q or k is about its codes times its step, so a score is the product of two rows of codes in integers, times
    both steps and the scale of attention.
    """

    bits: int
    """Width of codes, sign included."""
    high_bits: int | None = None
    """The same of chosen scores; None if they are products of q and k as given."""
    unmasked_maximum: bool = False
    """Whether decisions are made from scores without what is added to them."""
    prunes: ClassVar[bool] = False
    """Whether scores that are not computed in full are left out."""
    may_be_exact: ClassVar[bool] = False
    """Whether few bits are for speed alone, so that programs take exact attention where that is faster."""

    @property
    @abstractmethod
    def is_by_row(self) -> bool:
        """Whether what becomes of a row of scores depends on no other row of q and k than those that it is made of."""

    def is_by_document(self, rule: ScoreRule | None, *, lse: bool = False) -> bool:
        """Whether a kernel gives a row of packed documents what it has in its document alone, under this rule and with
        the log-sum-exp of scores if that is wanted."""
        return self.is_by_row

    @abstractmethod
    def codes(self, x: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Whole numbers (…, S, D) and the step of every row, (…, S, 1), of q (``which`` is 0) or k (1). Codes have the
        gradient of what they are rounded from, steps none."""

    @abstractmethod
    def chosen(self, scores: Tensor) -> Tensor:
        """Which of the scores (B, H, Sq, Sk) are to be computed in full: bool. Those at -inf may not be seen."""

    def check_calibrated(self) -> None:  # noqa: B027 there is nothing to find unless a subclass says so
        """Raise ScoreError if numbers are still to be found."""

    def rounded(self, x: Tensor, which: int) -> Tensor:
        """The rows that codes of q (``which`` is 0) or k (1) stand for."""
        codes, step = self.codes(x, which)
        return codes * step

    def predicted(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Scores (B, H, Sq, Sk) by codes of q (B, H, Sq, D) and k (B, H, Sk, D), in the dtype of both."""
        return product_of_codes(self.codes(q, 0), self.codes(k, 1), scale)

    def in_full(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The scores (B, H, Sq, Sk) that chosen ones become, of q (B, H, Sq, D) and k (B, H, Sk, D)."""
        return (q * scale) @ k.mT

    def rounded_in_full(self, x: Tensor) -> Tensor:
        """The rows of q or k that chosen scores are products of."""
        return x

    @abstractmethod
    def mixed(self, exact: Tensor, predicted: Tensor, chosen: Tensor) -> Tensor:
        """The scores that attention goes on with, apart from those that are left out."""

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        additive_mask: Tensor | None = None,
        score: ScoreRule | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, Sq, Dv) and which scores were computed in full, bool (B, H, Sq, Sk), in plain PyTorch.

        Args:
            q: (B, H, Sq, D).
            k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv); H is a multiple of Hkv.
            additive_mask: added to the scores, broadcastable to (B, H, Sq, Sk); pairs at -inf do not exist, those at
                a number as low as -10000 do, without weight, as in the authors' software.
            score: what becomes of scaled scores, predicted ones too, before the mask is added.
            scale: default 1 / sqrt(D).

        Gradients pass codes as if they were not rounded and take steps and decisions as constants.
        """
        dtype, group = arithmetic(q), q.shape[1] // max(k.shape[1], 1)
        queries = q.to(dtype)
        keys, values = (t.to(dtype).repeat_interleave(group, 1) for t in (k, v))
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        bias = torch.zeros((), dtype=dtype, device=q.device) if additive_mask is None else additive_mask.to(dtype)
        forbidden = torch.isneginf(bias)
        predicted = self.predicted(queries, keys, scale)

        def changed(scores: Tensor) -> Tensor:
            return scores if score is None else score.expression.evaluate(scores)[0]

        seen = changed(predicted) if self.unmasked_maximum else changed(predicted) + bias
        chosen = self.chosen(seen.masked_fill(forbidden, -math.inf))
        scores = changed(self.mixed(self.in_full(queries, keys, scale), predicted, chosen)) + bias
        if self.prunes:
            forbidden = forbidden | ~chosen
        scores = scores.masked_fill(forbidden, -math.inf)
        weights = torch.softmax(scores, -1).masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0)
        return (weights @ values).to(q.dtype), chosen


def product_of_codes(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Scores (B, H, Sq, Sk) of rows as codes and steps."""
    return (q[0] @ k[0].mT) * ((q[1] * scale) * k[1].mT)


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype that scores of ``x`` are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def have_codes(x: Tensor) -> Tensor:
    """Whether rows (…, S, D) are finite and not too large: (…, S, 1)."""
    return (x.detach().abs() < TOO_LARGE).all(-1, keepdim=True)


def row_codes(x: Tensor, sound: Tensor, largest: int = LARGEST_BYTE) -> tuple[Tensor, Tensor]:
    """Codes (…, S, D) with ``largest`` at the largest element of each row, and the step of every row, (…, S, 1), NaN
    where a row is not ``sound``, bool (…, S, 1). Codes have the gradient of what they are rounded from, steps none."""
    with torch.no_grad():
        size = x.abs().amax(-1, keepdim=True)
        used = sound & (size >= SMALLEST)
        # A number by a tensor would be rounded twice.
        factor = torch.where(used, size.new_full((), largest) / size, 0.0)
        step = torch.where(used, size / largest, 0.0).masked_fill(~sound, math.nan)
    exact = x.masked_fill(~used, 0.0) * factor
    rounded = exact.detach().round()
    return rounded + (exact - exact.detach()), step
