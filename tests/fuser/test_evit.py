"""Vision transformers with any attention, at tiny sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fuser
from fuser import evit
from fuser.ir.errors import MechanismError

TINY = {"dim": 32, "heads": 2, "image": 32, "patch": 4, "depth": 2, "classes": 5}
ATTENTION: dict[str, dict[str, Any]] = {
    "performer": {},
    "lara": {"num_landmarks": 4, "proposal_gen": "pool-mixed", "alpha_coeff": 2.0},
    "eva": {"attn_2d": True, "window_size": 4, "num_landmarks": 4, "use_rpe": True},
}


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_learns_with_every_attention(attention: str) -> None:
    torch.manual_seed(0)
    model = evit.build("evit_tiny_p16", attention, sizes={**TINY, "depth": 1}, **ATTENTION[attention])
    images, classes = torch.randn(5, 3, 32, 32), torch.arange(5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_checkpoints_have_the_names_of_the_reference() -> None:
    names = set(evit.build("evit_tiny_p16", "eva", sizes=TINY, **ATTENTION["eva"]).state_dict())
    block = {f"{layer}.{kind}" for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
    block |= {f"attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")}
    block |= {f"attn.adaptive_mu_{x}.{i}.{kind}" for x in "qk" for i in (0, 1) for kind in ("weight", "bias")}
    block |= {"attn.local_relative_position_bias_table", "attn.relative_position_index"}
    outer = {f"{x}.{kind}" for x in ("patch_embed.proj", "norm_before_pooling", "head") for kind in ("weight", "bias")}
    assert names == outer | {"pos_embed"} | {f"blocks.{i}.{name}" for i in (0, 1) for name in block}


def test_sizes_are_those_of_the_papers() -> None:
    assert len(evit.SIZES) == 8
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in evit.build(n).parameters()) for n in ("evit_tiny_p16", "evit_small_p16")}
        tokens = evit.build("evit_small_p8").pos_embed.shape[1] ** 2
    # DeiT's 5.7 and 22 million parameters.
    assert (counts["evit_tiny_p16"] // 10**5, counts["evit_small_p16"] // 10**6) == (57, 22)
    assert tokens == 784


def test_an_optimized_model_runs_eva_in_fused_kernels() -> None:
    torch.manual_seed(0)
    model = evit.build("evit_tiny_p16", "eva", sizes=TINY, **ATTENTION["eva"]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=2e-5, atol=2e-5)
    assert fast.fallbacks == ()
    # Two a block: chunks' summaries, windows.
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "attention") == 4


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("evit_tiny", {}, "did you mean 'evit_tiny_p"),
        ("evit_tiny_p16", {"sizes": {"image": 30}}, "an image of 30 pixels is no grid of patches of 16"),
        ("evit_tiny_p16", {"sizes": {"width": 8}}, "sizes of evit_tiny_p16 are dim, heads"),
        ("evit_tiny_p16", {"attention": "eav"}, "there is no attention 'eav'; did you mean 'eva'"),
        ("evit_tiny_p16", {"sizes": {"heads": 5}}, "dim = 192 channels cannot be divided among num_heads = 5"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(MechanismError, match=message):
        evit.build(name, **given)


def test_images_of_another_size_are_refused() -> None:
    model = evit.build("evit_tiny_p16", sizes=TINY)
    with pytest.raises(MechanismError, match="images have the shape"):
        model(torch.randn(1, 3, 28, 28))
