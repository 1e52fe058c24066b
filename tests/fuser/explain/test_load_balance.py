"""Measures of Sanger's load balance against counting by hand, and the authors' example of latency."""

from __future__ import annotations

import math

import pytest
import torch

from fuser.explain.load_balance import load_balance, sanger_seconds


def test_vectors_are_split_into_rows_of_the_array() -> None:
    chosen = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    chosen[0, 0, 0, :40] = True
    chosen[0, 0, 1, :8] = True
    found = load_balance(chosen)
    # 40 and 8 scores take 2 + 1 rows of 32 elements, or 3 + 1 of 16; 62 vectors are empty.
    assert found.half_skip == 48 / (3 * 32) and found.half_no_skip == 48 / ((3 + 62) * 32)
    assert found.quarter_skip == 48 / (4 * 16) and found.quarter_no_skip == 48 / ((4 + 62) * 16)
    assert found.density == 48 / 64**2
    names = ["50%-no-skip", "50%-skip", "25%-no-skip", "25%-skip", "overall-sparsity"]
    assert list(found.row) == names and found.row["overall-sparsity"] == found.density


def test_padding_counts_nowhere() -> None:
    chosen = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.3
    valid = torch.arange(128) < torch.tensor([[64], [128]])
    alone = [load_balance(chosen[:1, :, :64, :64]), load_balance(chosen[1:])]
    found = load_balance(chosen, valid)
    assert found.density == pytest.approx((alone[0].density + alone[1].density) / 2, rel=1e-12)
    rest = chosen.clone()
    rest[0, :, 64:] = True
    rest[0, :, :, 64:] = True
    assert load_balance(rest, valid) == found
    only = load_balance(chosen[:1], valid[:1])
    assert only == alone[0]


def test_nothing_chosen_has_no_share() -> None:
    found = load_balance(torch.zeros(1, 1, 64, 64, dtype=torch.bool))
    assert found.half_no_skip == 0.0 and math.isnan(found.half_skip) and found.density == 0.0


@pytest.mark.parametrize(
    ("chosen", "valid", "message"),
    [
        (torch.ones(1, 1, 60, 60, dtype=torch.bool), None, "multiple of 64"),
        (torch.ones(1, 1, 64, 64), None, "decisions are bool"),
        (torch.ones(1, 1, 64, 64, dtype=torch.bool), torch.ones(64, dtype=torch.bool), "valid must be bool"),
    ],
)
def test_other_tensors_are_refused(chosen: torch.Tensor, valid: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_balance(chosen, valid)


def test_latency_is_that_of_the_authors_example() -> None:
    assert sanger_seconds(512, 0.2, 0.8) == pytest.approx(1.057e-3, rel=5e-4)
    assert sanger_seconds(512) == pytest.approx(1.573e-3, rel=5e-4)
