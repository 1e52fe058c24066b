"""What a mask's function reads is part of what the mask is: closures, defaults, globals, bound objects, by content."""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fuser.ir.errors import MaskError
from fuser.ir.masks import Causal, Mask, from_mask_mod, per_head

WINDOW = 2
SETTINGS = types.SimpleNamespace(window=2)
Change = tuple[Any, Callable[[int], None]]


def by_global(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return near(i, j)


def near(i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() < WINDOW


def set_global(value: int) -> None:
    global WINDOW
    WINDOW = value


def closure(make: Callable[[int], Any]) -> Change:
    """A function over a captured number, in whatever ``make`` puts it."""
    held = make(2)

    def set_held(value: int) -> None:
        nonlocal held
        held = make(value)

    return lambda b, h, i, j: (i - j).abs() < held.item(), set_held


def tensor_in_place() -> Change:
    held = torch.tensor([2])
    return lambda b, h, i, j: (i - j).abs() < held[0], lambda value: held.fill_(value)  # type: ignore[return-value]


def inference_tensor() -> Change:
    with torch.inference_mode():
        held = torch.tensor([2])

    def change(value: int) -> None:
        with torch.inference_mode():
            held.fill_(value)

    return lambda b, h, i, j: (i - j).abs() < int(held), change


def array_in_place() -> Change:
    held = np.array([2])
    return lambda b, h, i, j: (i - j).abs() < int(held[0]), lambda value: held.fill(value)


def default() -> Change:
    def function(b: Tensor, h: Tensor, i: Tensor, j: Tensor, window: int = 2) -> Tensor:
        return (i - j).abs() < window

    return function, lambda value: setattr(function, "__defaults__", (value,))


def partial() -> Change:
    options = {"window": torch.tensor(2)}

    def function(b: Tensor, h: Tensor, i: Tensor, j: Tensor, options: dict[str, Tensor]) -> Tensor:
        return (i - j).abs() < options["window"]

    return functools.partial(function, options=options), lambda value: options.update(window=torch.tensor(value))


class Bound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window: Tensor
        self.register_buffer("window", torch.tensor(2))
        self.unrelated = 0

    @property
    def reach(self) -> Tensor:
        return self.window

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.distance(i, j) < self.reach

    @staticmethod
    def distance(i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs()

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.allowed(b, h, i, j)


def bound_method() -> Change:
    bound = Bound()
    return bound.allowed, lambda value: setattr(bound, "window", torch.tensor(value))


def bound_method_in_place() -> Change:
    bound = Bound()
    return bound.allowed, lambda value: bound.window.fill_(value)  # type: ignore[return-value]


def callable_object() -> Change:
    bound = Bound()
    return bound, lambda value: setattr(bound, "window", torch.tensor(value))


def attribute_of_a_global() -> Change:
    return lambda b, h, i, j: (i - j).abs() < SETTINGS.window, lambda value: setattr(SETTINGS, "window", value)


WAYS: dict[str, Callable[[], Change]] = {
    "global": lambda: (by_global, set_global),
    "closure over a tensor": lambda: closure(torch.tensor),
    "closure over an array": lambda: closure(np.int64),
    "tensor in place": tensor_in_place,
    "inference tensor": inference_tensor,
    "array in place": array_in_place,
    "default": default,
    "partial": partial,
    "bound method": bound_method,
    "bound method, in place": bound_method_in_place,
    "callable object": callable_object,
    "attribute of a global": attribute_of_a_global,
}


def window(size: int) -> Tensor:
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    return distance < size


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_a_mask_is_what_its_function_answers_now(way: str, sizes: list[int]) -> None:
    function, change = WAYS[way]()
    mask = from_mask_mod(function)
    seen: dict[int, Mask] = {}
    for size in sizes:
        change(size)
        now = mask.current()
        assert torch.equal(now.dense(6), window(size)) and torch.equal(mask.dense(6), window(size))
        # Equal content is one value, whichever object asks, so that plans are found again.
        assert mask.current() is now and from_mask_mod(function).current() == now
        assert seen.setdefault(size, now) == now and hash(seen[size]) == hash(now)
        for other, kept in seen.items():
            assert kept.is_current == (other == size)
            if other != size:
                with pytest.raises(MaskError, match="has changed since"):
                    kept.dense(6)
    change(2)


def test_derived_masks_follow_their_operands() -> None:
    function, change = tensor_in_place()
    mask = from_mask_mod(function)
    derived = [mask & Causal(), ~mask, mask | Causal(), mask.shift(1), per_head([mask, Causal()])]
    before = [m.current() for m in derived]
    assert [m.current() for m in derived] == before and all(
        a is b.current() for a, b in zip(before, derived, strict=True)
    )
    change(4)
    assert not any(m.is_current for m in before)
    for old, m in zip(before, derived, strict=True):
        assert m.current() != old and torch.equal(m.current().dense(6), m.dense(6))
    causal = Causal()
    assert causal.current() is causal and not causal.has_functions and derived[0].has_functions


def test_what_the_code_does_not_name_does_not_matter() -> None:
    bound = Bound()
    mask = from_mask_mod(bound.allowed).current()
    bound.unrelated = 1
    bound.register_buffer("other", torch.zeros(3))
    assert mask.is_current


def test_another_process_reads_what_is_there() -> None:
    mask = from_mask_mod(by_global)
    copy = pickle.loads(pickle.dumps(mask.current()))
    assert copy == mask and copy.state is None


def test_references_in_a_circle_end() -> None:
    held: list[Any] = [3]
    held.append(held)
    mask = from_mask_mod(lambda b, h, i, j: i - j < held[0])
    now = mask.current()
    held[0] = 4
    assert not now.is_current
