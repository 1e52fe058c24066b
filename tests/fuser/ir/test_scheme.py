"""Schemes: what bit strings denote, their repair, and their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantics import semantics

from fuser.ir.errors import SchemeError
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import Constant, Operator, OperatorGraph, OperatorGroup, Region, TensorSpec
from fuser.ir.operators import (
    PV,
    QK,
    Activation,
    Bias,
    Extern,
    Gemm,
    Norm,
    PatternMask,
    Pointwise,
    Scale,
    Semantics,
    Softmax,
)
from fuser.ir.scheme import Scheme, canonical, groups, unfused

KINDS = (Pointwise, Activation, Norm)


def build(inputs: Sequence[Sequence[int]], kinds: Sequence[type[Semantics]]) -> Region:
    """Operator ``i`` sums the results of ``inputs[i]``, or the graph's input; externs stay outside the region."""
    operators = []
    for i, (sources, kind) in enumerate(zip(inputs, kinds, strict=True)):
        names = tuple(f"v{j}" for j in sources) or ("x",)
        b = Builder()
        total = b.input(0)
        for j in range(1, len(names)):
            total = b.apply(Op.ADD, total, b.input(j))
        operators.append(Operator(f"op{i}", semantics(kind, b.build(total)), names, (f"v{i}",)))
    read = {value for op in operators for value in op.inputs}
    values = {v: TensorSpec.contiguous((4, 8), torch.float32) for v in ("x", *(op.output for op in operators))}
    outputs = tuple(op.output for op in operators if op.output not in read)
    graph = OperatorGraph(tuple(operators), values, ("x",), outputs, {})
    return Region(graph, tuple(op for op in operators if op.semantics.fusible))


def chain(*kinds: type[Semantics]) -> Region:
    return build([[i - 1] if i else [] for i in range(len(kinds))], kinds)


@st.composite
def regions(draw: st.DrawFn, externs: bool = True) -> Region:
    count = draw(st.integers(1, 9))
    inputs = [draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(count)]
    choices = (*KINDS, Extern) if externs else KINDS
    kinds = [draw(st.sampled_from(choices if i else KINDS)) for i in range(count)]
    return build(inputs, kinds)


rules = st.sets(st.frozensets(st.sampled_from(KINDS), min_size=1))


def by_kinds(rule: set[frozenset[type[Semantics]]]) -> Callable[[OperatorGroup], bool]:
    return lambda group: frozenset(type(op.semantics) for op in group.operators) in rule


def anything(group: OperatorGroup) -> bool:
    return True


def scheme(data: st.DataObject, region: Region) -> Scheme:
    return Scheme(region.hash, tuple(data.draw(st.lists(st.booleans(), **_exactly(len(region.edges))))))


def _exactly(n: int) -> dict[str, int]:
    return {"min_size": n, "max_size": n}


def quotient(region: Region, parts: Sequence[frozenset[str]]) -> nx.DiGraph:
    """The whole graph, operators of one part merged into one node; externs stay alone."""
    owner = {name: number for number, part in enumerate(parts) for name in part}
    merged = nx.DiGraph()
    for a, b in region.graph.digraph.edges:
        if owner.get(a, a) != owner.get(b, b):
            merged.add_edge(owner.get(a, a), owner.get(b, b))
    return merged


@settings(max_examples=300, deadline=None)
@given(st.data(), regions(), rules)
def test_every_bit_string_denotes_a_valid_partition(data: st.DataObject, region: Region, rule: set) -> None:
    legal = by_kinds(rule)
    result = groups(scheme(data, region), region, legal)
    assert sorted(op.name for group in result for op in group.operators) == sorted(op.name for op in region)
    for group in result:
        assert len(group.operators) == 1 or legal(group)
        assert group.is_convex
        assert nx.is_weakly_connected(region.graph.digraph.subgraph(group.names))
    done: set[str] = set()
    members = {op.name for op in region}
    for group in result:
        needed = {a for name in group.names for a in nx.ancestors(region.graph.digraph, name)} & members
        assert needed - group.names <= done
        done |= group.names


@settings(max_examples=300, deadline=None)
@given(st.data(), regions(), rules)
def test_canonical_is_idempotent_and_equal_exactly_for_equal_programs(
    data: st.DataObject, region: Region, rule: set
) -> None:
    legal = by_kinds(rule)
    first, second = scheme(data, region), scheme(data, region)
    programs = [{group.names for group in groups(s, region, legal)} for s in (first, second)]
    forms = [canonical(s, region, legal) for s in (first, second)]
    assert (programs[0] == programs[1]) == (forms[0] == forms[1]) == (forms[0].hash == forms[1].hash)
    assert canonical(forms[0], region, legal) == forms[0]
    names = [op.name for op in region]
    together = tuple(any({names[a], names[b]} <= part for part in programs[0]) for a, b in region.edges)
    assert forms[0].bits == together


@settings(max_examples=300, deadline=None)
@given(st.data(), regions(), rules)
def test_what_obeys_the_rules_is_left_alone(data: st.DataObject, region: Region, rule: set) -> None:
    legal = by_kinds(rule)
    given_scheme = scheme(data, region)
    graph = nx.Graph()
    graph.add_nodes_from(op.name for op in region)
    names = [op.name for op in region]
    graph.add_edges_from(
        (names[a], names[b]) for (a, b), bit in zip(region.edges, given_scheme.bits, strict=True) if bit
    )
    parts = [frozenset(part) for part in nx.connected_components(graph)]
    by_name = {op.name: op for op in region}
    obeys = (
        nx.is_directed_acyclic_graph(quotient(region, parts))
        and all(group.is_convex for group in (region.graph.group(by_name[n] for n in part) for part in parts))
        and all(len(part) == 1 or legal(region.graph.group(by_name[n] for n in part)) for part in parts)
    )
    kept = {group.names for group in groups(given_scheme, region, legal)} == set(parts)
    assert kept == obeys


@settings(max_examples=200, deadline=None)
@given(st.data(), regions())
def test_text_round_trip(data: st.DataObject, region: Region) -> None:
    s = scheme(data, region)
    assert Scheme.parse(str(s)) == s
    assert Scheme.parse(str(s)).edges == len(region.edges)


@settings(max_examples=100, deadline=None)
@given(st.data(), regions(), rules)
def test_from_groups_inverts_groups(data: st.DataObject, region: Region, rule: set) -> None:
    parts = groups(scheme(data, region), region, by_kinds(rule))
    assert groups(Scheme.from_groups(region, parts), region, by_kinds(rule)) == parts
    assert Scheme.from_groups(region, reversed(parts)) == Scheme.from_groups(region, parts)


def test_attention_is_found_whole_inside_a_longer_run() -> None:
    attention = (QK, Scale, PatternMask, Softmax, PV)
    region = chain(Gemm, Bias, *attention, Gemm, Bias)
    kinds = {attention, (Gemm, Bias)}
    asked: list[frozenset[str]] = []

    def legal(group: OperatorGroup) -> bool:
        asked.append(group.names)
        return tuple(type(op.semantics) for op in group.operators) in kinds

    result = groups(Scheme(region.hash, (True,) * 8), region, legal)
    assert [len(group.operators) for group in result] == [2, 5, 2]
    assert len(asked) == len(set(asked))


def test_longest_legal_run_wins_over_a_longer_illegal_one() -> None:
    region = chain(*[Pointwise] * 7)
    result = groups(Scheme(region.hash, (True,) * 6), region, lambda group: len(group.operators) <= 3)
    assert [len(group.operators) for group in result] == [3, 3, 1]


def test_branches_stay_with_their_own_producers() -> None:
    # A gated MLP: two GEMMs from one input, an activation on the first, a product.
    region = build([[], [], [0], [1, 2]], [Gemm, Gemm, Activation, Pointwise])

    def legal(group: OperatorGroup) -> bool:
        return len(group.of(Gemm)) == 1

    result = groups(Scheme(region.hash, (True,) * 3), region, legal)
    assert [sorted(group.names) for group in result] == [["op0", "op2"], ["op1", "op3"]]


def test_a_group_around_an_operator_outside_it_is_cut() -> None:
    region = build([[], [0], [0, 1]], [Pointwise] * 3)
    assert region.edges == ((0, 1), (0, 2), (1, 2))
    around = Scheme(region.hash, (False, True, False))
    assert [len(group.operators) for group in groups(around, region, anything)] == [1, 1, 1]


def test_a_group_around_an_extern_is_cut() -> None:
    region = build([[], [0], [0, 1]], [Pointwise, Extern, Pointwise])
    assert region.edges == ((0, 1),)
    assert canonical(Scheme(region.hash, (True,)), region, anything) == unfused(region)


def test_two_convex_groups_that_wait_for_each_other_are_cut() -> None:
    # op0 -> op3 and op1 -> op2 cross between the pairs (op0, op2) and (op1, op3).
    region = build([[], [], [0, 1], [0, 1]], [Pointwise] * 4)
    bits = {(0, 2): True, (0, 3): False, (1, 2): False, (1, 3): True}
    crossed = Scheme(region.hash, tuple(bits[edge] for edge in region.edges))
    result = groups(crossed, region, anything)
    assert [sorted(group.names) for group in result] == [["op1"], ["op0", "op2"], ["op3"]]


def test_a_region_of_one_operator() -> None:
    region = build([[]], [Norm])
    alone = unfused(region)
    assert str(alone) == f"1:{region.hash}:1"
    assert Scheme.parse(str(alone)) == alone
    assert [group.names for group in groups(alone, region, anything)] == [{"op0"}]
    assert canonical(alone, region, anything) == alone


def test_a_region_without_edges() -> None:
    region = build([[], [], []], [Norm] * 3)
    assert unfused(region).edges == 0
    assert [group.names for group in groups(unfused(region), region, anything)] == [{"op0"}, {"op1"}, {"op2"}]


def test_text_form() -> None:
    assert str(Scheme("0123456789abcdef", (True, False, False, True, True))) == "1:0123456789abcdef:33"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1:0123456789abcdef",
        "2:0123456789abcdef:3",
        "01:0123456789abcdef:3",
        "1:0123456789abcdef:",
        "1:0123456789abcdef:0",
        "1:0123456789abcdef:03",
        "1:0123456789abcdef:3F",
        "1:0123456789abcdef:0x3",
        "1:0123456789abcdef:3\n",
        "1:0123456789abcdef:3:3",
        "1:0123456789abcde:3",
        "1:0123456789ABCDEF:3",
        " 1:0123456789abcdef:3",
    ],
)
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(text)


def test_schemes_of_other_regions_are_refused() -> None:
    region, other = chain(Norm, Norm), chain(Norm, Bias)
    with pytest.raises(SchemeError, match="belongs to the region"):
        groups(unfused(other), region, anything)
    with pytest.raises(SchemeError, match="2 bits for a region of 1 edges"):
        canonical(Scheme(region.hash, (True, True)), region, anything)


def test_groups_that_no_bits_can_say_are_refused() -> None:
    region = build([[], [], [0, 1]], [Norm] * 3)
    a, b, c = region.operators
    group = region.graph.group
    with pytest.raises(SchemeError, match="not connected"):
        Scheme.from_groups(region, [group([a, b]), group([c])])
    for wrong in ([group([a, c])], [group([a, c]), group([b, c])]):
        with pytest.raises(SchemeError, match="exactly once"):
            Scheme.from_groups(region, wrong)


def test_schemes_do_not_carry_over_to_other_wirings() -> None:
    # The two GEMMs look alike, but a · bᵀ and b · aᵀ are different programs.
    spec = TensorSpec.contiguous((8, 8), torch.float32)
    values = dict.fromkeys(("x", "wa", "wb", "a", "b", "s"), spec)
    constants = {name: Constant(name) for name in ("wa", "wb")}

    def product(left: str, right: str) -> Region:
        gemms = [Operator(n, Gemm(transposed=True), ("x", f"w{n}"), (n,)) for n in "ab"]
        operators = (*gemms, Operator("s", QK(), (left, right), ("s",)))
        return Region(OperatorGraph(operators, values, ("x",), ("s",), constants), operators)

    assert product("a", "b").hash == product("a", "b").hash
    with pytest.raises(SchemeError, match="belongs to the region"):
        groups(unfused(product("a", "b")), product("b", "a"), anything)
