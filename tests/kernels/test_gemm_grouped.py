"""Products of groups of rows with weights of their own against float64, wherever the groups end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from int8_cases import NATIVE, target
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, binary, rms_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, GroupedGemm, Norm, Pointwise, Ref, Semantics, TorchCall, View
from fuser.ir.target import Isa, Target
from fuser.kernels.base import materialized
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_grouped import CpuGroupedGemm, GroupedGemmFamily
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cache import default_cache
from fuser.runtime.library import load

ENDS = {
    "even": (5, 10, 15, 19),
    "empty": (0, 7, 7, 19),
    "first alone": (19, 19, 19, 19),
    "last alone": (0, 0, 0, 19),
    "rows behind all": (3, 4, 9, 11),
    "no rows": (0, 0, 0, 0),
    "beyond the rows": (2, 30, 1, 40),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Four groups of (``k``, ``n``) for 19 rows; what follows is nothing, a ``gate``, or factors of ``rows``."""

    n: int
    k: int
    after: str = "nothing"
    transposed: bool = True
    dtype: torch.dtype = torch.float32
    ends: torch.dtype = torch.int32
    chunked: bool = False

    def graph(self, rows: int = 19, groups: int = 4) -> OperatorGraph:
        def spec(*shape: int) -> TensorSpec:
            return TensorSpec.contiguous(shape, self.dtype)

        weight = (groups, self.n, self.k) if self.transposed else (groups, self.k, self.n)
        values = {"x": spec(rows, self.k), "w": spec(*weight), "y": spec(rows, self.n)}
        values["ends"] = TensorSpec.contiguous((groups,), self.ends)
        operators = [Operator("y", GroupedGemm(self.transposed), ("x", "w", "ends"), ("y",))]

        def add(name: str, semantics: Semantics, *inputs: str) -> None:
            operators.append(Operator(name, semantics, inputs, (name,)))

        if self.after == "gate":
            half = self.n // 2
            for i, part in enumerate(("left", "right")):
                values[part] = view = TensorSpec((rows, half), self.dtype, (self.n, 1), "y", half * i)
                call = TorchCall(torch.as_strided, (Ref(0), view.shape, view.strides, view.offset))
                add(part, View(call), "y")
            values |= {"act": spec(rows, half), "out": spec(rows, half)}
            add("act", Activation(unary(Op.SILU)), "left")
            add("out", Pointwise(binary(Op.MUL)), "act", "right")
        elif self.after == "factors":
            values |= {"factor": spec(rows, 1), "out": spec(rows, self.n)}
            add("out", Pointwise(binary(Op.MUL)), "y", "factor")
        given = ("x", "ends", *(["factor"] if self.after == "factors" else []))
        return OperatorGraph(tuple(operators), values, given, operators[-1].outputs, {"w": Constant("w")})


CASES = [
    Case(50, 131),
    Case(50, 131, transposed=False, ends=torch.int64),
    Case(82, 70, "gate"),
    Case(33, 1100, "factors", chunked=True),
    Case(40, 99, "gate", dtype=torch.bfloat16),
]


def match_of(graph: OperatorGraph, machine: Target) -> GemmMatch:
    match = GroupedGemmFamily().match(graph.group(graph.compute), machine)
    assert match is not None
    return match


def values_of(graph: OperatorGraph, ends: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    specs = {v: graph.values[v] for v in (*graph.inputs, *graph.constants) if v != "ends"}
    values = {v: torch.randn(s.shape, generator=generator).to(s.dtype) for v, s in specs.items()}
    return {**values, "ends": torch.tensor(ends, dtype=graph.values["ends"].dtype)}


def run(case: Case, graph: OperatorGraph, values: dict[str, Tensor], machine: Target, choice: int = 0) -> list[Tensor]:
    """The results on one thread, and on two and five."""
    match, ours = match_of(graph, machine), CpuGroupedGemm()
    parameters = ours.space(match, machine)[choice]
    small = {"kc": 64, "chunk": 128} if case.chunked else {}
    parameters = dataclasses.replace(parameters, mc=parameters.mr, serial_below=0, **small)
    found = []
    for threads in (1, 2, 5):
        call = ours.call(match, parameters, machine, threads)
        source = render(call.spec)
        library = build([source], machine, headers=header_folder(machine), cache=default_cache())[source.symbol]
        (name,) = graph.outputs
        result = torch.full(graph.values[name].shape, torch.nan, dtype=graph.values[name].dtype)
        tensors = materialized(call.tensors, {**values, name: result})
        workspace = torch.full((call.workspace_bytes // 4 + 16,), torch.nan)
        kernel = load(library, source.symbol)
        kernel(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, threads, workspace.data_ptr()))
        found.append(result)
    return found


@pytest.mark.parametrize("isa", [NATIVE, Isa.PORTABLE], ids=lambda isa: isa.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.n}x{case.k}-{case.after}-{case.dtype}")
def test_kernels_give_the_numbers_of_the_operator(isa: Isa, case: Case) -> None:
    graph = case.graph()
    rounding = 2.0**-7 if case.dtype == torch.bfloat16 else case.k * 2.0**-23
    for ends in ENDS.values():
        values = values_of(graph, ends)
        (want,) = evaluate(graph, values, torch.float64).values()
        for got in run(case, graph, values, target(isa)):
            most = max(1.0, float(want.abs().max()))
            torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding * most)


def test_every_choice_for_one_row_and_many() -> None:
    case = Case(70, 40, "gate")
    for rows in (1, 200):
        graph = case.graph(rows)
        values = values_of(graph, (0, rows // 2, rows // 2, rows))
        (want,) = evaluate(graph, values, torch.float64).values()
        for choice in range(len(CpuGroupedGemm().space(match_of(graph, target()), target()))):
            for got in run(case, graph, values, target(), choice):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_what_is_declined() -> None:
    graph = Case(16, 8).graph()
    floats = {**graph.values, "ends": TensorSpec.contiguous((4,), torch.float32)}
    apart = {**graph.values, "ends": TensorSpec((4,), torch.int32, (2,))}
    given = dataclasses.replace(graph, constants={}, inputs=("x", "ends", "w"))
    norm = Operator("z", Norm(rms_norm(1e-5, weight=False)), ("y",), ("z",))
    normed = dataclasses.replace(
        graph, values={**graph.values, "z": graph.values["y"]}, operators=(*graph.operators, norm), outputs=("z",)
    )
    for other in (dataclasses.replace(graph, values=floats), dataclasses.replace(graph, values=apart), given, normed):
        assert GroupedGemmFamily().match(other.group(other.compute), target()) is None
