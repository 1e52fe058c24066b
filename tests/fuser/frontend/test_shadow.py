"""Copies of a model's Python objects over the same tensors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuser.frontend.shadow import Shadow
from fuser.ir.errors import CaptureError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Settings:
    scale: float
    steps: list[int]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Closing:
    """An object of which a copy would do harm when it goes."""

    def __del__(self) -> None:
        pass


class Rich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear
        self.register_buffer("shift", torch.ones(4))
        self.plain = torch.zeros(4)
        self.settings = Settings(2.0, [1])
        self.slotted = Slotted([])
        self.queue = collections.deque([1, 2], maxlen=3)
        self.found: dict[str, Any] = collections.defaultdict(list)
        self.names = {"a"}
        self.counts: dict[str, int] = collections.OrderedDict(a=1)
        self.pair = (1, [2])
        self.listed = [nn.Linear(4, 4)]
        self.method = self.add
        self.partial = functools.partial(Rich.add, self)
        self.lock = threading.Lock()
        self.closing = Closing()

    def add(self, x: Tensor) -> Tensor:
        return x + self.settings.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.method(x)) + self.partial(x) + self.shift + self.plain + self.listed[0](x)


CHANGES = {
    "an attribute": lambda m: setattr(m, "new", 1),
    "a number in an object": lambda m: setattr(m.settings, "scale", 3.0),
    "a list in an object": lambda m: m.settings.steps.append(2),
    "a slot": lambda m: m.slotted.value.append(1),
    "a deque": lambda m: m.queue.append(3),
    "a defaultdict": lambda m: m.found["x"],
    "a set": lambda m: m.names.add("b"),
    "an ordered dict": lambda m: m.counts.update(a=2),
    "a list in a tuple": lambda m: m.pair[1].append(3),
    "a hook": lambda m: m.linear.register_forward_hook(lambda *a: None),
    "a parameter": lambda m: setattr(m.linear, "bias", None),
    "a module in a list": lambda m: setattr(m.listed[0], "in_features", 5),
    "an object of a bound method": lambda m: setattr(m.method.__self__, "mark", 1),
    "an object of a partial": lambda m: setattr(m.partial.args[0], "mark", 1),
    "a mode": lambda m: m.eval(),
}


def test_a_shadow_computes_what_the_model_does_with_the_same_tensors() -> None:
    model = Rich()
    shadow = Shadow(model).module
    assert torch.equal(shadow(X), model(X))
    assert type(shadow) is Rich and shadow is not model and shadow.linear is not model.linear
    assert shadow.linear.weight is model.linear.weight and shadow.shift is model.shift
    assert shadow.tied is shadow.linear
    assert shadow.method.__self__ is shadow and shadow.partial.args[0] is shadow
    assert shadow.lock is model.lock and shadow.closing is model.closing
    assert shadow.queue.maxlen == 3 and shadow.found.default_factory is list


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_shadow_are_seen_and_do_not_reach_the_model(name: str) -> None:
    model, control = Rich(), Rich()
    shadow = Shadow(model)
    assert shadow.changed() == ("", False)
    CHANGES[name](shadow.module)
    assert shadow.changed()[0]
    # The model is as one that was never touched.
    assert Shadow(model).changed() == ("", False)
    assert _numbers(model) == _numbers(control)


def _numbers(model: Rich) -> Any:
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return (
        sorted(vars(model)), model.settings, model.slotted.value, list(model.queue), dict(model.found), model.names,
        dict(model.counts), model.pair, hooks, model.linear.bias is None, model.listed[0].in_features, model.training,
    )  # fmt: skip


def test_tensors_that_nobody_registered_are_cloned_and_known_again() -> None:
    model = Rich()
    shadow = Shadow(model)
    assert shadow.original_tensor(shadow.module.plain) is model.plain
    assert shadow.written() == ""
    shadow.module.plain.add_(1)
    assert shadow.written() == "plain" and torch.equal(model.plain, torch.zeros(4))


def test_new_tensors_are_told_from_new_numbers() -> None:
    shadow = Shadow(Rich())
    shadow.module.settings.steps.append(torch.ones(1))
    assert shadow.changed() == ("settings.steps", True)


def test_what_functions_enclose_is_copied_once() -> None:
    seen: list[int] = []

    def outer() -> tuple[Any, Any]:
        count = 0

        def bump() -> int:
            nonlocal count
            count += 1
            seen.append(count)
            return count

        def read() -> int:
            return count

        return bump, read

    model = nn.Module()
    model.bump, model.read = outer()
    shadow = Shadow(model)
    assert shadow.module.bump() == 1 and shadow.module.read() == 1
    assert model.read() == 0 and seen == [] and shadow.changed()[0]


def test_functions_that_enclose_themselves_are_copied() -> None:
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    model = nn.Module()
    model.factorial = factorial
    copied = Shadow(model).module.factorial
    assert isinstance(copied, types.FunctionType) and copied(5) == 120


def test_patched_forwards_run_in_the_shadow() -> None:
    model = nn.Linear(4, 4)
    before = model.forward
    model.forward = lambda x: before(x) * 2  # type: ignore[method-assign]
    shadow = Shadow(model)
    shadow.module.weight = nn.Parameter(torch.zeros(4, 4))
    assert torch.equal(shadow.module(X), 2 * model.bias.expand(2, 4))
    assert not torch.equal(model(X), shadow.module(X))


def test_attributes_that_are_nested_without_end_are_an_error() -> None:
    model = nn.Module()
    chain: list[Any] = []
    for _ in range(20_000):
        chain = [chain]
    model.chain = chain
    with pytest.raises(CaptureError, match="nested too deeply"):
        Shadow(model)
