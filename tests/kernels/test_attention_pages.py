"""Attention by a plan that is a value of the graph: a table of the places of keys in a buffer, known at run time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuser.codegen.assemble import assemble
from fuser.codegen.choice import Kernel
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.masks import Dense
from fuser.ir.operators import PV, QK, Scale, Softmax
from fuser.ir.target import Target, emulated_target
from fuser.kernels.attention import (
    AttentionFamily,
    AttentionMatch,
    CpuAttention,
    Launch,
    Operands,
    cached_plan,
    call_of,
)
from fuser.kernels.attention_cuda import CudaAttention
from fuser.kernels.base import STORAGE, Cost, Implementation, KernelCall, Literal
from fuser.kernels.plan import AttentionPlan, Group
from fuser.module.compiler import load_kernels
from fuser.runtime.cache import default_cache
from fuser.runtime.cuda_program import arena_of, program_of
from fuser.runtime.device import cpu_target
from fuser.runtime.program import CPU, Program
from fuser.search.partition import predicted

HEADS, ROWS, CAPACITY, DIM, THREADS = 2, 6, 200, 32, 2
ROW, BUFFER = (TensorSpec.contiguous((1, HEADS, n, DIM), torch.float32) for n in (ROWS, CAPACITY))
OPERANDS = Operands(ROW, BUFFER, BUFFER, ROW)
SCALE = 1 / math.sqrt(DIM)
KINDS: dict[str, tuple[Callable[[], Target], type[Implementation[AttentionMatch, Any]]]] = {
    "cpu": (cpu_target, CpuAttention),
    "cuda": (emulated_target, CudaAttention),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class ByTable(Implementation[AttentionMatch, Any]):
    """The same kernel with a plan in the value ``table``, which lies in memory as that of ``like`` does."""

    like: AttentionPlan

    def cost(self, match: AttentionMatch, parameters: Any, target: Target) -> Cost:
        return Cost(0.0, 0.0)

    def call(self, match: AttentionMatch, parameters: Any, target: Target, threads: int) -> KernelCall:
        reads = (match.q, match.k, match.v)
        call = call_of(self.like, OPERANDS, reads, (match.out,), match.scale, parameters, target, threads)
        tensors = tuple("table" if isinstance(ref, Literal) else ref for ref in call.tensors)
        return dataclasses.replace(call, tensors=tensors)


def plan_of(places: np.ndarray) -> AttentionPlan:
    """Row ``r`` sees the keys at the first ``len(places) - ROWS + 1 + r`` of ``places``."""
    seen = np.arange(len(places))[None] <= len(places) - ROWS + np.arange(ROWS)[:, None]
    lanes = (seen.astype(np.uint64) << np.arange(ROWS, dtype=np.uint64)[:, None]).sum(0, dtype=np.uint64)
    none = np.zeros((0, 3), np.int32)
    group = Group(np.arange(ROWS, dtype=np.int32), none, places.astype(np.int32), lanes, 16)
    return AttentionPlan.of(ROWS, CAPACITY, [group])


def launch(kind: str, plan: AttentionPlan) -> Launch:
    """How the kernel of ``kind`` wants a plan."""
    make, implementation = KINDS[kind]
    _, match = matched(make(), torch.zeros(1))
    parameters = implementation().space(match, make())[0]
    launched: Launch = parameters.launch(plan, OPERANDS, SCALE, make(), THREADS)
    return launched


def matched(target: Target, table: Tensor) -> tuple[OperatorGraph, AttentionMatch]:
    operators = (
        Operator("qk", QK(), ("q", "k"), ("scores",)),
        Operator("scale", Scale(SCALE), ("scores",), ("scaled",)),
        Operator("softmax", Softmax(False), ("scaled",), ("p",)),
        Operator("pv", PV(), ("p", "v"), ("out",)),
    )
    scores = TensorSpec.contiguous((1, HEADS, ROWS, CAPACITY), torch.float32)
    values = {"q": ROW, "k": BUFFER, "v": BUFFER, "out": ROW, **dict.fromkeys(("scores", "scaled", "p"), scores)}
    values["table"] = TensorSpec.contiguous(table.shape, table.dtype)
    graph = OperatorGraph(operators, values, ("q", "k", "v", "table"), ("out",), {})
    match = AttentionFamily().match(graph.group(operators), target)
    assert match is not None
    return graph, match


def program(kind: str, table: Tensor, like: AttentionPlan | None = None) -> Program:
    """Attention by tables like ``table``, which is that of ``like``, or by the plan of all keys."""
    make, plain = KINDS[kind]
    target = make()
    graph, match = matched(target, table)
    implementation = plain() if like is None else ByTable(like)
    kernel = Kernel(AttentionFamily(), implementation, match.group, match, plain().space(match, target)[0])
    assembly = assemble(graph, [predicted(match.group, kernel, target)], target, THREADS)
    constants = [ref.tensor for ref in assembly.plan.constants if isinstance(ref, Literal)]
    kernels = load_kernels(assembly, target, default_cache())
    return program_of(assembly.plan, kernels, constants, target, arena_of(CPU))


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, n, DIM, generator=generator) for n in (ROWS, CAPACITY, CAPACITY)]


def tensor(made: Launch) -> Tensor:
    return torch.from_numpy(made.plan.array.copy())


@kinds
@pytest.mark.parametrize("count", [17, 90])
def test_one_program_serves_every_table_of_its_size(kind: str, count: int) -> None:
    generator, q_k_v = np.random.default_rng(0), tensors(0)
    tables = [generator.permutation(CAPACITY)[:count] for _ in range(3)]
    first = launch(kind, plan_of(tables[0]))
    serving = program(kind, tensor(first), plan_of(tables[0]))
    for places in tables:
        made = launch(kind, plan_of(places))
        assert made.extents == first.extents and made.plan.array.shape == first.plan.array.shape
        (got,) = serving([*q_k_v, tensor(made)])
        q, k, v = (t.double() for t in q_k_v)
        k, v = k[:, :, places], v[:, :, places]
        allowed = torch.ones(ROWS, count, dtype=torch.bool).tril(count - ROWS)
        scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(~allowed, -math.inf)
        exact = scores.softmax(-1) @ v
        assert float((got.double() - exact).abs().max()) <= 8e-7 * float(exact.abs().max())


@kinds
def test_the_plan_as_a_value_gives_what_it_gives_as_a_constant(kind: str) -> None:
    target = KINDS[kind][0]()
    plan = cached_plan(Dense(), ROWS, CAPACITY, target)
    table, inputs = tensor(launch(kind, plan)), tensors(1)
    assert table.dtype in STORAGE
    (constant,) = program(kind, table)([*inputs, torch.zeros_like(table)])
    (value,) = program(kind, table, plan)([*inputs, table])
    assert torch.equal(constant, value)
