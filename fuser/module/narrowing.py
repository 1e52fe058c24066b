"""Which values of a graph with products in eight bits are stored in bf16."""

from __future__ import annotations

import dataclasses

import torch

from fuser.ir.graph import Operator, OperatorGraph, is_kind
from fuser.ir.operators import (
    PV,
    QK,
    ChangeScores,
    LogSumExp,
    PredictedAttention,
    Product,
    QuantizedGemm,
    Rotary,
    Scale,
    ScoreMask,
    Softmax,
)
from fuser.ir.target import Target
from fuser.kernels.gemm import multiplies_bf16

Place = tuple[str, int]
"""An operator's name and the position of one of its inputs."""
_OF_SCORES = (Scale, ChangeScores, ScoreMask, Softmax)
"""Operators that make scores of their first input."""


def narrows(target: Target) -> bool:
    """Whether a target gains by it: attention multiplies pairs of bf16 numbers there, and one instruction rounds."""
    return target.kind == "cpu" and multiplies_bf16(target)


def narrowed(graph: OperatorGraph) -> OperatorGraph:
    """``graph`` with those values in bf16 that only a :class:`QuantizedGemm` reads, which rounds them anyway, and with
    the attention between such products in bf16 as a whole: queries, keys, values and result. All else keeps its dtype,
    the residual stream above all."""
    found, places = set[str](), {(op.name, 0) for op in graph.operators if is_kind(op, QuantizedGemm)}
    attentions = [a for op in graph.operators if (a := _attention(graph, op)) is not None]
    places.update(place for read, _ in attentions for place in read)
    for op in graph.operators:
        makes = op.expression is not None or isinstance(op.semantics, (Product, PV, PredictedAttention, Rotary))
        found.update(v for v in op.outputs if makes and _may_be_narrow(graph, v, places))
    # An attention has one dtype, so that one value that has to stay keeps the others, and those of what shares them.
    while broken := {v for _, values in attentions if not values <= found for v in values} & found:
        found -= broken
    values = {
        name: dataclasses.replace(spec, dtype=torch.bfloat16) if graph.base(name) in found else spec
        for name, spec in graph.values.items()
    }
    return dataclasses.replace(graph, values=values)


def _may_be_narrow(graph: OperatorGraph, value: str, places: set[Place]) -> bool:
    """Whether a value is of fp32, in storage of its own, and read at these places alone."""
    spec = graph.values[value]
    if spec.base is not None or spec.dtype != torch.float32 or value in graph.states or graph.escapes(value):
        return False
    readers = graph.readers(value)
    read = [(op.name, i) for op in readers for i, source in enumerate(op.inputs) if graph.base(source) == value]
    return bool(read) and places.issuperset(read)


def _attention(graph: OperatorGraph, op: Operator) -> tuple[set[Place], set[str]] | None:
    """Where the attention that begins with ``op`` reads queries, keys and values, and the names of these and of its
    result; None for other operators, and where its scores are used for anything else."""
    if is_kind(op, PredictedAttention):
        return _places(graph, (op, (0, 1, 2)), result=op.output)
    if not is_kind(op, QK):
        return None
    pending = [op.output]
    found: list[Operator] = []
    while pending:
        value = pending.pop()
        if graph.escapes(value):
            return None
        for reader in graph.readers(value):
            if is_kind(reader, PV) and reader.inputs[0] == value:
                found.append(reader)
            elif isinstance(reader.semantics, _OF_SCORES) and reader.inputs[0] == value:
                pending.append(reader.output)
            elif not is_kind(reader, LogSumExp):
                return None
    if len(found) != 1:
        return None
    return _places(graph, (op, (0, 1)), (found[0], (1,)), result=found[0].output)


def _places(graph: OperatorGraph, *reads: tuple[Operator, tuple[int, ...]], result: str) -> tuple[set[Place], set[str]]:
    places = {(op.name, i) for op, positions in reads for i in positions}
    values = {graph.base(op.inputs[i]) for op, positions in reads for i in positions}
    return places, values | {graph.base(result)}
