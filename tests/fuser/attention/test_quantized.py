"""Attention with few bits, from the public function to the kernel, and in programs."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import inputs, multiplies_bytes, rounding_of
from torch import Tensor, nn

import fuser
from fuser import DEQ, Int8Attention, Sanger, masks, sparse_attention
from fuser.attention import launch, register_mask
from fuser.attention.registry import spec_of
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import FuserError
from fuser.ir.score_quantization import ScoreQuantization
from fuser.runtime.device import cpu_target
from fuser.runtime.program import NativeStep

MASK = masks.Longformer(6, 2)
HOW = DEQ(threshold=0.2)
# Weights, and values of about 3, are rounded to bf16 where the CPU multiplies them so.
BF16 = "avx512_bf16" in cpu_target().features
BYTES = rounding_of(Int8Attention())


@pytest.fixture
def always_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the sizes of tests, where exact attention is faster."""
    monkeypatch.setattr(Int8Attention, "may_be_exact", False)


def expected(q: Tensor, k: Tensor, v: Tensor, how: ScoreQuantization, allowed: Tensor | None = None) -> Tensor:
    """What the reference of the specification says where forbidden pairs do not exist."""
    added = None if allowed is None else torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    return how.reference(q, k, v, additive_mask=added)[0]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    launch.say.cache_clear()
    caplog.set_level(logging.WARNING, "fuser")
    return caplog


def test_a_kernel_runs_it(warned: pytest.LogCaptureFixture) -> None:
    q, k, v = inputs()
    out = sparse_attention(q, k, v, MASK, quantize=HOW)
    torch.testing.assert_close(out, expected(q, k, v, HOW, MASK.dense(70, 90)), rtol=0, atol=rounding_of(HOW))
    each = masks.per_batch([masks.Causal(), masks.Dense()])
    out = sparse_attention(q, k, v, each, quantize=HOW)
    torch.testing.assert_close(out, expected(q, k, v, HOW, each.dense(70, 90)[:, None]), rtol=0, atol=rounding_of(HOW))
    out = sparse_attention(q, k, v, each, quantize=Int8Attention())
    want = expected(q, k, v, Int8Attention(), each.dense(70, 90)[:, None])
    torch.testing.assert_close(out, want, rtol=0, atol=BYTES)
    assert "plain PyTorch" not in warned.text


@pytest.mark.parametrize(
    ("dtype", "how", "bias", "reason"),
    [
        (torch.float64, HOW, None, "no kernel for torch.float64"),
        (torch.float16, Sanger(), None, "no kernel for torch.float16"),
        (torch.float32, DEQ.from_config("adamax_nb80"), torch.zeros(70, 90), "compares scores without the mask"),
    ],
)
def test_what_no_kernel_takes_runs_as_the_reference(
    dtype: torch.dtype, how: ScoreQuantization, bias: Tensor | None, reason: str, warned: pytest.LogCaptureFixture
) -> None:
    q, k, v = (t.to(dtype) for t in inputs())
    out = sparse_attention(q, k, v, bias=bias, quantize=how)
    torch.testing.assert_close(out, how.reference(q, k, v)[0])
    assert reason in warned.text


@pytest.mark.parametrize(
    "how", [HOW, Sanger(threshold=0.1), DEQ(method="inv_probability_threshold", threshold=0.1), Int8Attention()]
)
def test_gradients_are_those_of_the_reference(how: ScoreQuantization) -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 2, 7, 6, 5))
    bias = torch.randn(1, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 4, 7, 5, dtype=torch.float64)
    got = torch.autograd.grad((sparse_attention(q, k, v, bias=bias, quantize=how) * grad).sum(), (q, k, v, bias))  # type: ignore[operator]
    want = torch.autograd.grad((how.reference(q, k, v, additive_mask=bias)[0] * grad).sum(), (q, k, v, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    ones = tuple(torch.ones_like(t) for t in (q, k, v))
    _, tangent = torch.func.jvp(lambda *t: sparse_attention(*t, quantize=how), (q, k, v), ones)
    _, wanted = torch.func.jvp(lambda *t: how.reference(*t)[0], (q, k, v), ones)
    torch.testing.assert_close(tangent, wanted)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out: Any = sparse_attention(q, k, v, MASK, quantize=HOW)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


X = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(4))


def test_programs_exports_and_files_keep_it(tmp_path: Any) -> None:
    model = Block().eval()
    with torch.no_grad():
        want = model(X)
        fast = fuser.optimize(model)
        torch.testing.assert_close(fast(X), want, rtol=1e-4, atol=1e-5)
        fast.save(tmp_path / "block.fuser")
        torch.testing.assert_close(fuser.load(tmp_path / "block.fuser")(X), want, rtol=1e-4, atol=1e-5)
        assert "sparse_attention" in str(fast.report()) and not fast.unfused and not fast.outside
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), want, rtol=1e-4, atol=1e-5)
        counter = torch._dynamo.testing.CompileCounter()
        torch.testing.assert_close(torch.compile(model, backend=counter, fullgraph=True)(X), want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


class Encoder(Block):
    """Two attentions, one of them written with few bits already."""

    def __init__(self, how: ScoreQuantization | None, causal: bool = False) -> None:
        super().__init__()
        self.how, self.mask = how, masks.Causal() if causal else masks.Dense()

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (4 * self.qkv(x)).chunk(3, -1))
        seen = keep[:, None, None]
        if self.how is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            seen = seen & self.mask.dense(x.shape[1], x.shape[1])
            y = self.how.reference(q, k, v, additive_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf))[0]
        y = sparse_attention(y, k, v, self.mask, quantize=HOW)  # type: ignore[assignment]
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    keep = torch.arange(length) < torch.tensor([length, *range(2, 2 + rows - 1)])[:, None]
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(length)), keep


@pytest.mark.usefixtures("always_few_bits")
@pytest.mark.parametrize("how", [HOW, Sanger(threshold=0.05), Int8Attention()])
@pytest.mark.parametrize("causal", [False, True])
def test_optimize_quantizes_all_attention(how: ScoreQuantization, causal: bool, tmp_path: Any) -> None:
    fast = fuser.optimize(Encoder(None).eval(), quantize=how, attention=masks.Causal() if causal else None)
    model = Encoder(how, causal).eval()
    with torch.inference_mode():
        for given in (batch(3, 40), batch(2, 23), batch(4, 64)):
            want = model(*given)
            # Where values are rounded, the second attention gets other queries, and some other codes of them.
            if BF16 or multiplies_bytes(how):
                far = 0.1 if multiplies_bytes(how) else 0.05
                assert float((fast(*given) - want).norm() / want.norm()) < far
            else:
                torch.testing.assert_close(fast(*given), want, rtol=1e-4, atol=1e-5)
        assert (fast(*given) - Encoder(None).eval()(*given)).abs().max() > 1e-3
        fast.save(tmp_path / "encoder.fuser")
        torch.testing.assert_close(fuser.load(tmp_path / "encoder.fuser")(*given), fast(*given))
    assert fast.fallbacks == () and len(list(fast._engine.forms)) == 1
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "attention") == 2
    assert not any("attention" in name for name, _ in (*fast.unfused, *fast.outside))
    assert str(fast.report()).count(f"  {type(how).__name__} {how.bits} bits") + (how != HOW) == 2


class Windowed(Block):
    """A mask by its definition, whose entries follow from the length."""

    def __init__(self, how: ScoreQuantization | None) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (4 * self.qkv(x)).chunk(3, -1))
        at = torch.arange(x.shape[1])
        seen = ((at[:, None] - at).abs() <= 4) | (at < 2)
        if self.how is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            y = expected(q, k, v, self.how, seen)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("always_few_bits")
@pytest.mark.parametrize(
    "how", [HOW, DEQ(method="probability_threshold", threshold=0.02, calibration="dynamic"), Int8Attention()]
)
def test_one_capture_serves_masks_of_all_lengths(how: ScoreQuantization, tmp_path: Any) -> None:
    fast, model = fuser.optimize(Windowed(None).eval(), quantize=how), Windowed(how).eval()
    # Bytes go through one more product.
    rounding = rounding_of(how) * (2 if multiplies_bytes(how) else 1)
    with torch.inference_mode():
        for length in (40, 23, 64, 130):
            x, _ = batch(2, length)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=rounding)
        fast.save(tmp_path / "windowed.fuser")
        torch.testing.assert_close(fuser.load(tmp_path / "windowed.fuser")(x), fast(x))
    assert fast.fallbacks == fast.specialized == () and len(list(fast._engine.forms)) == 1
    assert all(isinstance(step, NativeStep) for step in fast.programs[-1].assembly.plan.steps)


def test_attention_that_8_bits_make_no_faster_stays_exact() -> None:
    """Of short rows rounding takes longer than it saves; of long ones one tenth of the products' time."""
    fast, exact = (
        fuser.optimize(Windowed(None).eval(), search="model", quantize=how) for how in (Int8Attention(), None)
    )
    dense = fuser.optimize(Encoder(None).eval(), search="model", quantize=Int8Attention())
    with torch.inference_mode():
        x, _ = batch(1, 24)
        assert torch.equal(fast(x), exact(x))
        assert "Int8Attention" not in str(fast.report())
        dense(*batch(4, 800))
        assert "  Int8Attention 8 bits" in str(dense.report())


@pytest.mark.parametrize("how", [HOW, DEQ.from_config("adamax_nb80"), Sanger(threshold=0.05), Int8Attention()])
def test_gpus_compute_what_cpus_do(how: ScoreQuantization) -> None:
    fast, model = fuser.optimize(Windowed(None).eval(), target="cuda:emulated", quantize=how), Windowed(how).eval()
    with torch.inference_mode():
        for length in (40, 130):
            x, _ = batch(1, length)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert fast.unfused == () and f"  {type(how).__name__} {how.bits} bits" in str(fast.report())


def test_gpus_take_exact_attention_where_it_is_faster() -> None:
    """Products of fp16 take so little that the steps of codes take longer."""
    model = Windowed(None).eval().half()
    fast = fuser.optimize(model, search="model", target="cuda:emulated", quantize=Int8Attention())
    with torch.inference_mode():
        x = batch(1, 40)[0].half()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
    assert any(kernel.family == "attention" for kernel in fast.kernels) and "Int8Attention" not in str(fast.report())


def test_optimize_quantizes_layers_and_attention() -> None:
    given = batch(2, 40)
    with torch.inference_mode():
        both = fuser.optimize(Encoder(None).eval(), quantize=(fuser.Int8(quality=0), HOW))
        got, want = both(*given), Encoder(HOW).eval()(*given)
    assert {kernel.family for kernel in both.kernels} >= {"quantized_gemm"}
    # What layers round moves decisions, each of which moves an output by some of the steps of 4 bits.
    assert 0 < (got - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("int8", TypeError, "quantize must be"),
        ([HOW, Sanger()], ValueError, "one specification for linear layers and one for attention"),
        (DEQ(calibration="ema"), FuserError, "no thresholds yet"),
    ],
)
def test_optimize_refuses_what_is_no_quantization(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fuser.optimize(Block(), quantize=given)


def test_specifications_have_keys_of_their_own() -> None:
    plain, low, lower = (register_mask(MASK, quantize=how) for how in (None, HOW, DEQ(bits=2)))
    assert len({plain, low, lower}) == 3
    assert spec_of(low) == AttentionSpec(MASK, None, HOW) and register_mask(MASK, quantize=DEQ(threshold=0.2)) == low


@pytest.mark.parametrize("given", [4, "adamax_nb80", DEQ])
def test_what_is_no_specification_is_refused(given: Any) -> None:
    with pytest.raises(
        FuserError, match=r"quantize must be a fuser\.DEQ, a fuser\.Sanger, a fuser\.Int8Attention or None"
    ):
        sparse_attention(*inputs(), quantize=given)
    with pytest.raises(FuserError, match="no thresholds yet"):
        sparse_attention(*inputs(), quantize=DEQ(calibration="ema"))


@pytest.mark.parametrize("how", [HOW, Int8Attention()])
def test_no_keys_and_no_queries(how: ScoreQuantization) -> None:
    q, k, v = inputs(1, 2, 2, 3, 4, 8)
    assert not sparse_attention(q, k[:, :, :0], v[:, :, :0], quantize=how).any()  # type: ignore[union-attr]
    assert sparse_attention(q[:, :, :0], k, v, quantize=how).shape == (1, 2, 0, 8)  # type: ignore[union-attr]


def test_the_operator_is_registered_well() -> None:
    q, k, v = inputs()
    operator = torch.ops.fuser.sparse_attention.default
    torch.library.opcheck(operator, (q.requires_grad_(), k, v, register_mask(MASK, quantize=HOW), None, 0.2))
