"""Inputs of every layout, wrong calls, odd tensors, and arguments that are no tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import NAN, WIDTH, Model, X, assert_same, check, encoder, optimize
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import fuser
from fuser.ir.errors import FuserError, IndexRangeError
from fuser.module import forms

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(16, 2, WIDTH).transpose(0, 1),
        lambda: torch.randn(2, 32, 2 * WIDTH)[:, ::2, ::2],
        lambda: torch.randn(1, 16, WIDTH).expand(2, 16, WIDTH),
        lambda: torch.randn(3, 16, WIDTH)[1:],
        lambda: torch.randn(2 * 16 * WIDTH + 3)[3:].view(2, 16, WIDTH),
        lambda: torch.randn(2, 16, WIDTH, dtype=torch.complex64).conj().imag,
        lambda: torch._neg_view(torch.randn(2, 16, WIDTH)),
        lambda: nn.Parameter(torch.randn(2, 16, WIDTH)),
        lambda: torch.randn(0, 16, WIDTH),
        lambda: torch.randn(2, 1, WIDTH),
    ],
    ids=[
        "transposed",
        "sliced",
        "expanded",
        "offset",
        "unaligned",
        "conjugate",
        "negated",
        "parameter",
        "empty",
        "one",
    ],
)
def test_inputs_in_every_layout(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(4)
    x = make()
    fast = check(encoder(), x)
    assert fast.fallbacks == ()


def test_empty_sequences() -> None:
    model = Model(lambda m, x: F.layer_norm(m.linear(x).relu(), (WIDTH,)))
    check(model, X[:, :0])
    check(model, X[:0])
    check(nn.Sequential(nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)), torch.zeros(2, 0, dtype=torch.long))


def test_inputs_that_are_one_tensor_or_overlap() -> None:
    model = Model(lambda m, x, y: m.linear(x) + y)
    check(model, X, X)
    big = torch.randn(4, 16, WIDTH)
    check(model, big[:2], big[1:3])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids))


@pytest.mark.parametrize("bad", [50, -1, 2**40, -(2**62)])
def test_a_token_outside_the_vocabulary_is_an_index_error(bad: int) -> None:
    model = Both()
    fast = optimize(model)
    ids = torch.tensor([[1, bad, 3]])
    with pytest.raises(IndexError):
        model(ids)
    with pytest.raises(IndexError, match="outside the table") as caught:
        fast(ids)
    assert isinstance(caught.value, FuserError) and isinstance(caught.value, IndexRangeError)
    good = torch.tensor([[1, 2, 3]])
    assert_same(fast(good), model(good))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[1, 5]], dtype=torch.int32),
        torch.arange(8).view(2, 4).t(),
        torch.tensor([[1, 5]]).expand(3, 2),
        torch.tensor(3),
    ],
    ids=["int32", "transposed", "expanded", "single"],
)
def test_tokens_of_every_layout(ids: Tensor) -> None:
    check(Both(), ids)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 31),),
        (torch.randn(2, WIDTH).double(),),
        (torch.ones(2, WIDTH, dtype=torch.int64),),
        (),
        (X, X),
        (None,),
        ("text",),
        (torch.randn(2, WIDTH).to_sparse().to_dense()[:, :3],),
    ],
    ids=["width", "dtype", "integers", "none given", "too many", "none", "text", "sliced"],
)
def test_wrong_calls_fail_as_in_eager(arguments: tuple[Any, ...]) -> None:
    model = nn.Linear(WIDTH, WIDTH)
    fast = optimize(model)
    with pytest.raises(Exception) as eager:
        model(*arguments)
    for _ in range(2):
        with pytest.raises(type(eager.value)) as ours:
            fast(*arguments)
        assert type(ours.value) is type(eager.value)
    assert_same(fast(X), model(X))


class Tagged(Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: X.to_sparse(), "layout"),
        (lambda: X.as_subclass(Tagged), "Tagged"),
        (lambda: torch.nested.nested_tensor([X[0], X[1, :3]]), "nested"),
    ],
    ids=["sparse", "subclass", "nested"],
)
def test_inputs_that_kernels_cannot_take(make: Callable[[], Tensor], reason: str) -> None:
    model = Model(lambda m, x: m.linear(x.to_dense() if x.is_sparse else x.to_padded_tensor(0) if x.is_nested else x))
    fast = optimize(model)
    with torch.enable_grad():
        x = make()
        ours, theirs = fast(x), model(x)
    assert type(ours) is type(theirs)
    assert torch.equal(ours, theirs)
    assert reason in fast.fallbacks[0]


def test_inputs_on_other_devices() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    fast = optimize(model)
    x = X.to("meta")
    with pytest.raises(RuntimeError):
        model(x)
    with pytest.raises(RuntimeError):
        fast(x)
    assert "meta" in fast.fallbacks[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(X)).shape == X.shape


def test_tensors_without_memory_do_not_reach_kernels() -> None:
    model = encoder()
    fast = optimize(model)
    assert_same(fast(X), model(X))
    for run in (fast, optimize(model)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(run(X), FakeTensor)
        assert_same(run(X), model(X))
        assert "TorchDispatchMode" in run.fallbacks[0]


def test_nothing_is_compiled_for_another_default_device() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.device("meta"):
        assert_same(fast(X), model(X))
    assert "default device" in fast.fallbacks[0] and fast.programs == ()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1


def test_models_of_other_compilers() -> None:
    model = encoder()
    with pytest.raises(TypeError, match="before TorchScript"):
        fuser.optimize(torch.jit.trace(model, X))
    assert optimize(torch.compile(model))._model is model


def test_a_model_and_a_part_of_it_compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = optimize(encoder())
    whole = optimize(nn.Sequential(nn.Linear(WIDTH, WIDTH), part).eval())
    started, capture = threading.Event(), forms.capture

    def slow(model: nn.Module, *args: Any) -> Any:
        if model is part._model:
            # The whole is being captured by now.
            started.set()
            time.sleep(0.5)
        return capture(model, *args)

    def run_whole() -> None:
        started.wait()
        with torch.no_grad():
            whole(X)

    def run_part() -> None:
        with torch.no_grad():
            part(X)

    monkeypatch.setattr(forms, "capture", slow)
    threads = [threading.Thread(target=run, daemon=True) for run in (run_part, run_whole)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert whole.fallbacks == part.fallbacks == () and len(whole.programs) == len(part.programs) == 1


# ---- arguments that are not tensors


def test_programs_are_made_for_plain_arguments() -> None:
    model = Model(lambda m, x, factor=1.0, flag=True: m.linear(x) * factor + int(flag))
    fast = optimize(model)
    for factor, flag in ((0.0, True), (-0.0, False), (1, True), (1.0, True), (True, 1), (2.5, None or False)):
        ours, theirs = fast(X, factor, flag=flag), model(X, factor, flag=flag)
        assert_same(ours, theirs)
        assert torch.equal(ours.signbit(), theirs.signbit())
    known = len(fast.programs)
    for _ in range(2):
        assert bool(fast(X, NAN).isnan().all())
    assert len(fast.programs) == known + 1
