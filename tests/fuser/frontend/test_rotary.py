"""Rotary embeddings in every spelling: one operator that computes what the spelling does."""

from __future__ import annotations

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
from fuser.frontend.graphs import raise_graph
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Operator, OperatorGraph, is_kind
from fuser.ir.operators import Rotary

B, S, H = 2, 6, 3
Spelling = Callable[[Tensor, Tensor], Tensor]
"""What is made of x (B, S, H, D) and of angles (S, width / 2)."""


class Model(nn.Module):
    def __init__(self, run: Spelling) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.run(x, angles)


def inputs(columns: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(B, S, H, columns, generator=generator).to(dtype)
    return x, 5 * torch.randn(S, width // 2, generator=generator)


def graph_of(run: Spelling, x: Tensor, angles: Tensor) -> OperatorGraph:
    return raise_graph(capture(Model(run).eval(), flatten_call((x, angles), {})))


def rotations(graph: OperatorGraph) -> list[Operator[Rotary]]:
    return [op for op in graph.operators if is_kind(op, Rotary)]


def once(table: Tensor) -> Tensor:
    """A table (S, width) for x (B, S, H, width)."""
    return table[None, :, None, :]


def halves(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def twice(angles: Tensor) -> Tensor:
    return once(torch.cat((angles, angles), -1))


def cat_of_halves(x: Tensor, angles: Tensor) -> Tensor:
    return x * twice(angles).cos() + halves(x) * twice(angles).sin()


def cat_of_chunks(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * twice(angles).cos() + torch.cat([b.neg(), a], dim=-1) * twice(angles).sin()


def two_equations(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = once(angles.cos()), once(angles.sin())
    a, b = x.split(x.shape[-1] // 2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def heads_first(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    x = x.transpose(1, 2)
    return x * cos + halves(x) * sin


def in_float(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = twice(angles).cos(), twice(angles).sin()
    return ((x.float() * cos) + (halves(x.float()) * sin)).to(x.dtype)


def part(width: int) -> Spelling:
    def run(x: Tensor, angles: Tensor) -> Tensor:
        turned, kept = x[..., :width], x[..., width:]
        return torch.cat((cat_of_halves(turned, angles), kept), -1)

    return run


def middle(start: int, width: int) -> Spelling:
    def run(x: Tensor, angles: Tensor) -> Tensor:
        before, turned, after = x.split([start, width, x.shape[-1] - start - width], -1)
        return torch.cat((before, stacked(turned, angles), after), -1)

    return run


def repeated(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (once(torch.repeat_interleave(t, 2, 1)) for t in (angles.cos(), angles.sin()))
    return x * cos + neighbours(x) * sin


def with_a_scale_of_one(x: Tensor, angles: Tensor) -> Tensor:
    """As libraries write it that can scale rotations, and do not."""
    table = once(torch.stack((angles, angles), -1).flatten(-2))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-b, a), -1).flatten(-2)
    return (x * table.cos() * 1) + (turned * table.sin() * 1.0)


def stacked(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = once(angles.cos()), once(angles.sin())
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def unbound(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = once(angles.cos()), once(angles.sin())
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(x.shape)


def as_complex(x: Tensor, angles: Tensor) -> Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)


def of_complex_parts(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.complex(angles.cos(), angles.sin())[:, None, :]
    return torch.view_as_real(turned).reshape(B, S, -1)


SPELLINGS: dict[str, tuple[Spelling, bool]] = {
    run.__name__: (run, interleaved)
    for run, interleaved in [
        (cat_of_halves, False),
        (cat_of_chunks, False),
        (two_equations, False),
        (heads_first, False),
        (in_float, False),
        (repeated, True),
        (with_a_scale_of_one, True),
        (stacked, True),
        (unbound, True),
        (as_complex, True),
        (of_complex_parts, True),
    ]
}


@pytest.mark.parametrize("width", [2, 6, 16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_one_operator(name: str, width: int) -> None:
    run, interleaved = SPELLINGS[name]
    x, angles = inputs(width, width)
    graph = graph_of(run, x, angles)
    (op,) = rotations(graph)
    # Neighbours are halves where there is one pair.
    assert op.semantics == Rotary(0, width, interleaved and width > 2)
    assert not any(graph.values[v].shape == x.shape for other in graph.compute if other != op for v in other.outputs)
    check(graph, run, x, angles)


@pytest.mark.parametrize(
    ("run", "semantics"),
    [
        (part(4), Rotary(0, 4, False)),
        (middle(3, 8), Rotary(3, 8, True)),
        (lambda x, a: part(6)(x[..., 1:11], a), Rotary(0, 6, False)),
        (lambda x, a: part(6)(x.chunk(2, -1)[1], a), Rotary(0, 6, False)),
    ],
)
def test_other_columns_are_kept_by_the_same_operator(run: Spelling, semantics: Rotary) -> None:
    x, angles = inputs(16, semantics.width)
    graph = graph_of(run, x, angles)
    assert [op.semantics for op in rotations(graph)] == [semantics]
    check(graph, run, x, angles)


def check(graph: OperatorGraph, run: Spelling, x: Tensor, angles: Tensor) -> None:
    """The graph's operators in fp64 give what the spelling does in fp64."""
    (out,) = evaluate(graph, dict(zip(graph.inputs, (x, angles), strict=True)), torch.float64).values()
    torch.testing.assert_close(out, run(x.double(), angles.double()).double(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 5), st.booleans(), st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_columns_in_any_order_are_found_or_left_right(
    pairs: int, before: int, after: int, interleaved: bool, data: st.DataObject
) -> None:
    """Columns wired at random, some of them as a rotation: what is found computes the same."""
    width, columns = 2 * pairs, before + 2 * pairs + after
    wrong = data.draw(st.sampled_from(["", "sign", "partner", "table"]))
    turned = neighbours if interleaved else halves

    def run(x: Tensor, angles: Tensor) -> Tensor:
        head, own, tail = x.split([before, width, after], -1)
        partner = turned(own)
        if wrong == "sign":
            partner = -partner
        if wrong == "partner":
            partner = partner.flip(-1)
        cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
        if wrong == "table":
            sin = sin.roll(1, -1)
        return torch.cat((head, own * once(cos) + partner * once(sin), tail), -1)

    x, angles = inputs(columns, width)
    graph = graph_of(run, x, angles)
    # With one pair, or one of whose columns all are the same, what is wrong may be right.
    assert bool(rotations(graph)) or wrong
    check(graph, run, x, angles)


def odd(x: Tensor, angles: Tensor) -> Tensor:
    cos = torch.cat((angles, angles[:, :1], angles), -1)
    return x * once(cos.cos()) + halves(x) * once(cos.sin())


def scaled(x: Tensor, angles: Tensor) -> Tensor:
    return 2.0 * x * twice(angles).cos() + halves(x) * twice(angles).sin()


def of_two(x: Tensor, angles: Tensor) -> Tensor:
    return x * twice(angles).cos() + halves(x + 1) * twice(angles).sin()


def rounded(x: Tensor, angles: Tensor) -> Tensor:
    partner = (halves(x) * twice(angles).sin()).bfloat16().float()
    return x * twice(angles).cos() + partner


@pytest.mark.parametrize(("run", "columns"), [(odd, 9), (scaled, 8), (of_two, 8), (rounded, 8)])
def test_what_only_looks_like_a_rotation_is_none(run: Spelling, columns: int) -> None:
    x, angles = inputs(columns, columns // 2 * 2)
    graph = graph_of(run, x, angles)
    assert rotations(graph) == []
    with torch.no_grad():
        ours = fuser.optimize(Model(run).eval(), search="model")(x, angles)
    torch.testing.assert_close(ours, run(x, angles), rtol=1e-5, atol=1e-5)


def test_what_is_read_besides_is_computed_besides() -> None:
    def run(x: Tensor, angles: Tensor) -> Any:
        partner = halves(x)
        return x * twice(angles).cos() + partner * twice(angles).sin(), partner

    x, angles = inputs(8, 8)
    graph = graph_of(run, x, angles)
    assert len(rotations(graph)) == 1
    found = evaluate(graph, dict(zip(graph.inputs, (x, angles), strict=True)), torch.float64)
    for ours, expected in zip(found.values(), run(x.double(), angles.double()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
