"""Tuning records: what a search found is what later compilations choose, also for the nearest number of rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from fuser.codegen.choice import Choice
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.graph import OperatorGraph, Region
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.runtime.cache import KernelCache
from fuser.runtime.device import cpu_target
from fuser.search import records
from fuser.search.partition import default_scheme
from fuser.search.space import Space

TARGET = dataclasses.replace(cpu_target(), peak_flops=1e11, bandwidth=1e10, launch_seconds=1e-6)


def graph_of(rows: int, hidden: int = 72) -> OperatorGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, hidden), nn.GELU(), nn.Linear(hidden, 24)).eval()
    return raise_graph(capture(model, flatten_call((torch.randn(rows, 40),), {})))


def unusual(region: Region) -> Choice:
    """A legal program that the cost model would not choose: nothing fused, every kernel its family's last."""
    space = Space.of([region], TARGET, 2).regions[0]
    sets = space.repair([False] * len(region.edges))
    return space.choice(tuple((members, len(space.kernels[members]) - 1) for members in sets))


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


def same(a: Choice, b: Choice) -> bool:
    return [(g.group.names, g.parameters) for g in a.groups] == [(g.group.names, g.parameters) for g in b.groups]


def test_a_record_is_read_as_it_was_written(cache: KernelCache) -> None:
    (region,) = graph_of(9).regions
    choice = unusual(region)
    assert records.read(cache, region, TARGET, 2) is None
    records.write(cache, region, choice, TARGET, 2, {"speedup": 1.5})
    found = records.read(cache, region, TARGET, 2, exact=True)
    assert found is not None and same(found, choice) and found.scheme == choice.scheme
    assert not same(found, default_scheme(region, IMPLEMENTATIONS, TARGET))
    (value,) = cache.records(records.RECORD)
    assert value["speedup"] == 1.5 and value["rows"] == 9


def test_the_nearest_rows_are_taken(cache: KernelCache) -> None:
    near, far = graph_of(16).regions[0], graph_of(64).regions[0]
    records.write(cache, near, unusual(near), TARGET, 2, {})
    default = default_scheme(far, IMPLEMENTATIONS, TARGET)
    records.write(cache, far, default, TARGET, 2, {})
    few, many = graph_of(20).regions[0], graph_of(50).regions[0]
    found = records.read(cache, few, TARGET, 2)
    assert found is not None and [len(g.group.operators) for g in found.groups] == [1] * len(few.operators)
    assert records.read(cache, few, TARGET, 2, exact=True) is None
    other = records.read(cache, many, TARGET, 2)
    assert other is not None and len(other.groups) == len(default.groups)
    assert records.read(cache, graph_of(2048).regions[0], TARGET, 2) is None, "too far"


def test_other_models_threads_and_targets_do_not_share(cache: KernelCache) -> None:
    (region,) = graph_of(9).regions
    records.write(cache, region, unusual(region), TARGET, 2, {})
    assert records.read(cache, graph_of(9, hidden=80).regions[0], TARGET, 2) is None
    assert records.read(cache, region, TARGET, 1) is None
    assert records.read(cache, region, dataclasses.replace(TARGET, cores=TARGET.cores + 1), 2) is None


def test_records_travel_with_the_cache(cache: KernelCache, tmp_path: Path) -> None:
    (region,) = graph_of(9).regions
    choice = unusual(region)
    records.write(cache, region, choice, TARGET, 2, {})
    cache.export(tmp_path / "tuned.fuser-cache")
    there = KernelCache(tmp_path / "there")
    assert there.import_(tmp_path / "tuned.fuser-cache").records == 1
    found = records.read(there, region, TARGET, 2)
    assert found is not None and same(found, choice)


def test_a_record_of_another_version_is_passed_over(cache: KernelCache) -> None:
    (region,) = graph_of(9).regions
    records.write(cache, region, unusual(region), TARGET, 2, {})
    (value,) = cache.records(records.RECORD)
    key = "\0".join([*records._context(region, TARGET, 2), region.hash])
    for broken in ({"kernels": [{"operators": [99]}]}, {"kernels": None}, {}):
        cache.write_record(records.RECORD, key, {**value, **broken} if broken else {"structure": value["structure"]})
        assert records.read(cache, region, TARGET, 2) is None
    cache.clear()
    for rows in ("many", None, [1]):
        cache.write_record(records.RECORD, "of another region", {**value, "rows": rows})
        assert records.read(cache, region, TARGET, 2) is None
    cache.clear()
    # Parameters that are gone: the kernel at the same place of its family's space.
    kernels = [{**k, "parameters": "gone"} for k in value["kernels"]]
    cache.write_record(records.RECORD, key, {**value, "kernels": kernels})
    found = records.read(cache, region, TARGET, 2)
    assert found is not None and same(found, unusual(region))
