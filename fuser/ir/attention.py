"""What an attention computes, apart from its tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fuser.ir.masks import Mask
from fuser.ir.masks.columns import digest
from fuser.ir.operators import canonical
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule


@dataclass(frozen=True)
class AttentionSpec:
    """``mask`` says which pairs of queries and keys count, ``rule`` what becomes of their scaled scores, ``quantize``
    which scores are computed with few bits."""

    mask: Mask
    rule: ScoreRule | None = None
    quantize: ScoreQuantization | None = None

    def current(self) -> AttentionSpec:
        """The same of :meth:`Mask.current`."""
        return self.of(self.mask.current())

    def of(self, mask: Mask) -> AttentionSpec:
        """The same of another mask."""
        return self if mask is self.mask else dataclasses.replace(self, mask=mask)

    def named(self, mask: str) -> str:
        """The name of this among all specifications, where ``mask`` is that of its mask: the same in every process."""
        if self.rule is None and self.quantize is None:
            return mask
        quantize = [] if self.quantize is None else [canonical(self.quantize)]
        return digest(["fuser.attention", 1, mask, canonical(self.rule), *quantize])
