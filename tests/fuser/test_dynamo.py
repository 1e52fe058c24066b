"""``torch.compile(model, backend="fuser")``: graphs, shapes, weights, mutation, autograd, graph breaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fuser
from fuser import dynamo, masks
from fuser.module.engine import Engine

OPTIONS = {"search": "model"}
X = torch.randn(6, 20, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    # What tests of other files leave alive is not asked about here.
    dynamo._modules.clear()
    dynamo._said.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)
        self.register_buffer("shift", torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(torch.relu(self.first(x + self.shift))))


def frames() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(model: Any, **arguments: Any) -> Any:
    return torch.compile(model, backend="fuser", options=OPTIONS, **arguments)


def check(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """Relative error at most twice eager's."""
    import copy

    want, right = model(x), copy.deepcopy(model).double()(x.double())
    assert (got.double() - right).norm() <= 2 * (want.double() - right).norm()


def test_a_model_and_its_shapes() -> None:
    model = Layer().eval()
    fast = compiled(model, fullgraph=True)
    before = frames()
    check(fast(X), model, X)
    (module,) = dynamo.modules()
    assert module.unfused == () and module.fallbacks == ()
    assert "gemm" in {kernel.family for kernel in module.kernels}
    for x in (X[:3], X[:2], X[:3], X[:5, :7], X[:2, :9], X):
        check(fast(x.contiguous()), model, x)
    # One graph for the first shape, then one for any batch size, then one for any length.
    assert frames() - before <= 3
    traced = frames()
    for x in (X[:4], X[:4, :11], X[:3]):
        fast(x.contiguous())
    assert frames() == traced
    assert all(m.fallbacks == () for m in dynamo.modules())


def test_a_shape_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layer().eval()
    fast = compiled(model)
    calls = []
    original = Engine.compile
    monkeypatch.setattr(Engine, "compile", lambda *a: calls.append(1) or original(*a))
    for _ in range(3):
        fast(X)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("norm_first", "activation", "masked"),
    [(False, "relu", ""), (True, "gelu", "padding"), (False, "gelu", "causal"), (True, "relu", "both")],
)
def test_transformer_encoder(norm_first: bool, activation: str, masked: str) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, activation=activation, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    given: dict[str, Any] = {}
    if masked in ("padding", "both"):
        given["src_key_padding_mask"] = torch.arange(20) >= torch.tensor([20, 15, 3, 8, 20, 1])[:, None]
    if masked in ("causal", "both"):
        # Left to find out whether a mask is causal, the encoder looks at its values, which breaks the graph.
        given |= {"mask": torch.ones(20, 20, dtype=torch.bool).triu(1), "is_causal": False}
    fast = compiled(model)
    torch.testing.assert_close(fast(X, **given), model(X, **given), rtol=0, atol=1e-5)
    (module,) = dynamo.modules()
    # With two masks PyTorch's fast path joins them in every layer.
    assert module.unfused == () or masked == "both"
    assert {"attention", "gemm"} <= {kernel.family for kernel in module.kernels}


def test_sparse_attention_inside() -> None:
    mask = masks.Causal()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            out = fuser.sparse_attention(q, k, v, mask)
            assert isinstance(out, Tensor)
            return out.transpose(1, 2).flatten(2)

    model = Attention().eval()
    fast = compiled(model, fullgraph=True)
    torch.testing.assert_close(fast(X), model(X), rtol=0, atol=5e-6)
    (module,) = dynamo.modules()
    assert module.unfused == ()


def test_weights_are_followed() -> None:
    model = Layer().eval()
    fast = compiled(model)
    fast(X), fast(X[:3])
    before = frames()
    model.first.weight.mul_(0.5)
    check(fast(X), model, X)
    check(fast(X[:3]), model, X[:3])
    model.shift.add_(1)
    check(fast(X[:3]), model, X[:3])
    check(fast(X), model, X)
    model.load_state_dict(Layer(seed=1).state_dict())
    check(fast(X), model, X)
    assert frames() == before
    model.second = nn.Linear(128, 64)
    check(fast(X), model, X)
    model.double()
    torch.testing.assert_close(fast(X.double()), model(X.double()), rtol=0, atol=1e-12)


def test_graphs_of_a_model_share_packed_weights() -> None:
    model = Layer().eval()
    fast = compiled(model)
    fast(X), fast(X[:3])
    first, second = dynamo.modules()
    assert first._engine.store is second._engine.store
    pointers = [{t.data_ptr() for t in m._engine.saved_calls()[0].constants} for m in (first, second)]
    assert pointers[0] == pointers[1]


def test_layers_compiled_one_by_one() -> None:
    layers = [Layer(seed).eval() for seed in range(3)]
    fast = [compiled(layer) for layer in layers]
    before = frames()
    for _ in range(2):
        for layer, run in zip(layers, fast, strict=True):
            check(run(X), layer, X)
    assert frames() - before <= 3


def test_autograd_keeps_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = Layer()
    fast = compiled(model)
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "fuser"):
        for _ in range(2):
            loss = fast(X).square().mean()
            loss.backward()
    assert sum("no_grad" in message for message in caplog.messages) == 1
    want = torch.autograd.grad
    with torch.enable_grad():
        gradient = want(model(X).square().mean(), model.first.weight)[0]
    assert model.first.weight.grad is not None
    torch.testing.assert_close(model.first.weight.grad, 2 * gradient, rtol=1e-5, atol=1e-7)
    check(fast(X), model, X)


def test_mutation_of_inputs_and_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            self.count.add_(1)
            cache[:, 0] = x[:, 0]
            return self.linear(x) + cache.sum()

    model = Counting().eval()
    fast = compiled(model)
    cache, expected = torch.zeros(6, 20, 64), torch.zeros(6, 20, 64)
    for step in range(1, 4):
        got = fast(X, cache)
        assert model.count.item() == step
        want = model.linear(X) + expected.index_copy_(1, torch.tensor([0]), X[:, :1]).sum()
        assert torch.equal(cache, expected)
        torch.testing.assert_close(got, want)
    (module,) = dynamo.modules()
    assert any("in place" in reason for reason in module.fallbacks)


def test_graph_breaks_and_outputs() -> None:
    layer = Layer().eval()

    def function(x: Tensor) -> dict[str, Any]:
        y = layer(x)
        torch._dynamo.graph_break()
        y = y + 1
        z = y * 2
        y.add_(z)
        return {"all": (layer(y), x.shape[0]), "none": None, "same": x}

    fast = compiled(function)
    for x in (X, X[:3].contiguous(), X[:4].contiguous()):
        want, got = function(x), fast(x)
        torch.testing.assert_close(got["all"][0], want["all"][0], rtol=0, atol=1e-5)
        assert got["all"][1] == len(x) and got["none"] is None and got["same"] is x


def test_a_view_of_an_input_stays_a_view() -> None:
    layer = Layer().eval()

    def function(x: Tensor) -> Tensor:
        part = x[:, 0]
        out = layer(x)
        torch._dynamo.graph_break()
        part.add_(1)
        return out

    for base in (X.clone(), X.clone().transpose(0, 1)):
        expected = base.clone(memory_format=torch.preserve_format)
        want = function(expected)
        torch.testing.assert_close(compiled(function)(base), want, rtol=0, atol=1e-5)
        assert torch.equal(base, expected)


def test_inference_mode() -> None:
    model = Layer().eval()
    with torch.inference_mode():
        got = compiled(model, fullgraph=True)(X)
    check(got.clone(), model, X)


def test_scraps_run_as_they_are() -> None:
    fast = compiled(lambda x: x[0, 0, :2] + 1)
    for _ in range(2):
        assert torch.equal(fast(X), X[0, 0, :2] + 1)


def test_options() -> None:
    model = Layer().eval()
    with pytest.raises(Exception, match=r"use fuser\.optimize\(model, quantize="):
        torch.compile(model, backend="fuser", options={"quantize": fuser.Int8()})(X)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no option serch; it has attention, search, target, cuda_graphs"):
        torch.compile(model, backend="fuser", options={"serch": 1})(X)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"must be one of fuser\.masks"):
        torch.compile(model, backend="fuser", options={"attention": 1})(X)
