"""Products in int8 on the emulator: the numbers of the operators, and so those of CPUs; what nvcc says about them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gated import Gated
from int8_cases import Case, as_int8, quantized_values, with_integers
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.quantization import MAX_TERMS
from fuser.ir.target import cuda_target, emulated_target
from fuser.kernels.base import KernelSpec, materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import CudaGatedGemmParameters, CudaGemm, Tile
from fuser.kernels.gemm_int8 import Int8GemmFamily
from fuser.kernels.gemm_int8_cuda import CudaInt8Gemm, CudaInt8WeightGemm, Int8RowLayout
from fuser.kernels.gemm_int8_weight import Int8WeightGemmFamily
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.runtime.nvcc import Resources

EMULATED = emulated_target()
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
]


def match_of(graph: OperatorGraph) -> GemmMatch:
    family = Int8WeightGemmFamily() if graph.compute[0].kind == "int8_weight_gemm" else Int8GemmFamily()
    match = family.match(graph.group(graph.compute), EMULATED)
    assert match is not None
    return match


def parameters_of(match: GemmMatch, tile: Tile | None = None) -> CudaGatedGemmParameters:
    ours: Any = CudaInt8WeightGemm() if match.gemm.kind == "int8_weight_gemm" else CudaInt8Gemm()
    choices = ours.space(match, EMULATED)
    assert choices and all(ours.cost(match, c, EMULATED).seconds(EMULATED) > 0 for c in choices)
    first: CudaGatedGemmParameters = choices[0]
    if tile is None:
        return first
    # A tile's depth is given in bytes.
    return dataclasses.replace(first, tile=dataclasses.replace(tile, bk=tile.bk // first.dtype.bytes))


def run(graph: OperatorGraph, values: Mapping[str, Tensor], parameters: CudaGatedGemmParameters) -> Tensor:
    match = match_of(graph)
    ours: Any = CudaInt8Gemm() if parameters.integer else CudaInt8WeightGemm()
    call = ours.call(match, parameters, EMULATED, 1)
    source = render(call.spec)
    path = build([source], EMULATED, headers=header_folder(EMULATED))[source.symbol]
    results = {v: torch.full(graph.values[v].shape, torch.nan, dtype=graph.values[v].dtype) for v in graph.outputs}
    tensors = materialized(call.tensors, {**values, **results})
    workspace = torch.full((call.workspace_bytes // 4 + 4,), torch.nan)
    emulator.run(path, source.symbol, tensors, call.extents, workspace=workspace)
    (result,) = results.values()
    return result


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator's checking mode needs g++")
def test_no_race_and_no_access_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    for case, tile in ((Case(77, 131, factors=True), SMALL), (Case(100, 515, "norm"), SPLIT)):
        check_equal(case, tile, 19)
    graph = with_integers(Case(77, 131).graph(19))
    run(graph, quantized_values(graph), parameters_of(match_of(graph), SMALL))


def test_rows_that_have_no_scale() -> None:
    """NaN and infinities make their rows NaN and no others; zeros, tiny and huge numbers are what they are."""
    graph = Case(40, 70, "none").graph(8)
    values = quantized_values(graph)
    x = values["x"]
    x[1, 5], x[2, 69], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6, 3], x[7] = 0, 1e-35, 1e4, 1e30
    values["weight"][3] = 0
    got = run(graph, values, parameters_of(match_of(graph), SMALL))
    assert bool(got[1:4].isnan().all()) and bool(got[[0, 4, 5, 6, 7]].isfinite().all())
    (want,) = evaluate(graph, values).values()
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("only_weights", [False, True])
def test_products_that_meet_in_the_epilogue(only_weights: bool) -> None:
    plain = Gated(41, 70, transposed=False).graph(19)
    graph = with_integers(plain) if only_weights else as_int8(plain)
    match = match_of(graph)
    parameters = parameters_of(match)
    assert match.products == parameters.products == 2 and not parameters.separate
    values = quantized_values(graph)
    (want,) = evaluate(graph, values, torch.float64 if only_weights else None).values()
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
        assert bool(CudaInt8Gemm().space(match_of(Case(32, k, "none").graph(1)), EMULATED)) == fits


def test_rows_of_weights_start_at_vectors() -> None:
    weight = torch.randn(19, 10)
    integers, scales = Int8RowLayout(True).pack(weight)
    assert integers.shape == (19, 16) and not integers[:, 10:].any() and scales.shape == (19,)
    torch.testing.assert_close(integers[:, :10] * scales[:, None], weight, atol=float(scales.max()), rtol=0)
    other = Int8RowLayout(False).pack(weight.t())
    assert torch.equal(other[0], integers) and torch.equal(other[1], scales)


def test_int8_costs_less_where_tensor_cores_multiply_it() -> None:
    """For many rows half of fp16's time or less than it, for few the weights' bytes."""
    target = cuda_target("sm_80")
    graph = Case(3072, 768, dtype=torch.float16).graph(8192)
    match = match_of(graph)
    plain = dataclasses.replace(match, gemm=match.gemm)
    fast = CudaInt8Gemm().cost(match, CudaInt8Gemm().space(match, target)[0], target).seconds(target)
    slow = CudaGemm().cost(plain, CudaGemm().space(plain, target)[0], target).seconds(target)
    assert fast < slow


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_registers_spill(arch: str, compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]) -> None:
    target = cuda_target(arch)
    large = Case(768, 3072, "norm", factors=True).graph(4096)
    few = with_integers(Case(3072, 768, dtype=torch.float16).graph(8))
    for graph, ours in ((large, CudaInt8Gemm()), (few, CudaInt8WeightGemm())):
        match = match_of(graph)
        call = ours.call(match, ours.space(match, target)[0], target, 1)  # type: ignore[attr-defined]
        for kernel in compile_cuda(call.spec, arch):
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
