"""The `append` family: rows of any layout behind a cache, in its memory and elsewhere; what it declines."""

from __future__ import annotations

import pytest
import torch

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Append
from fuser.kernels.append import AppendFamily, CpuAppend
from fuser.kernels.base import KernelCall
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

B, H, OLD, NEW, D, ROOM = 2, 3, 5, 2, 7, 11


def graph(strides: tuple[int, ...], dtype: torch.dtype = torch.float32, before: tuple[int, ...] = ()) -> OperatorGraph:
    capacity = OLD + NEW + ROOM
    old = TensorSpec.contiguous((B, H, OLD, D), dtype)
    values = {
        "before": TensorSpec(old.shape, dtype, before or old.strides),
        "rows": TensorSpec((B, H, NEW, D), dtype, strides),
        "out": TensorSpec((B, H, OLD + NEW, D), dtype, (H * capacity * D, capacity * D, D, 1)),
    }
    return OperatorGraph(
        operators=(Operator("out", Append(), ("before", "rows"), ("out",)),),
        values=values,
        inputs=("before", "rows"),
        constants={},
        outputs=("out",),
    )


# Contiguous, and heads that lie in the columns of a product.
LAYOUTS = [(H * NEW * D, NEW * D, D, 1), (NEW * H * D, D, H * D, 1)]


@pytest.mark.parametrize("strides", LAYOUTS, ids=["contiguous", "heads in columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("within", [True, False], ids=["in place", "elsewhere"])
def test_rows_are_appended(strides: tuple[int, ...], dtype: torch.dtype, within: bool) -> None:
    made, target = graph(strides, dtype), cpu_target()
    group = made.group(made.operators)
    match = AppendFamily().match(group, target)
    assert match is not None
    implementation = CpuAppend()
    (parameters,) = implementation.space(match, target)
    call = implementation.call(match, parameters, target, 2)
    assert isinstance(call, KernelCall)
    spec = made.values["out"]
    memory = torch.full((B * spec.strides[0],), 9.0, dtype=dtype)
    out = memory.as_strided(spec.shape, spec.strides)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(B, H, OLD, D, generator=generator).to(dtype)
    rows = torch.randn(B * H * NEW * D, generator=generator).to(dtype).as_strided((B, H, NEW, D), strides)
    expected = evaluate(group, {"before": before, "rows": rows}, torch.float64)["out"]
    if within:
        out[:, :, :OLD] = before
        before = out
    path = build([render(call.spec)], target, headers=header_folder(target))[call.spec.symbol]
    args = KernelArgs.pack([t.data_ptr() for t in (before, rows, out)], call.extents, 2)
    assert load(path, call.spec.symbol).status(args) == 0
    assert torch.equal(out.double(), expected)
    assert (memory.view(B, H, -1, D)[:, :, OLD + NEW :] == 9).all()


def test_what_lies_otherwise_is_left_to_pytorch() -> None:
    for made in (graph((H * NEW * D, NEW * D, 1, NEW)), graph(LAYOUTS[0], before=(H * OLD * D, D, H * D, 1))):
        assert AppendFamily().match(made.group(made.operators), cpu_target()) is None
