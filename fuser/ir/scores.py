"""Score rules: what attention makes of a scaled score before a bias is added to it and masks are applied.

A rule is a frozen dataclass of floats here, which says what it computes, and a header in ``templates/cpu/attention/``
that all targets share, with a struct of its name: ``apply(Number score)``, written with the constants of the
configuration (``kCap`` for ``cap``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from fuser.ir.errors import ScoreError
from fuser.ir.expression import Builder, Expression, Op


@dataclass(frozen=True)
class ScoreRule(ABC):
    """Base of the rules."""

    @property
    @abstractmethod
    def expression(self) -> Expression:
        """What becomes of a score."""

    @property
    @abstractmethod
    def derivative(self) -> Expression:
        """The derivative of :attr:`expression` at a score, for gradients."""

    @property
    def name(self) -> str:
        """The struct in C++."""
        return type(self).__name__

    @property
    def header(self) -> str:
        """The file of the struct."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower() + ".h"

    @property
    def constants(self) -> Mapping[str, float]:
        """The fields by their names in C++."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {f"k{name.title().replace('_', '')}": float(value) for name, value in values.items()}


@dataclass(frozen=True)
class SoftCap(ScoreRule):
    """``cap * tanh(score / cap)``: scores stay between -cap and cap, as in Gemma 2.

    Raises ScoreError for a cap that is no finite number above zero.
    """

    cap: float

    def __post_init__(self) -> None:
        if not 0.0 < self.cap < math.inf:
            raise ScoreError(f"the cap of scores must be a finite number above zero, got {self.cap}")
        object.__setattr__(self, "cap", float(self.cap))

    @functools.cached_property
    def expression(self) -> Expression:
        b = Builder()
        cap = b.constant(self.cap)
        return b.build(b.apply(Op.MUL, b.apply(Op.TANH, b.apply(Op.DIV, b.input(0), cap)), cap))

    @functools.cached_property
    def derivative(self) -> Expression:
        b = Builder()
        tanh = b.apply(Op.TANH, b.apply(Op.DIV, b.input(0), b.constant(self.cap)))
        return b.build(b.apply(Op.SUB, b.constant(1.0), b.apply(Op.MUL, tanh, tanh)))
