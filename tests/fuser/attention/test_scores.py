"""Attention with a score rule, from the public function to the kernel, against float64."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import inputs, relative
from attention_reference import exact
from torch import Tensor, nn

import fuser
from fuser import SoftCap, masks, sparse_attention
from fuser.attention import launch, register_mask
from fuser.attention.launch import run_plan
from fuser.ir.errors import FuserError
from fuser.ir.target import emulated_target
from fuser.kernels.attention import AttentionParameters, cached_plan

CAP = SoftCap(1.5)
MASK = masks.Longformer(6, 2)
OPERATOR = torch.ops.fuser.sparse_attention_lse.default


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 3e-6) -> None:
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("given", ["mask", "tensor", "bias", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_capped_before_masks(given: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in inputs())
    allowed = MASK.dense(70, 90)
    bias = torch.where(allowed, 0.7, -math.inf).to(dtype)
    mask: Any = {"mask": MASK, "tensor": allowed, "bias": bias, "none": None}[given]
    seen, added = {"bias": (None, bias), "none": (None, None)}.get(given, (allowed, None))
    out, lse = sparse_attention(q, k, v, mask, score=CAP, return_lse=True)
    want = exact(q, k, v, seen, added, cap=1.5)
    # A rounding of the weights and one of the result, which is at most about 4, to bfloat16.
    check((out, lse), want, 2.0**-6 if dtype == torch.bfloat16 else 3e-6)
    assert relative(exact(q, k, v, seen, added)[0], want[0]) > 0.05


def test_a_mask_for_each_batch_entry_takes_the_rule_along() -> None:
    q, k, v = inputs()
    each = masks.per_batch([masks.Causal(), masks.Dense()])
    out = sparse_attention(q, k, v, each, score=CAP)
    want, _ = exact(q, k, v, each.dense(70, 90)[:, None], cap=1.5)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)  # type: ignore[union-attr]


def test_the_emulated_gpu_caps_scores() -> None:
    q, k, v = (t.half() for t in inputs(1, 2, 1, 66, 66))
    out, lse, target = torch.empty_like(q), torch.empty(1, 2, 66), emulated_target()
    plan = cached_plan(masks.Causal(), 66, 66, target)
    run_plan(q, k, v, plan, None, 0.3, out, lse, target, CAP)
    check((out, lse), exact(q, k, v, masks.Causal().dense(66), scale=0.3, cap=1.5), 2.0**-8)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_pass_through_the_rule(bias: bool) -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 2, 5, 6, 3))
    attn_mask = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True) if bias else None
    key = register_mask(masks.Causal(), score=CAP)

    def both(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return OPERATOR(q, k, v, key, attn_mask, 2.5)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(both, (q, k, v, attn_mask), fast_mode=True)
    tangents = tuple(torch.ones_like(t) for t in (q, k, v))
    step = 1e-6
    ahead, behind = (exact(*(t + s for t in (q, k, v)), masks.Causal().dense(5, 6), cap=1.5)[0] for s in (step, -step))
    _, tangent = torch.func.jvp(lambda *t: sparse_attention(*t, masks.Causal(), score=CAP), (q, k, v), tangents)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def test_poison_that_nobody_sees_does_not_reach_gradients() -> None:
    q, k, v = inputs(kv_heads=4)
    allowed = torch.arange(90) != 21
    for poison in (math.nan, math.inf):
        k[:, :, 21], v[:, :, 21] = poison, poison
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        sparse_attention(*leaves, masks.from_dense(allowed.expand(70, 90)), score=CAP).sum().backward()  # type: ignore[union-attr]
        assert all(bool(t.grad.isfinite().all()) for t in leaves if t.grad is not None)


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = MASK if pad is None else pad[:, None, None, :]
        out = sparse_attention(q, k, v, mask, score=CAP)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr, no-any-return]

    def expected(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        allowed = MASK.dense(x.shape[1]) if pad is None else pad[:, None, None, :]
        return self.out(exact(q, k, v, allowed, cap=1.5)[0].float().transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


X = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(4)) * 4


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_fuses_it_and_is_saved_with_it(padded: bool, tmp_path: Path) -> None:
    model = Capped().eval()
    given = (X, torch.arange(50).expand(2, 50) < torch.tensor([[50], [31]])) if padded else (X,)
    with torch.inference_mode():
        want = model.expected(*given)
        fast = fuser.optimize(model)
        torch.testing.assert_close(fast(*given), want, rtol=1e-4, atol=1e-5)
    assert fast.unfused == () and fast.fallbacks == ()
    assert {kernel.family for kernel in fast.kernels} == {"attention", "gemm"}
    fast.save(tmp_path / "capped.fuser")
    with torch.inference_mode():
        torch.testing.assert_close(fuser.load(tmp_path / "capped.fuser")(*given), want, rtol=1e-4, atol=1e-5)


def test_export_and_compile_keep_the_rule() -> None:
    model = Capped().eval()
    with torch.no_grad():
        want = model.expected(X)
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), want, rtol=1e-4, atol=1e-5)
        counter = torch._dynamo.testing.CompileCounter()
        torch.testing.assert_close(torch.compile(model, backend=counter, fullgraph=True)(X), want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_no_kernel_of_an_attention_without_a_rule_changes() -> None:
    """A rule is one more field of the parameters, which enter the names of kernels."""
    assert AttentionParameters(64, 64).spec.hash != AttentionParameters(64, 64, rule=CAP).spec.hash
    assert AttentionParameters(64, 64, rule=SoftCap(1.5)).spec == AttentionParameters(64, 64, rule=CAP).spec


@pytest.mark.parametrize("score", [30.0, "softcap", lambda s: s, SoftCap])
def test_what_is_no_rule_is_refused(score: Any) -> None:
    with pytest.raises(FuserError, match=r"score must be a rule such as fuser\.SoftCap"):
        sparse_attention(*inputs(), score=score)


def test_the_operator_is_registered_well() -> None:
    q, k, v = inputs()
    key = register_mask(MASK, score=CAP)
    torch.library.opcheck(OPERATOR, (q.requires_grad_(), k, v, key, None, 0.2))


def test_half_precision_is_capped_in_plain_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    launch.say.cache_clear()
    q, k, v = (t.half() for t in inputs())
    with caplog.at_level(logging.WARNING, "fuser"):
        out, lse = sparse_attention(q, k, v, MASK, score=CAP, return_lse=True)
    assert "float16" in caplog.text
    check((out, lse), exact(q, k, v, MASK.dense(70, 90), cap=1.5), 2e-3)
