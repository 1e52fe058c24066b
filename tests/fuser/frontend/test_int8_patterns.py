"""Products that torchao rounds to int8 at run time: one operator on its integers, or what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchao.kernel.intmm
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.evaluation import run_graph
from fuser.ir.graph import OperatorGraph
from fuser.ir.operators import Int8Gemm

LEAST = 2.0**-23


class Layer(nn.Module):
    """A linear layer of what ``view`` shows of an input."""

    def __init__(self, view: Callable[[Tensor], Tensor] = lambda x: x, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.view, self.linear = view, nn.Linear(48, 40, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.view(x))
        return y


def quantized(model: Layer, **how: object) -> Layer:
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, **how))
    return model.eval()


def rows(*shape: int) -> Tensor:
    """Rows of all sizes, one of zeros and one that is smaller than what the least scale tells apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 48, generator=generator) * torch.randn(*shape, 1, generator=generator).exp()
    x.flatten(0, -2)[1], x.flatten(0, -2)[2] = 0, 1e-6
    return x


def raised(model: nn.Module, x: Tensor) -> tuple[OperatorGraph, Tensor]:
    """The graph of a call, and what it gives."""
    captured = capture(model, flatten_call((x,), {}))
    graph = raise_graph(captured)
    (output,) = run_graph(graph, captured.parameters, dict(zip(graph.inputs, [x], strict=True)))
    return graph, output


def kinds(graph: OperatorGraph) -> list[str]:
    return [op.kind for op in graph.compute]


def of_codes(codes: Tensor, own: Tensor, layer: nn.Linear) -> Tensor:
    """The layer of integers that stand for numbers by ``own`` scales: in integers, and only at the end in float64."""
    integers, scales = layer.weight.qdata, layer.weight.scale  # type: ignore[attr-defined]
    product = (codes @ integers.long().T).double() * own.double() * scales.double().flatten()
    return product if layer.bias is None else product + layer.bias.double()


def by_integers(x: Tensor, layer: nn.Linear, low: int = -128, high: int = 127) -> Tensor:
    """The layer of rows in symmetric ranges of their own."""
    own = torch.maximum(x.abs().amax(-1, keepdim=True) / (0.5 * (high - low)), torch.tensor(LEAST))
    return of_codes(torch.round(x * (1 / own)).long().clamp(low, high), own, layer)


@pytest.mark.parametrize("unsigned", [True, False], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@torch.no_grad()
def test_a_layer_is_one_product_of_its_own_integers(
    bias: bool, unsigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is written on CPUs that multiply unsigned by signed numbers, and on others."""
    monkeypatch.setattr(torchao.kernel.intmm, "_cpu_is_vnni_supported", lambda: unsigned)
    monkeypatch.setattr(torchao.kernel.intmm, "_cpu_is_amx_tile_supported", lambda: False)
    model, x = quantized(Layer(bias=bias)), rows(3, 5)
    captured = capture(model, flatten_call((x,), {}))
    assert (torch.uint8 in [node.kwargs.get("dtype") for node in captured.graph.graph.nodes]) == unsigned
    graph, output = raised(model, x)
    assert kinds(graph) == ["int8_gemm", *(["bias"] if bias else [])]
    product = graph.compute[0]
    assert product.semantics == Int8Gemm(True, -128, 127, LEAST)
    assert graph.constants[product.inputs[1]].call is None and graph.values[product.inputs[1]].dtype == torch.int8
    torch.testing.assert_close(output.double(), by_integers(x, model.linear), rtol=2.0**-20, atol=2.0**-22)
    torch.testing.assert_close(output, model(x), rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((7,), lambda x: x),
        ((3, 5), lambda x: x[:, 0]),
        ((3, 5), lambda x: x.transpose(0, 1).contiguous()),
        ((2, 3, 4), lambda x: x.transpose(1, 2).contiguous()),
        ((1, 7), lambda x: x),
    ],
    ids=["matrix", "first", "turned", "heads", "one"],
)
@torch.no_grad()
def test_rows_of_all_layouts(shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> None:
    model, x = quantized(Layer(view)), rows(*shape)
    graph, output = raised(model, x)
    assert [kind for kind in kinds(graph) if kind.endswith("gemm")] == ["int8_gemm"]
    assert not any("torchao" in op.reason for op in graph.compute)
    torch.testing.assert_close(output.double(), by_integers(view(x), model.linear), rtol=2.0**-20, atol=2.0**-22)


@torch.no_grad()
def test_a_reduced_range_is_kept() -> None:
    model, x = quantized(Layer(), reduce_range=True), rows(3, 5)
    graph, output = raised(model, x)
    assert graph.compute[0].semantics == Int8Gemm(True, -64, 63, LEAST)
    torch.testing.assert_close(output.double(), by_integers(x, model.linear, -64, 63), rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize(
    "how", [PerTensor(), [PerTensor(), PerRow()], [PerRow(), PerTensor()]], ids=["tensor", "tensor-row", "row-tensor"]
)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (7,)], ids=str)
@torch.no_grad()
def test_scales_of_whole_tensors(shape: tuple[int, ...], how: object) -> None:
    model = quantized(Layer(), granularity=how)
    x = rows(*shape) if shape != (1,) else rows(3)[:1]
    graph, output = raised(model, x)
    assert kinds(graph).count("int8_gemm") == 1
    by_row = isinstance(how, list) and isinstance(how[0], PerRow)
    sizes = x if by_row else x.abs().amax().expand_as(x)
    own = torch.maximum(sizes.abs().amax(-1, keepdim=True) / 127.5, torch.tensor(LEAST))
    codes = torch.round(x * (1 / own)).long().clamp(-128, 127)
    want = of_codes(codes, own, model.linear)
    torch.testing.assert_close(output.double(), want, rtol=2.0**-20, atol=2.0**-22)
    torch.testing.assert_close(output, model(x), rtol=2.0**-20, atol=2.0**-22)


@torch.no_grad()
def test_a_tensor_that_is_not_finite_has_no_scale() -> None:
    model = quantized(Layer(), granularity=PerTensor())
    for wrong in (torch.inf, torch.nan):
        x = rows(3, 5)
        x[0, 0, 0] = wrong
        _, output = raised(model, x)
        assert output.isnan().all()


def by_ranges(x: Tensor, layer: nn.Linear, low: int, high: int, whole: bool) -> Tensor:
    """The layer of integers with zero points."""
    ends = (lambda f: f(x).expand_as(x[..., :1])) if whole else (lambda f: f(x, -1, keepdim=True))
    bottom, top = ends(torch.amin).clamp(max=0), ends(torch.amax).clamp(min=0)
    own = torch.maximum((top - bottom) / float(high - low), torch.tensor(LEAST))
    point = (low - torch.round(bottom / own)).long().clamp(low, high)
    codes = (torch.round(x * (1 / own)).long() + point).clamp(low, high) - point
    return of_codes(codes, own, layer)


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), [PerTensor(), PerRow()]], ids=["row", "tensor", "both"])
@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@torch.no_grad()
def test_ranges_with_zero_points(reduced: bool, granularity: object) -> None:
    """Of rows on either side of zero, and of some that are on one."""
    model = quantized(Layer(), act_mapping_type=MappingType.ASYMMETRIC, reduce_range=reduced, granularity=granularity)
    for x in (rows(3, 5), rows(3, 5) + 2, -rows(3, 5).abs()):
        graph, output = raised(model, x)
        assert kinds(graph)[-2:] == ["int8_gemm", "bias"]
        assert not any("torchao" in op.reason for op in graph.compute)
        ends = (-64, 63) if reduced else (-128, 127)
        want = by_ranges(x, model.linear, *ends, not isinstance(granularity, PerRow))
        torch.testing.assert_close(output.double(), want, rtol=2.0**-20, atol=2.0**-22)
        # torchao takes zero points off in fp32, where digits of sums are lost.
        torch.testing.assert_close(output, model(x), rtol=2.0**-19, atol=2.0**-17)


@pytest.mark.parametrize("point", [None, 0, 5, -128], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_ranges_that_are_known(dtype: torch.dtype, point: int | None) -> None:
    scale = torch.tensor([[0.03]])
    points = {} if point is None else {"act_quant_zero_point": torch.tensor([[point]], dtype=torch.int8)}
    kind = MappingType.SYMMETRIC if point is None else MappingType.ASYMMETRIC
    config = Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale, act_mapping_type=kind, granularity=[PerTensor(), PerRow()], **points
    )
    model = Layer().to(dtype)
    quantize_(model, config)
    x = rows(15).to(dtype)
    graph, output = raised(model.eval(), x)
    assert kinds(graph)[:2] == ["int8_gemm", "bias"]
    weight, zero = model.linear.weight, point or 0
    codes = (torch.round(x.float() * (1 / scale)).long() + zero).clamp(-128, 127) - zero
    want = of_codes(codes, scale, model.linear)
    # One rounding of fp32 behind another, or those of bf16.
    rounding = 2.0**-20 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(output.double(), want, rtol=rounding, atol=rounding)
    # torchao takes zero points off rounded numbers that are larger than what is left.
    off = (weight.qdata.sum(-1) * weight.scale.flatten() * 0.03 * zero).abs().max()
    near = {"rtol": 4 * rounding, "atol": 4 * rounding * max(1.0, float(off))}
    torch.testing.assert_close(output, model(x), **near)
    # Scales are parameters as others are.
    weight.act_quant_scale.mul_(2)  # type: ignore[attr-defined]
    _, output = raised(model, x)
    torch.testing.assert_close(output, model(x), rtol=near["rtol"], atol=2 * near["atol"])


@dataclass
class Off:
    """What torchao writes to take zero points off sums, and what may be other in it."""

    alpha: int = 1
    turned: bool = False
    other_points: bool = False
    other_scales: bool = False
    other_columns: bool = False

    def __call__(self, sums: Tensor, weight: Tensor, point: Tensor, own: Tensor) -> Tensor:
        totals = (weight.flip(0) if self.other_columns else weight).sum(-1).float()
        points = (point.flip(0) if self.other_points else point).reshape(-1, 1).float()
        parts = points * (own.flip(0) if self.other_scales else own).reshape(-1, 1) * totals
        if self.alpha != 1:
            return torch.sub(sums, parts, alpha=self.alpha)
        return parts - sums if self.turned else sums - parts


@dataclass
class Written:
    """What torchao writes, and what may be other in it."""

    block: tuple[int, ...] = (1, 48)
    kind: str = "SYMMETRIC"
    low: int = -128
    least: float | None = LEAST
    rounded_low: int = -128
    added: int = 128
    taken: int = 128
    alpha: int = 1
    twice: bool = False
    other_rows: bool = False
    other_scales: bool = False
    off: Off | None = None

    def __call__(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        operators, columns = torch.ops.torchao, weight.t()
        own, point = operators.choose_qparams_affine(
            x, self.kind, self.block, torch.int8, self.low, 127, self.least, torch.float32, torch.int8, True
        )
        rounded = x.flip(0) if self.other_rows else x
        codes = operators.quantize_affine(rounded, self.block, own, point, torch.int8, self.rounded_low, 127)
        sums = torch._int_mm((codes.to(torch.int32) + self.added).to(torch.uint8), columns)
        offset = columns.sum(0, keepdim=True, dtype=torch.int32) * self.taken
        sums = sums.sub_(offset, alpha=self.alpha) if self.alpha != 1 else sums.sub_(offset)
        result = sums.float() * (own.flip(0) if self.other_scales else own).reshape(-1, 1)
        if self.off is not None:
            result = self.off(result, weight, point, own)
        result = result * scales
        return result + sums.sum() if self.twice else result


class Handmade(nn.Module):
    def __init__(self, written: Written) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.written = written
        self.register_buffer("weight", torch.randint(-128, 128, (40, 48), generator=generator, dtype=torch.int8))
        self.register_buffer("scales", torch.rand(40, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.written(x, self.weight, self.scales)


@pytest.mark.parametrize(
    ("written", "known"),
    [
        (Written(), True),
        (Written(least=1e-3), True),
        (Written(block=(16, 48)), True),
        (Written(block=(2, 24)), False),
        (Written(kind="SYMMETRIC_NO_CLIPPING_ERR"), False),
        (Written(low=-100, rounded_low=-100), False),
        (Written(rounded_low=-100), False),
        (Written(least=None), False),
        (Written(added=100, taken=100), False),
        (Written(taken=64), False),
        (Written(taken=64, alpha=2), False),
        (Written(twice=True), False),
        (Written(other_rows=True), False),
        (Written(other_scales=True), False),
        (Written(kind="ASYMMETRIC"), False),
        (Written(kind="ASYMMETRIC", off=Off()), True),
        (Written(kind="ASYMMETRIC", block=(16, 48), off=Off()), True),
        (Written(kind="ASYMMETRIC", off=Off(alpha=2)), False),
        (Written(kind="ASYMMETRIC", off=Off(turned=True)), False),
        (Written(kind="ASYMMETRIC", off=Off(other_points=True)), False),
        (Written(kind="ASYMMETRIC", off=Off(other_scales=True)), False),
        (Written(kind="ASYMMETRIC", off=Off(other_columns=True)), False),
        (Written(kind="ASYMMETRIC", off=Off(), other_rows=True), False),
    ],
    ids=str,
)
@torch.no_grad()
def test_only_what_is_the_same_is_taken(written: Written, known: bool) -> None:
    model, x = Handmade(written).eval(), rows(16)
    graph, output = raised(model, x)
    assert ("int8_gemm" in kinds(graph)) == known
    # Zero points are taken off, in fp32, sums of thousands.
    atol = 2.0**-20 if written.off is None else 2.0**-11
    torch.testing.assert_close(output, model(x), rtol=2.0**-20, atol=atol)


class Given(nn.Module):
    """A product of two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (x[:8] * 3).clamp(-128, 127).to(torch.int8).repeat(5, 1)
        return Written()(x, weight, x[0, :40])


@torch.no_grad()
def test_weights_that_are_not_constant_are_left_as_they_are() -> None:
    x = rows(16)
    graph, output = raised(Given().eval(), x)
    assert "int8_gemm" not in kinds(graph)
    torch.testing.assert_close(output, Given()(x), rtol=2.0**-20, atol=2.0**-20)
