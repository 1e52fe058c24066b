"""From which length a mechanism is faster than exact attention."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import load_script

import fuser.attention


def points(name: str, gains: dict[int, float]) -> list[dict[str, Any]]:
    return [{"mechanism": name, "tokens": n, "faster_than": {"softmax": gain}} for n, gain in gains.items()]


@pytest.mark.parametrize(
    ("gains", "first"),
    [
        ({100: 0.5, 400: 2.0, 1600: 8.0}, 200),
        ({100: 1.5, 400: 2.0}, 100),
        ({100: 2.0, 400: 0.5, 1600: 2.0}, 800),
        ({100: 2.0, 400: 0.5}, None),
    ],
)
def test_crossings_are_between_the_lengths(gains: dict[int, float], first: int | None) -> None:
    found = load_script("efficient").crossings(points("eva", gains))
    assert found == [{"mechanism": "eva", "faster_from": {"softmax": first}}]


def test_every_mechanism_is_measured() -> None:
    assert {name for name, _ in load_script("efficient").MECHANISMS.values()} == {*fuser.attention.names()}
