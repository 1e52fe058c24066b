"""What all kernel families share: constants in the layouts of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Residual
from fuser.ir.target import Target, cuda_target
from fuser.kernels.base import (
    STORAGE,
    DType,
    KernelCall,
    KernelSpec,
    Layout,
    LibraryCall,
    Literal,
    Packed,
    floating,
    materialized,
)
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.gemm import PanelLayout
from fuser.kernels.gemm_cuda import RowLayout
from fuser.runtime.device import cpu_target
from fuser.saved import codec


@dataclass(frozen=True)
class Halves(Layout):
    """Two vectors as their sum and their difference, times ``factor``."""

    factor: float
    packings = 0

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        type(self).packings += 1
        a, b = tensors
        return self.factor * (a + b), self.factor * (a - b)


def test_operands_of_one_packing_are_packed_together() -> None:
    values = {name: torch.randn(3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    refs = [Packed(names, Halves(0.5), index) for names in (("a", "b"), ("b", "c")) for index in (1, 0)]
    literal = Literal("ones", np.ones(2))
    Halves.packings = 0
    found = materialized([*refs, "c", literal, Packed(("a", "b"), Halves(2.0), 1)], values)
    a, b, c = values.values()
    expected = [(a - b) / 2, (a + b) / 2, (b - c) / 2, (b + c) / 2, c, torch.ones(2).double(), 2 * (a - b)]
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
    assert Halves.packings == 3
    assert found[4] is c
    found[5].zero_()
    assert literal.array.all()


def test_a_call_for_an_equal_layer_renames_all_constants_of_its_packings() -> None:
    call = KernelCall(KernelSpec("f", "t", None), ("x", Packed(("w", "s"), Halves(1.0), 1)), (), ("y",))
    names = {"x": "x2", "w": "w2", "s": "s2", "y": "y2"}
    assert call.renamed(names).tensors == ("x2", Packed(("w2", "s2"), Halves(1.0), 1))
    assert call.renamed(names).outputs == ("y2",)
    library = LibraryCall("f", print, ("x", "w"), ("y",)).renamed(names)
    assert (library.inputs, library.outputs) == (("x2", "w2"), ("y2",))


def test_layouts_of_our_kernels_are_saved_as_data() -> None:
    for layout in (PanelLayout(16, True, DType.F32, False), RowLayout(False, DType.BF16)):
        packed = Packed(("weight",), layout)
        assert codec.load(codec.dump(packed)) == packed
        assert hash(codec.load(codec.dump(packed))) == hash(packed)


@pytest.mark.parametrize("dtype", DType, ids=lambda d: d.name)
def test_storage_types_are_as_wide_as_pytorchs(dtype: DType) -> None:
    assert dtype.bytes == torch.zeros((), dtype=dtype.torch).element_size()
    assert STORAGE[dtype.torch] is dtype


@pytest.mark.parametrize("dtype", [DType.I8, DType.U8, DType.I32, DType.E4M3, DType.E5M2], ids=lambda d: d.name)
@pytest.mark.parametrize("target", [cuda_target("sm_90"), cpu_target()], ids=lambda t: t.kind)
def test_no_kernel_claims_to_compute_in_narrow_types(dtype: DType, target: Target) -> None:
    assert dtype.torch not in floating(target)
    spec = TensorSpec.contiguous((4, 8), dtype.torch)
    op = Operator("sum", Residual(), ("a", "b"), ("y",))
    graph = OperatorGraph((op,), {"a": spec, "b": spec, "y": spec}, ("a", "b"), ("y",), {})
    assert all(
        family.match(graph.group([op]), target) is None for family, kind in IMPLEMENTATIONS if kind == target.kind
    )
