"""Choosing schemes and kernels by predicted or measured times.

Times of groups nearly add up, so the best scheme of a region is a shortest path: its nodes are sets of operators that
can be complete at one moment (downsets), its edges are the groups that lead from one to another, weighted by the time
of the best kernel for the group.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from fuser.ir.errors import SchemeError
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, Region
from fuser.ir.scheme import Legality, Precedence, Scheme, members
from fuser.ir.target import Target
from fuser.kernels.base import Cost, KernelFamily

MAX_OPERATORS = 24
"""Operators in one group."""
MAX_DOWNSETS = 96
"""Up to so many downsets the search covers every legal scheme, beyond it those along two orders of execution."""
PYTORCH = "pytorch"
"""Stands for a family where PyTorch runs an operator that no family matches."""
# On a GPU an operator is several launches from Python, and each costs the CPU more than a small kernel takes.
_PYTORCH_LAUNCH_SECONDS = {"cpu": 5e-6, "cuda": 2e-5}
_PYTORCH_EFFICIENCY = 0.4
"""Of the peak, for batched products of attention's sizes in PyTorch, whose operands and results go through memory."""


@dataclass(frozen=True)
class Candidate:
    """What one measurement is about: the structural hash of a group (equal for groups that differ only in their
    weights), the family's name and its parameters."""

    group: str
    family: str
    parameters: Any


Measured = Callable[[Candidate], float | None]
"""Seconds that a candidate took on the target, None when it was never measured."""


@dataclass(frozen=True)
class GroupChoice:
    """The kernel of one group and its time in ``seconds``; ``family``, ``match`` and ``parameters`` are None where
    PyTorch runs the group's one operator. ``cost`` is the prediction; ``measured`` tells where ``seconds`` is from,
    ``offline`` that the kernel takes about a minute to build, so that only a search may choose it."""

    group: OperatorGroup
    family: KernelFamily | None
    match: Any
    parameters: Any
    cost: Cost
    seconds: float
    measured: bool
    offline: bool = False


@dataclass(frozen=True)
class Choice:
    """A region's scheme with the kernel of every group, in a valid order of execution."""

    scheme: Scheme
    groups: tuple[GroupChoice, ...]

    @property
    def seconds(self) -> float:
        """Time of the region under the additive model."""
        return math.fsum(choice.seconds for choice in self.groups)


def legality(families: Sequence[KernelFamily], target: Target) -> Legality:
    """The rule of schemes that some family must match a group of several operators."""
    return lambda group: any(family.match(group, target) is not None for family in families)


def choose(
    groups: Iterable[OperatorGroup],
    families: Sequence[KernelFamily],
    target: Target,
    measured: Measured | None = None,
) -> tuple[GroupChoice, ...]:
    """The best kernel for each of ``groups``; of equal ones the first in the order of families and their spaces.

    Predictions are bounds that kernels do not beat, so where any candidate of a group was measured, only measured ones
    compete. Raises SchemeError when no family matches a group of several operators.
    """
    chosen = []
    for group in groups:
        choice = _best(group, families, target, measured)
        if choice is None:
            names = ", ".join(op.name for op in group.operators)
            raise SchemeError(f"no kernel family runs {names} as one kernel: repair the scheme with `groups` first")
        chosen.append(choice)
    return tuple(chosen)


def default_scheme(
    region: Region, families: Sequence[KernelFamily], target: Target, measured: Measured | None = None
) -> Choice:
    """The scheme with the least time under the additive model, and its kernels; of equally fast ones with the fewest.

    Exact over all schemes of groups of up to ``MAX_OPERATORS`` when ``region`` has at most ``MAX_DOWNSETS`` downsets.
    """
    precedence = Precedence(region)
    choices: dict[int, GroupChoice | None] = {}

    def choice(mask: int) -> GroupChoice | None:
        if mask not in choices:
            single = not mask & (mask - 1)
            possible = single or (precedence.is_connected(mask) and not precedence.leaves(mask))
            choices[mask] = _best(precedence.group(mask), families, target, measured) if possible else None
        return choices[mask]

    complete = sorted(downsets(precedence)[0], key=lambda done: (done.bit_count(), done))
    paths: nx.DiGraph[int] = nx.DiGraph()
    for number, done in enumerate(complete):
        for then in complete[number + 1 :]:
            mask = done ^ then
            if done & ~then or mask.bit_count() > MAX_OPERATORS:
                continue
            found = choice(mask)
            if found is not None:
                # Whole femtoseconds with room for the number of kernels below: sums are exact, and ties go to fewer.
                paths.add_edge(done, then, weight=(round(found.seconds * 1e15) << 32) + 1)
    path = nx.dijkstra_path(paths, complete[0], complete[-1])
    chosen = tuple(c for a, b in itertools.pairwise(path) if (c := choices[a ^ b]) is not None)
    return Choice(Scheme.from_groups(region, (c.group for c in chosen)), chosen)


def kernels_of(
    region: Region, families: Sequence[KernelFamily], target: Target, *, offline: bool = False
) -> dict[int, tuple[GroupChoice, ...]]:
    """All kernels, with predicted times, of every group that can be part of a scheme: by the group's operators as a bit
    mask over their positions; with ``offline`` also those that take about a minute each to build. Groups that are no
    difference of two :func:`downsets` are left out."""
    precedence = Precedence(region)
    complete = sorted(downsets(precedence)[0], key=lambda done: (done.bit_count(), done))
    found: dict[int, tuple[GroupChoice, ...]] = {}
    rejected: set[int] = set()
    for done, then in itertools.combinations(complete, 2):
        mask = done ^ then
        if done & ~then or mask in found or mask in rejected or mask.bit_count() > MAX_OPERATORS:
            continue
        single = not mask & (mask - 1)
        possible = single or (precedence.is_connected(mask) and not precedence.leaves(mask))
        kernels = tuple(_kernels(precedence.group(mask), families, target, offline)) if possible else ()
        if kernels:
            found[mask] = kernels
        else:
            rejected.add(mask)
    return found


def offline_space(family: KernelFamily, match: Any, target: Target) -> Sequence[Any]:
    """Choices of a family beside its space, whose kernels take about a minute each to build; few families have any."""
    more: Callable[[Any, Target], Sequence[Any]] | None = getattr(family, "offline_space", None)
    return more(match, target) if more is not None else ()


def _kernels(
    group: OperatorGroup, families: Sequence[KernelFamily], target: Target, offline: bool = False
) -> Iterator[GroupChoice]:
    """Every kernel for ``group`` with its predicted time, in the order of families and their spaces; PyTorch only where
    there is no other for a single operator."""
    matched = False
    for family in families:
        match = family.match(group, target)
        if match is None:
            continue
        quick = [(parameters, False) for parameters in family.space(match, target)]
        slow = [(parameters, True) for parameters in offline_space(family, match, target)] if offline else []
        for parameters, is_slow in (*quick, *slow):
            matched = True
            cost = family.cost(match, parameters, target)
            yield GroupChoice(group, family, match, parameters, cost, cost.seconds(target), False, is_slow)
    if not matched and len(group.operators) == 1:
        (op,) = group.operators
        cost = _pytorch_cost(group.graph, op)
        yield GroupChoice(group, None, None, None, cost, pytorch_seconds(group.graph, op, target), False)


def _best(
    group: OperatorGroup, families: Sequence[KernelFamily], target: Target, measured: Measured | None
) -> GroupChoice | None:
    """The fastest kernel for ``group``, None when there is none."""
    structure = Region(group.graph, group.operators).hash if measured is not None else ""
    best: GroupChoice | None = None
    for found in _kernels(group, families, target):
        if measured is not None:
            name = PYTORCH if found.family is None else found.family.name
            time = measured(Candidate(structure, name, found.parameters))
            if time is not None:
                found = dataclasses.replace(found, seconds=time, measured=True)
        if math.isfinite(found.seconds) and (best is None or _rank(found) < _rank(best)):
            best = found
    return best


def _rank(choice: GroupChoice) -> tuple[bool, float]:
    return not choice.measured, choice.seconds


def pytorch_seconds(graph: OperatorGraph, op: Operator, target: Target) -> float:
    """What PyTorch is predicted to take for one operator, its launch from Python among it."""
    return _pytorch_cost(graph, op).seconds(target) + _PYTORCH_LAUNCH_SECONDS[target.kind]


def _pytorch_cost(graph: OperatorGraph, op: Operator) -> Cost:
    """Inputs and outputs once through memory, and the operations."""
    values = graph.values
    moved = sum(values[value].nbytes for value in (*dict.fromkeys(op.inputs), *op.outputs))
    return Cost(graph.flops(op), float(moved), launches=0, efficiency=_PYTORCH_EFFICIENCY)


def downsets(precedence: Precedence) -> tuple[set[int], bool]:
    """Sets of operators that can be complete while no other operator has started, and whether these are all of them:
    beyond ``MAX_DOWNSETS`` they are those along two orders of execution."""
    count = len(precedence.region.operators)
    found, new = {0}, [0]
    while new and len(found) <= MAX_DOWNSETS:
        done = new.pop()
        for i in range(count):
            if not done >> i & 1 and not precedence.before[i] & ~done and (done | 1 << i) not in found:
                found.add(done | 1 << i)
                new.append(done | 1 << i)
    if not new:
        return found, True
    return _prefixes(range(count)) | _prefixes(_depth_first(precedence)), False


def _prefixes(order: Iterable[int]) -> set[int]:
    prefixes, done = {0}, 0
    for i in order:
        done |= 1 << i
        prefixes.add(done)
    return prefixes


def _depth_first(precedence: Precedence) -> list[int]:
    """A topological order in which an operator follows its producer as soon as it can."""
    order: list[int] = []
    done, ready = 0, [i for i in range(len(precedence.before) - 1, -1, -1) if not precedence.before[i]]
    while ready:
        i = ready.pop()
        order.append(i)
        done |= 1 << i
        waiting = (n for n in members(precedence.neighbours[i] & precedence.after[i]) if n not in ready)
        ready.extend(sorted((n for n in waiting if not precedence.before[n] & ~done), reverse=True))
    return order
