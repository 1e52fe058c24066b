"""Score rules: what attention makes of a scaled score before a bias is added to it and masks are applied.

A rule is a frozen dataclass of floats here, and a header in ``templates/cpu/attention/`` that all targets share, with a
struct of its name: ``apply(Number score)``, written with the constants of the configuration (``kCap`` for ``cap``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRule:
    """Base of the rules."""

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
    """``cap * tanh(score / cap)``: scores stay between -cap and cap, as in Gemma 2."""

    cap: float

    def __post_init__(self) -> None:
        if not 0.0 < self.cap < math.inf:
            raise ValueError(f"the cap of scores must be a finite number above zero, got {self.cap}")
