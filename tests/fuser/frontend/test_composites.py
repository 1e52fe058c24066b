"""Operators that are taken apart where they are captured."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.composites import _einsum


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets(function: Callable[..., Any], *tensors: Tensor) -> list[str]:
    graph = capture(Function(function).eval(), flatten_call(tensors, {})).graph.graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """Of two operands, with letters that either, both and the result have in all orders."""
    letters = string.ascii_letters[: draw(st.integers(1, 6))]
    a, b = ("".join(draw(st.permutations([c for c in letters if draw(st.booleans())]))) for _ in range(2))
    sizes = {c: draw(st.integers(1, 4)) for c in letters}
    both = sorted(set(a + b))
    out = "".join(draw(st.permutations([c for c in both if draw(st.booleans())])))
    arrow = draw(st.sampled_from([f"->{out}", f" -> {out}", ""]))
    return f"{a},{b}{arrow}", [sizes[c] for c in a], [sizes[c] for c in b]


@settings(max_examples=300, deadline=None)
@given(equations())
def test_einsum_is_a_product_of_matrices(case: tuple[str, list[int], list[int]]) -> None:
    equation, first, second = case
    x, y = randn(*first).double(), randn(*second, seed=1).double()
    torch.testing.assert_close(_einsum(equation, (x, y)), torch.einsum(equation, x, y))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ii->i", [(3, 3)]),
        ("ij->ji", [(3, 4)]),
        ("ij->", [(3, 4)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 2)]),
        ("iij,jk->ik", [(3, 3, 4), (4, 2)]),
        ("bij,bjk->bik", [(1, 3, 4), (5, 4, 2)]),
    ],
)
def test_other_equations_are_those_of_pytorch(equation: str, shapes: list[tuple[int, ...]]) -> None:
    """A diagonal, dimensions without letters, other operands than two, sizes that broadcast."""
    tensors = [randn(*shape, seed=i).double() for i, shape in enumerate(shapes)]
    want = torch.einsum(equation, *tensors)
    torch.testing.assert_close(_einsum(equation, tensors), want)
    fast = fuser.optimize(Function(lambda *t: torch.einsum(equation, *t)).eval(), search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(*(t.float() for t in tensors)), want.float())
    assert fast.fallbacks == ()


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda x: x.narrow(1, 1, 3), ["aten.slice.Tensor"]),
        (lambda x: torch.subtract(x, x), ["aten.sub.Tensor"]),
        (lambda x: torch.true_divide(x, 2.0), ["aten.div.Tensor"]),
        (lambda x: x.broadcast_to(2, 5, 6), ["aten.expand.default"]),
        (lambda x: x.tensor_split(3, 1)[1], ["aten.slice.Tensor"]),
        (lambda x: torch.einsum("ij,kj->ik", x, x), ["aten.permute.default", "aten.matmul.default"]),
        (lambda x: nn.functional.relu6(x), ["aten.hardtanh.default"]),
    ],
)
def test_what_is_made_of_known_operators_is_these(function: Callable[..., Any], parts: list[str]) -> None:
    assert [target for target in targets(function, randn(5, 6)) if target in parts] == parts


def test_others_stay_what_they_are() -> None:
    """What has unknown parts, and loops."""
    lstm = nn.LSTM(4, 4, batch_first=True)
    assert "aten.fft_fft.default" in targets(lambda x: torch.fft.fft(x).abs(), randn(5, 6))
    assert any("lstm" in target for target in targets(lambda x: lstm(x)[0], randn(2, 5, 4)))


class Attention(nn.Module):
    """Attention as research code writes it."""

    def __init__(self, heads: int, equations: tuple[str, str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.equations = heads, equations
        self.qkv, self.out, self.norm = nn.Linear(64, 192, bias=False), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        products, sums = self.equations
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(self.norm(x)).tensor_split(3, -1))
        if products.startswith("bh"):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.multiply(torch.einsum(products, q, k), 0.25)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.finfo(scores.dtype).max)
        y = torch.einsum(sums, scores.softmax(-1), v)
        y = y.transpose(1, 2) if products.startswith("bh") else y
        return torch.subtract(x, self.out(y.flatten(2)))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "equations",
    [
        ("bihd,bjhd->bhij", "bhij,bjhd->bihd"),
        ("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    ],
    ids=["rows", "heads"],
)
@torch.no_grad()
def test_attention_of_einsums_is_attention(equations: tuple[str, str], masked: bool) -> None:
    model = Attention(4, equations).eval()
    fast = fuser.optimize(model, search="model")
    for rows in (9, 17, 40):
        x = randn(2, rows, 64)
        args = (x, torch.arange(rows) < torch.tensor([[rows], [rows - 3]])) if masked else (x,)
        torch.testing.assert_close(fast(*args), model(*args), rtol=1e-5, atol=1e-5)
    assert "attention" in {kernel.family for kernel in fast.kernels}
    assert fast.fallbacks == ()


@torch.no_grad()
def test_queries_of_all_heads_share_keys() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.kv = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, (k, v) = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2), self.kv(x).chunk(2, -1)
            scores = torch.einsum("bhid,bjd->bhij", q * 0.25, k)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            p = scores.masked_fill(causal, -torch.finfo(scores.dtype).max).softmax(-1)
            y: Tensor = torch.einsum("bhij,bjd->bhid", p, v).transpose(1, 2).flatten(2)
            return y

    model = Shared().eval()
    fast = fuser.optimize(model, search="model")
    for rows in (9, 17, 40):
        x = randn(2, rows, 64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert {kernel.family for kernel in fast.kernels} == {"gemm", "attention"} and fast.fallbacks == ()


@torch.no_grad()
def test_views_of_lists_are_views() -> None:
    """Of results and of inputs; contents that are written to one are seen in the other, as in PyTorch."""
    x, y = randn(3), randn(4)
    for function in (
        lambda a, b: torch.meshgrid(a, b, indexing="ij"),
        lambda a, b: torch.broadcast_tensors(a[:, None], b),
        lambda a, b: torch.atleast_2d(a, b * 2),
        lambda a, b: torch.meshgrid(a * 2, b + 1, indexing="xy"),
    ):
        model = Function(function).eval()
        got, want = fuser.optimize(model, search="model")(x, y), model(x, y)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
            inputs = [t.untyped_storage().data_ptr() for t in (x, y)]
            places = [t.untyped_storage().data_ptr() in inputs for t in (one, other)]
            assert places[0] == places[1]


@torch.no_grad()
def test_views_of_inputs_take_the_sizes_of_each_call() -> None:
    model = Function(lambda x, y: (x[:, None].expand(x.shape[0], y.shape[0]), y * 2)).eval()
    fast = fuser.optimize(model, search="model")
    for rows, columns in ((3, 4), (5, 7), (2, 9)):
        x, y = randn(rows), randn(columns)
        shown, doubled = fast(x, y)
        assert torch.equal(shown, x[:, None].expand(rows, columns)) and torch.equal(doubled, y * 2)
        assert shown.data_ptr() == x.data_ptr()


@torch.no_grad()
def test_one_table_serves_all_sizes() -> None:
    model = Function(lambda x, w: torch.einsum("bnd,de->bne", x.narrow(2, 0, 8), w).square())
    fast = fuser.optimize(model.eval(), search="model")
    for batch, rows in ((2, 5), (3, 9), (1, 1), (4, 16)):
        x, w = randn(batch, rows, 12), randn(8, 6, seed=1)
        torch.testing.assert_close(fast(x, w), model(x, w))
