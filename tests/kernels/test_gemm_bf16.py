"""Products of fp32 tensors in bf16 against the operator in float64, on CPUs and on the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import Gated
from int8_cases import NATIVE, Case, assembly, quantized_values, target
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.operators import Bf16Gemm
from fuser.ir.target import Isa, Target, cuda_target, emulated_target
from fuser.kernels import gemm
from fuser.kernels.base import DType, KernelSpec, materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_bf16 import Bf16GemmFamily, CpuBf16Gemm, CudaBf16Gemm
from fuser.kernels.gemm_cuda import Tile
from fuser.runtime import emulator
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.library import load
from fuser.runtime.nvcc import Resources

BF16 = target(Isa.AVX512, frozenset({"avx512_bf16"}))
EMULATED = emulated_target()
CASES = [Case(5, 2), Case(50, 131, "norm"), Case(33, 64, transposed=False), Case(70, 1101)]


def in_bf16(graph: OperatorGraph) -> OperatorGraph:
    operators = [
        dataclasses.replace(op, semantics=Bf16Gemm(op.semantics.transposed), inputs=op.inputs[:2])  # type: ignore[attr-defined]
        if op.kind in ("gemm", "quantized_gemm")
        else op
        for op in graph.operators
    ]
    return dataclasses.replace(graph, operators=tuple(operators))


def match_of(graph: OperatorGraph, machine: Target) -> GemmMatch:
    match = Bf16GemmFamily().match(graph.group(graph.compute), machine)
    assert match is not None
    return match


def check(graph: OperatorGraph, k: int, run: Callable[[OperatorGraph, dict[str, Tensor]], Tensor]) -> None:
    """Products of bf16 numbers are exact in fp32, so only sums round."""
    values = quantized_values(graph)
    (want,) = evaluate(graph, values, torch.float64).values()
    rounding = k * 2.0**-23
    got = run(graph, values).double()
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding * max(1.0, float(want.abs().max())))


def on_cpu(graph: OperatorGraph, values: dict[str, Tensor]) -> Tensor:
    """By whatever vectors are at hand: pairs are multiplied in any width."""
    machine = target(NATIVE)
    match = match_of(graph, machine)
    choice = CpuBf16Gemm().choices(match, machine, DType.BF16, pairs=True)[0]
    assert choice.pairs and choice.a_dtype is DType.F32
    call = CpuBf16Gemm().call(match, dataclasses.replace(choice, serial_below=0), machine, 2)
    return _run(call, graph, values, machine)


def _run(call: Any, graph: OperatorGraph, values: dict[str, Tensor], machine: Target) -> Tensor:
    source = render(call.spec)
    library = build([source], machine, headers=header_folder(machine))[source.symbol]
    results = {v: torch.full(graph.values[v].shape, torch.nan, dtype=graph.values[v].dtype) for v in graph.outputs}
    tensors = materialized(call.tensors, {**values, **results})
    workspace = torch.full((call.workspace_bytes // 4 + 16,), torch.nan)
    if machine.kind == "cuda":
        emulator.run(library, source.symbol, tensors, call.extents, workspace=workspace)
    else:
        pointers = [t.data_ptr() for t in tensors]
        load(library, source.symbol)(KernelArgs.pack(pointers, call.extents, 2, workspace.data_ptr()))
    (result,) = results.values()
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_cpus(case: Case) -> None:
    for rows in (1, 19):
        check(in_bf16(case.graph(rows)), case.k, on_cpu)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_emulator(case: Case) -> None:
    def run(graph: OperatorGraph, values: dict[str, Tensor]) -> Tensor:
        match = match_of(graph, EMULATED)
        choice = CudaBf16Gemm().space(match, EMULATED)[0]
        assert CudaBf16Gemm().cost(match, choice, EMULATED).seconds(EMULATED) > 0
        tile = Tile(16, 64, 32, 1, 4, 3, 2 if case.k > 1000 else 1)
        call = CudaBf16Gemm().call(match, dataclasses.replace(choice, tile=tile), EMULATED, 1)
        return _run(call, graph, values, EMULATED)

    check(in_bf16(case.graph(19)), case.k, run)


def test_products_that_meet_in_the_epilogue() -> None:
    graph = in_bf16(Gated(41, 70, transposed=False).graph(19))
    assert match_of(graph, EMULATED).products == 2

    def run(graph: OperatorGraph, values: dict[str, Tensor]) -> Tensor:
        match = match_of(graph, EMULATED)
        return _run(
            CudaBf16Gemm().call(match, CudaBf16Gemm().space(match, EMULATED)[0], EMULATED, 1), graph, values, EMULATED
        )

    check(graph, 4 * 70, run)
    check(graph, 4 * 70, on_cpu)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_matrix_tiles(case: Case) -> None:
    """By the model of the tiles' instructions, on machines without them."""
    machine = target(NATIVE)

    def run(graph: OperatorGraph, values: dict[str, Tensor]) -> Tensor:
        match = match_of(graph, machine)
        program = match.program
        vectors = -(-min(case.n, 32) // 16) * 16 // machine.vector_lanes
        choice = gemm.parameters(
            match.n,
            match.k,
            program.expression,
            program.operands,
            program.output_dtypes,
            machine,
            w_dtype=DType.BF16,
            mr=32,
            vectors=vectors,
            pairs=True,
            tiles=True,
        )
        small = {"kc": 64, "chunk": 128} if case.k > 1000 else {}
        choice = dataclasses.replace(choice, mc=64, serial_below=0, **small)
        return _run(CpuBf16Gemm().call(match, choice, machine, 2), graph, values, machine)

    for rows in (1, 19, 75):
        check(in_bf16(case.graph(rows)), case.k, run)


def test_matrix_tiles_are_compiled(tmp_path: Path) -> None:
    aim = target(Isa.AVX512, frozenset({"amx_tile", "amx_bf16", "avx512_bf16"}))
    match = match_of(in_bf16(Case(768, 768).graph(128)), aim)
    choices = CpuBf16Gemm().space(match, aim)
    seconds = [CpuBf16Gemm().cost(match, c, aim).seconds(aim) for c in choices]
    assert choices[seconds.index(min(seconds))].tiles and not all(c.tiles for c in choices)
    text = assembly(KernelSpec("bf16_gemm", "cpu/gemm.cpp.j2", choices[0]), aim, tmp_path)
    assert text.count("tdpbf16ps") >= 4 and "ldtilecfg" in text


def test_only_where_pairs_are_multiplied() -> None:
    graph = in_bf16(Case(256, 512, "none").graph(64))
    assert not CpuBf16Gemm().space(match_of(graph, target(Isa.AVX2)), target(Isa.AVX2))
    match = match_of(graph, BF16)
    cost = CpuBf16Gemm().cost(match, CpuBf16Gemm().space(match, BF16)[0], BF16)
    assert cost.peak(BF16) == BF16.rate(torch.bfloat16) > BF16.peak_flops


def test_nvcc(compile_cuda: Callable[[KernelSpec, str], tuple[Resources, ...]]) -> None:
    machine = cuda_target("sm_80")
    match = match_of(in_bf16(Case(768, 3072, "norm").graph(4096)), machine)
    call = CudaBf16Gemm().call(match, CudaBf16Gemm().space(match, machine)[0], machine, 1)
    for kernel in compile_cuda(call.spec, "sm_80"):
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
