"""The default partition against brute force, and the choice of kernels."""

from __future__ import annotations

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
from semantics import semantics

from fuser.codegen import partition
from fuser.codegen.partition import PYTORCH, Candidate, choose, default_scheme, legality
from fuser.ir.errors import SchemeError
from fuser.ir.expression import Builder, Op
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, Region, TensorSpec
from fuser.ir.operators import PV, QK, Gemm, Pointwise, Semantics, Softmax
from fuser.ir.scheme import Scheme, canonical, groups, unfused
from fuser.ir.target import Target
from fuser.kernels.base import Cost
from fuser.kernels.gemm import GemmFamily
from fuser.kernels.rowwise import PointwiseFamily, RowwiseFamily
from fuser.schemes import bert_layer

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


@dataclass
class Fake:
    """A family that matches what ``accepts`` and takes ``seconds(group, parameters)``."""

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
    choice = default_scheme(region, families, TARGET)
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
    again = choose(groups(choice.scheme, region, legality(families, TARGET)), families, TARGET)
    assert {c.group.names: (c.family, c.parameters) for c in again} == {
        c.group.names: (c.family, c.parameters) for c in choice.groups
    }


@settings(max_examples=60, deadline=None)
@given(regions(), st.integers(0, 1 << 16))
def test_groups_come_in_an_order_of_execution(region: Region, seed: int) -> None:
    choice = default_scheme(region, [Fake("a", anything, arbitrary(seed))], TARGET)
    done: set[str] = {"x"}
    for each in choice.groups:
        assert set(each.group.inputs) <= done
        done.update(op.output for op in each.group.operators)
    assert done == {"x", *(op.output for op in region)}


def test_ties_go_to_fewer_kernels() -> None:
    region = build([[], [0], [1], [2], [3]])
    additive = Fake("additive", anything, lambda group, _: 0.1e-6 * len(group.operators))
    assert len(default_scheme(region, [additive], TARGET).groups) == 1


def test_ties_go_to_fewer_kernels_however_the_path_is_found() -> None:
    region = build([[], [0], [1], [2]])
    sets = ({"op0"}, {"op1"}, {"op2", "op3"}, {"op0", "op1", "op2"}, {"op3"})
    additive = Fake("additive", lambda group: group.names in sets, lambda group, _: 1e-6 * len(group.operators))
    assert [len(c.group.operators) for c in default_scheme(region, [additive], TARGET).groups] == [3, 1]


def test_ties_go_to_the_first_family_and_the_default_parameters() -> None:
    region = build([[]])
    first, second = (Fake(name, anything, lambda *_: 1e-6, (7, 8)) for name in "ab")
    (choice,) = default_scheme(region, [first, second], TARGET).groups
    assert (choice.family, choice.parameters, choice.seconds) == (first, 7, pytest.approx(1e-6))


def test_a_kernel_for_more_operators_is_taken_only_when_it_pays() -> None:
    region = build([[], [0], [1]])

    def seconds(group: OperatorGroup, _: int) -> float:
        return 5e-6 if {"op1", "op2"} <= group.names else 1e-6

    choice = default_scheme(region, [Fake("a", anything, seconds)], TARGET)
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
    choice = default_scheme(region, [family], TARGET)
    assert [len(c.group.operators) for c in choice.groups] == [1, 1, 1, 3, 1]


def test_pytorch_runs_what_no_family_matches() -> None:
    region = build([[], [0]])
    only_second = Fake("a", lambda group: group.names == {"op1"}, lambda *_: 3e-6)
    first, second = default_scheme(region, [only_second], TARGET).groups
    assert (first.family, first.match, first.parameters) == (None, None, None)
    # 4 × 8 floats in and out, and a launch by PyTorch.
    assert first.seconds == pytest.approx(2 * 4 * 8 * 4 / 2e10 + 5e-6)
    assert second.family is only_second


def test_pytorch_pays_for_multiplications() -> None:
    layer = bert_layer()
    choices = choose(groups(unfused(layer), layer, anything), [], TARGET)
    seconds = {op.name: c.seconds for c in choices for op in c.group.operators}
    # At the peak of both cores or somewhat below it, well above the time of the bytes.
    for name, flops in (("gemm0", 2 * 128 * 768 * 2304), ("pv", 2 * 128 * 768 * 128)):
        assert 1.0 - 1e-9 <= (seconds[name] - 5e-6) / (flops / 2e11) <= 4.0
    assert seconds["norm1"] == pytest.approx((2 * 128 * 768 + 2 * 768) * 4 / 2e10 + 5e-6)


def test_groups_that_nothing_runs_are_refused() -> None:
    region = build([[], [0]])
    with pytest.raises(SchemeError, match="op0, op1"):
        choose([region.graph.group(region.operators)], [], TARGET)


def test_measured_times_replace_predictions() -> None:
    region = build([[], [0]])
    a, b = Fake("a", anything, lambda *_: 1e-6, (0, 1)), Fake("b", anything, lambda *_: 2e-6)
    group = region.graph.group(region.operators)
    structure = Region(region.graph, region.operators).hash
    times: dict[Candidate, float] = {}
    (choice,) = choose([group], [a, b], TARGET, times.get)
    assert (choice.family, choice.measured) == (a, False)
    times[Candidate(structure, "b", 0)] = 9e-6
    (choice,) = choose([group], [a, b], TARGET, times.get)
    assert (choice.family, choice.seconds, choice.measured) == (b, 9e-6, True)
    times[Candidate(structure, "a", 1)] = 8e-6
    (choice,) = choose([group], [a, b], TARGET, times.get)
    assert (choice.family, choice.parameters, choice.seconds) == (a, 1, 8e-6)
    assert choice.cost.seconds(TARGET) == pytest.approx(1e-6)


def test_measured_times_decide_the_scheme() -> None:
    region = build([[], [0], [1]])
    family = Fake("a", anything, lambda *_: 1e-6)
    assert len(default_scheme(region, [family], TARGET).groups) == 1

    def measured(candidate: Candidate) -> float | None:
        return 1.0 if candidate.group == region.hash else None

    assert [len(c.group.operators) for c in default_scheme(region, [family], TARGET, measured).groups] in (
        [1, 2],
        [2, 1],
    )


def test_measurements_hold_for_equal_groups_of_other_layers_and_for_pytorch() -> None:
    region = build([[], [0]])
    seen: list[Candidate] = []

    def measured(candidate: Candidate) -> float:
        seen.append(candidate)
        return 4e-6

    choices = choose((region.graph.group([op]) for op in region), [], TARGET, measured)
    assert [c.seconds for c in choices] == [4e-6, 4e-6]
    assert {c.family for c in seen} == {PYTORCH}
    layer, keys = bert_layer(), []
    for names in ({"bias1", "residual1", "norm1"}, {"bias3", "residual2", "norm2"}):
        seen.clear()
        choose([layer.graph.group(op for op in layer if op.name in names)], [RowwiseFamily()], TARGET, measured)
        keys.append(list(seen))
    assert keys[0] == keys[1] and keys[0]


@pytest.mark.parametrize("branches", [4, 12])
def test_wide_regions(branches: int) -> None:
    """Chains of an even and an odd operator that all meet in one sum, listed level by level."""
    region = build([*([] for _ in range(branches)), *([i] for i in range(branches)), range(branches, 2 * branches)])
    pairs = Fake("pairs", lambda group: len(group.operators) <= 2, lambda *_: 1e-6)
    choice = default_scheme(region, [pairs], TARGET)
    # One producer can share the sum's kernel, then its own producer is alone.
    assert len(choice.groups) == branches + 1
    assert choice.scheme == canonical(choice.scheme, region, legality([pairs], TARGET))


def test_long_regions() -> None:
    region = build([[i - 1] if i else [] for i in range(150)])
    choice = default_scheme(region, [Fake("a", anything, lambda *_: 1e-6)], TARGET)
    assert len(choice.groups) == math.ceil(150 / partition.MAX_OPERATORS)


def test_real_families_on_a_bert_layer() -> None:
    families = [GemmFamily(), RowwiseFamily(), PointwiseFamily()]
    layer = bert_layer()
    choice = default_scheme(layer, families, TARGET)
    legal = legality(families, TARGET)
    assert canonical(choice.scheme, layer, legal) == choice.scheme
    names = [c.group.names for c in choice.groups]
    assert any({"gemm2", "bias2", "gelu"} <= group for group in names)
    assert any({"residual1", "norm1"} <= group for group in names)
    assert any({"scale", "mask", "softmax"} <= group for group in names)
    assert {name for c in choice.groups if c.family is None for name in c.group.names} == {"qk", "pv"}
    generator = random.Random(0)
    for _ in range(50):
        bits = tuple(generator.random() < 0.6 for _ in layer.edges)
        other = choose(groups(Scheme(layer.hash, bits), layer, legal), families, TARGET)
        assert choice.seconds <= sum(c.seconds for c in other) * (1 + 1e-9)
