"""Operators that write states: the order that graphs keep them in, and their place in hashes and texts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import Accumulate, Add, Exchange, graph_of, graphs, rows, sequential

from fuser.ir.evaluation import Evaluation, evaluate
from fuser.ir.graph import Operator, OperatorGraph, Region
from fuser.ir.scheme import Scheme, groups


def x_and_states(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, s, t = (torch.randn(4, 3, generator=generator) for _ in range(3))
    return x, {"s": s, "t": t}


def in_order(graph: OperatorGraph, order: list[Operator], seed: int) -> dict[str, torch.Tensor]:
    x, states = x_and_states(seed)
    found = Evaluation(graph)
    for name, tensor in {"x": x, **states}.items():
        found[name] = tensor
    found.run(order)
    return {name: found[name].clone() for name in (*graph.outputs, *graph.states)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.randoms(use_true_random=False), st.integers(0, 9))
def test_every_order_that_the_edges_allow_gives_the_same(graph: OperatorGraph, random: object, seed: int) -> None:
    order: list[Operator] = []
    ready = [name for name, degree in graph.digraph.in_degree if not degree]
    missing = dict(graph.digraph.in_degree)
    while ready:
        name = ready.pop(random.randrange(len(ready)))  # type: ignore[attr-defined]
        order.append(graph.operators[graph.position[name]])
        for then in graph.digraph.successors(name):
            missing[then] -= 1
            if not missing[then]:
                ready.append(then)
    assert len(order) == len(graph.compute)
    assert same(in_order(graph, order, seed), sequential(graph, *x_and_states(seed)))


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data(), st.integers(0, 9))
def test_every_scheme_gives_the_same(graph: OperatorGraph, data: st.DataObject, seed: int) -> None:
    order: list[Operator] = []
    for region in graph.regions:
        bits = tuple(data.draw(st.booleans()) for _ in region.edges)
        for group in groups(Scheme(region.hash, bits), region, lambda group: True):
            assert group.is_convex
            order += group.operators
    assert same(in_order(graph, order, seed), sequential(graph, *x_and_states(seed)))


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_evaluation_gives_what_is_written_from_zeros_on(graph: OperatorGraph) -> None:
    x, states = x_and_states(0)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in states.items()}
    found = evaluate(graph, {"x": x})
    expected = sequential(graph, x, zeros)
    assert set(found) == {*graph.outputs, *graph.group(graph.compute).mutates}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


READ = Operator("read", Add(), ("s", "x"), ("a",))
WRITE = Operator("write", Accumulate(), ("s", "x"), ())
AGAIN = Operator("again", Add(), ("s", "x"), ("b",))
LAST = Operator("last", Exchange(), ("s", "x"), ("c",))


def test_edges_are_read_after_write_write_after_read_and_write_after_write() -> None:
    graph = graph_of([READ, WRITE, AGAIN, LAST], ["s"])
    assert set(graph.digraph.edges) == {("read", "write"), ("write", "again"), ("write", "last"), ("again", "last")}


def test_reads_alone_are_in_no_order() -> None:
    assert not graph_of([READ, AGAIN], ["s"]).digraph.edges


def test_views_of_one_state_are_ordered() -> None:
    view, spec = rows("s", 0, 4)
    part = Operator("part", Accumulate(), (view.output, "x"), ())
    graph = graph_of([view, READ, part, AGAIN], ["s"], **{view.output: spec})
    assert set(graph.digraph.edges) == {("read", "part"), ("part", "again")}
    assert graph.written(part) == {"s"}


def test_a_group_around_a_write_is_not_convex() -> None:
    between = Operator("again", Add(), ("a", "s"), ("b",))
    graph = graph_of([READ, WRITE, between], ["s"])
    assert not graph.group([READ, between]).is_convex
    assert graph.group([READ, WRITE, between]).is_convex
    assert graph.group([WRITE, between]).mutates == ("s",)


def test_what_touches_one_state_is_one_region() -> None:
    (region,) = graph_of([READ, WRITE, AGAIN], ["s"]).regions
    assert region.edges == ((0, 1), (1, 2))
    assert len(graph_of([READ, dataclasses.replace(WRITE, inputs=("t", "x"))], ["s", "t"]).regions) == 2


def test_only_states_are_written() -> None:
    with pytest.raises(ValueError, match="write writes x in place"):
        _ = graph_of([dataclasses.replace(WRITE, inputs=("x", "s"))], ["s"]).digraph


def region_hash(operators: list[Operator], states: list[str]) -> str:
    graph = graph_of(operators, states)
    return Region(graph, graph.compute).hash


def test_the_hash_has_what_is_written_and_when() -> None:
    variants = [
        ([READ, WRITE, AGAIN], ["s"]),
        ([WRITE, READ, AGAIN], ["s"]),
        ([READ, dataclasses.replace(WRITE, inputs=("t", "x")), AGAIN], ["s", "t"]),
        ([READ, LAST, AGAIN], ["s"]),
        ([READ, WRITE, dataclasses.replace(AGAIN, inputs=("x", "s"))], ["s"]),
        ([READ, WRITE, dataclasses.replace(WRITE, name="twice"), AGAIN], ["s"]),
    ]
    assert len({region_hash(*variant) for variant in variants}) == len(variants)
    graph = dataclasses.replace(graph_of([READ, AGAIN], ["s"]), inputs=("x", "s"), states=())
    assert Region(graph, graph.compute).hash != region_hash([READ, AGAIN], ["s"])


def test_the_names_of_states_are_not_in_the_hash() -> None:
    def moved(op: Operator) -> Operator:
        return dataclasses.replace(op, inputs=tuple("cache" if v == "s" else v for v in op.inputs))

    operators = [READ, WRITE, AGAIN]
    assert region_hash([moved(op) for op in operators], ["cache"]) == region_hash(operators, ["s"])


def test_the_text_says_what_is_written() -> None:
    lines = str(graph_of([WRITE, LAST], ["s"])).splitlines()
    assert "states  s[4×3]" in lines
    assert lines[2].split() == ["accumulate", "s!", "=", "write(s,", "x)"]
    assert lines[3].split() == ["exchange", "c[4×3],", "s!", "=", "last(s,", "x)"]
