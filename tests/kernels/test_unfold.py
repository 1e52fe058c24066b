"""The `unfold` family: windows that are cut by the edges, of grids of any layout and type; what it declines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Unfold
from fuser.ir.target import Target, emulated_target
from fuser.kernels.base import KernelCall
from fuser.kernels.unfold import CPU_UNFOLD, CUDA_UNFOLD, UnfoldFamily
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load


def graph(x: Tensor, how: Unfold) -> OperatorGraph:
    out = TensorSpec.contiguous(how.evaluate(x)[0].shape, x.dtype)
    values = {"x": TensorSpec(tuple(x.shape), x.dtype, x.stride()), "out": out}
    return OperatorGraph((Operator("out", how, ("x",), ("out",)),), values, ("x",), ("out",), {})


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


CASES = {
    "an image": (normal(2, 3, 13, 11, 1), Unfold((7, 7), (4, 4), (3, 3))),
    "tokens": (normal(2, 1, 6, 7, 40), Unfold((3, 3), (2, 2), (1, 1))),
    "16-bit pixels": (normal(1, 1, 4, 5, 9).bfloat16(), Unfold((3, 2), (1, 2), (0, 1))),
    "lines of a larger grid": (normal(2, 3, 9, 6, 2)[:, 1:, ::2], Unfold((2, 3), (1, 2), (2, 3))),
    "windows beyond a small grid": (normal(1, 2, 2, 1, 3), Unfold((5, 5), (1, 1), (4, 4))),
}


def unfolded(case: str, target: Target, run: Callable[[KernelCall, list[Tensor]], int]) -> None:
    x, how = CASES[case]
    made, kernel = graph(x, how), CPU_UNFOLD if target.kind == "cpu" else CUDA_UNFOLD
    match = UnfoldFamily().match(made.group(made.operators), target)
    assert match is not None
    (parameters,) = kernel.space(match, target)
    call = kernel.call(match, parameters, target, 2)
    # PyTorch's own has the elements of a window by channel, which are those of planes or of pixels.
    planes, pixel = x.shape[1], x.shape[4]
    channels = x.permute(0, 1, 4, 2, 3).flatten(1, 2).float()
    columns = torch.nn.functional.unfold(channels, how.kernel, 1, how.padding, how.stride)
    taps = columns.unflatten(1, (planes, pixel, *how.kernel)).permute(0, 5, 1, 3, 4, 2)
    out = torch.full(how.evaluate(x)[0].shape, 9.0, dtype=x.dtype)
    assert run(call, [x, out]) == 0
    assert torch.equal(out.float(), taps.reshape(out.shape))


@pytest.mark.parametrize("case", CASES)
def test_windows_are_rows(case: str) -> None:
    def run(call: KernelCall, tensors: list[Tensor]) -> int:
        path = build([render(call.spec)], cpu_target(), headers=header_folder(cpu_target()))[call.spec.symbol]
        args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2)
        return load(path, call.spec.symbol).status(args)

    unfolded(case, cpu_target(), run)


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_makes_rows_of_windows(case: str, run_cuda: Callable[..., int]) -> None:
    unfolded(case, emulated_target(), lambda call, tensors: run_cuda(call.spec, tensors, call.extents))


@pytest.mark.parametrize(
    "x", [normal(1, 1, 4, 4, 6)[..., ::2], normal(1, 1, 4, 4, 6)[..., :3]], ids=["pixels", "lines"]
)
def test_lines_with_gaps_are_declined(x: Tensor) -> None:
    made = graph(x, Unfold((3, 3), (2, 2), (1, 1)))
    assert UnfoldFamily().match(made.group(made.operators), cpu_target()) is None
