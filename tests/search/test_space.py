"""The space of a search: legal points only, each once, counted exactly, and its shortest path."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legality import legality
from torch import nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import SearchError
from fuser.ir.graph import OperatorGraph, Region
from fuser.ir.scheme import Scheme, canonical
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.runtime.device import cpu_target
from fuser.schemes import bert_layer
from fuser.search.space import Point, RegionSpace, Space
from fuser.search.standalone import standalone

# Rates of no machine in particular, so that predictions are the same on all.
TARGET = dataclasses.replace(cpu_target(), peak_flops=1e11, bandwidth=1e10, launch_seconds=1e-6)
LAYER = Space.of([bert_layer(sequence=16, hidden=64, heads=2, inner=128)], TARGET, 2)


class Encoder(nn.Module):
    """Two equal layers of attention with separate projections and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def graph_of(model: nn.Module, *inputs: torch.Tensor) -> OperatorGraph:
    with torch.no_grad():
        return raise_graph(capture(model.eval(), flatten_call(inputs, {})))


def one_kernel_each(space: RegionSpace) -> RegionSpace:
    """The same groups with one kernel for each."""
    return RegionSpace(space.region, space.count, space.kernels, dict.fromkeys(space.kernels, (0,)))


def test_counts_are_what_enumeration_finds() -> None:
    space = one_kernel_each(LAYER.regions[0])
    found = list(space.enumerate())
    assert space.is_exact
    assert len(found) == len(set(found)) == space.remaining == space.schemes
    schemes = {space.scheme(program) for program in found}
    assert len(schemes) == len(found)
    assert all(
        canonical(s, space.region, lambda g: space.members(o.name for o in g.operators) in space.kernels) == s
        for s in schemes
    )
    weights = sum(math.prod(len(space.kernels[members]) for members, _ in program) for program in found)
    assert weights == space.programs


def test_branches_are_counted_once_whatever_the_order_of_execution() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.a(x)) + torch.sigmoid(self.b(x)) * self.c(x)

    torch.manual_seed(0)
    for region in Space.of(graph_of(Branches(), torch.randn(4, 8)), TARGET, 2).regions:
        space = one_kernel_each(region)
        assert space.is_exact
        # Every bit string's canonical form, found without downsets.
        edges = len(space.region.edges)
        schemes = {
            space.scheme(tuple((members, 0) for members in space.repair(bits)))
            for bits in itertools.product((False, True), repeat=edges)
        }
        assert len(schemes) == space.schemes == sum(1 for _ in space.enumerate())


def test_the_shortest_path_is_the_best_of_all_programs() -> None:
    space = one_kernel_each(LAYER.regions[0])
    programs = list(space.enumerate())
    for seed in range(20):
        generator = np.random.default_rng(seed)
        costs = {
            members: generator.random() * members.bit_count() ** generator.random() for members in sorted(space.kernels)
        }
        best = min(math.fsum(costs[members] for members, _ in program) for program in programs)
        found = space.shortest(lambda members, kernel, costs=costs: costs[members])
        assert found in programs
        assert math.fsum(costs[members] for members, _ in found) == pytest.approx(best, abs=1e-12)


def test_the_shortest_path_takes_the_cheapest_kernel_of_every_group() -> None:
    space = LAYER.regions[0]
    costs = {(m, k): 1.0 + (m * 7 + k * 3) % 5 for m, ks in space.kernels.items() for k in range(len(ks))}
    found = space.shortest(lambda members, kernel: costs[members, kernel])
    for members, kernel in found:
        assert costs[members, kernel] == min(costs[members, k] for k in range(len(space.kernels[members])))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=len(LAYER.regions[0].region.edges), max_size=len(LAYER.regions[0].region.edges))
)
def test_every_bit_string_is_a_legal_program(bits: list[bool]) -> None:
    space = LAYER.regions[0]
    program = tuple((members, 0) for members in space.repair(bits))
    choice = space.choice(program)
    assert canonical(Scheme(space.region.hash, tuple(bits)), space.region, _legal) == choice.scheme
    assert space.repair(space.bits(program)) == tuple(members for members, _ in program)
    assert space.ordered(program) == program


_legal = legality(IMPLEMENTATIONS, TARGET)


def test_random_points_are_legal_and_written_as_text() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        point = LAYER.random(generator)
        assert set(LAYER.choices(point)) == {space.region.hash for space in LAYER.regions}
        assert Point.parse(str(point)) == point
    for wrong in ("", "zz", "1", "1.x", "1.0;"):
        with pytest.raises(SearchError):
            Point.parse(wrong)
    with pytest.raises(SearchError, match="not a legal program"):
        LAYER.choices(Point((((1, 0),),)))
    with pytest.raises(SearchError, match="regions"):
        LAYER.choices(Point(()))


def test_a_bert_layer_has_the_six_groups_of_atoffer() -> None:
    kinds = [group.name for group in LAYER.regions[0].natural_groups]
    assert kinds == [
        "gemm",
        "bias+qk+scale+mask+softmax+pv+gemm",
        "bias+residual+norm",
        "gemm+bias+activation",
        "gemm",
        "bias+residual+norm",
    ]


def test_natural_groups_partition_operators_and_edges() -> None:
    torch.manual_seed(0)
    space = Space.of(graph_of(Encoder(), torch.randn(2, 6, 32)), TARGET, 2)
    assert {region.count for region in space.regions} == {2}
    for region in space.regions:
        operators = [i for group in region.natural_groups for i in group.operators]
        edges = [e for group in region.natural_groups for switch in group.switches for e in switch]
        assert sorted(operators) == list(range(len(region.region.operators)))
        assert sorted(edges) == list(range(len(region.region.edges)))
        kinds = {op.kind for i, op in enumerate(region.region.operators) if region.attention >> i & 1}
        assert kinds <= {"qk", "scale", "mask", "softmax", "pv"}


def test_pruning_keeps_the_best_program_and_counts_what_it_drops() -> None:
    for slack in (1.0, 1.2, 2.0):
        pruned = LAYER.prune(slack)
        left = sum(len(kernels) for kernels in pruned.regions[0].allowed.values())
        assert sum(pruned.pruned.values()) == LAYER.kernels - left
        assert LAYER.additive(pruned.default(), LAYER.predicted) == pytest.approx(
            LAYER.additive(LAYER.default(), LAYER.predicted), rel=1e-9
        )
        assert pruned.hash == LAYER.hash
        assert 1 <= pruned.regions[0].remaining <= LAYER.regions[0].remaining
    assert LAYER.prune(1.0).regions[0].remaining < LAYER.regions[0].remaining
    assert LAYER.prune(math.inf).pruned == {}


def test_nothing_within_the_slack_is_pruned() -> None:
    region = LAYER.regions[0]
    best = LAYER.additive(LAYER.default(), LAYER.predicted)
    pruned = LAYER.prune(1.3).regions[0]
    inside = 0
    for program in one_kernel_each(region).enumerate():
        seconds = LAYER.additive(Point((program,)), LAYER.predicted)
        if seconds <= 1.3 * best:
            inside += 1
            assert all(kernel in pruned.allowed[members] for members, kernel in program)
    assert inside


def test_standalone_regions_are_the_same_regions() -> None:
    torch.manual_seed(0)
    graph = graph_of(Encoder(), torch.randn(2, 6, 32))
    for region in graph.regions:
        alone = standalone(region)
        assert alone.hash == region.hash
        assert [op.name for op in alone.operators] == [op.name for op in region.operators]
        assert standalone(alone).hash == region.hash


def test_the_description_is_json_and_whole() -> None:
    text = json.loads(json.dumps(LAYER.describe()))
    (region,) = text["regions"]
    assert int(text["programs"]) == LAYER.programs
    assert len(region["operators"]) == len(LAYER.regions[0].region.operators)
    assert sum(len(kernels) for kernels in region["kernels"].values()) == LAYER.kernels


def test_a_model_without_fusible_operators_cannot_be_searched() -> None:
    with pytest.raises(SearchError, match="nothing to search"):
        Space.of(list[Region](), TARGET, 2)
