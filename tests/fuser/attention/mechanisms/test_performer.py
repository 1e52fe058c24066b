"""Linear attention against its definition, all N × N weights written out."""

from __future__ import annotations

import math

import pytest
import torch
from mechanism_cases import DIM, HEADS, TOKENS, make, tokens
from torch import Tensor, nn

WIDTH = DIM // HEADS


def heads(x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = module.qkv(x).view(2, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return q, k, v


def features(method: str, x: Tensor, w: Tensor | None, is_query: bool, module: nn.Module) -> Tensor:
    """Feature maps as their papers and the reference have them."""
    scale = WIDTH**-0.25
    squares = (x * scale).pow(2).sum(-1, keepdim=True) / 2
    if method == "relu-only":
        return x.relu() + 0.1
    if method == "dpfp":
        signs = torch.cat([x.relu(), (-x).relu()], -1)
        return signs * torch.cat([signs[..., -1:], signs[..., :-1]], -1)
    if method == "mlp-fourier":
        on = torch.einsum("bhnd,hmd->bhnm", x, module.feature_proj.random_proj)
        linear = module.feature_proj.phi[0]
        return (torch.cat([on.cos(), on.sin()], -1) / math.sqrt(WIDTH) @ linear.weight.mT + linear.bias).relu()
    assert w is not None
    on = torch.einsum("bhnd,hmd->bhnm", x * scale, w)
    if method == "relu":
        return (on / math.sqrt(w.shape[1])).relu() + 1e-3
    if method == "fourier":
        lengths = torch.exp(squares - squares.amax(2, keepdim=True))
        return torch.cat([on.sin(), on.cos()], -1) / math.sqrt(w.shape[1]) * lengths
    top = on.amax(-1, keepdim=True) if is_query else on.amax((-2, -1), keepdim=True)
    return torch.exp(on - squares - top) / math.sqrt(w.shape[1]) + 1e-4


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("method", ["favorp", "relu", "fourier", "dpfp", "mlp-fourier", "relu-only"])
def test_linear_attention_is_a_quotient_of_products_of_features(method: str, cosine: bool) -> None:
    module = make("performer", approx_attn_dim=8, proj_method=method, cos_weighting=cosine).double().eval()
    x = tokens()
    q, k, v = heads(x, module)
    w = getattr(module, "eval_proj", None)
    weights = features(method, q, w, True, module) @ features(method, k, w, False, module).mT
    if cosine:
        place = torch.arange(TOKENS).double()
        weights = weights * torch.cos((place[:, None] - place) * math.pi / 2 / TOKENS)
    mixed = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-2)
    want = module.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), want, rtol=1e-10, atol=1e-10)


def test_random_directions_are_orthogonal_in_blocks_and_drawn_anew_in_training_alone() -> None:
    module = make("performer", approx_attn_dim=6).double()
    for block in (module.eval_proj[0, :4], module.eval_proj[1, 4:]):
        products = block @ block.mT
        torch.testing.assert_close(products, torch.diag(products.diagonal()), rtol=0, atol=1e-5)
    x = tokens()
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    fixed = make("performer", approx_attn_dim=6, sample_scheme="fixed").double()
    assert torch.equal(fixed.train()(x), fixed(x)) and "random_proj" in fixed.state_dict()
    learned = make("performer", approx_attn_dim=6, sample_scheme="learnable")
    assert "random_proj" in dict(learned.named_parameters())
