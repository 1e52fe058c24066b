"""Choosing schemes and kernels by predicted times.

Times of groups nearly add up, so the best scheme of a region is a shortest path: its nodes are sets of operators that
can be complete at one moment (downsets), its edges are the groups that lead from one to another, weighted by the time
of the best kernel for the group.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import networkx as nx

from fuser.codegen.choice import Choice, GroupChoice, Kernel
from fuser.ir.errors import SchemeError
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, Region
from fuser.ir.scheme import Precedence, Scheme, positions
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Table

MAX_OPERATORS = 24
"""Operators in one group."""
MAX_DOWNSETS = 96
"""Up to so many downsets the search covers every legal scheme, beyond it those along two orders of execution."""
# On a GPU an operator is several launches from Python, and each costs the CPU more than a small kernel takes.
_PYTORCH_LAUNCH_SECONDS = {"cpu": 5e-6, "cuda": 2e-5}
_PYTORCH_EFFICIENCY = 0.4
"""Of the peak, for batched products of attention's sizes in PyTorch, whose operands and results go through memory."""


def choose(groups: Iterable[OperatorGroup], table: Table, target: Target) -> tuple[GroupChoice, ...]:
    """The kernel with the least predicted time for each of ``groups``; of equal ones the first in the order of the
    table and of spaces. Raises SchemeError when no family runs a group of several operators."""
    chosen = []
    for group in groups:
        choice = _best(group, table, target)
        if choice is None:
            names = ", ".join(op.name for op in group.operators)
            raise SchemeError(f"no kernel family runs {names} as one kernel: repair the scheme with `groups` first")
        chosen.append(choice)
    return tuple(chosen)


def default_scheme(region: Region, table: Table, target: Target) -> Choice:
    """The scheme with the least time under the additive model, and its kernels; of equally fast ones with the fewest.

    Exact over all schemes of groups of up to ``MAX_OPERATORS`` when ``region`` has at most ``MAX_DOWNSETS`` downsets.
    """
    precedence = Precedence(region)
    choices: dict[int, GroupChoice | None] = {}

    def choice(members: int) -> GroupChoice | None:
        if members not in choices:
            single = not members & (members - 1)
            possible = single or (precedence.is_connected(members) and not precedence.leaves(members))
            choices[members] = _best(precedence.group(members), table, target) if possible else None
        return choices[members]

    complete = sorted(downsets(precedence)[0], key=lambda done: (done.bit_count(), done))
    paths: nx.DiGraph[int] = nx.DiGraph()
    for number, done in enumerate(complete):
        for then in complete[number + 1 :]:
            members = done ^ then
            if done & ~then or members.bit_count() > MAX_OPERATORS:
                continue
            found = choice(members)
            if found is not None:
                # Whole femtoseconds with room for the number of kernels below: sums are exact, and ties go to fewer.
                paths.add_edge(done, then, weight=(round(found.seconds * 1e15) << 32) + 1)
    path = nx.dijkstra_path(paths, complete[0], complete[-1])
    chosen = tuple(c for a, b in itertools.pairwise(path) if (c := choices[a ^ b]) is not None)
    return Choice(Scheme.from_groups(region, (c.group for c in chosen)), chosen)


def kernels_of(
    region: Region, table: Table, target: Target, *, offline: bool = False
) -> dict[int, tuple[GroupChoice, ...]]:
    """All kernels, with predicted times, of every group that can be part of a scheme: by the group's
    members; with ``offline`` also those that take about a minute each to build. Groups that are no difference of two
    :func:`downsets` are left out."""
    precedence = Precedence(region)
    complete = sorted(downsets(precedence)[0], key=lambda done: (done.bit_count(), done))
    found: dict[int, tuple[GroupChoice, ...]] = {}
    rejected: set[int] = set()
    for done, then in itertools.combinations(complete, 2):
        members = done ^ then
        if done & ~then or members in found or members in rejected or members.bit_count() > MAX_OPERATORS:
            continue
        single = not members & (members - 1)
        possible = single or (precedence.is_connected(members) and not precedence.leaves(members))
        choices = tuple(_choices(precedence.group(members), table, target, offline)) if possible else ()
        if choices:
            found[members] = choices
        else:
            rejected.add(members)
    return found


def kernels(group: OperatorGroup, table: Table, target: Target, *, offline: bool = False) -> Iterator[Kernel]:
    """Every kernel for ``group``, in the order of families, their implementations and their spaces; with ``offline``
    also those that take about a minute to build, each family's last."""
    for (family, kind), implementations in table.items():
        match = family.match(group, target) if kind == target.kind else None
        if match is None:
            continue
        for each in implementations:
            yield from (Kernel(family, each, group, match, p) for p in each.space(match, target))
        for each in implementations if offline else ():
            yield from (Kernel(family, each, group, match, p, True) for p in each.offline_space(match, target))


def alternatives(kernel: Kernel, table: Table, target: Target) -> list[Kernel]:
    """All kernels of the same family for the same group, ``kernel`` among them; offline ones if it is one."""
    found = []
    for each in table[kernel.family, target.kind]:
        space = each.offline_space if kernel.offline else each.space
        found += [dataclasses.replace(kernel, implementation=each, parameters=p) for p in space(kernel.match, target)]
    return found


def predicted(group: OperatorGroup, kernel: Kernel | None, target: Target) -> GroupChoice:
    """A kernel for ``group``, None for PyTorch, with the time that the cost model predicts."""
    if kernel is None:
        (op,) = group.operators
        return GroupChoice(group, None, _pytorch_cost(group.graph, op), pytorch_seconds(group.graph, op, target))
    cost = kernel.cost(target)
    return GroupChoice(group, kernel, cost, cost.seconds(target))


def _choices(group: OperatorGroup, table: Table, target: Target, offline: bool = False) -> Iterator[GroupChoice]:
    """Every kernel for ``group`` with its predicted time; PyTorch for a single operator that has no other."""
    found = None
    for found in kernels(group, table, target, offline=offline):
        yield predicted(group, found, target)
    if found is None and len(group.operators) == 1:
        yield predicted(group, None, target)


def _best(group: OperatorGroup, table: Table, target: Target) -> GroupChoice | None:
    """The fastest kernel for ``group``, None when there is none."""
    finite = (choice for choice in _choices(group, table, target) if math.isfinite(choice.seconds))
    return min(finite, key=lambda choice: choice.seconds, default=None)


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
        waiting = (n for n in positions(precedence.neighbours[i] & precedence.after[i]) if n not in ready)
        ready.extend(sorted((n for n in waiting if not precedence.before[n] & ~done), reverse=True))
    return order
