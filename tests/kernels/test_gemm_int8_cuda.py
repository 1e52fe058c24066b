"""Products in eight bits on the emulator: the numbers of the operators, and for int8 those of CPUs; what nvcc says."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gated import Gated
from int8_cases import Case, as_quantized, quantized_values, unwritten, with_integers
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.quantization import MAX_TERMS, quantize_rows
from fuser.ir.target import CUDA_ARCHS, cuda_target, emulated_target
from fuser.kernels.base import KernelSpec, materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import CudaGatedGemmParameters, CudaGemm, Tile
from fuser.kernels.gemm_int8 import CodeGemmFamily, QuantizedGemmFamily
from fuser.kernels.gemm_int8_cuda import (
    CudaCodeGemm,
    CudaInt8WeightGemm,
    CudaQuantizedGemm,
    CudaQuantizedGemmParameters,
    QuantizedRowLayout,
)
from fuser.kernels.gemm_int8_weight import Int8WeightGemmFamily
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.runtime.nvcc import Resources

EMULATED = emulated_target()
ADA = emulated_target("sm_89")
FP8 = torch.float8_e4m3fn
SMALL = Tile(16, 64, 64, 1, 4, 2, 1)
WHOLE = Tile(32, 128, 128, 1, 4, 3, 1)
SPLIT = Tile(16, 64, 64, 1, 4, 3, 3)

CASES = [
    (Case(5, 2), SMALL),
    (Case(7, 3, "none"), SMALL),
    (Case(77, 131, factors=True), Tile(64, 64, 64, 2, 2, 2, 1)),
    (Case(50, 64, transposed=False), SMALL),
    (Case(50, 131, "norm", factors=True), WHOLE),
    # Rows that a second kernel finishes, and sums that blocks share.
    (Case(100, 257, "norm"), SMALL),
    (Case(70, 1100, factors=True), SPLIT),
    (Case(100, 1100, "norm"), SPLIT),
    (Case(40, 99, "none", dtype=torch.bfloat16), SMALL),
    (Case(40, 96, "none", dtype=torch.float16), SMALL),
    (Case(50, 64, transposed=False, factors=True, coded=True), SMALL),
    (Case(50, 131, "norm", coded=True), WHOLE),
    (Case(100, 1100, "norm", factors=True, coded=True), SPLIT),
    (Case(40, 99, "none", dtype=torch.bfloat16, coded=True), SMALL),
]


FAMILIES = {family.kind.kind: family for family in (QuantizedGemmFamily(), CodeGemmFamily(), Int8WeightGemmFamily())}
WAYS: dict[str, Any] = {
    "quantized_gemm": CudaQuantizedGemm(),
    "code_gemm": CudaCodeGemm(),
    "int8_weight_gemm": CudaInt8WeightGemm(),
}


def match_of(graph: OperatorGraph) -> GemmMatch:
    match = FAMILIES[graph.compute[0].kind].match(graph.group(graph.compute), EMULATED)
    assert match is not None
    return match


def parameters_of(match: GemmMatch, tile: Tile | None = None) -> CudaGatedGemmParameters:
    ours = WAYS[match.gemm.kind]
    choices = ours.space(match, ADA)
    assert choices and all(ours.cost(match, c, ADA).seconds(ADA) > 0 for c in choices)
    first: CudaGatedGemmParameters = choices[0]
    if tile is None:
        return first
    # A tile's depth is given in bytes.
    return dataclasses.replace(first, tile=dataclasses.replace(tile, bk=tile.bk // first.dtype.bytes))


def run(graph: OperatorGraph, values: Mapping[str, Tensor], parameters: CudaGatedGemmParameters) -> Tensor:
    (result,) = run_with_workspace(graph, values, parameters)[0].values()
    return result


def run_with_workspace(
    graph: OperatorGraph, values: Mapping[str, Tensor], parameters: CudaGatedGemmParameters
) -> tuple[dict[str, Tensor], Tensor]:
    match = match_of(graph)
    ours = WAYS[match.gemm.kind]
    call = ours.call(match, parameters, EMULATED, 1)
    source = render(call.spec)
    path = build([source], EMULATED, headers=header_folder(EMULATED))[source.symbol]
    results = {v: unwritten(graph.values[v]) for v in graph.outputs}
    tensors = materialized(call.tensors, {**values, **results})
    workspace = torch.full((call.workspace_bytes // 4 + 4,), torch.nan)
    emulator.run(path, source.symbol, tensors, call.extents, workspace=workspace)
    return results, workspace


def check_equal(case: Case, tile: Tile, rows: int) -> None:
    graph = case.graph(rows)
    values = quantized_values(graph, rows)
    (want,) = evaluate(graph, values).values()
    got = run(graph, values, parameters_of(match_of(graph), tile))
    if case.chain == "norm":
        torch.testing.assert_close(got, want, rtol=2.0**-20, atol=2.0**-18)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize(("case", "tile"), CASES, ids=str)
def test_kernels_give_the_numbers_of_the_operator(case: Case, tile: Tile) -> None:
    for rows in (1, tile.bm + 5):
        check_equal(case, tile, rows)


def check_fp8(case: Case, tile: Tile, rows: int) -> None:
    """Against exact sums of the codes' products: what is left are roundings of fp32 sums, and of results."""
    graph = case.graph(rows)
    values = quantized_values(graph, rows)
    (want,) = evaluate(graph, values, torch.float64).values()
    parameters = parameters_of(match_of(graph), tile)
    assert parameters.dtype.torch == FP8 and parameters.rounded and not parameters.integer
    got = run(graph, values, parameters).double()
    # Sums of K products have so many roundings at most, of which most cancel.
    rounding = {torch.float32: case.k**0.5 * 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[case.dtype]
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(("case", "tile"), [CASES[i] for i in (0, 4, 6, 7, 8, 10, 12)], ids=str)
def test_kernels_give_the_numbers_of_fp8(case: Case, tile: Tile) -> None:
    for rows in (1, tile.bm + 5):
        check_fp8(dataclasses.replace(case, codes=FP8), tile, rows)


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("codes", [torch.int8, FP8], ids=str)
def test_rows_become_the_codes_of_the_operator(codes: torch.dtype, factors: bool) -> None:
    case, rows = Case(40, 203, "none", factors=factors, codes=codes), 9
    graph = case.graph(rows)
    values = quantized_values(graph)
    values["x"] *= torch.logspace(-9, 9, rows)[:, None]
    values["x"][2, 5], values["x"][3], values["x"][4, 7:] = torch.nan, 0, values["x"][4, 7:] * 1e-4
    parameters = parameters_of(match_of(graph), SMALL)
    assert isinstance(parameters, CudaQuantizedGemmParameters)
    _, workspace = run_with_workspace(graph, values, parameters)
    depth = parameters.depth_bytes
    found = workspace.view(torch.uint8)[: rows * depth].view(rows, depth)
    want, scales = quantize_rows(values["x"], *([values["factors"]] if factors else []), codes=codes)
    assert torch.equal(found[:, : case.k], want.view(torch.uint8))
    got = workspace[rows * depth // 4 :][:rows, None]
    assert torch.equal(got.nan_to_num(-1), scales.nan_to_num(-1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator's checking mode needs g++")
def test_no_race_and_no_access_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    for case, tile in ((Case(77, 131, factors=True), SMALL), (Case(100, 515, "norm"), SPLIT)):
        check_equal(case, tile, 19)
        check_fp8(dataclasses.replace(case, codes=FP8), tile, 19)
    graph = with_integers(Case(77, 131).graph(19))
    run(graph, quantized_values(graph), parameters_of(match_of(graph), SMALL))


@pytest.mark.parametrize("codes", [torch.int8, FP8], ids=str)
def test_rows_that_have_no_scale(codes: torch.dtype) -> None:
    """NaN and infinities make their rows NaN and no others; zeros, tiny and huge numbers are what they are."""
    graph = Case(40, 70, "none", codes=codes).graph(8)
    values = quantized_values(graph)
    x = values["x"]
    x[1, 5], x[2, 69], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6, 3], x[7] = 0, 1e-35, 1e4, 1e30
    values["weight"][3] = 0
    got = run(graph, values, parameters_of(match_of(graph), SMALL))
    assert bool(got[1:4].isnan().all()) and bool(got[[0, 4, 5, 6, 7]].isfinite().all())
    (want,) = evaluate(graph, values).values()
    # Sums of 70 products in fp32; those of integers are exact.
    off = 0.0 if codes is torch.int8 else 70 * 2.0**-24 * want.nan_to_num().abs().amax(-1, keepdim=True)
    assert bool(((got.nan_to_num() - want.nan_to_num()).abs() <= off).all())


@pytest.mark.parametrize("codes", [None, torch.int8, FP8], ids=str)
def test_products_that_meet_in_the_epilogue(codes: torch.dtype | None) -> None:
    plain = Gated(41, 70, transposed=False).graph(19)
    graph = with_integers(plain) if codes is None else as_quantized(plain, codes)
    match = match_of(graph)
    parameters = parameters_of(match)
    assert match.products == parameters.products == 2 and not parameters.separate
    values = quantized_values(graph)
    (want,) = evaluate(graph, values, None if codes is torch.int8 else torch.float64).values()
    got = run(graph, values, parameters)
    torch.testing.assert_close(got.to(want.dtype), want, rtol=2.0**-18, atol=2.0**-18 * float(want.abs().max()))


@pytest.mark.parametrize("tile", [SMALL, SPLIT], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(50, 531, "norm"),
        Case(77, 531, transposed=False),
        Case(40, 531, "none", dtype=torch.bfloat16),
        Case(40, 528, dtype=torch.float16),
    ],
    ids=str,
)
def test_weights_alone(case: Case, tile: Tile) -> None:
    graph = with_integers(case.graph(19))
    values = quantized_values(graph)
    (want,) = evaluate(graph, values, torch.float64).values()
    parameters = parameters_of(match_of(graph), tile)
    assert parameters.w_dtype.torch == torch.int8 and parameters.dtype.torch == case.dtype
    got = run(graph, values, parameters).double()
    rounding = {torch.float32: case.k * 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[case.dtype]
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding * max(1.0, float(want.abs().max())))


def test_sums_that_may_not_fit_are_refused() -> None:
    for k, fits in ((MAX_TERMS, True), (MAX_TERMS + 1, False), (0, False)):
        assert bool(CudaQuantizedGemm().space(match_of(Case(32, k, "none").graph(1)), EMULATED)) == fits


def test_fp8_is_refused_where_nothing_multiplies_it() -> None:
    graph = Case(32, 64, "none", codes=FP8).graph(1)
    for arch in CUDA_ARCHS:
        assert bool(CudaQuantizedGemm().space(match_of(graph), cuda_target(arch))) == (
            arch not in ("sm_80", "sm_86", "sm_87")
        )
    # Sums of fp32 are never too long.
    assert CudaQuantizedGemm().space(match_of(Case(32, MAX_TERMS + 1, "none", codes=FP8).graph(1)), ADA)


def test_rows_of_weights_start_at_vectors() -> None:
    weight = torch.randn(19, 10)
    integers, scales = QuantizedRowLayout(True).pack(weight)
    assert integers.shape == (19, 16) and not integers[:, 10:].any() and scales.shape == (19,)
    torch.testing.assert_close(integers[:, :10] * scales[:, None], weight, atol=float(scales.max()), rtol=0)
    other = QuantizedRowLayout(False).pack(weight.t())
    assert torch.equal(other[0], integers) and torch.equal(other[1], scales)
    codes, scales = QuantizedRowLayout(True, FP8).pack(weight)
    want, of = quantize_rows(weight, codes=FP8)
    assert torch.equal(codes[:, :10].float(), want.float()) and torch.equal(scales, of[:, 0])
    assert codes.shape == (19, 16) and not codes[:, 10:].float().any()


def test_int8_costs_less_where_tensor_cores_multiply_it() -> None:
    """For many rows half of fp16's time or less than it, for few the weights' bytes."""
    target = cuda_target("sm_80")
    graph = Case(3072, 768, dtype=torch.float16).graph(8192)
    match = match_of(graph)
    plain = dataclasses.replace(match, gemm=match.gemm)
    fast = CudaQuantizedGemm().cost(match, CudaQuantizedGemm().space(match, target)[0], target).seconds(target)
    slow = CudaGemm().cost(plain, CudaGemm().space(plain, target)[0], target).seconds(target)
    assert fast < slow


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
def test_fp8_compiles_where_it_is_multiplied(
    arch: str, compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]
) -> None:
    target = cuda_target(arch)
    match = match_of(Case(768, 3072, "norm", factors=True, codes=FP8).graph(4096))
    ours = CudaQuantizedGemm()
    call = ours.call(match, ours.space(match, target)[0], target, 1)
    for kernel in compile_cuda(call.spec, arch):
        # On Hopper ptxas makes a product of conversions to fp16, and the widest tile lacks two registers for them.
        assert kernel.spill_store_bytes <= (8 if arch == "sm_90" else 0), kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_registers_spill(arch: str, compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]) -> None:
    target = cuda_target(arch)
    large = Case(768, 3072, "norm", factors=True).graph(4096)
    few = with_integers(Case(3072, 768, dtype=torch.float16).graph(8))
    for graph, ours in ((large, CudaQuantizedGemm()), (few, CudaInt8WeightGemm())):
        match = match_of(graph)
        call = ours.call(match, ours.space(match, target)[0], target, 1)  # type: ignore[attr-defined]
        for kernel in compile_cuda(call.spec, arch):
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel


@pytest.mark.parametrize("codes", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize(
    ("case", "tile"),
    [(Case(50, 131, "codes", factors=True), WHOLE), (Case(100, 1100, "codes", coded=True), SPLIT)],
    ids=str,
)
def test_finished_rows_are_rounded_in_the_epilogue(
    case: Case, tile: Tile, codes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes and scales are those of the very rows that are stored, and nothing races for them."""
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    graph = dataclasses.replace(case, codes=codes).graph(tile.bm + 5)
    values = quantized_values(graph)
    values["residual"][-1, 3] = torch.nan
    got, _ = run_with_workspace(graph, values, parameters_of(match_of(graph), tile))
    want, scales = quantize_rows(got["normal"], codes=codes)
    assert torch.equal(got["next_codes"].view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(got["next_scales"].nan_to_num(-1), scales.nan_to_num(-1))
    exact = evaluate(graph, values, torch.float64)["normal"]
    torch.testing.assert_close(got["normal"].double(), exact, rtol=2.0**-14, atol=2.0**-12, equal_nan=True)
