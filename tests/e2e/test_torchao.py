"""Models that torchao has quantized to int8 run on its integers, and give what it gives."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from transformers import BertConfig, BertModel

import fuser
from fuser.explain.report import collect
from fuser.ir.target import Isa
from fuser.runtime.targets import named_target

DIM = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM, bias=False), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return y


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def dynamic(model: nn.Module, **how: object) -> nn.Module:
    """The same with layers in int8, and without what torchao changes beyond the model."""
    made = copy.deepcopy(model).eval()
    quantize_(made, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, **how))
    return made


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


def kinds(fast: fuser.OptimizedModule) -> list[str]:
    return [op.kind for op in fast.programs[-1].graph.operators if op.kind.endswith("gemm")]


def is_close(got: Tensor, want: Tensor, exact: Tensor) -> bool:
    """Whether two results differ by less than rounding costs: elements between two integers go either way, of which
    torchao's own results show as much when inputs change by their last bit. Others would differ by more than it."""
    return bool((got - want).norm() < 0.5 * (want - exact).norm())


@torch.no_grad()
def test_all_sizes_of_calls_run_on_the_integers() -> None:
    model = encoder()
    quantized = dynamic(model)
    fast = fuser.optimize(quantized, search="model")
    for shape in ((2, 9), (3, 5), (1, 1), (4, 33)):
        x = rows(*shape)
        assert is_close(fast(x), quantized(x), model(x))
        assert kinds(fast) == ["int8_gemm"] * 4
    assert fast.fallbacks == () and {kernel.family for kernel in fast.kernels} == {"int8_gemm"}
    widths = collect(fast.snapshot()).widths
    assert [width.width for width in widths] == ["int8"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_layers_err_no_more_than_in_torchao(dtype: torch.dtype) -> None:
    """Against the product with what the integers stand for, in float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(DIM, 96).to(dtype), rows(64, 8).to(dtype)
    quantized = dynamic(nn.Sequential(layer))
    weight = quantized[0].weight  # type: ignore[index]
    exact = x.double() @ (weight.qdata.double() * weight.scale.double()).T + layer.bias.double()
    theirs = quantized(x)
    errors = []
    for target in (named_target("cpu"), dataclasses.replace(named_target("cpu"), arch=Isa.PORTABLE.value)):
        bare = dataclasses.replace(target, features=frozenset())
        fast = fuser.optimize(quantized, search="model", target=bare)
        got = fast(x)
        assert kinds(fast) == ["int8_gemm"] and {kernel.family for kernel in fast.kernels} == {"int8_gemm"}
        # The order in which the two scales are multiplied is another; in bf16, torchao rounds twice more.
        rounding = 2.0**-21 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(got, theirs, rtol=rounding, atol=rounding)
        errors.append(float((got - exact).norm()))
    assert max(errors) <= (1 + 2.0**-16) * float((theirs - exact).norm())
    assert 2e-3 < errors[0] / float(exact.norm()) < 2e-2


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=["row", "tensor"])
@torch.no_grad()
def test_files_need_no_torchao(granularity: object, tmp_path: Path) -> None:
    quantized, x = dynamic(encoder(), granularity=granularity), rows(2, 5)
    fast = fuser.optimize(quantized, search="model")
    torch.save((x, fast(x)), tmp_path / "call.pt")
    fast.save(tmp_path / "encoder.fuser")
    code = f"""
import sys
sys.modules["torchao"] = None
import torch, fuser
x, want = torch.load({str(tmp_path / "call.pt")!r})
for trust in ("kernels", "data"):
    assert torch.equal(fuser.load({str(tmp_path / "encoder.fuser")!r}, trust=trust)(x), want)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_integers_and_scales_are_read_anew() -> None:
    model, x = encoder(), rows(2, 5)
    quantized = dynamic(model)
    fast = fuser.optimize(quantized, search="model")
    before = fast(x)
    up, down = quantized[0].up.weight, quantized[1].down.weight  # type: ignore[index]
    for part, change in ((up.qdata, -1), (down.scale, 3)):
        part.mul_(change)
        after = fast(x)
        assert (after - before).abs().max() > 1e-2
        assert is_close(after, quantized(x), model(x))
        before = after


@torch.no_grad()
def test_what_is_quantized_already_is_not_quantized_again() -> None:
    quantized, x = dynamic(encoder()), rows(2, 5)
    whole = nn.Sequential(quantized, nn.Linear(DIM, DIM)).eval()
    how = fuser.Int8(quality=0, bf16=False)
    fast = fuser.optimize(whole, quantize=how, search="model")
    hidden = fuser.optimize(quantized, search="model")(x)
    got = fast(x)
    assert kinds(fast) == ["int8_gemm"] * 4 + ["code_gemm"]
    # The norm of the last block is rounded as it is made, where an element beside a border may go the other way.
    want = fuser.optimize(whole[1], quantize=how, search="model")(hidden)
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        (MappingType.SYMMETRIC, PerTensor()),
        (MappingType.ASYMMETRIC, PerRow()),
        (MappingType.ASYMMETRIC, PerTensor()),
    ],
    ids=["tensor", "row-points", "tensor-points"],
)
@torch.no_grad()
def test_scales_of_whole_tensors_and_zero_points(kind: MappingType, granularity: object) -> None:
    model = encoder()
    quantized = dynamic(model, act_mapping_type=kind, granularity=granularity)
    fast = fuser.optimize(quantized, search="model")
    for shape in ((2, 9), (3, 5), (1, 1), (4, 33)):
        x = rows(*shape)
        assert is_close(fast(x), quantized(x), model(x))
        assert kinds(fast) == ["int8_gemm"] * 4
    assert "no kernel family" not in fast.report()


@pytest.mark.parametrize("kind", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=lambda k: k.name)
@torch.no_grad()
def test_ranges_that_are_known(kind: MappingType) -> None:
    model = encoder()
    quantized = copy.deepcopy(model).eval()
    shifted = kind is MappingType.ASYMMETRIC
    how = {"act_quant_zero_point": torch.full((1, 1, 1), -20, dtype=torch.int8)} if shifted else {}
    config = Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.full((1, 1, 1), 0.02),
        act_mapping_type=kind,
        granularity=[PerTensor(), PerRow()],
        set_inductor_config=False,
        **how,
    )
    quantize_(quantized, config)
    fast = fuser.optimize(quantized, search="model")
    for shape in ((2, 9), (3, 5)):
        x = rows(*shape)
        assert is_close(fast(x), quantized(x), model(x))
        assert kinds(fast) == ["int8_gemm"] * 4
    assert fast.fallbacks == ()
    quantized[0].up.weight.act_quant_scale.mul_(2)  # type: ignore[index]
    assert is_close(fast(x), quantized(x), model(x))


@torch.no_grad()
def test_others_are_run_by_pytorch_as_the_report_says() -> None:
    model, x = encoder(), rows(2, 5)
    quantized = copy.deepcopy(model).eval()
    quantize_(
        quantized, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    )
    fast = fuser.optimize(quantized, search="model")
    assert is_close(fast(x), quantized(x), model(x)) and "int8_gemm" not in kinds(fast)
    assert "no kernel family knows torchao" in fast.report()


@torch.no_grad()
def test_weights_alone() -> None:
    model, x = encoder(), rows(2, 5)
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False))
    fast = fuser.optimize(quantized, search="model")
    torch.testing.assert_close(fast(x), quantized(x), atol=1e-5, rtol=0)
    assert kinds(fast) == ["int8_weight_gemm"] * 4 and fast.fallbacks == ()
    quantized[0].down.weight.scale.mul_(2)  # type: ignore[index]
    torch.testing.assert_close(fast(x), quantized(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_bert_with_and_without_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * DIM, vocab_size=100
    )
    model = BertModel(config).eval()
    quantized = dynamic(model)
    tokens = torch.randint(1, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 5, 8])[:, None]).long()
    for padding in ("keep", "skip"):
        fast = fuser.optimize(quantized, search="model", padding=padding)
        got, want, exact = (m(tokens, attention_mask=mask).last_hidden_state for m in (fast, quantized, model))
        seen = mask.bool()
        assert is_close(got[seen], want[seen], exact[seen])
        assert {kernel.family for kernel in fast.kernels if kernel.family.endswith("gemm")} == {"int8_gemm"}
