"""Models that write to what they are given: programs leave it as the models do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import Model, X, optimize
from torch import Tensor

import fuser

pytestmark = pytest.mark.usefixtures("no_grad")


def added(model: Any, x: Tensor, cache: Tensor) -> Any:
    x.add_(1)
    return model.linear(x)


def returned(model: Any, x: Tensor, cache: Tensor) -> Any:
    y = model.linear(x)
    cache.copy_(y)
    return y, cache


def exchanged(model: Any, x: Tensor, cache: Tensor) -> Any:
    y = model.linear(x + cache)
    before = x.clone()
    x.copy_(cache)
    cache.copy_(before)
    return y


def by_slices(model: Any, x: Tensor, cache: Tensor) -> Any:
    cache[:, 1:3] = x[:, :2]
    cache[..., 0].mul_(2)
    return model.linear(cache.relu())


def read_before(model: Any, x: Tensor, cache: Tensor) -> Any:
    before = model.linear(cache)
    cache.index_copy_(1, torch.tensor([2, 0]), x[:, :2])
    return before, model.linear(cache)


def rows_of_heads(model: Any, x: Tensor, cache: Tensor) -> Any:
    heads, state = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (model.linear(x), cache))
    kept = state.index_copy(2, torch.tensor([1, 3]), heads[:, :, :2])
    cache.copy_(kept.transpose(1, 2).flatten(2))
    return kept


RUNS = [added, returned, exchanged, by_slices, read_before, rows_of_heads]


@pytest.mark.parametrize("run", RUNS)
def test_inputs_hold_what_the_model_leaves_in_them(run: Callable[..., Any]) -> None:
    model = Model(run)
    fast = optimize(model)
    mine, theirs = ([X.clone(), 2 * X] for _ in range(2))
    for _ in range(3):
        got, expected = fast(*mine), model(*theirs)
        for a, b in zip((*mine, *_leaves(got)), (*theirs, *_leaves(expected)), strict=True):
            torch.testing.assert_close(a, b)
        if run is returned:
            assert got[1] is mine[1]
    assert fast.fallbacks == () and len(fast.programs) == 1


def _leaves(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("run", [added, exchanged, rows_of_heads])
def test_views_are_written_where_they_lie(run: Callable[..., Any]) -> None:
    model = Model(run)
    fast = optimize(model)
    mine, theirs = ([torch.stack([X, 2 * X, 3 * X], -1), torch.stack([4 * X, 5 * X], -1)] for _ in range(2))
    for place in (0, 1):
        got = fast(*(t[..., place] for t in mine))
        torch.testing.assert_close(got, model(*(t[..., place] for t in theirs)))
        torch.testing.assert_close(mine, theirs)
    assert fast.fallbacks == ()


def test_inputs_in_one_memory_are_left_to_the_original() -> None:
    model = Model(exchanged)
    fast = optimize(model)
    fast(X.clone(), 2 * X)
    mine, theirs = (torch.stack([X, 2 * X]) for _ in range(2))
    torch.testing.assert_close(fast(mine[0], mine[1]), model(theirs[0], theirs[1]))
    torch.testing.assert_close(mine, theirs)
    assert any("shares its memory" in reason for reason in fast.fallbacks)


def test_a_view_of_what_is_written_is_returned_by_the_original() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x.copy_(model.linear(x))
        return x[0]

    fast = optimize(Model(run))
    mine = X.clone()
    got = fast(mine)
    got.zero_()
    assert not mine[0].any()
    assert any("returns a view of it" in reason for reason in fast.fallbacks)


def test_programs_that_write_to_inputs_are_not_saved(tmp_path: Any) -> None:
    fast = optimize(Model(lambda model, x, write=False: model.linear(x.add_(1) if write else x)))
    fast(X)
    fast(X.clone(), write=True)
    fast.save(tmp_path / "program.fuser")
    assert not any("write=True" in call for call in fuser.load(tmp_path / "program.fuser").calls)
