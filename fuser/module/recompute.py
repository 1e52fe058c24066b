"""Gradients of what programs compute: the backward pass runs the original model again, as checkpointing does.

Kernels have no backward. So the outputs of a program carry one node of autograd, which knows the call; when gradients
reach it, the original computes the call once more with gradients on, and its own backward pass gives those of the
inputs and parameters.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser.frontend.calls import FlatCall
from fuser.frontend.captured import Captured
from fuser.frontend.output_structure import OutputSpec
from fuser.frontend.shadow import Shadow
from fuser.ir.errors import FuserError, MaskError
from fuser.runtime.locks import ForkSafeLock

_running = threading.local()
# These make tensors of the shape of their operand, and take nothing else of it.
_SHAPE_ONLY = re.compile(r"aten::(\w+_like|new_\w+)$")
_CHANGED = (
    "the model's weights, attributes or mode have changed since the call whose gradients are asked for, and these are "
    "found by calling the model again: run backward before changing it, or call the original model"
)


def is_recomputing() -> bool:
    """Whether this thread runs an original model for its gradients, so that modules within it must do the same."""
    return getattr(_running, "active", False)


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    before, _running.active = is_recomputing(), True
    try:
        yield
    finally:
        _running.active = before


class Routes:
    """Which results of a captured graph have gradients to parameters or inputs."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._weights = tuple(captured.parameters.values())
        self._known: dict[tuple[bool, ...], tuple[bool, ...]] = {}
        tags = (getattr(node.target, "tags", ()) for node in captured.graph.graph.nodes)
        self.is_random = any(torch.Tag.nondeterministic_seeded in found for found in tags)
        """Whether the model draws random numbers."""

    def sources(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The parameters and inputs that require grad, each once."""
        weights = [tensor for tensor in self._weights if tensor.requires_grad]
        given = [tensor for tensor in inputs if tensor.requires_grad]
        return list({id(tensor): tensor for tensor in (*weights, *given)}.values())

    @property
    def unregistered(self) -> bool:
        """Whether a tensor requires grad that no module has registered, so that it cannot be stood in for."""
        return any(self._captured.parameters[name].requires_grad for name in self._captured.lifted)

    def reached(self, inputs: Sequence[Tensor]) -> tuple[bool, ...]:
        """For every result, whether it depends on something that requires grad by differentiable operators."""
        requiring = tuple(tensor.requires_grad for tensor in (*self._weights, *inputs))
        found = self._known.get(requiring)
        if found is None:
            found = self._known[requiring] = self._reached(requiring)
        return found

    def _reached(self, requiring: tuple[bool, ...]) -> tuple[bool, ...]:
        names = (*self._captured.parameters, *self._captured.inputs)
        reached = {name for name, required in zip(names, requiring, strict=True) if required}
        for node in self._captured.graph.graph.nodes:
            if node.op == "output":
                results = pytree.tree_leaves(node.args)
                return tuple(isinstance(r, torch.fx.Node) and r.name in reached for r in results)
            if node.op != "call_function" or node.target is torch.ops.aten.detach.default:
                continue
            if _SHAPE_ONLY.match(getattr(getattr(node.target, "_schema", None), "name", "")):
                continue
            floats = any(
                isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
                for value in pytree.tree_leaves(node.meta.get("val"))
            )
            if floats and any(source.name in reached for source in node.all_input_nodes):
                reached.add(node.name)
        return ()


class Originals:
    """The model of one module, to be run for gradients.

    What runs is a shadow of the model, with tensors of its own in the place of the parameters: their hooks are for
    gradients that arrive, and other threads may use the model meanwhile. ``refusal`` says why the model computes
    something else than its programs, if it does; then there are no gradients.
    """

    def __init__(self, model: nn.Module, refusal: str = "") -> None:
        self._model = model
        self._refusal = refusal
        self._lock = ForkSafeLock()
        self._shadow: tuple[object, nn.Module] | None = None

    def run(
        self, state: object, call: FlatCall, inputs: Sequence[Tensor], stand_ins: Mapping[int, Tensor]
    ) -> tuple[Any, Sequence[Any]]:
        """The model's output for ``call`` with ``inputs``, and ``stand_ins`` by identity in the place of weights, and
        the call's objects as the model leaves them; ``state`` is equal while the model computes the same. Raises
        MaskError for a model without its mask."""
        if self._refusal:
            raise MaskError(f"{self._refusal}, and gradients are found by calling it again")
        named = (*self._model.named_parameters(), *self._model.named_buffers())
        weights = {name: stand_ins[id(tensor)] for name, tensor in named if id(tensor) in stand_ins}
        (args, kwargs), objects = call.rebuilt(inputs)
        with self._lock, _recomputing():
            if self._shadow is None or self._shadow[0] != state:
                self._shadow = state, Shadow(self._model).module
            return torch.func.functional_call(self._shadow[1], weights, args, kwargs), objects


@dataclass(frozen=True)
class Recorded:
    """What a program's backward pass needs to know about its model.

    ``aliases`` are positions of results that are views of inputs and parameters, which autograd knows already.
    ``state`` gives a value that stays equal to ``now``, that of the call, while the ``originals`` compute what the
    program does.
    """

    routes: Routes
    output: OutputSpec
    aliases: Collection[int]
    originals: Originals
    state: Callable[[], object]
    now: object


@dataclass(frozen=True)
class _Recomputation:
    """One call of a program: what its backward pass needs besides tensors.

    Of the tensors that are kept for it, the first are those that gradients are for, ``identities`` says which these
    are, and ``places`` which of all is each of the inputs. ``positions`` are those of the program's results that have
    gradients; ``random`` the states of the generators before the call.
    """

    recorded: Recorded
    call: FlatCall
    identities: tuple[int, ...]
    places: tuple[int, ...]
    positions: tuple[int, ...]
    random: tuple[Tensor, Tensor | None] | None

    def check(self) -> None:
        """Raise FuserError if the model has changed since the call."""
        if self.recorded.state() != self.recorded.now:
            raise FuserError(_CHANGED)

    def gradients(
        self, kept: Sequence[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the first of the ``kept`` tensors, where they are ``needed``, from those of the results;
        differentiable in their turn where autograd asks for that."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # One may have been computed from another, whose gradients must not be counted here as well.
            ours = [t.view_as(t) if again else t.detach().requires_grad_() for t, _ in zip(kept, needed, strict=False)]
            tensors = [*ours, *kept[len(ours) :]]
            inputs = [tensors[place] for place in self.places]
            with self._modes(inputs):
                stand_ins = dict(zip(self.identities, ours, strict=True))
                output, objects = self.recorded.originals.run(self.recorded.now, self.call, inputs, stand_ins)
            results = self.recorded.output.tensors(output, objects)
            pairs = [
                (results[position], gradient)
                for position, gradient in zip(self.positions, given, strict=True)
                if gradient is not None and results[position].requires_grad
            ]
            if not pairs:
                return [None] * len(needed)
            wanted = [tensor for tensor, need in zip(ours, needed, strict=True) if need]
            outputs, gradients = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=again, allow_unused=True))
            return [next(found) if need else None for need in needed]

    @contextlib.contextmanager
    def _modes(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """The modes and random numbers of the call."""
        device = _device_of(inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if self.random is not None:
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                cpu, gpu = self.random
                torch.set_rng_state(cpu)
                if gpu is not None:
                    torch.cuda.set_rng_state(gpu, device)
            yield


def _device_of(inputs: Sequence[Tensor]) -> torch.device:
    return inputs[0].device if inputs else torch.device("cpu")


class _Backward(torch.autograd.Function):
    """Results of a program as functions of the call's inputs and parameters."""

    @staticmethod
    def forward(
        ctx: Any, recomputation: _Recomputation, rest: Sequence[Tensor], results: Sequence[Tensor], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recomputation = recomputation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sources, *rest)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.recomputation.check()
        return (
            *(None, None, None),
            *ctx.recomputation.gradients(ctx.saved_tensors, ctx.needs_input_grad[3:], gradients),
        )


def run_recorded(
    run: Callable[[FlatCall], list[Tensor]], call: FlatCall, sources: Sequence[Tensor], recorded: Recorded
) -> list[Tensor]:
    """The results of a program, ``run``, with gradients to ``sources``, those of :meth:`Routes.sources`."""
    routes, aliases = recorded.routes, recorded.aliases
    random = None
    if routes.is_random:
        device = _device_of(call.tensors)
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    results = run(call)
    positions = tuple(i for i, reached in enumerate(routes.reached(call.tensors)) if reached and i not in aliases)
    if not positions:
        return results
    # A result that shares its memory with another that has gradients stays the view that it is, which autograd follows.
    storages = [results[i].untyped_storage().data_ptr() for i in positions]
    own = [
        results[i] if storages.count(storage) > 1 else results[i].detach()
        for i, storage in zip(positions, storages, strict=True)
    ]
    results = [r if i in aliases else r.detach() for i, r in enumerate(results)]
    kept = {id(tensor): tensor for tensor in (*sources, *call.tensors)}
    identities = list(kept)
    places = tuple(identities.index(id(tensor)) for tensor in call.tensors)
    ours = tuple(identities[: len(sources)])
    recomputation = _Recomputation(recorded, call.frozen(), ours, places, positions, random)
    # What was made in inference mode cannot be kept for a backward pass.
    rest = [t.clone() if t.is_inference() else t for t in list(kept.values())[len(sources) :]]
    found = _Backward.apply(recomputation, rest, own, *sources)  # type: ignore[no-untyped-call]
    for position, result in zip(positions, found, strict=True):
        results[position] = result
    return results
