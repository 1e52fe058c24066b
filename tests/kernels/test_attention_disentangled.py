"""Attention that looks up what positions add to its scores, against float64: both parts and one, masks, storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import PV, QK, AdditiveMask, DisentangledBias, Scale, Softmax
from fuser.kernels.attention import AttentionFamily, CpuAttention
from fuser.kernels.attention_cuda import CudaAttention
from fuser.kernels.attention_disentangled import CpuDisentangledAttention
from fuser.kernels.base import materialized
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

BATCH, HEADS, WIDTH = 2, 3, 20
BOTH, QUERIES, KEYS = DisentangledBias(0.3, 0.2), DisentangledBias(0.3, None), DisentangledBias(None, 0.2)


def attention(
    how: DisentangledBias, rows: int, keys: int, positions: int, mask: torch.dtype | None = None
) -> tuple[OperatorGraph, dict[str, Tensor]]:
    """A graph of attention with positions, and its inputs."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = {"q": rows, "k": keys, "v": keys}
    tensors = {name: normal(BATCH, size, HEADS, WIDTH).transpose(1, 2) for name, size in sizes.items()}
    inputs = []
    for part, size in (("queries", rows), ("keys", keys)):
        if getattr(how, part) is not None:
            tensors[part] = normal(BATCH, HEADS, size, positions)
            tensors[f"{part}_at"] = torch.randint(positions, (rows + keys - 1,), generator=generator, dtype=torch.int32)
            inputs += [part, f"{part}_at"]
    if mask is not None:
        allowed = torch.rand(BATCH, 1, 1, keys, generator=generator) < 0.7
        allowed[..., 0] = True
        given = allowed if mask == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, -3e38)
        tensors["mask"] = given.expand(BATCH, HEADS, rows, keys)
        inputs.append("mask")
    values = {name: TensorSpec(tuple(t.shape), t.dtype, t.stride()) for name, t in tensors.items()}
    scores, out = (BATCH, HEADS, rows, keys), (BATCH, HEADS, rows, WIDTH)
    operators = [
        Operator("scores", QK(), ("q", "k"), ("scores",)),
        Operator("scaled", Scale(0.2), ("scores",), ("scaled",)),
        Operator("positions", how, tuple(inputs), ("positions",)),
        Operator("masked", AdditiveMask(), ("scaled", "positions"), ("masked",)),
        Operator("weights", Softmax(masked=True), ("masked",), ("weights",)),
        Operator("out", PV(), ("weights", "v"), ("out",)),
    ]
    values |= {op.output: TensorSpec.contiguous(scores, torch.float32) for op in operators[:-1]}
    values["out"] = TensorSpec.contiguous(out, torch.float32)
    return OperatorGraph(tuple(operators), values, tuple(tensors), ("out",), {}), tensors


def exact(how: DisentangledBias, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same in float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    q, k, v, *inputs = wide.values()
    (positions,) = how.evaluate(*inputs)
    return (0.2 * q @ k.mT + positions).softmax(-1) @ v


def run(graph: OperatorGraph, tensors: Mapping[str, Tensor]) -> Tensor:
    target, kernel = cpu_target(), CpuDisentangledAttention()
    match = AttentionFamily().match(graph.group(graph.operators), target)
    assert match is not None
    (parameters,) = kernel.space(match, target)
    call = kernel.call(match, parameters, target, 2)
    path = build([render(call.spec)], target, headers=header_folder(target))[call.spec.symbol]
    out = torch.full(graph.values["out"].shape, torch.nan)
    given = materialized(call.tensors, {**tensors, "out": out})
    assert load(path, call.spec.symbol).status(KernelArgs.pack([t.data_ptr() for t in given], call.extents, 2)) == 0
    return out


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("how", [BOTH, QUERIES, KEYS], ids=["both", "queries", "keys"])
def test_positions_are_looked_up(how: DisentangledBias, mask: torch.dtype | None) -> None:
    for rows, keys, positions in ((130, 130, 33), (1, 7, 5), (9, 201, 512)):
        graph, tensors = attention(how, rows, keys, positions, mask)
        wanted = exact(how, tensors)
        # Twice what attention without positions has.
        assert float((run(graph, tensors).double() - wanted).norm() / wanted.norm()) <= 2e-6


def test_forbidden_keys_of_a_row_that_allows_none_weigh_as_much_as_eager_has_them() -> None:
    graph, tensors = attention(BOTH, 5, 6, 4, torch.float32)
    tensors["mask"] = torch.full((BATCH, HEADS, 5, 6), torch.finfo(torch.float32).min)
    graph = dataclasses.replace(
        graph, values={**graph.values, "mask": TensorSpec.contiguous((BATCH, HEADS, 5, 6), torch.float32)}
    )
    # So low a number swallows any score.
    uniform = tensors["v"].double().mean(2, keepdim=True).expand(graph.values["out"].shape)
    assert float((run(graph, tensors).double() - uniform).norm() / uniform.norm()) <= 1e-6


def _spaces(graph: OperatorGraph) -> list[Sequence[object]]:
    target = cpu_target()
    match = AttentionFamily().match(graph.group(graph.operators), target)
    kernels = (CpuAttention(), CudaAttention(), CpuDisentangledAttention())
    return [] if match is None else [kernel.space(match, target) for kernel in kernels]


def test_no_other_kernel_takes_positions_that_are_not_stored() -> None:
    graph, _ = attention(BOTH, 5, 6, 4)
    *others, own = _spaces(graph)
    assert not any(others) and own
    half = {name: dataclasses.replace(graph.values[name], dtype=torch.bfloat16) for name in ("queries", "keys")}
    assert not any(_spaces(dataclasses.replace(graph, values={**graph.values, **half})))
