"""Programs whose calls grow: one for all lengths of the caches that a model is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.frontend.calls import FlatCall
from fuser.frontend.output_structure import OutputSpec
from fuser.frontend.sizes import SizeRange
from fuser.ir.binding import Binder, partly_bound
from fuser.ir.errors import CaptureError
from fuser.runtime.program import ProgramPlan, Rebound

_REMEMBERED = 8192


@dataclass(frozen=True)
class Bound:
    """A program for some sizes: what its memory is, and the structure of its output."""

    rebound: Rebound
    output: OutputSpec


class Growing:
    """The plans of one program for all values of the named sizes that calls' objects alone have.

    The others are those of the first call. ``tree`` is the plan, the constants that follow from sizes and the output,
    and ``made`` gives the tensor of such a constant, with those derived ones that are known by then. ``holds`` says
    whether the plan is right for sizes.
    """

    def __init__(
        self,
        sizes: SizeRange,
        fixed: Mapping[str, int],
        tree: tuple[ProgramPlan, Mapping[str, Any], OutputSpec],
        own: Sequence[int],
        made: Callable[[Any, Mapping[str, Any], dict[str, Tensor]], Tensor],
        holds: Callable[[Mapping[str, int]], bool],
    ) -> None:
        self._sizes = sizes
        self._fixed = fixed
        self._binder = Binder(partly_bound(tree, fixed))
        self._own = own
        self._made = made
        self._holds = holds
        self._held: dict[tuple[int, ...], bool] = {}
        self._known: tuple[FlatCall, dict[str, int]] | None = None
        self._last: tuple[dict[str, int], Bound] | None = None

    def serves(self, call: FlatCall) -> bool:
        """Whether the program can be bound to the sizes of a call."""
        try:
            sizes = self._sizes_of(call)
        except CaptureError:
            return False
        if any(sizes[name] != size for name, size in self._fixed.items()):
            return False
        key = tuple(sizes.values())
        if key not in self._held:
            if len(self._held) >= _REMEMBERED:
                self._held.clear()
            with torch.no_grad():
                self._held[key] = self._holds(sizes)
        return self._held[key]

    def bound(self, call: FlatCall) -> Bound:
        """The program for the sizes of a call that it serves."""
        sizes = self._sizes_of(call)
        last = self._last
        if last is not None and last[0] == sizes:
            return last[1]
        plan, constants, output = self._binder(sizes)
        with torch.inference_mode(False), torch.no_grad():
            known: dict[str, Tensor] = {}
            own = {i: self._made(plan.constants[i], constants, known) for i in self._own}
        bound = Bound(Rebound(plan, own), output)
        self._last = sizes, bound
        return bound

    def _sizes_of(self, call: FlatCall) -> dict[str, int]:
        known = self._known
        if known is not None and known[0] is call:
            return known[1]
        sizes = self._sizes.sizes([tensor.shape for tensor in call.tensors])
        self._known = call, sizes
        return sizes
