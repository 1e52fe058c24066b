"""The default partition against brute force, and the choice of kernels."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legality import legality
from semantics import semantics

from fuser.codegen.choice import PYTORCH
from fuser.ir.errors import SchemeError
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, Region, TensorSpec
from fuser.ir.operators import PV, QK, Gemm, Pointwise, Semantics, Softmax
from fuser.ir.scheme import Scheme, canonical, groups, unfused
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, Table
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.schemes import bert_layer
from fuser.search import partition
from fuser.search.partition import alternatives, choose, default_scheme, kernels

TARGET = Target("cpu", "avx512", frozenset(), 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 2e-6)


def build(inputs: Sequence[Sequence[int]], kinds: Sequence[type[Semantics]] = ()) -> Region:
    """Operator ``i`` sums the results of ``inputs[i]``, or the graph's input."""
    operators = []
    for i, sources in enumerate(inputs):
        names = tuple(f"v{j}" for j in sources) or ("x",)
        b = Builder()
        total = b.input(0)
        for j in range(1, len(names)):
            total = b.apply(Op.ADD, total, b.input(j))
        kind = kinds[i] if kinds else Pointwise
        operators.append(Operator(f"op{i}", semantics(kind, b.build(total)), names, (f"v{i}",)))
    read = {value for op in operators for value in op.inputs}
    values = {v: TensorSpec.contiguous((4, 8), torch.float32) for v in ("x", *(op.output for op in operators))}
    outputs = tuple(op.output for op in operators if op.output not in read)
    return Region(OperatorGraph(tuple(operators), values, ("x",), outputs, {}), tuple(operators))


@dataclass(eq=False)
class Fake(Implementation[OperatorGroup, int]):
    """A family and its one implementation, which matches what ``accepts`` and takes ``seconds(group, parameters)``."""

    name: str
    accepts: Callable[[OperatorGroup], bool]
    seconds: Callable[[OperatorGroup, int], float]
    parameters: tuple[int, ...] = (0,)

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        return group if self.accepts(group) else None

    def space(self, match: OperatorGroup, target: Target) -> Sequence[int]:
        return self.parameters

    def cost(self, match: OperatorGroup, parameters: int, target: Target) -> Cost:
        return Cost(0.0, self.seconds(match, parameters) * target.bandwidth, launches=0)

    def call(self, *args: Any) -> Any:
        raise NotImplementedError


def table(*families: Fake) -> Table:
    return {(family, "cpu"): (family,) for family in families}


def anything(group: OperatorGroup) -> bool:
    return True


def arbitrary(seed: int) -> Callable[[OperatorGroup, int], float]:
    """Seconds that depend on the operators in no regular way; larger groups tend to pay."""

    def seconds(group: OperatorGroup, parameters: int) -> float:
        generator = random.Random(f"{seed} {sorted(group.names)} {parameters}")
        return generator.uniform(0.2, 2.0) * math.sqrt(len(group.operators)) * 1e-6

    return seconds


@st.composite
def regions(draw: st.DrawFn) -> Region:
    count = draw(st.integers(1, 7))
    return build(
        [draw(st.lists(st.integers(0, i - 1), min_size=1, max_size=2, unique=True)) if i else [] for i in range(count)]
    )


@settings(max_examples=60, deadline=None)
@given(regions(), st.integers(0, 1 << 16), st.floats(0.3, 1.0))
def test_default_is_the_best_of_all_schemes(region: Region, seed: int, share: float) -> None:
    def accepts(group: OperatorGroup) -> bool:
        return len(group.operators) == 1 or random.Random(f"{seed} {sorted(group.names)}").random() < share

    families = [Fake("a", accepts, arbitrary(seed), (0, 1)), Fake("b", accepts, arbitrary(seed + 1))]
    choice = default_scheme(region, table(*families), TARGET)
    programs = {
        canonical(Scheme(region.hash, bits), region, accepts)
        for bits in itertools.product((False, True), repeat=len(region.edges))
    }
    best = min(
        sum(
            min(family.seconds(group, p) for family in families for p in family.parameters)
            for group in groups(scheme, region, accepts)
        )
        for scheme in programs
    )
    assert choice.seconds == pytest.approx(best, rel=1e-9)
    assert choice.scheme in programs
    # One order of execution of one partition: the text that is loaded later gives the same kernels.
    again = choose(groups(choice.scheme, region, legality(table(*families), TARGET)), table(*families), TARGET)
    assert {c.group.names: (c.family, c.parameters) for c in again} == {
        c.group.names: (c.family, c.parameters) for c in choice.groups
    }


@settings(max_examples=60, deadline=None)
@given(regions(), st.integers(0, 1 << 16))
def test_groups_come_in_an_order_of_execution(region: Region, seed: int) -> None:
    choice = default_scheme(region, table(Fake("a", anything, arbitrary(seed))), TARGET)
    done: set[str] = {"x"}
    for each in choice.groups:
        assert set(each.group.inputs) <= done
        done.update(op.output for op in each.group.operators)
    assert done == {"x", *(op.output for op in region)}


def test_ties_go_to_fewer_kernels() -> None:
    region = build([[], [0], [1], [2], [3]])
    additive = Fake("additive", anything, lambda group, _: 0.1e-6 * len(group.operators))
    assert len(default_scheme(region, table(additive), TARGET).groups) == 1


def test_ties_go_to_fewer_kernels_however_the_path_is_found() -> None:
    region = build([[], [0], [1], [2]])
    sets = ({"op0"}, {"op1"}, {"op2", "op3"}, {"op0", "op1", "op2"}, {"op3"})
    additive = Fake("additive", lambda group: group.names in sets, lambda group, _: 1e-6 * len(group.operators))
    assert [len(c.group.operators) for c in default_scheme(region, table(additive), TARGET).groups] == [3, 1]


def test_ties_go_to_the_first_family_and_the_default_parameters() -> None:
    region = build([[]])
    first, second = (Fake(name, anything, lambda *_: 1e-6, (7, 8)) for name in "ab")
    (choice,) = default_scheme(region, table(first, second), TARGET).groups
    assert (choice.family, choice.parameters, choice.seconds) == ("a", 7, pytest.approx(1e-6))


def test_a_kernel_for_more_operators_is_taken_only_when_it_pays() -> None:
    region = build([[], [0], [1]])

    def seconds(group: OperatorGroup, _: int) -> float:
        return 5e-6 if {"op1", "op2"} <= group.names else 1e-6

    choice = default_scheme(region, table(Fake("a", anything, seconds)), TARGET)
    assert [sorted(c.group.names) for c in choice.groups] == [["op0", "op1"], ["op2"]]


def test_attention_is_matched_as_a_whole_between_its_projections() -> None:
    kinds = [Gemm, Gemm, Gemm, QK, Softmax, PV, Gemm]
    region = build([[], [], [], [0, 1], [3], [4, 2], [5]], kinds)
    attention = (QK, Softmax, PV)
    family = Fake(
        "a",
        lambda g: len(g.operators) == 1 or tuple(type(op.semantics) for op in g.operators) == attention,
        lambda *_: 1e-6,
    )
    choice = default_scheme(region, table(family), TARGET)
    assert [len(c.group.operators) for c in choice.groups] == [1, 1, 1, 3, 1]


def test_pytorch_runs_what_no_family_matches() -> None:
    region = build([[], [0]])
    only_second = Fake("a", lambda group: group.names == {"op1"}, lambda *_: 3e-6)
    first, second = default_scheme(region, table(only_second), TARGET).groups
    assert (first.kernel, first.family, first.parameters) == (None, PYTORCH, None)
    # 4 × 8 floats in and out, and a launch by PyTorch.
    assert first.seconds == pytest.approx(2 * 4 * 8 * 4 / 2e10 + 5e-6)
    assert second.family == "a"


def test_pytorch_pays_for_multiplications() -> None:
    layer = bert_layer()
    choices = choose(groups(unfused(layer), layer, anything), {}, TARGET)
    seconds = {op.name: c.seconds for c in choices for op in c.group.operators}
    # At the peak of both cores or somewhat below it, well above the time of the bytes.
    for name, flops in (("gemm0", 2 * 128 * 768 * 2304), ("pv", 2 * 128 * 768 * 128)):
        assert 1.0 - 1e-9 <= (seconds[name] - 5e-6) / (flops / 2e11) <= 4.0
    assert seconds["norm1"] == pytest.approx((2 * 128 * 768 + 2 * 768) * 4 / 2e10 + 5e-6)


def test_groups_that_nothing_runs_are_refused() -> None:
    region = build([[], [0]])
    with pytest.raises(SchemeError, match="op0, op1"):
        choose([region.graph.group(region.operators)], {}, TARGET)


def test_a_table_without_an_entry_for_the_target_runs_nothing() -> None:
    region = build([[], [0]])
    group = region.graph.group(region.operators)
    fake = Fake("a", anything, lambda *_: 1e-6)
    assert list(kernels(group, {(fake, "cuda"): (fake,)}, TARGET)) == []
    assert not legality({(fake, "cuda"): (fake,)}, TARGET)(group)


def test_a_family_has_several_implementations_on_one_target() -> None:
    """A slow one with more choices, and a fast one; those that build for long only where they are asked for."""

    class Slow(Fake):
        def offline_space(self, match: OperatorGroup, target: Target) -> Sequence[int]:
            return (9,)

    family = Fake("a", anything, lambda *_: 1e-6)
    slow, fast = Slow("slow", anything, lambda *_: 3e-6, (1, 2)), Fake("fast", anything, lambda *_: 2e-6, (3,))
    both: Table = {(family, "cpu"): (slow, fast)}
    region = build([[]])
    group = region.graph.group(region.operators)
    found = list(kernels(group, both, TARGET, offline=True))
    assert [(k.parameters, k.offline) for k in found] == [(1, False), (2, False), (3, False), (9, True)]
    (choice,) = choose([group], both, TARGET)
    assert choice.kernel == found[2] and choice.kernel.implementation is fast and choice.family == "a"
    assert alternatives(found[0], both, TARGET) == found[:3] and alternatives(found[3], both, TARGET) == found[3:]


def test_a_family_that_matches_without_kernels_leaves_the_operator_to_pytorch() -> None:
    region = build([[]])
    none = Fake("a", anything, lambda *_: 1e-6, ())
    (choice,) = default_scheme(region, table(none), TARGET).groups
    assert choice.family == PYTORCH


@pytest.mark.parametrize(
    "names", [{"gemm2", "bias2", "gelu"}, {"residual1", "norm1"}, {"qk", "scale", "mask", "softmax", "pv"}]
)
def test_a_kernel_of_one_layer_runs_its_twin_by_a_rename(names: set[str]) -> None:
    """The call that is renamed equals the one of a match of the twin's own."""
    layer = bert_layer()
    twin_graph = renamed(layer.graph)
    group, twin = (graph.group(op for op in graph.operators if op.name in names) for graph in (layer.graph, twin_graph))
    (choice,), (own,) = choose([group], IMPLEMENTATIONS, TARGET), choose([twin], IMPLEMENTATIONS, TARGET)
    moved, call = choice.on(twin).call(TARGET, 2), own.call(TARGET, 2)
    assert isinstance(moved, KernelCall) and moved == call
    assert moved != choice.call(TARGET, 2)


def renamed(graph: OperatorGraph) -> OperatorGraph:
    """The same graph with other names of values."""

    def name(value: str) -> str:
        return f"other_{value}"

    operators = tuple(
        dataclasses.replace(op, inputs=tuple(map(name, op.inputs)), outputs=tuple(map(name, op.outputs)))
        for op in graph.operators
    )
    values = {
        name(v): spec if spec.base is None else dataclasses.replace(spec, base=name(spec.base))
        for v, spec in graph.values.items()
    }
    constants = {name(v): dataclasses.replace(c, name=name(v)) for v, c in graph.constants.items()}
    return OperatorGraph(operators, values, tuple(map(name, graph.inputs)), tuple(map(name, graph.outputs)), constants)


@pytest.mark.parametrize("branches", [4, 12])
def test_wide_regions(branches: int) -> None:
    """Chains of an even and an odd operator that all meet in one sum, listed level by level."""
    region = build([*([] for _ in range(branches)), *([i] for i in range(branches)), range(branches, 2 * branches)])
    pairs = Fake("pairs", lambda group: len(group.operators) <= 2, lambda *_: 1e-6)
    choice = default_scheme(region, table(pairs), TARGET)
    # One producer can share the sum's kernel, then its own producer is alone.
    assert len(choice.groups) == branches + 1
    assert choice.scheme == canonical(choice.scheme, region, legality(table(pairs), TARGET))


def test_long_regions() -> None:
    region = build([[i - 1] if i else [] for i in range(150)])
    choice = default_scheme(region, table(Fake("a", anything, lambda *_: 1e-6)), TARGET)
    assert len(choice.groups) == math.ceil(150 / partition.MAX_OPERATORS)


def test_real_families_on_a_bert_layer() -> None:
    families = {key: cell for key, cell in IMPLEMENTATIONS.items() if key[0].name != "attention"}
    layer = bert_layer()
    choice = default_scheme(layer, families, TARGET)
    legal = legality(families, TARGET)
    assert canonical(choice.scheme, layer, legal) == choice.scheme
    names = [c.group.names for c in choice.groups]
    assert any({"gemm2", "bias2", "gelu"} <= group for group in names)
    assert any({"residual1", "norm1"} <= group for group in names)
    assert any({"scale", "mask", "softmax"} <= group for group in names)
    assert {name for c in choice.groups if c.kernel is None for name in c.group.names} == {"qk", "pv"}
    generator = random.Random(0)
    for _ in range(50):
        bits = tuple(generator.random() < 0.6 for _ in layer.edges)
        other = choose(groups(Scheme(layer.hash, bits), layer, legal), families, TARGET)
        assert choice.seconds <= sum(c.seconds for c in other) * (1 + 1e-9)
