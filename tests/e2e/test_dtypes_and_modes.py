"""Models of every dtype, and PyTorch's modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import WIDTH, Model, X, assert_same, check, encoder, optimize
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_every_dtype(dtype: torch.dtype) -> None:
    fast = check(encoder().to(dtype), X.to(dtype))
    assert fast.fallbacks == ()
    if dtype is torch.bfloat16:
        assert fast.unfused == ()
    else:
        assert len(fast.kernels) == 0


def test_models_of_several_dtypes() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(WIDTH, WIDTH, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = m.parts[0](x)
        b = m.parts[1](a.float())
        c = m.parts[2](b.bfloat16())
        return a, b + c, a + b

    model = Model(run, parts=nn.ModuleList(parts))
    fast = optimize(model)
    a, b, c = fast(X.double())
    x, y, z = model(X.double())
    assert_same((a, c), (x, z))
    assert_same(b, y, 1e-3)


def test_quantized_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    fast = optimize(quantized)
    torch.testing.assert_close(fast(X), quantized(X), rtol=0, atol=1e-5)
    assert not fast.fallbacks


def test_integers_and_booleans() -> None:
    check(Model(lambda m, x: (x * 2 + 1) // 3), torch.arange(12).view(3, 4))
    check(Model(lambda m, x: ~x & x.t()), torch.rand(4, 4) > 0.5)
    check(Model(lambda m, x, y: x + y), torch.arange(WIDTH), torch.randn(WIDTH))


def test_autocast_and_transforms_run_the_original() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(X), model(X))
    assert "autocast" in fast.fallbacks[-1]
    assert_same(torch.func.vmap(fast)(X[:, None]), torch.func.vmap(model)(X[:, None]))
    linear = nn.Linear(WIDTH, WIDTH)
    fast = optimize(linear)
    assert_same(torch.func.jvp(fast, (X,), (X,)), torch.func.jvp(linear, (X,), (X,)))
    assert_same(torch.jit.trace(fast, (X,))(X), linear(X))
    assert_same(torch.export.export(fast, (X,)).module()(X), linear(X))


def test_inference_mode() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.inference_mode():
        inside = fast(X.clone())
    assert_same(fast(X), inside)
    fast = optimize(Model(lambda m, x: m.linear(x).cumsum(1)))
    fast(X)
    with torch.inference_mode():
        fast(X)


def test_training_mode_runs_the_original() -> None:
    model = Model(lambda m, x: F.dropout(m.linear(x), 0.5, m.training))
    fast = optimize(model)
    fast.train()
    assert model.training
    torch.manual_seed(3)
    ours = fast(X)
    torch.manual_seed(3)
    assert torch.equal(ours, model(X))
    assert "training mode" in fast.fallbacks[0]
    fast.eval()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1
