"""Products in int8 with what may follow them."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.errors import ToolchainError
from fuser.ir.expression import Op, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import (
    Activation,
    Bias,
    CodeGemm,
    Int8Gemm,
    Int8WeightGemm,
    Norm,
    Product,
    QuantizedGemm,
    QuantizeRows,
    Residual,
    TorchCall,
)
from fuser.ir.quantization import Fixed, rounding_of
from fuser.ir.target import Isa, Target
from fuser.kernels.base import KernelSpec
from fuser.runtime.compilers import find_toolchain
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
    codes: torch.dtype = torch.int8
    range: tuple[int, int] | None = None
    """Of the integers that rows are rounded to where weights are stored as integers."""
    given: tuple[float, int] | None = None
    """The scale and the zero point of all rows, if these do not have their own."""
    symmetric: bool = True
    coded: bool = False
    """Whether rows come as codes with scales."""

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
        }["norm" if self.chain == "codes" else self.chain]
        outputs: tuple[str, ...] = ()
        if self.chain == "codes":
            outputs = ("next_codes", "next_scales")
            values |= _codes(outputs, (rows, self.n), self.codes)
            steps.append(Operator("round", QuantizeRows(self.codes), ("normal",), outputs))
        chain = (Operator("dense", QuantizedGemm(self.transposed, self.codes), inputs, ("product",)), *steps)
        constants = {v: Constant(v) for v in ("weight", "bias", "gamma", "beta", "factors")}
        outputs = ("normal", *outputs) if outputs else chain[-1].outputs
        graph = OperatorGraph(chain, values, ("x", "residual"), outputs, constants)
        if self.coded:
            return as_coded(graph)
        if self.range is None:
            return graph
        least = 2.0**-23 if self.given is None else None
        low, high = self.range
        kind = functools.partial(Int8Gemm, low=low, high=high, least=least, symmetric=self.symmetric)
        made = with_integers(graph, kind)
        if self.given is None:
            return made
        product, *others = made.operators
        product = dataclasses.replace(product, inputs=(*product.inputs, "rounding"))
        more = {"rounding": Constant("rounding", (), TorchCall(Fixed(rounding_of(*self.given))))}
        specs = {"rounding": TensorSpec.contiguous((3,), torch.float32)}
        return dataclasses.replace(
            made,
            operators=(product, *others),
            values={**made.values, **specs},
            constants={**made.constants, **more},
        )


def assembly(spec: KernelSpec, aim: Target, folder: Path) -> str:
    """What the compiler makes of a kernel, assembled as well; skips for instructions that it does not know."""
    source = folder / "kernel.cpp"
    source.write_text(render(spec).text)
    try:
        tools = find_toolchain(aim)
        command = [*tools.command, *tools.compile_flags, "-I", str(header_folder(aim)), str(source)]
        text = subprocess.run([*command, "-S", "-o", "-"], capture_output=True, text=True, check=True).stdout
        assembler = [*tools.command, "-c", "-x", "assembler", "-", "-o", str(folder / "kernel.o")]
        subprocess.run(assembler, input=text, capture_output=True, text=True, check=True)
        return text
    except (subprocess.CalledProcessError, ToolchainError) as error:
        pytest.skip(f"this compiler knows no {' '.join(sorted(aim.features))}: {error}")


def as_quantized(graph: OperatorGraph, codes: torch.dtype = torch.int8) -> OperatorGraph:
    """Products of a graph in ``codes``."""
    operators = [
        dataclasses.replace(op, semantics=QuantizedGemm(op.semantics.transposed, codes))  # type: ignore[attr-defined]
        if op.kind == "gemm"
        else op
        for op in graph.operators
    ]
    return dataclasses.replace(graph, operators=tuple(operators))


def _codes(names: tuple[str, ...], shape: tuple[int, ...], codes: torch.dtype) -> dict[str, TensorSpec]:
    """Rows as codes, and their scales."""
    shapes = shape, (*shape[:-1], 1)
    dtypes = codes, torch.float32
    return {n: TensorSpec.contiguous(s, d) for n, s, d in zip(names, shapes, dtypes, strict=True)}


def as_coded(graph: OperatorGraph) -> OperatorGraph:
    """A graph whose product in codes is of rows that come as such."""
    operators, names = [], ("row_codes", "row_scales")
    values = dict(graph.values)
    for op in graph.operators:
        if isinstance(op.semantics, QuantizedGemm):
            x, *others = op.inputs
            values |= _codes(names, values[x].shape, op.semantics.codes)
            semantics = CodeGemm(op.semantics.transposed, op.semantics.codes)
            op = dataclasses.replace(op, semantics=semantics, inputs=(names[0], *others, names[1]))
        operators.append(op)
    inputs = (*names, *(v for v in graph.inputs if v != "x"))
    return dataclasses.replace(graph, operators=tuple(operators), values=values, inputs=inputs)


def with_integers(graph: OperatorGraph, kind: Callable[[bool], Product] = Int8WeightGemm) -> OperatorGraph:
    """Products of a graph with their weights in int8."""
    values, operators, constants = dict(graph.values), [], dict(graph.constants)
    for op in graph.operators:
        if op.kind in ("quantized_gemm", "gemm"):
            transposed = op.semantics.transposed  # type: ignore[attr-defined]
            shape = values["weight"].shape
            values["weight"] = TensorSpec.contiguous(shape, torch.int8)
            values["scales"] = TensorSpec.contiguous((shape[0 if transposed else 1],), torch.float32)
            constants["scales"] = dataclasses.replace(constants["weight"], name="scales")
            inputs = (op.inputs[0], "weight", "scales")
            op = dataclasses.replace(op, semantics=kind(transposed), inputs=inputs)
        operators.append(op)
    return dataclasses.replace(graph, operators=tuple(operators), values=values, constants=constants)


def unwritten(spec: TensorSpec) -> Tensor:
    """Memory for a result."""
    return torch.full(spec.shape, torch.nan if spec.dtype.is_floating_point else 99).to(spec.dtype)


def quantized_values(graph: OperatorGraph, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for what a graph reads; factors and scales are positive."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for v in (*graph.inputs, *graph.constants):
        spec = graph.values[v]
        if v == "rounding":
            found[v] = graph.constants[v].evaluate(())
            continue
        found[v] = torch.randn(spec.shape, generator=g).mul(40 if spec.dtype == torch.int8 else 1).to(spec.dtype)
    if "row_scales" in found:
        found["row_scales"] = found["row_scales"].abs() / 40
    if "factors" in found:
        found["factors"] = found["factors"].abs() + 0.3
    if "scales" in found:
        found["scales"] = found["scales"].abs() / 40
    return found
