"""What an exported graph may not do, and what of it programs do not need."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fuser.ir.errors import CaptureError


def check_writes(program: torch.export.ExportedProgram) -> dict[int, str]:
    """Refuse writes to what outlives a call and is no input, since a signature does not mention those to plain tensors,
    and results in the memory of inputs that are written. Those that are such an input itself are told by position."""
    graph, given = program.graph, frozenset(program.graph_signature.user_inputs)
    lasting = {_storage(node): node for node in graph.nodes if node.op == "placeholder" and not _is_copied(node)}
    written: dict[int | None, torch.fx.Node] = {}
    for node in graph.nodes:
        if not is_mutable(node):
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


def updates_last(
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


def drop_detaching(graph: torch.fx.Graph) -> None:
    """Take a tensor of numbers in the model's code as it is, which ``torch.tensor`` detaches in place: to make a whole
    graph functional for that alone takes longer than to trace it. What is returned stays, since the graph would keep
    the very stand-in that the model has returned."""
    for node in list(graph.nodes):
        made = node.args[0] if node.target is torch.ops.aten.detach_.default else None
        returned = any(user.op == "output" for user in node.users)
        if isinstance(made, torch.fx.Node) and made.target in _LIFTING and not returned:
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def drop_unread(graph: torch.fx.Graph) -> None:
    """Take away what nothing reads, such as the average of attention's weights where only its values are used."""
    for node in reversed(graph.nodes):
        if node.users or not isinstance(node.target, torch._ops.OpOverload) or node.meta.get("val") is None:
            continue
        if not is_mutable(node) and torch.Tag.nondeterministic_seeded not in node.target.tags:
            graph.erase_node(node)


def share_roundings(graph: torch.fx.Graph) -> None:
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


def check_nodes(graph: torch.fx.Graph, device: torch.device) -> None:
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


def is_mutable(node: torch.fx.Node) -> bool:
    """Whether a node's operator writes in place."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def reads_a_part(node: torch.fx.Node) -> bool:
    """Whether this is a plain tensor that a parameter consists of."""
    return str(node.target) == "export.access_subclass_inner_tensor.default"
