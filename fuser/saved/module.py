"""Running saved programs."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuser.codegen.assemble import KernelRecord
from fuser.frontend.calls import FlatCall, Signature, flatten_call
from fuser.ir.errors import KernelError
from fuser.module.acceptance import unreadable
from fuser.module.forms import form_key
from fuser.runtime.cuda_program import arena_of, program_of
from fuser.runtime.locks import ForkSafeLock
from fuser.runtime.program import CPU, Program, ProgramPlan, States
from fuser.runtime.targets import threads_now
from fuser.saved.captures import LoadedCaptures
from fuser.saved.content import (
    REPORTS,
    Content,
    SavedProgram,
    SavedTemplate,
    SavedTensor,
    describe,
    describe_capture,
)


class LoadedModule(nn.Module):
    """Programs from a file, called like the model that they were compiled from.

    Calls take the dtypes and plain arguments that were compiled before saving, of all sizes where the model was
    captured for all, else of those shapes, and return what the saved module returned, bit for bit on as many threads.
    There are no parameters: weights are constants of the programs, gradients
    are not computed, and ``train``, ``to`` and ``half`` change nothing. Programs run on as many threads as they were
    compiled for, or on ``torch.get_num_threads()`` if that is less.
    """

    def __init__(self, content: Content) -> None:
        super().__init__()
        self._content = content
        self._lock = ForkSafeLock()
        self._states: dict[torch.device, States] = {}
        self._weights: dict[tuple[str, torch.device], Tensor] = {}
        self._running: dict[tuple[int, int, torch.device], Program] = {}
        self._by_key: dict[Signature, list[int]] = {}
        for i, saved in enumerate(content.programs):
            self._by_key.setdefault(saved.key, []).append(i)
        self._captures = LoadedCaptures(content.captures, self._on_cpu, self._made)
        every: list[SavedProgram | SavedTemplate] = [t for found in content.captures for t in found.templates]
        self._last = [*every, *content.programs][-1]
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = flatten_call(args, kwargs)
        if reason := unreadable(call.tensors):
            raise KernelError(f"{reason}; a loaded module has no original to run: pass plain tensors of one device")
        with torch.no_grad():
            found = self._served(call)
            if found is None:
                # A call whose tensors lie otherwise in memory has the same results.
                dense = {id(t): t.contiguous() for t in call.tensors}
                args, kwargs = call.unflatten([dense[id(t)] for t in call.tensors])
                call = flatten_call(args, kwargs)
                found = self._served(call)
        if found is None:
            if call.objects:
                raise KernelError(
                    f"a file has no programs for calls with objects, such as caches, and this is {describe(call.key)}: "
                    "optimize the model here"
                )
            shapes = "\n  ".join(self.calls)
            raise KernelError(
                f"no program was saved for the call {describe(call.key)}; {self._content.path} has\n  {shapes}"
            )
        (output,) = found
        return output

    def _served(self, call: FlatCall) -> tuple[Any] | None:
        """The output of a call; None if nothing in the file serves it."""
        candidates, key = self._by_key.get(call.key), form_key(call)
        threads = threads_now() if self._content.target.kind == "cpu" else self._content.target.cores
        found = None if key is None else self._captures.find(key, call)
        if found is not None and (candidates is None or found[1].packing is not None):
            output, self._last = self._captures.run(*found, call, threads)
            return (output,)
        if candidates is None:
            return None
        device = call.tensors[0].device if call.tensors else torch.device(self._content.target.device)
        index, program = self._program(candidates, device)
        self._last = self._content.programs[index]
        return (self._content.programs[index].output.fill(program(call.tensors)),)

    def _on_cpu(self, saved: SavedTensor) -> Tensor:
        return self._tensor(saved, CPU)

    def _made(self, plan: ProgramPlan, constants: Sequence[Tensor]) -> Program:
        states = self._states.setdefault(CPU, States(arena_of(CPU)))
        return program_of(plan, self._content.kernels, constants, self._content.target, states.arena, states=states)

    def _program(self, candidates: Sequence[int], device: torch.device) -> tuple[int, Program]:
        """The program with the largest team that PyTorch's threads can be, or the smallest of all with fewer."""
        target = self._content.target
        now = threads_now() if target.kind == "cpu" else 1
        programs = self._content.programs
        fitting = [i for i in candidates if programs[i].plan.threads <= now]
        pick = max if fitting else min
        index = pick(fitting or candidates, key=lambda i: programs[i].plan.threads)
        team = min(now, programs[index].plan.threads)
        key = (index, team, device)
        with self._lock:
            if key not in self._running:
                saved = programs[index]
                plan = dataclasses.replace(saved.plan, threads=team)
                constants = [self._tensor(t, device) for t in saved.constants]
                states = self._states.setdefault(device, States(arena_of(device)))
                self._running[key] = program_of(
                    plan, self._content.kernels, constants, target, states.arena, states=states
                )
            return index, self._running[key]

    def _tensor(self, saved: SavedTensor, device: torch.device) -> Tensor:
        if (saved.name, device) not in self._weights:
            self._weights[saved.name, device] = self._content.weights[saved.name].to(device)
        return saved.of(self._weights[saved.name, device])

    @property
    def calls(self) -> Sequence[str]:
        """The calls that programs were saved for, as text; of all sizes, with formulas of these."""
        return (*map(describe, self._by_key), *map(describe_capture, self._content.captures))

    @property
    def kernels(self) -> Sequence[KernelRecord]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._last.kernels

    @property
    def unfused(self) -> Sequence[tuple[str, str]]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._last.unfused

    @property
    def outside(self) -> Sequence[tuple[str, str]]:
        """As in :class:`fuser.OptimizedModule`, of the program that ran last."""
        return self._last.outside

    def report(self, path: str | Path | None = None) -> str:
        """The report of the module that was saved, as text; with ``path`` also as HTML."""
        if path is not None:
            Path(path).write_text(self._content.reports[REPORTS[1]], encoding="utf-8")
        return self._content.reports[REPORTS[0]]

    def extra_repr(self) -> str:
        return f"path={str(self._content.path)!r}, programs={len(self._content.programs)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedModule:
        return LoadedModule(self._content)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("a loaded module does not pickle: pass the path and call fuser.load there")
