"""Attention in 8 bits: scores of int8 codes, and weights and values in bytes where a CPU multiplies those.

Keys lose their mean over tokens first, as in SageAttention (Zhang, Wei, Zhang, Zhu, Chen, ICLR 2025): what it adds to
scores is the same for all of a row, so softmax does not see it, and codes keep their digits for what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.errors import ScoreError
from fuser.ir.score_quantization import ScoreQuantization, have_codes, row_codes
from fuser.ir.scores import ScoreRule


@dataclass(frozen=True)
class Int8Attention(ScoreQuantization):
    """Scores from 8-bit codes of queries and keys, their largest one at the largest element of each row.

    Fields:
        smooth: whether keys lose their mean over all tokens of a head, of packed documents over those of their own,
            before they are rounded. Without, no row depends on another.
        skip: the part of a row's probability that may be left out, from 0 to below 1. A tile of keys is skipped when
            each of its scores is further below the largest that its row has met than ln(Sk / ``skip``): what is lost of
            a row is then at most ``skip`` of its probability, and so at most 2 × ``skip`` × max |v| of an output.

    A row of zeros, or one below 2^-100, has codes of zero. Of heads with keys that are not finite, or as large as 2^50,
    all scores are computed in full, and do what they do in exact attention, as do those of such a query.

    On CPUs with VNNI the product with the values is one of bytes, too: of values rounded to 127ths of the largest of
    their row, and of weights times the steps of these, rounded to 255ths of the largest in their row and block of 96
    keys, with an ordered dither of four steps, so that many small ones keep their sum. Elsewhere, and in
    :meth:`reference`, it is that of exact attention.

    Few bits are for speed alone here: ``fuser.optimize`` takes exact attention where that is faster, as of short rows.
    GPUs skip nothing.

    Raises ScoreError for fields that are not of these values.
    """

    smooth: bool = True
    skip: float = 1e-4

    bits = 8
    may_be_exact = True

    def __post_init__(self) -> None:
        if not isinstance(self.smooth, bool):
            raise ScoreError(f"smooth must be True or False, not {self.smooth!r}")
        if isinstance(self.skip, bool) or not isinstance(self.skip, (int, float)) or not 0.0 <= self.skip < 1.0:
            raise ScoreError(f"skip is a part of a probability, from 0 to below 1, not {self.skip!r}")
        object.__setattr__(self, "skip", float(self.skip))

    @property
    def is_by_row(self) -> bool:
        return not self.smooth

    def is_by_document(self, rule: ScoreRule | None, *, lse: bool = False) -> bool:
        # What the mean adds to scores is left out there, which is the same for all of a row, but not after a rule.
        return self.is_by_row or (rule is None and not lse)

    def mean(self, k: Tensor) -> Tensor:
        """What keys (…, S, D) lose before they are rounded, (…, 1, D)."""
        if not self.smooth or not k.shape[-2]:
            return k.new_zeros(*k.shape[:-2], 1, k.shape[-1])
        return k.detach().double().mean(-2, keepdim=True).to(k.dtype)

    def codes(self, x: Tensor, which: int) -> tuple[Tensor, Tensor]:
        if which == 1:
            x = x - self.mean(x)
        sound = have_codes(x)
        return row_codes(x, sound.all(-2, keepdim=True) if which == 1 else sound)

    def rounded(self, x: Tensor, which: int) -> Tensor:
        near = super().rounded(x, which)
        return near + self.mean(x) if which == 1 else near

    def predicted(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        near = super().predicted(q, k, scale)
        return near + (q * scale) @ self.mean(k).mT if self.smooth else near

    def chosen(self, scores: Tensor) -> Tensor:
        return scores.detach().isnan()

    def mixed(self, exact: Tensor, predicted: Tensor, chosen: Tensor) -> Tensor:
        return torch.where(chosen, exact, predicted)
