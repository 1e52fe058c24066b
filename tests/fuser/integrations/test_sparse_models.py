"""Sparse models of transformers through plans against what transformers computes itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.integrations.transformers import sparsify
from fuser.ir.errors import FuserError, MaskError
from fuser.runtime.cache import KernelCache, default_cache

transformers = pytest.importorskip("transformers")
_SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,
}
_BLOCKS: dict[str, Any] = {"block_size": 4, "num_random_blocks": 2, "max_position_embeddings": 80}
# Weights that are large enough for attention to differ between keys.
_DEEP: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.3}
WINDOWED = ("longformer", "led")


def model_of(name: str, **more: Any) -> Any:
    windows = {"attention_window": [8, 16]}
    positions = {"max_encoder_position_embeddings": 80, "max_decoder_position_embeddings": 80}
    config = {
        "longformer": lambda: transformers.LongformerConfig(
            **_SIZES, **_DEEP, **windows, max_position_embeddings=82, **more
        ),
        "led": lambda: transformers.LEDConfig(**_SEQ2SEQ, **windows, **positions, **more),
        "bigbird": lambda: transformers.BigBirdConfig(**_SIZES, **_DEEP, **_BLOCKS, **more),
        "pegasus": lambda: transformers.BigBirdPegasusConfig(**_SEQ2SEQ, **_BLOCKS, **more),
    }[name]()
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


def calls(name: str, length: int) -> list[dict[str, Tensor]]:
    """Without and with padding on either side, and with other global tokens in every row."""
    ids = torch.randint(5, 99, (3, length), generator=torch.Generator().manual_seed(length))
    padding, tokens = torch.ones_like(ids), torch.zeros_like(ids)
    padding[1, length // 2 :] = 0
    padding[2, :2] = 0
    for row, column in ((0, 0), (0, length // 2), (1, 1), (2, 0), (2, 3), (2, 4)):
        tokens[row, column] = 1
    plain = {"input_ids": ids}
    found = [plain, {**plain, "attention_mask": padding}]
    if name in WINDOWED:
        found += [{**call, "global_attention_mask": tokens} for call in found]
    return found


def agree(got: Any, expected: Any, tolerance: float) -> None:
    """Equal outputs, at padding as well."""
    assert type(got) is type(expected) and list(got) == list(expected)
    for key in expected:
        if key in ("cache", "past_key_values"):
            continue
        pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (got[key], expected[key])), strict=True)
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype
            # Longformer's weights of padding are NaN.
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * float(b.abs().max()) if tolerance else 0, equal_nan=True
            )


@pytest.mark.parametrize("name", ["longformer", "led", "bigbird", "pegasus"])
@torch.no_grad()
def test_the_numbers_are_those_of_transformers(name: str) -> None:
    model = model_of(name).double()
    sparse = sparsify(model)
    assert sparse.state_dict().keys() == model.state_dict().keys()
    # Longformer's own weights of attention are rounded to fp32, also in float64.
    tolerance = 2e-6 if name in WINDOWED else 1e-12
    for length in (16, 37, 48):
        for call in calls(name, length):
            # Short sequences switch a BigBird for good.
            expected = copy.deepcopy(model)
            agree(sparse(**call), expected(**call), tolerance)
        more = {**call, "output_hidden_states": True}
        agree(sparse(**more), copy.deepcopy(model)(**more), tolerance)
    more["output_attentions"] = True
    agree(sparse(**more), copy.deepcopy(model)(**more), 0)
    assert model.encoder is not sparse.encoder
    assert {type(m) for m in model.modules()} == {type(m) for m in model_of(name).modules()}


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
@torch.no_grad()
def test_optimized_models_serve_all_lengths(name: str) -> None:
    model = model_of(name)
    before = copy.deepcopy(model)
    fast = fuser.optimize(model, search="model")
    for length in (37, 48, 41):
        for call in calls(name, length)[1::2]:
            agree(fast(**call), copy.deepcopy(model)(**call), 1e-5)
    assert any("attention" in kernel.family for kernel in fast.kernels)
    left = {reason for _, reason in fast.unfused}
    assert not any(f"aten.{what}" in reason for reason in left for what in ("softmax", "einsum", "masked_fill"))
    assert fast.fallbacks == ()
    if name == "bigbird":
        assert fast.specialized == ()
        assert model.attention_type == "block_sparse"
    with torch.no_grad():
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b)
        model.encoder.layer[0].attention.output.dense.weight.mul_(2)
    agree(fast(**call), copy.deepcopy(model)(**call), 1e-5)


@torch.no_grad()
def test_heads_and_many_global_tokens() -> None:
    config = transformers.LongformerConfig(
        **_SIZES, **_DEEP, attention_window=[8, 8], max_position_embeddings=82, sep_token_id=2, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.LongformerForSequenceClassification(config).eval()
    sparse = sparsify(model)
    assert isinstance(sparse, transformers.LongformerForSequenceClassification)
    call = calls("longformer", 40)[1]
    agree(sparse(**call), model(**call), 1e-5)
    # More than half of a head's width: keys and values of all tokens.
    call["global_attention_mask"] = torch.zeros(3, 40, dtype=torch.long)
    call["global_attention_mask"][0, 5:30] = 1
    agree(sparse(**call), model(**call), 1e-5)


def test_training_and_gradients() -> None:
    model = model_of("longformer", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    call = calls("longformer", 32)[3]
    weights = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for module in (model, sparsify(model), fuser.optimize(model, search="model")):
        model.zero_grad()
        (module(**call).last_hidden_state * weights).sum().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            # A bias of global keys changes nothing.
            a, b = (torch.zeros(1) if grad is None else grad for grad in (a, b))
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-4


def test_copies_and_refusals() -> None:
    model = model_of("longformer")
    fast = fuser.optimize(model)
    call = calls("longformer", 16)[0]
    with torch.no_grad():
        agree(copy.deepcopy(fast)(**call), model(**call), 1e-5)
    assert "LongformerModel" in fast.report()
    with pytest.raises(MaskError, match="sparse attention of its own"):
        fuser.optimize(model, attention=fuser.masks.Causal())
    with pytest.raises(TypeError, match="no sparse attention"):
        sparsify(nn.Linear(2, 2))


ELSEWHERE = """
import sys, torch
fast, call, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    found = fast(**call).last_hidden_state
print((found - expected).abs().max().item() < 1e-5, fast.fallbacks, sum(kernel.calls for kernel in fast.kernels) > 0)
"""


def test_where_there_is_no_compiler_its_kernels_come_from_elsewhere(tmp_path: Path) -> None:
    model = model_of("longformer")
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        fast(**calls("longformer", 16)[0])
        other = calls("longformer", 23)[0]
        with pytest.raises(FuserError, match=r"torch\.save.*cache export"):
            fast.save(tmp_path / "model.fuser")
        torch.save((fast, other, model(**other).last_hidden_state), tmp_path / "model.pt")
    default_cache().export(tmp_path / "kernels.fuser")
    there = KernelCache(tmp_path / "there")
    there.import_(tmp_path / "kernels.fuser")
    environment = {**os.environ, "FUSER_CACHE_DIR": str(there.root), "CXX": "/nowhere/c++"}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "model.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "()", "True"], done.stderr


@torch.no_grad()
def test_a_decoder_beside_a_sparse_encoder_is_fused_and_generates() -> None:
    config = model_of("led").config
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 1, 2, 98
    torch.manual_seed(0)
    model = transformers.LEDForConditionalGeneration(config).eval()
    ran: list[str] = []
    model.led.decoder.register_forward_hook(lambda *_: ran.append("decoder"))
    fast = fuser.optimize(model, search="model")
    assert isinstance(fast.led.decoder, type(model.led.decoder))
    call = {**calls("led", 37)[3], "decoder_input_ids": torch.randint(5, 99, (3, 7))}
    ran.clear()
    got = fast(**call, use_cache=False)
    assert ran == ["decoder"]
    agree(got, model(**call, use_cache=False), 1e-5)
    decoder = fast._serving[-1][1]
    assert decoder.fallbacks == () and decoder.unfused == () and "LEDDecoder" in fast.report()
    assert sum(kernel.calls for kernel in decoder.kernels if kernel.family == "attention") == 2
    written = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    inputs = calls("led", 37)[1]
    assert torch.equal(fast.generate(**inputs, **written), model.generate(**inputs, **written))
    assert fast.fallbacks == ()
    fast.train()
    assert {m.training for m in fast.led.decoder.modules()} == {True}
    ran.clear()
    fast(**call)
    assert ran == ["decoder"]
