"""Run-time sizes of kernels: frozen dataclasses in Python, structs of 64-bit fields in C++ and CUDA."""

from __future__ import annotations

import dataclasses
import functools
import operator
import struct
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extents:
    """Base of what a kernel is told at run time besides addresses: one frozen dataclass for each kernel.

    A field is an ``int`` (``int64_t``), a ``float`` (``double``), other extents (a struct), or a tuple of one of these
    (an array). Tuples whose annotation leaves the length open, ``tuple[int, ...]``, get theirs from the kernel's
    parameters: :meth:`declaration` takes it by the field's name. An array of no elements is left out of the struct.
    """

    def words(self) -> Iterator[int | float]:
        """The numbers in the order of the struct."""
        numbers: list[int | float] = []
        self._append(numbers, [])
        return iter(numbers)

    def pack(self) -> bytes:
        """The struct as it lies in memory. Raises struct.error for a number of the wrong type or beyond 64 bits."""
        cls: Any = type(self)
        if (flat := _flat(cls)) is not None:
            layout, read = flat
            return layout.pack(*read(self))
        numbers, formats = list[int | float](), ["="]
        self._append(numbers, formats)
        return struct.pack("".join(formats), *numbers)

    def _append(self, numbers: list[int | float], formats: list[str]) -> None:
        cls: Any = type(self)
        for name, (kind, count) in _fields(cls).items():
            value = getattr(self, name)
            items = (value,) if count is None else value
            if kind in _FORMATS:
                numbers.extend(items)
                formats.append(_FORMATS[kind] * len(items))
            else:
                for item in items:
                    item._append(numbers, formats)

    @classmethod
    def declaration(cls, **lengths: int) -> str:
        """The struct in C, named as the class, after those that it contains; ``lengths`` are those of its open tuples.

        Raises ValueError unless there is exactly one length for each of these.
        """
        hashable: Any = cls
        fields = _fields(hashable)
        if missing := lengths.keys() ^ {name for name, (_, count) in fields.items() if count is _OPEN}:
            raise ValueError(f"lengths of {cls.__name__} that are missing or not asked for: {', '.join(missing)}")
        parts = dict.fromkeys(kind.declaration() for kind, _ in fields.values() if issubclass(kind, Extents))
        lines = []
        for name, (kind, count) in fields.items():
            count = lengths.get(name, count)
            if count != 0:
                lines.append(f"  {_C_TYPES.get(kind, kind.__name__)} {name}{'' if count is None else f'[{count}]'};\n")
        return "".join([*parts, f"struct {cls.__name__} {{\n", *lines, "};\n"])


_FORMATS = {int: "q", float: "d"}
_C_TYPES = {int: "int64_t", float: "double"}
_OPEN = -1


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[type, int | None]]:
    """Every field's type, and its length where it is a tuple of some: ``_OPEN`` where the annotation has none."""
    hints = typing.get_type_hints(cls)
    return {field.name: _parsed(cls, field.name, hints[field.name]) for field in dataclasses.fields(cls)}


@functools.cache
def _flat(cls: Any) -> tuple[struct.Struct, Callable[[Any], tuple[int | float, ...]]] | None:
    """The layout of a struct without arrays and the numbers in it, which packs some ten times faster."""

    def leaves(cls: Any, path: str) -> Iterator[tuple[str, str]]:
        for name, (kind, count) in _fields(cls).items():
            if count is not None:
                raise LookupError
            yield from [(path + name, _FORMATS[kind])] if kind in _FORMATS else leaves(kind, f"{path}{name}.")

    try:
        names, formats = zip(*leaves(cls, ""), strict=True)
    except (LookupError, ValueError):
        return None
    read: Any = operator.attrgetter(*names)
    return struct.Struct("=" + "".join(formats)), read if len(names) > 1 else lambda value: (read(value),)


def _parsed(cls: type[Extents], name: str, hint: Any) -> tuple[type, int | None]:
    kinds, count = (hint,), None
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        count = _OPEN if kinds[-1] is Ellipsis else len(kinds)
    kind = kinds[0]
    known = isinstance(kind, type) and (kind in _FORMATS or issubclass(kind, Extents))
    if not known or any(other not in (kind, Ellipsis) for other in kinds):
        raise TypeError(f"{cls.__name__}.{name} has no place in a struct: {hint}")
    return kind, count
