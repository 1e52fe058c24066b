"""Running and compiling CUDA kernels without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.errors import ToolchainError
from fuser.ir.extents import Extents
from fuser.ir.target import cuda_target, emulated_target
from fuser.kernels.base import KernelSpec
from fuser.runtime import emulator
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.library import load
from fuser.runtime.nvcc import Resources, find_nvcc, resources

RunCuda = Callable[..., int]
CompileCuda = Callable[[KernelSpec, str], tuple[Resources, ...]]


@pytest.fixture(scope="session")
def run_cuda() -> RunCuda:
    """``run_cuda(spec, tensors, extents, workspace_bytes=0, status=None)``: build a kernel for the emulator
    and run it on CPU tensors in the template's order; returns its status. Raises EmulationError for a fault."""

    def run(
        spec: KernelSpec,
        tensors: Sequence[Tensor],
        extents: Extents | Sequence[int],
        *,
        workspace_bytes: int = 0,
        status: Tensor | None = None,
    ) -> int:
        target = emulated_target()
        path = build([render(spec)], target, headers=header_folder(target))[spec.symbol]
        # What a kernel reads before it has written it is not a number.
        workspace = torch.full((workspace_bytes + 64,), 255, dtype=torch.uint8)
        start = workspace[-workspace.data_ptr() % 64 :].data_ptr() if workspace_bytes else 0
        word = torch.zeros(1, dtype=torch.int32) if status is None else status
        args = KernelArgs.pack([t.data_ptr() for t in tensors], extents, 1, start, word.data_ptr())
        given = [*tensors, word, *([workspace] if workspace_bytes else [])]
        with emulator.allowed(path, map(_span, given)):
            result = load(path, spec.symbol).status(args)
        if result == emulator.FAULT_STATUS:
            raise emulator.fault(path, spec.symbol)
        return result

    return run


@pytest.fixture(scope="session")
def compile_cuda() -> CompileCuda:
    """``compile_cuda(spec, arch)``: what nvcc's kernels for ``arch`` need of a GPU; skips without nvcc."""

    def compile_only(spec: KernelSpec, arch: str) -> tuple[Resources, ...]:
        target = cuda_target(arch)
        try:
            find_nvcc(target)
        except ToolchainError as error:
            pytest.skip(f"there is no nvcc for {arch}: {str(error).splitlines()[0]}")
        return resources(render(spec).text, target, headers=header_folder(target))

    return compile_only


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size() * (tensor.numel() > 0)
