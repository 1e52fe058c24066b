"""Calls as flat tensors: what runs one program, and the arguments put together again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser.frontend import arguments
from fuser.frontend.arguments import Given, Taken, is_object
from fuser.ir.errors import CaptureError

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class FlatCall:
    """One call of a module as flat tensors.

    ``key`` holds shapes, dtypes, layouts and the other arguments: calls with equal keys run one program. ``template``
    has the leaves that are not tensors, ``slots`` where the tensors go. ``modes`` says whether gradients and inference
    mode were on; models that ask for them have programs for each. ``objects`` are the arguments that are objects, with
    all that they consist of; their tensors are the last of ``tensors``, with those that stand for the numbers in their
    ``counted`` attributes. For such calls ``alike`` is the key without the sizes of these tensors, but for those of
    zero and one.
    """

    tensors: tuple[Tensor, ...]
    key: Signature
    spec: Any
    template: tuple[Any, ...]
    slots: tuple[int, ...]
    modes: tuple[bool, bool]
    objects: tuple[Any, ...] = ()
    alike: Signature | None = None
    counted: frozenset[tuple[int, str]] = frozenset()

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with these tensors, in copies of the objects."""
        return self.rebuilt(tensors)[0]

    def rebuilt(self, tensors: Sequence[Any]) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], list[Any]]:
        """As :meth:`unflatten`, and the copies of the ``objects``."""
        plain = len(self.slots)
        copies = arguments.rebuilt(self.objects, iter(tensors[plain:]), self.counted)
        filled = [copies[leaf.index] if isinstance(leaf, Given) else leaf for leaf in self.template]
        for slot, tensor in zip(self.slots, tensors[:plain], strict=True):
            filled[slot] = tensor
        return pytree.tree_unflatten(filled, self.spec), copies

    def frozen(self) -> FlatCall:
        """The call without its tensors, and with objects that nobody changes."""
        copies = arguments.rebuilt(self.objects, iter(self.tensors[len(self.slots) :]), self.counted)
        return dataclasses.replace(self, tensors=(), objects=tuple(copies))


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FlatCall:
    """Split the arguments of a call into tensors and the rest. Objects that are nothing but their attributes, such as
    key-value caches, are taken apart.

    Raises CaptureError for arguments that are neither dense tensors nor plain values, since a program is specialized
    on them.
    """
    leaves, spec = _leaves_of(args, kwargs)
    tensors: list[Tensor] = []
    slots: list[int] = []
    key: list[Any] = [spec]
    template = list(leaves)
    first: dict[int, int] = {}

    def place(tensor: Tensor, layout: tuple[int, ...] | None = None) -> Signature:
        if tensor.is_nested:
            raise CaptureError("an argument is a nested tensor, and programs are made for one shape")
        # A tensor that is given twice is one object to the model.
        number = len(first)
        twin = first.setdefault(id(tensor), number)
        return tuple(tensor.shape), tensor.dtype, tensor.device.type, layout, None if twin == number else twin

    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    taken = Taken(place, device)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            slots.append(i)
            key.append(place(leaf, None if leaf.is_nested else layout_of(leaf)))
            template[i] = None
        elif isinstance(leaf, float):
            # Zeros of both signs are equal, and a NaN is not even equal to itself.
            key.append((float, leaf.hex()))
        elif leaf is None or isinstance(leaf, (bool, int, str, torch.dtype, torch.device)):
            key.append((type(leaf), leaf))
        elif is_object(leaf):
            template[i] = Given(len(taken.objects), type(leaf).__name__)
            key.append((type(leaf), template[i]))
            taken.take(leaf)
        else:
            raise CaptureError(f"an argument is a {type(leaf).__name__}; pass tensors and plain Python values")
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    tensors += taken.tensors
    if not taken.objects:
        return FlatCall(tuple(tensors), tuple(key), spec, tuple(template), tuple(slots), modes)
    alike = (*key, *map(_without_sizes, taken.key))
    exact = (*key, *taken.key)
    given = tuple(tensors), exact, spec, tuple(template), tuple(slots), modes, tuple(taken.objects), alike
    return FlatCall(*given, frozenset(taken.counted))


_LEAVES = frozenset({Tensor, nn.Parameter, bool, int, float, str, type(None)})


def _leaves_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of a call and its structure, which those without containers are told at once."""
    leaves = [*args, *kwargs.values()]
    if not _LEAVES.issuperset(map(type, leaves)):
        return pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_object)
    order, spec = _flat_structure(len(args), tuple(kwargs))
    return [leaves[i] for i in order], spec


@functools.lru_cache(maxsize=256)
def _flat_structure(positional: int, names: tuple[str, ...]) -> tuple[list[int], Any]:
    """The order in which PyTorch has the leaves of such calls, and their structure."""
    return pytree.tree_flatten((tuple(range(positional)), dict(zip(names, itertools.count(positional)))))


def _without_sizes(part: Any) -> Any:
    """What a key says of a tensor, or of something else, without sizes above one."""
    if type(part[0]) is not tuple:
        return part
    return (tuple([min(size, 2) for size in part[0]]), *part[1:])


def layout_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides that stand for the tensor's: None for contiguous ones, otherwise the same order of dimensions with gaps
    in the same places, however wide, so that slices of buffers of all sizes are alike."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return None
    shape, strides = tensor.shape, tensor.stride()
    standing = list(strides)
    packed, stands = 1, 1
    for d in sorted(range(len(shape)), key=lambda d: (strides[d], shape[d])):
        if shape[d] == 1:
            standing[d] = stands
        elif strides[d]:
            if strides[d] < packed:
                # Elements that overlap.
                return tuple(strides)
            standing[d] = stands + (strides[d] > packed)
            packed, stands = strides[d] * shape[d], standing[d] * shape[d]
    return tuple(standing)
