"""Programs for any sizes: a plan whose numbers are formulas, and the plan that it is once sizes are known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuser.codegen.choice import GroupChoice
from fuser.ir.binding import Binder
from fuser.ir.errors import FuserError
from fuser.ir.graph import OperatorGraph
from fuser.ir.size import Name
from fuser.ir.target import Target
from fuser.runtime.program import Memory, NativeStep, ProgramPlan, Slot


@dataclass(frozen=True)
class ProgramTemplate:
    """A program plan in which numbers may be sizes that are bound late.

    ``plan`` holds the formulas; :meth:`bind` makes of them the plan that :func:`fuser.codegen.assemble.assemble` makes
    of a graph with these sizes and the same kernels. A plan without named sizes is bound as it is.
    """

    plan: ProgramPlan

    @functools.cached_property
    def _binder(self) -> Binder[ProgramPlan]:
        return Binder(self.plan)

    @property
    def names(self) -> Mapping[str, Name]:
        """The sizes that it needs, with their ranges."""
        return self._binder.names

    def bind(self, sizes: Mapping[str, int]) -> ProgramPlan:
        """The plan for these sizes by name. Raises ValueError for one that is missing or outside its range."""
        return self._binder(sizes)

    def __str__(self) -> str:
        """Every step with the formulas of its extents and of the places, shapes and strides of its tensors."""
        plan = self.plan
        lines = [
            f"size {name} from {size.low}{f' to {size.high}' if size.high else ''}" for name, size in self.names.items()
        ]
        for step in plan.steps:
            lines.append(f"{step.symbol} {step.extents}" if isinstance(step, NativeStep) else str(step.call))
            tensors = step.tensors if isinstance(step, NativeStep) else step.inputs
            lines.extend(f"  {_place(slot)}" for slot in tensors)
            if not isinstance(step, NativeStep):
                lines.extend(f"  -> {_place(slot)}" for slot in (*step.results, *([step.out] if step.out else [])))
        lines.append(f"arena: {plan.arena_bytes} bytes, scratch from {plan.workspace_offset}")
        return "\n".join(lines)


def _place(slot: Slot) -> str:
    number = "" if slot.memory is Memory.ARENA else f" {slot.index}"
    shape, strides = (" × ".join(map(str, numbers)) for numbers in (slot.shape, slot.strides))
    return f"{slot.memory.value}{number} + {slot.offset}: {shape} by {strides}, {slot.dtype}"


def generalized(choices: Sequence[GroupChoice], graph: OperatorGraph, target: Target) -> tuple[GroupChoice, ...]:
    """The same kernels for the operators of the same names of ``graph``, which has named sizes where the graph that the
    choices were made for has numbers. Predicted and measured times stay those of the numbers.

    Raises FuserError where a kernel's family does not match the operators for all sizes.
    """
    operators = {op.name: op for op in graph.operators}
    found = []
    for choice in choices:
        group = graph.group(operators[op.name] for op in choice.group.operators)
        kernel = choice.kernel
        if kernel is not None:
            kernel = kernel.generalized(group, target)
            if kernel is None:
                names = ", ".join(op.name for op in group.operators)
                raise FuserError(f"the kernel for {names} exists for some sizes only")
        found.append(dataclasses.replace(choice, group=group, kernel=kernel))
    return tuple(found)
