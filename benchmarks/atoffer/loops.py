"""AToffer's search loop and its two baselines over 16-bit schemes, with any objective.

As the published code of AToffer (SC'24, ``search3_ours.py``) does it: 128 evaluations a round, five rounds that differ
in their seed. Values are those of :func:`fuser.schemes.from_atoffer`: the attention bit, then one bit for each of a
layer's 15 operators.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

ITERATIONS = 128
ROUNDS = 5
START = 41115
"""AToffer's first scheme: handwritten attention, and each bias with what follows it."""
LENGTHS = (1, 1, 2, 2, 1, 2)
"""Bits of the six groups. The one bit of group 1 stands for operators 1 to 7."""
WINDOW = 4
"""Evaluations between two changes of the groups' weights."""

_SCALE = 1000
_LOWEST, _END = 16384, 49151
_FUSED, _SPLIT = "1000001", "0111110"
_TEMPERATURE, _COOLING = 100.0, 0.99

Objective = Callable[[int], float]
"""Milliseconds of the program that a 16-bit scheme denotes."""


def value_of(flag: str, groups: Sequence[str], as_published: bool = True) -> int:
    """The scheme of an attention bit and six groups of bits.

    ``as_published`` keeps the slip in the published code, by which the second pattern of operators 1 to 7 replaces
    group 0 instead of group 1: it fuses operators 1 to 5 where 2 to 6 were meant, and never runs the attention kernel.
    """
    parts = list(groups)
    if parts[1] == "1":
        parts[1] = _FUSED
    elif as_published:
        parts[0] = _SPLIT
    else:
        parts[1] = _SPLIT
    return int(flag + "".join(parts), 2)


def reward_loop(
    objective: Objective, seed: int, iterations: int = ITERATIONS, as_published: bool = True
) -> list[tuple[int, float]]:
    """One round of AToffer's search: (scheme, milliseconds) of every evaluation, :data:`START` first.

    Each step draws one group with a probability proportional to its weight, 2 to the power of its length at first, and
    draws that group's bits anew. Values outside 16384 … 49150 and those seen before are passed over and do not count.
    After every fourth evaluation the group that most often led below the best time known four evaluations ago (all of
    them where several did equally often) gains 2 to the power of how often, and the attention bit is drawn anew.
    """
    draw = random.Random(seed)
    flag, groups = "1", ["0", "1", "00", "11", "0", "11"]
    weights = [1 << length for length in LENGTHS]
    scores = [0] * len(LENGTHS)
    found = [(START, objective(START))]
    seen = {START}
    known = found[0][1]
    while len(found) < iterations:
        group = _drawn(weights, draw)
        groups[group] = "".join(draw.choice("01") for _ in range(LENGTHS[group]))
        value = value_of(flag, groups, as_published)
        if not _LOWEST <= value < _END or value in seen:
            continue
        seen.add(value)
        found.append((value, objective(value)))
        scores[group] += found[-1][1] < known
        if (len(found) - 1) % WINDOW == 0:
            most = max(scores)
            weights = [w + (1 << most if s == most else 0) for w, s in zip(weights, scores, strict=True)]
            scores = [0] * len(LENGTHS)
            known = min(time for _, time in found)
            flag = draw.choice("01")
    return found


def _drawn(weights: Sequence[int], draw: random.Random) -> int:
    total = sum(weights)
    ends = [_SCALE * sum_ // total for sum_ in itertools.accumulate(weights)]
    at = draw.randrange(_SCALE)
    return next(i for i, end in enumerate(ends) if at < end)


def random_loop(objective: Objective, seed: int, iterations: int = ITERATIONS) -> list[tuple[int, float]]:
    """AToffer's first baseline: that many different values, all equally likely."""
    values = random.Random(seed).sample(range(1 << 16), iterations)
    return [(value, objective(value)) for value in values]


def annealing_loop(objective: Objective, seed: int, iterations: int = ITERATIONS) -> list[tuple[int, float]]:
    """AToffer's second baseline: flip one bit; keep what is better, and what is worse by d milliseconds with the
    probability exp(-d / T), where T falls from 100 by 1 % at every evaluation."""
    draw = random.Random(seed)
    value = draw.randrange(1 << 16)
    time = objective(value)
    found = [(value, time)]
    temperature = _TEMPERATURE
    while len(found) < iterations:
        other = value ^ 1 << draw.randrange(16)
        found.append((other, objective(other)))
        worse = found[-1][1] - time
        if worse <= 0 or draw.random() < math.exp(-worse / temperature):
            value, time = found[-1]
        temperature *= _COOLING
    return found


def reachable(as_published: bool = True) -> set[int]:
    """All values that :func:`reward_loop` can evaluate."""
    bits = [["".join(b) for b in itertools.product("01", repeat=length)] for length in LENGTHS]
    values = {value_of(flag, groups, as_published) for flag in "01" for groups in itertools.product(*bits)}
    return {value for value in values if _LOWEST <= value < _END}
