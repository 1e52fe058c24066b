"""The space of a search: for every distinct region the schemes and the kernel of every group, legal points only."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np

from fuser.codegen.choice import Choice, GroupChoice
from fuser.ir.errors import SearchError
from fuser.ir.graph import OperatorGraph, Region
from fuser.ir.scheme import Precedence, Scheme, groups
from fuser.ir.target import Target
from fuser.kernels import gemm_cutlass
from fuser.kernels.base import Table
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.search.partition import downsets, kernels_of
from fuser.search.standalone import standalone

Groups = tuple[tuple[int, int], ...]
"""A program of one region: (members, index of the kernel) of every group, in order of execution."""
Costs = Callable[[int, int, int], float]
"""Seconds of (region, members of the group, index of the kernel)."""


@dataclass(frozen=True)
class Point:
    """One program of a model: the groups of every distinct region of its space. Equal programs are equal points."""

    regions: tuple[Groups, ...]

    def __str__(self) -> str:
        return ";".join(",".join(f"{members:x}.{kernel}" for members, kernel in groups) for groups in self.regions)

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that ``str`` wrote as ``text``; raises SearchError for anything else."""
        try:
            return cls(
                tuple(
                    tuple((int(group, 16), int(kernel)) for group, kernel in (g.split(".") for g in part.split(",")))
                    for part in text.split(";")
                )
            )
        except ValueError as error:
            raise SearchError(f"{text!r} is not a program of a search space") from error

    def replace(self, region: int, groups: Groups) -> Point:
        """The same program with other groups for one region."""
        return Point((*self.regions[:region], groups, *self.regions[region + 1 :]))


@dataclass(frozen=True)
class NaturalGroup:
    """Operators that belong together by what they compute, the unit that the reward sampler draws anew.

    ``switches`` are sets of edges, each decided by one bit: the edges into the group's operators, those inside of
    attention as one.
    """

    name: str
    operators: tuple[int, ...]
    switches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RegionSpace:
    """What can be decided about one distinct region, which the model holds ``count`` times.

    ``region`` stands in a graph of its own with the names of the model's. ``kernels`` holds, for every legal group by
    its members, the kernels that can run it with predicted times, the family's default first.
    ``allowed`` are the indices of those that have not been pruned; a group without any is not legal.
    """

    region: Region
    count: int
    kernels: Mapping[int, tuple[GroupChoice, ...]]
    allowed: Mapping[int, tuple[int, ...]]

    @functools.cached_property
    def precedence(self) -> Precedence:
        return Precedence(self.region)

    @functools.cached_property
    def downsets(self) -> tuple[int, ...]:
        """Sets of operators that can be complete at one moment, small ones first."""
        return tuple(sorted(self._found[0], key=lambda done: (done.bit_count(), done)))

    @property
    def is_exact(self) -> bool:
        """Whether ``downsets`` are all there are, so that counts and shortest paths cover every legal program."""
        return self._found[1]

    @functools.cached_property
    def _found(self) -> tuple[set[int], bool]:
        return downsets(self.precedence)

    @functools.cached_property
    def schemes(self) -> int:
        """Number of distinct legal schemes, pruned or not; a lower bound unless ``is_exact``."""
        return self._count(dict.fromkeys(self.kernels, 1))

    @functools.cached_property
    def programs(self) -> int:
        """Number of distinct programs, schemes with a kernel for each group, pruned or not; a lower bound unless
        ``is_exact``."""
        return self._count({members: len(kernels) for members, kernels in self.kernels.items()})

    @functools.cached_property
    def remaining(self) -> int:
        """Number of distinct programs of kernels that are not pruned."""
        return self._count({members: len(kernels) for members, kernels in self.allowed.items()})

    def _count(self, weight: Mapping[int, int]) -> int:
        """Sum over partitions into legal groups of the product of weights.

        Partitions have several orders of execution, so those that end with any of a set of independent groups are
        added and subtracted by inclusion and exclusion over that set.
        """
        if not self.is_exact:
            prefixes = [0, *itertools.accumulate(1 << i for i in range(len(self.region.operators)))]
            ways = {0: 1}
            for at, done in enumerate(prefixes[1:], 1):
                ways[done] = sum(
                    ways[before] * weight[done ^ before] for before in prefixes[:at] if done ^ before in weight
                )
            return ways[prefixes[-1]]
        known = set(self.downsets)
        found = {0: 1}
        for done in self.downsets[1:]:
            last = [members for members in weight if not members & ~done and done ^ members in known]

            def signed(at: int, taken: int, product: int, done: int = done, last: list[int] = last) -> int:
                total = 0
                for i in range(at, len(last)):
                    if not last[i] & taken:
                        both, ways = taken | last[i], product * weight[last[i]]
                        total += ways * found[done ^ both] - signed(i + 1, both, ways)
                return total

            found[done] = signed(0, 0, 1)
        return found[self.downsets[-1]]

    @functools.cached_property
    def natural_groups(self) -> tuple[NaturalGroup, ...]:
        """A GEMM with the elementwise operators after it, unless what follows reduces (softmax, norm), which then is a
        group of its own; attention's takes the projection of its output. For AToffer's BERT layer these are its six
        groups."""
        operators = self.region.operators
        runs: list[list[int]] = []
        for i, op in enumerate(operators):
            if op.semantics.is_linear:
                follows = bool(runs) and any(operators[j].semantics.consumes_scores for j in runs[-1])
                closed = follows and any(operators[j].semantics.is_linear for j in runs[-1])
                if follows and not closed:
                    runs[-1].append(i)
                else:
                    runs.append([i])
                continue
            new = not runs
            if not new and operators[i - 1].semantics.is_linear:
                rest = itertools.takewhile(lambda o: not o.semantics.is_linear, operators[i:])
                new = any(o.expression is not None and o.expression.has_reduction for o in rest)
            if new:
                runs.append([])
            runs[-1].append(i)
        found = []
        for run in runs:
            switches: list[tuple[int, ...]] = []
            inner: list[int] = []
            for number, (a, b) in enumerate(self.region.edges):
                if b in run:
                    if self.attention >> a & self.attention >> b & 1:
                        inner.append(number)
                    else:
                        switches.append((number,))
            if inner:
                switches.append(tuple(inner))
            name = "+".join(operators[i].kind for i in run)
            found.append(NaturalGroup(name, tuple(run), tuple(switches)))
        return tuple(found)

    @functools.cached_property
    def attention(self) -> int:
        """The operators from products of queries with keys to products with values; 0 without any."""
        return sum(1 << i for i in range(len(self.region.operators)) if self._in_attention(i))

    def _in_attention(self, position: int) -> bool:
        """Whether the operator lies between a product of queries with keys and one with values, ends included."""
        operators, after = self.region.operators, self.precedence.after
        starts = [i for i, op in enumerate(operators) if op.semantics.makes_scores]
        ends = [i for i, op in enumerate(operators) if op.semantics.consumes_scores]
        before = any(i == position or after[i] >> position & 1 for i in starts)
        return before and any(i == position or after[position] >> i & 1 for i in ends)

    def repair(self, bits: Sequence[bool]) -> tuple[int, ...]:
        """The members of the groups, in order of execution, that the bits of a scheme denote, illegal ones cut."""
        return self.members_of(Scheme(self.region.hash, tuple(map(bool, bits))))

    def members_of(self, scheme: Scheme) -> tuple[int, ...]:
        """The members of the groups of a scheme, in order of execution. Raises SchemeError for another region's."""
        found = groups(
            scheme, self.region, lambda group: self.members(op.name for op in group.operators) in self.allowed
        )
        return tuple(self.members(op.name for op in group.operators) for group in found)

    def members(self, names: Iterable[str]) -> int:
        """The operators of these names."""
        return sum(1 << self._position[name] for name in names)

    @functools.cached_property
    def _position(self) -> dict[str, int]:
        return {op.name: i for i, op in enumerate(self.region.operators)}

    def scheme(self, program: Groups) -> Scheme:
        """The canonical scheme of a program."""
        return Scheme.from_groups(self.region, (self.precedence.group(members) for members, _ in program))

    def choice(self, program: Groups) -> Choice:
        """The scheme and kernels of a program. Raises SearchError when it is not a legal one of this region."""
        full = (1 << len(self.region.operators)) - 1
        if sum(members for members, _ in program) != full or any(
            members not in self.kernels or not 0 <= kernel < len(self.kernels[members]) for members, kernel in program
        ):
            raise SearchError(f"{program} is not a legal program of the region {self.region.hash}")
        return Choice(self.scheme(program), tuple(self.kernels[members][kernel] for members, kernel in program))

    def shortest(self, cost: Callable[[int, int], float]) -> Groups:
        """The program with the least sum of ``cost(members, index of the kernel)``; of equal ones with the
        fewest groups. Exact if ``is_exact``; infinite costs are left out."""
        best = {members: min(ks, key=functools.partial(cost, members)) for members, ks in self.allowed.items()}
        paths: nx.DiGraph[int] = nx.DiGraph()
        for done, then in itertools.combinations(self.downsets, 2):
            members = done ^ then
            if not done & ~then and members in best and math.isfinite(seconds := cost(members, best[members])):
                # Whole femtoseconds with room for the number of groups: sums are exact.
                paths.add_edge(done, then, weight=(round(seconds * 1e15) << 32) + 1)
        try:
            path = nx.dijkstra_path(paths, self.downsets[0], self.downsets[-1])
        except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
            raise SearchError(f"no kernels are left for the region {self.region.hash}: all of them failed") from error
        return self.ordered((a ^ b, best[a ^ b]) for a, b in itertools.pairwise(path))

    def ordered(self, program: Iterable[tuple[int, int]]) -> Groups:
        """Groups in the canonical order of execution."""
        kernel = dict(program)
        return tuple((members, kernel[members]) for members in self.precedence.order(kernel))

    def enumerate(self) -> Iterator[Groups]:
        """Every distinct program of kernels that are not pruned, each once; as many as ``remaining`` says."""
        seen: set[tuple[int, ...]] = set()
        known = set(self.downsets)

        def complete(done: int, taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if done == self.downsets[-1]:
                sets = tuple(sorted(taken))
                if sets not in seen:
                    seen.add(sets)
                    yield sets
                return
            for members in self.allowed:
                if not members & done and done | members in known:
                    yield from complete(done | members, (*taken, members))

        for sets in complete(0, ()):
            order = self.precedence.order(sets)
            for kernels in itertools.product(*(self.allowed[members] for members in order)):
                yield tuple(zip(order, kernels, strict=True))

    def random(self, generator: np.random.Generator) -> Groups:
        """Uniform bits, repaired, with a uniformly drawn kernel for each group."""
        sets = self.repair([bool(b) for b in generator.integers(0, 2, len(self.region.edges))])
        return tuple((members, int(generator.choice(self.allowed[members]))) for members in sets)

    def bits(self, program: Groups) -> tuple[bool, ...]:
        """The canonical bits of a program."""
        return self.scheme(program).bits


@dataclass(frozen=True)
class Space:
    """All that a search decides about a model on one target, with legality: no illegal point can be written.

    ``threads`` is the team size that programs are measured with. ``pruned`` counts kernels that were left out because
    they cannot win, by the reason.
    """

    regions: tuple[RegionSpace, ...]
    target: Target
    threads: int
    pruned: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: OperatorGraph | Sequence[Region],
        target: Target,
        threads: int,
        table: Table = IMPLEMENTATIONS,
        *,
        offline: bool = False,
    ) -> Space:
        """The space of a model's graph, or of regions that are counted once each time that they occur.

        With ``offline`` also kernels that take about a minute each to build, which ``optimize`` does not consider by
        itself. Raises SearchError for a graph without regions, and for ``offline`` where there are no such kernels.
        """
        found: dict[str, list[Region]] = {}
        for region in graph.regions if isinstance(graph, OperatorGraph) else graph:
            found.setdefault(region.hash, []).append(region)
        if not found:
            raise SearchError("the model has no operators that could share a kernel, so there is nothing to search")
        spaces = []
        for equal in found.values():
            alone = standalone(equal[0])
            kernels = kernels_of(alone, table, target, offline=offline)
            allowed = {members: tuple(range(len(choices))) for members, choices in kernels.items()}
            spaces.append(RegionSpace(alone, len(equal), kernels, allowed))
        if offline and not any(k.offline for space in spaces for choices in space.kernels.values() for k in choices):
            raise SearchError(f"there are no kernels to build offline: {_why_none_offline(target)}")
        return cls(tuple(spaces), target, threads)

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits, equal for the same regions with the same kernels, counts, target and threads."""
        parts = [self.target.key, str(self.target.cores), str(self.threads)]
        for space in self.regions:
            parts += [space.region.hash, str(space.count)]
            parts += [
                f"{members:x}:{choice.name}" for members in sorted(space.kernels) for choice in space.kernels[members]
            ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def programs(self) -> int:
        """Number of distinct programs of the whole model."""
        return math.prod(space.programs for space in self.regions)

    @property
    def schemes(self) -> int:
        """Number of distinct schemes of the whole model."""
        return math.prod(space.schemes for space in self.regions)

    @property
    def kernels(self) -> int:
        """Number of kernels of all legal groups."""
        return sum(len(kernels) for space in self.regions for kernels in space.kernels.values())

    @property
    def is_exact(self) -> bool:
        """Whether counts and shortest paths cover every legal program."""
        return all(space.is_exact for space in self.regions)

    def predicted(self, region: int, members: int, kernel: int) -> float:
        """Seconds that the cost model predicts for a kernel."""
        return self.regions[region].kernels[members][kernel].seconds

    def default(self) -> Point:
        """The program of the least predicted time of kernels that need no search: what is compiled without one."""
        return self.shortest(self._quick)

    def _quick(self, region: int, members: int, kernel: int) -> float:
        offline = self.regions[region].kernels[members][kernel].offline
        return math.inf if offline else self.predicted(region, members, kernel)

    def shortest(self, costs: Costs) -> Point:
        """The program with the least sum of ``costs``. Raises SearchError when no legal program has finite ones."""
        return Point(tuple(space.shortest(functools.partial(costs, at)) for at, space in enumerate(self.regions)))

    def additive(self, point: Point, costs: Costs) -> float:
        """Seconds of the model under the additive model: the costs of all groups of all regions, with their counts."""
        return math.fsum(
            space.count * costs(at, members, kernel)
            for at, (space, program) in enumerate(zip(self.regions, point.regions, strict=True))
            for members, kernel in program
        )

    def choices(self, point: Point) -> dict[str, Choice]:
        """By region hash the scheme and kernels, over the standalone graphs of this space's regions.

        Raises SearchError when the point is not a legal one of this space.
        """
        if len(point.regions) != len(self.regions):
            raise SearchError(
                f"a program of {len(point.regions)} regions is not one of this model's {len(self.regions)}"
            )
        pairs = zip(self.regions, point.regions, strict=True)
        return {space.region.hash: space.choice(program) for space, program in pairs}

    def random(self, generator: np.random.Generator) -> Point:
        """A random legal point."""
        return Point(tuple(space.random(generator) for space in self.regions))

    def prune(self, slack: float, costs: Costs | None = None) -> Space:
        """Without the kernels that cannot win: those where even the best program with them takes more than ``slack``
        times as long as the best program of its region, by ``costs`` (default: predicted).

        Single operators keep their best kernel, so every bit string stays repairable.
        """
        costs = self.predicted if costs is None else costs
        start = self.default()
        kept = []
        dropped = 0
        for at, space in enumerate(self.regions):
            through = _through(space, functools.partial(costs, at))
            limit = min(through.values()) * slack
            kept_always = set(start.regions[at])
            allowed: dict[int, tuple[int, ...]] = {}
            for members, choices in space.allowed.items():
                some = tuple(
                    k for k in choices if through.get((members, k), math.inf) <= limit or (members, k) in kept_always
                )
                if not some and not members & (members - 1):
                    some = (min(choices, key=functools.partial(costs, at, members)),)
                dropped += len(choices) - len(some)
                if some:
                    allowed[members] = some
            kept.append(RegionSpace(space.region, space.count, space.kernels, allowed))
        reasons = dict(self.pruned)
        if dropped:
            reason = f"even the best program with it is predicted to take over {slack:g} × the best"
            reasons[reason] = reasons.get(reason, 0) + dropped
        return Space(tuple(kept), self.target, self.threads, reasons)

    def describe(self) -> dict[str, Any]:
        """The space as JSON, for reports that are made without the model."""
        return {
            "hash": self.hash,
            "programs": str(self.programs),
            "schemes": str(self.schemes),
            "exact": self.is_exact,
            "pruned": dict(self.pruned),
            "target": self.target.key,
            "threads": self.threads,
            "regions": [
                {
                    "hash": space.region.hash,
                    "count": space.count,
                    "programs": str(space.programs),
                    "schemes": str(space.schemes),
                    "operators": [{"name": op.name, "kind": op.kind} for op in space.region.operators],
                    "edges": [list(edge) for edge in space.region.edges],
                    "natural_groups": [
                        {"name": group.name, "operators": list(group.operators)} for group in space.natural_groups
                    ],
                    "kernels": {
                        f"{members:x}": [
                            {"name": choice.name, "family": choice.family, "predicted": choice.seconds}
                            for choice in choices
                        ]
                        for members, choices in space.kernels.items()
                    },
                }
                for space in self.regions
            ],
        }


def _why_none_offline(target: Target) -> str:
    if target.arch == "sm_90a" and not target.emulated and gemm_cutlass.include_folder() is None:
        return "they need CUTLASS's headers; pip install 'sparse-fuser[cuda]'"
    return "they run linear layers in fp16 or bf16 on sm_90a (H100, H200), and this model or target has none"


def _through(space: RegionSpace, cost: Callable[[int, int], float]) -> dict[tuple[int, int], float]:
    """For every kernel the cost of the best program with it."""
    best = {members: min(cost(members, k) for k in choices) for members, choices in space.allowed.items()}
    known = space.downsets
    at = set(known)
    ahead = dict.fromkeys(known, math.inf)
    behind = dict.fromkeys(known, math.inf)
    ahead[known[0]] = behind[known[-1]] = 0.0
    for done in known:
        for members, seconds in best.items():
            if not members & done and done | members in at:
                ahead[done | members] = min(ahead[done | members], ahead[done] + seconds)
    for done in reversed(known):
        for members, seconds in best.items():
            if not members & ~done and done ^ members in at:
                behind[done ^ members] = min(behind[done ^ members], behind[done] + seconds)
    found: dict[tuple[int, int], float] = {}
    for members, choices in space.allowed.items():
        ends = [ahead[d] + behind[d | members] for d in known if not d & members and d | members in at]
        if ends:
            found.update(((members, k), min(ends) + cost(members, k)) for k in choices)
    return found
