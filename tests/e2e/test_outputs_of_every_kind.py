"""Whatever models return: containers, views that share memory, dataclasses that nobody registered."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import Model, X, assert_same, check, optimize
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclasses.dataclass
class Output:
    hidden: Any
    rest: Any = None


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: None,
        lambda m, x: 3,
        lambda m, x: (m.linear(x), 3, "a", 1.5, True, None, torch.float32),
        lambda m, x: Pair(m.linear(x), x),
        lambda m, x: collections.OrderedDict(a=m.linear(x), b=[x, (x,)]),
        lambda m, x: (m.linear(x).sum(), x.mean(), m.linear(x).argmax(), m.linear(x) > 0, m.linear(x).int()),
        lambda m, x: (m.linear.weight, m.linear.bias[:3], torch.ones(3), torch.tensor(2.0)),
        lambda m, x: [],
        lambda m, x: torch.sort(m.linear(x)),
        lambda m, x: torch.fft.fft(m.linear(x)).abs(),
    ],
    ids=["none", "int", "plain", "namedtuple", "dict", "scalars", "weights", "empty", "sort", "complex"],
)
def test_outputs_of_every_kind(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X)
    assert fast.fallbacks == ()


def test_dataclasses_that_nobody_registered() -> None:
    model = Model(lambda m, x: Output(m.linear(x), {"inner": [Output(x, 1), "text", None]}))
    fast = optimize(model)
    ours, theirs = fast(X), model(X)
    assert isinstance(ours, Output) and isinstance(ours.rest["inner"][0], Output)
    assert_same(ours.hidden, theirs.hidden)
    assert torch.equal(ours.rest["inner"][0].hidden, X)
    assert ours.rest["inner"][0].rest == 1 and ours.rest["inner"][1:] == ["text", None]
    assert fast.fallbacks == ()


def views(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.linear(x)
    a, b = y.split(16, -1)
    return y, y.clone(), y.view(-1), y.transpose(0, 1), y.transpose(0, 1).contiguous(), a, b, x, x.clone(), x.view(-1)


def test_outputs_share_memory_exactly_where_eager_does() -> None:
    model = Model(views)
    fast = optimize(model)
    given, same = X.clone(), X.clone()
    ours, theirs = [given, *fast(given)], [same, *model(same)]
    for i, a in enumerate(theirs):
        for j, b in enumerate(theirs):
            shared = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            assert (ours[i].untyped_storage().data_ptr() == ours[j].untyped_storage().data_ptr()) == shared, (i, j)
    ours[2].zero_()
    assert torch.equal(given, X)


def test_results_belong_to_the_caller() -> None:
    fast = optimize(Model(lambda m, x: (m.linear(x), m.linear.weight)))
    first, weight = fast(X)
    kept = first.clone()
    fast(X + 1)
    assert torch.equal(first, kept)
    first.zero_()
    assert_same(fast(X)[0], kept)
    # What is returned of a parameter is the parameter, as in eager.
    weight.zero_()
    assert_same(fast(X)[0], fast._model(X)[0])
    # The output of one call as the input of the next.
    assert_same(fast(fast(X)[0])[0], fast._model(fast._model(X)[0])[0])
