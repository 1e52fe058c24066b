"""Programs of a file that serve all sizes: which one a call gets, and what it is for the sizes of that call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuser.frontend.calls import FlatCall
from fuser.ir.binding import Binder
from fuser.ir.errors import CaptureError, KernelError, PackingError
from fuser.module.forms import magnitude
from fuser.module.programs import ProgramCache
from fuser.module.ragged import Padding, run_packed
from fuser.module.weights import made
from fuser.runtime.program import Program, ProgramPlan
from fuser.saved import codec
from fuser.saved.content import SavedCapture, SavedPart, SavedTemplate, SavedTensor, SavedVariant, check_plan

_PROGRAMS = 64
"""Bound programs that a loaded module keeps."""
MakeProgram = Callable[[ProgramPlan, Sequence[Tensor]], Program]
Weight = Callable[[SavedTensor], Tensor]


class Result(NamedTuple):
    """What a call gives, and the program that made it."""

    output: Any
    made: SavedTemplate


class LoadedCaptures:
    """The programs for all sizes of a file. ``weight`` gives its tensors, ``make`` programs in the module's memory."""

    def __init__(self, captures: Sequence[SavedCapture], weight: Weight, make: MakeProgram) -> None:
        self._captures: dict[tuple[Any, ...], list[SavedCapture]] = {}
        for saved in captures:
            self._captures.setdefault(saved.key, []).append(saved)
        self._weight = weight
        self._make = make
        self._binders: dict[int, Binder[Any]] = {}
        self._programs: ProgramCache[Any, tuple[Program, SavedTemplate]] = ProgramCache(_PROGRAMS)
        self._lock = threading.RLock()
        self._padding = Padding("skip")

    def find(self, key: Any, call: FlatCall) -> tuple[SavedCapture, SavedVariant, dict[str, int]] | None:
        """What serves a call with ``key`` (see :func:`fuser.module.forms.form_key`), and its sizes; None if nothing."""
        for saved in self._captures.get(key, ()):
            try:
                sizes = saved.sizes.sizes([tensor.shape for tensor in call.tensors])
            except CaptureError:
                continue
            for variant in saved.variants:
                if all(self._bound(variant.assumptions, sizes)):
                    return saved, variant, sizes
        return None

    def run(
        self, saved: SavedCapture, variant: SavedVariant, sizes: Mapping[str, int], call: FlatCall, threads: int
    ) -> Result:
        """The output of a call. Raises KernelError where it would take a program that is not in the file."""
        reason, output = "nothing was compiled for calls without padding", self._bound(saved.output, sizes)
        if variant.packing is not None:
            packing = variant.packing
            complete: set[tuple[Any, ...]] | None = set() if variant.whole.templates else None

            def rows(sizes: Mapping[str, int]) -> Program:
                return self._program(packing.rows, sizes, threads)[0]

            try:
                before = self._program(packing.before, sizes, threads)[0]
                results = run_packed(packing.layout, sizes, before, rows, call.tensors, self._padding, complete)
            except PackingError as error:
                results, reason = None, str(error)
            if results is not None:
                return Result(output.fill(results), packing.rows.templates[-1])
        if not variant.whole.templates:
            raise KernelError(f"padding of this call has to be computed, for which no program was saved: {reason}")
        program, template = self._program(variant.whole, sizes, threads)
        return Result(output.fill(program(call.tensors)), template)

    def _bound(self, tree: Any, sizes: Mapping[str, int]) -> Any:
        """A part of the file, which stays as it is, for some sizes."""
        if id(tree) not in self._binders:
            self._binders[id(tree)] = Binder(tree)
        return self._binders[id(tree)](sizes)

    def _program(self, part: SavedPart, sizes: Mapping[str, int], threads: int) -> tuple[Program, SavedTemplate]:
        """The program of a part with the largest team that ``threads`` can be, of the nearest magnitude."""
        fitting = [made for made in part.templates if made.plan.threads <= threads]
        team = (max if fitting else min)(made.plan.threads for made in fitting or part.templates)
        wanted = magnitude(part.counts, sizes)
        template = min(
            (made for made in part.templates if made.plan.threads == team), key=lambda t: abs(t.magnitude - wanted)
        )
        key = id(template), tuple(sorted(sizes.items())), min(team, threads)
        with self._lock:
            found = self._programs.use(key)
            if found is None:
                found = self._make_program(template, sizes, min(team, threads)), template
                self._programs.add(key, found)
            return found

    def _make_program(self, template: SavedTemplate, sizes: Mapping[str, int], team: int) -> Program:
        tree = (template.plan, template.late, template.values)
        if id(template) not in self._binders:
            self._binders[id(template)] = Binder(tree)
        plan, late, values = self._binders[id(template)](sizes)
        try:
            check_plan(plan, len(template.constants))
            for step in plan.steps:
                codec.check(step)
        except (TypeError, ValueError) as error:
            raise KernelError(f"the file has no program for the sizes {dict(sizes)}: {error}") from error
        with torch.inference_mode(False), torch.no_grad():
            parameters = {name: self._weight(tensor) for name, tensor in template.parameters.items()}
            own = {i: made(ref, values, parameters, None) for i, ref in late}
            constants = [
                own[i] if constant is None else self._weight(constant) for i, constant in enumerate(template.constants)
            ]
        return self._make(dataclasses.replace(plan, threads=team), constants)
