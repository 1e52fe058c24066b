"""From a model and example inputs to an ATen graph over flat tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import gc
import importlib
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

from fuser.ir.errors import CaptureError

Signature = tuple[Any, ...]
# torch.export puts stand-ins for the parameters into the live modules, and PyTorch's switches are the process's.
_EXPORTING = threading.RLock()
_capturing: int | None = None
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
_INTERNAL = frozenset(vars(nn.Module()))


class StateError(CaptureError):
    """A model changed its own attributes while it ran; it may have filled a cache, so a second call may do better."""


@dataclass(frozen=True)
class FlatCall:
    """One call of a module as flat tensors.

    ``key`` holds shapes, dtypes and the other arguments: calls with equal keys run one program. ``template`` has the
    leaves that are not tensors, ``slots`` where the tensors go.
    """

    tensors: tuple[Tensor, ...]
    key: Signature
    spec: Any
    template: tuple[Any, ...]
    slots: tuple[int, ...]

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with these tensors."""
        filled = list(self.template)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            filled[slot] = tensor
        result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(filled, self.spec)
        return result


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FlatCall:
    """Split the arguments of a call into tensors and the rest.

    Raises CaptureError for arguments that are neither dense tensors nor plain values, since a program is specialized
    on them.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    tensors: list[Tensor] = []
    slots: list[int] = []
    key: list[Any] = [spec]
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.is_nested:
                raise CaptureError("an argument is a nested tensor, and programs are made for one shape")
            tensors.append(leaf)
            slots.append(i)
            key.append((tuple(leaf.shape), leaf.dtype, leaf.device.type))
        elif isinstance(leaf, float):
            # Zeros of both signs are equal, and a NaN is not even equal to itself.
            key.append((float, leaf.hex()))
        elif leaf is None or isinstance(leaf, (bool, int, str, torch.dtype, torch.device)):
            key.append((type(leaf), leaf))
        else:
            raise CaptureError(f"an argument is a {type(leaf).__name__}; pass tensors and plain Python values")
    template = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return FlatCall(tuple(tensors), tuple(key), spec, template, tuple(slots))


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a model's output: a pytree, or the fields of a dataclass that PyTorch has not registered.

    ``leaves`` holds a marker for every tensor, a nested spec for a dataclass, and everything else as it is:
    what is not a tensor is a constant of the program.
    """

    spec: Any
    leaves: tuple[Any, ...]
    cls: type | None = None

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The output with these tensors."""
        return self._build(iter(tensors))

    def _build(self, tensors: Iterator[Tensor]) -> Any:
        filled = [
            next(tensors) if leaf is _TENSOR else leaf._build(tensors) if isinstance(leaf, OutputSpec) else leaf
            for leaf in self.leaves
        ]
        if self.cls is not None:
            return self.cls(**dict(zip(self.spec, filled, strict=True)))
        return pytree.tree_unflatten(filled, self.spec)


class _Marker(enum.Enum):
    TENSOR = "tensor"


_TENSOR = _Marker.TENSOR


def flatten_output(output: Any) -> tuple[list[Tensor], OutputSpec]:
    """Tensors of an output and its structure: pytrees (Hugging Face's outputs among them) and any dataclass.

    Raises CaptureError for objects that hold tensors where they cannot be seen.
    """
    cls = None
    spec: Any
    if _is_dataclass(output):
        names = tuple(f.name for f in dataclasses.fields(output))
        cls, spec = type(output), names
        leaves = [getattr(output, name) for name in names]
    else:
        leaves, spec = pytree.tree_flatten(output)
    tensors: list[Tensor] = []
    kept: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            kept.append(_TENSOR)
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
            kept.append(leaf)
        elif _is_dataclass(leaf) or not pytree.tree_is_leaf(leaf):
            inner, nested = flatten_output(leaf)
            tensors.extend(inner)
            kept.append(nested)
        else:
            raise CaptureError(f"the model returns a {type(leaf).__name__}, which fuser cannot rebuild from tensors")
    return tensors, OutputSpec(spec, tuple(kept), cls)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and pytree.tree_is_leaf(value)


@dataclass(frozen=True)
class Captured:
    """An ATen graph (undecomposed) over flat inputs.

    ``graph`` has placeholders for ``parameters`` (name in the graph → the live tensor of the model), then for the
    tensors of the call; its output is the flat tuple of tensors that ``output`` rebuilds the model's result from.
    """

    graph: torch.fx.GraphModule
    parameters: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    output: OutputSpec


class _Flat(nn.Module):
    """The model as a function from flat tensors to flat tensors; ``record`` is told the structure of the output."""

    def __init__(self, model: nn.Module, call: FlatCall, record: Callable[[OutputSpec], None]) -> None:
        super().__init__()
        self.model = model
        self.seen = _Seen()
        self._call = call
        self._record = record

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._call.unflatten(tensors)
        before = _attributes(self.model)
        with self.seen:
            flat, output = flatten_output(self.model(*args, **kwargs))
        changed = _difference(before, _attributes(self.model))
        if changed:
            _restore(self.model, before)
            raise StateError(f"the model changes its attribute {changed} while it runs")
        self._record(output)
        return tuple(flat)


class _Seen(TorchFunctionMode):
    """Remembers the stand-ins for tensors that the model's own code gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = set(map(id, pytree.tree_leaves((args, kwargs))))
        self._made += [
            weakref.ref(t) for t in pytree.tree_leaves(result) if isinstance(t, FakeTensor) and id(t) not in given
        ]
        return result

    def forget(self) -> bool:
        """Take those that outlive the trace out of the caches, dicts and lists that keep them; whether there were
        any."""
        if all(made() is None for made in self._made):
            return False
        gc.collect()
        found = False
        for made in self._made:
            tensor = made()
            if tensor is not None:
                found = True
                _take_out(tensor)
        return found


def _take_out(value: Any) -> None:
    """Remove an object from every list, dict, ``lru_cache`` and tuple in one of these that holds it; module globals and
    attributes of other objects stay."""
    holders = gc.get_referrers(value)
    while holders:
        holder = holders.pop()
        if isinstance(holder, list):
            holder[:] = [item for item in holder if item is not value]
        elif isinstance(holder, dict) and "__name__" not in holder:
            for key in [key for key, item in holder.items() if item is value]:
                del holder[key]
        elif isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif isinstance(holder, tuple):
            _take_out(holder)


def _attributes(model: nn.Module) -> dict[str, list[Any]]:
    """The plain attributes of all modules, containers as their leaves."""
    return {
        f"{name}.{key}" if name else key: [value, *pytree.tree_leaves(value)]
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in _INTERNAL
    }


def _unregistered(model: nn.Module) -> Iterator[Tensor]:
    """Parameters in plain attributes: by themselves, or in modules that are in no ModuleList."""
    for leaves in _attributes(model).values():
        for leaf in leaves:
            if isinstance(leaf, nn.Parameter):
                yield leaf
            elif isinstance(leaf, nn.Module):
                yield from leaf.parameters()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _restore(model: nn.Module, before: Mapping[str, list[Any]]) -> None:
    """Set attributes back, so that nothing of a trace stays behind."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        attributes = vars(module)
        for key in [key for key in attributes if key not in _INTERNAL and prefix + key not in before]:
            del attributes[key]
        for full, (value, *_) in before.items():
            if full.startswith(prefix) and "." not in full[len(prefix) :]:
                attributes[full[len(prefix) :]] = value


def _difference(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> str:
    """The name of an attribute that was set, changed or removed; empty if none was."""
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old is None or new is None or len(old) != len(new) or not all(map(_same, old, new)):
            return name
    return ""


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, tuple)) and bool(a == b))


def is_capturing() -> bool:
    """Whether this thread is capturing a model."""
    return _capturing == threading.get_ident()


def capture(model: nn.Module, call: FlatCall) -> Captured:
    """Export ``model`` for one call with ``torch.export``.

    The model must not run in another thread meanwhile. Raises CaptureError, with PyTorch's reason, for a model that
    depends on the values of its tensors, mutates its inputs or state, or uses what export does not support.
    """
    outputs: list[OutputSpec] = []
    wrapper = _Flat(model, call, outputs.append)
    plain = [leaf for leaves in _attributes(model).values() for leaf in leaves if isinstance(leaf, Tensor)]
    copies = [(tensor, tensor.detach().clone(), tensor._version) for tensor in plain if not tensor.is_inference()]
    try:
        with _exporting(any(parameter.is_inference() for parameter in model.parameters())):
            # Fresh tensors: an example that aliases another, or requires grad, would be specialized on.
            examples = tuple(_example(t) for t in call.tensors)
            program = torch.export.export(wrapper, examples, strict=False)
            _check_writes(program.graph)
            if any(_is_mutable(node) for node in program.graph.nodes):
                # Operators that change an intermediate in place become functions.
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"the model could not be captured: {_first_line(error)}") from error
    finally:
        kept = wrapper.seen.forget()
        # Writes to tensors that are neither parameters nor buffers happen for good even while tracing.
        with torch.no_grad():
            for tensor, copy, version in copies:
                if tensor._version != version:
                    tensor.copy_(copy)
    if kept:
        raise StateError("the model keeps tensors that it has made outside of itself, as a hook or a cache does")
    signature = program.graph_signature
    # What is written within another operator's arguments.
    mutated = [str(s.target or s.arg.name) for s in signature.output_specs if s.kind.name != "USER_OUTPUT"]
    if mutated:
        raise CaptureError(f"the model changes {', '.join(mutated)} in place while it runs")
    _check_nodes(program.graph)
    live = {
        **dict(wrapper.named_parameters(remove_duplicate=False)),
        **dict(wrapper.named_buffers(remove_duplicate=False)),
    }
    # Of a parameter that no module has registered, the constant is a view that shares no version counter with it.
    unregistered = {_place(tensor): tensor for tensor in _unregistered(model)}
    parameters: dict[str, Tensor] = {}
    for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        parameters[name] = live[target]
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        constant = program.constants[target]
        parameters[name] = unregistered.get(_place(constant), constant)
    if not outputs:
        raise CaptureError("the model returned nothing")
    inputs = tuple(spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT")
    return Captured(program.graph_module, parameters, inputs, outputs[-1])


def _free_lock() -> None:
    # The thread that captured does not exist in a forked child, so nobody would release its lock.
    global _EXPORTING, _capturing
    _EXPORTING, _capturing = threading.RLock(), None


os.register_at_fork(after_in_child=_free_lock)


@functools.cache
def _thread_tracer() -> type:
    """PyTorch's tracer of module calls, restricted to the thread that traces.

    It patches ``nn.Module`` itself, so other threads would be drawn in with whatever module they call.
    """

    class ThreadTracer(proxy_tensor._ModuleStackTracer):  # type: ignore[misc]
        def __init__(self, scope_root: Any) -> None:
            self._thread = threading.get_ident()
            super().__init__(scope_root)

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            return super().call_module(m, forward, args, kwargs)

        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return attr_val
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    return ThreadTracer


def _tracing_this_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep other threads out of a trace; a PyTorch without this tracer has nothing to narrow."""
    if not hasattr(proxy_tensor, "_ModuleStackTracer"):
        return contextlib.nullcontext()
    return mock.patch.object(proxy_tensor, "_ModuleStackTracer", _thread_tracer())


@contextlib.contextmanager
def _exporting(inference: bool) -> Iterator[None]:
    """The modes in which models are traced: one at a time, without gradients, in inference mode only if the parameters
    were made in it, and quietly, as the reasons for failures are reported."""
    global _capturing
    # Imported by the first export in any case.
    exporter = importlib.import_module("torch.export._trace")
    loggers = [logging.getLogger(name) for name in _LOUD]
    with (
        _EXPORTING,
        warnings.catch_warnings(),
        torch.inference_mode(inference),
        torch.no_grad(),
        _tracing_this_thread(),
        # torch.export prints what it has of a graph when a trace fails, hundreds of lines.
        mock.patch.object(exporter, "print", lambda *lines, **where: None, create=True),
    ):
        warnings.simplefilter("ignore")
        fastpath = torch.backends.mha.get_fastpath_enabled()
        disabled = [loud.disabled for loud in loggers]
        # nn.TransformerEncoder's fast path is one opaque operator, which hides what is to be fused.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            _capturing = threading.get_ident()
            for loud in loggers:
                loud.disabled = True
            yield
        finally:
            _capturing = None
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for loud, was in zip(loggers, disabled, strict=True):
                loud.disabled = was


def _check_writes(graph: torch.fx.Graph) -> None:
    """Refuse writes to what outlives a call; a signature does not mention those to plain tensors."""
    lasting = {_storage(node): node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if not _is_mutable(node):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.fx.Node) and _storage(value) in lasting:
                raise CaptureError(f"the model changes {lasting[_storage(value)]} in place while it runs")


def _storage(node: torch.fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout is torch.strided else None


def _check_nodes(graph: torch.fx.Graph) -> None:
    """Refuse what a program of fixed shapes over dense tensors cannot run."""
    for node in graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the model uses {node.target}, whose parts fuser cannot look into")
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raise CaptureError(f"{node.target} makes a number from the values of tensors")
            if not isinstance(value, Tensor):
                continue
            if any(not isinstance(size, int) for size in value.shape):
                raise CaptureError(f"the shape of the result of {node.target} depends on the values of tensors")
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise CaptureError(f"{node.target} makes a tensor of layout {value.layout} on {value.device}")
        if node.op == "call_function" and node.meta.get("val") is None and node.target not in _METADATA:
            raise CaptureError(f"{node.target} checks or changes something while the model runs")


_METADATA = (torch.ops.aten._assert_tensor_metadata.default,)
"""Operators without a result that only repeat what the signature of a program says."""


def _is_mutable(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _example(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
