"""Graphs of gated products, as MLPs have them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuser.ir.expression import Op, binary, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Gemm, Pointwise, Ref, TorchCall, View


@dataclass(frozen=True)
class Gated:
    """silu(a · W₀ᵀ) · (a · W₁ᵀ) · …, the weights being equal parts of one."""

    n: int
    k: int
    products: int = 2
    dtype: torch.dtype = torch.float32
    transposed: bool = True

    def __str__(self) -> str:
        order = "nk" if self.transposed else "kn"
        return f"{self.n}x{self.k}x{self.products}-{str(self.dtype).removeprefix('torch.')}-{order}"

    def graph(self, rows: int) -> OperatorGraph:
        whole = self.n * self.products
        shapes = {"x": (rows, self.k), "weight": (whole, self.k) if self.transposed else (self.k, whole)}
        shapes |= dict.fromkeys(("active", *(f"gated{i}" for i in range(1, self.products))), (rows, self.n))
        values = {name: TensorSpec.contiguous(shape, self.dtype) for name, shape in shapes.items()}
        values["product"] = TensorSpec.contiguous((rows, whole), self.dtype)
        chain = [Operator("dense", Gemm(self.transposed), ("x", "weight"), ("product",))]
        for i in range(self.products):
            part = TensorSpec((rows, self.n), self.dtype, (whole, 1), "product", i * self.n)
            values[f"part{i}"] = part
            call = TorchCall(torch.as_strided, (Ref(0), part.shape, part.strides, part.offset))
            chain.append(Operator(f"part{i}", View(call), ("product",), (f"part{i}",)))
        chain.append(Operator("act", Activation(unary(Op.SILU)), ("part0",), ("active",)))
        last = "active"
        for i in range(1, self.products):
            chain.append(Operator(f"mul{i}", Pointwise(binary(Op.MUL)), (last, f"part{i}"), (f"gated{i}",)))
            last = f"gated{i}"
        return OperatorGraph(tuple(chain), values, ("x",), (last,), {"weight": Constant("weight")})
