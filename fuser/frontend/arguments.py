"""Arguments that are objects, such as key-value caches: taken apart into tensors, and changed as the model does."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuser.frontend.shadow import attributes_of, is_plain
from fuser.ir.errors import CaptureError

_VALUES = (
    torch.SymInt,
    *(bool, int, float, complex, str, bytes, type, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_PLAIN = frozenset({bool, int, str, torch.dtype, torch.device, type(None)})
_MISSING = object()


def is_value(value: Any) -> bool:
    """Whether this is one of the values that programs take for constants."""
    return value is None or isinstance(value, _VALUES)


_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_class_of_objects(cls: type) -> bool:
    known = _classes.get(cls)
    if known is None:
        other = issubclass(cls, (Tensor, type, dict, list, tuple, set, *_VALUES))
        other = other or any("__call__" in vars(base) for base in cls.__mro__)
        known = _classes[cls] = not other and (dataclasses.is_dataclass(cls) or is_plain(cls))
    return known


def is_object(value: Any) -> bool:
    """Whether this is an object that is its attributes and nothing else."""
    return _is_class_of_objects(type(value))


def has_objects(key: Sequence[Any]) -> bool:
    """Whether a call with this key has objects among its arguments."""
    return any(type(part) is tuple and isinstance(part[0], type) and _is_class_of_objects(part[0]) for part in key)


_SIZES = frozenset({"batch_size", "max_cache_len"})
"""Numbers of Hugging Face's caches of fixed length that are sizes of what they hold, or will hold."""
_counters: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_COUNTER_DIM = 4
"""Where the tensor that stands for a counter has it: in a dimension that keys and values have not."""


def counter(value: int, device: torch.device) -> Tensor:
    """A tensor without elements that stands for a number, so that captures take it for a size."""
    return torch.empty((0,) * _COUNTER_DIM + (value,), dtype=torch.uint8, device=device)


def learn_counters(objects: Sequence[Any], before: Sequence[dict[Any, Any]]) -> None:
    """Take attributes that have got other numbers than they held ``before`` for counters, such as the tokens that a
    cache has seen: calls that differ in those alone are then calls of other sizes."""
    for value, then in zip(objects, before, strict=True):
        if not is_object(value):
            continue
        for name in attributes_of(value):
            held, now = then.get(name), getattr(value, name)
            if type(held) is int and isinstance(now, (int, torch.SymInt)) and not _is_same(held, now):
                _counters[type(value)] = _counters.get(type(value), frozenset()) | {name}


@dataclass(frozen=True)
class Given:
    """Stands for the object number ``index`` of those that a call's arguments consist of."""

    index: int
    name: str = dataclasses.field(default="", compare=False)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Change:
    """That the object number ``index`` gets another value for the attribute or key ``name``, or, where it is a list,
    other items."""

    index: int
    name: Any = None


class Taken:
    """Objects of a call taken apart: their ``tensors`` in order, a ``key`` that is equal for objects alike in all but
    the contents of tensors, and every object and container that they consist of, each once. Counters are among the
    tensors; ``counted`` are the objects, by number, and attributes that hold them."""

    def __init__(self, place: Callable[[Tensor], Any], device: torch.device) -> None:
        """``place`` gives what the key says of a tensor; ``device`` is that of counters."""
        self.tensors: list[Tensor] = []
        self.key: list[Any] = []
        self.objects: list[Any] = []
        self.counted: set[tuple[int, str]] = set()
        self._device = device
        self._known: dict[int, int] = {}
        self._place = place

    def take(self, value: Any) -> None:
        """Raises CaptureError for an object that holds something else than tensors, plain values and such objects."""
        cls = type(value)
        if cls in _PLAIN:
            self.key.append((cls, value))
        elif isinstance(value, Tensor):
            self.tensors.append(value)
            self.key.append(self._place(value))
        elif cls is float:
            self.key.append((cls, value.hex()))
        elif id(value) in self._known:
            self.key.append((Given, self._known[id(value)]))
        elif cls is list or cls is tuple:
            self._add(value, len(value))
            for item in value:
                self.take(item)
        elif cls is dict:
            self._add(value, tuple(value))
            for item in value.values():
                self.take(item)
        elif _is_class_of_objects(cls):
            names = attributes_of(value)
            number = len(self.objects)
            self._add(value, names)
            counters = _counters.get(cls, frozenset()) | _SIZES
            for name in names:
                held = getattr(value, name)
                # PyTorch takes sizes of zero and one for numbers.
                if name in counters and type(held) is int and held > 1:
                    self.counted.add((number, name))
                    held = counter(held, self._device)
                self.take(held)
        elif is_value(value):
            self.key.append((cls, value))
        else:
            raise CaptureError(f"an argument holds a {cls.__name__}; pass tensors and plain Python values")

    def _add(self, value: Any, what: Any) -> None:
        self._known[id(value)] = len(self.objects)
        self.objects.append(value)
        self.key.append((type(value), what))


def rebuilt(objects: Sequence[Any], tensors: Iterator[Any], counted: Collection[tuple[int, str]] = ()) -> list[Any]:
    """Copies of the objects that a call's consist of, with these tensors and the numbers that those for the ``counted``
    attributes stand for, in the order of :class:`Taken`."""
    copies: list[Any] = []
    known: dict[int, Any] = {}
    reading = iter(objects)

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(tensors)
        if id(value) in known:
            return known[id(value)]
        if not is_object(value) and type(value) not in (list, tuple, dict):
            return value
        next(reading)
        place = len(copies)
        copies.append(None)
        if type(value) is tuple:
            made: Any = tuple(map(copy, value))
        elif is_object(value):
            made = known[id(value)] = object.__new__(type(value))
            for name in attributes_of(value):
                if (place, name) in counted:
                    held = next(tensors)
                    held = held.shape[_COUNTER_DIM] if isinstance(held, Tensor) else held
                else:
                    held = copy(getattr(value, name))
                object.__setattr__(made, name, held)
        else:
            made = known[id(value)] = type(value)()
            made.update((k, copy(v)) for k, v in value.items()) if isinstance(value, dict) else made.extend(
                map(copy, value)
            )
        known[id(value)] = copies[place] = made
        return made

    while len(copies) < len(objects):
        copy(objects[len(copies)])
    return copies


def state_of(objects: Sequence[Any]) -> list[dict[Any, Any]]:
    """What each of the objects holds, by attribute, key or position."""
    return [dict(_held(value)) for value in objects]


def _held(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    else:
        yield from ((name, getattr(value, name)) for name in attributes_of(value))


def changes(objects: Sequence[Any], before: Sequence[dict[Any, Any]]) -> tuple[tuple[Change, ...], list[Any]]:
    """How the objects differ from what they held ``before``, and the values that they have got.

    Raises CaptureError where something was removed from one."""
    found: list[Change] = []
    values: list[Any] = []
    for index, (value, then) in enumerate(zip(objects, before, strict=True)):
        now = dict(_held(value))
        different = [name for name, held in now.items() if not _is_same(then.get(name, _MISSING), held)]
        if isinstance(value, list):
            if different or len(now) != len(then):
                found.append(Change(index))
                values.append(tuple(value))
            continue
        if not then.keys() <= now.keys():
            raise CaptureError(f"the model removes parts of a {type(value).__name__} that it is given")
        found += [Change(index, name) for name in different]
        values += [now[name] for name in different]
    return tuple(found), values


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in (bool, int, float, str) and a == b)


def apply(found: Sequence[Change], values: Sequence[Any], objects: Sequence[Any]) -> None:
    """Make these changes to the objects."""
    for change, value in zip(found, values, strict=True):
        target = objects[change.index]
        if isinstance(target, list):
            target[:] = value
        elif isinstance(target, dict):
            target[change.name] = value
        else:
            object.__setattr__(target, change.name, value)


def values_of(found: Sequence[Change], objects: Sequence[Any]) -> list[Any]:
    """What the objects hold where these changes are."""
    held = [objects[change.index] for change in found]
    return [
        tuple(target)
        if isinstance(target, list)
        else target[change.name]
        if isinstance(target, dict)
        else getattr(target, change.name)
        for change, target in zip(found, held, strict=True)
    ]
