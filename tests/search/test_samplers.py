"""Samplers: proper Optuna samplers that propose legal programs, each once, and follow AToffer's rule."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from fuser.ir.errors import SearchError
from fuser.runtime.device import cpu_target
from fuser.schemes import bert_layer, from_atoffer
from fuser.search.samplers import (
    GROUP,
    AnnealingSampler,
    AtofferSampler,
    RandomSampler,
    RewardSampler,
    distributions,
    encode,
    make_sampler,
    suggest,
)
from fuser.search.space import Point, Space

# Rates of no machine in particular, so that predictions are the same on all.
TARGET = dataclasses.replace(cpu_target(), peak_flops=1e11, bandwidth=1e10, launch_seconds=1e-6)
SPACE = Space.of([bert_layer(sequence=16, hidden=64, heads=2, inner=128)], TARGET, 2)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def costs(region: int, members: int, kernel: int) -> float:
    """Arbitrary but fixed: what the cost model says, off by up to a factor of two."""
    return SPACE.predicted(region, members, kernel) * (1 + np.random.default_rng([members, kernel]).random())


def run(sampler: optuna.samplers.BaseSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: SPACE.additive(suggest(trial, SPACE), costs), n_trials=trials)
    return study


def points(study: optuna.Study) -> list[str]:
    return [t.user_attrs["point"] for t in study.trials]


@pytest.mark.parametrize("kind", [RandomSampler, AnnealingSampler, RewardSampler])
def test_proposals_are_legal_new_and_reproducible(kind: type[RandomSampler]) -> None:
    study = run(kind(SPACE, 5), 60)
    found = points(study)
    assert len(set(found)) == len(found)
    for text in found:
        SPACE.choices(Point.parse(text))
    assert points(run(kind(SPACE, 5), 60)) == found
    assert points(run(kind(SPACE, 6), 60)) != found


@pytest.mark.parametrize("strategy", ["random", "anneal", "reward", "tpe", "gp", "atoffer", "atoffer-published"])
def test_every_strategy_proposes_legal_programs(strategy: str) -> None:
    if strategy == "gp":
        pytest.importorskip("scipy", reason="Optuna's Gaussian process needs SciPy")
    study = run(make_sampler(strategy, SPACE, 0, costs, from_atoffer), 15)
    for trial in study.trials:
        point = Point.parse(trial.user_attrs["point"])
        SPACE.choices(point)
        # What was sampled denotes what was measured.
        assert encode(SPACE, point).keys() <= distributions(SPACE).keys()
    with pytest.raises(SearchError, match="no strategy"):
        make_sampler("best", SPACE, 0)
    with pytest.raises(SearchError, match="from_atoffer"):
        make_sampler("atoffer", SPACE, 0)


def test_pruned_kernels_are_never_proposed() -> None:
    space = SPACE.prune(1.05)
    for name in ("random", "reward", "anneal", "tpe"):
        study = optuna.create_study(sampler=make_sampler(name, space, 0))
        for _ in range(20):
            point = suggest(study.ask(), space)
            for region, program in zip(space.regions, point.regions, strict=True):
                assert all(kernel in region.allowed[members] for members, kernel in program)


def test_rewards_find_better_programs_than_chance() -> None:
    rewarded = [run(RewardSampler(SPACE, seed), 80).best_value for seed in range(3)]
    random = [run(RandomSampler(SPACE, seed), 80).best_value for seed in range(3)]
    assert statistics.mean(rewarded) < statistics.mean(random)


def ended(number: int, group: str, value: float | None) -> FrozenTrial:
    trial = create_trial(
        state=TrialState.COMPLETE if value is not None else TrialState.FAIL,
        value=value,
        system_attrs={GROUP: group} if group else {},
    )
    trial.number = number
    return trial


def test_weights_follow_the_rule_of_atoffer() -> None:
    sampler = RewardSampler(SPACE)
    names = [sampler.name(i) for i in range(len(sampler.groups))]
    initial = [2.0 ** max(len(g.switches), 1) for g in SPACE.regions[0].natural_groups]
    first = [ended(0, "", 10.0)]
    assert sampler.weights(first) == initial
    # Groups 1 and 2 beat the best from before the window, 1 twice: only it has the most points.
    window = [ended(1, names[1], 9.0), ended(2, names[1], 9.5), ended(3, names[2], 8.0)]
    assert sampler.weights([*first, *window]) == initial
    window.append(ended(4, names[0], 11.0))
    after = list(initial)
    after[1] += 4
    assert sampler.weights([*first, *window]) == after
    # The next window is compared with 8; ties share, failures and slower trials count nothing.
    second = [ended(5, names[3], 7.0), ended(6, names[4], 7.5), ended(7, names[5], None), ended(8, names[1], 8.5)]
    after[3] += 2
    after[4] += 2
    assert sampler.weights([*first, *window, *second]) == after


def test_groups_are_drawn_by_weight() -> None:
    sampler = RewardSampler(SPACE, 1)
    study = run(sampler, 40)
    drawn = Counter(t.system_attrs[GROUP] for t in study.trials)
    assert set(drawn) <= {sampler.name(i) for i in range(len(sampler.groups))}
    assert len(drawn) > 2


def integers(published: bool) -> set[int]:
    """What AToffer's six groups of 1, 1, 2, 2, 1 and 2 bits, its flag and its window of values can express."""
    sampler = AtofferSampler(SPACE, from_atoffer, published=published)
    codes = ([code >> i & 1 for i in range(10)] for code in range(1 << 10))
    values = {sampler.value(bits[0], bits[1:]) for bits in codes}
    return {value for value in values if sampler.LOWEST <= value < sampler.END}


def test_the_published_encoding_reaches_384_integers() -> None:
    values = integers(published=True)
    assert len(values) == 384
    decoded = [from_atoffer(value) for value in values]
    assert sum(flag and (2, 6) in segments for flag, segments, _ in decoded) == 128
    # The fault: with the attention bit at 0, operators 1 to 5 are one segment.
    assert sum((1, 5) in segments for _, segments, _ in decoded) == 128


def test_as_meant_attention_is_fused_whatever_its_bit() -> None:
    assert all((2, 6) in from_atoffer(value)[1] for value in integers(published=False))


def test_atoffer_starts_from_its_expert_scheme_and_never_repeats_an_integer() -> None:
    study = run(AtofferSampler(SPACE, from_atoffer, 3), 100)
    values = [t.system_attrs["fuser:atoffer"]["value"] for t in study.trials]
    assert values[0] == 41115
    assert len(set(values)) == 100
    assert set(values) <= set(range(16384, 49151))


def test_atoffer_needs_a_bert_layer() -> None:
    def refuse(value, region):  # type: ignore[no-untyped-def]
        raise SearchError("no layer")

    with pytest.raises(SearchError):
        AtofferSampler(SPACE, refuse)
