"""The outputs of a model as it returns them: with their strides, and sharing memory where the model's do."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Collection, Sequence

import torch
import torch.utils._pytree as pytree
from torch import fx

from fuser.frontend.raising import Raiser, storage_of
from fuser.frontend.sizes import traced
from fuser.ir.graph import ViewCalls
from fuser.ir.operators import Ref, TorchCall

aten = torch.ops.aten


def outputs_of(r: Raiser, leaves: Sequence[fx.Node], updates: int = 0) -> tuple[tuple[str, ...], dict[int, ViewCalls]]:
    """The values to return, and by position the views that make outputs of inputs or parameters. So many ``updates`` at
    the end are contents for inputs, which no others may be views of."""
    names: dict[int, str] = {}
    aliases: dict[int, ViewCalls] = {}
    sharing: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        calls = _view_calls(r, leaf) if position < len(leaves) - updates else None
        if calls is None:
            sharing.setdefault(storage_of(leaf), []).append(position)
        else:
            aliases[position] = calls
            names[position] = r.root(leaf).name
    taken: set[str] = set()
    for positions in sharing.values():
        found = _together(r, [leaves[p] for p in positions], taken)
        taken.update(map(r.memory, found))
        names.update(zip(positions, found, strict=True))
    return tuple(names[position] for position in range(len(leaves))), aliases


def _together(r: Raiser, leaves: Sequence[fx.Node], taken: Collection[str]) -> list[str]:
    """Values for outputs that share the memory of their root: as they lie if that is how the model has them, else
    in a copy of the root."""
    values = [traced(leaf) for leaf in leaves]
    realized = [r.realize(r.view(leaf)) for leaf in leaves]
    if len(realized) == 1 and realized[0] in r.roomy and realized[0] not in taken:
        return realized
    specs = [r.values[name] for name in realized]
    (base, *more) = {spec.base or name for name, spec in zip(realized, specs, strict=True)}
    memory = r.memory(base)
    if (
        not more
        and memory not in taken
        and memory not in r.constants
        and (memory not in r.captured.inputs or r.root(leaves[0]).op == "placeholder")
        and all(spec.has_strides(value.strides) for spec, value in zip(specs, values, strict=True))
        and len({s.offset - v.offset for s, v in zip(specs, values, strict=True)}) == 1
    ):
        offset = specs[0].offset - values[0].offset
    else:
        root = r.root(leaves[0])
        if not r.is_whole(root) or any(v.dtype != traced(root).dtype for v in values):
            return [r.copied(leaf, "a copy to return").base for leaf in leaves]
        base = r.copied(root, "a copy to return").base
        offset = -traced(root).offset
    return [
        r.alias(f"{leaf.name}_output", base, value.shape, value.strides, offset + value.offset)
        for leaf, value in zip(leaves, values, strict=True)
    ]


def _view_calls(r: Raiser, leaf: fx.Node) -> ViewCalls | None:
    """The views that make an output of an input or parameter; None for what the model computes."""
    if r.root(leaf).op != "placeholder":
        return None
    calls: list[tuple[TorchCall, int]] = []
    node, index = leaf, 0
    while node.op != "placeholder":
        source, *rest = node.args
        if not isinstance(source, fx.Node) or any(
            isinstance(a, fx.Node) for a in pytree.tree_leaves((rest, node.kwargs))
        ):
            return None
        if node.target is python_operator.getitem:
            node, index = source, rest[0]
            continue
        if node.target is aten.lift_fresh.default:
            # A tensor that the model writes down, new in every call.
            return None
        calls.append((TorchCall(node.target, (Ref(0), *rest), tuple(node.kwargs.items())), index))
        node, index = source, 0
    return tuple(reversed(calls))
