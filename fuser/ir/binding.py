"""Putting numbers in the place of named sizes, anywhere in a tree of frozen dataclasses and tuples.

:class:`Binder` compiles a tree once into a Python function, in which equal parts are made once and parts without sizes
are shared with the tree, so that binding a plan of a hundred steps takes less than a millisecond.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fuser.ir.size import Maximum, Name, Quotient, Result, Size, called, maximum, result

Tree = TypeVar("Tree")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Late:
    """Stands for what ``function`` of the bound ``arguments`` is: any value that is made when sizes are known."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return called(self.function, self.arguments)


@dataclass(frozen=True)
class Condition:
    """What must be true of named sizes: that two formulas compare so, or that all or some of other conditions hold."""

    kind: typing.Literal["==", "!=", "<", "<=", "all", "any"]
    parts: tuple[Any, ...]

    @functools.cached_property
    def _formulas(self) -> Binder[tuple[int, ...]]:
        return Binder(self.parts)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true of these sizes by name."""
        if self.kind in _OF_CONDITIONS:
            return _OF_CONDITIONS[self.kind](part.holds(sizes) for part in self.parts)
        return bool(_COMPARISONS[self.kind](*self._formulas(sizes)))

    def __str__(self) -> str:
        return f" {'and' if self.kind == 'all' else 'or' if self.kind == 'any' else self.kind} ".join(
            f"({part})" if isinstance(part, Condition) else str(part) for part in self.parts
        )


_OF_CONDITIONS: Mapping[str, Callable[..., bool]] = {"all": all, "any": any}
_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
}


class Binder(Generic[Tree]):
    """``tree`` with numbers for its named sizes: ``binder({"batch": 2, "sequence": 128})``.

    The tree is made of frozen dataclasses, tuples, lists and dicts; anything else in it is taken as it is. Classes that
    check themselves when they are made (``__post_init__``) are made anew, others are filled in. ``names`` are the sizes
    that it needs, by name.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.names: dict[str, Name] = {}
        self._lines: list[str] = []
        self._objects: list[Any] = []
        self._known: dict[Any, str] = {}
        self._seen: dict[int, tuple[Any, str | None]] = {}
        found = self._visit(tree)
        self._function: Callable[..., Tree] | None = None
        if found is not None:
            self._function = self._compiled(found)

    def __call__(self, sizes: Mapping[str, int]) -> Tree:
        """Raises ValueError for a size that is missing or outside its range; sizes that the tree lacks are ignored."""
        if self._function is None:
            return self.tree
        for name, size in self.names.items():
            if name not in sizes:
                raise ValueError(f"the size {name!r} is missing")
            value = sizes[name]
            if value < size.low or (size.high is not None and value > size.high):
                end = "" if size.high is None else f" to {size.high}"
                raise ValueError(f"the size {name!r} is from {size.low}{end or ' on'} here, not {value}")
        return self._function(*(sizes[name] for name in self.names))

    @property
    def is_constant(self) -> bool:
        """Whether nothing in the tree is made when sizes are known."""
        return self._function is None

    def renamed(self, sizes: Mapping[str, int]) -> Tree:
        """The tree with other formulas, or numbers, for its named sizes, of whatever range."""
        return self.tree if self._function is None else self._function(*(sizes[name] for name in self.names))

    # ---- compiling

    def _compiled(self, found: str) -> Callable[..., Tree]:
        # Nothing of a model is in the text: numbers, names of fields, and variables of this class's making.
        parameters = ", ".join(f"s{i}" for i in range(len(self.names)))
        made = [f"def bind({parameters}):", *self._lines, f" return {found}"]
        objects = ", ".join(["filled", *(f"c{i}" for i in range(len(self._objects)))])
        text = "\n".join([f"def make({objects}):", *(f" {line}" for line in made), " return bind"])
        scope: dict[str, Any] = {}
        exec(compile(text, "<sizes>", "exec"), scope)
        function: Callable[..., Tree] = scope["make"](_filled, *self._objects)
        return function

    def _visit(self, value: Any) -> str | None:
        """What to write for ``value``: a variable, or None if nothing in it depends on sizes."""
        if isinstance(value, (str, bytes, int, float, type(None), type)) and not isinstance(value, Size):
            return None
        if isinstance(value, Size):
            return self._once(value, lambda: self._size(value))
        known = self._seen.get(id(value))
        if known is None:
            # The value is kept, so that nothing else gets its identity.
            known = self._seen[id(value)] = (value, self._container(value))
        return known[1]

    def _container(self, value: Any) -> str | None:
        if isinstance(value, Late):
            arguments = ", ".join(map(self._written, value.arguments))
            return self._variable(f"{self._object(value.function)}({arguments})")
        # Lists of the arguments of graphs are of a class of their own.
        if type(value) is tuple or isinstance(value, list):
            parts = [self._visit(item) for item in value]
            if all(part is None for part in parts):
                return None
            items = ", ".join(part or self._object(item) for part, item in zip(parts, value, strict=True))
            return self._variable(f"[{items}]" if isinstance(value, list) else f"({items},)")
        if isinstance(value, Mapping):
            parts = [self._visit(item) for item in value.values()]
            if all(part is None for part in parts):
                return None
            pairs = (
                f"{self._object(k)}: {p or self._object(v)}" for (k, v), p in zip(value.items(), parts, strict=True)
            )
            return self._variable(f"{{{', '.join(pairs)}}}")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        return None

    def _dataclass(self, value: Any) -> str | None:
        fields = [field.name for field in dataclasses.fields(value)]
        parts = {name: self._visit(getattr(value, name)) for name in fields}
        if all(part is None for part in parts.values()):
            return None
        written = {name: part or self._object(getattr(value, name)) for name, part in parts.items()}
        kind = self._object(type(value))
        if hasattr(value, "__post_init__") or not hasattr(value, "__dict__"):
            return self._variable(f"{kind}({', '.join(f'{name}={part}' for name, part in written.items())})")
        return self._variable(f"filled({kind}, {{{', '.join(f'{name!r}: {part}' for name, part in written.items())}}})")

    def _written(self, value: Any) -> str:
        found = self._visit(value)
        return self._object(value) if found is None else found

    def _size(self, size: Size) -> str:
        terms = []
        for monomial, count in size.terms:
            factors = [self._atom(atom) for atom in monomial]
            terms.append(" * ".join([*([str(count)] if count != 1 or not factors else []), *factors]))
        return self._variable(" + ".join(terms))

    def _atom(self, atom: Any) -> str:
        if isinstance(atom, Name):
            self.names.setdefault(atom.name, atom)
            return f"s{list(self.names).index(atom.name)}"
        if isinstance(atom, Quotient):
            return self._variable(f"{self._number(atom.numerator)} // {self._number(atom.denominator)}")
        if isinstance(atom, Maximum):
            return self._variable(f"max({', '.join(map(self._number, atom.sizes))})")
        assert isinstance(atom, Result)
        return self._variable(f"{self._object(atom.function)}({', '.join(map(self._written, atom.arguments))})")

    def _number(self, size: int) -> str:
        return self._written(size) if isinstance(size, Size) else f"({size})"

    def _variable(self, expression: str) -> str:
        """A variable that holds the expression; the same for the same expression."""

        def write() -> str:
            name = f"v{len(self._lines)}"
            self._lines.append(f" {name} = {expression}")
            return name

        return self._once(expression, write)

    def _once(self, key: Any, write: Callable[[], str]) -> str:
        if key not in self._known:
            self._known[key] = write()
        return self._known[key]

    def _object(self, value: Any) -> str:
        """The name of a value that is used as it is; equal values of one type get one, where they can be compared."""
        key = _identity(value)
        if key not in self._known:
            self._known[key] = f"c{len(self._objects)}"
            self._objects.append(value)
        return self._known[key]


class _Partial(Binder[Tree]):
    """A binder to formulas: what stands for the results of functions still does so where arguments have names."""

    def _container(self, value: Any) -> str | None:
        if isinstance(value, Late):
            arguments = ", ".join(map(self._written, (value.function, *value.arguments)))
            return self._variable(f"{self._object(_applied)}({arguments})")
        return super()._container(value)

    def _atom(self, atom: Any) -> str:
        if isinstance(atom, Maximum):
            return self._variable(f"{self._object(maximum)}([{', '.join(map(self._number, atom.sizes))}])")
        if isinstance(atom, Result):
            arguments = ", ".join(map(self._written, (atom.function, *atom.arguments)))
            return self._variable(f"{self._object(_resulting)}({arguments})")
        return super()._atom(atom)


def _applied(function: Callable[..., Any], *arguments: Any) -> Any:
    return Late(function, arguments) if Binder(arguments).names else function(*arguments)


def _resulting(function: Callable[..., int], *arguments: Any) -> int:
    return result(function, *arguments) if Binder(arguments).names else function(*arguments)


def partly_bound(tree: Tree, sizes: Mapping[str, int]) -> Tree:
    """``tree`` with numbers for some of its named sizes."""
    binder = _Partial(tree)
    return binder.renamed({name: sizes.get(name, Size({(size,): 1})) for name, size in binder.names.items()})


def _filled(kind: type[Any], fields: dict[str, Any]) -> Any:
    # A frozen dataclass sets its fields one by one, which would take most of the time that binding takes.
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made


def _identity(value: Any) -> Any:
    """A key that is equal for values that may stand for each other: alike in structure, types included."""
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_identity, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(_identity(getattr(value, field.name)) for field in dataclasses.fields(value)))
    if isinstance(value, (str, bytes, int, float, type(None))):
        return (type(value), value)
    return ("object", id(value))


def late_fields(function: Callable[..., Made], kind: type[Made], *arguments: Any) -> Made:
    """``function(*arguments)``, a dataclass ``kind``; where sizes of the arguments are known late, one whose fields
    are: integers as sizes, others as :class:`Late`."""
    if not Binder(arguments).names:
        return function(*arguments)
    made = Late(function, arguments)
    hints = typing.get_type_hints(kind)
    fields = {
        field.name: (result if hints[field.name] is int else _late)(Field(field.name), made)
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    return kind(**fields)


def _late(function: Callable[..., Any], *arguments: Any) -> Any:
    return Late(function, arguments)


@dataclass(frozen=True)
class Field:
    """Gives one field of a value."""

    name: str

    def __call__(self, value: Any) -> Any:
        return getattr(value, self.name)

    def __str__(self) -> str:
        return self.name


def bound(tree: Tree, sizes: Mapping[str, int]) -> Tree:
    """``tree`` with numbers for its named sizes, once; see :class:`Binder`."""
    return Binder(tree)(sizes)
