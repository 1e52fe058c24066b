"""Rows that the kernel rounds which makes them: which, with what factors, what becomes of numbers on either target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fuser
from fuser.ir.evaluation import run_graph
from fuser.ir.graph import Operator, OperatorGraph
from fuser.ir.quantization import quantize_rows
from fuser.ir.target import Target, emulated_target


class Block(nn.Module):
    """A pre-norm block, whose norm two products read that cannot be one: their weights lie otherwise."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(64), nn.LayerNorm(64) if last else None
        self.one, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.two = nn.Parameter(torch.randn(64, 128) / 8)

    def forward(self, x: Tensor) -> Any:
        normal = self.norm(x)
        out = x + self.down(F.gelu(self.one(normal)))
        two = normal @ self.two
        return (out if self.last is None else self.last(out)), two.sum(-1)


def graph_of(fast: fuser.OptimizedModule) -> OperatorGraph:
    return fast.programs[-1].graph


def made(model: nn.Module, x: Tensor, target: Target | str = "cpu", **options: Any) -> fuser.OptimizedModule:
    how = fuser.Int8(**{"quality": 0, **options})
    fast = fuser.optimize(model.eval(), quantize=how, search="model", target=target)
    with torch.no_grad():
        fast(x)
    assert not fast.fallbacks
    return fast


def by_kind(graph: OperatorGraph) -> Mapping[str, list[Operator]]:
    found: dict[str, list[Operator]] = {}
    for op in graph.operators:
        found.setdefault(op.kind, []).append(op)
    return found


@pytest.mark.parametrize("target", ["cpu", emulated_target()], ids=["cpu", "cuda"])
def test_rows_of_a_norm_are_rounded_once_by_its_kernel(target: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 11, 64)
    model = Block()
    fast = made(model, x, target)
    graph = graph_of(fast)
    kinds = by_kind(graph)
    (rounded,) = kinds["quantize_rows"]
    assert graph.producer[rounded.inputs[0]].kind == "norm"
    assert [op.inputs[0] for op in kinds["code_gemm"]] == [rounded.outputs[0]] * 2
    # A kernel that finishes rows in parts leaves that to the product's.
    (other,) = kinds["quantized_gemm"]
    assert graph.producer[other.inputs[0]].kind == "activation"
    records = [record.operators for record in fast.kernels if rounded.name in record.operators]
    assert len(records) == 1 and len(records[0]) == 2
    # Nothing else reads the norm, so that it is not stored.
    (choice,) = [c for c in fast.programs[-1].assembly.choices if rounded.name in c.group.names]
    assert choice.group.outputs == rounded.outputs
    with torch.no_grad():
        got = fast(x)
    want = run_graph(graph, fast.programs[-1].captured.parameters, {graph.inputs[0]: x})
    for mine, theirs in zip(got, want, strict=True):
        # A number beside the border between two codes may be rounded to the other.
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-3


def test_each_product_has_its_own_factors() -> None:
    """Smoothing divides the columns that are large by other numbers for every layer."""
    torch.manual_seed(0)
    model = Block(last=False)
    with torch.no_grad():
        model.norm.weight[5] = 300
        model.one.weight[:, 7] *= 50
    x = torch.randn(3, 11, 64)
    fast = made(model, x, quality=0.5, calibrate=[x])
    graph = graph_of(fast)
    rounded = by_kind(graph)["quantize_rows"]
    factors = [op.inputs[1:] for op in rounded]
    assert len(factors) == len(set(factors)) == 2 and any(factors)
    for product in by_kind(graph)["code_gemm"]:
        (maker,) = [op for op in rounded if op.outputs[0] == product.inputs[0]]
        assert (product.inputs[0], product.inputs[-1]) == maker.outputs
        assert product.inputs[2:-1] == maker.inputs[1:]
    with torch.no_grad():
        for got, exact in zip(fast(x), model(x), strict=True):
            assert float(F.cosine_similarity(got, exact, dim=-1).mean()) > 0.999


@pytest.mark.parametrize("rows", [1, 7])
def test_codes_are_those_of_the_reference(rows: int) -> None:
    """A norm whose results fp32 holds exactly: rows of 1 and -1, times powers of two."""

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64, eps=0.0), nn.Linear(64, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.linear(self.norm(x))
            return found

    torch.manual_seed(0)
    model = Exact()
    with torch.no_grad():
        model.norm.weight.copy_(2.0 ** torch.randint(-6, 6, (64,)))
    signs = torch.cat([torch.ones(32), -torch.ones(32)])
    x = torch.stack([signs[torch.randperm(64)] for _ in range(rows)])
    fast = made(model, x)
    (a, s), (w, t) = quantize_rows(x * model.norm.weight), quantize_rows(model.linear.weight)
    want = (a.double() @ w.double().mT).float() * (s * t.mT)
    with torch.no_grad():
        assert torch.equal(fast(x), want)


def test_one_number_a_row_beside_long_rows() -> None:
    """Elements of long rows are shared out in blocks, of which none may write the numbers of others."""

    class Both(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Any:
            twice = c * 2 + 1
            return twice, x * twice

    x, c = torch.randn(5, 9001), torch.randn(5, 1)
    for target in ("cpu", emulated_target()):
        fast = fuser.optimize(Both(), search="model", target=target)
        for got, want in zip(fast(x, c), Both()(x, c), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [5, 64, 3000])
def test_reductions_are_kernels_on_gpus(columns: int) -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Any:
            mean = x.mean(-1, keepdim=True)
            return x - mean, mean, x.abs().amax(-1, keepdim=True)

    x = torch.randn(6, columns)
    fast = fuser.optimize(Centred(), search="model", target=emulated_target())
    for got, want in zip(fast(x), Centred()(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not fast.unfused


def test_a_search_takes_numbers_beside_a_border(caplog: pytest.LogCaptureFixture) -> None:
    """Attention in bf16 makes codes that are others in float64, which is no fault of a kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True, dropout=0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fast = fuser.optimize(model, quantize=fuser.Int8(quality=0), search=4)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert float(F.cosine_similarity(fast(x), model(x), dim=-1).mean()) > 0.999
    assert by_kind(graph_of(fast))["quantize_rows"]
    assert "search failed" not in caplog.text and "wrong numbers" not in caplog.text
