"""Outputs as flat tensors and the structure that they are rebuilt with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fuser.frontend import arguments
from fuser.frontend.arguments import Change, Given, is_object, is_value
from fuser.frontend.shadow import attributes_of
from fuser.ir.errors import CaptureError


@dataclass(frozen=True)
class OutputTensor:
    """Stands for one of a program's results in an :class:`OutputSpec`."""

    index: int


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a model's output: a pytree, or an object's attributes.

    ``leaves`` holds an :class:`OutputTensor` for every tensor (one that is returned in several places is one object),
    a nested spec for an object, and everything else as it is: what is not a tensor is a constant of the program.
    ``spec`` is the pytree's structure, or the names of the attributes of an object of class ``cls``. Where the model
    makes ``changes`` to objects that it is given, the structure is that of the output and the values that these get.
    """

    spec: Any
    leaves: tuple[Any, ...]
    cls: type | None = None
    changes: tuple[Change, ...] = ()

    @property
    def holds_tensors(self) -> bool:
        """Whether any part of it is a tensor."""
        return any(
            isinstance(leaf, OutputTensor) or (isinstance(leaf, OutputSpec) and leaf.holds_tensors)
            for leaf in self.leaves
        )

    def sized(self, size: Callable[[torch.SymInt], int]) -> OutputSpec:
        """The same with numbers or formulas in the place of PyTorch's symbols for sizes."""
        leaves = (
            size(leaf) if isinstance(leaf, torch.SymInt) else leaf.sized(size) if isinstance(leaf, OutputSpec) else leaf
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=tuple(leaves))

    def build(self, tensors: Sequence[Tensor], objects: Sequence[Any] = ()) -> Any:
        """The output with these tensors, of a call with these ``objects``, which are changed."""
        filled = [
            tensors[leaf.index]
            if isinstance(leaf, OutputTensor)
            else leaf.build(tensors, objects)
            if isinstance(leaf, OutputSpec)
            else objects[leaf.index]
            if isinstance(leaf, Given)
            else leaf
            for leaf in self.leaves
        ]
        if self.cls is None:
            built = pytree.tree_unflatten(filled, self.spec)
            if self.changes:
                built, values = built
                arguments.apply(self.changes, values, objects)
            return built
        # Not through its constructor, which may compute, and need not take what it keeps.
        made: Any = object.__new__(self.cls)
        for name, value in zip(self.spec, filled, strict=True):
            object.__setattr__(made, name, value)
        return made

    def tensors(self, output: Any, objects: Sequence[Any] = ()) -> dict[int, Tensor]:
        """The tensors of an output of this structure, of a call with these ``objects``, by their index."""
        if self.changes:
            output = output, arguments.values_of(self.changes, objects)
        parts = pytree.tree_leaves(output) if self.cls is None else [getattr(output, name) for name in self.spec]
        found: dict[int, Tensor] = {}
        for leaf, part in zip(self.leaves, parts, strict=True):
            if isinstance(leaf, OutputTensor):
                found[leaf.index] = part
            elif isinstance(leaf, OutputSpec):
                found.update(leaf.tensors(part))
        return found


def flatten_output(
    output: Any, original: Callable[[Any], Any] = lambda value: value
) -> tuple[list[Tensor], OutputSpec]:
    """Tensors of an output and its structure: pytrees (Hugging Face's outputs among them), dataclasses, and objects
    that are nothing but their attributes, such as key-value caches.

    ``original`` gives what an object that the model has had before stands for. Raises CaptureError for objects that
    hold tensors where they cannot be seen.
    """
    tensors: list[Tensor] = []
    places: dict[int, OutputTensor] = {}
    active: set[int] = set()

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in places:
                places[id(value)] = OutputTensor(len(tensors))
                tensors.append(value)
            return places[id(value)]
        if is_value(value):
            return value
        if (stands_for := original(value)) is not value:
            return stands_for
        made = structure(value)
        if made.cls is not None and not made.holds_tensors and not dataclasses.is_dataclass(value):
            # It may be one that others have, too, which a copy would not be.
            raise CaptureError(f"the model returns a {type(value).__name__}, which holds no tensor")
        return made

    def structure(value: Any) -> OutputSpec:
        if id(value) in active:
            raise CaptureError(f"the model returns a {type(value).__name__} that contains itself")
        active.add(id(value))
        if isinstance(value, Tensor) or is_value(value) or not pytree.tree_is_leaf(value):
            leaves, spec = pytree.tree_flatten(value)
            made = OutputSpec(spec, tuple(map(keep, leaves)))
        elif is_object(value):
            names = attributes_of(value)
            made = OutputSpec(names, tuple(keep(getattr(value, name)) for name in names), type(value))
        else:
            raise CaptureError(f"the model returns a {type(value).__name__}, which fuser cannot rebuild from tensors")
        active.discard(id(value))
        return made

    return tensors, structure(output)
