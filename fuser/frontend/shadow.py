"""A model's shadow: the same tensors in other Python objects, for code that may change whatever it runs in.

``torch.export`` puts stand-ins in the place of parameters while it traces, and the code that it traces may set
attributes, install hooks and fill caches. In a shadow none of that reaches the model, which other threads may use and
processes may fork meanwhile.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser.frontend.packed_linear import stand_in
from fuser.ir.errors import CaptureError

_CONTAINERS = (dict, list, set, collections.deque)
_KINDS = (collections.OrderedDict, collections.defaultdict, *_CONTAINERS)
_FOREIGN = frozenset({"torch", "fuser", "builtins", "numpy"})
"""Packages whose plain objects are shared: they hold no state of a model."""


class Shadow:
    """A copy of ``model`` and of the Python objects that it consists of, over the same parameters and buffers.

    Copied are modules, containers, plain objects, bound methods, partial functions, functions with what they enclose,
    and ``lru_cache`` (empty). For packed layers there is what stands for them (:mod:`fuser.frontend.packed_linear`).
    Tensors that no module has registered are cloned, since writes to them happen for good even in a trace. Everything
    else (files, locks, objects with a protocol of their own for copies) is shared. ``module`` is the copy of ``model``.

    Raises CaptureError for structures nested too deeply to copy.
    """

    module: nn.Module

    def __init__(self, model: nn.Module) -> None:
        self._memo: dict[int, Any] = {}
        self._pairs: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, Tensor, int]] = []
        self._originals: dict[int, Any] = {}
        self._parameters: list[nn.Parameter] = []
        self._caches: list[Any] = []
        self._registered = set(map(id, [*model.parameters(), *model.buffers()]))
        try:
            self.module = self._copy(model, "")
        except RecursionError:
            raise CaptureError("the model's attributes are nested too deeply") from None

    def original(self, value: Any) -> Any:
        """What a copy stands for; anything else is itself."""
        return self._originals.get(id(value), value)

    def original_tensor(self, tensor: Tensor) -> Tensor:
        """The model's tensor that a constant of a trace is, or is a view of the whole of."""
        return self._by_place.get(_place(tensor), tensor)

    @functools.cached_property
    def _by_place(self) -> dict[tuple[Any, ...], Tensor]:
        found = {_place(copy): original for _, original, copy, _ in self._tensors if type(copy) is Tensor}
        # Of a parameter that no module has registered, a constant is a view that shares no version counter with it.
        found.update((_place(parameter), parameter) for parameter in self._parameters)
        return found

    def settle(self) -> None:
        """Take the parameters and buffers that are in place now for the model's, as the export has set them."""
        for path, original, copy in self._pairs:
            if path.rpartition(".")[2] in ("_parameters", "_buffers") and isinstance(original, dict):
                self._memo.update((id(original[key]), copy[key]) for key in original if original[key] is not None)

    def empty_caches(self) -> None:
        """Let go of what ``lru_cache`` has kept in here."""
        for cache in self._caches:
            cache.cache_clear()

    def written(self) -> str:
        """The name of a tensor of which the copy was written; empty if none was."""
        return next((path for path, _, copy, version in self._tensors if copy._version != version), "")

    def changed(self) -> tuple[str, bool]:
        """The name of something that was set, added or removed since the shadow was made, and whether tensors are
        among what changed; empty if nothing did."""
        name, tensors = "", False
        for path, original, copy in self._pairs:
            for key, before, after in _differences(original, copy):
                if after is not _MISSING and before is not _MISSING and self._stands_for(before, after):
                    continue
                name = name or _join(path, key)
                tensors = tensors or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(after))
        return name, tensors

    def _stands_for(self, before: Any, after: Any) -> bool:
        expected = self._memo.get(id(before), before)
        if after is expected:
            return True
        if type(after) is not type(expected):
            return False
        if isinstance(after, _COMPARED):
            return bool(after == expected)
        # The export puts equal containers back in the place of those that it found.
        if type(after) in (list, tuple):
            return len(after) == len(before) and all(map(self._stands_for, before, after))
        if type(after) is dict:
            return list(after) == list(before) and all(map(self._stands_for, before.values(), after.values()))
        return False

    # ---- copying

    def _copy(self, value: Any, path: str) -> Any:
        cls = type(value)
        if cls in _ATOMIC:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Tensor):
            return self._copy_tensor(value, path)
        if isinstance(value, torch.jit.ScriptModule):
            return value
        if isinstance(value, nn.Module):
            unpacked = stand_in(value)
            return (
                self._copy_object(value, path)
                if unpacked is None
                else self._immutable(value, self._copy(unpacked, path))
            )
        if isinstance(value, _CONTAINERS):
            return self._copy_container(value, path)
        if isinstance(value, tuple):
            return self._copy_tuple(value, path)
        if isinstance(value, types.FunctionType):
            return self._copy_function(value, path)
        if cls is types.MethodType:
            return self._immutable(
                value, types.MethodType(self._copy(value.__func__, path), self._copy(value.__self__, path))
            )
        if cls is functools.partial:
            parts = self._copy((value.func, value.args, dict(value.keywords)), path)
            return self._immutable(value, functools.partial(parts[0], *parts[1], **parts[2]))
        if isinstance(value, functools._lru_cache_wrapper):
            emptied = functools.lru_cache(**value.cache_parameters())(self._copy(value.__wrapped__, path))
            self._caches.append(emptied)
            return self._immutable(value, functools.update_wrapper(emptied, value))
        if is_plain(cls):
            return self._copy_object(value, path)
        return value

    def _immutable(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        self._originals[id(copied)] = value
        return copied

    def _remember(self, value: Any, copied: Any, path: str) -> None:
        self._immutable(value, copied)
        self._pairs.append((path, value, copied))

    def _copy_tensor(self, value: Tensor, path: str) -> Tensor:
        if isinstance(value, nn.Parameter) and id(value) not in self._registered:
            self._parameters.append(value)
        if id(value) in self._registered or type(value) is not Tensor:
            return value
        with torch.no_grad():
            cloned = value.detach().clone()
        self._tensors.append((path, value, cloned, cloned._version))
        result: Tensor = self._immutable(value, cloned)
        return result

    def _copy_object(self, value: Any, path: str) -> Any:
        try:
            copied = object.__new__(type(value))
        except TypeError:
            # Its class has state outside of Python.
            return value
        self._remember(value, copied, path)
        if hasattr(value, "__dict__"):
            attributes = {key: self._copy(item, _join(path, key)) for key, item in vars(value).items()}
            vars(copied).update(attributes)
        for name in slots_of(type(value)):
            if hasattr(value, name):
                object.__setattr__(copied, name, self._copy(getattr(value, name), _join(path, name)))
        return copied

    def _copy_container(self, value: Any, path: str) -> Any:
        kind: Any = next(k for k in _KINDS if isinstance(value, k))
        copied = kind.__new__(type(value))
        if kind is collections.deque:
            collections.deque.__init__(copied, (), value.maxlen)
        elif kind is collections.defaultdict:
            copied.default_factory = self._copy(value.default_factory, path)
        self._remember(value, copied, path)
        if issubclass(kind, dict):
            inner = path.rpartition(".")[0] if path.rpartition(".")[2] in _MEMBERS else path
            for key, item in kind.items(value):
                kind.__setitem__(copied, key, self._copy(item, _join(inner, key)))
        elif kind is set:
            copied.update(self._copy(item, path) for item in set.__iter__(value))
        else:
            kind.extend(copied, [self._copy(item, path) for item in kind.__iter__(value)])
        if hasattr(value, "__dict__"):
            vars(copied).update({key: self._copy(item, _join(path, key)) for key, item in vars(value).items()})
        return copied

    def _copy_tuple(self, value: tuple[Any, ...], path: str) -> Any:
        items = [self._copy(item, path) for item in value]
        if all(map(_is, items, value)):
            return value
        if type(value) is tuple:
            return self._immutable(value, tuple(items))
        return self._immutable(value, value._make(items)) if hasattr(value, "_make") else value

    def _copy_function(self, value: types.FunctionType, path: str) -> Any:
        if not value.__closure__ and not value.__defaults__ and not value.__kwdefaults__ and not value.__dict__:
            return value
        copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, self._cells(value))
        # Known before its parts are copied: a function may enclose itself.
        self._immutable(value, copied)
        for cell in value.__closure__ or ():
            self._fill(cell, path)
        copied.__defaults__ = self._copy(value.__defaults__, path)
        copied.__kwdefaults__ = self._copy(value.__kwdefaults__, path)
        functools.update_wrapper(copied, value, updated=())
        copied.__dict__.update({key: self._copy(item, path) for key, item in vars(value).items()})
        return copied

    def _cells(self, function: types.FunctionType) -> tuple[types.CellType, ...]:
        for cell in function.__closure__ or ():
            if id(cell) not in self._memo:
                self._remember(cell, types.CellType(), "")
        return tuple(self._memo[id(cell)] for cell in function.__closure__ or ())

    def _fill(self, cell: types.CellType, path: str) -> None:
        copied = self._memo[id(cell)]
        content = _content(cell)
        if content is not _MISSING and _content(copied) is _MISSING:
            copied.cell_contents = self._copy(content, path)


_MISSING = object()
_MEMBERS = frozenset({"_modules", "_parameters", "_buffers"})
_COMPARED = (bool, int, float, complex, str, bytes, frozenset, types.MethodType)
_ATOMIC = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type, range, torch.dtype, torch.device, torch.layout,
        torch.memory_format, torch.Size, types.BuiltinFunctionType, types.ModuleType, types.CodeType,
    }
)  # fmt: skip


def _is(a: Any, b: Any) -> bool:
    return a is b


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path and key != "" else path or str(key)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def is_plain(cls: type) -> bool:
    """Whether objects of a class are their attributes and nothing else."""
    if cls.__module__.partition(".")[0] in _FOREIGN or hasattr(cls, "__del__"):
        return False
    own = [vars(base) for base in cls.__mro__[:-1]]
    special = ("__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__deepcopy__", "__getnewargs__")
    if any(name in members for members in own for name in special):
        return False
    return bool(cls.__dictoffset__) or bool(slots_of(cls))


def attributes_of(value: Any) -> tuple[str, ...]:
    """Names of what an object holds, in its dict and in slots."""
    names = tuple(vars(value)) if hasattr(value, "__dict__") else ()
    return names + tuple(name for name in slots_of(type(value)) if hasattr(value, name))


_slots: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def slots_of(cls: type) -> tuple[str, ...]:
    """Names of what objects of a class hold outside of their dict."""
    if (known := _slots.get(cls)) is not None:
        return known
    found: list[str] = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    _slots[cls] = names = tuple(name for name in found if name not in ("__dict__", "__weakref__"))
    return names


def _differences(original: Any, copied: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(key, value in the original, value in the copy) for everything that the two may differ in."""
    if isinstance(original, types.CellType):
        yield "a variable of a closure", _content(original), _content(copied)
        return
    if isinstance(original, dict):
        yield from _by_key(dict(dict.items(original)), dict(dict.items(copied)))
    elif isinstance(original, set):
        yield "", len(original), len(copied)
    elif isinstance(original, (list, collections.deque)):
        old, new = list(original), list(copied)
        yield from ((i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=False)))
        for item in old[len(new) :]:
            yield "", item, _MISSING
        for item in new[len(old) :]:
            yield "", _MISSING, item
    if hasattr(original, "__dict__"):
        yield from _by_key(vars(original), vars(copied))
    for name in slots_of(type(original)):
        yield name, getattr(original, name, _MISSING), getattr(copied, name, _MISSING)


def _by_key(old: dict[Any, Any], new: dict[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    for key, value in old.items():
        yield key, value, new.get(key, _MISSING)
    for key, value in new.items():
        if key not in old:
            yield key, _MISSING, value


# ---- outside of the model


def forget(tensors: list[Tensor], model: nn.Module) -> None:
    """Take stand-ins that a trace left outside of its shadow out of caches: those of ``lru_cache``, which are emptied,
    and containers that the functions of the model's classes refer to by global names, closures or defaults."""
    gone = set(map(id, tensors))
    for holder in _holders(model):
        if isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif isinstance(holder, dict):
            for key in [key for key, item in holder.items() if _holds(item, gone)]:
                del holder[key]
        elif isinstance(holder, set):
            holder -= {item for item in holder if _holds(item, gone)}
        elif any(_holds(item, gone) for item in holder):
            kept = [item for item in holder if not _holds(item, gone)]
            holder.clear()
            holder.extend(kept)


def _holds(item: Any, gone: set[int]) -> bool:
    return id(item) in gone or (type(item) in (tuple, list) and any(_holds(inner, gone) for inner in item))


def _holders(model: nn.Module) -> Iterator[Any]:
    """Caches and containers that functions of a model's classes, and functions that these name, refer to."""
    seen: set[int] = set()
    for function in functions_of(model):
        values = [function.__globals__.get(name) for name in names_in(function.__code__)]
        values += [_content(cell) for cell in function.__closure__ or ()]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in values:
            if id(value) not in seen and type(value) in (dict, list, set, collections.deque, _LRU):
                seen.add(id(value))
                yield value


_LRU = functools._lru_cache_wrapper


def functions_of(model: nn.Module) -> list[types.FunctionType]:
    """The Python functions that the model's own code can run: methods of its modules' classes, their hooks, and
    functions of the same packages that they name, all outside of PyTorch."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if not _of_torch(base.__module__)}
    stack: list[Any] = [member for cls in classes for member in vars(cls).values()]
    stack += [member for module in model.modules() for member in vars(module).values() if callable(member)]
    hooks = [vars(module).get(kind) for module in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    stack += [hook for of_module in hooks for hook in (of_module or {}).values()]
    found: dict[int, types.FunctionType] = {}
    while stack:
        member = stack.pop()
        for function in _functions_in(member):
            if id(function) in found or _of_torch(function.__module__):
                continue
            found[id(function)] = function
            package = (function.__module__ or "").partition(".")[0]
            for name in names_in(function.__code__):
                value = function.__globals__.get(name)
                if (getattr(value, "__module__", None) or "").partition(".")[0] == package:
                    stack.append(value)
            stack += [_content(cell) for cell in function.__closure__ or ()]
    return list(found.values())


def _functions_in(member: Any) -> Iterator[types.FunctionType]:
    if isinstance(member, property):
        members: list[Any] = [member.fget]
    elif isinstance(member, (functools.cached_property, functools.partial)):
        members = [member.func]
    else:
        members = [member]
    for function in members:
        function = getattr(function, "__func__", function)
        if isinstance(function, _LRU):
            function = function.__wrapped__
        if isinstance(function, types.FunctionType):
            yield function


def names_in(code: types.CodeType) -> Iterator[str]:
    """Global names and attributes that a function and those within it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _of_torch(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in ("torch", "builtins", "typing", "abc", "collections", "functools") or package in _STANDARD


_STANDARD = frozenset(sys.stdlib_module_names)
