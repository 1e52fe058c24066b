"""The `concat` family: tensors of any layout and rank one behind the other; what it declines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Concat
from fuser.ir.target import Target, emulated_target
from fuser.kernels.base import KernelCall
from fuser.kernels.concat import CPU_CONCAT, CUDA_CONCAT, ConcatFamily
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load


def graph(parts: list[Tensor], dim: int) -> OperatorGraph:
    names = tuple(f"part{i}" for i in range(len(parts)))
    values = {n: TensorSpec(tuple(t.shape), t.dtype, t.stride()) for n, t in zip(names, parts, strict=True)}
    values["out"] = TensorSpec.contiguous(torch.cat(parts, dim).shape, parts[0].dtype)
    operators = (Operator("out", Concat(dim), names, ("out",)),)
    return OperatorGraph(operators, values, names, ("out",), {})


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


GRID = normal(2, 6, 8, 5)
CASES = {
    "a token before patches": ([normal(3, 1, 7), normal(3, 4, 7)], 1),
    "windows": ([GRID[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], 3),
    "batches": ([normal(2, 3, 4), normal(1, 3, 4)], 0),
    "matrices": ([normal(3, 2), normal(4, 2)], 0),
    "rows of heads": ([normal(2, 5, 3, 4).transpose(1, 2), normal(2, 3, 2, 4)], 2),
    "heads of windows": ([normal(2, 3, 5, 2, 4).transpose(2, 3), normal(2, 3, 2, 1, 4)], 3),
    "a column": ([normal(4, 3, 1), normal(4, 3, 6)], 2),
    "half": ([normal(2, 3, 4, dtype=torch.bfloat16), normal(2, 1, 4, dtype=torch.bfloat16)], 1),
    "large": ([normal(2, 300, 64), normal(2, 1, 64)], 1),
}


def joined(case: str, target: Target, run: Callable[[KernelCall, list[Tensor]], int]) -> None:
    parts, dim = CASES[case]
    made = graph(parts, dim)
    match = ConcatFamily().match(made.group(made.operators), target)
    assert match is not None
    kernel = CPU_CONCAT if target.kind == "cpu" else CUDA_CONCAT
    (parameters,) = kernel.space(match, target)
    call = kernel.call(match, parameters, target, 2)
    assert isinstance(call, KernelCall)
    expected = evaluate(made, dict(zip(made.inputs, parts, strict=True)), torch.float64)["out"]
    out = torch.full(expected.shape, 9.0, dtype=parts[0].dtype)
    assert run(call, [*parts, out]) == 0
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_joined(case: str) -> None:
    def run(call: KernelCall, tensors: list[Tensor]) -> int:
        path = build([render(call.spec)], cpu_target(), headers=header_folder(cpu_target()))[call.spec.symbol]
        args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2)
        return load(path, call.spec.symbol).status(args)

    joined(case, cpu_target(), run)


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_joins_tensors(case: str, run_cuda: Callable[..., int]) -> None:
    joined(case, emulated_target(), lambda call, tensors: run_cuda(call.spec, tensors, call.extents))


@pytest.mark.parametrize(
    "parts",
    [[normal(1, 1, 1, 2, 2, 3)] * 2, [normal(2, 3)] * 9, [normal(3, 4).t(), normal(4, 3)]],
    ids=["rank", "parts", "columns"],
)
def test_what_is_larger_or_lies_otherwise_is_left_to_pytorch(parts: list[Tensor]) -> None:
    made = graph(parts, 0)
    assert ConcatFamily().match(made.group(made.operators), cpu_target()) is None
