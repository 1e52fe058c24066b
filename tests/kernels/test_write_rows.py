"""The `write_rows` family: rows of any layout among those of a cache, in its memory and elsewhere; what it declines."""

from __future__ import annotations

import pytest
import torch

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import WriteRows
from fuser.kernels.base import KernelCall
from fuser.kernels.write_rows import CpuWriteRows, WriteRowsFamily
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load
from fuser.runtime.program import INDEX_STATUS

B, H, CAPACITY, NEW, D = 2, 3, 9, 2, 7
WHOLE = (H * CAPACITY * D, CAPACITY * D, D, 1)


def graph(
    strides: tuple[int, ...], dtype: torch.dtype = torch.float32, before: tuple[int, ...] = WHOLE
) -> OperatorGraph:
    values = {
        "before": TensorSpec((B, H, CAPACITY, D), dtype, before),
        "rows": TensorSpec((B, H, NEW, D), dtype, strides),
        "at": TensorSpec.contiguous((NEW,), torch.int64),
        "out": TensorSpec((B, H, CAPACITY, D), dtype, WHOLE),
    }
    return OperatorGraph(
        operators=(Operator("out", WriteRows(), ("before", "rows", "at"), ("out",)),),
        values=values,
        inputs=("before", "rows", "at"),
        constants={},
        outputs=("out",),
    )


def run(made: OperatorGraph, *tensors: torch.Tensor) -> int:
    group = made.group(made.operators)
    match = WriteRowsFamily().match(group, cpu_target())
    assert match is not None
    implementation = CpuWriteRows()
    (parameters,) = implementation.space(match, cpu_target())
    call = implementation.call(match, parameters, cpu_target(), 2)
    assert isinstance(call, KernelCall)
    path = build([render(call.spec)], cpu_target(), headers=header_folder(cpu_target()))[call.spec.symbol]
    args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2)
    return load(path, call.spec.symbol).status(args)


def made_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    memory = torch.randn(B * H * CAPACITY * D, generator=torch.Generator().manual_seed(0)).to(dtype)
    return memory.as_strided(shape, strides)


# Contiguous, and heads that lie in the columns of a product.
LAYOUTS = [(H * NEW * D, NEW * D, D, 1), (NEW * H * D, D, H * D, 1)]


@pytest.mark.parametrize("strides", LAYOUTS, ids=["contiguous", "heads in columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("before", [None, WHOLE, (0, 0, 0, 1)], ids=["in place", "elsewhere", "one row for all"])
def test_rows_are_written(strides: tuple[int, ...], dtype: torch.dtype, before: tuple[int, ...] | None) -> None:
    made = graph(strides, dtype, before or WHOLE)
    cache, rows = made_of((B, H, CAPACITY, D), before or WHOLE, dtype), made_of((B, H, NEW, D), strides, dtype)
    out, at = torch.zeros(B, H, CAPACITY, D, dtype=dtype), torch.tensor([8, 3])
    plain = graph(strides, dtype)
    values = {"before": cache.contiguous(), "rows": rows, "at": at}
    expected = evaluate(plain.group(plain.operators), values, torch.float64)["out"]
    if before is None:
        cache = out.copy_(cache)
    assert run(made, cache, rows, at, out) == 0
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("at", [(0, CAPACITY), (-1, 0)], ids=["behind", "before"])
def test_a_position_outside_of_the_cache_is_refused_before_anything_is_written(at: tuple[int, ...]) -> None:
    made = graph(LAYOUTS[0])
    cache = torch.zeros(B, H, CAPACITY, D)
    rows = made_of((B, H, NEW, D), LAYOUTS[0], torch.float32)
    assert run(made, cache, rows, torch.tensor(at), cache) == INDEX_STATUS
    assert not cache.any()


def test_what_lies_otherwise_is_left_to_pytorch() -> None:
    for made in (graph((H * NEW * D, NEW * D, 1, NEW)), graph(LAYOUTS[0], before=(H * D * CAPACITY, 1, H, 3))):
        assert WriteRowsFamily().match(made.group(made.operators), cpu_target()) is None
