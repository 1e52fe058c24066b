"""Objects of calls: their counters are sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuser.frontend.arguments import learn_counters, state_of
from fuser.frontend.calls import FlatCall, flatten_call
from fuser.frontend.capture import capture


def flat(cache: Any) -> FlatCall:
    return flatten_call((cache,), {})


def test_numbers_that_change_are_sizes_from_then_on() -> None:
    @dataclass
    class Cache:
        rows: Tensor
        count: int
        width: int
        full: bool = False

    def made(count: int, width: int = 7) -> Cache:
        return Cache(torch.ones(2, 3), count, width)

    assert flat(made(5)).alike != flat(made(6)).alike
    cache = made(5)
    before = state_of([cache])
    cache.count, cache.full = 6, True
    learn_counters([cache], before)
    call = flat(made(5))
    assert call.alike == flat(made(6)).alike
    assert call.key != flat(made(6)).key
    assert flat(made(5, width=8)).alike != call.alike
    assert call.counted == {(0, "count")}
    (args, _), _ = call.rebuilt(call.tensors)
    assert (args[0].count, args[0].width, args[0].full) == (5, 7, False)
    (args, _), _ = call.rebuilt(flat(made(9)).tensors)
    assert args[0].count == 9
    # PyTorch takes sizes of zero and one for numbers.
    assert not flat(made(0)).counted
    assert not flat(made(1)).counted
    assert not flat(made(-3)).counted


def test_calls_differ_by_the_place_of_an_object() -> None:
    @dataclass
    class Cache:
        rows: Tensor

    x, cache = torch.ones(2), Cache(torch.ones(2, 3))
    calls = [flatten_call(args, {}) for args in ((x, None, cache), (x, cache, None), (cache, x, None))]
    assert len({call.key for call in calls}) == len({call.alike for call in calls}) == 3


def test_a_capture_finds_counters_and_names_them() -> None:
    @dataclass
    class Cache:
        count: int

    class Model(nn.Module):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            positions = torch.arange(x.shape[0]) + cache.count
            cache.count += x.shape[0]
            return x * positions

    x = torch.ones(3)
    first = flatten_call((x, Cache(4)), {})
    assert not first.counted
    capture(Model(), first)
    captured = capture(Model(), flatten_call((x, Cache(4)), {}), [[], range(5)])
    assert len(captured.sizes.names) == 1
    sizes = captured.sizes.sizes([t.shape for t in flatten_call((x, Cache(11)), {}).tensors])
    assert list(sizes.values()) == [11]
