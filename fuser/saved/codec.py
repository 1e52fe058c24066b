"""Values of saved programs as JSON, and back: plain data of a closed list of types, never code.

``null``, booleans, integers and strings stand for themselves. An array is tagged by its first element, as in
``["tuple", 1, 2]`` or ``["operator", "aten::cat", "default"]``. Objects that several values share are written once:
``["sharing", [...], value]`` lists them, and ``["shared", 0]`` is the first of them. An object is a frozen dataclass of
ours, ``{"is": "ir.graph.Ref", "index": 0}``: its fields are checked against their annotations, so a value that has been
read is of the types that the rest of fuser relies on.
"""

from __future__ import annotations

import base64
import collections.abc
import dataclasses
import enum
import functools
import importlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fuser.ir.binding import Late
from fuser.ir.size import Size
from fuser.saved.outline import Outline, outline_of_spec

_ROOTS = (
    "ir",
    "kernels",
    "codegen.assemble",
    "codegen.memory",
    "frontend.building",
    "frontend.sizes",
    "runtime.program",
    "saved.content",
    "saved.outline",
)
"""Modules of fuser, and packages with all their modules, whose frozen dataclasses and enumerations may be saved."""
_FUNCTIONS = (
    "fuser.frontend.aten.elementwise._all_true",
    "fuser.frontend.aten.layout._evenly_spaced",
    "fuser.frontend.attention_masks._distances_of",
    "fuser.frontend.attention_masks._is_of_distances",
    "fuser.frontend.attention_masks._is_pattern",
    "fuser.frontend.attention_masks._late_pattern",
    "fuser.frontend.attention_masks._numbers",
    "fuser.frontend.attention_masks._pattern",
    "fuser.frontend.attention_masks._rows_allow",
    "fuser.frontend.building._is_still",
    "fuser.frontend.building._of_contents",
    "fuser.frontend.disentangled._are_by_distance",
    "fuser.frontend.disentangled._of_keys",
    "fuser.frontend.disentangled._of_queries",
    "fuser.frontend.views._strided_copy",
    "fuser.ir.operators.base.laid_out",
    "fuser.ir.packing._picked",
    "fuser.ir.quantization.found_rounding",
    "fuser.ir.quantization.packed_rounding",
    "fuser.ir.quantization.rounding_as_row",
    "fuser.ir.quantization.rounding_of",
    "fuser.kernels.attention.launch_of",
)
"""Functions of fuser that a step may call, or that make a part of a program when its sizes are known."""
_NAMESPACES = ("aten", "fuser")
_TYPES: dict[str, type] = {
    t.__name__: t
    for t in (bool, int, float, complex, str, tuple, list, dict, set, type(None), torch.dtype, torch.device)
}
_TORCH_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_ARRAY_KINDS = "biuf"
_SMALL = 1 << 16
"""Bytes of a tensor that is written with what is computed from it; weights are written apart."""
Encode = Callable[[Any], Any]
Decode = Callable[[Any], Any]


def dump(value: Any) -> bytes:
    """``value`` as JSON text. Raises TypeError for what is not plain data."""
    known: dict[int, list[Any]] = {}
    whole = _encode(value, known)
    # What is written for objects that occur more than once, inner ones first, as they were finished.
    places = {id(text): i for i, text in enumerate(text for text, times, _ in known.values() if times > 1)}
    if places:
        shared = [_referring(text, places, whole=True) for text, times, _ in known.values() if times > 1]
        whole = ["sharing", shared, _referring(whole, places)]
    return json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()


def load(content: bytes) -> Any:
    """The value of a text that :func:`dump` made. Raises ValueError, TypeError or another error for any other text, and
    runs nothing but constructors of ours."""
    tree, shared = json.loads(content), list[Any]()
    if isinstance(tree, list) and len(tree) == 3 and tree[0] == "sharing":
        for part in tree[1]:
            shared.append(_decode(part, shared))
        tree = tree[2]
    return _decode(tree, shared)


# ---- writing


def _referring(text: Any, places: Mapping[int, int], whole: bool = False) -> Any:
    """``text`` with references to the parts that have a place."""
    if not whole and id(text) in places:
        return ["shared", places[id(text)]]
    if isinstance(text, list):
        return [_referring(part, places) for part in text]
    if isinstance(text, dict):
        return {name: _referring(part, places) for name, part in text.items()}
    return text


def _encode(value: Any, known: dict[int, list[Any]]) -> Any:
    """What to write for a value; ``known`` has that of objects by identity, and how often they were met."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, enum.Enum):
        return ["enum", _name(type(value)), value.name]
    for kind, write in _WRITERS:
        if isinstance(value, kind):
            return write(value, functools.partial(_encode, known=known))
    is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if is_object or isinstance(value, Size):
        if id(value) in known:
            known[id(value)][1] += 1
            return known[id(value)][0]
        if isinstance(value, Size):
            terms = ([_encode(monomial, known), factor] for monomial, factor in value.terms)
            text: Any = ["size", *terms]
        else:
            fields = {f.name: _encode(getattr(value, f.name), known) for f in dataclasses.fields(value) if f.init}
            text = {"is": _name(type(value)), **fields}
        # The value is kept, so that nothing else gets its identity.
        known[id(value)] = [text, 1, value]
        return text
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if name in _FUNCTIONS:
        return ["function", name]
    raise TypeError(f"a {type(value).__name__} is no plain data: {value!r:.200}")


def _items(tag: str) -> Callable[[Any, Encode], Any]:
    return lambda value, encode: [tag, *map(encode, value)]


def _encode_tuple(value: Any, encode: Encode) -> Any:
    if type(value) not in (tuple, torch.Size):
        raise TypeError(f"a {type(value).__name__} is no plain data")
    return ["tuple", *map(encode, value)]


def _encode_array(value: Any, encode: Encode) -> Any:
    if value.dtype.kind not in _ARRAY_KINDS:
        raise TypeError(f"an array of {value.dtype} is no plain data")
    return [
        "array",
        value.dtype.str,
        list(value.shape),
        base64.b64encode(np.ascontiguousarray(value).tobytes()).decode(),
    ]


def _encode_tensor(value: Any, encode: Encode) -> Any:
    size = value.numel() * value.itemsize
    if value.device.type != "cpu" or value.layout is not torch.strided or size > _SMALL:
        raise TypeError(f"a tensor of {size} bytes on {value.device} of layout {value.layout} is no plain data")
    content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return ["tensor", encode(value.dtype), list(value.shape), encode(content)]


def _encode_operator(value: Any, encode: Encode) -> Any:
    _permit(value)
    return ["operator", value._schema.name, value._overloadname]


def _encode_builtin(value: Any, encode: Encode) -> Any:
    name = str(value.__name__)
    if getattr(torch, name, None) is not value:
        raise TypeError(f"the function {name} is not of torch's flat namespace")
    _torch_function(name)
    return ["torch", name]


_WRITERS: tuple[tuple[Any, Callable[[Any, Encode], Any]], ...] = (
    (float, lambda x, encode: ["float", x.hex()]),
    (complex, lambda x, encode: ["complex", x.real.hex(), x.imag.hex()]),
    (tuple, _encode_tuple),
    ((list, immutable_list), _items("list")),
    ((dict, immutable_dict), lambda x, encode: ["dict", *([encode(k), encode(v)] for k, v in x.items())]),
    (frozenset, lambda x, encode: ["frozenset", *sorted(map(encode, x), key=json.dumps)]),
    *(
        (kind, lambda x, encode, tag=tag: [tag, str(x).removeprefix("torch.")])
        for tag, kind in _TORCH_CONSTANTS.items()
    ),
    (torch.device, lambda x, encode: ["device", str(x)]),
    (np.ndarray, _encode_array),
    (torch.Tensor, _encode_tensor),
    (torch._ops.OpOverload, _encode_operator),
    (types.BuiltinFunctionType, _encode_builtin),
    (pytree.TreeSpec, lambda x, encode: ["structure", encode(outline_of_spec(x))]),
)


def _name(cls: type) -> str:
    name = f"{cls.__module__.removeprefix('fuser.')}.{cls.__qualname__}"
    if type_of(name) is not cls:
        raise TypeError(f"the class {cls.__module__}.{cls.__qualname__} is not one that is saved")
    return name


# ---- reading


def _decode(value: Any, shared: Sequence[Any] = ()) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], str):
        tag, *parts = value
        if tag == "shared":
            (place,) = parts
            return shared[place if type(place) is int and place >= 0 else len(shared)]
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](functools.partial(_decode, shared=shared), *parts)
        if tag in _READERS:
            return _READERS[tag](*parts)
    if isinstance(value, dict) and isinstance(value.get("is"), str):
        cls = type_of(value["is"])
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{value['is']} is not a class of values")
        given = {name: _decode(part, shared) for name, part in value.items() if name != "is"}
        _check_fields(cls, given)
        return cls(**given)
    raise ValueError(f"{value!r:.100} is no value of ours")


def type_of(name: str) -> type:
    """The frozen dataclass or enumeration of ours that ``name`` says: its module below ``fuser`` and its own name.

    Raises TypeError if there is none.
    """
    module, _, own = name.rpartition(".")
    if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", module) or not any(
        module == root or module.startswith(f"{root}.") for root in _ROOTS
    ):
        raise TypeError(f"{name} does not name a class that is saved")
    try:
        found = getattr(importlib.import_module(f"fuser.{module}"), own)
    except (ImportError, AttributeError) as error:
        raise TypeError(f"there is no class {name} in this version of fuser") from error
    if not is_saved(found) or found.__module__ != f"fuser.{module}":
        raise TypeError(f"{name} is not a class that is saved")
    return typing.cast(type, found)


def is_saved(found: Any) -> bool:
    """Whether this is a frozen dataclass or an enumeration."""
    if not isinstance(found, type):
        return False
    return issubclass(found, enum.Enum) or (dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def check(value: Any) -> None:
    """Raise TypeError unless the fields of a dataclass of ours are what their annotations say."""
    cls: type = type(value)
    _check_fields(cls, {name: getattr(value, name) for name in _hints(cls)})


def _check_fields(cls: type, given: Mapping[str, Any]) -> None:
    for name, part in given.items():
        hint = _hints(cls).get(name)
        if hint is None or not fits(part, hint):
            raise TypeError(f"the field {name} of a {cls.__name__} cannot be {part!r:.100}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` says, elements included; an integer is also a float, a
    size an integer, and what is made when sizes are known anything."""
    if hint is Any or isinstance(hint, typing.TypeVar) or isinstance(value, Late):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return isinstance(value, {float: (int, float), int: (int, Size)}.get(hint, hint))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is collections.abc.Callable:
        return callable(value)
    if not isinstance(value, origin):
        return False
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if issubclass(origin, collections.abc.Mapping):
        return all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
    if issubclass(origin, (collections.abc.Set, collections.abc.Sequence)):
        return all(fits(item, args[0]) for item in value)
    return True


def _permit(overload: Any) -> None:
    """Raise TypeError unless an operator computes values from values, without touching anything else."""
    schema = overload._schema
    if (
        overload.namespace not in _NAMESPACES
        or schema.is_mutable
        or any("filename" in argument.name for argument in schema.arguments)
    ):
        raise TypeError(f"the operator {overload} is not one of PyTorch's or fuser's that only compute values")


def _operator(name: str, overload: str) -> Any:
    namespace, _, own = name.partition("::")
    if namespace not in _NAMESPACES:
        raise TypeError(f"the operator {name} is neither PyTorch's nor fuser's")
    if namespace == "fuser":
        import fuser.attention.operators  # noqa: F401 (defines the operators)
    found = getattr(getattr(getattr(torch.ops, namespace), own), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{name}.{overload} is no operator")
    _permit(found)
    return found


def _torch_function(name: str) -> Any:
    found, packet = getattr(torch, name), getattr(torch.ops.aten, name)
    if not isinstance(found, types.BuiltinFunctionType) or not isinstance(packet, torch._ops.OpOverloadPacket):
        raise TypeError(f"torch.{name} is no operator")
    for overload in packet.overloads():  # type: ignore[no-untyped-call]
        if not overload.endswith("out"):
            _permit(getattr(packet, overload))
    return found


def _function(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise TypeError(f"{name} is no function that a program calls")
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


def _torch_constant(tag: str, name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, _TORCH_CONSTANTS[tag]):
        raise TypeError(f"torch.{name} is no {tag}")
    return found


def _member(name: str, member: str) -> Any:
    cls = type_of(name)
    if not issubclass(cls, enum.Enum):
        raise TypeError(f"{name} is no enumeration")
    return cls[member]


def _array(kind: str, shape: list[int], content: str) -> Any:
    dtype = np.dtype(kind)
    if dtype.kind not in _ARRAY_KINDS or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"there are no arrays of {kind} and shape {shape}")
    return np.frombuffer(base64.b64decode(content, validate=True), dtype).reshape(shape).copy()


def _tensor(decode: Decode, dtype: Any, shape: list[int], content: Any) -> Any:
    octets, dtype = torch.from_numpy(decode(content)), decode(dtype)
    if octets.dtype != torch.uint8 or not isinstance(dtype, torch.dtype):
        raise TypeError(f"there are no tensors of {dtype} in {octets.dtype}")
    return (octets.view(dtype) if len(octets) else torch.empty(0, dtype=dtype)).reshape(shape)


def _structure(decode: Decode, value: Any) -> Any:
    outline = decode(value)
    if not isinstance(outline, Outline):
        raise TypeError("a structure is an outline")
    return outline.spec()


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "tuple": lambda decode, *items: tuple(map(decode, items)),
    "list": lambda decode, *items: list(map(decode, items)),
    "dict": lambda decode, *pairs: {decode(key): decode(item) for key, item in pairs},
    "frozenset": lambda decode, *items: frozenset(map(decode, items)),
    "size": lambda decode, *terms: Size({decode(monomial): decode(factor) for monomial, factor in terms}),
    "structure": _structure,
    "tensor": _tensor,
}
_READERS: dict[str, Callable[..., Any]] = {
    "float": float.fromhex,
    "complex": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    **{tag: functools.partial(_torch_constant, tag) for tag in _TORCH_CONSTANTS},
    "device": torch.device,
    "array": _array,
    "operator": _operator,
    "torch": _torch_function,
    "function": _function,
    "enum": _member,
    "type": lambda name: _TYPES[name],
}
