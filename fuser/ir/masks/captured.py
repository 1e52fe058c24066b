"""What a function reads besides its arguments, as a value that changes when what is read changes."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import sys
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, type(Ellipsis), types.CodeType)
# What libraries read of themselves is theirs, and does not change.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy"})


def captured(function: Any) -> Hashable:
    """What decides the answers of ``function`` besides its arguments.

    Closures, defaults, globals that its code names, bound objects, what ``functools.partial`` binds, and the same of
    the functions that it calls. Tensors, arrays, numbers, strings and containers count by content, attributes of
    objects where the code names them, and everything else by identity. Tensors are read again only when their version
    counter has moved, so writes through ``tensor.data`` or NumPy are not seen; neither is what is looked up by a
    computed name.
    """
    names: frozenset[str] = frozenset()
    while True:
        walk = _Walk(names)
        found = walk.describe(function)
        if walk.objects == 0 or walk.named <= names:
            return found
        # Code that was found on the way names attributes of objects before it.
        names |= walk.named


@dataclass(frozen=True, eq=False)
class _Same:
    """Stands for ``value`` itself, and keeps it alive so that its identity stays its own."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Walk:
    """One walk. Of objects it looks at the attributes in ``names``; ``named`` are those that the code it met names."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names, self.named, self.objects = names, set[str](), 0
        # With the values, so that none is freed and another found in its place.
        self._seen: dict[int, tuple[int, Any]] = {}

    def describe(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, float):
            # NaN is not equal to itself, and 0.0 is equal to -0.0.
            return float, value.hex()
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return _array(np.asarray(value))
        if id(value) in self._seen:
            return "seen", self._seen[id(value)][0]
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, (list, tuple)):
            return type(value), *map(self.describe, value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(map(self.describe, value))
        if isinstance(value, dict):
            return dict, *((self.describe(key), self.describe(item)) for key, item in value.items())
        if isinstance(value, functools.partial):
            return functools.partial, *map(self.describe, (value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return types.MethodType, self.describe(value.__func__), self.describe(value.__self__)
        if _of_a_library(value):
            return _Same(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _function(self, function: types.FunctionType) -> Hashable:
        code = function.__code__
        self.named |= _names(code)
        read = [(name, function.__globals__[name]) for name in sorted(_names(code)) if name in function.__globals__]
        parts = (function.__defaults__, function.__kwdefaults__, *_cells(function), *read)
        return code, *map(self.describe, parts)

    def _object(self, value: Any) -> Hashable:
        """An object by the attributes that the code names, its own and its class's, and by how it is called."""
        self.objects += 1
        names = sorted({"__call__", *self.names})
        found = [(name, attribute) for name in names for attribute in _attribute(value, name)]
        return _Same(value), *map(self.describe, found)


def _attribute(value: Any, name: str) -> Iterator[Any]:
    """The attribute without running a descriptor: none, or one."""
    places = [getattr(value, "__dict__", {})]
    if isinstance(value, torch.nn.Module):
        places += [value._parameters, value._buffers, value._modules]
    classes = value.__mro__ if isinstance(value, type) else type(value).__mro__
    places += [vars(cls) for cls in classes if not _of_a_library(cls)]
    for place in places:
        if name in place:
            found = place[name]
            found = getattr(found, "__func__", found)  # of classmethod and staticmethod
            yield found.fget if isinstance(found, property) else found
            return


def _of_a_library(value: Any) -> bool:
    """Whether a module, class or function is; an object of a library's class may hold anything."""
    if isinstance(value, types.ModuleType):
        module = value.__name__
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        module = value.__module__ or "builtins"
    else:
        return False
    return module.partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that code names, also in the functions that it defines."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield "empty"


def _array(array: np.ndarray[Any, Any]) -> Hashable:
    if array.dtype.hasobject:
        return _Same(array)
    return "array", array.shape, array.dtype.str, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


_digests: Any = WeakIdKeyDictionary()


def _tensor(tensor: torch.Tensor) -> Hashable:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return _Same(tensor)
    shape = (tuple(tensor.shape), tensor.dtype, str(tensor.device))
    # Inference tensors have no version counter.
    stamp = None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.stride(), *shape)
    kept = _digests.get(tensor)
    if kept is None or stamp is None or kept[0] != stamp:
        # An export traces all that its thread runs, and this is not part of the model.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            kept = _digests[tensor] = stamp, pool.submit(_digest, tensor).result()
    return "tensor", *shape, kept[1]


def _digest(tensor: torch.Tensor) -> bytes:
    with torch.no_grad():
        whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return hashlib.sha256(whole.view(torch.uint8).numpy().data).digest()
