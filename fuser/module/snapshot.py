"""What a module has compiled, as a value that reports and saved files are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fuser.frontend.calls import Signature
from fuser.ir.target import Target
from fuser.module.compiler import Compiled
from fuser.module.forms import Form
from fuser.module.quantizing import Precision
from fuser.module.weights import WeightStore


@dataclass(frozen=True)
class Memory:
    """Bytes: the largest arena of a program, what was made from weights (packed and derived), originals in files."""

    arena: int
    constants: int
    offloaded: int
    offload_error: str


class SavedCall(NamedTuple):
    """A program with the calls that it serves, and its constants as the weights are now."""

    signature: Signature
    compiled: Compiled
    constants: Sequence[Tensor]


class SavedForm(NamedTuple):
    """A capture for all sizes, what its calls have in common, and the store of its weights."""

    key: tuple[Any, ...]
    form: Form
    store: WeightStore


@dataclass(frozen=True)
class Snapshot:
    """A module at one moment.

    ``model`` is the name of the model's class, ``programs`` is everything compiled, in order, ``target`` what for (None
    before the first program); ``unfused``, ``outside``, ``fallbacks`` and ``specialized`` are as in
    :class:`fuser.OptimizedModule`; ``padding`` says how much of the rows was padding, and why it was computed where it
    should not have been, ``precision`` which layers are quantized.
    """

    model: str
    target: Target | None
    programs: tuple[Compiled, ...]
    unfused: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]
    fallbacks: tuple[str, ...]
    memory: Memory
    specialized: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    precision: Precision | None = None

    @property
    def last(self) -> Compiled | None:
        """The program compiled last."""
        return self.programs[-1] if self.programs else None
