"""AToffer's integers against decodings computed from its published rule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fuser.ir.errors import SchemeError
from fuser.ir.graph import Region
from fuser.ir.operators import Softmax
from fuser.ir.scheme import groups
from fuser.schemes import ATOFFER_OPERATORS, bert_layer, from_atoffer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/atoffer/schemes.json").read_text())

SEED = 41115  # AToffer's starting point: attention, and each bias with what follows it


def test_samples() -> None:
    assert list(ATOFFER_OPERATORS) == GOLDEN["operators"]
    assert len(GOLDEN["samples"]) > 300
    for sample in GOLDEN["samples"]:
        handwritten, segments, _ = from_atoffer(sample["value"])
        assert handwritten == bool(sample["handwritten_flag"])
        assert segments == [tuple(s) for s in sample["segments"]]


def test_all_integers() -> None:
    lines, programs = hashlib.sha256(), set()
    for value in range(1 << 16):
        handwritten, segments, _ = from_atoffer(value)
        lines.update(json.dumps([value, int(handwritten), segments], separators=(",", ":")).encode())
        programs.add((handwritten and (2, 6) in segments, tuple(segments)))
    assert lines.hexdigest() == GOLDEN["sha256_of_all_65536"]
    assert len(programs) == GOLDEN["distinct_programs"] == 16640


def partition(value: int, region: Region | None = None) -> list[list[str]]:
    _, _, scheme = from_atoffer(value, region)
    region = region or bert_layer()
    return [[op.name for op in group.operators] for group in groups(scheme, region, lambda group: True)]


def encode(segments: list[tuple[int, int]], handwritten: bool = False) -> int:
    """An integer that denotes ``segments``."""
    joined = {i for first, last in segments for i in range(first, last)}
    level, bits = 0, "0"
    for i in range(14):
        level ^= i not in joined
        bits += str(level)
    return int(str(int(handwritten)) + bits, 2)


def test_the_seed_of_its_search() -> None:
    handwritten, segments, _ = from_atoffer(SEED)
    assert handwritten and segments == [(2, 6), (8, 9), (10, 11), (13, 14)]
    assert partition(SEED) == [
        ["gemm0"],
        ["bias0"],
        ["qk", "scale", "mask", "softmax", "pv"],
        ["gemm1"],
        ["bias1", "residual1", "norm1"],
        ["gemm2", "bias2", "gelu"],
        ["gemm3"],
        ["bias3", "residual2", "norm2"],
    ]


def test_operators_of_one_of_its_operators_stay_together() -> None:
    alone = encode([])
    assert from_atoffer(alone)[1] == []
    assert partition(alone) == [
        ["gemm0"],
        ["bias0"],
        ["qk", "scale"],
        ["mask"],
        ["softmax"],
        ["pv"],
        ["gemm1"],
        ["bias1", "residual1"],
        ["norm1"],
        ["gemm2"],
        ["bias2", "gelu"],
        ["gemm3"],
        ["bias3", "residual2"],
        ["norm2"],
    ]


@pytest.mark.parametrize(
    ("segments", "fused"),
    [
        ([(5, 6)], False),
        ([(6, 7)], False),
        ([(2, 6)], False),
        ([(5, 7)], True),
        ([(2, 8)], True),
    ],
)
def test_the_transpose_is_a_view(segments: list[tuple[int, int]], fused: bool) -> None:
    value = encode(segments)
    assert from_atoffer(value)[1] == segments
    assert any({"pv", "gemm1"} <= set(group) for group in partition(value)) is fused


def test_neither_the_level_nor_the_flag_changes_the_scheme() -> None:
    for value in range(0, 1 << 16, 97):
        assert from_atoffer(value)[1:] == from_atoffer(value ^ 0x7FFF)[1:] == from_atoffer(value ^ 0x8000)[1:]


def test_halves_of_a_layer() -> None:
    layer = bert_layer()
    halves = layer.graph.regions
    assert [len(half.operators) for half in halves] == [11, 7]
    for value in range(0, 1 << 16, 211):
        whole = {frozenset(group) for group in partition(value)}
        parts = {frozenset(group) for half in halves for group in partition(value, half)}
        # A segment across the halves falls apart at their border, everything else stays as it is.
        names = [{op.name for op in half} for half in halves]
        assert parts == {cut for group in whole for n in names if (cut := group & n)}


def test_a_layer_of_other_extents() -> None:
    small = bert_layer(2, 17, 96, 3, 160)
    assert partition(SEED, small) == partition(SEED)
    assert small.hash != bert_layer().hash


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_integers_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(SchemeError, match="0 to 65535"):
        from_atoffer(value)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        from_atoffer("1")  # type: ignore[arg-type]


def test_other_regions_are_refused() -> None:
    layer = bert_layer()
    without = Region(layer.graph, tuple(op for op in layer if not isinstance(op.semantics, Softmax)))
    for region in (without, Region(layer.graph, layer.operators[:3])):
        with pytest.raises(SchemeError, match="BERT layer"):
            from_atoffer(SEED, region)
