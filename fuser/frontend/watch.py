"""What a model's Python code reads besides the contents of tensors, and whether it has changed."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import enum
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fuser.frontend.shadow import functions_of, is_plain, names_in
from fuser.ir.errors import CaptureError
from fuser.runtime.locks import ForkSafeLock

_INTERNAL = frozenset(vars(nn.Module()))
_MOST_ENTRIES = 64
"""Containers with more are taken for data that nobody changes, such as vocabularies, and watched by their length."""
_MOST_CONFIGURATIONS = 64
"""Configurations that are told apart; an older one counts as new when it returns."""
_DEPTH = 2
"""How far plain objects in plain objects (a configuration in a configuration) are followed."""
_TRAINING = operator.itemgetter("training")
_COUNT = itertools.count()
"""Numbers for configurations. Those of a model that is looked at anew are none that it had before."""


def _numbers_of_identities(values: Iterable[Any]) -> Hashable:
    return tuple(map(id, values))


def _items_of_tuple(values: Iterable[Any]) -> Hashable:
    # A tuple of CPython's is its objects' addresses behind a header.
    found = tuple(values)
    return ctypes.string_at(id(found) + tuple.__basicsize__, len(found) * _ADDRESS)


def _fastest_identities() -> Callable[[Iterable[Any]], Hashable]:
    if sys.implementation.name != "cpython":
        return _numbers_of_identities
    values = (None, object(), _INTERNAL, _ADDRESS)
    addresses = b"".join(id(value).to_bytes(_ADDRESS, sys.byteorder) for value in values)
    return _items_of_tuple if _items_of_tuple(values) == addresses else _numbers_of_identities


_ADDRESS = ctypes.sizeof(ctypes.c_void_p)
_identities = _fastest_identities()
"""The identities of values, and how many there are: equal for the same values as long as all of them are kept."""


class GlobalNumbers:
    """Numbers, flags and texts in global variables that the functions of a model name."""

    def __init__(self, functions: Iterable[types.FunctionType]) -> None:
        names: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for function in functions:
            variables = function.__globals__
            read = {
                n
                for n in names_in(function.__code__)
                if n in variables and _is_number(variables[n]) and not n.startswith("__")
            }
            if read:
                names.setdefault(id(variables), (variables, set()))[1].update(read)
        self.read = [(variables, tuple(sorted(found))) for variables, found in names.values()]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo changes of these variables inside the context; raises CaptureError if there were any."""
        before = [{name: variables.get(name) for name in names} for variables, names in self.read]
        yield
        changed = ""
        for (variables, names), old in zip(self.read, before, strict=True):
            for name in names:
                if variables.get(name) is not old[name] and not _same(variables.get(name), old[name]):
                    variables[name], changed = old[name], name
        if changed:
            raise CaptureError(f"the model changes the global variable {changed} while it runs")


class Structure:
    """Of which modules and tensors a model consists and in which modes they are, compared by identity, and its
    *configuration*: what plain attributes, global variables and small containers hold.

    It is looked at in every call, so its loops are all the interpreter's own.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._modules = list(model.modules()) if model is not None else []
        # TorchScript's modules keep neither their mode nor their members in dicts.
        self._attributes = [attributes for attributes in map(vars, self._modules) if "training" in attributes]
        hooks = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
        members = [
            d
            for m in self._modules
            for d in (m._modules, m._parameters, m._buffers, m._forward_hooks, m._forward_pre_hooks)
            if isinstance(d, dict)
        ]
        members += hooks
        self._members: list[dict[Any, Any]] = [d for d in members if d]
        # What had no members or hooks may get some, such as adapters.
        self._empty = [d for d in members if not d]
        plain = [(m, key) for m in self._modules for key, value in vars(m).items() if isinstance(value, Tensor)]
        self._plain = [(vars(m), key) for m, key in plain]
        # Kept alive, so that no other tensor gets the identity of a former one.
        self._kept = list(self._look())
        self._seen = _identities(self._kept)
        self._configuration = _Configuration(model) if model is not None else None

    def _look(self) -> Iterator[Any]:
        return itertools.chain(
            itertools.chain.from_iterable(map(dict.values, self._members)),
            [attributes.get(key) for attributes, key in self._plain],
            map(type, self._modules),
            map(_TRAINING, self._attributes),
        )

    @property
    def changed(self) -> bool:
        """Whether the model consists of other modules or tensors, or runs in other modes."""
        return any(self._empty) or _identities(self._look()) != self._seen

    @property
    def configuration(self) -> int:
        """A number for what plain attributes hold now; equal numbers mean equal attributes."""
        return self._configuration.number if self._configuration is not None else 0


class _Configuration:
    """Plain values that decide what a model's code does, read from where they lie."""

    def __init__(self, model: nn.Module) -> None:
        self._containers: list[Any] = []
        holders = dict[int, tuple[Any, tuple[str, ...]]]()
        functions = functions_of(model)
        named = {name for function in functions for name in names_in(function.__code__)}
        for module in model.modules():
            self._collect(vars(module), holders, _watched(module, named))
        for cls in {base for module in model.modules() for base in type(module).__mro__}:
            if not _of_torch(cls) and (keys := _numbers_of(cls)):
                holders[id(cls)] = vars(cls), keys
        holders.update((id(variables), (variables, names)) for variables, names in GlobalNumbers(functions).read)
        self._holders = [(holder, keys) for holder, keys in holders.values() if keys]
        alike: dict[tuple[str, ...], list[Any]] = {}
        for holder, keys in self._holders:
            alike.setdefault(keys, []).append(holder)
        # A getter of one key would give the value itself instead of a tuple.
        self._readers = [(operator.itemgetter(*keys, keys[0]), found) for keys, found in alike.items()]
        self._sized = [holder for holder, _ in holders.values() if isinstance(holder, dict)] + self._containers
        self._numbers: collections.OrderedDict[Any, tuple[int, list[Any]]] = collections.OrderedDict()
        self._seen: tuple[Hashable, list[int], int] = ((), [-1], -1)
        self._lock = ForkSafeLock()

    def _collect(
        self, attributes: dict[str, Any], holders: dict[int, Any], keys: Collection[str], depth: int = 0
    ) -> None:
        holders[id(attributes)] = attributes, tuple(keys)
        stack = [attributes[key] for key in keys]
        while stack:
            value = stack.pop()
            if type(value) in (dict, list, set, tuple) and len(value) <= _MOST_ENTRIES:
                if type(value) is not tuple and not any(value is known for known in self._containers):
                    self._containers.append(value)
                stack += value.values() if isinstance(value, dict) else value
            elif (
                depth < _DEPTH
                and is_plain(type(value))
                and hasattr(value, "__dict__")
                and id(vars(value)) not in holders
            ):
                self._collect(vars(value), holders, tuple(vars(value)), depth + 1)

    def _read(self) -> Iterator[Any]:
        try:
            found: list[Any] = list(itertools.chain.from_iterable(map(reader, held) for reader, held in self._readers))
        except KeyError:
            # An attribute has gone.
            found = [tuple(map(holder.get, keys)) for holder, keys in self._holders]
        found += [c.values() if isinstance(c, dict) else c for c in self._containers]
        return itertools.chain.from_iterable(found)

    @property
    def number(self) -> int:
        known, sizes, number = self._seen
        if list(map(len, self._sized)) == sizes and _identities(self._read()) == known:
            return number
        with self._lock:
            # They are kept, so that no other object gets the identity of one of them.
            values, sizes = list(self._read()), list(map(len, self._sized))
            key = tuple(map(_frozen, values)), tuple(sizes)
            number, _ = self._numbers.pop(key) if key in self._numbers else (next(_COUNT), values)
            self._numbers[key] = number, values
            self._seen = _identities(values), sizes, number
            while len(self._numbers) > _MOST_CONFIGURATIONS:
                self._numbers.popitem(last=False)
        return number


def _numbers_of(cls: type) -> tuple[str, ...]:
    return tuple(key for key, value in vars(cls).items() if _is_number(value) and not key.startswith("__"))


def _watched(module: nn.Module, named: Collection[str]) -> tuple[str, ...]:
    """Attributes of a module that its code may read, but for tensors and modules. Of PyTorch's own modules these are
    what their classes read, and what others have added if the model's code uses its name, one of ``named``."""
    if isinstance(module, nn.modules.dropout._DropoutNd) and not module.training:
        return ()
    keys = [
        key
        for key, value in vars(module).items()
        if key not in _INTERNAL and not isinstance(value, (Tensor, nn.Module))
    ]
    if _of_torch(type(module)):
        cls: Any = type(module)
        read, own = _names_of(cls)
        keys = [key for key in keys if key in read or (key in named and key not in own and not key.startswith("_"))]
    return tuple(keys)


@functools.cache
def _names_of(cls: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names that the methods of one of PyTorch's own modules use when it runs, and all that any of them uses."""
    methods = [
        (name, member)
        for base in cls.__mro__
        if base not in (nn.Module, object)
        for name, member in vars(base).items()
        if isinstance(member, types.FunctionType)
    ]
    running = [m for name, m in methods if name not in ("__init__", "extra_repr", "reset_parameters")]
    read = frozenset(name for method in running for name in names_in(method.__code__))
    return read, read.union(name for _, method in methods for name in names_in(method.__code__))


def _of_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float, complex, str)) and not isinstance(value, enum.Enum))


def _same(a: Any, b: Any) -> bool:
    return bool(_frozen(a) == _frozen(b))


def _frozen(value: Any) -> Any:
    """Something that is equal for values that are the same to a program, and for other objects their identity."""
    if isinstance(value, float):
        return float, value.hex()
    if value is None or isinstance(value, (bool, int, complex, str, bytes)):
        return type(value), value
    if type(value) is tuple:
        return tuple(map(_frozen, value))
    return id(value)
