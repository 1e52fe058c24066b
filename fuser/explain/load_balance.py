"""How well decisions fill Sanger's array of processing elements, and how long that takes: the authors' measures.

Sanger (MICRO 2021) packs decisions by vectors of 64 neighbouring keys of one row. A vector with n scores to compute
becomes ceil(n / elements) rows of an array with 16 or 32 processing elements in a row, 25 % or 50 % of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PORTS = 64
_HIDDEN = 768
_OPERATIONS = 64 * 16 * 1e9 * 2
"""Operations in a second: 64 rows of 16 elements at 1 GHz, a multiplication and an addition each."""


@dataclass(frozen=True)
class LoadBalance:
    """Shares of elements at work, where vectors without a score take a row (``no_skip``) or none, and the mean share of
    scores that are computed. NaN where there are none."""

    half_no_skip: float
    half_skip: float
    quarter_no_skip: float
    quarter_skip: float
    density: float

    @property
    def row(self) -> dict[str, float]:
        """The columns of the authors' files, where the density is called sparsity."""
        return {
            "50%-no-skip": self.half_no_skip,
            "50%-skip": self.half_skip,
            "25%-no-skip": self.quarter_no_skip,
            "25%-skip": self.quarter_skip,
            "overall-sparsity": self.density,
        }


def load_balance(chosen: Tensor, valid: Tensor | None = None) -> LoadBalance:
    """The measures of decisions ``chosen``, bool (B, H, S, S), such as ``Sanger.reference`` returns.

    ``valid``, bool (B, S), is False for tokens of padding: neither their rows nor their columns count. Raises
    ValueError for other shapes, and unless S is a multiple of 64.
    """
    shape = tuple(chosen.shape)
    if len(shape) != 4 or shape[2] != shape[3] or shape[3] % _PORTS or chosen.dtype != torch.bool:
        raise ValueError(f"decisions are bool (B, H, S, S) with S a multiple of {_PORTS}, got {chosen.dtype} {shape}")
    batch, _, length, _ = shape
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=chosen.device)
    if tuple(valid.shape) != (batch, length) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool {(batch, length)}, got {valid.dtype} {tuple(valid.shape)}")
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None].expand_as(chosen)
    kept = chosen & pairs
    counts = kept.reshape(-1, _PORTS).sum(1)[pairs.reshape(-1, _PORTS).any(1)].double()
    empty = (counts == 0).sum()

    def shares(elements: int) -> tuple[float, float]:
        work, rows = (counts / elements).sum(), (counts / elements).ceil().sum()
        return float(work / (rows + empty)), float(work / rows)

    density = kept.sum((1, 2, 3)).double() / pairs.sum((1, 2, 3))
    return LoadBalance(*shares(32), *shares(16), float(density.mean()))


def sanger_seconds(length: int, density: float = 1.0, balance: float = 1.0) -> float:
    """Predicted seconds of one attention layer, 768 wide, on Sanger's array: projections, then products whose work is
    ``density`` of all scores at a share ``balance`` of the elements. As in the authors' model, the output's projection
    counts among the latter."""
    projections = 3 * 2 * length * _HIDDEN**2
    rest = 4 * length**2 * _HIDDEN + 2 * length * _HIDDEN**2
    return (projections + rest * density / balance) / _OPERATIONS
