"""Fusion schemes: which operators of a region share a kernel, as one bit for every edge.

Bit ``i`` belongs to ``region.edges[i]``; 1 puts producer and consumer into one kernel. Any bit string is accepted: the
operators that 1-bits connect form a group, and a group that breaks a rule is repaired by cutting it. The rules: a group
is connected and convex, the groups together can be scheduled one after the other, and ``legal`` holds (one kernel
family can run the group; a single operator always can). So every bit string denotes exactly one partition, and the
scheme of that partition, in which an edge has bit 1 exactly when both its ends are in one group, is its canonical form.

A set of operators of a region is a number, ``members``, with one bit for the position of every operator.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from fuser.ir.errors import SchemeError
from fuser.ir.graph import OperatorGroup, Region

VERSION = 1

Legality = Callable[[OperatorGroup], bool]
"""Whether one kernel can run a group of two or more operators."""

_TEXT = re.compile(r"(\d+):([^:]*):([^:]*)")
_REGION = re.compile(r"[0-9a-f]{16}")
_BITS = re.compile(r"[1-9a-f][0-9a-f]*")


@dataclass(frozen=True)
class Scheme:
    """One bit for every edge of the region whose hash is ``region``.

    Written as ``version:region:bits``, bits being the hexadecimal digits of a leading 1, which fixes their number, and
    the bits from the first edge to the last. Raises SchemeError when ``region`` is not a region's hash.
    """

    region: str
    bits: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not _REGION.fullmatch(self.region):
            raise SchemeError(f"{self.region!r} is not the hash of a region: expected 16 hexadecimal digits")

    @property
    def edges(self) -> int:
        """Number of edges, each with one bit."""
        return len(self.bits)

    @property
    def hash(self) -> str:
        """16 hex digits; of canonical schemes, equal exactly for equal programs."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        number = 1
        for bit in self.bits:
            number = number << 1 | bool(bit)
        return f"{VERSION}:{self.region}:{number:x}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that ``str`` wrote as ``text``; raises SchemeError for anything else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SchemeError(f"{text!r} is not a fusion scheme: expected version:region:bits")
        version, region, digits = found.groups()
        if version != str(VERSION):
            raise SchemeError(f"the scheme {text!r} has version {version}, this fuser reads {VERSION}: search again")
        if not _BITS.fullmatch(digits):
            raise SchemeError(f"the bits of the scheme {text!r} are not a hexadecimal number with a leading 1")
        return cls(region, tuple(bit == "1" for bit in f"{int(digits, 16):b}"[1:]))

    @classmethod
    def from_groups(cls, region: Region, groups: Iterable[OperatorGroup]) -> Scheme:
        """The scheme that puts each of ``groups`` into one kernel; canonical when the groups obey the rules.

        Raises SchemeError unless every operator of ``region`` is in exactly one group and every group is connected.
        """
        groups = tuple(groups)
        owner = {op.name: number for number, group in enumerate(groups) for op in group.operators}
        names = [op.name for op in region.operators]
        if sum(len(group.operators) for group in groups) != len(owner) or owner.keys() != set(names):
            raise SchemeError("the groups must hold every operator of the region exactly once")
        bits = tuple(owner[names[a]] == owner[names[b]] for a, b in region.edges)
        if sum(1 for _ in _components(region, bits)) != len(groups):
            raise SchemeError("operators of one group are not connected inside it, so no bits can keep them together")
        return cls(region.hash, bits)


def unfused(region: Region) -> Scheme:
    """Every operator in a kernel of its own."""
    return Scheme(region.hash, (False,) * len(region.edges))


def groups(scheme: Scheme, region: Region, legal: Legality) -> tuple[OperatorGroup, ...]:
    """The groups that ``scheme`` denotes, repaired where they break a rule, in a valid order of execution.

    A group that cannot stay whole becomes the longest runs of its operators that can, in topological order. ``legal``
    is asked at most once for a set of operators. Raises SchemeError when the scheme belongs to another region.
    """
    if scheme.region != region.hash:
        raise SchemeError(f"the scheme belongs to the region {scheme.region}, not to {region.hash}")
    if scheme.edges != len(region.edges):
        raise SchemeError(f"the scheme has {scheme.edges} bits for a region of {len(region.edges)} edges")
    precedence = Precedence(region)
    owner = [1 << i for i in range(len(region.operators))]
    verdicts: dict[int, bool] = {}

    def fits(members: int) -> bool:
        if not members & (members - 1):
            return True
        if not precedence.schedulable(members, owner):
            return False
        if members not in verdicts:
            verdicts[members] = legal(precedence.group(members))
        return verdicts[members]

    for component in _components(region, scheme.bits):
        rest = sum(1 << i for i in component)
        while rest:
            # Longest first: attention is one kernel only as a whole, so a shorter run may fit less well than a longer.
            piece = next(run for run in precedence.runs(rest) if fits(run))
            for i in positions(piece):
                owner[i] = piece
            rest &= ~piece
    return tuple(precedence.group(members) for members in precedence.order(set(owner)))


def canonical(scheme: Scheme, region: Region, legal: Legality) -> Scheme:
    """The canonical form: equal for all schemes that denote the same program. Raises like :func:`groups`."""
    return Scheme.from_groups(region, groups(scheme, region, legal))


def positions(members: int) -> Iterator[int]:
    """Positions of the operators in a set of them, ascending."""
    while members:
        yield (members & -members).bit_length() - 1
        members &= members - 1


class Precedence:
    """Which operators of a region run before which, for sets of operators."""

    def __init__(self, region: Region) -> None:
        self.region = region
        count = len(region.operators)
        self.neighbours = [0] * count
        """For each operator, those that it shares an edge with."""
        for a, b in region.edges:
            self.neighbours[a] |= 1 << b
            self.neighbours[b] |= 1 << a
        self.after, self._detours = _reachable(region)
        """For each operator, those that need its result, directly or not."""
        self.before = [sum(1 << a for a in range(i) if self.after[a] >> i & 1) for i in range(count)]
        """For each operator, those whose result it needs, directly or not."""

    def group(self, members: int) -> OperatorGroup:
        """The operators of ``members`` as a group."""
        return OperatorGroup(self.region.graph, tuple(self.region.operators[i] for i in positions(members)))

    def component(self, members: int, start: int) -> int:
        """The operators that edges inside ``members`` connect with the operator at ``start``."""
        found, new = 0, 1 << start
        while new:
            found |= new
            new = self._union(self.neighbours, new) & members & ~found
        return found

    def is_connected(self, members: int) -> bool:
        return self.component(members, next(positions(members))) == members

    def leaves(self, members: int) -> bool:
        """Whether a path between two operators of ``members`` runs through an operator outside the region."""
        return bool(self._union(self._detours, members) & members)

    def schedulable(self, members: int, owner: Sequence[int]) -> bool:
        """Whether ``members`` can run as a unit (so is convex), the rest running in the groups ``owner[position]``.

        ``owner`` without ``members`` must be schedulable.
        """
        if self.leaves(members):
            return False
        seen, todo = members, self._union(self.after, members) & ~members
        while todo:
            group = owner[next(positions(todo))]
            later = self._union(self.after, group)
            if later & members:
                return False
            seen |= group
            todo = (todo | later) & ~seen
        return True

    def runs(self, members: int) -> Iterator[int]:
        """The connected sets that start at the first operator of ``members`` and take the following ones up to some
        operator, longest first."""
        start, previous = next(positions(members)), 0
        while members:
            run = self.component(members, start)
            if run != previous:
                yield run
            previous = run
            members ^= 1 << (members.bit_length() - 1)

    def order(self, sets: Iterable[int]) -> list[int]:
        """Disjoint sets of operators in a valid order of execution: the earliest first operator first."""
        owner = {i: members for members in sets for i in positions(members)}
        quotient: nx.DiGraph[int] = nx.DiGraph()
        quotient.add_nodes_from(owner.values())
        quotient.add_edges_from(
            (members, owner[i])
            for members in set(owner.values())
            for i in positions(self._union(self.after, members) & ~members)
            if i in owner
        )
        return list(nx.lexicographical_topological_sort(quotient, key=lambda members: members & -members))

    @staticmethod
    def _union(table: Sequence[int], members: int) -> int:
        union = 0
        for i in positions(members):
            union |= table[i]
        return union


def _reachable(region: Region) -> tuple[list[int], list[int]]:
    """For every operator of ``region``, the others that its result reaches, and those reached by way of operators
    outside the region."""
    graph = region.graph
    at = {op.name: i for i, op in enumerate(region.operators)}
    between = graph.operators[graph.position[region.operators[0].name] : graph.position[region.operators[-1].name] + 1]
    after: dict[str, int] = {}
    detours: dict[str, int] = {}
    for op in reversed(between):
        name = op.name
        if name not in graph.digraph:
            continue
        after[name] = detours[name] = 0
        for successor in graph.digraph.successors(name):
            if successor not in after:
                continue
            if successor in at:
                after[name] |= 1 << at[successor]
                detours[name] |= detours[successor]
            else:
                detours[name] |= after[successor]
            after[name] |= after[successor]
    return [after[name] for name in at], [detours[name] for name in at]


def _components(region: Region, bits: Sequence[bool]) -> Iterator[list[int]]:
    """Positions of the operators that 1-bits connect, components in order of their first operator."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(region.operators)))
    graph.add_edges_from(edge for edge, bit in zip(region.edges, bits, strict=True) if bit)
    yield from sorted((sorted(part) for part in nx.connected_components(graph)), key=lambda part: part[0])
