"""Layers of torch.ao.quantization.quantize_dynamic: what stands for them, and what becomes of models of them."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.frontend.packed_linear import stand_in

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ENGINES = [
    engine for engine in ("x86", "fbgemm", "onednn", "qnnpack") if engine in torch.backends.quantized.supported_engines
]


@pytest.fixture(autouse=True)
def _same_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def packed(model: nn.Module, how: str = "tensor") -> Any:
    """The model with its linear layers packed: weights with one scale (``tensor``), one for each output (``channel``)
    or in half precision (``half``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "channel":
            given: Any = {nn.Linear: quantization.per_channel_dynamic_qconfig}
        else:
            given = {nn.Linear}
        dtype = torch.float16 if how == "half" else torch.qint8
        return quantization.quantize_dynamic(model.eval(), given, dtype=dtype)


def linear(inputs: int = 48, outputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias)


def rounded_product(x: Tensor, layer: Any, levels: int) -> Tensor:
    """What the layer computes, in fp64 from the definition: one step for all of x, of which zero is a multiple."""
    weight = layer.weight()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = float(np.float32((high - low) / levels))
    point = round(-low / step)
    codes = (x.double() / step).round().add(point).clamp(0, levels) - point
    return codes * step @ weight.dequantize().double().T + layer.bias().double()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["tensor", "channel"])
def test_a_stand_in_computes_what_the_layer_does(engine: str, how: str) -> None:
    torch.backends.quantized.engine = engine
    (layer,) = packed(nn.Sequential(linear()), how)
    made: Any = stand_in(layer)
    assert isinstance(made, type(layer))
    for shift in (-3.0, 0.0, 2.0):
        x = torch.randn(3, 5, 48) + shift
        torch.testing.assert_close(made(x), layer(x), rtol=0, atol=2e-6)
        want = rounded_product(x, layer, made.levels)
        # Of 720 numbers a few lie in the middle between two integers, as far as fp32 says.
        near = (made(x).double() - want).abs() < 1e-5
        assert float(near.double().mean()) > 0.95


@pytest.mark.parametrize("engine", ENGINES)
def test_ranges_of_all_kinds(engine: str) -> None:
    """Scales below PyTorch's least, one side of zero alone, numbers at the ends. (Those of a range that is symmetric
    about zero lie in the middle between two integers, of which a layer, which adds the zero point first, may take the
    other.)"""
    torch.backends.quantized.engine = engine
    for inputs in (1, 2, 33):
        (layer,) = packed(nn.Sequential(linear(inputs, 24)))
        made = stand_in(layer)
        assert made is not None
        x = torch.randn(4, inputs)
        for given in (
            x.clamp(-0.1, 0.25),
            x.abs(),
            -x.abs(),
            x * 1e-4,
            x * 1e-6,
            x * 1e-30,
            x * 0,
            x + 9,
            x * 1e30,
        ):
            want = layer(given)
            torch.testing.assert_close(made(given), want, rtol=0, atol=1e-6 * float(want.abs().max()))


def test_without_a_bias_and_in_half_precision() -> None:
    for how in ("tensor", "half"):
        (layer,) = packed(nn.Sequential(linear(bias=False)), how)
        made, x = stand_in(layer), torch.randn(7, 48)
        assert made is not None
        torch.testing.assert_close(made(x), layer(x), rtol=0, atol=2e-6)


def test_other_modules_have_none() -> None:
    assert stand_in(linear()) is None
    (layer,) = packed(nn.Sequential(linear()))

    class Own(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x

    layer.__class__ = Own
    assert stand_in(layer) is None


def test_a_weight_with_zero_points_has_none() -> None:
    (layer,) = packed(nn.Sequential(linear()))
    weight = torch.quantize_per_tensor(linear().weight.detach(), 0.01, 3, torch.qint8)
    layer.set_weight_bias(weight, layer.bias())
    assert stand_in(layer) is None


def tensors_of(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return dict(module.named_buffers())


def test_its_tensors_are_made_once_for_every_weight_and_go_with_the_layer() -> None:
    (layer,) = packed(nn.Sequential(linear()))
    before = tensors_of(stand_in(layer))
    assert before and all(tensor is before[name] for name, tensor in tensors_of(stand_in(layer)).items())
    layer.set_weight_bias(torch.quantize_per_tensor(-linear().weight.detach(), 0.01, 0, torch.qint8), layer.bias())
    made, x = stand_in(layer), torch.randn(2, 48)
    assert made is not None and all(tensor is not before.get(name) for name, tensor in tensors_of(made).items())
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=2e-6)
    gone = weakref.ref(tensors_of(made)["unpacked_weight"])
    del layer, made
    gc.collect()
    assert gone() is None


def test_hooks_and_attributes_of_a_layer_stay() -> None:
    model, x = packed(nn.Sequential(linear(64, 64), nn.ReLU(), linear(64, 48))), torch.randn(4, 64)
    model[0].register_forward_hook(lambda module, inputs, output: output * module.factor)
    model[0].factor = 3.0
    with torch.no_grad():
        fast = fuser.optimize(model, (x,))
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.02)
        assert not fast.fallbacks
        model[0].factor = -1.0
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.02)
        model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1.0,))
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.02)
        # What calls the layer's own code, which no trace looks into, runs as it is.
        own = model[0].forward
        model[0].forward = lambda x: own(x) + 2.0
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.02)
    assert "_packed_params" in model[0]._modules and not dict(model.named_buffers())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def kernels_of(model: Any) -> list[str]:
    return [kernel.family for kernel in model.kernels]


@pytest.mark.parametrize("how", ["tensor", "channel"])
def test_models_run_on_integers(how: str) -> None:
    torch.manual_seed(0)
    model, x = packed(Attention(), how), torch.randn(2, 9, 64)
    with torch.no_grad():
        want = model(x)
        fast = fuser.optimize(model, (x,))
        got = fast(x)
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
        assert not fast.fallbacks
        # q, k and v read one rounded tensor, and are one product.
        assert kernels_of(fast).count("int8_gemm") == 2
        longer = torch.randn(1, 30, 64)
        torch.testing.assert_close(fast(longer), model(longer), rtol=0, atol=0.02 * float(want.abs().max()))


def test_a_weight_that_is_set_is_used(tmp_path: Path) -> None:
    model, x = packed(nn.Sequential(linear(64, 64), nn.ReLU(), linear(64, 48))), torch.randn(4, 64)
    with torch.no_grad():
        fast = fuser.optimize(model, (x,))
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.02)
        weight = torch.quantize_per_tensor(torch.randn(64, 64), 0.02, 0, torch.qint8)
        model[0].set_weight_bias(weight, torch.randn(64))
        want = model(x)
        torch.testing.assert_close(fast(x), want, rtol=0, atol=0.02 * float(want.abs().max()))


class Writing(nn.Module):
    """Between two layers, or before the first, something is written into a part of what they read."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.write, self.first, self.second = write, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        y = self.first(h)
        self.write(h)
        return y + self.second(h)


@pytest.mark.parametrize(
    "write",
    [
        lambda h: h[2].zero_(),
        lambda h: h.t().add_(5.0),
        lambda h: h[:, :32].mul_(5.0),
        lambda h: h[:, 0].copy_(h[:, 1] * 9),
        lambda h: h.add_(3.0),
    ],
)
def test_what_is_written_between_two_layers_counts(write: Any) -> None:
    torch.manual_seed(0)
    model, x = packed(Writing(write)), torch.randn(6, 64)
    with torch.no_grad():
        want, got = model(x), fuser.optimize(model, (x,))(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


def test_no_rows_and_other_dtypes() -> None:
    model, x = packed(nn.Sequential(linear(64, 64))), torch.randn(4, 64)
    with torch.no_grad():
        fast = fuser.optimize(model, (x,))
        assert fast(x[:0]).shape == (0, 64)
        with pytest.raises(RuntimeError):
            fast(x.bfloat16())


def test_values_that_are_not_finite() -> None:
    """As PyTorch says of exported models: all of the tensor has one scale, which then is NaN."""
    model, x = packed(nn.Sequential(linear(64, 64))), torch.randn(4, 64)
    with torch.no_grad():
        fast = fuser.optimize(model, (x,))
        x[1, 2] = math.inf
        assert fast(x).isnan().all()


def test_a_saved_model_has_the_integers(tmp_path: Path) -> None:
    model, x = packed(nn.Sequential(linear(64, 64), nn.GELU())), torch.randn(4, 64)
    with torch.no_grad():
        fast = fuser.optimize(model, (x,))
        fast.save(tmp_path / "model.fuser")
        assert torch.equal(fuser.load(tmp_path / "model.fuser")(x), fast(x))
