"""What a saved file holds, and the checks that nothing in it points outside of what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fuser.codegen.assemble import KernelRecord
from fuser.frontend.sizes import SizeRange
from fuser.ir.attention import AttentionSpec
from fuser.ir.binding import Binder
from fuser.ir.graph import Constant
from fuser.ir.packing import PackedLayout
from fuser.ir.target import Target
from fuser.kernels.base import KernelSpec
from fuser.runtime.library import Kernel
from fuser.runtime.program import RUNNER, Memory, NativeStep, ProgramPlan, Slot, TorchStep
from fuser.saved.outline import Outline

FORMAT = "8"
"""Of the whole file; changes whenever older versions of fuser could not read what this one writes."""
PROGRAMS, REPORTS = "programs.json", ("report.txt", "report.html")
_LARGEST = 1 << 48
"""Bytes that no arena or tensor has."""


@dataclass(frozen=True)
class Manifest:
    """Who wrote a file, and the SHA-256 of each of its parts by name."""

    fuser: str
    torch: str
    machine: str
    target: Target
    parts: Mapping[str, str]


@dataclass(frozen=True)
class SavedTensor:
    """Where a constant lies: elements of the one-dimensional part ``weights/<name>``, read with these strides.

    ``dtype`` is that of the constant; what safetensors has no name for is stored as bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, part: Tensor) -> Tensor:
        """The constant in its part."""
        return part.view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class SavedProgram:
    """One program without its memory; ``constants`` are the tensors of ``plan.constants`` in its order, ``specs`` its
    kernels."""

    key: tuple[Any, ...]
    plan: ProgramPlan
    output: Outline
    constants: tuple[SavedTensor, ...]
    specs: tuple[KernelSpec, ...]
    kernels: tuple[KernelRecord, ...]
    unfused: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SavedTemplate:
    """A program for all sizes, without its memory, for kernels chosen at one ``magnitude`` of these.

    ``constants`` are the tensors of ``plan.constants`` in its order, None for those that follow from sizes: ``late``
    has these by position, made of the derived ``values`` and the original ``parameters`` by name.
    """

    magnitude: int
    plan: ProgramPlan
    constants: tuple[SavedTensor | None, ...]
    late: tuple[tuple[int, Any], ...]
    values: Mapping[str, Constant]
    parameters: Mapping[str, SavedTensor]
    specs: tuple[KernelSpec, ...]
    kernels: tuple[KernelRecord, ...]
    unfused: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SavedPart:
    """What was compiled of one graph; ``counts`` names the sizes that its magnitude follows from, None for all."""

    templates: tuple[SavedTemplate, ...]
    counts: tuple[str, ...] | None


@dataclass(frozen=True)
class SavedPacking:
    """The two parts of a graph without padding."""

    layout: PackedLayout
    before: SavedPart
    rows: SavedPart


@dataclass(frozen=True)
class SavedVariant:
    """A graph for the sizes for which all ``assumptions`` come out true."""

    assumptions: tuple[Any, ...]
    whole: SavedPart
    packing: SavedPacking | None

    @property
    def parts(self) -> tuple[SavedPart, ...]:
        return (self.whole, *(() if self.packing is None else (self.packing.before, self.packing.rows)))


@dataclass(frozen=True)
class SavedCapture:
    """A model for all ``sizes`` of calls with ``key`` in common (see :func:`fuser.module.forms.form_key`)."""

    key: tuple[Any, ...]
    sizes: SizeRange
    output: Outline
    variants: tuple[SavedVariant, ...]

    @property
    def templates(self) -> Iterator[SavedTemplate]:
        """Everything that was compiled."""
        return (made for variant in self.variants for part in variant.parts for made in part.templates)


@dataclass(frozen=True)
class SavedPrograms:
    """All programs of a file, for single shapes and for all, and the specifications that calls of our own operators
    name by key."""

    programs: tuple[SavedProgram, ...]
    captures: tuple[SavedCapture, ...]
    attention: tuple[tuple[str, AttentionSpec], ...]

    @property
    def _every(self) -> list[SavedProgram | SavedTemplate]:
        return [*self.programs, *(made for found in self.captures for made in found.templates)]

    @property
    def plans(self) -> list[ProgramPlan]:
        return [saved.plan for saved in self._every]

    @property
    def specs(self) -> dict[str, KernelSpec]:
        """The kernels by symbol."""
        return {spec.symbol: spec for saved in self._every for spec in saved.specs}


@dataclass(frozen=True)
class Content:
    """Everything that a file holds, in memory and checked."""

    path: Path
    target: Target
    programs: tuple[SavedProgram, ...]
    captures: tuple[SavedCapture, ...]
    weights: Mapping[str, Tensor]
    kernels: Mapping[str, Kernel]
    reports: Mapping[str, str]


def check_program(saved: SavedProgram, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError or TypeError unless every slot of a program lies within the memory that it names, all constants
    are among ``weights``, and the output takes as many tensors as the program returns."""
    for constant in saved.constants:
        _check_tensor(constant, weights)
    if not Binder((saved.plan, saved.output, saved.constants)).is_constant:
        raise ValueError("a program for one shape has numbers")
    check_plan(saved.plan, len(saved.constants))
    _check_symbols(saved.plan, saved.specs)
    _check_output(saved.output, saved.plan)
    describe(saved.key)


def check_capture(saved: SavedCapture, weights: Mapping[str, Tensor]) -> None:
    """As :func:`check_program`, of what does not depend on sizes: see :func:`check_plan` for the rest."""
    for made in saved.templates:
        for constant in (*made.constants, *made.parameters.values()):
            if constant is not None:
                _check_tensor(constant, weights)
        if sorted(i for i, _ in made.late) != [i for i, constant in enumerate(made.constants) if constant is None]:
            raise ValueError("it does not say what its constants are")
        _check_symbols(made.plan, made.specs)
    for variant in saved.variants:
        for made in variant.whole.templates:
            _check_output(saved.output, made.plan)
        if variant.packing is not None:
            layout = variant.packing.layout
            if not len(layout.outputs) == len(layout.shapes) == len(layout.dtypes) == len(saved.output.check()):
                raise ValueError("its output does not take what it returns")


def check_plan(plan: ProgramPlan, constants: int) -> None:
    """Raise ValueError unless every slot of a plan, with so many constants, lies within the memory that it names."""
    if not 0 <= plan.workspace_offset <= plan.arena_bytes < _LARGEST or plan.threads < 1 or plan.result_count < 0:
        raise ValueError("its arena cannot be")
    sizes = {
        Memory.ARENA: [plan.workspace_offset],
        Memory.INPUT: [_end(slot, 0) for slot in plan.inputs],
        Memory.OUTPUT: [_end(slot, 0) for slot in plan.outputs],
        # PyTorch checks the bounds of what its steps read and write.
        Memory.CONSTANT: [_LARGEST] * constants,
        Memory.RESULT: [_LARGEST] * plan.result_count,
        Memory.STATE: [_end(slot, 0) for slot in plan.states.values()],
    }
    for step in plan.steps:
        if isinstance(step, NativeStep):
            slots: Sequence[Slot] = step.tensors
        else:
            slots = (*step.inputs, *step.results, *([] if step.out is None else [step.out]))
        for slot in slots:
            _within(slot, sizes[slot.memory])
    for slot in plan.returns:
        _within(slot, sizes[slot.memory])


def _check_tensor(constant: SavedTensor, weights: Mapping[str, Tensor]) -> None:
    _extent(constant.shape, constant.strides)
    constant.of(weights[constant.name])


def _check_symbols(plan: ProgramPlan, specs: Sequence[KernelSpec]) -> None:
    symbols = {spec.symbol for spec in specs} | {RUNNER}
    if lacking := sorted(set(plan.symbols) - symbols):
        raise ValueError(f"it does not say what the kernel {lacking[0]} is")


def _check_output(output: Outline, plan: ProgramPlan) -> None:
    if output.check() != frozenset(range(len(plan.returns))):
        raise ValueError("its output does not take what it returns")


def _within(slot: Slot, sizes: Sequence[int]) -> None:
    if not 0 <= slot.index < len(sizes) or _end(slot, slot.offset) > sizes[slot.index]:
        raise ValueError(f"a step reads or writes outside of its memory: {slot}")


def _end(slot: Slot, offset: int) -> int:
    """Bytes from the start of a slot's memory to its last element."""
    extent = _extent(slot.shape, slot.strides) * slot.dtype.itemsize
    if offset < 0 or offset % slot.dtype.itemsize or offset + extent > _LARGEST:
        raise ValueError(f"there is no such place: {slot}")
    return offset + extent


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    if len(shape) != len(strides) or min((*shape, *strides), default=0) < 0:
        raise ValueError(f"there is no tensor of the shape {tuple(shape)} and strides {tuple(strides)}")
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def torch_calls(plans: Sequence[ProgramPlan]) -> list[TorchStep]:
    """The steps of all programs that PyTorch runs."""
    return [step for plan in plans for step in plan.steps if isinstance(step, TorchStep)]


def describe(key: tuple[Any, ...]) -> str:
    """The call of a signature: ``(int64 (1, 128), attention_mask=int64 (1, 128))``; what objects consist of stands
    behind the arguments."""
    spec, *leaves = key
    texts = [
        _Text(f"{str(leaf[1]).removeprefix('torch.')} {leaf[0]}" + (f" on {leaf[2]}" if leaf[2] != "cpu" else ""))
        if len(leaf) > 2
        else _Text(repr(leaf[1]))
        for leaf in leaves[: spec.num_leaves]
    ]
    args, kwargs = pytree.tree_unflatten(texts, spec)
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"


def describe_capture(saved: SavedCapture) -> str:
    """The calls of a capture: ``(int64 (batch, sequence))``, with names for sizes above one."""
    spec, *leaves = saved.key
    shapes = iter(saved.sizes.shapes)
    named = [(tuple(next(shapes)), *leaf[1:3], None) if isinstance(leaf[0], tuple) else leaf for leaf in leaves]
    return describe((spec, *named))


class _Text(str):
    """A string that prints without quotes inside of containers."""

    def __repr__(self) -> str:
        return str(self)
