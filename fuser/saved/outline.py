"""Structures of a model's inputs and outputs as data: containers, named tuples, dataclasses, pytree nodes.

Classes are named by module and name. A file must not decide what is imported or run here, so such a class is taken only
from modules that this process has imported already, or from the ``transformers`` package, and instances are made
without its code: fields of a dataclass and items of a named tuple are set as they were. Only classes that someone has
registered with PyTorch's pytree, as Hugging Face's outputs and caches are, are rebuilt by the function that they were
registered with.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fuser.frontend.shadow import attributes_of, is_plain

_IMPORTED_FOR_FILES = ("transformers",)
"""Packages whose modules are imported when a file names one of their classes."""
_SEQUENCES: Mapping[str, type] = {"tuple": tuple, "list": list, "immutable_list": immutable_list}
_MAPPINGS: Mapping[str, type] = {"dict": dict, "OrderedDict": collections.OrderedDict, "immutable_dict": immutable_dict}


class Outline(ABC):
    """A Python value in which tensors are missing."""

    @abstractmethod
    def fill(self, leaves: Sequence[Any]) -> Any:
        """The value, with its tensors from ``leaves`` in the order in which :func:`outline_of` met them first."""

    @abstractmethod
    def check(self) -> frozenset[int]:
        """The numbers of the tensors that are missing. Raises TypeError for a class that cannot be rebuilt here."""

    def spec(self) -> pytree.TreeSpec:
        """The pytree structure of the value, every missing tensor a leaf."""
        return pytree.tree_structure(self.fill([torch.empty(0) for _ in self.check()]))


@dataclass(frozen=True)
class Missing(Outline):
    """A tensor, by its number; one that stands in several places has one number."""

    index: int

    def fill(self, leaves: Sequence[Any]) -> Any:
        return leaves[self.index]

    def check(self) -> frozenset[int]:
        return frozenset({self.index})


@dataclass(frozen=True)
class Plain(Outline):
    """A value that is the same for every call."""

    value: Any

    def fill(self, leaves: Sequence[Any]) -> Any:
        return self.value

    def check(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class _Parent(Outline):
    items: tuple[Outline, ...]

    def fill(self, leaves: Sequence[Any]) -> Any:
        return self.made([item.fill(leaves) for item in self.items])

    def check(self) -> frozenset[int]:
        self.permit()
        return frozenset[int]().union(*(item.check() for item in self.items))

    @abstractmethod
    def made(self, items: list[Any]) -> Any:
        """The value of these items."""

    @abstractmethod
    def permit(self) -> None:
        """Raise TypeError if there is no such value."""


@dataclass(frozen=True)
class SequenceOutline(_Parent):
    """A tuple or list."""

    kind: str

    def made(self, items: list[Any]) -> Any:
        return _SEQUENCES[self.kind](items)

    def permit(self) -> None:
        if self.kind not in _SEQUENCES:
            raise TypeError(f"there is no sequence {self.kind!r}")


@dataclass(frozen=True)
class MappingOutline(_Parent):
    """A dict, by its keys in order."""

    kind: str
    keys: tuple[Any, ...]

    def made(self, items: list[Any]) -> Any:
        return _MAPPINGS[self.kind](zip(self.keys, items, strict=True))

    def permit(self) -> None:
        if self.kind not in _MAPPINGS or len(self.keys) != len(self.items) or len(set(self.keys)) != len(self.keys):
            raise TypeError(f"there is no mapping {self.kind!r} of the keys {self.keys}")


@dataclass(frozen=True)
class NamedTuple(_Parent):
    """An instance of a named tuple's class."""

    module: str
    name: str

    def made(self, items: list[Any]) -> Any:
        return tuple.__new__(_class(self.module, self.name), items)

    def permit(self) -> None:
        cls = _class(self.module, self.name)
        if not _is_named_tuple(cls) or len(cls._fields) != len(self.items):
            raise TypeError(f"{self.module}.{self.name} is no named tuple of {len(self.items)} fields")


@dataclass(frozen=True)
class Record(_Parent):
    """An instance of a dataclass, or of another class whose objects are nothing but their attributes."""

    module: str
    name: str
    fields: tuple[str, ...]

    def made(self, items: list[Any]) -> Any:
        # Neither __new__, __init__ nor __post_init__: they may do anything.
        value = object.__new__(_class(self.module, self.name))
        for name, item in zip(self.fields, items, strict=True):
            object.__setattr__(value, name, item)
        return value

    def permit(self) -> None:
        cls: Any = _class(self.module, self.name)
        known = self.fields == _fields(cls) if dataclasses.is_dataclass(cls) else is_plain(cls)
        if not known or len(self.fields) != len(self.items) or not all(map(str.isidentifier, self.fields)):
            raise TypeError(f"{self.module}.{self.name} is no class of objects that are {', '.join(self.fields)}")
        if hasattr(cls, "__del__"):
            raise TypeError(f"{self.module}.{self.name} runs code when it is deleted")
        object.__new__(cls)


@dataclass(frozen=True)
class Node(_Parent):
    """An instance of a class that is registered with PyTorch's pytree; ``context`` is what its registration keeps
    beside the items."""

    module: str
    name: str
    context: Any

    def made(self, items: list[Any]) -> Any:
        return pytree.SUPPORTED_NODES[_class(self.module, self.name)].unflatten_fn(items, self.context)

    def permit(self) -> None:
        if _class(self.module, self.name) not in pytree.SUPPORTED_NODES:
            raise TypeError(f"{self.module}.{self.name} is not registered with PyTorch's pytree")


def outline_of(value: Any, places: dict[int, int] | None = None) -> Outline:
    """The outline of a value, in which tensors are missing; ``places`` has the numbers of those met before, by
    identity. Raises TypeError for what cannot be rebuilt from data."""
    places = {} if places is None else places

    def parts(values: Iterable[Any]) -> tuple[Outline, ...]:
        return tuple(outline_of(part, places) for part in values)

    if isinstance(value, Tensor):
        return Missing(places.setdefault(id(value), len(places)))
    cls = type(value)
    if cls in _SEQUENCES.values():
        return SequenceOutline(parts(value), _key_of(_SEQUENCES, cls))
    if cls in _MAPPINGS.values():
        return MappingOutline(parts(value.values()), _key_of(_MAPPINGS, cls), tuple(value))
    module, name = cls.__module__, cls.__qualname__
    found: Outline
    if _is_named_tuple(cls):
        found = NamedTuple(parts(value), module, name)
    elif cls in pytree.SUPPORTED_NODES:
        items, context = pytree.SUPPORTED_NODES[cls].flatten_fn(value)
        found = Node(parts(items), module, name, context)
    elif dataclasses.is_dataclass(cls) or (not isinstance(value, type) and is_plain(cls)):
        names = _fields(cls) if dataclasses.is_dataclass(cls) else attributes_of(value)
        found = Record(parts(getattr(value, n) for n in names), module, name, names)
    else:
        return Plain(value)
    found.check()
    return found


def outline_of_spec(spec: pytree.TreeSpec) -> Outline:
    """The outline of a pytree structure, every leaf a missing tensor."""
    return outline_of(pytree.tree_unflatten([torch.empty(0) for _ in range(spec.num_leaves)], spec))


def _class(module: str, name: str) -> Any:
    """The class of this name. Raises TypeError if it is not at hand."""
    if module.partition(".")[0] in _IMPORTED_FOR_FILES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TypeError(f"the model's outputs need the class {name} of {module}, which is not here") from error
    if module not in sys.modules:
        raise TypeError(f"the model's inputs or outputs need the class {name} of {module}: import that module first")
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = vars(found).get(part)
        if found is None:
            break
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, name):
        raise TypeError(f"{module} defines no class {name} by which an output could be rebuilt")
    return found


def _fields(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cast(Any, cls)))


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _key_of(table: Mapping[str, type], cls: type) -> str:
    return next(key for key, value in table.items() if value is cls)
