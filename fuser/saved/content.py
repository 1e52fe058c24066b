"""What a saved file holds, and the checks that nothing in it points outside of what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fuser.codegen.assemble import KernelRecord
from fuser.ir.attention import AttentionSpec
from fuser.ir.target import Target
from fuser.kernels.base import KernelSpec
from fuser.runtime.library import Kernel
from fuser.runtime.program import RUNNER, Memory, NativeStep, ProgramPlan, Slot, TorchStep
from fuser.saved.outline import Outline

FORMAT = "4"
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
class SavedPrograms:
    """All programs of a file, and the specifications that calls of our own operators name by key."""

    programs: tuple[SavedProgram, ...]
    attention: tuple[tuple[str, AttentionSpec], ...]


@dataclass(frozen=True)
class Content:
    """Everything that a file holds, in memory and checked."""

    path: Path
    target: Target
    programs: tuple[SavedProgram, ...]
    weights: Mapping[str, Tensor]
    kernels: Mapping[str, Kernel]
    reports: Mapping[str, str]


def check_program(saved: SavedProgram, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError or TypeError unless every slot of a program lies within the memory that it names, all constants
    are among ``weights``, and the output takes as many tensors as the program returns."""
    plan = saved.plan
    if not 0 <= plan.workspace_offset <= plan.arena_bytes < _LARGEST or plan.threads < 1 or plan.result_count < 0:
        raise ValueError("its arena cannot be")
    for constant in saved.constants:
        _extent(constant.shape, constant.strides)
        constant.of(weights[constant.name])
    sizes = {
        Memory.ARENA: [plan.workspace_offset],
        Memory.INPUT: [_end(slot, 0) for slot in plan.inputs],
        Memory.OUTPUT: [_end(slot, 0) for slot in plan.outputs],
        # PyTorch checks the bounds of what its steps read and write.
        Memory.CONSTANT: [_LARGEST] * len(saved.constants),
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
    symbols = {spec.symbol for spec in saved.specs} | {RUNNER}
    if lacking := sorted(set(plan.symbols) - symbols):
        raise ValueError(f"it does not say what the kernel {lacking[0]} is")
    if saved.output.check() != frozenset(range(len(plan.returns))):
        raise ValueError("its output does not take what it returns")
    describe(saved.key)


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


def torch_calls(programs: Sequence[SavedProgram]) -> list[TorchStep]:
    """The steps of all programs that PyTorch runs."""
    return [step for saved in programs for step in saved.plan.steps if isinstance(step, TorchStep)]


def describe(key: tuple[Any, ...]) -> str:
    """The call of a signature: ``(int64 (1, 128), attention_mask=int64 (1, 128))``."""
    spec, *leaves = key
    texts = [
        _Text(f"{str(leaf[1]).removeprefix('torch.')} {leaf[0]}" + (f" on {leaf[2]}" if leaf[2] != "cpu" else ""))
        if len(leaf) > 2
        else _Text(repr(leaf[1]))
        for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(texts, spec)
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"


class _Text(str):
    """A string that prints without quotes inside of containers."""

    def __repr__(self) -> str:
        return str(self)
