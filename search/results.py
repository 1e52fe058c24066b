"""What a search tells: where it stands, and what it found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fuser.codegen.choice import Choice
from fuser.search.space import Point, Space

Phase = str
"""``"build"``, ``"kernels"``, ``"trials"`` or ``"verify"``."""


@dataclass(frozen=True)
class Progress:
    """Where a search stands. Times in seconds; ``best`` and ``default`` are of the whole model."""

    phase: Phase
    study: str
    trials: int
    of: int
    failures: int
    duplicates: int
    best: float | None
    default: float | None
    elapsed: float
    eta: float | None
    kernels_measured: int
    kernels_total: int
    message: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found. ``choices`` are by region hash; ``seconds`` and ``default_seconds`` of the whole model;
    ``speedup`` is default over best, both measured once more against each other in a fresh process (None when that was
    not done). ``trials`` counts all of the study, ``measured`` and ``remembered`` those of this call.
    ``rank_correlation`` is Spearman's, of predicted and measured kernel times."""

    study: str
    storage: str
    strategy: str
    space: Space
    best: Point
    choices: Mapping[str, Choice]
    seconds: float
    default_seconds: float
    speedup: float | None
    trials: int
    measured: int
    remembered: int
    failures: tuple[tuple[int, str], ...]
    pruned: Mapping[str, int]
    rank_correlation: float | None
    kernels_measured: int
    programs: int
    schemes: int
    stopped: str
    seconds_building: float
    seconds_measuring: float
    seconds_searching: float
    seconds_total: float

    @property
    def record(self) -> dict[str, Any]:
        """What the study keeps of it."""
        left_out = ("space", "choices", "programs", "schemes", "failures")
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        # There is no infinity in JSON.
        default = None if math.isinf(self.default_seconds) else self.default_seconds
        return {**kept, "best": str(self.best), "default_seconds": default}

    def summary(self) -> str:
        """The result in a few lines."""
        gain = self.default_seconds / self.seconds if self.seconds else 1.0
        default = f"the default scheme {self.default_seconds * 1e3:.3f} ms ({gain:.3f}×"
        default += f"{'' if self.speedup is None else f'; {self.speedup:.3f}× when measured again'})"
        if math.isinf(self.default_seconds):
            default = "the default scheme failed"
        exact = "" if self.space.is_exact else "at least "
        lines = [
            f"{self.study}: {self.seconds * 1e3:.3f} ms, {default}",
            f"{exact}{self.programs} distinct programs of {exact}{self.schemes} schemes; {self.trials} trials, "
            f"{self.measured} measured and {self.remembered} remembered now, {len(self.failures)} failed; "
            f"ended by {self.stopped}",
            f"{self.seconds_total:.1f} s: building {self.seconds_building:.1f}, "
            f"measuring {self.seconds_measuring:.1f}, searching {self.seconds_searching:.1f}",
        ]
        if self.rank_correlation is not None:
            lines.append(
                f"{self.kernels_measured} kernels measured; rank correlation with the cost model "
                f"{self.rank_correlation:.2f}"
            )
        lines += [f"{count} kernels left out: {reason}" for reason, count in self.pruned.items()]
        return "\n".join(lines)
