"""AToffer's loop reaches what it is known to reach, learns what it should, and repeats itself from a seed."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import ModuleType

import pytest
from scripts import load_script

from fuser.schemes import from_atoffer


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    return load_script("atoffer/loops")


def runs_attention_kernel(value: int) -> bool:
    handwritten, segments, _ = from_atoffer(value)
    return handwritten and (2, 6) in segments


def test_reachable_schemes(loops: ModuleType) -> None:
    # Counted from the published code: 384 values, 128 of which run the handwritten attention kernel.
    found = loops.reachable()
    assert len(found) == 384
    assert sum(map(runs_attention_kernel, found)) == 128
    assert loops.START in found and runs_attention_kernel(loops.START)
    # As it was meant, the second pattern too leaves operators 2 to 6 in one segment.
    meant = loops.reachable(as_published=False)
    assert all((2, 6) in from_atoffer(value)[1] for value in meant)


def test_the_slip_moves_a_segment(loops: ModuleType) -> None:
    groups = ["1", "0", "00", "11", "0", "11"]
    assert from_atoffer(loops.value_of("1", groups))[1][:2] == [(1, 5), (6, 9)]
    assert from_atoffer(loops.value_of("1", groups, as_published=False))[1][0] == (2, 6)


@pytest.mark.parametrize("as_published", [True, False])
def test_reward_loop_stays_inside_and_never_repeats(loops: ModuleType, as_published: bool) -> None:
    found = loops.reward_loop(lambda value: value % 97, seed=3, as_published=as_published)
    values = [value for value, _ in found]
    assert values[0] == loops.START
    assert len(values) == len(set(values)) == 128
    assert set(values) <= loops.reachable(as_published)
    assert found == loops.reward_loop(lambda value: value % 97, seed=3, as_published=as_published)
    assert found != loops.reward_loop(lambda value: value % 97, seed=4, as_published=as_published)


def test_rewards_lead_to_the_group_that_matters(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    original = loops._drawn

    def spy(weights: list[int], draw: object) -> int:
        drawn.append(list(weights))
        group: int = original(weights, draw)
        return group

    monkeypatch.setattr(loops, "_drawn", spy)
    best = iter(range(1000, 0, -1))
    # Whatever changes, times fall at every evaluation: each window rewards its most frequent groups, at least by 2.
    loops.reward_loop(lambda value: float(next(best)), seed=0, iterations=41)
    assert drawn[0] == [2, 2, 4, 4, 2, 4]
    windows = list(dict.fromkeys(map(tuple, drawn)))
    gains = [[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(windows)]
    assert len(gains) == 9
    assert all(set(gain) <= {0, max(gain)} and max(gain) in (2, 4, 8, 16) for gain in gains)


def test_weights_are_probabilities(loops: ModuleType) -> None:
    draw = random.Random(0)
    count = Counter(loops._drawn([2, 2, 4, 4, 2, 4], draw) for _ in range(18_000))
    # Five standard deviations of a binomial count of probability 4 / 18 are 280.
    assert all(abs(count[i] - 1000 * w) < 300 for i, w in enumerate([2, 2, 4, 4, 2, 4]))


def test_random_values_differ(loops: ModuleType) -> None:
    found = loops.random_loop(float, seed=1)
    assert len({value for value, _ in found}) == 128
    assert all(time == value for value, time in found)


def test_annealing_flips_one_bit_and_descends_when_cold(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loops.annealing_loop(lambda value: bin(value).count("1"), seed=2)
    assert len(found) == 128
    monkeypatch.setattr(loops, "_TEMPERATURE", 1e-9)
    current = None
    for value, time in loops.annealing_loop(lambda value: bin(value).count("1"), seed=2, iterations=400):
        if current is None:
            current = value, time
            continue
        assert bin(value ^ current[0]).count("1") == 1
        if time <= current[1]:
            current = value, time
    assert current is not None and current[1] == 0
