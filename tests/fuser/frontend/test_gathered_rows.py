"""Windows and cyclic shifts as one gather of rows, however they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser.frontend.building import GraphBuilder
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.frontend.views import View
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph, TensorSpec
from fuser.ir.operators import GatherRows

WIDTH = 8
ROWS = [(48,), (2, 24), (2, 4, 6), (2, 2, 2, 2, 3), (4, 2, 6), (6, 8), (2, 2, 2, 6)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_gathers_of_gathers_are_one(data: st.DataObject) -> None:
    builder = GraphBuilder({}, frozenset({torch.float32}))
    builder.values["x"] = TensorSpec.contiguous((2, 4, 6, WIDTH), torch.float32)
    x = tensor = torch.arange(48.0 * WIDTH).view(2, 4, 6, WIDTH)
    view = View.of("x", builder.values["x"])
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.sampled_from(ROWS))
        order = data.draw(st.permutations(range(len(shape))))
        seen = view.reshape((*shape, WIDTH))
        assert seen is not None
        view, tensor = (t.permute((*order, len(shape))) for t in (seen, tensor.reshape(*shape, WIDTH)))
        name = builder.gathered(view)
        assert name is not None
        view = View.of(name, builder.values[name])
    graph = builder.finish(("x",), (view.base,), {})
    assert [op.kind for op in graph.compute] == ["gather rows"]
    constants = {name: builder.tensor(name) for name in graph.constants}
    assert torch.equal(evaluate(graph, {"x": x, **constants})[view.base], tensor)


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 24)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def raised(run: Callable[..., Any], x: Tensor) -> tuple[OperatorGraph, Tensor]:
    """The graph of ``run``, and what it makes of ``x``."""
    captured = capture(Model(run).eval(), flatten_call((x,), {}))
    graph = raise_graph(captured)
    known: dict[str, Tensor] = {graph.inputs[0]: x}
    for name in reversed(graph.with_sources(graph.constants)):
        constant = graph.constants[name]
        sources = [known[s] for s in constant.sources]
        known[name] = captured.parameters[name] if constant.call is None else constant.evaluate(sources)
    return graph, evaluate(graph, known)[graph.outputs[0]]


def windows(x: Tensor, size: int = 4) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // size, size, w // size, size, c).transpose(2, 3).reshape(-1, size * size, c)


def merged(x: Tensor, size: int = 4) -> Tensor:
    return x.view(-1, 2, 3, size, size, x.shape[-1]).transpose(2, 3).reshape(-1, 2 * size, 3 * size, x.shape[-1])


RUNS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "windows": (lambda m, x: windows(x), ["gather rows"]),
    "a shift": (lambda m, x: x.roll((-2, 3), (1, 2)), ["gather rows"]),
    "a shift of images": (lambda m, x: x.roll(1, 0), ["gather rows"]),
    "a shift from behind": (lambda m, x: x.roll(5, -2), ["gather rows"]),
    "shifted windows": (lambda m, x: windows(x.roll((-2, -2), (1, 2))), ["gather rows"]),
    "and back": (lambda m, x: merged(windows(x) * 2).roll((2, 2), (1, 2)), ["gather rows", "pointwise", "gather rows"]),
    "of a norm": (lambda m, x: windows(m.norm(x).roll((-2, -2), (1, 2))), ["gather rows", "norm"]),
    "for a product": (
        lambda m, x: m.linear(windows(x)).view(-1, 16, 3, 8).transpose(1, 2) * 2,
        ["gather rows", "gemm", "bias", "pointwise"],
    ),
    "transposed back": (
        lambda m, x: m.linear(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3).contiguous(),
        ["gemm", "bias"],
    ),
    "a shift within rows": (lambda m, x: x.roll(1, 3), ["extern"]),
    "a shift of all numbers": (lambda m, x: x.roll(1), ["extern"]),
    "short rows": (lambda m, x: windows(x[..., :4].contiguous()), ["extern"]),
    "numbers of another kind": (lambda m, x: windows(x.long()), ["extern", "extern"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_moves_rows_is_a_gather(name: str) -> None:
    run, kinds = RUNS[name]
    x = torch.randn(2, 8, 12, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        graph, found = raised(run, x)
        assert torch.allclose(found, Model(run).eval()(x), atol=1e-6)
    assert [op.kind for op in graph.compute] == kinds


def test_equal_gathers_share_their_numbers() -> None:
    x = torch.randn(1, 8, 12, 16)
    graph, _ = raised(lambda m, x: windows(x) + windows(x.exp()), x)
    gathers = [op for op in graph.compute if isinstance(op.semantics, GatherRows)]
    assert len(gathers) == 2 and len({op.inputs[1] for op in gathers}) == 1
    assert math.prod(graph.values[gathers[0].inputs[1]].shape) == 96


PICKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one of every sample": lambda x, i, j: x[torch.arange(len(x)), i],
    "from behind": lambda x, i, j: x[torch.arange(len(x)), -1 - i],
    "of a matrix": lambda x, i, j: x.flatten(0, 1)[j],
    "of each sample": lambda x, i, j: x[:, i],
    "with other dimensions": lambda x, i, j: x[i[:, None] // 5, j.view(2, 2) // 8],
    "of part": lambda x, i, j: x[:, 1:][torch.arange(len(x)), i],
}


@pytest.mark.parametrize("name", PICKS)
def test_rows_picked_at_run_time_are_a_gather(name: str) -> None:
    class Picking(Model):
        def forward(self, x: Tensor, i: Tensor, j: Tensor) -> Any:
            return PICKS[name](self.norm(x), i, j) * 2

    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    i, j = torch.tensor([6, 2]), torch.tensor([15, 0, 9, 9])
    model = Picking(windows).eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(x, i, j), model(x, i, j), rtol=1e-6, atol=1e-6)
    graph = fast.programs[-1].graph
    assert next(op.kind for op in graph.compute if op.semantics.fusible) == "gather rows" and not fast.unfused


def test_a_row_that_is_not_there_is_an_error() -> None:
    class Picking(Model):
        def forward(self, x: Tensor, i: Tensor) -> Any:
            return self.norm(x)[torch.arange(len(x)), i]

    fast = fuser.optimize(Picking(windows).eval(), search="model")
    x = torch.randn(2, 8, 16)
    fast(x, torch.tensor([1, 2]))
    with pytest.raises(IndexError):
        fast(x, torch.tensor([1, 8]))
