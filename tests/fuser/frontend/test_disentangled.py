"""Relative positions in scores, as DeBERTa writes them, are one bias; what is something else stays right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph
from fuser.ir.operators import DisentangledBias

BATCH, HEADS, LENGTH, WIDTH, POSITIONS = 2, 3, 7, 4, 6
FROM, TO = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
BUCKETS = (FROM - TO + 3).clamp(0, POSITIONS - 1)
Extra = Callable[["Attention", Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention (B · H, S, D) whose scores get what ``extra`` makes of queries and keys."""

    def __init__(self, extra: Extra) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("of_keys", "of_queries"):
            self.register_buffer(name, torch.randn(HEADS, POSITIONS, WIDTH, generator=generator))
        self.register_buffer("buckets", BUCKETS)
        self.extra = extra

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + self.extra(self, q, k)).softmax(-1) @ v

    def products(self, rows: Tensor, table: Tensor) -> Tensor:
        return torch.bmm(rows, table.repeat(BATCH, 1, 1).mT)

    def looked_up(self, rows: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
        index = buckets.expand(BATCH * HEADS, LENGTH, LENGTH)
        return self.products(rows, table).gather(-1, index)


def c2p(m: Attention, q: Tensor, k: Tensor) -> Tensor:
    return m.looked_up(q, m.of_keys, m.buckets) / 3


def p2c(m: Attention, q: Tensor, k: Tensor) -> Tensor:
    return m.looked_up(k, m.of_queries, m.buckets).transpose(-1, -2) * 0.25


def by_pair(m: Attention, q: Tensor, k: Tensor) -> Tensor:
    return m.looked_up(q, m.of_keys, m.buckets * (FROM % 2))


def of_heads(m: Attention, q: Tensor, k: Tensor) -> Tensor:
    index = (m.buckets + torch.arange(BATCH * HEADS)[:, None, None]) % POSITIONS
    return m.products(q, m.of_keys).gather(-1, index)


EXTRAS: dict[str, tuple[Extra, tuple[float | None, float | None] | None]] = {
    "both": (lambda m, q, k: 0 + c2p(m, q, k) + p2c(m, q, k), (1 / 3, 0.25)),
    "queries": (c2p, (1 / 3, None)),
    "keys": (p2c, (None, 0.25)),
    "scaled together": (lambda m, q, k: (p2c(m, q, k) + c2p(m, q, k)) * 2, (2 / 3, 0.5)),
    "through four dimensions": (
        lambda m, q, k: c2p(m, q, k).view(BATCH, HEADS, LENGTH, LENGTH).flatten(0, 1),
        (1 / 3, None),
    ),
    "twice the same": (lambda m, q, k: c2p(m, q, k) + c2p(m, q * 2, k), None),
    "not by distance": (by_pair, None),
    "other buckets for each head": (of_heads, None),
    "with something else": (lambda m, q, k: c2p(m, q, k) + q[..., :1], None),
}


def raised(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[OperatorGraph, Tensor]:
    captured = capture(model, flatten_call(given, {}))
    graph = raise_graph(captured)
    known = dict(zip(graph.inputs, given, strict=True))
    for name in reversed(graph.with_sources(graph.constants)):
        constant = graph.constants[name]
        sources = [known[s] for s in constant.sources]
        known[name] = captured.parameters[name] if constant.call is None else constant.evaluate(sources)
    return graph, evaluate(graph, known)[graph.outputs[0]]


@pytest.mark.parametrize("name", EXTRAS)
def test_positions_in_scores(name: str) -> None:
    extra, expected = EXTRAS[name]
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(BATCH * HEADS, LENGTH, WIDTH, generator=generator) for _ in range(3))
    model = Attention(extra).eval()
    with torch.no_grad():
        graph, found = raised(model, given)
        wanted = model.double()(*(t.double() for t in given))
    # Sums of few terms in fp32.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    biases = [op.semantics for op in graph.operators if isinstance(op.semantics, DisentangledBias)]
    assert len(biases) == (expected is not None)
    for bias in biases:
        assert (bias.queries, bias.keys) == pytest.approx(expected)


def test_products_with_matrices_of_heads_need_no_pytorch() -> None:
    given = tuple(torch.randn(BATCH * HEADS, LENGTH, WIDTH) for _ in range(3))
    graph, _ = raised(Attention(c2p).eval(), given)
    assert [op.kind for op in graph.compute if not op.semantics.fusible] == []
