"""From a model and example inputs to an ATen graph over flat tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fuser.frontend import arguments
from fuser.frontend.arguments import Given
from fuser.frontend.aten import HANDLERS
from fuser.frontend.calls import FlatCall, flatten_call, layout_of
from fuser.frontend.captured import Captured
from fuser.frontend.composites import decompositions
from fuser.frontend.exported_graph import (
    check_nodes,
    check_writes,
    drop_detaching,
    drop_unread,
    is_mutable,
    reads_a_part,
    share_roundings,
    updates_last,
)
from fuser.frontend.exporting import (
    EXPORTER,
    EXPORTING,
    answer_for_modes,
    exporting,
    is_capturing,
    refusing_python_random,
)
from fuser.frontend.garbage import bring_back, set_aside
from fuser.frontend.output_structure import OutputSpec, flatten_output
from fuser.frontend.shadow import Shadow, forget, functions_of
from fuser.frontend.sizes import Sizes
from fuser.frontend.watch import GlobalNumbers
from fuser.ir.errors import CaptureError

Dynamic = bool | Sequence[Collection[int]]
"""Which dimensions of a call's tensors may have other sizes: all, none, or some of each tensor."""


class StateError(CaptureError):
    """A model changed its own attributes while it ran; it may have filled a cache, so a second call may do better."""


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
    importlib.import_module(EXPORTER)
    call = flatten_call((torch.ones(2, 3, 2, device="cpu"),), {})
    # What a capture cannot do here, it says when a model wants it.
    with contextlib.suppress(Exception):
        if not is_capturing():
            capture(nn.Flatten(0, 1), call, True)


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
    with EXPORTING, set_aside():
        try:
            inference = any(parameter.is_inference() for parameter in model.parameters())
            with exporting(inference), watched.unchanged(), refusing_python_random():
                asked = answer_for_modes(call)
                program = torch.export.export(
                    wrapper, _examples(call), dynamic_shapes=_dynamic_shapes(call, dynamic), strict=False
                )
                returned = check_writes(program)
                drop_detaching(program.graph)
                drop_unread(program.graph)
                composites = decompositions(program.graph, HANDLERS)
                changing = any(is_mutable(node) or reads_a_part(node) for node in program.graph.nodes)
                if changing or composites is not None:
                    # Operators that change an intermediate in place become functions, and parts of a parameter inputs.
                    program = program.run_decompositions(composites or {})
                # Not before: what is written between two of them makes them differ.
                share_roundings(program.graph)
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
    if seen.strides and any(tensor.storage_offset() or layout_of(tensor) is not None for tensor in call.tensors):
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
        updates_last(program.graph, kinds, updated, trace.returned)
    check_nodes(program.graph, call.tensors[0].device if call.tensors else torch.device("cpu"))
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


def _examples(call: FlatCall) -> tuple[Tensor, ...]:
    """Fresh tensors in the layouts of the call's, those in objects contiguous, as programs take them: an example that
    aliases another, or requires grad, would be specialized on. What is one tensor in the call is one here."""
    made: dict[int, Tensor] = {}
    for i, tensor in enumerate(call.tensors):
        if id(tensor) not in made:
            strides = layout_of(tensor) if i < len(call.slots) else None
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
