"""Products whose weights a model has as integers already: on these very integers, as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fuser.ir.evaluation import value_of
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec, is_kind
from fuser.ir.operators import FakeQuantize, FakeQuantizeAsFound, Gemm, Int8Gemm, Int8WeightGemm, Ref, TorchCall
from fuser.ir.quantization import Fixed, recovered_scales, rounding_of
from fuser.ir.target import Target
from fuser.kernels.operands import row_stride


def with_stored_integers(graph: OperatorGraph, parameters: Mapping[str, Tensor], target: Target) -> OperatorGraph:
    """``graph`` with products whose weights are made of int8 tensors and a scale for each output, as ``torch.ao``
    writes them (``dequantize_per_channel``), as torchao does (int8 weights only) or as products, on these very
    integers, and on those of activations that are rounded to eight bits where the target has a kernel for them."""
    operators, values, constants = list(graph.operators), dict(graph.values), dict(graph.constants)

    def add(name: str, sources: tuple[str, ...], call: TorchCall, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        values[name] = TensorSpec.contiguous(shape, dtype)
        constants[name] = Constant(name, sources, call)
        return name

    for position, op in enumerate(graph.operators):
        if not is_kind(op, Gemm) or op.inputs[1] not in constants:
            continue
        found = _stored_integers(graph, op, parameters)
        if found is None:
            continue
        weight, (parts, made, transposed) = op.inputs[1], found
        stored = parts[0]
        if len(parts) > 1:
            join = TorchCall(torch.cat, ([Ref(i) for i in range(len(parts))],))
            stored = add(f"{weight}_integers", parts, join, graph.values[weight].shape, torch.int8)
        outputs = values[stored].shape[0 if transposed else 1]
        scales = add(f"{weight}_scales", (weight, stored), made, (outputs,), torch.float32)
        inputs = (op.inputs[0], stored, scales)
        product: Operator = Operator(op.name, Int8WeightGemm(transposed), inputs, op.outputs)
        rounded = _of_rounded(graph, product) if target.device == "cpu" else None
        if rounded is not None:
            product, rounding = rounded
            if rounding is not None:
                add(product.inputs[-1], (), TorchCall(Fixed(rounding)), (3,), torch.float32)
        operators[position] = product
    if operators == list(graph.operators):
        return graph
    changed = dataclasses.replace(graph, operators=tuple(operators), values=values, constants=constants)
    return changed.without_unread()


def _of_rounded(graph: OperatorGraph, product: Operator) -> tuple[Operator, Tensor | None] | None:
    """A product with a stored weight of what is rounded to eight bits, as one of the integers, and its last input where
    that is constant."""
    x, integers, scales = product.inputs
    source = graph.producer.get(x)
    if source is None or not isinstance(product.semantics, Int8WeightGemm):
        return None
    rounding, rows = source.semantics, source.inputs[0]
    if not isinstance(rounding, FakeQuantize | FakeQuantizeAsFound):
        return None
    semantics = Int8Gemm(product.semantics.transposed, rounding.low, rounding.high, None)
    if graph.values[x].shape[-1] > semantics.max_terms:
        return None
    if graph.values[rows].shape != graph.values[x].shape or row_stride(graph.values[rows]) is None:
        return None
    given, made = source.inputs[-1], None
    if isinstance(rounding, FakeQuantize):
        given, made = f"{product.name}_rounding", rounding_of(rounding.scale, rounding.zero_point)
    return Operator(product.name, semantics, (rows, integers, scales, given), product.outputs), made


def _stored_integers(
    graph: OperatorGraph, op: Operator[Gemm], parameters: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], TorchCall, bool] | None:
    """The int8 tensors that the weight of a product is made of, one behind the other, what gives its scales, and
    whether they are (N, K)."""
    weight = op.inputs[1]
    if graph.values[weight].dtype != torch.float32:
        return None
    for turned in (False, True):
        stored = _integers_of(graph, weight, turned)
        if not stored or (turned and len(stored) > 1):
            continue
        transposed = op.semantics.transposed != turned
        made = TorchCall(recovered_scales, (Ref(0), Ref(1), transposed, turned))
        known: dict[str, Tensor] = {}
        whole, *parts = (value_of(v, graph.constants, parameters, known) for v in (weight, *stored))
        try:
            made(whole, torch.cat(parts) if len(parts) > 1 else parts[0])
        except ValueError:
            continue
        return stored, made, transposed
    return None


def _integers_of(graph: OperatorGraph, weight: str, turned: bool) -> tuple[str, ...]:
    """The int8 tensors of the shape of a weight, or, ``turned``, of its transposed, that it is made of: one, or one for
    each of the weights that it joins. None where that is not clear."""
    constant, call = graph.constants[weight], graph.constants[weight].call
    if call is not None and call.target is torch.cat and len(call.args) == 1 and not call.kwargs:
        parts = [_integers_of(graph, source, turned) for source in constant.sources]
        return tuple(v for part in parts for v in part) if all(len(part) == 1 for part in parts) else ()
    shape = graph.values[weight].shape
    shape = shape[::-1] if turned else shape
    specs = {v: graph.values[v] for v in graph.with_sources([weight])}
    found = [v for v, spec in specs.items() if spec.dtype == torch.int8 and spec.shape == shape]
    return tuple(found) if len(found) == 1 else ()
