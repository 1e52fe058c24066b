"""Changes of what a model's code reads besides tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fuser import optimize
from fuser.frontend import watch
from fuser.frontend.watch import Structure

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
FACTOR, SHIFT = 1.0, 0.25
_CALLS = 0


class Settings:
    def __init__(self) -> None:
        self.scale = 1.0
        self.inner = None


class Reading(nn.Module):
    kind = "sum"

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.scale, self.settings, self.table = 1.0, Settings(), {"a": 1.0}
        self.active = torch.relu
        # What layers of PyTorch are given by others.
        self.linear.gain, self.norm.shift = 1.0, 0.5  # type: ignore[assignment]
        self.norm.register_forward_hook(shifted)

    def forward(self, x: Tensor) -> Tensor:
        y = self.active(self.norm(self.linear(x))) * (self.scale * self.settings.scale * self.table["a"])
        y = y * self.linear.gain
        return y * global_factor() if self.kind == "sum" else -y


def shifted(module: Any, args: Any, output: Tensor) -> Tensor:
    return output + module.shift * SHIFT


def global_factor() -> float:
    return FACTOR


def set_global(value: float) -> None:
    global FACTOR
    FACTOR = value


def set_shift(value: float) -> None:
    global SHIFT
    SHIFT = value


CHANGES: dict[str, Any] = {
    "an attribute": (lambda m: setattr(m, "scale", 3.0), lambda m: setattr(m, "scale", 1.0)),
    "eps": (lambda m: setattr(m.norm, "eps", 0.5), lambda m: setattr(m.norm, "eps", 1e-5)),
    "a layer's": (lambda m: setattr(m.linear, "gain", 3.0), lambda m: setattr(m.linear, "gain", 1.0)),
    "a hook's": (lambda m: setattr(m.norm, "shift", 3.0), lambda m: setattr(m.norm, "shift", 0.5)),
    "a hook's global": (lambda m: set_shift(2.0), lambda m: set_shift(0.25)),
    "an object's": (lambda m: setattr(m.settings, "scale", 3.0), lambda m: setattr(m.settings, "scale", 1.0)),
    "an entry": (lambda m: m.table.update(a=2.0), lambda m: m.table.update(a=1.0)),
    "a function": (lambda m: setattr(m, "active", torch.tanh), lambda m: setattr(m, "active", torch.relu)),
    "a class's": (lambda m: setattr(Reading, "kind", "other"), lambda m: setattr(Reading, "kind", "sum")),
    "a global": (lambda m: set_global(4.0), lambda m: set_global(1.0)),
    "a method": (lambda m: setattr(m, "extra", 1), lambda m: delattr(m, "extra")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_configurations_are_numbered_and_known_again(name: str) -> None:
    model = Reading()
    structure = Structure(model)
    first = structure.configuration
    assert structure.configuration == first
    change, back = CHANGES[name]
    change(model)
    try:
        other = structure.configuration
        assert other != first and structure.configuration == other
    finally:
        back(model)
    assert structure.configuration == first
    assert not structure.changed


def test_equal_values_in_other_objects_are_the_same_configuration() -> None:
    model = Reading()
    structure = Structure(model)
    first = structure.configuration
    model.scale = float("1.0")
    model.settings.scale = 10.0 / 10
    assert structure.configuration == first
    model.scale = 1  # type: ignore[assignment]
    assert structure.configuration != first


@given(st.lists(st.sampled_from([None, 0, 0.0, -0.0, True, 1, 1.0, "", (), object()])), st.data())
@pytest.mark.parametrize("identities", [watch._identities, watch._numbers_of_identities])
def test_identities_are_equal_for_the_same_objects_alone(
    identities: Any, values: list[Any], data: st.DataObject
) -> None:
    other = data.draw(st.permutations(values)) if data.draw(st.booleans()) else [*values, *data.draw(st.just([None]))]
    same = len(values) == len(other) and all(a is b for a, b in zip(values, other, strict=True))
    assert identities(iter(values)) == identities(list(values))
    assert (identities(values) == identities(other)) == same


def test_the_number_of_configurations_is_bounded() -> None:
    model = Reading()
    structure = Structure(model)
    for i in range(200):
        model.scale = float(i)
        structure.configuration  # noqa: B018
    assert structure._configuration is not None and len(structure._configuration._numbers) <= 64


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "a method"])
def test_programs_follow_what_the_code_reads(name: str) -> None:
    model = Reading().eval()
    fast = optimize(model, search="model")
    change, back = CHANGES[name]
    with torch.no_grad():
        before = model(X)
        assert torch.allclose(fast(X), before, atol=1e-5)
        change(model)
        try:
            expected = model(X)
            assert not torch.allclose(expected, before, atol=1e-3)
            assert torch.allclose(fast(X), expected, atol=1e-5)
        finally:
            back(model)
        programs = len(fast.programs)
        assert torch.allclose(fast(X), before, atol=1e-5)
        assert len(fast.programs) == programs == 2


def test_attributes_that_change_after_parts_of_the_model_did() -> None:
    model = Reading().eval()
    fast = optimize(model, search="model")
    with torch.no_grad():
        for part in (nn.Linear(8, 8), nn.Linear(8, 8)):
            assert torch.allclose(fast(X), model(X), atol=1e-5)
            part.gain = 2.0  # type: ignore[assignment]
            model.linear = part
            assert torch.allclose(fast(X), model(X), atol=1e-5)
            assert len(fast.programs) == 1
            model.active = torch.tanh if model.active is torch.relu else torch.relu
            for _ in range(2):
                assert torch.allclose(fast(X), model(X), atol=1e-5)
            assert len(fast.programs) == 2


def test_a_global_hook_added_later_is_followed() -> None:
    model = Reading().eval()
    fast = optimize(model, search="model")
    with torch.no_grad():
        fast(X)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output + 1 if module is model.linear else None
        )
        try:
            assert torch.allclose(fast(X), model(X), atol=1e-5)
        finally:
            handle.remove()
        assert torch.allclose(fast(X), model(X), atol=1e-5)


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + 1 if torch.is_grad_enabled() else y - 1 if torch.is_inference_mode_enabled() else y


def test_models_that_ask_for_the_modes_of_gradients_get_a_program_for_each() -> None:
    model = Asking().eval().requires_grad_(False)
    fast = optimize(model, search="model")
    for _, mode in itertools.product(range(2), (torch.no_grad, torch.enable_grad, torch.inference_mode)):
        with mode():
            assert torch.allclose(fast(X), model(X), atol=1e-5)
    assert len(fast.programs) == 3


@pytest.mark.parametrize(
    "ask", [lambda x: x.is_contiguous(), lambda x: x.stride(0) == 8, lambda x: x.storage_offset() == 0]
)
def test_models_that_branch_on_layouts_get_the_call_s(ask: Any) -> None:
    class Branching(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + (1 if ask(x) else -1)

    model = Branching().eval()
    fast = optimize(model, search="model")
    wide = torch.randn(5, 19)
    with torch.no_grad():
        for x in (X, torch.randn(8, 2).t(), wide[:2, :8], wide[3:, 2:10], torch.randn(1, 8).expand(2, 8), X):
            assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_one_tensor_given_twice_is_one_object_to_the_model() -> None:
    class Comparing(Asking):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.linear(x) + (y if x is y else 2 * y)

    model = Comparing().eval()
    fast = optimize(model, search="model")
    with torch.no_grad():
        for pair in ((X, X), (X, X.clone()), (X, X)):
            assert torch.allclose(fast(*pair), model(*pair), atol=1e-5)


@pytest.mark.parametrize("source", ["random", "numpy"])
def test_numbers_from_other_generators_are_drawn_in_every_call(source: str) -> None:
    import random

    import numpy as np

    class Drawing(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + (random.random() if source == "random" else float(np.random.rand()))

    model = Drawing().eval()
    fast = optimize(model, search="model")
    results = []
    for run in (model, fast):
        random.seed(0)
        np.random.seed(0)
        with torch.no_grad():
            results.append([run(X) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[1][0], results[1][1])
    assert any("random numbers" in reason for reason in fast.fallbacks)


def test_global_counters_count_every_call() -> None:
    class Counting(Asking):
        def forward(self, x: Tensor) -> Tensor:
            global _CALLS
            _CALLS += 1
            return self.linear(x) + _CALLS

    fast = optimize(Counting().eval(), search="model")
    with torch.no_grad():
        results = [fast(X) for _ in range(3)]
    assert torch.allclose(results[2] - results[0], torch.tensor(2.0), atol=1e-5)
    assert any("global variable _CALLS" in reason for reason in fast.fallbacks)
