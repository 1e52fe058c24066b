"""Attention as an operator under ``fuser.optimize``, ``torch.export`` and ``torch.compile``."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import Block, X, inputs, relative
from attention_reference import exact
from torch import Tensor

import fuser
from fuser import masks, sparse_attention

TRACED = {
    "pattern": masks.Longformer(4, 3),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i - j).abs() < 5),
    "tensor": torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(2)) > 0.3,
    "none": None,
}


@pytest.mark.parametrize("name", TRACED)
def test_optimize_recognizes_it(name: str) -> None:
    block = Block(TRACED[name]).eval()
    fast = fuser.optimize(block, (X,))
    with torch.no_grad():
        want = block(X)
    assert fast.unfused == () and fast.fallbacks == ()
    assert sorted({kernel.family for kernel in fast.kernels}) == ["attention", "gemm"]
    exact_block = Block(None).double()
    with torch.no_grad():
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in exact_block.qkv(X.double()).chunk(3, -1))
    mask = TRACED[name]
    allowed = mask.dense(50, 50) if isinstance(mask, masks.Mask) else mask
    right = exact_block.out(exact(q, k, v, allowed)[0].transpose(1, 2).flatten(2))
    assert relative(fast(X), right) <= 2 * relative(want, right)


def test_optimize_restricts_it_further() -> None:
    block = Block(masks.Causal()).eval()
    fast = fuser.optimize(block, (X,), attention=masks.from_mask_mod(lambda b, h, i, j: (i - j).abs() < 7))
    block.mask = masks.Causal() & masks.SlidingWindow(6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), block(X), rtol=0, atol=2e-6)
    assert fast.unfused == ()


def test_optimize_with_log_sum_exp() -> None:
    block = Block(masks.Causal(), lse=True).eval()
    fast = fuser.optimize(block, (X,))
    with torch.no_grad():
        torch.testing.assert_close(fast(X), block(X), rtol=1e-6, atol=2e-6)
    assert any("sparse_attention_lse" in name for name, _ in fast.unfused)


@pytest.mark.parametrize("name", TRACED)
def test_export(name: str) -> None:
    block = Block(TRACED[name], lse=True).eval()
    with torch.no_grad():
        want = block(X)
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(block, (X,)), buffer)
        buffer.seek(0)
        got = torch.export.load(buffer).module()(X)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str, gradient: bool) -> None:
    torch._dynamo.reset()
    block = Block(TRACED["pattern"], lse=True)
    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    with torch.set_grad_enabled(gradient):
        want, got = block(X), compiled(X)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)
    if gradient:
        grads = [torch.autograd.grad(out.sum() + lse.sum(), block.qkv.weight)[0] for out, lse in (want, got)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    block = Block(masks.Longformer(4, 3)).eval()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=frames, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for length in (50, 31, 44, 12, 29):
            x = X[:, :length].contiguous()
            torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=2e-6)
    # Dynamo traces such a model again for the second length, with any attention.
    assert frames.frame_count <= 2


def test_a_mask_made_inside_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    q, k, v = inputs()

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sparse_attention(q, k, v, masks.SlidingWindow(2, 2)) * 2

    assert torch.equal(torch.compile(inside, backend="eager")(q, k, v), inside(q, k, v))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="make it outside"):
        torch.compile(inside, backend="eager", fullgraph=True)(q, k, v)
