"""Optuna samplers that propose legal programs: AToffer's group rewards, random points, simulated annealing.

A trial's parameters are ``R.eE``, whether edge ``E`` of region ``R`` keeps its two operators in one kernel, and
``R.kMASK``, the kernel of the group ``MASK``. :func:`suggest` reads any sampler's parameters as a legal point.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from fuser.ir.errors import SchemeError, SearchError
from fuser.ir.graph import Region
from fuser.ir.scheme import Scheme
from fuser.search.space import Costs, Groups, Point, RegionSpace, Space

Decode = Callable[[int, Region], tuple[bool, list[tuple[int, int]], Scheme]]
"""``fuser.schemes.from_atoffer``."""

POINT = "point"
"""User attribute of a trial: its program as text."""
GROUP = "fuser:group"
"""System attribute of a trial: the natural group that the reward sampler drew anew."""
_CODE = "fuser:atoffer"
_ATTEMPTS = 400
_WINDOW = 4


class ExhaustedError(Exception):
    """A sampler finds no program that has not been tried."""


def distributions(space: Space) -> dict[str, CategoricalDistribution]:
    """The parameters of all trials of a space."""
    found = {}
    for at, region in enumerate(space.regions):
        for edge in range(len(region.region.edges)):
            found[f"{at}.e{edge}"] = CategoricalDistribution((False, True))
        for members, choices in region.kernels.items():
            if len(choices) > 1:
                found[f"{at}.k{members:x}"] = CategoricalDistribution(tuple(range(len(choices))))
    return found


def encode(space: Space, point: Point) -> dict[str, Any]:
    """The canonical parameters of a point."""
    params: dict[str, Any] = {}
    for at, (region, program) in enumerate(zip(space.regions, point.regions, strict=True)):
        params.update((f"{at}.e{edge}", bit) for edge, bit in enumerate(region.bits(program)))
        params.update((f"{at}.k{members:x}", kernel) for members, kernel in program if len(region.kernels[members]) > 1)
    return params


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The legal point that a trial's parameters denote: bits are repaired, pruned kernels give way to the next that is
    not. Noted as the trial's user attribute ``point``."""
    programs = []
    for at, region in enumerate(space.regions):
        edges = range(len(region.region.edges))
        sets = region.repair([trial.suggest_categorical(f"{at}.e{edge}", (False, True)) for edge in edges])
        program = []
        for members in sets:
            count, allowed = len(region.kernels[members]), region.allowed[members]
            kernel = 0
            if count > 1:
                kernel = trial.suggest_categorical(f"{at}.k{members:x}", tuple(range(count)))
            if kernel not in allowed:
                kernel = next((k for k in allowed if k > kernel), allowed[0])
            program.append((members, kernel))
        programs.append(tuple(program))
    point = Point(tuple(programs))
    trial.set_user_attr(POINT, str(point))
    return point


class PointSampler(optuna.samplers.BaseSampler):
    """Base of the samplers that propose whole points of a space, each only once.

    Reproducible: what is proposed depends on ``seed``, the trial's number and the trials before it alone.
    """

    repeats = False
    """Whether a program that was tried before may be proposed again."""

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space = space
        self.seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(distributions(self.space))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number and POINT in t.user_attrs]
        generator = np.random.default_rng([self.seed, trial.number])
        return encode(self.space, self.propose(study, trial, before, generator))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise SearchError(f"the parameter {param_name} is not one of this search's space")

    def propose(
        self, study: optuna.Study, trial: FrozenTrial, before: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> Point:
        """The next point, given the trials before. Raises ExhaustedError when it finds no new one."""
        raise NotImplementedError

    def unseen(self, points: Iterator[Point], before: Sequence[FrozenTrial]) -> Point:
        """The first of ``points`` that no trial before had."""
        known = {t.user_attrs[POINT] for t in before}
        for point in itertools.islice(points, _ATTEMPTS):
            if str(point) not in known:
                return point
        raise ExhaustedError


class RandomSampler(PointSampler):
    """Uniform bits, repaired, and uniform kernels."""

    def propose(
        self, study: optuna.Study, trial: FrozenTrial, before: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> Point:
        return self.unseen((self.space.random(generator) for _ in itertools.count()), before)


class AnnealingSampler(PointSampler):
    """Simulated annealing: one switch or one kernel changes; a slower neighbour is accepted with probability
    exp(−(difference / first time) / temperature), the temperature falling by ``cooling`` each trial."""

    def __init__(self, space: Space, seed: int = 0, temperature: float = 0.05, cooling: float = 0.97) -> None:
        super().__init__(space, seed)
        self.temperature = temperature
        self.cooling = cooling

    def propose(
        self, study: optuna.Study, trial: FrozenTrial, before: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> Point:
        done = [t for t in before if t.state is TrialState.COMPLETE]
        if not done:
            return self.unseen((self.space.random(generator) for _ in itertools.count()), before)
        current = done[0]
        for step, other in enumerate(done[1:]):
            worse = (_value(other) - _value(current)) / _value(done[0])
            warmth = self.temperature * self.cooling**step
            if worse <= 0 or np.random.default_rng([self.seed, other.number, 1]).random() < math.exp(-worse / warmth):
                current = other
        start = Point.parse(current.user_attrs[POINT])
        return self.unseen((self._neighbour(start, 1 + n // 100, generator) for n in itertools.count()), before)

    def _neighbour(self, point: Point, changes: int, generator: np.random.Generator) -> Point:
        """``point`` with some changes, more when its neighbourhood has been tried."""
        for _ in range(changes):
            at = int(generator.choice(len(self.space.regions), p=_shares([len(p) for p in point.regions])))
            region, program = self.space.regions[at], point.regions[at]
            switches = [s for group in region.natural_groups for s in group.switches]
            tunable = [members for members, _ in program if len(region.allowed[members]) > 1]
            pick = int(generator.integers(max(len(switches) + len(tunable), 1)))
            if pick < len(switches):
                bits = list(region.bits(program))
                for edge in switches[pick]:
                    bits[edge] = not bits[edge]
                point = point.replace(at, _with_bits(region, program, bits, generator))
            elif tunable:
                chosen = tunable[pick - len(switches)]
                kernel = int(generator.choice(region.allowed[chosen]))
                point = point.replace(at, tuple((m, kernel if m == chosen else k) for m, k in program))
        return point


class RewardSampler(PointSampler):
    """AToffer's rule (SC'24) as it was meant, over the natural groups of all regions.

    Each trial draws one group, with probability proportional to its weight (at first 2 to the number of its switches),
    and decides its switches and the kernels of its operators anew, the rest as in the best program so far. A trial that
    beats the best time from before its window of four gives its group a point; when the window ends, the weight of the
    groups with the most points grows by 2 to that many. The first trial of every window also draws the kernels of
    attention anew, as AToffer's flag for its handwritten one.

    ``costs`` are seconds of kernels: half of the kernels drawn anew are the cheapest ones.
    """

    def __init__(self, space: Space, seed: int = 0, costs: Costs | None = None) -> None:
        super().__init__(space, seed)
        self.costs = costs if costs is not None else space.predicted
        self.groups = [(at, g) for at, region in enumerate(space.regions) for g in range(len(region.natural_groups))]

    def propose(
        self, study: optuna.Study, trial: FrozenTrial, before: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> Point:
        done = [t for t in before if t.state is TrialState.COMPLETE]
        start = Point.parse(min(done, key=_value).user_attrs[POINT]) if done else self.space.default()
        mine = [t for t in before if GROUP in t.system_attrs]
        weights = _shares(self.weights(before))
        drawn: list[int] = []

        def points() -> Iterator[Point]:
            for attempt in itertools.count():
                # Groups whose programs have all been tried are widened by others.
                count = min(1 + attempt // 50, len(self.groups))
                drawn[:] = [int(g) for g in generator.choice(len(self.groups), count, replace=False, p=weights)]
                point = start
                for group in drawn:
                    point = self._anew(point, *self.groups[group], generator)
                if len(mine) % _WINDOW == 0:
                    point = self._other_attention(point, generator)
                yield point

        point = self.unseen(points(), before)
        study._storage.set_trial_system_attr(trial._trial_id, GROUP, self.name(drawn[0]))
        return point

    def name(self, group: int) -> str:
        """``REGION:NUMBER kinds`` of a natural group."""
        at, number = self.groups[group]
        return f"{at}:{number} {self.space.regions[at].natural_groups[number].name}"

    def weights(self, before: Sequence[FrozenTrial]) -> list[float]:
        """The groups' weights after the trials before."""
        initial = [2.0 ** max(len(self.space.regions[at].natural_groups[g].switches), 1) for at, g in self.groups]
        names = {self.name(i): i for i in range(len(self.groups))}
        return _rewarded(initial, before, lambda trial: names.get(trial.system_attrs.get(GROUP, "")))

    def _anew(self, point: Point, at: int, number: int, generator: np.random.Generator) -> Point:
        region, program = self.space.regions[at], point.regions[at]
        group = region.natural_groups[number]
        bits = list(region.bits(program))
        for switch in group.switches:
            bit = bool(generator.integers(2))
            for edge in switch:
                bits[edge] = bit
        touched = sum(1 << i for i in group.operators)
        return point.replace(at, self._kernels(at, region.repair(bits), dict(program), touched, generator))

    def _kernels(
        self, at: int, sets: Sequence[int], old: Mapping[int, int], touched: int, generator: np.random.Generator
    ) -> Groups:
        region = self.space.regions[at]
        program = []
        for members in sets:
            kernel = old.get(members)
            if kernel is None or members & touched:
                allowed = region.allowed[members]
                cheapest = min(allowed, key=functools.partial(self.costs, at, members))
                kernel = cheapest if generator.random() < 0.5 else int(generator.choice(allowed))
            program.append((members, kernel))
        return tuple(program)

    def _other_attention(self, point: Point, generator: np.random.Generator) -> Point:
        for at, region in enumerate(self.space.regions):
            core = region.attention
            if core:
                sets = [members for members, _ in point.regions[at]]
                point = point.replace(at, self._kernels(at, sets, dict(point.regions[at]), core, generator))
        return point


class AtofferSampler(PointSampler):
    """AToffer's search (SC'24) over its own 16-bit schemes, each kernel as its family's default.

    ``published`` keeps the fault of the published program: where the attention bit is 0 it overwrites the first group's
    bits in place of the second's, so that operators 1 to 5 are fused and the handwritten attention is never used there,
    which leaves 384 integers. ``decode`` is ``fuser.schemes.from_atoffer``. Regions that are neither a BERT layer nor
    half of one keep the default.
    """

    repeats = True
    LENGTHS = (1, 1, 2, 2, 1, 2)
    START = 41115
    LOWEST, END = 16384, 49151

    def __init__(self, space: Space, decode: Decode, seed: int = 0, published: bool = True) -> None:
        super().__init__(space, seed)
        self.decode = decode
        self.published = published
        self._default = space.default()
        if not any(self._decodes(region) for region in space.regions):
            raise SearchError("AToffer's schemes are for BERT layers, and this model has none")

    def _decodes(self, region: RegionSpace) -> bool:
        try:
            self.decode(self.START, region.region)
        except SchemeError:
            return False
        return True

    def propose(
        self, study: optuna.Study, trial: FrozenTrial, before: Sequence[FrozenTrial], generator: np.random.Generator
    ) -> Point:
        mine = [t for t in before if _CODE in t.system_attrs]
        if mine:
            known = {t.system_attrs[_CODE]["value"] for t in mine}
            flag, bits = mine[-1].system_attrs[_CODE]["key"]
            if len(mine) % _WINDOW == 0:
                flag = int(generator.integers(2))
            weights = _shares(self.weights(before))
            for _ in range(64 * _ATTEMPTS):
                group = int(generator.choice(len(self.LENGTHS), p=weights))
                start = sum(self.LENGTHS[:group])
                new = [int(b) for b in generator.integers(0, 2, self.LENGTHS[group])]
                bits = [*bits[:start], *new, *bits[start + len(new) :]]
                value = self.value(flag, bits)
                if self.LOWEST <= value < self.END and value not in known:
                    break
                flag = int(generator.integers(2))
            else:
                raise ExhaustedError
        else:
            group, flag, bits, value = -1, 1, [0, 1, 1, 0, 0, 1, 0, 1, 1], self.START
        note: Any = {"value": value, "key": [flag, bits]}
        study._storage.set_trial_system_attr(trial._trial_id, _CODE, note)
        study._storage.set_trial_system_attr(trial._trial_id, GROUP, f"atoffer:{group}")
        return self.point(value)

    def weights(self, before: Sequence[FrozenTrial]) -> list[float]:
        """The six groups' weights after the trials before."""
        names = {f"atoffer:{group}": group for group in range(len(self.LENGTHS))}
        initial = [2.0**length for length in self.LENGTHS]
        return _rewarded(initial, before, lambda trial: names.get(trial.system_attrs.get(GROUP, "")))

    def value(self, flag: int, bits: Sequence[int]) -> int:
        """The 16-bit integer of the flag and the nine bits of the six groups."""
        first, second, rest = str(bits[0]), str(bits[1]), "".join(map(str, bits[2:]))
        if bits[1]:
            second = "1000001"
        elif self.published:
            first = "0111110"
        else:
            second = "0111110"
        return int(f"{flag}{first}{second}{rest}", 2)

    def point(self, value: int) -> Point:
        """The program that an integer denotes here."""
        programs = []
        for region, default in zip(self.space.regions, self._default.regions, strict=True):
            try:
                sets = region.members_of(self.decode(value, region.region)[2])
            except SchemeError:
                programs.append(default)
            else:
                programs.append(tuple((members, region.allowed[members][0]) for members in sets))
        return Point(tuple(programs))


def _rewarded(
    weights: Sequence[float], trials: Sequence[FrozenTrial], group_of: Callable[[FrozenTrial], int | None]
) -> list[float]:
    """AToffer's rule: weights after trials in windows of four, those without a group standing before all windows."""
    found = list(weights)
    best = min((_value(t) for t in trials if group_of(t) is None and t.state is TrialState.COMPLETE), default=math.inf)
    drawn = [t for t in trials if group_of(t) is not None]
    for start in range(0, len(drawn) - _WINDOW + 1, _WINDOW):
        window = drawn[start : start + _WINDOW]
        scores = [0] * len(found)
        times = []
        for trial in window:
            if trial.state is TrialState.COMPLETE:
                times.append(_value(trial))
                group = group_of(trial)
                if group is not None and _value(trial) < best:
                    scores[group] += 1
        best = min([best, *times])
        most = max(scores)
        if most:
            # Beyond this a weight says nothing more, and powers would overflow.
            found = [min(w + 2.0**most, 2.0**40) if s == most else w for w, s in zip(found, scores, strict=True)]
    return found


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [w / total for w in weights]


def _value(trial: FrozenTrial) -> float:
    return math.inf if trial.value is None else trial.value


def _with_bits(region: RegionSpace, program: Groups, bits: Sequence[bool], generator: np.random.Generator) -> Groups:
    """New bits; groups that stay keep their kernels, others draw one."""
    old = dict(program)
    return tuple(
        (members, old[members] if members in old else int(generator.choice(region.allowed[members])))
        for members in region.repair(bits)
    )


def make_sampler(
    strategy: str, space: Space, seed: int, costs: Costs | None = None, decode: Decode | None = None
) -> optuna.samplers.BaseSampler:
    """The sampler of a strategy. Raises SearchError for an unknown one, or when it lacks a package."""
    if strategy in ("default", "reward"):
        return RewardSampler(space, seed, costs)
    if strategy == "random":
        return RandomSampler(space, seed)
    if strategy == "anneal":
        return AnnealingSampler(space, seed)
    if strategy in ("atoffer", "atoffer-published"):
        if decode is None:
            raise SearchError("the atoffer strategies need decode=fuser.schemes.from_atoffer")
        return AtofferSampler(space, decode, seed, published=strategy == "atoffer-published")
    if strategy == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if strategy == "gp":
        if importlib.util.find_spec("scipy") is None:
            raise SearchError("the gp strategy needs SciPy: pip install scipy, or choose another strategy")
        return optuna.samplers.GPSampler(seed=seed)
    raise SearchError(f"there is no strategy {strategy!r}")
