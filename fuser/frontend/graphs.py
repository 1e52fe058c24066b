"""From a captured model to its operators: one walk over its graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fuser.frontend import attention_patterns, int8_patterns, rotary_patterns
from fuser.frontend.aten import HANDLERS
from fuser.frontend.attention_masks import at_scores
from fuser.frontend.attention_operators import attention_from, multiplied
from fuser.frontend.captured import Captured
from fuser.frontend.outputs import outputs_of
from fuser.frontend.raising import Raiser
from fuser.frontend.rotary_operators import rotary_from
from fuser.frontend.views import Value
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import CaptureError
from fuser.ir.graph import OperatorGraph, ViewCalls
from fuser.kernels.base import FLOATING


def raise_graph(
    captured: Captured,
    attention: AttentionSpec | None = None,
    floating: frozenset[torch.dtype] = FLOATING,
    sample: Mapping[str, int] | None = None,
) -> OperatorGraph:
    """The operator graph of a captured model; of one with named sizes, the graph that is right for the ``sample`` of
    these and for all others for which its assumptions are true.

    ``attention`` has a mask that every self-attention (as many keys as queries) is restricted to, and says which scores
    are computed with few bits; ``floating`` holds the dtypes that kernels of the target store
    (:func:`fuser.kernels.base.floating`). Raises CaptureError for graphs that mutate tensors that are no inputs.
    """
    r = Raiser(captured, attention, floating, sample or {})
    roles = attention_patterns.find(captured.graph.graph, r.known_number)
    rotations = rotary_patterns.find(captured.graph.graph)
    products = int8_patterns.find(captured.graph.graph)
    outputs: tuple[str, ...] = ()
    aliases: dict[int, ViewCalls] = {}
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            r.env[node] = r.placeholder(node)
        elif node.op == "call_function":
            if node not in r.env:
                # Nodes inside of these patterns are raised, too: what nothing reads is left out at the end.
                whole = rotary_from(r, node, rotations[node]) if node in rotations else None
                whole = int8_patterns.product_from(r, node, products[node]) if node in products else whole
                r.env[node] = whole or (_written_out(r, node, roles[node]) if node in roles else _handled(r, node))
        elif node.op == "output":
            outputs, aliases = outputs_of(r, node.args[0], len(captured.updated))
        elif node.op != "get_attr":
            raise CaptureError(f"the captured graph holds a {node.op} that fuser does not know")
    return r.finish(captured.inputs, outputs, aliases, captured.updated)


def _handled(r: Raiser, node: fx.Node) -> Value:
    handler = HANDLERS.get(node.target) or HANDLERS.get(str(node.target))
    value = handler(r, node) if handler else None
    return r.extern(node) if value is None else value


def _written_out(r: Raiser, node: fx.Node, role: attention_patterns.Role) -> Value:
    """The last product of attention stands for all of it."""
    p = role.pattern
    if role.part != "pv" or p is None:
        return ()
    k = r.view(p.k)
    key = k.permute((*range(len(k.dims) - 2), len(k.dims) - 1, len(k.dims) - 2))
    batch = p.shape[:-2]
    keys = (batch[0], 1) if p.one_head else batch
    operands = (r.view(p.q), batch), (key, keys), (r.view(p.v), keys)
    q, key, v = (r.reshaped(t, (*lead, *t.shape[-2:])) for t, lead in operands)
    for use in p.factors:
        q = multiplied(r, p.q, q, at_scores(r, use, r.view(use.node), p.shape))
    return attention_from(r, node, q, key, v, p.scale, p.masks, rule=p.rule)
