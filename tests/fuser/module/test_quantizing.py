"""`optimize(quantize=fuser.Int8())` and `fuser.FP8()`: what they take, what becomes of outputs, what they say."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fuser
from fuser.architectures import ARCHITECTURES, Scale
from fuser.codegen.choice import GroupChoice
from fuser.explain.report import collect
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import CalibrationError, TargetError
from fuser.ir.graph import OperatorGraph, is_kind
from fuser.ir.operators import QuantizedGemm
from fuser.ir.quantization import MAX_TERMS, quantize_rows
from fuser.ir.target import Target, emulated_target
from fuser.kernels.base import floating
from fuser.module import compiler, engine, forms
from fuser.module.compiler import choose_all
from fuser.module.quantizing import Layer, LinearQuantization, Quantizer
from fuser.runtime.targets import named_target
from fuser.search.tuning import Tuner


class Encoder(nn.Module):
    """Two blocks with a norm behind each, and a small head."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.first, self.second = Block(dim), Block(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.second(self.first(x))
        return hidden, self.head(hidden.mean(1))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder().eval()


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))


def int8_linear(x: Tensor, layer: nn.Linear, codes: torch.dtype = torch.int8) -> Tensor:
    """A linear layer on rounded numbers, in float64."""
    (a, s), (w, t) = quantize_rows(x, codes=codes), quantize_rows(layer.weight, codes=codes)
    return (a.double() @ w.double().mT) * (s.double() * t.double().mT) + layer.bias.double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def kinds(fast: fuser.OptimizedModule) -> list[str]:
    """The kinds of products; those in eight bits are one, whichever kernel rounds their rows."""
    found = (op.kind for op in fast.programs[-1].graph.operators if op.kind.endswith("gemm"))
    return ["quantized_gemm" if kind == "code_gemm" else kind for kind in found]


def layers(fast: fuser.OptimizedModule) -> tuple[Layer, ...]:
    precision = fast.snapshot().precision
    assert precision is not None
    return precision.layers


def optimized(model: nn.Module, **options: Any) -> fuser.OptimizedModule:
    """Without bf16, so that numbers are those of every machine."""
    return fuser.optimize(model, quantize=fuser.Int8(**{"bf16": False, **options}), search="model")


def test_layers_run_on_rounded_numbers() -> None:
    model, x = encoder(), rows(2, 9)
    fast = optimized(model, smooth=False)
    with torch.no_grad():
        want = x
        for block in (model.first, model.second):
            inner = nn.functional.gelu(int8_linear(want.float(), block.up))
            want = nn.functional.layer_norm(
                want.double() + int8_linear(inner.float(), block.down),
                (64,),
                block.norm.weight.double(),
                block.norm.bias.double(),
            )
        hidden, _ = fast(x)
        exact, _ = model(x)
    assert kinds(fast) == ["quantized_gemm"] * 4 + ["gemm"]
    # An element in a hundred lies where fp32 and float64 round to neighbouring integers.
    torch.testing.assert_close(hidden.double(), want, atol=2e-3, rtol=0)
    assert 1 - 1e-3 < cosine(hidden, exact) < 1 - 1e-6
    assert float((hidden - want).norm()) < 0.1 * float((hidden - exact).norm())


def test_the_report_lists_layers_with_errors_and_reasons() -> None:
    fast = optimized(encoder(), exclude="second.*")
    fast(rows(2, 9))
    lines = [line for line in fast.report().splitlines() if line.startswith("precision: ")]
    assert lines[0].startswith("precision: cosine to the unquantized outputs 0.999")
    assert [line.split(",")[0].removeprefix("precision: ") for line in lines[1:]] == [
        "first.up: int8",
        "first.down: int8",
        "second.up: kept",
        "second.down: kept",
        "head: kept",
    ]
    errors = [float(re.search(r"error (\S+?)(,|$)", line)[1]) for line in lines[1:3]]  # type: ignore[index]
    # A hundredth is what steps of 1/127 of a row's largest element make of normal numbers.
    assert all(3e-3 < error < 3e-2 for error in errors)
    assert lines[3].endswith("among exclude=") and lines[5].endswith("smaller than 32")
    assert kinds(fast) == ["quantized_gemm"] * 2 + ["gemm"] * 3


def test_the_report_says_the_width_and_the_error_of_every_group() -> None:
    fast, x = optimized(encoder(), exclude="second.*"), rows(2, 9)
    fast(x)
    widths = collect(fast.snapshot()).widths
    assert [w.width for w in widths if "linear" in " ".join(w.operators)][:4] == ["int8", "int8", "fp32", "fp32"]
    model = encoder()
    with torch.no_grad():
        inner = nn.functional.gelu(int8_linear(x, model.first.up))
        exact = nn.functional.gelu(model.first.up(x)).double()
    # Of the first kernel, which nothing was rounded before; integers at ties may differ.
    assert widths[0].error == pytest.approx(float((inner - exact).norm() / exact.norm()), rel=1e-2)
    assert all(1e-4 < w.error < 0.1 for w in widths)
    assert f"  int8            {widths[0].error:.1e}" in fast.report()


def test_only_what_is_included() -> None:
    fast = optimized(encoder(), include=("*.up",), quality=0)
    fast(rows(1, 5))
    assert kinds(fast) == ["quantized_gemm", "gemm", "quantized_gemm", "gemm", "gemm"]


def test_one_program_for_all_lengths_and_smoothing_in_all() -> None:
    model = encoder()
    with torch.no_grad():
        # One channel is a hundred times the others, as in trained models.
        model.first.up.weight[:, 5] /= 100
    fast = optimized(model, calibrate=[rows(2, 30) * _spike()])
    for shape in ((2, 9), (5, 17), (3, 30)):
        x = rows(*shape, seed=sum(shape)) * _spike()
        with torch.no_grad():
            assert cosine(fast(x)[0], model(x)[0]) > 0.9995
    assert any(layer.factors is not None for layer in layers(fast))
    assert not fast.specialized and len({id(p.captured) for p in fast.programs}) == 1


def _spike() -> Tensor:
    return torch.ones(64).index_fill(0, torch.tensor([5]), 100.0)


class Narrow(nn.Module):
    """A product whose result is what is left of two large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.bad.weight[:, 1:].mul_(1e-3)
            self.bad.weight[:, 0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bad(self.good(x))
        return y - y.mean(-1, keepdim=True)


def test_layers_that_would_spoil_the_outputs_are_kept() -> None:
    torch.manual_seed(0)
    model, x = Narrow().eval(), rows(4, 9)
    fast = optimized(model, smooth=False)
    with torch.no_grad():
        assert cosine(fast(x), model(x)) >= 0.999
    kept = [layer for layer in layers(fast) if not layer.quantized]
    assert [layer.modules for layer in kept][-1] == ("bad",)
    assert all(layer.reason == "outputs would fall below a cosine of 0.999" for layer in kept)
    loose = optimized(model, smooth=False, quality=0)
    with torch.no_grad():
        assert cosine(loose(x), model(x)) < 0.9
    assert kinds(loose) == ["quantized_gemm"] * 2


def _quantizer(
    rates: Mapping[str, float], quality: float, bf16_ratio: float = 2.0, how: type[LinearQuantization] = fuser.Int8
) -> tuple[Quantizer, OperatorGraph]:
    """What is decided for Narrow on a CPU with bf16 instructions where choices take such times."""
    torch.manual_seed(0)
    model, x = Narrow().eval(), rows(4, 9)
    with torch.no_grad():
        model.bad.weight[:, 1:].mul_(100)
    captured = capture(model, flatten_call((x,), {}))
    graph = raise_graph(captured, None, floating(named_target("cpu")))
    quantizer = Quantizer(model, how(quality=quality, smooth=False))
    quantizer.observe(graph, captured.parameters, [x])
    target = Target(
        "cpu", "avx512", frozenset({"avx512_bf16"} if bf16_ratio > 1 else ()), 2, (1, 1, 1), 1e11, 1e12, 0.0
    )

    def compare(ways: Sequence[Sequence[GroupChoice]]) -> list[float]:
        kinds = [next(op.kind for c in way for op in c.group.operators if op.kind.endswith("gemm")) for way in ways]
        return [rates[kind] for kind in kinds]

    def choose(of: OperatorGraph) -> list[GroupChoice]:
        return choose_all(of, named_target("cpu") if how is fuser.Int8 else emulated_target("sm_89"), None)[0]

    quantizer.settle(target, choose, compare)
    return quantizer, quantizer.apply(graph, captured.parameters, target)


@pytest.mark.parametrize(
    ("rates", "quality", "ratio", "precisions"),
    [
        ({"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": 1.0}, 0.9, 2.0, ["int8", "int8"]),
        ({"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": 1.0}, 0.9985, 2.0, ["int8", "bf16"]),
        # bf16 is not enough, is no faster than fp32, is not what the target multiplies faster, or is faster than int8.
        ({"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": 1.0}, 1 - 4e-6, 2.0, ["bf16", "kept"]),
        ({"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": 1.0}, 1 - 1e-9, 2.0, ["kept", "kept"]),
        ({"gemm": 3.0, "bf16_gemm": 3.0, "quantized_gemm": 1.0}, 0.9985, 2.0, ["int8", "kept"]),
        ({"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": 1.0}, 0.9985, 1.0, ["int8", "kept"]),
        ({"gemm": 3.0, "bf16_gemm": 1.0, "quantized_gemm": 2.0}, 0.9, 2.0, ["bf16", "bf16"]),
    ],
)
def test_bf16_is_tried_before_a_layer_is_kept(
    rates: Mapping[str, float], quality: float, ratio: float, precisions: list[str]
) -> None:
    quantizer, graph = _quantizer(rates, quality, ratio)
    assert [layer.precision for layer in quantizer.layers] == precisions
    kinds = {"int8": "quantized_gemm", "bf16": "bf16_gemm", "kept": "gemm"}
    assert [op.kind for op in graph.operators if op.kind.endswith("gemm")] == [kinds[p] for p in precisions]
    assert quantizer.cosine >= quality
    assert [f": {p}" in str(layer) for layer, p in zip(quantizer.layers, precisions, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("seconds", "quality", "precisions"),
    [(1.0, 0.9, ["fp8", "fp8"]), (1.0, 1 - 1e-9, ["kept", "kept"]), (2.5, 0.9, ["bf16", "bf16"])],
)
def test_layers_leave_fp8_as_they_leave_int8(seconds: float, quality: float, precisions: list[str]) -> None:
    rates = {"gemm": 3.0, "bf16_gemm": 2.0, "quantized_gemm": seconds}
    quantizer, graph = _quantizer(rates, quality, how=fuser.FP8)
    assert [layer.precision for layer in quantizer.layers] == precisions and quantizer.cosine >= quality
    codes = [op.semantics.codes for op in graph.operators if is_kind(op, QuantizedGemm)]
    assert codes == [torch.float8_e4m3fn] * precisions.count("fp8")


def test_given_inputs_calibrate_in_the_place_of_the_first_call() -> None:
    torch.manual_seed(0)
    model = encoder()
    fast = optimized(model, calibrate=[rows(1, 8), (rows(2, 4),), {"x": rows(1, 3)}])
    # Whose outputs would keep every layer.
    fast(torch.full((1, 5, 64), torch.nan))
    assert kinds(fast) == ["quantized_gemm"] * 4 + ["gemm"]
    with torch.no_grad():
        assert cosine(fast(rows(1, 5))[0], model(rows(1, 5))[0]) > 0.999


def test_calibration_captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[object] = []
    original = forms.capture

    def counted(*given: Any) -> Any:
        count.append(given)
        return original(*given)

    monkeypatch.setattr(forms, "capture", counted)
    monkeypatch.setattr(engine, "capture", counted)
    fast = optimized(encoder(), calibrate=[rows(3, 8), rows(2, 4), rows(3, 5)])
    fast(rows(2, 9))
    assert kinds(fast) == ["quantized_gemm"] * 4 + ["gemm"] and len(count) == 1


def test_weights_whose_sums_may_not_fit_are_kept() -> None:
    # Rows are as long as sums; columns may be as many as they like.
    wide, long = nn.Linear(32, MAX_TERMS + 8, bias=False), nn.Linear(MAX_TERMS + 8, 32, bias=False)
    fast = optimized(nn.Sequential(wide, long).eval(), quality=0)
    with torch.no_grad():
        fast(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    assert [layer.quantized for layer in layers(fast)] == [True, False]
    assert layers(fast)[1].reason == f"sums of more than {MAX_TERMS} products"


def test_new_weights_are_rounded_anew_and_the_model_is_its_own() -> None:
    model, x = encoder(), rows(2, 7)
    before = copy.deepcopy(model.state_dict())
    fast = optimized(model)
    fast(x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with torch.no_grad():
        model.first.up.weight.mul_(-1)
        fresh = optimized(copy.deepcopy(model))
        torch.testing.assert_close(fast(x)[0], fresh(x)[0], atol=0.03, rtol=0)
        assert cosine(fast(x)[0], model(x)[0]) > 0.999


def test_a_saved_file_holds_int8_programs(tmp_path: Path) -> None:
    fast, x = optimized(encoder(), calibrate=[rows(2, 9) * _spike()]), rows(2, 9) * _spike()
    want = fast(x)
    fast.save(tmp_path / "encoder.fuser")
    for trust in ("kernels", "data"):
        got = fuser.load(tmp_path / "encoder.fuser", trust=trust)(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bert_with_padding_left_out() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([20, 7, 3])[:, None]).long()
    fast = fuser.optimize(model, quantize=fuser.Int8(), padding="skip", search="model")
    with torch.no_grad():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (fast, model))
    assert cosine(got[mask.bool()], want[mask.bool()]) > 0.999 and not got[~mask.bool()].any()
    assert "quantized_gemm" in {op.kind for p in fast.programs for op in p.graph.operators}


def test_gated_layers_and_tied_embeddings() -> None:
    """Qwen3 has both, norms of heads, and products that meet in an epilogue."""
    scale = Scale(hidden=64, length=24)
    model, call = ARCHITECTURES["qwen3"].build(scale), ARCHITECTURES["qwen3"].call(scale)
    with torch.no_grad():
        fast = optimized(model)
        assert cosine(fast(**call).logits, model(**call).logits) > 0.999
    assert kinds(fast).count("quantized_gemm") >= 8
    assert any(len(layer.modules) > 1 for layer in layers(fast))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 1.5}, "between 0 and 1"),
        ({"quality": float("nan")}, "between 0 and 1"),
        ({"trials": -1}, "number of choices"),
        ({"calibrate": []}, "holds no inputs"),
        ({"calibrate": torch.zeros(3)}, "list of inputs"),
        ({"calibrate": "text"}, "list of inputs"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    for how in (fuser.Int8, fuser.FP8):
        with pytest.raises(ValueError, match=words):
            how(**options)


def test_what_is_no_quantization_and_inputs_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"fuser\.Int8"):
        fuser.optimize(encoder(), quantize="int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="patterns"):
        fuser.Int8(exclude=(3,))  # type: ignore[arg-type]
    for wrong in (torch.zeros(2, 3, 65), {"y": rows(1, 3)}, (rows(1, 3).to("meta"),)):
        fast = optimized(encoder(), calibrate=[wrong])
        for _ in range(2):
            with pytest.raises(CalibrationError, match="calibrate="):
                fast(rows(1, 4))


def test_a_call_that_the_model_refuses_decides_nothing() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64)).eval()
    fast = optimized(model)
    with pytest.raises(IndexError):
        fast(torch.tensor([[3, 11]]))
    with torch.no_grad():
        assert cosine(fast(torch.tensor([[3, 9, 1]])), model(torch.tensor([[3, 9, 1]]))) > 0.999
    assert layers(fast)[0].quantized


@pytest.mark.parametrize("dynamic", [True, False])
def test_calibration_on_the_first_call_captures_it_once(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    captures = []
    for module in (compiler, engine, forms):
        if hasattr(module, "capture"):
            before = module.capture

            def counted(*args: Any, of: Any = before, **kwargs: Any) -> Any:
                captures.append(of)
                return of(*args, **kwargs)

            monkeypatch.setattr(module, "capture", counted)
    fast = fuser.optimize(encoder(), quantize=fuser.Int8(), search="model", dynamic=dynamic)
    fast(rows(2, 9))
    assert kinds(fast) == ["quantized_gemm"] * 4 + ["gemm"] and len(captures) == 1


def test_inputs_that_are_not_finite_keep_layers_and_rows_to_themselves() -> None:
    model, x = encoder(), rows(2, 9)
    x[1, 4, 3] = torch.nan
    fast = optimized(model, quality=0)
    hidden, _ = fast(x)
    with torch.no_grad():
        exact = model(x)[0]
    assert torch.equal(hidden.isnan().any(-1), exact.isnan().any(-1))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (rows(2, 0), "no rows to try it on"),
        (rows(2, 9).masked_fill(torch.arange(64) == 3, math.nan), "not finite"),
        (rows(2, 9).masked_fill(torch.arange(64) == 3, math.inf), "not finite"),
    ],
    ids=["empty", "nan", "inf"],
)
def test_calibration_that_tells_nothing_keeps_layers(given: Tensor, reason: str) -> None:
    model, x = encoder(), rows(2, 9)
    fast = optimized(model, calibrate=[given])
    with torch.no_grad():
        for got, want in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert [reason in layer.reason for layer in layers(fast)].count(True) >= 4
    assert not any(layer.quantized for layer in layers(fast))


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_of_zeros_give_zeros(weights_only: bool) -> None:
    model, x = encoder(), rows(2, 9)
    for layer in (model.second.down, model.head):
        nn.init.zeros_(layer.weight)
    fast = optimized(model, weights_only=weights_only)
    with torch.no_grad():
        hidden, head = fast(x)
        exact = model(x)
    assert cosine(hidden, exact[0]) > 0.999 and torch.equal(head, exact[1])
    assert next(layer for layer in layers(fast) if "second.down" in layer.modules).error == 0.0


@pytest.mark.parametrize("how", [{}, {"weights_only": True}], ids=["int8", "weights"])
def test_on_a_gpu_kernels_give_the_numbers_of_cpus(how: dict[str, Any]) -> None:
    model, x = encoder(), rows(2, 9)
    quantize = fuser.Int8(quality=0, bf16=False, **how)
    there = fuser.optimize(model, quantize=quantize, search="model", target="cuda:emulated")
    here = fuser.optimize(model, quantize=quantize, search="model")
    got, want = there(x), here(x)
    assert kinds(there) == kinds(here)
    assert {k.family for k in there.kernels} >= {"int8_weight_gemm" if how else "quantized_gemm"}
    assert there.fallbacks == ()
    # Norms are summed in another order, and a number behind one may become the integer beside it.
    for ours, theirs in zip(got, want, strict=True):
        assert cosine(ours, theirs) > 1 - 1e-6


def test_on_a_gpu_layers_are_tried_and_kept_where_int8_is_no_faster() -> None:
    """Small layers, by the cost model: another launch takes longer than the product. The norm's kernel rounds without
    one."""
    model, x = encoder(), rows(2, 9)
    fast = fuser.optimize(model, quantize=fuser.Int8(bf16=False), search="model", target="cuda:emulated")
    with torch.no_grad():
        assert cosine(fast(x)[0], model(x)[0]) > 0.9999
    found = layers(fast)
    assert [layer.modules for layer in found if layer.quantized] == [("second.up",)]
    assert kinds(fast) == ["gemm"] * 2 + ["quantized_gemm"] + ["gemm"] * 2
    assert sum("no faster in int8" in layer.reason for layer in found) == 3


def test_layers_in_fp8(tmp_path: Path) -> None:
    model, x = encoder(), rows(2, 9)
    fast = fuser.optimize(model, quantize=fuser.FP8(quality=0), search="model", target=emulated_target("sm_89"))
    with torch.no_grad():
        want = x
        for block in (model.first, model.second):
            inner = nn.functional.gelu(int8_linear(want.float(), block.up, torch.float8_e4m3fn))
            total = want.double() + int8_linear(inner.float(), block.down, torch.float8_e4m3fn)
            want = nn.functional.layer_norm(total, (64,), block.norm.weight.double(), block.norm.bias.double())
        hidden, head = fast(x)
        exact, _ = model(x)
    assert kinds(fast) == ["quantized_gemm"] * 4 + ["gemm"] and fast.fallbacks == ()
    assert {k.family for k in fast.kernels} >= {"quantized_gemm"}
    # Few elements lie where fp32 and float64 round to neighbouring codes, but these are up to a sixteenth apart.
    assert float((hidden - want).norm()) < 0.1 * float((hidden - exact).norm())
    assert 1 - 1e-2 < cosine(hidden, exact) < 1 - 1e-5
    widths = collect(fast.snapshot()).widths
    assert [w.width for w in widths if "linear" in " ".join(w.operators)][:4] == ["fp8"] * 4
    fast.save(tmp_path / "encoder.fuser")
    for trust in ("kernels", "data"):
        again = fuser.load(tmp_path / "encoder.fuser", trust=trust)(x)
        assert torch.equal(again[0], hidden) and torch.equal(again[1], head)


def test_fp8_is_tried_and_kept_where_it_is_no_faster() -> None:
    model, x = encoder(), rows(2, 9)
    how = fuser.FP8([x], bf16=False, exclude="second.*")
    fast = fuser.optimize(model, quantize=how, search="model", target=emulated_target("sm_89"))
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[0], model(x)[0], atol=1e-5, rtol=1e-5)
    found = layers(fast)
    assert sum("no faster in fp8" in layer.reason for layer in found) == 2
    # A half of sixteenths, as elements are all over a step.
    assert all(1e-2 < layer.error < 5e-2 for layer in found if layer.reason.startswith("no faster"))


def test_targets_without_fp8_say_so() -> None:
    model, x = encoder(), rows(1, 4)
    for target, words in (("cpu", "CPUs have no"), ("cuda:emulated", "sm_80 has no")):
        with pytest.raises(TargetError, match=f"{words} products of fp8.*8\\.9.*fuser.Int8"):
            fuser.optimize(model, quantize=fuser.FP8(), target=target)
    for quality in (0, 0.999):
        fast = fuser.optimize(model, quantize=fuser.FP8(quality=quality), search="model")
        for _ in range(2):
            with pytest.raises(TargetError, match="CPUs have no"):
                fast(x)
    with pytest.raises(ValueError, match="one specification for linear layers"):
        fuser.optimize(model, quantize=[fuser.FP8(), fuser.Int8()])


def test_weights_alone(tmp_path: Path) -> None:
    model, x = encoder(), rows(1, 1)
    fast = optimized(model, weights_only=True)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (rounded.first.up, rounded.first.down, rounded.second.up, rounded.second.down):
            integers, scales = quantize_rows(layer.weight)
            layer.weight.copy_(integers * scales)
        got, want = fast(x)[0], rounded(x)[0]
    assert kinds(fast) == ["int8_weight_gemm"] * 4 + ["gemm"]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    errors = [layer.error for layer in layers(fast) if layer.quantized]
    assert len(errors) == 4 and all(1e-3 < error < 1e-2 for error in errors)
    fast.save(tmp_path / "weights.fuser")
    assert torch.equal(fuser.load(tmp_path / "weights.fuser", trust="data")(x)[0], got)


class Int8Weight(Tensor):
    """A weight as torchao stores it: a tensor that consists of integers (N, K) and a scale for each output."""

    integers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scales: Tensor) -> Int8Weight:
        made = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scales.dtype, requires_grad=False)
        made.integers, made.scales = integers, scales
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], _: None, size: Any, stride: Any) -> Int8Weight:
        return cls(parts["integers"], parts["scales"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            product = x @ weight.integers.to(x.dtype).t() * weight.scales
            return product + bias[0] if bias and bias[0] is not None else product
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            return cls(function(args[0].integers), function(args[0].scales))
        raise NotImplementedError(function)


def with_stored_weights(seed: int = 0) -> Encoder:
    model = encoder(seed)
    for block in (model.first, model.second):
        for layer in (block.up, block.down):
            integers, scales = quantize_rows(layer.weight.detach())
            layer.weight = nn.Parameter(Int8Weight(integers, scales[:, 0].contiguous()), requires_grad=False)
    return model


def test_weights_that_are_tensors_of_several(tmp_path: Path) -> None:
    model, x = with_stored_weights(), rows(2, 5)
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        want, got = model(x), fast(x)
        assert fast.fallbacks == () and kinds(fast) == ["int8_weight_gemm"] * 4 + ["gemm"]
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        # What they consist of is read anew where it was changed in place.
        for changed in (fast, model):
            assert isinstance(changed.first.up.weight, Int8Weight)
        model.first.up.weight.scales.mul_(2.0)  # type: ignore[attr-defined]
        torch.testing.assert_close(fast(x)[0], model(x)[0], atol=1e-4, rtol=0)
        assert (model(x)[0] - want[0]).abs().max() > 1e-2
        fast.save(tmp_path / "encoder.fuser")
        torch.testing.assert_close(fuser.load(tmp_path / "encoder.fuser")(x)[0], model(x)[0], atol=1e-4, rtol=0)


def test_what_int8_makes_no_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(_: Tuner, ways: Sequence[Sequence[GroupChoice]]) -> list[float]:
        plain, rounded = ways
        # The next layer's rows may be rounded as well.
        operators = [op for c in rounded for op in c.group.operators]
        assert {n for c in plain for n in c.group.names} == {o.name for o in operators if o.kind != "quantize_rows"}
        assert any(op.kind in ("quantized_gemm", "code_gemm") for op in operators)
        values, operators = plain[0].group.graph.values, [op for c in plain for op in c.group.operators]
        wide = any(op.kind == "gemm" and values[op.output].shape[-1] == 128 for op in operators)
        return [2e-6, 3e-6] if wide else [3e-6, 2e-6]

    monkeypatch.setattr(Tuner, "compare", compare)
    monkeypatch.setattr(Tuner, "refine", lambda self, choices: [choice for choice, _ in choices])
    fast, x = fuser.optimize(encoder(), quantize=fuser.Int8(bf16=False)), rows(2, 9)
    fast(x)
    kept = {x.modules[0]: x.reason for x in layers(fast) if not x.quantized}
    assert sorted(kept) == ["first.up", "head", "second.up"]
    assert kept["first.up"] == "no faster in int8: 3 µs, 2 µs without"
    assert kinds(fast) == ["gemm", "quantized_gemm"] * 2 + ["gemm"]
    # The layers left change the outputs less than all would.
    precision = fast.snapshot().precision
    assert precision is not None and precision.cosine > 0.9999


def test_a_study_of_time_against_error(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = iter([4e-6, 1e-6, 2e-6, 3e-6])
    monkeypatch.setattr(Tuner, "compare", lambda self, ways: [1e-5, 1e-5 - next(saved)])
    monkeypatch.setattr(Tuner, "refine", lambda self, choices: [choice for choice, _ in choices])
    model, x = encoder(), rows(2, 9)
    fast = fuser.optimize(model, quantize=fuser.Int8(smooth=False, trials=24, quality=0.9999, bf16=False))
    fast(x)
    precision = fast.snapshot().precision
    assert precision is not None and len(precision.front) >= 3
    times, cosines = [p.seconds for p in precision.front], [p.cosine for p in precision.front]
    assert times == sorted(times) and cosines == sorted(cosines)
    assert precision.front[0].layers == 4 and precision.front[-1].cosine > 1 - 1e-9
    assert times[-1] - times[0] == pytest.approx(10e-6)
    # The fastest of those that are good enough.
    good = next(p for p in precision.front if p.cosine >= 0.9999)
    assert precision.cosine == good.cosine and sum(x.quantized for x in precision.layers) == good.layers
    assert f"front: {good.layers} layers in eight bits" in fast.report()
    assert kinds(fast).count("quantized_gemm") == good.layers
