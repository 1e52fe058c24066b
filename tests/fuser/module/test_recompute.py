"""Gradients of what programs compute, in eval mode with gradients on, against the original model's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuser
from fuser.ir.errors import FuserError
from fuser.runtime.program import Program

WIDTH = 8


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.embedding = nn.Embedding(16, WIDTH)
        self.register_buffer("rows", torch.randn(4, WIDTH))
        self.run = run

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.run(self, x, *more)


def mlp(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.norm(x + m.second(F.gelu(m.first(x))))
    return result


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (m.first(x).view(1, 4, 2, 4).transpose(1, 2) for _ in range(3))
    return m.second(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, WIDTH)) + m.rows


def pair(run: Callable[..., Any] = mlp) -> tuple[nn.Module, fuser.OptimizedModule]:
    """A model and an optimized copy of it."""
    return Model(run).eval(), fuser.optimize(Model(run).eval(), search="model")


def given(**settings: Any) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1), **settings)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def agree(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = mine[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often programs have run."""
    runs: list[int] = []
    call = Program.__call__

    def counted(self: Any, inputs: Any) -> Any:
        runs.append(1)
        return call(self, inputs)

    monkeypatch.setattr(Program, "__call__", counted)
    yield runs


@pytest.mark.parametrize("run", [mlp, attention, lambda m, x: m.norm(m.embedding((x * 0).long())[:, 0])])
@pytest.mark.parametrize("input_too", [False, True])
def test_gradients_are_those_of_the_original(run: Callable[..., Any], input_too: bool, used: list[int]) -> None:
    model, fast = pair(run)
    found = []
    for module in (model, fast):
        x = given().requires_grad_(input_too)
        out = module(x)
        out.square().sum().backward()
        found.append({**gradients(module), "x": x.grad})
    assert used == [1] and fast.fallbacks == ()
    agree(found[1], found[0])


def test_a_chain_of_optimized_modules_runs_as_programs(used: list[int]) -> None:
    (first, fast_first), (second, fast_second) = pair(), pair(attention)
    second(first(given())).sum().backward()
    fast_second(fast_first(given())).sum().backward()
    assert len(used) == 2 and fast_second.fallbacks == ()
    for fast, model in ((fast_first, first), (fast_second, second)):
        agree(gradients(fast), gradients(model))


def test_modules_with_common_weights_count_each_use_once() -> None:
    model, fast = pair()
    model(model(given())).sum().backward()
    fast(fast(given())).sum().backward()
    agree(gradients(fast), gradients(model))


def test_gradients_of_gradients() -> None:
    model, fast = pair()
    found = []
    for module in (model, fast):
        x = given(dtype=torch.float32).requires_grad_()
        # No sum of squares: behind a norm that is a constant, and its gradients rounding errors.
        (slope,) = torch.autograd.grad(module(module(x)).sin().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({**gradients(module), "x": x.grad})
    agree(found[1], found[0])


def test_a_second_backward_pass() -> None:
    model, fast = pair()
    for module in (model, fast):
        out = module(given()).sum()
        out.backward(retain_graph=True)
        out.backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()
    agree(gradients(fast), gradients(model))


def test_only_what_is_asked_for_gets_gradients() -> None:
    model, fast = pair()
    expected = torch.autograd.grad(model(given()).sum(), [model.second.weight])
    found = torch.autograd.grad(fast(given()).sum(), [fast.second.weight])
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in fast.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_gradients(mode: Callable[[], Any], used: list[int]) -> None:
    _, fast = pair()
    with mode():
        out = fast(given())
        assert not out.requires_grad and out.is_inference() == torch.is_inference_mode_enabled()
    assert used == [1]


def test_frozen_parameters_are_left_out() -> None:
    model, fast = pair(lambda m, x: (m.first(x), m.second(m.first(x)), m.second(m.first(x).detach()) * 2, x * 2))
    for module in (model, fast):
        module.first.requires_grad_(False)
        outs = module(given())
        assert [out.requires_grad for out in outs] == [False, True, True, False]
        outs[1].sum().backward()
        outs[0].numpy()
    agree(gradients(fast), gradients(model))
    for module in (model, fast):
        module.requires_grad_(False)
        assert not any(out.requires_grad for out in module(given()))


def test_integers_shapes_and_views_of_what_was_given() -> None:
    def several(m: Any, x: Tensor) -> Any:
        y = m.first(x)
        return y, y.argmax(-1), torch.zeros_like(y), m.first.weight, m.first.weight.view(-1), x.t(), y.detach(), y > 0

    model, fast = pair(several)
    found = []
    for module in (model, fast):
        x = given().requires_grad_()
        outs = module(x)
        assert [out.requires_grad for out in outs] == [True, False, False, True, True, True, False, False]
        assert outs[3] is module.first.weight
        sum((out * out).sum() for out in outs if out.requires_grad).backward()
        found.append({**gradients(module), "x": x.grad})
    agree(found[1], found[0])


def doubled(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad *= 2


def test_hooks_of_parameters_and_inputs_run_once() -> None:
    model, fast = pair()
    found = []
    for module in (model, fast):
        x = given().requires_grad_()
        module.first.weight.register_hook(lambda g: g * 3)
        module.second.weight.register_post_accumulate_grad_hook(doubled)
        x.register_hook(lambda g: g * 5)
        module(x).square().sum().backward()
        found.append({**gradients(module), "x": x.grad})
    agree(found[1], found[0])


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    model, fast = pair()
    for module in (model, fast):
        module.second.weight = module.first.weight
        module(given()).sum().backward()
    agree(gradients(fast), gradients(model))


def test_active_dropout_drops_the_same_elements() -> None:
    model, fast = pair(lambda m, x: F.dropout(m.first(x), 0.5, True))
    for module in (model, fast):
        torch.manual_seed(3)
        out = module(given())
        torch.manual_seed(4)
        before = torch.get_rng_state()
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
    agree(gradients(fast), gradients(model))


def test_outputs_may_be_written_to() -> None:
    model, fast = pair(lambda m, x: m.first(x).t())
    for module in (model, fast):
        out = module(given())
        out.mul_(2.0)
        out.square().sum().backward()
    agree(gradients(fast), gradients(model))


def test_writing_to_outputs_that_share_memory_is_right_or_an_error() -> None:
    def shared(m: Any, x: Tensor) -> Any:
        y = m.first(x)
        return y, y[1:]

    for position in (0, 1):
        model, fast = pair(shared)
        outs = model(given())
        outs[position].mul_(2.0)
        (outs[0].square().sum() + outs[1].square().sum()).backward()
        outs = fast(given())
        with contextlib.suppress(RuntimeError):
            outs[position].mul_(2.0)
            (outs[0].square().sum() + outs[1].square().sum()).backward()
            agree(gradients(fast), gradients(model))


def update(fast: Any) -> None:
    with torch.no_grad():
        fast.first.weight.mul_(2.0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight": update,
    "a buffer": lambda fast: fast.rows.zero_(),
    "another weight": lambda fast: setattr(fast.first, "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH))),
    "the mode": lambda fast: fast.train(),
    "an attribute": lambda fast: setattr(fast.norm, "eps", 0.5),
    "a weight, and another call": lambda fast: (update(fast), fast(given())),
    "everything, perhaps": lambda fast: fast.refresh(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_before_the_backward_pass_is_an_error(change: str) -> None:
    _, fast = pair(lambda m, x: mlp(m, x) + m.rows)
    out = fast(given()).sum()
    CHANGES[change](fast)
    with pytest.raises(FuserError, match="run backward before changing it"):
        out.backward()
    assert all(p.grad is None for p in fast.parameters())
    fast.eval()
    fast(given()).sum().backward()


def test_training_steps_follow_the_original() -> None:
    model, fast = pair()
    for module in (model, fast):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(given()).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_changed_before_the_backward_pass_is_an_error() -> None:
    _, fast = pair()
    x = given()
    out = fast(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_an_input_made_in_inference_mode() -> None:
    model, fast = pair()
    with torch.inference_mode():
        x = given()
    model(given()).sum().backward()
    fast(x).sum().backward()
    agree(gradients(fast), gradients(model))


def test_one_tensor_given_twice_is_one_tensor_again() -> None:
    model, fast = pair(lambda m, x, y: m.first(x) if x is y else m.second(y))
    found = []
    for module in (model, fast):
        x = given().requires_grad_()
        module(x * 1.0, x * 1.0).sum().backward()
        module(x, x).sum().backward()
        found.append({**gradients(module), "x": x.grad})
    agree(found[1], found[0])


def test_an_optimized_part_of_a_model_gets_its_gradients() -> None:
    def whole(fast: bool) -> nn.Module:
        parts = [Model(mlp).eval(), Model(attention).eval()]
        if fast:
            parts[0] = fuser.optimize(parts[0], search="model")
        return nn.Sequential(*parts).eval()

    model, fast = whole(False), fuser.optimize(whole(True), search="model")
    for module in (model, fast):
        module(given()).sum().backward()
    agree(gradients(fast), gradients(model))


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    model, fast = pair()
    for module in (model, fast):
        out = module(given()).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out.backward()
    agree(gradients(fast), gradients(model))


def test_a_tensor_that_no_module_has_registered_leaves_the_call_to_the_original() -> None:
    model, fast = pair(lambda m, x: m.first(x) * m.scale)
    for module in (model, fast):
        module.scale = torch.full((WIDTH,), 2.0, requires_grad=True)
        module(given()).sum().backward()
    torch.testing.assert_close(fast.scale.grad, model.scale.grad)
    agree(gradients(fast), gradients(model))
    assert "no parameter" in fast.fallbacks[0]


def test_backward_passes_of_several_threads() -> None:
    model, fast = pair()
    expected = torch.autograd.grad(model(given()).sum(), model.norm.bias)
    found: list[Any] = []

    def run() -> None:
        found.append(torch.autograd.grad(fast(given()).sum(), fast.norm.bias))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        torch.testing.assert_close(each, expected)
