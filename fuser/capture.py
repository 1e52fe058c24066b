"""From a model and example inputs to an ATen graph over flat tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser.ir.errors import CaptureError

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class FlatCall:
    """One call of a module as flat tensors: ``tensors`` in order, and what is needed to put the arguments together."""

    tensors: tuple[Tensor, ...]
    key: Signature
    """Shapes, dtypes and the other arguments: calls with equal keys run one program."""
    unflatten: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FlatCall:
    """Split the arguments of a call into tensors and the rest.

    Raises CaptureError for arguments that are neither tensors nor plain values, since a program is specialized on
    them.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    key: list[Any] = [spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            key.append((tuple(leaf.shape), leaf.dtype, leaf.device.type))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            key.append((type(leaf), leaf))
        else:
            raise CaptureError(f"an argument is a {type(leaf).__name__}; pass tensors and plain Python values")
    template = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def unflatten(values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(template)
        for slot, value in zip(slots, values, strict=True):
            filled[slot] = value
        result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(filled, spec)
        return result

    return FlatCall(tensors, tuple(key), unflatten)


@dataclass(frozen=True)
class OutputSpec:
    """How to rebuild a model's output from its flat tensors; everything that is not a tensor is a constant of the
    program."""

    build: Callable[[Sequence[Tensor]], Any]


def flatten_output(output: Any) -> tuple[list[Tensor], OutputSpec]:
    """Tensors of an output and its structure: pytrees (Hugging Face's outputs among them) and any dataclass.

    Raises CaptureError for objects that hold tensors where they cannot be seen.
    """
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and pytree.tree_is_leaf(output):
        names = [f.name for f in dataclasses.fields(output)]
        parts = [flatten_output(getattr(output, name)) for name in names]
        cls = type(output)
        counts = [len(tensors) for tensors, _ in parts]

        def build(values: Sequence[Tensor]) -> Any:
            fields, at = {}, 0
            for name, count, (_, spec) in zip(names, counts, parts, strict=True):
                fields[name] = spec.build(values[at : at + count])
                at += count
            return cls(**fields)

        return [t for tensors, _ in parts for t in tensors], OutputSpec(build)
    leaves, spec = pytree.tree_flatten(output)
    nested: dict[int, tuple[list[Tensor], OutputSpec]] = {}
    tensors: list[Tensor] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and len(leaves) > 1:
            nested[i] = flatten_output(leaf)
            tensors.extend(nested[i][0])
        elif not (leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device))):
            raise CaptureError(f"the model returns a {type(leaf).__name__}, which fuser cannot rebuild from tensors")
    fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    slots = {i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

    def rebuild(values: Sequence[Tensor]) -> Any:
        remaining = iter(values)
        filled = list(fixed)
        for i in range(len(filled)):
            if i in slots:
                filled[i] = next(remaining)
            elif i in nested:
                part, part_spec = nested[i]
                filled[i] = part_spec.build([next(remaining) for _ in part])
        return pytree.tree_unflatten(filled, spec)

    return tensors, OutputSpec(rebuild)


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
        self._call = call
        self._record = record

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._call.unflatten(tensors)
        flat, output = flatten_output(self.model(*args, **kwargs))
        self._record(output)
        return tuple(flat)


def capture(model: nn.Module, call: FlatCall) -> Captured:
    """Export ``model`` for one call with ``torch.export``.

    Raises CaptureError, with PyTorch's reason, for a model that depends on the values of its tensors, mutates its
    inputs or state, or uses what export does not support.
    """
    outputs: list[OutputSpec] = []
    wrapper = _Flat(model, call, outputs.append)
    # Fresh tensors: an example that aliases another, or requires grad, would be specialized on.
    examples = tuple(_example(t) for t in call.tensors)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # nn.TransformerEncoder's fast path is one opaque operator, which hides what is to be fused.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            program = torch.export.export(wrapper, examples, strict=False)
            if any(_is_mutable(node) for node in program.graph.nodes):
                # Operators that change an intermediate in place become functions.
                program = program.run_decompositions({})
    except Exception as error:
        raise CaptureError(f"the model could not be captured: {_first_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    signature = program.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise CaptureError(f"the model changes {', '.join(map(str, mutated))} in place while it runs")
    live = {**dict(wrapper.named_parameters(remove_duplicate=False)), **dict(wrapper.named_buffers(remove_duplicate=False))}
    parameters: dict[str, Tensor] = {}
    for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        parameters[name] = live[target]
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        parameters[name] = program.constants[target]
    if not outputs:
        raise CaptureError("the model returned nothing")
    inputs = tuple(spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT")
    return Captured(program.graph_module, parameters, inputs, outputs[-1])


def _is_mutable(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _example(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
