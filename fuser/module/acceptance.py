"""Which calls of a model programs can serve, and what such calls are called in reports."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from fuser.frontend.calls import FlatCall, flatten_call
from fuser.integrations.transformers import without_hints
from fuser.ir.errors import CaptureError
from fuser.ir.target import Target

CPU = torch.device("cpu")


def acceptable(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Target | None
) -> tuple[FlatCall | None, str]:
    """The call as flat tensors for a program on ``wanted`` (None: where its tensors are), or why the original model
    must run."""
    if model.training and not _is_exported(model):
        return None, "the model is in training mode; call .eval() for fused inference"
    try:
        call = flatten_call(args, without_hints(model, kwargs))
    except CaptureError as error:
        return None, str(error)
    if reason := unreadable(call.tensors):
        return None, reason
    device = device_of(call)
    if wanted is not None and device.type != wanted.device:
        return None, f"an input is on {device}, and this target's tensors are on {wanted.device}"
    if device.type not in ("cpu", "cuda"):
        return None, f"an input is on {device}, and fuser has kernels for CPUs and NVIDIA GPUs"
    if torch.is_autocast_enabled(device.type):
        return None, "autocast is on; convert the model with .to(torch.bfloat16) instead"
    return call, ""


def _is_exported(model: nn.Module) -> bool:
    """Whether this is what torch.export made: its graph is of one mode, it refuses ``eval()``, and its flag, which is
    that of a new module, says nothing."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)


def device_of(call: FlatCall) -> torch.device:
    """Where the tensors of a call are; the CPU if it has none."""
    return call.tensors[0].device if call.tensors else CPU


def unreadable(tensors: Sequence[Tensor]) -> str:
    """Why kernels cannot take these tensors, or not in PyTorch's current modes; empty if they can."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or _is_wrapped(tensor):
            return f"an input is a {type(tensor).__name__} that fuser cannot look into"
        if tensor.device != tensors[0].device:
            return f"inputs are on {tensors[0].device} and on {tensor.device}"
        if tensor.layout is not torch.strided:
            return f"an input has the layout {tensor.layout}"
    if torch._C._is_tracing() or forward_ad._current_level >= 0:
        return "the call is traced or differentiated"
    if torch._C._len_torch_dispatch_stack():
        # Such as FakeTensorMode, whose tensors have no memory.
        return "a TorchDispatchMode is active, and kernels are no operators that it could see"
    return ""


def unwritable(tensors: Sequence[Tensor], updated: Collection[int]) -> str:
    """Why a program cannot write the tensors of a call at the positions ``updated``; empty if it can."""
    places = [tensor.untyped_storage().data_ptr() if tensor.numel() else 0 for tensor in tensors]
    if any(places[i] and places.count(places[i]) > 1 for i in updated):
        return "the model writes to an input that shares its memory with another"
    return ""


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a function transform (``torch.func``) stands behind the tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def form_of(call: FlatCall) -> Hashable:
    """What a call has in common with those that differ in sizes and numbers alone."""
    tensors = tuple((t.ndim, t.dtype, t.device.type) for t in call.tensors)
    rest = tuple(type(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in call.template)
    return call.spec, tensors, rest


def kin_of(call: FlatCall) -> Hashable:
    """What a call has in common with those that differ in floats alone; None where it has none."""
    if not any(isinstance(value, float) for value in call.template):
        return None
    tensors = tuple((tuple(t.shape), t.dtype, t.device.type) for t in call.tensors)
    return call.spec, tensors, tuple(float if isinstance(v, float) else (type(v), v) for v in call.template)


def text_of(call: FlatCall) -> str:
    """A call in reports: ``(int64 (1, 128), attention_mask=int64 (1, 128))``."""
    texts = [_Text(repr(leaf)) for leaf in call.template]
    for slot, tensor in zip(call.slots, call.tensors, strict=False):
        texts[slot] = _Text(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}")
    args, kwargs = pytree.tree_unflatten(texts, call.spec)
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"


class _Text(str):
    """A string that prints without quotes inside of containers."""

    def __repr__(self) -> str:
        return str(self)
