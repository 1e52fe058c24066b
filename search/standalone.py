"""Regions and groups as graphs of their own, which programs can be made of and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fuser.codegen.choice import GroupChoice
from fuser.ir.graph import OperatorGraph, Region, TensorSpec


def standalone(region: Region) -> Region:
    """The same operators as a region in a graph of their own, which a program can be made of.

    Values from outside are inputs under their own names; one that is not laid out densely becomes a view of an input
    ``NAME.storage``, since programs take contiguous tensors. States that they write stay states.
    """
    graph = region.graph
    whole = graph.group(region.operators)
    views = [op for op in graph.operators if graph.is_alias(op) and graph.source(op.output) in whole]
    keep = sorted([*whole.operators, *views], key=lambda op: graph.position[op.name])
    names = dict.fromkeys(v for op in keep for v in (*op.inputs, *op.outputs))
    names.update(dict.fromkeys(graph.base(v) for v in list(names)))
    values = {v: graph.values[v] for v in names}
    inputs = []
    for base in dict.fromkeys(graph.base(v) for v in whole.inputs):
        spec = graph.values[base]
        if base in graph.constants or base in whole.mutates:
            continue
        if spec.is_contiguous:
            values[base] = TensorSpec.contiguous(spec.shape, spec.dtype)
            inputs.append(base)
            continue
        storage = f"{base}.storage"
        values[storage] = TensorSpec.contiguous((spec.extent,), spec.dtype)
        inputs.append(storage)
        for v in names:
            if graph.base(v) == base:
                values[v] = dataclasses.replace(values[v], base=storage)
    constants = {v: graph.constants[v] for v in graph.with_sources(v for v in names if v in graph.constants)}
    values.update({v: graph.values[v] for v in constants})
    alone = OperatorGraph(tuple(keep), values, tuple(inputs), whole.outputs, constants, states=whole.mutates)
    return Region(alone, whole.operators)


def subgraph(choices: Sequence[GroupChoice]) -> OperatorGraph:
    """The operators of some groups as a graph of its own."""
    graph = choices[0].group.graph
    names = {op.name for choice in choices for op in choice.group.operators}
    return standalone(Region(graph, tuple(op for op in graph.compute if op.name in names))).graph
