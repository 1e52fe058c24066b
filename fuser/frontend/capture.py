"""From a model and example inputs to an ATen graph over flat tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
import logging
import operator
import os
import random
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fuser.frontend import arguments
from fuser.frontend.arguments import Change, Given, Taken, is_object, is_value
from fuser.frontend.garbage import bring_back, set_aside
from fuser.frontend.shadow import Shadow, attributes_of, forget, functions_of
from fuser.frontend.sizes import SizeRange, Sizes
from fuser.frontend.symbols import remembered_arithmetic
from fuser.frontend.watch import GlobalNumbers
from fuser.ir.errors import CaptureError
from fuser.runtime.locks import ForkSafeRLock

Signature = tuple[Any, ...]
Dynamic = bool | Sequence[Collection[int]]
"""Which dimensions of a call's tensors may have other sizes: all, none, or some of each tensor."""
# torch.export puts stand-ins for the parameters into the live modules, and PyTorch's switches are the process's.
_EXPORTING = ForkSafeRLock()
_capturing: int | None = None
_undo = contextlib.ExitStack()
"""What a capture has changed for the whole process, while it runs."""
_EXPORTER = "torch.export._trace"
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class StateError(CaptureError):
    """A model changed its own attributes while it ran; it may have filled a cache, so a second call may do better."""


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
            key.append(place(leaf, None if leaf.is_nested else _layout(leaf)))
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


def _layout(tensor: Tensor) -> tuple[int, ...] | None:
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


@dataclass(frozen=True)
class OutputTensor:
    """Stands for one of a program's results in an :class:`OutputSpec`."""

    index: int


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a model's output: a pytree, or an object's attributes.

    ``leaves`` holds an :class:`OutputTensor` for every tensor (one that is returned in several places is one object),
    a nested spec for an object, and everything else as it is: what is not a tensor is a constant of the program.
    ``spec`` is the pytree's structure, or the names of the attributes of an object of class ``cls``. Where the model
    makes ``changes`` to objects that it is given, the structure is that of the output and the values that these get.
    """

    spec: Any
    leaves: tuple[Any, ...]
    cls: type | None = None
    changes: tuple[Change, ...] = ()

    @property
    def holds_tensors(self) -> bool:
        """Whether any part of it is a tensor."""
        return any(
            isinstance(leaf, OutputTensor) or (isinstance(leaf, OutputSpec) and leaf.holds_tensors)
            for leaf in self.leaves
        )

    def sized(self, size: Callable[[torch.SymInt], int]) -> OutputSpec:
        """The same with numbers or formulas in the place of PyTorch's symbols for sizes."""
        leaves = (
            size(leaf) if isinstance(leaf, torch.SymInt) else leaf.sized(size) if isinstance(leaf, OutputSpec) else leaf
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=tuple(leaves))

    def build(self, tensors: Sequence[Tensor], objects: Sequence[Any] = ()) -> Any:
        """The output with these tensors, of a call with these ``objects``, which are changed."""
        filled = [
            tensors[leaf.index]
            if isinstance(leaf, OutputTensor)
            else leaf.build(tensors, objects)
            if isinstance(leaf, OutputSpec)
            else objects[leaf.index]
            if isinstance(leaf, Given)
            else leaf
            for leaf in self.leaves
        ]
        if self.cls is None:
            built = pytree.tree_unflatten(filled, self.spec)
            if self.changes:
                built, values = built
                arguments.apply(self.changes, values, objects)
            return built
        # Not through its constructor, which may compute, and need not take what it keeps.
        made: Any = object.__new__(self.cls)
        for name, value in zip(self.spec, filled, strict=True):
            object.__setattr__(made, name, value)
        return made

    def tensors(self, output: Any, objects: Sequence[Any] = ()) -> dict[int, Tensor]:
        """The tensors of an output of this structure, of a call with these ``objects``, by their index."""
        if self.changes:
            output = output, arguments.values_of(self.changes, objects)
        parts = pytree.tree_leaves(output) if self.cls is None else [getattr(output, name) for name in self.spec]
        found: dict[int, Tensor] = {}
        for leaf, part in zip(self.leaves, parts, strict=True):
            if isinstance(leaf, OutputTensor):
                found[leaf.index] = part
            elif isinstance(leaf, OutputSpec):
                found.update(leaf.tensors(part))
        return found


def flatten_output(
    output: Any, original: Callable[[Any], Any] = lambda value: value
) -> tuple[list[Tensor], OutputSpec]:
    """Tensors of an output and its structure: pytrees (Hugging Face's outputs among them), dataclasses, and objects
    that are nothing but their attributes, such as key-value caches.

    ``original`` gives what an object that the model has had before stands for. Raises CaptureError for objects that
    hold tensors where they cannot be seen.
    """
    tensors: list[Tensor] = []
    places: dict[int, OutputTensor] = {}
    active: set[int] = set()

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in places:
                places[id(value)] = OutputTensor(len(tensors))
                tensors.append(value)
            return places[id(value)]
        if is_value(value):
            return value
        if (stands_for := original(value)) is not value:
            return stands_for
        made = structure(value)
        if made.cls is not None and not made.holds_tensors and not dataclasses.is_dataclass(value):
            # It may be one that others have, too, which a copy would not be.
            raise CaptureError(f"the model returns a {type(value).__name__}, which holds no tensor")
        return made

    def structure(value: Any) -> OutputSpec:
        if id(value) in active:
            raise CaptureError(f"the model returns a {type(value).__name__} that contains itself")
        active.add(id(value))
        if isinstance(value, Tensor) or is_value(value) or not pytree.tree_is_leaf(value):
            leaves, spec = pytree.tree_flatten(value)
            made = OutputSpec(spec, tuple(map(keep, leaves)))
        elif is_object(value):
            names = attributes_of(value)
            made = OutputSpec(names, tuple(keep(getattr(value, name)) for name in names), type(value))
        else:
            raise CaptureError(f"the model returns a {type(value).__name__}, which fuser cannot rebuild from tensors")
        active.discard(id(value))
        return made

    return tensors, structure(output)


@dataclass(frozen=True)
class Captured:
    """An ATen graph (undecomposed) over flat inputs.

    ``graph`` has placeholders for ``parameters`` (name in the graph → the live tensor of the model), then for the
    tensors of the call; its output is the flat tuple of tensors that ``output`` rebuilds the model's result from.
    ``asks_modes`` says whether the model asked if gradients or inference mode are on, ``lifted`` names the parameters
    that are tensors which no module has registered, and ``sizes`` says for which calls the graph holds: for shapes of
    one kind if its sizes are named, else for those that it was captured with. ``known`` has the contents of inputs that
    the graph is to be raised for, by the name of the input and ``_known``. Inputs that the model writes in place are
    named by ``updated``: what they hold then are the last results of the graph, behind those of ``output``.
    """

    graph: torch.fx.GraphModule
    parameters: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    output: OutputSpec
    asks_modes: bool = False
    lifted: frozenset[str] = frozenset()
    sizes: SizeRange = field(default_factory=lambda: SizeRange(()))
    known: Mapping[str, Tensor] = field(default_factory=dict)
    updated: tuple[str, ...] = ()


class _Flat(nn.Module):
    """The model as a function from flat tensors to flat tensors; ``record`` is told the structure of the output."""

    def __init__(self, shadow: Shadow, call: FlatCall, seen: _Seen) -> None:
        super().__init__()
        self.model = shadow.module
        self._shadow = shadow
        self._call = call
        self._seen = seen

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (args, kwargs), objects = self._call.rebuilt(tensors)
        before = arguments.state_of(objects)
        self._shadow.settle()
        with self._seen:
            output = self.model(*args, **kwargs)
        # Now, since the export sets attributes back.
        self._seen.changed = self._shadow.changed()
        self._seen.attributes = [(vars(module), dict(vars(module))) for module in self.model.modules()]
        given = {id(value): Given(i, type(value).__name__) for i, value in enumerate(objects)}
        changes, values = arguments.changes(objects, before)
        arguments.learn_counters(objects, before)

        def original(value: Any) -> Any:
            return given.get(id(value)) or self._shadow.original(value)

        flat, found = flatten_output((output, values) if changes else output, original)
        self._seen.output = dataclasses.replace(found, changes=changes)
        return tuple(flat)


class _Seen(TorchFunctionMode):
    """What the model's own code gets to see and asks for while it is traced: stand-ins for tensors, strides."""

    output: OutputSpec | None = None
    changed: tuple[str, bool] = ("", False)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._made: list[weakref.ref[Tensor]] = []
        self.strides = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.strides = self.strides or func in _READS_STRIDES
        given = set(map(id, pytree.tree_leaves((args, kwargs))))
        self._made += [
            weakref.ref(t) for t in pytree.tree_leaves(result) if isinstance(t, FakeTensor) and id(t) not in given
        ]
        return result

    def left(self) -> list[Tensor]:
        """Stand-ins that outlive the trace."""
        if all(made() is None for made in self._made):
            return []
        gc.collect()
        return [tensor for made in self._made if (tensor := made()) is not None]


_READS_STRIDES = frozenset({Tensor.stride, Tensor.storage_offset, Tensor.data_ptr, Tensor.untyped_storage})


@dataclass(frozen=True)
class _Trace:
    """What a trace found: the exported program, the structure of its output, what the model has changed about itself
    (and whether that holds tensors), and what it asked for."""

    program: torch.export.ExportedProgram
    output: OutputSpec
    changed: tuple[str, bool]
    attributes: Sequence[tuple[dict[str, Any], dict[str, Any]]]
    """Those of all modules, and what they held when the model had run."""
    asks_modes: bool
    returned: Mapping[int, str]
    """The results, by position, that are inputs which the model has written, by name."""

    def agrees(self, other: _Trace) -> bool:
        """Whether both are the same computation."""
        return self.program.graph_module.code == other.program.graph_module.code and self.output == other.output


@functools.cache
def prepare() -> None:
    """Import what captures need, also what PyTorch imports while it makes them: a process that is forked beside the
    first of them would find it half imported."""
    importlib.import_module(_EXPORTER)
    call = flatten_call((torch.ones(2, 3, 2, device="cpu"),), {})
    # What a capture cannot do here, it says when a model wants it.
    with contextlib.suppress(Exception):
        if not is_capturing():
            capture(nn.Flatten(0, 1), call, True)


def is_capturing() -> bool:
    """Whether this thread is capturing a model."""
    return _capturing == threading.get_ident()


def capture(model: nn.Module, call: FlatCall, dynamic: Dynamic = False) -> Captured:
    """Export ``model`` with ``torch.export`` for one call, or, with ``dynamic``, for calls that differ from it in
    sizes: those dimensions are named in which the model allows it, of all (True) or of the ones given for each tensor.
    Sizes of zero and one stay what they are.

    The model itself is never touched: a shadow of it is traced, and the model may run, change hands and be copied in
    other threads meanwhile. A model that sets itself up in its first call (installs hooks, say) and computes the same
    in the second is captured as it is from then on. Raises CaptureError, with PyTorch's reason, for a model that
    depends on the values of its tensors, mutates its inputs or state, or uses what export does not support.
    """
    shadow = Shadow(model)
    trace = _trace(shadow, call, model, dynamic)
    changed, tensors = trace.changed
    if changed and not tensors:
        for attributes, left in trace.attributes:
            attributes.update(left)
        settled = Shadow(shadow.module)
        again = _trace(settled, call, model, dynamic)
        if not again.changed[0] and trace.agrees(again):
            return _captured(again, call, settled, lambda t: shadow.original_tensor(settled.original_tensor(t)))
    if changed:
        raise StateError(f"the model changes its attribute {changed} while it runs")
    return _captured(trace, call, shadow, shadow.original_tensor)


def _trace(shadow: Shadow, call: FlatCall, model: nn.Module, dynamic: Dynamic) -> _Trace:
    seen = _Seen()
    wrapper = _Flat(shadow, call, seen)
    watched = GlobalNumbers(functions_of(model))
    with _EXPORTING, set_aside():
        try:
            inference = any(parameter.is_inference() for parameter in model.parameters())
            with _exporting(inference), watched.unchanged(), _python_random():
                asked = _answer(call)
                program = torch.export.export(
                    wrapper, _examples(call), dynamic_shapes=_dynamic_shapes(call, dynamic), strict=False
                )
                returned = _check_writes(program)
                _drop_detaching(program.graph)
                _drop_unread(program.graph)
                if any(_is_mutable(node) or _reads_a_part(node) for node in program.graph.nodes):
                    # Operators that change an intermediate in place become functions, and parts of a parameter inputs.
                    program = program.run_decompositions({})
                # Not before: what is written between two of them makes them differ.
                _share_roundings(program.graph)
        except CaptureError:
            raise
        except Exception as error:
            reason = f"the model could not be captured: {_first_line(error)}"
            # Frames hold tensors of the trace for as long as the reason is kept.
            _clear_frames(error)
            raise CaptureError(reason) from error
        finally:
            shadow.empty_caches()
            left = seen.left()
            if left:
                # Perhaps only cycles of older objects hold them.
                left.clear()
                bring_back()
                left = seen.left()
            if left:
                forget(left, model)
    if seen.output is None:
        raise CaptureError("the model returned nothing")
    if written := shadow.written():
        raise CaptureError(f"the model changes {written} in place while it runs")
    if left and not seen.changed[0]:
        raise StateError("the model keeps tensors that it has made outside of itself, as a hook or a cache does")
    if seen.strides and any(tensor.storage_offset() or _layout(tensor) is not None for tensor in call.tensors):
        raise CaptureError("the model reads strides, and those of its inputs are not those of contiguous tensors")
    return _Trace(program, seen.output, seen.changed, seen.attributes, bool(asked), returned)


def _captured(trace: _Trace, call: FlatCall, shadow: Shadow, original: Callable[[Tensor], Tensor]) -> Captured:
    program, signature = trace.program, trace.program.graph_signature
    kinds = [spec.kind.name for spec in signature.output_specs]
    updated = tuple(str(s.target) for s in signature.output_specs if s.kind.name == "USER_INPUT_MUTATION")
    # What is written within another operator's arguments.
    mutated = [
        str(s.target or s.arg.name)
        for s in signature.output_specs
        if s.kind.name not in ("USER_OUTPUT", "USER_INPUT_MUTATION")
    ]
    if mutated:
        raise CaptureError(f"the model changes {', '.join(mutated)} in place while it runs")
    if updated:
        _updates_last(program.graph, kinds, updated, trace.returned)
    _check_nodes(program.graph, call.tensors[0].device if call.tensors else torch.device("cpu"))
    module = shadow.module
    live = {
        f"model.{name}": tensor
        for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in named
    }
    live |= {part: tensor for name, whole in live.items() for part, tensor in _parts(name, whole)}
    parameters = {}
    for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        if target not in live:
            raise CaptureError(f"the export takes {target} for a parameter, which the model does not have")
        parameters[name] = live[target]
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        parameters[name] = original(program.constants[target])
    inputs = tuple(spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT")
    lifted = frozenset(signature.inputs_to_lifted_tensor_constants)
    sizes = Sizes(program.graph, inputs, len(call.slots))
    output = trace.output.sized(sizes.of)
    return Captured(
        program.graph_module,
        parameters,
        inputs,
        output,
        trace.asks_modes,
        lifted,
        sizes.annotate(),
        updated=updated,
    )


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a parameter consists of, such as the integers and scales of a quantized one, as
    ``torch.export`` names them; nothing for one that is plain."""
    module, _, leaf = name.rpartition(".")
    if is_traceable_wrapper_subclass(tensor):
        for i, part in enumerate(_plain(tensor)):
            yield f"{module}.parametrizations.{leaf}.original{i}", part


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))


def _dynamic_shapes(call: FlatCall, dynamic: Dynamic) -> Any:
    """What ``torch.export`` is told about the sizes: that it may find out which of these dimensions can vary."""
    if dynamic is False:
        return None
    chosen = [range(t.ndim) for t in call.tensors] if dynamic is True else dynamic
    return (
        tuple(
            dict.fromkeys((d for d in dims if tensor.shape[d] > 1), torch.export.Dim.AUTO)
            for tensor, dims in zip(call.tensors, chosen, strict=True)
        ),
    )


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _answer(call: FlatCall) -> list[str]:
    """Answer the model's questions for PyTorch's modes with those of the call, until the capture ends; returns the list
    that is to have those it asked.

    What this thread's model reads as a member of ``torch`` is a function that answers so. PyTorch itself gets its own
    function: Dynamo keeps tables by function for the life of the process.
    """
    thread, asked = threading.get_ident(), list[str]()

    def asker(name: str, value: bool) -> property:
        function = getattr(torch, name)

        def answer() -> bool:
            if threading.get_ident() != thread or _is_torch(sys._getframe(1)):
                return bool(function())
            asked.append(name)
            return value

        def read(module: Any) -> Callable[[], bool]:
            return function if threading.get_ident() != thread or _is_torch(sys._getframe(1)) else answer

        return property(read)

    names = ("is_grad_enabled", "is_inference_mode_enabled")
    members = {name: asker(name, value) for name, value in zip(names, call.modes, strict=True)}
    _undo.callback(setattr, torch, "__class__", type(torch))
    torch.__class__ = type("Torch", (type(torch),), members)
    return asked


def _is_torch(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


@contextlib.contextmanager
def _python_random() -> Iterator[None]:
    """Refuse what draws numbers from Python's or NumPy's generators, which a program would not draw again."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    other = numpy.random.get_state(legacy=False) if numpy else None
    yield
    drawn = random.getstate() != state
    random.setstate(state)
    if numpy and str(numpy.random.get_state(legacy=False)) != str(other):
        numpy.random.set_state(other)
        drawn = True
    if drawn:
        raise CaptureError("the model draws random numbers from Python or NumPy, which a program cannot repeat")


def _after_fork() -> None:
    # The thread that captured does not exist in a forked child, so nobody would undo what it has done to the process.
    _undo.close()


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _thread_tracer() -> type:
    """PyTorch's tracer of module calls, restricted to the thread that traces.

    It patches ``nn.Module`` itself, so other threads would be drawn in with whatever module they call.
    """

    class ThreadTracer(proxy_tensor._ModuleStackTracer):  # type: ignore[misc]
        def __init__(self, scope_root: Any) -> None:
            self._thread = threading.get_ident()
            super().__init__(scope_root)
            # Where each operator stands in the model's code: a sixth of a trace, for a note that nobody reads.
            self.record_stack_traces = False

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            return super().call_module(m, forward, args, kwargs)

        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return attr_val
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    return ThreadTracer


@contextlib.contextmanager
def _exporting(inference: bool) -> Iterator[None]:
    """The modes in which models are traced: one at a time, without gradients, in inference mode only if the parameters
    were made in it, and quietly, as the reasons for failures are reported."""
    global _capturing
    exporter = importlib.import_module(_EXPORTER)
    with _EXPORTING, torch.inference_mode(inference), torch.no_grad(), _undo:
        _undo.enter_context(warnings.catch_warnings())
        # torch.export prints what it has of a graph when a trace fails, hundreds of lines.
        _undo.enter_context(mock.patch.object(exporter, "print", lambda *lines, **where: None, create=True))
        _undo.enter_context(mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _given_causality))
        _undo.enter_context(remembered_arithmetic())
        warnings.simplefilter("ignore")
        # Patched by the export itself.
        for name in ("__call__", "__getattr__"):
            _undo.callback(setattr, nn.Module, name, getattr(nn.Module, name))
        if hasattr(proxy_tensor, "_ModuleStackTracer"):
            _undo.enter_context(mock.patch.object(proxy_tensor, "_ModuleStackTracer", _thread_tracer()))
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            # Whether a tensor happens to be contiguous would become a guard on sizes, for a note that nobody reads.
            described = functools.partial(proxy_tensor._extract_tensor_metadata, include_contiguity=False)
            _undo.enter_context(mock.patch.object(proxy_tensor, "_extract_tensor_metadata", described))
        _undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        # nn.TransformerEncoder's fast path is one opaque operator, which hides what is to be fused.
        torch.backends.mha.set_fastpath_enabled(False)
        for loud in map(logging.getLogger, _LOUD):
            _undo.callback(setattr, loud, "disabled", loud.disabled)
            loud.disabled = True
        _undo.callback(_end_of_capture)
        _capturing = threading.get_ident()
        yield


def _end_of_capture() -> None:
    global _capturing
    _capturing = None


def _given_causality(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """For nn.TransformerEncoder and nn.TransformerDecoder, which compare a mask's entries with a causal mask's unless
    they are told: that only finds a hint, and the mask says the same."""
    return is_causal is True


def _check_writes(program: torch.export.ExportedProgram) -> dict[int, str]:
    """Refuse writes to what outlives a call and is no input, since a signature does not mention those to plain tensors,
    and results in the memory of inputs that are written. Those that are such an input itself are told by position."""
    graph, given = program.graph, frozenset(program.graph_signature.user_inputs)
    lasting = {_storage(node): node for node in graph.nodes if node.op == "placeholder" and not _is_copied(node)}
    written: dict[int | None, torch.fx.Node] = {}
    for node in graph.nodes:
        if not _is_mutable(node):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not writes or not isinstance(value, torch.fx.Node) or _storage(value) not in lasting:
                continue
            of = lasting[_storage(value)]
            if of.name not in given:
                raise CaptureError(f"the model changes {of} in place while it runs")
            written[_storage(value)] = of
    returned: dict[int, str] = {}
    for position, leaf in enumerate(pytree.tree_leaves(graph.output_node().args) if written else ()):
        of = written.get(_storage(leaf)) if isinstance(leaf, torch.fx.Node) else None
        if of is None:
            continue
        if not _is_same_view(leaf.meta["val"], of.meta["val"]):
            raise CaptureError(f"the model changes {of} in place while it runs, and returns a view of it")
        returned[position] = of.name
    return returned


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())


def _updates_last(
    graph: torch.fx.Graph, kinds: Sequence[str], updated: Sequence[str], returned: Mapping[int, str]
) -> None:
    """Put what inputs are to hold behind the results of the model, and inputs that it returns among these. Raises
    CaptureError where the model has given an input another shape or dtype."""
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    leaves = graph.output_node().args[0]
    contents = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind != "USER_OUTPUT"]
    for name, leaf in zip(updated, contents, strict=True):
        before, now = inputs[name].meta["val"], leaf.meta["val"]
        if (before.dtype, before.shape) != (now.dtype, now.shape):
            raise CaptureError(f"the model makes another tensor of {name} in place while it runs")
    results = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == "USER_OUTPUT"]
    for position, name in returned.items():
        results[position] = inputs[name]
    graph.output_node().args = ((*results, *contents),)


def _is_copied(node: torch.fx.Node) -> bool:
    """Whether all that a graph does with an input is to copy it, as with what ``torch.tensor`` makes of numbers: the
    copy has the storage of the input in a trace, and one of its own in every call."""
    return bool(node.users) and all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)


def _drop_detaching(graph: torch.fx.Graph) -> None:
    """Take a tensor of numbers in the model's code as it is, which ``torch.tensor`` detaches in place: to make a whole
    graph functional for that alone takes longer than to trace it. What is returned stays, since the graph would keep
    the very stand-in that the model has returned."""
    for node in list(graph.nodes):
        made = node.args[0] if node.target is torch.ops.aten.detach_.default else None
        returned = any(user.op == "output" for user in node.users)
        if isinstance(made, torch.fx.Node) and made.target in _LIFTING and not returned:
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _drop_unread(graph: torch.fx.Graph) -> None:
    """Take away what nothing reads, such as the average of attention's weights where only its values are used."""
    for node in reversed(graph.nodes):
        if node.users or not isinstance(node.target, torch._ops.OpOverload) or node.meta.get("val") is None:
            continue
        if not _is_mutable(node) and torch.Tag.nondeterministic_seeded not in node.target.tags:
            graph.erase_node(node)


def _share_roundings(graph: torch.fx.Graph) -> None:
    """Let layers that each find the range of one tensor, round by it or restore the same integers, read one result, and
    restore stored weights before the first layer."""
    first: dict[Any, torch.fx.Node] = {}
    last_input = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    for node in list(graph.nodes):
        source = node.args[0] if node.target is operator.getitem else node
        if not isinstance(source, torch.fx.Node) or not str(source.target).startswith(_ROUNDINGS):
            continue
        known = first.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
        elif last_input is not None and all(source.op == "placeholder" for source in node.all_input_nodes):
            last_input.append(node)
            last_input = node


_ROUNDINGS = ("quantized_decomposed.", "fuser.packed_range.")
_LIFTING = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _storage(node: torch.fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout is torch.strided else None


def _check_nodes(graph: torch.fx.Graph, device: torch.device) -> None:
    """Refuse what a program of fixed shapes over dense tensors on one device cannot run."""
    for node in graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the model uses {node.target}, whose parts fuser cannot look into")
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, (torch.SymFloat, torch.SymBool)) or _is_unbacked(value):
                raise CaptureError(f"{node.target} makes a number from the values of tensors")
            if not isinstance(value, Tensor):
                continue
            if any(map(_is_unbacked, value.shape)):
                raise CaptureError(f"the shape of the result of {node.target} depends on the values of tensors")
            if value.layout is not torch.strided or value.device != device:
                raise CaptureError(f"{node.target} makes a tensor of layout {value.layout} on {value.device}")
        if node.op == "call_function" and node.meta.get("val") is None and node.target not in _METADATA:
            raise CaptureError(f"{node.target} checks or changes something while the model runs")


def _is_unbacked(value: Any) -> bool:
    """Whether a number follows from values of tensors and not from sizes."""
    return isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))


_METADATA = (torch.ops.aten._assert_tensor_metadata.default,)
"""Operators without a result that only repeat what the signature of a program says."""


def _is_mutable(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _reads_a_part(node: torch.fx.Node) -> bool:
    """Whether this is a plain tensor that a parameter consists of."""
    return str(node.target) == "export.access_subclass_inner_tensor.default"


def _examples(call: FlatCall) -> tuple[Tensor, ...]:
    """Fresh tensors in the layouts of the call's, those in objects contiguous, as programs take them: an example that
    aliases another, or requires grad, would be specialized on. What is one tensor in the call is one here."""
    made: dict[int, Tensor] = {}
    for i, tensor in enumerate(call.tensors):
        if id(tensor) not in made:
            strides = _layout(tensor) if i < len(call.slots) else None
            plain = tensor.detach()
            made[id(tensor)] = (
                plain.clone(memory_format=torch.contiguous_format)
                if strides is None
                else plain.new_empty_strided(plain.shape, strides)
            )
    return tuple(made[id(tensor)] for tensor in call.tensors)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
