"""Whole models: same answers as float64, nothing of their blocks left unfused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
BATCHES = (1, 4)
LENGTHS = (7, 64, 200, 512)


class Handwritten(nn.Module):
    """Attention as textbooks write it: explicit products, a boolean mask and a softmax, pre-norm, SiLU."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("causal", torch.ones(512, 512, dtype=torch.bool).tril())

    def forward(self, x: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        batch, length, width = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        if keep is not None:
            scores = scores.masked_fill(keep[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        attended = torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(attended)
        return {"hidden": x + self.down(nn.functional.silu(self.up(self.norm2(x))))}


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(7))


def hidden(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(7))


def padding(batch: int, length: int) -> Tensor:
    """1 for tokens, 0 for padding; sample i has its last i·length/8 tokens padded."""
    lengths = torch.tensor([length - i * length // 8 for i in range(batch)])
    return (torch.arange(length) < lengths[:, None]).long()


def bert(attention: str, **config: Any) -> nn.Module:
    configuration = transformers.BertConfig(vocab_size=100, attn_implementation=attention, **{**SMALL, **config})
    return transformers.BertModel(configuration)


def gpt2() -> nn.Module:
    configuration = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=100, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(configuration)


def encoder(batch_first: bool, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first, norm_first=norm_first, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def token_call(batch: int, length: int, padded: bool) -> dict[str, Any]:
    call = {"input_ids": ids(batch, length)}
    return {**call, "attention_mask": padding(batch, length)} if padded else call


def encoder_call(batch: int, length: int, padded: bool) -> dict[str, Any]:
    call = {"src": hidden(batch, length)}
    return {**call, "src_key_padding_mask": padding(batch, length) == 0} if padded else call


def time_first_call(batch: int, length: int, padded: bool) -> dict[str, Any]:
    call = encoder_call(batch, length, padded)
    return {**call, "src": call["src"].transpose(0, 1).contiguous()}


def handwritten_call(batch: int, length: int, padded: bool) -> dict[str, Any]:
    call = {"x": hidden(batch, length)}
    return {**call, "keep": padding(batch, length)} if padded else call


Call = Callable[[int, int, bool], dict[str, Any]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "bert-sdpa": (lambda: bert("sdpa"), token_call),
    "bert-eager": (lambda: bert("eager"), token_call),
    "minilm": (lambda: bert("sdpa", hidden_size=96, num_attention_heads=3, intermediate_size=384), token_call),
    "gpt2": (gpt2, token_call),
    "encoder": (lambda: encoder(True), encoder_call),
    "encoder-pre-norm": (lambda: encoder(True, norm_first=True), encoder_call),
    "encoder-time-first": (lambda: encoder(False), time_first_call),
    "handwritten": (Handwritten, handwritten_call),
}


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def error(value: Tensor, exact: Tensor) -> float:
    """Relative L2 distance from a float64 result."""
    return float((value.double() - exact).norm() / exact.norm())


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(0)
    exact = make().eval().double()
    exact.load_state_dict(model.state_dict())
    return model, exact


def check(model: nn.Module, exact: nn.Module, fast: nn.Module, call: dict[str, Any]) -> None:
    """Error of the optimized module at most twice that of eager PyTorch, both against float64 (design section 11).

    The floor of 1e-7 is one rounding of fp32: below it the ratio is noise.
    """
    with torch.no_grad():
        ours, eager, truth = tensors(fast(**call)), tensors(model(**call)), tensors(exact(**doubled(call)))
    assert len(ours) == len(eager) == len(truth) > 0
    for mine, theirs, reference in zip(ours, eager, truth, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert error(mine, reference) <= 2 * error(theirs, reference) + 1e-7


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_model_is_right_and_fully_fused(name: str, padded: bool) -> None:
    make, call = MODELS[name]
    model, exact = build(make)
    for batch in BATCHES:
        # Measuring kernels for each order of magnitude is tested elsewhere.
        fast = fuser.optimize(model, search="model")
        for length in LENGTHS:
            check(model, exact, fast, call(batch, length, padded))
            assert fast.unfused == ()
            assert fast.fallbacks == ()
            families = {kernel.family for kernel in fast.kernels}
            assert {"attention", "gemm"} <= families
            assert sum(k.calls for k in fast.kernels if k.family == "attention") == (1 if name == "handwritten" else 2)


@pytest.mark.parametrize("image", [32, 72])
def test_vision_transformer(image: int) -> None:
    configuration = transformers.ViTConfig(image_size=image, patch_size=8, **SMALL)
    model, exact = build(lambda: transformers.ViTModel(configuration))
    fast = fuser.optimize(model)
    for batch in BATCHES:
        pixels = torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(3))
        check(model, exact, fast, {"pixel_values": pixels})
        assert fast.unfused == ()


def test_outputs_keep_their_structure() -> None:
    model, _ = build(lambda: bert("sdpa"))
    fast = fuser.optimize(model)
    with torch.no_grad():
        theirs, ours = model(ids(2, 16)), fast(ids(2, 16))
        as_tuple = fast(ids(2, 16), return_dict=False)
    assert type(ours) is type(theirs)
    assert list(ours.keys()) == list(theirs.keys())
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], ours.last_hidden_state)


def test_equal_layers_share_kernels() -> None:
    torch.manual_seed(0)
    model = bert("sdpa", num_hidden_layers=6).eval()
    fast = fuser.optimize(model, (ids(1, 32),))
    assert len({region.hash for region in fast.programs[0].graph.regions}) == 4
    attention = [kernel for kernel in fast.kernels if kernel.family == "attention"]
    assert [kernel.calls for kernel in attention] == [6]


def test_runs_are_bit_identical() -> None:
    model, _ = build(lambda: bert("sdpa"))
    fast = fuser.optimize(model)
    call = token_call(4, 128, True)
    with torch.no_grad():
        first = tensors(fast(**call))
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, tensors(fast(**call)), strict=True))


@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2", "handwritten"])
def test_bfloat16_models(name: str) -> None:
    make, call = MODELS[name]
    model, exact = build(make)
    model = model.to(torch.bfloat16)
    exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    fast = fuser.optimize(model)
    inputs = call(2, 64, True)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    check(model, exact, fast, inputs)
    assert fast.unfused == ()


def test_attention_argument_sparsifies() -> None:
    model, _ = build(lambda: encoder(True))
    mask = fuser.masks.SlidingWindow(8, 8)
    fast = fuser.optimize(model, attention=mask)
    x = hidden(2, 100)
    blocked = ~mask.dense(100)
    with torch.no_grad():
        expected = model(x, mask=blocked)
        assert error(fast(x), expected.double()) < 1e-6
        assert error(model(x), expected.double()) > 1e-3


def test_a_fully_masked_row_gives_zeros() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = (torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(9)) > 0.3
    mask[:, :, 5] = False
    out = fuser.optimize(Masked().eval())(q, k, v, mask)
    assert torch.equal(out[:, :, 5], torch.zeros(2, 3, 16))
    assert bool(torch.isfinite(out).all())
