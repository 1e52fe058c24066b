"""Assembling graphs with states: their slots, and programs of PyTorch steps against the operators one by one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from states import Accumulate, Add, graph_of, graphs, rows, sequential

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.template import generalized
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.size import named
from fuser.runtime.device import cpu_target
from fuser.runtime.program import RUNNER, Memory, Program, Slot, TorchStep
from fuser.search.partition import choose

NO_KERNELS: Any = {RUNNER: None}


def assembled(graph: OperatorGraph) -> Assembly:
    """The graph with a step of PyTorch for every operator."""
    alone = [graph.group([op]) for region in graph.regions for op in region]
    return assemble(graph, choose(alone, {}, cpu_target()), cpu_target(), 1)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_programs_give_what_the_operators_give_in_order_call_after_call(graph: OperatorGraph) -> None:
    program = Program(assembled(graph).plan, NO_KERNELS, [])
    states = {name: torch.zeros(4, 3) for name in graph.states}
    for call in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(call))
        results = program([x])
        expected = sequential(graph, x, states)
        for name, result in zip(graph.outputs, results, strict=True):
            assert torch.equal(result, expected[name]), name
        states = {name: expected[name] for name in graph.states}
        assert all(torch.equal(program.states[name], tensor) for name, tensor in states.items())


def test_a_state_is_in_no_arena_and_views_of_it_are_places_in_it() -> None:
    view, spec = rows("t", 2, 2)
    part = Operator("part", Accumulate(), (view.output, view.output), ())
    read = Operator("read", Add(), ("t", "x"), ("a",))
    plan = assembled(graph_of([view, part, read], ["s", "t"], **{view.output: spec})).plan
    assert plan.states == {
        "s": Slot(Memory.STATE, 0, 0, (4, 3), (3, 1), torch.float32),
        "t": Slot(Memory.STATE, 1, 0, (4, 3), (3, 1), torch.float32),
    }
    step = plan.steps[0]
    assert isinstance(step, TorchStep)
    assert step.inputs[0] == Slot(Memory.STATE, 1, 24, (2, 3), (3, 1), torch.float32)
    assert plan.arena_bytes == 0


def test_a_state_that_is_returned_is_the_state() -> None:
    write = Operator("write", Accumulate(), ("s", "x"), ())
    graph = graph_of([write], ["s"])
    program = Program(
        assembled(OperatorGraph((write,), graph.values, ("x",), ("s",), {}, states=("s",))).plan, NO_KERNELS, []
    )
    (first,) = program([torch.ones(4, 3)])
    assert torch.equal(first, torch.ones(4, 3))
    (second,) = program([torch.ones(4, 3)])
    assert torch.equal(first, torch.full((4, 3), 1.5))
    assert first.data_ptr() == second.data_ptr() == program.states["s"].data_ptr()


def test_sizes_of_states_are_bound_late() -> None:
    def graph(batch: int) -> OperatorGraph:
        spec = TensorSpec.contiguous((batch, 3), torch.float32)
        write = Operator("write", Accumulate(), ("s", "x"), ())
        return OperatorGraph((write,), {"x": spec, "s": spec}, ("x",), ("s",), {}, states=("s",))

    any_batch = graph(named("batch", 1, 8))
    choices = generalized(assembled(graph(4)).choices, any_batch, cpu_target())
    plan = assemble(any_batch, choices, cpu_target(), 1).template.bind({"batch": 5})
    assert plan.states["s"].shape == (5, 3) and plan.states["s"].memory is Memory.STATE
    (result,) = Program(plan, NO_KERNELS, [])([torch.ones(5, 3)])
    assert torch.equal(result, torch.ones(5, 3))
