"""Pyramid vision transformers with any attention, at tiny sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fuser
from fuser import pvt
from fuser.ir.errors import MechanismError

TINY = {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32), "heads": (1, 2, 2, 4), "image": 64, "classes": 5}
ATTENTION: dict[str, dict[str, Any]] = {
    "lara": {"num_landmarks": 4, "pool_module_type": "dense"},
    "eva": {"attn_2d": True, "window_size": 4, "num_landmarks": 4, "use_rpe": True},
}


def tiny(attention: str) -> pvt.PyramidVit:
    torch.manual_seed(0)
    return pvt.build("pvt_medium", attention, sizes=TINY, **ATTENTION[attention])


@pytest.mark.parametrize("attention", ATTENTION)
def test_an_optimized_model_runs_attention_in_fused_kernels(attention: str) -> None:
    model = tiny(attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(1, 3, 64, 64)
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=2e-5, atol=2e-5)
    assert fast.fallbacks == ()
    assert not any("conv2d" in reason for _, reason in (*fast.unfused, *fast.outside))
    # One a block, with its GELU.
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "depthwise") == 4
    # Two a stage of EVA (chunks' summaries, windows) or LARA; the last one has exact attention.
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "attention") >= 5


def test_checkpoints_have_the_names_of_the_reference() -> None:
    own = tiny("eva").state_dict()
    names = {f"head.{kind}" for kind in ("weight", "bias")}
    for i in range(1, 5):
        layers = [f"patch_embed{i}.proj", f"patch_embed{i}.norm", f"norm{i}"]
        block = ["norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.dwconv.dwconv", "attn.attn_fn.qkv", "attn.attn_fn.proj"]
        if i < 4:
            block += [f"attn.attn_fn.adaptive_mu_{x}.{j}" for x in "qk" for j in (0, 1)]
            table = ("local_relative_position_bias_table", "relative_position_index")
            names |= {f"block{i}.0.attn.attn_fn.{name}" for name in table}
        layers += [f"block{i}.0.{name}" for name in block]
        names |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert {*own} == names
    # A checkpoint that somebody else made, in another order.
    given = {name: torch.randn_like(own[name]) if own[name].is_floating_point() else own[name] for name in sorted(own)}
    model = tiny("eva")
    model.load_state_dict(given)
    assert all(torch.equal(found, given[name]) for name, found in model.state_dict().items())


def test_the_stages_are_those_of_pvt_v2_b3() -> None:
    with torch.device("meta"):
        model = pvt.build("pvt_medium", "eva", **{**ATTENTION["eva"], "window_size": 7, "num_landmarks": 49})
        tokens: list[int] = []
        for i in range(1, 5):
            block = model.get_submodule(f"block{i}.0")
            block.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1] * inputs[0].shape[2]))
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert tokens == [3136, 784, 196, 49]
    # The paper's 45.2 million include reductions of keys, which efficient attention does without.
    assert 35e6 < sum(p.numel() for p in model.parameters()) < 45.2e6
    assert [len(list(model.get_submodule(f"block{i}").children())) for i in range(1, 5)] == [3, 4, 18, 3]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("pvt_mediun", {}, "there is no pyramid vision transformer 'pvt_mediun'; did you mean 'pvt_medium'"),
        ("pvt_tiny", {"sizes": {"image": 100}}, "multiples of 32 pixels"),
        ("pvt_tiny", {"sizes": {"depths": (1, 1)}}, "four stages need a positive number each"),
        ("pvt_tiny", {"sizes": {"width": 8}}, "sizes of pvt_tiny are depths, dims"),
        ("pvt_tiny", {"attention": "eav"}, "there is no attention 'eav'"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(MechanismError, match=message):
        pvt.build(name, **given)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(MechanismError, match="images have the shape"):
        tiny("lara")(torch.randn(1, 3, 32, 32))
