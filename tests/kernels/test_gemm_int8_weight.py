"""Products with weights in int8 against float64, on every instruction set at hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gated import Gated
from int8_cases import NATIVE, Case, quantized_values, target, with_integers
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.quantization import integers_of, recovered_scales, scales_of
from fuser.ir.target import Isa, Target
from fuser.kernels.base import materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_int8_weight import CpuInt8WeightGemm, Int8WeightGemmFamily, Int8WeightLayout
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cache import default_cache
from fuser.runtime.library import load

CASES = [
    Case(5, 2),
    Case(50, 131, "norm"),
    Case(33, 64, transposed=False),
    Case(70, 1100, chunked=True),
    Case(40, 99, "none", dtype=torch.bfloat16),
]


def match_of(graph: OperatorGraph, machine: Target) -> GemmMatch:
    match = Int8WeightGemmFamily().match(graph.group(graph.compute), machine)
    assert match is not None
    return match


def run(graph: OperatorGraph, values: dict[str, Tensor], machine: Target, threads: int, chunked: bool) -> Tensor:
    match = match_of(graph, machine)
    parameters = CpuInt8WeightGemm().space(match, machine)[0]
    small = {"kc": 64, "chunk": 128} if chunked else {}
    parameters = dataclasses.replace(parameters, mc=2 * parameters.mr, serial_below=0, **small)
    call = CpuInt8WeightGemm().call(match, parameters, machine, threads)
    source = render(call.spec)
    library = build([source], machine, headers=header_folder(machine), cache=default_cache())[source.symbol]
    results = {v: torch.full(graph.values[v].shape, torch.nan, dtype=graph.values[v].dtype) for v in graph.outputs}
    tensors = materialized(call.tensors, {**values, **results})
    workspace = torch.full((call.workspace_bytes // 4 + 16,), torch.nan)
    kernel = load(library, source.symbol)
    kernel(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, threads, workspace.data_ptr()))
    (result,) = results.values()
    return result


@pytest.mark.parametrize("isa", [NATIVE, Isa.PORTABLE], ids=lambda isa: isa.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.n}x{case.k}-{case.chain}")
def test_kernels_give_the_numbers_of_the_operator(isa: Isa, case: Case) -> None:
    aim = target(isa)
    for rows in (1, 2, 19):
        graph = with_integers(case.graph(rows))
        values = quantized_values(graph)
        (want,) = evaluate(graph, values, torch.float64).values()
        rounding = 2.0**-8 if case.dtype == torch.bfloat16 else case.k * 2.0**-23
        for threads in (1, 2):
            got = run(graph, values, aim, threads, case.chunked).double()
            torch.testing.assert_close(got, want, rtol=rounding, atol=rounding * max(1.0, float(want.abs().max())))


def test_products_that_meet_in_the_epilogue() -> None:
    graph = with_integers(Gated(41, 70, transposed=False).graph(3))
    assert match_of(graph, target()).products == 2
    values = quantized_values(graph)
    (want,) = evaluate(graph, values, torch.float64).values()
    got = run(graph, values, target(), 2, False)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_layout_holds_bytes_and_scales() -> None:
    weight = torch.randn(10, 19)
    integers, scales = integers_of(weight, False), scales_of(weight, False)
    assert integers.shape == (19, 10) and int(integers.abs().max()) == 127
    packed, columns = Int8WeightLayout(8, True).pack(integers, scales)
    assert packed.dtype == torch.int8 and packed.shape == (3, 1, 10, 8) and columns.shape == (3, 1, 8)
    rows = packed.permute(0, 1, 3, 2).reshape(24, 10)[:19]
    torch.testing.assert_close(rows * columns.flatten()[:19, None], weight.T, atol=float(scales.max()) / 2, rtol=0)


def test_scales_are_found_again() -> None:
    integers = torch.randint(-128, 128, (6, 9), dtype=torch.int8)
    integers[2] = 0
    scales = torch.rand(6) + 0.1
    weight = integers * scales[:, None]
    found = recovered_scales(weight, integers, True)
    assert found[2] == 0
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], scales[[0, 1, 3, 4, 5]], rtol=1e-6, atol=0)
    torch.testing.assert_close(recovered_scales(weight.T, integers.T, False), found, rtol=0, atol=0)
    with pytest.raises(ValueError, match="one scale for each output"):
        recovered_scales(weight + 0.01, integers, True)
    with pytest.raises(ValueError, match="one scale for each output"):
        recovered_scales(integers * (torch.rand(9) + 0.1), integers, True)
