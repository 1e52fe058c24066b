"""Which rows are rounded to eight bits by the kernel that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator

import torch

from fuser.ir.graph import Operator, OperatorGraph, TensorSpec, is_kind
from fuser.ir.operators import CodeGemm, QuantizedGemm, QuantizeRows


def rounded(graph: OperatorGraph, stored: Collection[torch.dtype]) -> OperatorGraph:
    """``graph`` with the rows that a :class:`QuantizedGemm` would round already rounded behind the operator that makes
    them, where that reduces along rows: its kernel has whole rows at hand, and what reads codes has less to read. Other
    kernels have rows in parts, so that the product's rounds them as it packs them. Kernels compute on what is
    ``stored`` as one of these dtypes."""
    values, products = dict(graph.values), dict[str, Operator]()
    makers: dict[str, dict[tuple[Hashable, ...], Operator]] = {}
    for op in graph.operators:
        source = graph.producer.get(op.inputs[0]) if is_kind(op, QuantizedGemm) else None
        if source is None or source.expression is None or not source.expression.has_reduction:
            continue
        assert isinstance(op.semantics, QuantizedGemm)
        (x, weight, *factors), codes = op.inputs, op.semantics.codes
        spec = graph.values[x]
        if not spec.is_contiguous or spec.dtype not in stored:
            continue
        known, key = makers.setdefault(x, {}), (codes, *factors)
        if key not in known:
            name = f"{x}_{len(known)}"
            made = f"{name}_codes", f"{name}_scales"
            values[made[0]] = TensorSpec.contiguous(spec.shape, codes)
            values[made[1]] = TensorSpec.contiguous((*spec.shape[:-1], 1), torch.float32)
            known[key] = Operator(f"{name}_rounded", QuantizeRows(codes, bool(factors)), (x, *factors), made)
        rows, scales = known[key].outputs
        inputs = (rows, weight, *factors, scales)
        products[op.name] = dataclasses.replace(op, semantics=CodeGemm(op.semantics.transposed, codes), inputs=inputs)

    def operators() -> Iterator[Operator]:
        for op in graph.operators:
            yield products.get(op.name, op)
            for value in op.outputs:
                yield from makers.get(value, {}).values()

    return dataclasses.replace(graph, operators=tuple(operators()), values=values)
