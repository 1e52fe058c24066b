"""Products in int8 with what may follow them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuser.ir.expression import Op, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Int8Gemm, Norm, Residual
from fuser.ir.target import Isa, Target
from fuser.runtime.cpuinfo import detect_isa

NATIVE = detect_isa()


def target(isa: Isa = NATIVE, features: frozenset[str] = frozenset()) -> Target:
    return Target("cpu", isa.value, features, 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 1e-6)


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    chain: str = "bias"
    factors: bool = False
    dtype: torch.dtype = torch.float32
    transposed: bool = True
    chunked: bool = False

    def graph(self, rows: int) -> OperatorGraph:
        weight = (self.n, self.k) if self.transposed else (self.k, self.n)
        shapes: dict[str, tuple[int, ...]] = {"x": (rows, self.k), "weight": weight, "residual": (rows, self.n)}
        shapes |= dict.fromkeys(("bias", "gamma", "beta"), (self.n,))
        shapes |= dict.fromkeys(("product", "biased", "active", "total", "normal"), (rows, self.n))
        values = {name: TensorSpec.contiguous(shape, self.dtype) for name, shape in shapes.items()}
        values["factors"] = TensorSpec.contiguous((self.k,), torch.float32)
        inputs = ("x", "weight", *(["factors"] if self.factors else []))
        steps = {
            "none": [],
            "bias": [Operator("bias", Bias(), ("product", "bias"), ("biased",))],
            "norm": [
                Operator("gelu", Activation(unary(Op.GELU)), ("product",), ("active",)),
                Operator("add", Residual(), ("active", "residual"), ("total",)),
                Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("normal",)),
            ],
        }[self.chain]
        chain = (Operator("dense", Int8Gemm(self.transposed), inputs, ("product",)), *steps)
        constants = {v: Constant(v) for v in ("weight", "bias", "gamma", "beta", "factors")}
        return OperatorGraph(chain, values, ("x", "residual"), chain[-1].outputs, constants)
