"""What is chosen for a region: a scheme, and the kernel of every group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from fuser.ir.graph import OperatorGroup
from fuser.ir.scheme import Scheme
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Family, Implementation, KernelCall, LibraryCall, canonical
from fuser.kernels.compose import RowProgram

PYTORCH = "pytorch"
"""Stands for a family where PyTorch runs an operator that no family matches."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for the group ``made_for`` and for every group that is equal but for the names of its values: what a
    family knows about it (``match``), and a choice of ``parameters`` of an implementation."""

    family: Family
    implementation: Implementation[Any, Any]
    made_for: OperatorGroup
    match: Any
    parameters: Any
    offline: bool = False
    """Whether it takes about a minute to build, so that only a search may choose it."""

    def cost(self, target: Target) -> Cost:
        return self.implementation.cost(self.match, self.parameters, target)

    def generalized(self, group: OperatorGroup, target: Target) -> Kernel | None:
        """The same for ``group``, which has named sizes where the one that it was made for has numbers; operands are
        read as the named sizes ask for, since rows that happen to lie evenly need not for all sizes. None where there
        is no such kernel for all sizes."""
        match = self.family.match(group, target)
        if match is None:
            return None
        before, now = ([x for x in vars(m).values() if isinstance(x, RowProgram)] for m in (self.match, match))
        read = {(b.operands, n.operands) for b, n in zip(before, now, strict=True)}
        operands = dict(read)
        if len(operands) < len(read):
            return None
        if all(b == n for b, n in read):
            return dataclasses.replace(self, made_for=group, match=match)
        given = {field.name: getattr(self.parameters, field.name) for field in dataclasses.fields(self.parameters)}
        other = {name: operands[x] for name, x in given.items() if isinstance(x, tuple) and operands.get(x, x) != x}
        parameters = dataclasses.replace(self.parameters, **other)
        return dataclasses.replace(self, made_for=group, match=match, parameters=parameters)

    def call(self, group: OperatorGroup, target: Target, threads: int) -> KernelCall | LibraryCall:
        """The launch on the values of ``group``, which equals the one it was made for."""
        call = self.implementation.call(self.match, self.parameters, target, threads)
        if group is self.made_for:
            return call
        return call.renamed(dict(zip(_values(self.made_for), _values(group), strict=True)))


def _values(group: OperatorGroup) -> tuple[str, ...]:
    """The values of a group by position: every input and output of its operators in order, then what constants are
    derived from."""
    values = tuple(value for op in group.operators for value in (*op.inputs, *op.outputs))
    return values + group.graph.with_sources(v for v in values if v in group.graph.constants)


@dataclass(frozen=True)
class GroupChoice:
    """The kernel of one group, None where PyTorch runs the group's one operator, and its time in ``seconds``; ``cost``
    is the prediction, ``measured`` tells where ``seconds`` is from."""

    group: OperatorGroup
    kernel: Kernel | None
    cost: Cost
    seconds: float
    measured: bool = False

    @property
    def family(self) -> str:
        """The name of the kernel's family."""
        return PYTORCH if self.kernel is None else self.kernel.family.name

    @property
    def parameters(self) -> Any:
        return None if self.kernel is None else self.kernel.parameters

    @property
    def kernel_key(self) -> Hashable:
        """Equal for groups of the same kernel."""
        return None if self.kernel is None else (type(self.kernel.implementation), self.kernel.parameters)

    @property
    def name(self) -> str:
        """Family and parameters in one text."""
        return PYTORCH if self.kernel is None else f"{self.family} {canonical(self.parameters)}"

    @property
    def offline(self) -> bool:
        return self.kernel is not None and self.kernel.offline

    def on(self, group: OperatorGroup) -> GroupChoice:
        """The same for an equal group with other values."""
        return dataclasses.replace(self, group=group)

    def call(self, target: Target, threads: int) -> KernelCall | LibraryCall | None:
        """The launch of the kernel, None where PyTorch runs the operator."""
        return None if self.kernel is None else self.kernel.call(self.group, target, threads)


@dataclass(frozen=True)
class Choice:
    """A region's scheme with the kernel of every group, in a valid order of execution."""

    scheme: Scheme
    groups: tuple[GroupChoice, ...]

    @property
    def seconds(self) -> float:
        """Time of the region under the additive model."""
        return math.fsum(choice.seconds for choice in self.groups)
