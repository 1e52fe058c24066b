"""Named sizes of captures: what follows from PyTorch's symbols, and for which calls a capture holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.frontend.sizes import Traced, broadcast, traced
from fuser.ir.binding import Binder, bound
from fuser.ir.errors import CaptureError
from fuser.ir.operators import PatternMask


class Model(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run
        self.linear = nn.Linear(8, 12)

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(self, *tensors)


def captured(run: Any, *tensors: Tensor, dynamic: Any = True) -> Captured:
    return capture(Model(run).eval(), flatten_call(tensors, {}), dynamic)


X = torch.randn(3, 5, 8)


def test_the_first_two_dimensions_are_batch_and_sequence_and_fixed_ones_are_numbers() -> None:
    found = captured(lambda m, x: m.linear(x).relu(), X)
    assert [[str(size) for size in shape] for shape in found.sizes.shapes] == [["batch", "sequence", "8"]]
    assert found.sizes.sizes([(7, 9, 8)]) == {"batch": 7, "sequence": 9}


def test_nothing_is_named_unless_it_is_asked_for() -> None:
    assert captured(lambda m, x: m.linear(x), X, dynamic=False).sizes.shapes == ((3, 5, 8),)
    assert not captured(lambda m, x: m.linear(x), X, dynamic=False).sizes.names
    only = captured(lambda m, x: m.linear(x), X, dynamic=[[1]]).sizes
    assert only.shapes[0][0] == 3 and list(only.names) == ["sequence"]


@pytest.mark.parametrize(
    "shapes",
    [[(1, 5, 8)], [(3, 0, 8)], [(3, 5, 9)]],
    ids=["one", "none", "fixed"],
)
def test_calls_that_the_capture_does_not_hold_for_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(CaptureError):
        captured(lambda m, x: m.linear(x), X).sizes.sizes(shapes)


def test_sizes_that_must_be_equal_are_one() -> None:
    found = captured(lambda m, x, y: x + y, torch.randn(3, 5), torch.randn(3, 5)).sizes
    assert found.shapes[0] == found.shapes[1]
    with pytest.raises(CaptureError, match="shape"):
        found.sizes([(3, 6), (3, 7)])


def test_what_a_model_asks_about_sizes_guards_the_capture() -> None:
    found = captured(lambda m, x: x * 2 if x.shape[1] > 4 else x, torch.randn(3, 6)).sizes
    assert found.sizes([(3, 5)])["sequence"] == 5
    with pytest.raises(CaptureError):
        found.sizes([(3, 4)])
    even = captured(lambda m, x: x * 2 if x.shape[1] % 3 == 0 else x, torch.randn(3, 6)).sizes
    assert even.sizes([(3, 9)])["sequence"] == 9
    with pytest.raises(CaptureError, match="captured for"):
        even.sizes([(3, 7)])


def test_a_tensor_that_would_be_empty_is_not_served() -> None:
    found = captured(lambda m, x: x[:, 3:] * 2.0, torch.randn(2, 8)).sizes
    assert found.sizes([(2, 5)])["sequence"] == 5
    for length in (2, 3):
        with pytest.raises(CaptureError):
            found.sizes([(2, length)])


def test_formulas_of_sizes_are_those_of_the_shapes_for_all_sizes() -> None:
    def run(m: Model, x: Tensor) -> tuple[Tensor, ...]:
        b, s = x.shape[:2]
        return (
            m.linear(x).view(b * s, 3, 4).transpose(0, 1),
            torch.cat([x, x[:, : s // 2]], 1),
            x.reshape(b, -1),
            x.new_zeros(b, max(s, 7)),
            x.new_zeros(s % 4 + 1, 2),
        )

    found = captured(run, X)
    (output,) = (node for node in found.graph.graph.nodes if node.op == "output")
    late = [traced(leaf) for leaf in output.args[0]]
    for batch, sequence in [(2, 5), (3, 6), (4, 11)]:
        sizes = found.sizes.sizes([(batch, sequence, 8)])
        expected = run(Model(run), torch.randn(batch, sequence, 8))
        for spec, tensor in zip(bound(tuple(late), sizes), expected, strict=True):
            assert isinstance(spec, Traced)
            assert (spec.shape, spec.strides, spec.offset) == (tensor.shape, tensor.stride(), tensor.storage_offset())


def test_sizes_that_a_model_returns_are_numbers_of_the_call() -> None:
    found = captured(lambda m, x: (m.linear(x), x.shape[1] * 2), X)
    assert Binder(found.output)({"batch": 2, "sequence": 9}).leaves[1] == 18


def test_numbers_from_values_are_refused() -> None:
    with pytest.raises(CaptureError):
        captured(lambda m, x: x[:, : int(x.sum())], torch.ones(2, 3))


WINDOW = 3


def scores_of(m: Model, x: Tensor) -> Tensor:
    return m.linear(x)[..., :8] @ x.transpose(-2, -1) * 8**-0.5


def causal(m: Model, x: Tensor) -> Tensor:
    s = x.shape[1]
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    return scores_of(m, x).masked_fill(~mask, -math.inf).softmax(-1) @ x


def window(m: Model, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    near = (at[:, None] - at).abs() < WINDOW
    return scores_of(m, x).masked_fill(~near, -math.inf).softmax(-1) @ x


def lowered(m: Model, x: Tensor) -> Tensor:
    s = x.shape[1]
    mask = torch.full((s, s), torch.finfo(torch.float32).min).triu(1)
    return (scores_of(m, x) + mask).softmax(-1) @ x


@pytest.mark.parametrize("run", [causal, lowered])
def test_a_causal_mask_that_a_model_writes_is_causal_at_all_lengths(run: Any) -> None:
    graph = raise_graph(captured(run, X), sample={"batch": 3, "sequence": 5})
    (mask,) = (op.semantics for op in graph.operators if isinstance(op.semantics, PatternMask))
    assert str(mask.pattern) == "causal"
    assert all(bound(graph.assumptions, {"batch": 2, "sequence": 11}))


@given(st.integers(2, 40))
@settings(max_examples=12, deadline=None)
def test_other_masks_are_made_for_each_length(length: int) -> None:
    graph = raise_graph(captured(window, torch.randn(3, 9, 8)), sample={"batch": 3, "sequence": 9})
    sizes = {"batch": 2, "sequence": length}
    at = torch.arange(length)
    expected = (at[:, None] - at).abs() < WINDOW
    assert all(bound(graph.assumptions, sizes))
    (mask,) = (op.semantics for op in bound(graph, sizes).operators if isinstance(op.semantics, PatternMask))
    assert mask.pattern is not None and torch.equal(mask.pattern.dense(length, length), expected)


def test_broadcasting_is_that_of_pytorch() -> None:
    assert broadcast((3, 1), (4,), ()) == (3, 4)
    with pytest.raises(ValueError, match="broadcast"):
        broadcast((3,), (4,))
