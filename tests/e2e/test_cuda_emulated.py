"""Whole models through CUDA kernels on the emulator, and every kernel of a model through nvcc."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.codegen.assemble import assemble
from fuser.codegen.render import header_folder
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import FuserError, ToolchainError
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.target import cuda_target
from fuser.kernels.attention_quantized_cuda import CudaFewBitsAttention
from fuser.kernels.base import floating
from fuser.module.compiler import choose_all
from fuser.runtime.build import build
from fuser.runtime.nvcc import find_nvcc

Case = tuple[nn.Module, dict[str, Tensor]]
EMULATED = "cuda:emulated"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def _bert() -> Case:
    from transformers import BertConfig, BertModel

    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[1, 20:] = 0
    model = BertModel(BertConfig(vocab_size=120, max_position_embeddings=64, **SIZES))
    return model, {"input_ids": torch.randint(0, 120, (2, 37)), "attention_mask": mask}


def _vit() -> Case:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=48, patch_size=8, **SIZES)), {"pixel_values": torch.randn(2, 3, 48, 48)}


def _gpt2() -> Case:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=120, n_embd=64, n_layer=2, n_head=2, n_inner=128, n_positions=64))
    model.config.use_cache = False
    return model, {"input_ids": torch.randint(0, 120, (2, 41))}


MODELS: dict[str, Callable[[], Case]] = {"bert": _bert, "vit": _vit, "gpt2": _gpt2}


def made(name: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval().to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def first(output: Any) -> Tensor:
    tensor = output[0]
    assert isinstance(tensor, Tensor)
    return tensor


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", torch.float32),
        ("bert", torch.float16),
        ("vit", torch.bfloat16),
        ("gpt2", torch.float32),
    ],
    ids=str,
)
def test_models_are_right_and_whole(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


def test_a_model_is_right_and_whole_in_the_checking_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    check("bert", torch.float16)


def check(name: str, dtype: torch.dtype) -> None:
    model, inputs = made(name, dtype)
    exact = copy.deepcopy(model).double()
    fast = fuser.optimize(model, inputs, target=EMULATED)
    with torch.no_grad():
        ours, eager = first(fast(**inputs)).double(), first(model(**inputs)).double()
        truth = first(exact(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}))
        assert float((ours - truth).norm()) <= 2 * float((eager - truth).norm()) + 1e-6 * float(truth.norm())
        assert torch.equal(first(fast(**inputs)).double(), ours)
    assert fast.unfused == () and fast.fallbacks == ()
    assert {"attention", "rowwise"} <= {k.family for k in fast.kernels}
    assert sum(k.calls for k in fast.kernels if k.family == "attention") == 2


def test_new_weights_and_new_shapes_are_followed() -> None:
    model, inputs = made("bert", torch.float32)
    fast = fuser.optimize(model, inputs, target=EMULATED)
    with torch.no_grad():
        before = first(fast(**inputs))
        for parameter in model.parameters():
            parameter.mul_(1.25)
        short = {k: v[:1, :9] for k, v in inputs.items()}
        for given in (inputs, short):
            ours, eager = first(fast(**given)), first(model(**given))
            assert float((ours - eager).norm() / eager.norm()) < 1e-5
    assert not torch.allclose(first(fast(**inputs)), before)
    assert fast.fallbacks == ()


def test_saved_programs_run_without_the_model(tmp_path: Path) -> None:
    model, inputs = made("bert", torch.float16)
    fast = fuser.optimize(model, inputs, target=EMULATED)
    fast.save(tmp_path / "model.fuser")
    loaded = fuser.load(tmp_path / "model.fuser")
    with torch.no_grad():
        assert torch.equal(first(loaded(**inputs)), first(fast(**inputs)))
    with pytest.raises(IndexError, match="outside the table"):
        loaded(**{**inputs, "input_ids": inputs["input_ids"] + 120})


def test_a_token_outside_of_the_table_is_an_error() -> None:
    model, inputs = made("bert", torch.float32)
    fast = fuser.optimize(model, inputs, target=EMULATED)
    with torch.no_grad():
        good = first(fast(**inputs))
        with pytest.raises(IndexError, match="outside the table"):
            fast(**{**inputs, "input_ids": inputs["input_ids"] + 120})
        assert torch.equal(first(fast(**inputs)), good)


def test_targets_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    assert fuser.optimize(model, target="cpu")._engine.target.kind == "cpu"  # type: ignore[union-attr]
    for name in ("gpu", "cuda:banana", "emulated"):
        with pytest.raises(FuserError, match="cuda:emulated"):
            fuser.optimize(model, target=name)
    with pytest.raises(FuserError, match="not for devices of type"):
        fuser.optimize(model, target="meta")
    if not torch.cuda.is_available():
        with pytest.raises(FuserError, match=r"PyTorch|driver"):
            fuser.optimize(model, target="cuda")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc_builds_every_kernel_of_a_model(arch: str) -> None:
    target = cuda_target(arch)
    try:
        find_nvcc(target)
    except ToolchainError as error:
        pytest.skip(f"there is no nvcc for {arch}: {str(error).splitlines()[0]}")
    model, inputs = made("bert", torch.float16)
    with torch.no_grad():
        graph = raise_graph(capture(model, flatten_call((), inputs)), None, floating(target))
    choices, _ = choose_all(graph, target)
    assembly = assemble(graph, choices, target, target.cores)
    assert {k.family for k in assembly.kernels} >= {"attention", "gemm", "rowwise"}
    paths = build(assembly.sources, target, headers=header_folder(target))
    assert set(paths) == {source.symbol for source in assembly.sources}


@pytest.mark.parametrize(
    "how", [fuser.Int8Attention(), fuser.DEQ(), fuser.Sanger()], ids=lambda how: type(how).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_of_few_bits_is_that_of_the_reference(
    how: ScoreQuantization, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at this size, where exact attention may be faster than 8 bits; with scores far apart."""
    monkeypatch.setattr(fuser.Int8Attention, "may_be_exact", False)
    model, inputs = made("bert", dtype)
    for layer in model.encoder.layer:
        layer.attention.self.query.weight.data.mul_(30)
    fast = fuser.optimize(model, inputs, target=EMULATED, quantize=how)
    with torch.no_grad():
        ours, eager = first(fast(**inputs)).float(), first(model(**inputs)).float()
        monkeypatch.setattr(CudaFewBitsAttention, "space", lambda *_: ())
        plain = fuser.optimize(model, inputs, target=EMULATED, quantize=how)
        reference = first(plain(**inputs)).float()
    assert fast.unfused == () and fast.fallbacks == () and len(plain.unfused) == 2
    assert f"{type(how).__name__} {how.bits} bits" in str(fast.report())
    far, near = (float((x - reference).norm() / reference.norm()) for x in (eager, ours))
    assert near < (0.2 if dtype == torch.float16 else 0.01) * far
