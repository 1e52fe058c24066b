"""Attention by a plan that is a value of the graph: a table of the places of keys in a buffer, known at run time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from fuser.codegen.assemble import assemble
from fuser.codegen.choice import Kernel
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import PV, QK, Scale, Softmax
from fuser.ir.target import Target
from fuser.kernels.attention import AttentionFamily, AttentionMatch, AttentionParameters, CpuAttention
from fuser.kernels.base import KernelCall, Literal
from fuser.kernels.plan import AttentionPlan, Group
from fuser.module.compiler import load_kernels
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target
from fuser.runtime.program import Program
from fuser.search.partition import predicted

HEADS, ROWS, CAPACITY, DIM = 2, 6, 40, 32


class ByTable(CpuAttention):
    """The same kernel with the plan in the value ``table``."""

    def call(self, match: AttentionMatch, parameters: AttentionParameters, target: Target, threads: int) -> KernelCall:
        call = super().call(match, parameters, target, threads)
        tensors = tuple("table" if isinstance(ref, Literal) else ref for ref in call.tensors)
        return dataclasses.replace(call, tensors=tensors)


def table_of(places: np.ndarray) -> Tensor:
    """The plan by which row ``r`` sees the keys at the first ``len(places) - ROWS + 1 + r`` of ``places``."""
    seen = np.arange(len(places))[None] <= len(places) - ROWS + np.arange(ROWS)[:, None]
    lanes = (seen.astype(np.uint64) << np.arange(ROWS, dtype=np.uint64)[:, None]).sum(0, dtype=np.uint64)
    none = np.zeros((0, 3), np.int32)
    group = Group(np.arange(ROWS, dtype=np.int32), none, places.astype(np.int32), lanes, 16)
    return torch.from_numpy(AttentionPlan.of(ROWS, CAPACITY, [group]).array.copy())


def program(implementation: CpuAttention, words: int) -> Program:
    operators = (
        Operator("qk", QK(), ("q", "k"), ("scores",)),
        Operator("scale", Scale(1 / math.sqrt(DIM)), ("scores",), ("scaled",)),
        Operator("softmax", Softmax(False), ("scaled",), ("p",)),
        Operator("pv", PV(), ("p", "v"), ("out",)),
    )
    scores = TensorSpec.contiguous((1, HEADS, ROWS, CAPACITY), torch.float32)
    rows, buffer = (TensorSpec.contiguous((1, HEADS, n, DIM), torch.float32) for n in (ROWS, CAPACITY))
    values = {"q": rows, "k": buffer, "v": buffer, "out": rows, **dict.fromkeys(("scores", "scaled", "p"), scores)}
    values["table"] = TensorSpec.contiguous((words,), torch.int64)
    graph = OperatorGraph(operators, values, ("q", "k", "v", "table"), ("out",), {})
    target, family, group = cpu_target(), AttentionFamily(), graph.group(operators)
    match = family.match(group, target)
    assert match is not None
    kernel = Kernel(family, implementation, group, match, implementation.space(match, target)[0])
    assembly = assemble(graph, [predicted(group, kernel, target)], target, 2)
    constants = [ref.tensor for ref in assembly.plan.constants]
    return Program(assembly.plan, load_kernels(assembly, target, default_cache()), constants)


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, n, DIM, generator=generator) for n in (ROWS, CAPACITY, CAPACITY)]


def test_one_program_serves_every_table_of_its_size() -> None:
    generator, q_k_v = np.random.default_rng(0), tensors(0)
    tables = [generator.permutation(CAPACITY)[:17] for _ in range(3)]
    serving = program(ByTable(), len(table_of(tables[0])))
    for places in tables:
        (got,) = serving([*q_k_v, table_of(places)])
        q, k, v = (t.double() for t in q_k_v)
        k, v = k[:, :, places], v[:, :, places]
        allowed = torch.ones(ROWS, 17, dtype=torch.bool).tril(17 - ROWS)
        scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(~allowed, -math.inf)
        exact = scores.softmax(-1) @ v
        assert float((got.double() - exact).abs().max()) <= 8e-7 * float(exact.abs().max())


def test_the_plan_as_a_value_gives_what_it_gives_as_a_constant() -> None:
    fixed = program(CpuAttention(), 1)
    (ref,) = fixed.plan.constants
    assert isinstance(ref, Literal)
    plan = torch.from_numpy(ref.array.copy())
    inputs = tensors(1)
    (constant,) = fixed([*inputs, torch.zeros(1, dtype=torch.int64)])
    (value,) = program(ByTable(), len(plan))([*inputs, plan])
    assert torch.equal(constant, value)
