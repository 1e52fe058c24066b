"""Products in int8 against :class:`fuser.ir.operators.QuantizedGemm`, bit for bit, on every instruction set at hand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from gated import Gated
from int8_cases import NATIVE, Case, as_quantized, assembly, quantized_values, target, unwritten
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.explain.profiling import floor_of
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.quantization import MAX_TERMS, quantize_rows
from fuser.ir.target import Isa, Target
from fuser.kernels.base import DType, KernelSpec, Packed, materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_int8 import (
    CodeGemmFamily,
    CpuCodeGemm,
    CpuInt8Gemm,
    CpuStoredInt8Gemm,
    Int8GemmParameters,
    Int8Layout,
    QuantizedGemmFamily,
    StoredInt8GemmFamily,
    StoredInt8Layout,
    int8_parameters,
    stored_parameters,
)
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.cpuinfo import cpu_flags
from fuser.runtime.library import load

FEATURES = {Isa.AVX512: "avx512_vnni", Isa.AVX2: "avx_vnni"}
HERE = [(NATIVE, frozenset[str]())]
if FEATURES.get(NATIVE) in cpu_flags():
    HERE.append((NATIVE, frozenset({FEATURES[NATIVE]})))
MACHINES = [*HERE, (Isa.PORTABLE, frozenset[str]())]


CASES = [
    Case(5, 2),
    Case(7, 3, "none"),
    Case(33, 70, factors=True),
    Case(50, 64, transposed=False),
    Case(50, 131, "norm", factors=True),
    Case(100, 257, "norm"),
    Case(70, 1100, chunked=True, factors=True),
    Case(40, 99, "none", dtype=torch.bfloat16),
    Case(5, 2, coded=True),
    Case(50, 131, "norm", transposed=False, factors=True, coded=True),
    Case(70, 1100, chunked=True, coded=True),
    Case(40, 99, "none", dtype=torch.bfloat16, coded=True),
    Case(5, 2, "none", range=(-128, 127)),
    Case(50, 131, "norm", transposed=False, range=(-64, 63)),
    Case(70, 1100, chunked=True, range=(-128, 127)),
    Case(40, 99, "none", dtype=torch.bfloat16, range=(-128, 127)),
    Case(5, 2, "none", range=(-128, 127), symmetric=False),
    Case(50, 131, "norm", transposed=False, range=(-64, 63), symmetric=False),
    Case(70, 1100, chunked=True, range=(-128, 127), symmetric=False),
    Case(40, 99, "none", dtype=torch.bfloat16, range=(-128, 127), symmetric=False),
    Case(5, 2, "none", range=(-128, 127), given=(0.01, 3)),
    Case(50, 131, "norm", transposed=False, range=(-64, 63), given=(0.05, -64)),
    Case(70, 1100, chunked=True, range=(-128, 127), given=(0.02, 127)),
    Case(40, 99, "none", dtype=torch.bfloat16, range=(-127, 127), given=(0.03, 0)),
]


@pytest.fixture(scope="module")
def cache() -> KernelCache:
    return default_cache()


FAMILIES = {family.kind.kind: family for family in (QuantizedGemmFamily(), CodeGemmFamily(), StoredInt8GemmFamily())}
WAYS = {"quantized_gemm": CpuInt8Gemm(), "code_gemm": CpuCodeGemm(), "int8_gemm": CpuStoredInt8Gemm()}


def match_of(graph: OperatorGraph, machine: Target) -> GemmMatch:
    match = FAMILIES[graph.compute[0].kind].match(graph.group(graph.compute), machine)
    assert match is not None
    return match


def run(
    graph: OperatorGraph,
    values: Mapping[str, Tensor],
    machine: Target,
    parameters: Int8GemmParameters,
    library: Path,
    threads: int,
) -> dict[str, Tensor]:
    call = CpuInt8Gemm().call(match_of(graph, machine), parameters, machine, threads)
    results = {v: unwritten(graph.values[v]) for v in graph.outputs}
    tensors = materialized(call.tensors, {**values, **results})
    workspace = torch.full((call.workspace_bytes // 4 + 16,), torch.nan)
    kernel = load(library, call.spec.symbol)
    kernel(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, threads, workspace.data_ptr()))
    return results


def space_of(graph: OperatorGraph, machine: Target) -> Sequence[Int8GemmParameters]:
    return WAYS[graph.compute[0].kind].space(match_of(graph, machine), machine)


def choices_of(case: Case, machine: Target) -> list[Int8GemmParameters]:
    """The default, and where K is long all parameters, with small blocks, so that few rows are several of them."""
    choices = [
        dataclasses.replace(c, mc=2 * c.mr, serial_below=0, **({"kc": 64, "chunk": 128} if case.chunked else {}))
        for c in space_of(case.graph(1), machine)
    ]
    return choices if case.chunked else choices[:1]


def built(choices: Sequence[Int8GemmParameters], machine: Target, cache: KernelCache) -> list[Path]:
    sources = [render(KernelSpec(c.kernel, "cpu/gemm.cpp.j2", c)) for c in choices]
    paths = build(sources, machine, headers=header_folder(machine), cache=cache)
    return [paths[source.symbol] for source in sources]


def on_all_machines(
    case: Case, graph: OperatorGraph, values: Mapping[str, Tensor], cache: KernelCache
) -> Iterator[Tensor]:
    """What the default kernel of every machine gives."""
    for isa, features in MACHINES:
        aim = target(isa, features)
        (parameters,) = choices_of(case, aim)
        (library,) = built([parameters], aim, cache)
        (got,) = run(graph, values, aim, parameters, library, 2).values()
        yield got


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: "-".join((m[0].value, *m[1])))
def test_kernels_give_the_numbers_of_the_operator(machine: tuple[Isa, frozenset[str]], cache: KernelCache) -> None:
    """Integers and their scales are equal on all instruction sets, so the products are; only what an epilogue computes
    in another order may round differently."""
    aim = target(*machine)
    choices = [(case, c) for case in CASES for c in choices_of(case, aim)]
    for (case, parameters), library in zip(choices, built([c for _, c in choices], aim, cache), strict=True):
        assert case.chunked == (parameters.chunk < parameters.steps)
        for rows in (1, 2, 2 * parameters.mr + 1, 61):
            graph = case.graph(rows)
            values = quantized_values(graph, rows)
            (want,) = evaluate(graph, values).values()
            (got,), *others = (
                [*run(graph, values, aim, parameters, library, threads).values()] for threads in (1, 2, 3, 7)
            )
            assert all(torch.equal(got, other) for (other,) in others)
            if case.chain == "norm":
                torch.testing.assert_close(got, want, rtol=2.0**-20, atol=2.0**-18)
            else:
                assert torch.equal(got, want), (case, parameters, rows)


def test_rows_take_all_integers_of_a_range(cache: KernelCache) -> None:
    """Half of the range is rounded to an integer above its end, which becomes the end; so do weights of -128 count."""
    case = Case(40, 70, "none", range=(-128, 127))
    graph = case.graph(4)
    values = quantized_values(graph)
    x, weight = values["x"], values["weight"]
    x[0], x[1], x[2, 1:], x[3] = 127.5, -127.5, 0, 2.0**-23
    x[2, 0], weight[0] = -127.5, -128
    codes = torch.full((4, 70), 127, dtype=torch.int64)
    codes[1], codes[2, 1:], codes[2, 0], codes[3] = -128, 0, -128, 1
    # The last row is smaller than what the least scale can tell from its integers.
    scales = torch.tensor([1, 1, 1, 2.0**-23])[:, None] * values["scales"]
    want = (codes @ weight.long().T).float() * scales
    for got in on_all_machines(case, graph, values, cache):
        assert torch.equal(got, want)


def test_rows_with_zero_points_take_all_integers(cache: KernelCache) -> None:
    """From end to end on both sides of zero, and on one; rows without a range, and one that fp32 cannot hold."""
    case = Case(40, 70, "none", range=(-128, 127), symmetric=False)
    graph = case.graph(9)
    values = quantized_values(graph)
    x, weight = values["x"], values["weight"]
    steps = torch.arange(70.0).mul(255 / 69).round()
    x[0], x[1], x[2], x[3], x[4] = steps, steps - 255, (steps - 100) / 4, -0.0, 2.0**-30
    x[5], x[6], x[7], x[8] = 1, 1, 1, 1
    x[5, 3], x[6, 69], x[7, 64], x[8, 0], x[8, 1] = torch.inf, -torch.inf, torch.nan, 3e38, -3e38
    x[5, 60], weight[0] = torch.nan, -128
    codes = torch.zeros(9, 70, dtype=torch.int64)
    codes[0], codes[1], codes[2] = steps, steps - 255, steps - 100
    scales = torch.tensor([1, 1, 0.25, 1, 1, *[torch.nan] * 4])[:, None]
    want = (codes @ weight.long().T).float() * scales * values["scales"]
    for got in on_all_machines(case, graph, values, cache):
        assert torch.equal(got.nan_to_num(1e30), want.nan_to_num(1e30))
    longer = dataclasses.replace(case, k=65_537).graph(1)
    assert not space_of(longer, target())


def test_a_given_rounding_reaches_both_ends(cache: KernelCache) -> None:
    """Infinities and what is beyond the range become its ends, NaN the lowest; sums of the largest integers fit."""
    case = Case(40, 65_536, "none", range=(-128, 127), given=(0.5, -128))
    graph = case.graph(4)
    values = quantized_values(graph)
    x, weight = values["x"], values["weight"]
    x[0], x[1], x[2], x[3] = torch.inf, -torch.inf, 1e30, torch.nan
    x[3, 0], weight[0], weight[1] = 0.25 * 3, -128, 127
    codes = torch.tensor([255, 0, 255, 0])[:, None].expand(4, 65_536).clone()
    codes[3, 0] = 2
    want = (codes @ weight.long().T).float() * (0.5 * values["scales"])
    assert torch.equal(next(iter(evaluate(graph, values).values())), want)
    for got in on_all_machines(case, graph, values, cache):
        assert torch.equal(got, want)
    longer = dataclasses.replace(case, k=65_537).graph(1)
    assert not space_of(longer, target())


def test_scales_whose_product_fp32_does_not_hold(cache: KernelCache) -> None:
    """Neither infinity times zero nor a number that is too small on the way."""
    for scale, other, size in ((1e30, 1e10, 0.0), (1e-30, 1e-12, 1e-29), (2.0**100, 2.0**-130, 2.0**103)):
        case = Case(40, 99, "none", range=(-128, 127), given=(scale, 0))
        graph = case.graph(3)
        values = quantized_values(graph)
        values["x"], values["scales"] = values["x"] * size, torch.full((40,), other)
        (want,) = evaluate(graph, values).values()
        exact = (values["x"].double() / scale).round() @ values["weight"].double().T * scale * other
        torch.testing.assert_close(want.double(), exact, rtol=1e-5, atol=2.0**-140)
        for got in on_all_machines(case, graph, values, cache):
            assert torch.equal(got, want)


def test_matrix_tiles_give_the_same_numbers(cache: KernelCache) -> None:
    """By the model of the tiles' instructions, on machines without them."""
    aim = target()
    lanes = aim.vector_lanes
    cases = [CASES[0], CASES[5], CASES[6], Case(40, 99, "none", range=(-128, 127))]
    cases.append(Case(40, 99, "none", range=(-128, 127), given=(0.02, -7)))
    cases.append(Case(40, 99, "none", range=(-128, 127), symmetric=False))
    choices = []
    for case in cases:
        match = match_of(case.graph(1), aim)
        parameters = int8_parameters(match, aim, (32, -(-min(case.n, 32) // 16) * 16 // lanes), 512, True)
        if case.range is not None:
            parameters = stored_parameters(match, parameters)
        small = {"kc": 64, "chunk": 128} if case.chunked else {}
        choices.append(dataclasses.replace(parameters, mc=2 * parameters.mr, serial_below=0, **small))
        assert choices[-1].steps % 16 == choices[-1].kc % 16 == choices[-1].chunk % 16 == 0
    for case, parameters, library in zip(cases, choices, built(choices, aim, cache), strict=True):
        for rows in (1, 33, 75):
            graph = case.graph(rows)
            values = quantized_values(graph, rows)
            (want,) = evaluate(graph, values).values()
            for threads in (1, 2):
                (got,) = run(graph, values, aim, parameters, library, threads).values()
                if case.chain == "norm":
                    torch.testing.assert_close(got, want, rtol=2.0**-20, atol=2.0**-18)
                else:
                    assert torch.equal(got, want), (case, rows)


AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni"})


def test_matrix_tiles_are_taken_where_the_target_has_them(tmp_path: Path) -> None:
    aim = target(Isa.AVX512, AMX)
    match = match_of(Case(768, 768).graph(128), aim)
    choices = CpuInt8Gemm().space(match, aim)
    seconds = [CpuInt8Gemm().cost(match, c, aim).seconds(aim) for c in choices]
    assert choices[seconds.index(min(seconds))].tiles and not all(c.tiles for c in choices)
    assert not any(c.tiles for c in CpuInt8Gemm().space(match, target(Isa.AVX512, AMX - {"amx_int8"})))
    text = assembly(KernelSpec("quantized_gemm", "cpu/gemm.cpp.j2", choices[0]), aim, tmp_path)
    assert text.count("tdpbusd") >= 4 and "ldtilecfg" in text and "tilerelease" in text


@pytest.mark.parametrize("integers", [None, (-128, 127)], ids=["rounded", "stored"])
def test_rows_that_have_no_scale(integers: tuple[int, int] | None, cache: KernelCache) -> None:
    """NaN and infinities make their rows NaN and no others; zeros, tiny and huge numbers are what they are."""
    case = Case(40, 70, "none", range=integers)
    graph = case.graph(8)
    values = quantized_values(graph)
    x = values["x"]
    x[1, 5], x[2, 69], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6, 3], x[7] = 0, 1e-35, 1e4, 1e30
    values["weight"][3] = 0
    for isa, features in MACHINES:
        aim = target(isa, features)
        (parameters,) = choices_of(case, aim)
        (library,) = built([parameters], aim, cache)
        (got,) = run(graph, values, aim, parameters, library, 2).values()
        assert bool(got[1:4].isnan().all()) and bool(got[[0, 4, 5, 6, 7]].isfinite().all())
        assert not got[4:6].any() and not got[[0, 6, 7], 3].any()
        (want,) = evaluate(graph, values).values()
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_products_that_meet_in_the_epilogue(cache: KernelCache) -> None:
    case = Gated(41, 70, transposed=False)

    for isa, features in MACHINES:
        aim = target(isa, features)
        parameters = CpuInt8Gemm().space(match_of(as_quantized(case.graph(1)), aim), aim)[0]
        assert parameters.products == 2
        (library,) = built([parameters], aim, cache)
        graph = as_quantized(case.graph(19))
        values = quantized_values(graph)
        (want,) = evaluate(graph, values).values()
        (got,) = run(graph, values, aim, parameters, library, 2).values()
        # A product of two numbers behind an exponential of one of them.
        torch.testing.assert_close(got, want, rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize(
    ("isa", "features", "instruction", "most"),
    [
        (Isa.AVX512, ["avx512_vnni"], "vpdpbusd", "zmm"),
        (Isa.AVX512, [], "vpmaddwd", "zmm"),
        (Isa.AVX2, ["avx_vnni"], "vpdpbusd", "ymm"),
        (Isa.AVX2, [], "vpmaddwd", "ymm"),
    ],
)
def test_inner_loops_keep_their_sums_in_registers(
    isa: Isa, features: Sequence[str], instruction: str, most: str, tmp_path: Path
) -> None:
    """Of instruction sets that this machine lacks, too: what the compiler makes of the widest register tile."""
    aim = target(isa, frozenset(features))
    graph = Case(96, 256).graph(64)
    parameters = CpuInt8Gemm().space(match_of(graph, aim), aim)[0]
    text = assembly(KernelSpec("quantized_gemm", "cpu/gemm.cpp.j2", parameters), aim, tmp_path)
    function = re.search(rf"multiplyILi{parameters.mr}E\S*:\n(.*?)\n\s*ret", text, re.S)
    assert function is not None
    blocks = re.split(r"\n\.L\w+:", function[1])
    inner = max(blocks, key=lambda block: block.count(instruction))
    assert inner.count(instruction) == parameters.mr * parameters.nr // aim.vector_lanes and most in inner
    assert "rsp" not in inner and "rbp" not in inner


def test_layout_holds_integers_scales_and_what_128_adds() -> None:
    weight = torch.randn(19, 10)
    layout = Int8Layout(8, True, 4)
    integers, scales, offsets = layout.pack(weight)
    assert integers.shape == (3, 1, 3, 8, 4) and scales.shape == offsets.shape == (3, 1, 8)
    rows = integers.permute(0, 1, 3, 2, 4).reshape(24, 12)[:19, :10]
    assert torch.equal(-128 * rows.sum(-1, dtype=torch.int32), offsets.flatten()[:19])
    torch.testing.assert_close(rows * scales.flatten()[:19, None], weight, atol=float(scales.max()), rtol=0)
    assert not offsets.flatten()[19:].any() and not Int8Layout(8, True, 2).pack(weight)[2].any()


def test_layout_of_stored_integers_keeps_them() -> None:
    weight, scales = torch.randint(-128, 128, (10, 20), dtype=torch.int8), torch.rand(20)
    integers, columns, offsets = StoredInt8Layout(8, False, 4, parts=2).pack(weight, scales)
    rows = integers.permute(1, 0, 3, 2, 4).reshape(2, 16, 12)[:, :10, :10].flatten(0, 1)
    assert torch.equal(rows, weight.T)
    assert torch.equal(columns.permute(1, 0, 2).reshape(2, 16)[:, :10].flatten(), scales)
    assert torch.equal(offsets.permute(1, 0, 2).reshape(2, 16)[:, :10].flatten(), -128 * weight.sum(0).int())


def test_sums_that_may_not_fit_are_refused() -> None:
    for k, fits in ((MAX_TERMS, True), (MAX_TERMS + 1, False), (0, False)):
        assert bool(space_of(Case(32, k, "none").graph(1), target())) == fits
    for k, fits in ((MAX_TERMS - 1, True), (MAX_TERMS, False), (0, False)):
        assert bool(space_of(Case(32, k, "none", range=(-128, 127)).graph(1), target())) == fits
    assert MAX_TERMS * 127**2 < 2**31 and (MAX_TERMS - 1) * 128**2 < 2**31


def test_other_codes_are_refused() -> None:
    graph = Case(32, 64, codes=torch.float8_e4m3fn).graph(1)
    assert CpuInt8Gemm().space(match_of(graph, target()), target()) == []


def test_weights_are_a_quarter() -> None:
    graph, ways = Case(768, 768).graph(4), CpuInt8Gemm()
    match = match_of(graph, target())
    call = ways.call(match, ways.space(match, target())[0], target(), 2)
    packed = [ref for ref in call.tensors if isinstance(ref, Packed)]
    values = quantized_values(graph)
    size = sum(t.nbytes for t in materialized(packed, values))
    assert size <= 1.02 * values["weight"].nbytes / 4


def test_a_floor_is_that_of_the_dtype() -> None:
    vnni = Target("cpu", "avx512", frozenset({"avx512_vnni"}), 2, (32768, 2**20, 2**25), 1e11, 1e12, 0.0)
    match = match_of(Case(256, 512, "none").graph(64), vnni)
    cost = CpuInt8Gemm().cost(match, CpuInt8Gemm().space(match, vnni)[0], vnni)
    seconds, bound = floor_of(cost, vnni, 2)
    assert bound == "compute" and seconds == pytest.approx(cost.flops / (2 * vnni.rate(torch.int8)))
    assert vnni.rate(torch.int8) > vnni.peak_flops and cost.seconds(vnni) > seconds


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: "-".join((m[0].value, *m[1])))
def test_finished_rows_are_rounded_in_the_epilogue(machine: tuple[Isa, frozenset[str]], cache: KernelCache) -> None:
    """The codes and scales are those of the very rows that are stored; rows without a scale are NaN."""
    aim = target(*machine)
    cases = [Case(50, 131, "codes", factors=True), Case(100, 70, "codes", coded=True)]
    choices = [(case, choices_of(case, aim)[0]) for case in cases]
    for (case, parameters), library in zip(choices, built([c for _, c in choices], aim, cache), strict=True):
        for rows in (1, 2 * parameters.mr + 1, 61):
            graph = case.graph(rows)
            values = quantized_values(graph, rows)
            values["residual"][-1, 3] = torch.nan
            values["beta"][5] = 1e3
            want = evaluate(graph, values)
            for threads in (1, 3):
                got = run(graph, values, aim, parameters, library, threads)
                torch.testing.assert_close(got["normal"], want["normal"], rtol=2.0**-20, atol=2.0**-12, equal_nan=True)
                codes, scales = quantize_rows(got["normal"])
                assert torch.equal(got["next_codes"], codes)
                assert torch.equal(got["next_scales"].nan_to_num(-1), scales.nan_to_num(-1))
            # Nothing else may read the rows themselves.
            alone = dataclasses.replace(graph, outputs=graph.outputs[1:])
            assert [*match_of(alone, aim).program.output_dtypes] == [DType.I8, DType.F32]
