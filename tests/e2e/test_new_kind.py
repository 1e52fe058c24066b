"""A new kind of operator with a kernel of its own: this file and a template are all that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import torch
from torch import Tensor, fx, nn

from fuser.codegen.render import TEMPLATES, environment
from fuser.frontend.aten import HANDLERS
from fuser.frontend.calls import flatten_call
from fuser.frontend.raising import Raiser
from fuser.frontend.views import View
from fuser.ir.evaluation import evaluate
from fuser.ir.extents import Extents
from fuser.ir.graph import OperatorGroup
from fuser.ir.operators import Semantics, Shape, base, kind
from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module import compiler
from fuser.module.weights import WeightStore
from fuser.runtime.device import cpu_target
from fuser.runtime.program import NativeStep

CUMSUM = torch.ops.aten.cumsum.default


@dataclass(frozen=True)
class RunningSum(Semantics):
    """Sums of all elements up to each one, along rows."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs[0].cumsum(-1),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"over {output[-1]}"


def raise_cumsum(r: Raiser, node: fx.Node) -> View | None:
    x = r.view(node.args[0])
    if node.args[1] not in (-1, len(x.dims) - 1) or r.dtype(x) != torch.float32 or x.offset:
        return None
    return r.emit(RunningSum(), node.name, (r.realize(x),), r.spec(node))


@dataclass(frozen=True)
class RunningSumExtents(Extents):
    rows: int


@dataclass(frozen=True)
class RunningSumParameters:
    columns: int

    @property
    def extents(self) -> str:
        return RunningSumExtents.declaration()


class RunningSumFamily:
    """One running sum of a contiguous matrix."""

    name = "running_sum"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        alone = len(group.operators) == len(group.of(RunningSum)) == 1
        return group if alone and group.graph.values[group.inputs[0]].is_contiguous else None


class CpuRunningSum(Implementation[OperatorGroup, RunningSumParameters]):
    def space(self, match: OperatorGroup, target: Target) -> Sequence[RunningSumParameters]:
        return [RunningSumParameters(match.graph.values[match.outputs[0]].shape[-1])]

    def cost(self, match: OperatorGroup, parameters: RunningSumParameters, target: Target) -> Cost:
        return Cost(match.graph.flops(match.operators[0]), 2.0 * match.graph.values[match.outputs[0]].nbytes)

    def call(self, match: OperatorGroup, parameters: RunningSumParameters, target: Target, threads: int) -> KernelCall:
        spec = KernelSpec("running_sum", "running_sum.cpp.j2", parameters)
        rows = match.graph.values[match.outputs[0]].numel // parameters.columns
        return KernelCall(spec, (*match.inputs, *match.outputs), RunningSumExtents(rows), match.outputs)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "KINDS", list(base.KINDS))
    kind("running sum")(RunningSum)
    monkeypatch.setitem(HANDLERS, CUMSUM, raise_cumsum)
    monkeypatch.setattr(
        compiler, "IMPLEMENTATIONS", {(RunningSumFamily(), "cpu"): (CpuRunningSum(),), **IMPLEMENTATIONS}
    )
    loader = jinja2.FileSystemLoader([TEMPLATES, Path(__file__).parent])
    monkeypatch.setattr(environment(), "loader", loader)
    yield


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


def compiled_for(x: Tensor) -> compiler.Compiled:
    model = Model().eval()
    return compiler.compile_call(model, flatten_call((x,), {}), WeightStore(model), cpu_target(), 2)


def test_a_kind_with_a_family_is_captured_chosen_built_and_right(known: None) -> None:
    x = torch.randn(3, 5, 33, generator=torch.Generator().manual_seed(0))
    compiled = compiled_for(x)
    assert [record.family for record in compiled.assembly.kernels] == ["running_sum"]
    assert all(isinstance(step, NativeStep) for step in compiled.assembly.plan.steps)
    (result,) = compiled.program([x])
    exact = x.double().cumsum(-1)
    assert float((result.double() - exact).abs().max()) <= 33 * 2.0**-24 * float(x.abs().sum(-1).max())
    (region,) = compiled.graph.regions
    (reference,) = evaluate(compiled.graph, {region.operators[0].inputs[0]: x}, torch.float64).values()
    assert torch.equal(reference, exact)
    assert "running sum" in str(compiled.graph)


def test_pytorch_runs_a_kind_without_a_family(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", IMPLEMENTATIONS)
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    compiled = compiled_for(x)
    assert torch.equal(compiled.program([x])[0], x.cumsum(-1))
    ((_, reason),) = compiled.assembly.unfused
    assert reason == "no kernel family takes this running sum as it stands"
