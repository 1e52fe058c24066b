"""``fuser.sparse_attention`` against float64: masks, layouts, gradients, tracing, the registry, errors."""

from __future__ import annotations

import gc
import io
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_reference import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser import attention, masks, sparse_attention
from fuser.ir.errors import BuildError, MaskError

OPERATOR = torch.ops.fuser.sparse_attention.default
WITH_LSE = torch.ops.fuser.sparse_attention_lse.default


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, q_len: int = 70, kv_len: int = 90, width: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, width), (batch, kv_heads, kv_len, width), (batch, kv_heads, kv_len, width))
    q, k, v = (torch.randn(*shape, generator=g) for shape in shapes)
    return q, k, v


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None = None) -> None:
    """Relative error at most twice that of eager attention (rows that see nothing, which are NaN there, apart)."""
    want, _ = exact(q, k, v, allowed, bias)
    seen = allowed.broadcast_to(*q.shape[:3], k.shape[2]).any(-1)
    mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~allowed, -math.inf)
    mask = (mask if bias is None else mask + bias).to(q.dtype)
    eager = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert relative(out[seen], want[seen]) <= 2 * relative(eager[seen], want[seen])
    assert not out[~seen].any()


MASKS = {
    "dense": masks.Dense(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5, 9),
    "strided": masks.Strided(7),
    "longformer": masks.Longformer(4, 3),
    "bigbird": masks.BigBird(16, 1, 1, 1, 0),
    "tensor": masks.from_dense(torch.rand(70, 90, generator=torch.Generator().manual_seed(1)) > 0.7),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i + j) % 3 == 0),
    "per head": masks.per_head([masks.Causal(), masks.Dense(), masks.Dilated(3, 2), masks.Fixed(8)]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(name: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in inputs())
    out = sparse_attention(q, k, v, MASKS[name])
    assert isinstance(out, Tensor) and out.dtype == dtype and out.shape == q.shape
    check(out, q, k, v, MASKS[name].dense(70, 90))


def test_log_sum_exp() -> None:
    q, k, v = inputs()
    mask = masks.SlidingWindow(3, 3) & masks.from_dense((torch.arange(70) % 5 > 0)[:, None].expand(70, 90))
    out, lse = sparse_attention(q, k, v, mask, scale=0.3, return_lse=True)
    want, sums = exact(q, k, v, mask.dense(70, 90), scale=0.3)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    seen = mask.dense(70, 90).any(-1)
    assert not seen.all()
    # Single precision: the scores have some units, the sums ten keys.
    torch.testing.assert_close(lse[..., seen].double(), sums[..., seen], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    assert bool(torch.isneginf(lse[..., ~seen]).all()) and not out[..., ~seen, :].any()


@pytest.mark.parametrize("shape", [(90,), (70, 90), (4, 70, 90), (2, 1, 1, 90), (2, 4, 70, 90), (2, 1, 70, 1)])
def test_tensor_masks(shape: tuple[int, ...]) -> None:
    q, k, v = inputs()
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    check(sparse_attention(q, k, v, allowed), q, k, v, allowed.broadcast_to(2, 4, 70, 90))  # type: ignore[arg-type]
    if len(shape) != 2:
        return
    bias = torch.randn(shape).masked_fill(~allowed, -math.inf)
    everything = torch.ones(70, 90, dtype=torch.bool)
    check(sparse_attention(q, k, v, bias), q, k, v, everything, bias)  # type: ignore[arg-type]


def test_tensor_mask_with_a_row_that_sees_nothing() -> None:
    q, k, v = inputs()
    allowed = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    allowed[1] = False
    out, lse = sparse_attention(q, k, v, allowed, return_lse=True)
    assert not out[1].any() and bool(torch.isneginf(lse[1]).all()) and bool(out[0].any())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "strided columns": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    q, k, v = inputs()
    want = sparse_attention(q, k, v, masks.Causal())
    out = sparse_attention(*(LAYOUTS[layout](t) for t in (q, k, v)), masks.Causal())
    assert torch.equal(out, want)  # type: ignore[arg-type]
    if layout == "heads inside tokens":
        assert out.transpose(1, 2).is_contiguous()  # type: ignore[union-attr]


def test_expanded_batch() -> None:
    q, k, v = inputs(batch=1)
    out = sparse_attention(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), masks.Causal())
    one = sparse_attention(q, k, v, masks.Causal())
    assert torch.equal(out, one.expand(3, -1, -1, -1))  # type: ignore[union-attr,arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(0, 2**32 - 1),
)
def test_any_lengths(batch: int, kv_heads: int, group: int, q_len: int, kv_len: int, seed: int) -> None:
    q, k, v = inputs(batch, kv_heads * group, kv_heads, q_len, kv_len, seed=seed)
    g = torch.Generator().manual_seed(seed)
    allowed = torch.rand(q_len, kv_len, generator=g) < torch.rand(1, generator=g)
    out, lse = sparse_attention(q, k, v, masks.from_dense(allowed), return_lse=True)
    want, sums = exact(q, k, v, allowed) if kv_len else (torch.zeros_like(q), torch.full(q.shape[:3], -math.inf))
    torch.testing.assert_close(out.double(), want.double(), rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.double(), sums.double(), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_plain_pytorch_takes_other_dtypes(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    attention._say.cache_clear()
    q, k, v = (t.to(dtype) for t in inputs())
    with caplog.at_level(logging.WARNING, "fuser"):
        for _ in range(2):
            out, lse = sparse_attention(q, k, v, masks.Causal(), return_lse=True)
    assert [str(dtype) in message for message in caplog.messages] == [True]
    want, sums = exact(q, k, v, masks.Causal().dense(70, 90))
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half precision: one rounding of the result, whose values reach 4.
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-3)
    torch.testing.assert_close(lse.double(), sums, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise BuildError("the compiler is broken")

    attention._say.cache_clear()
    monkeypatch.setattr(attention, "_kernel", broken)
    q, k, v = inputs()
    with caplog.at_level(logging.WARNING, "fuser"):
        out = sparse_attention(q, k, v, masks.Causal())
    assert "the compiler is broken" in caplog.text
    torch.testing.assert_close(out.double(), exact(q, k, v, masks.Causal().dense(70, 90))[0], rtol=0, atol=5e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("given", ["mask", "tensor", "bias"])
def test_poison_reaches_only_rows_that_may_see_it(given: str, poison: float, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in inputs(kv_heads=4))
    allowed = masks.Strided(7).dense(70, 90)
    mask = {"mask": masks.Strided(7), "tensor": allowed, "bias": torch.where(allowed, 0.0, -math.inf).to(dtype)}[given]
    sees = allowed[:, 21]
    clean = sparse_attention(q, k, v, mask)
    for poisoned in (k, v):
        poisoned[:, :, 21] = math.nan
        out = sparse_attention(q, k, v, mask)
        torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
        assert out[:, :, sees].isnan().all()
        poisoned[:, :, 21] = 0.0
        clean = sparse_attention(q, k, v, mask)
    v[:, :, 21] = poison
    out = sparse_attention(q, k, v, mask)
    torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees])
    assert not out[:, :, sees].isfinite().any()


def _segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    raise KeyError("segment")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_segment, r"mask_mod\(_segment\) raised KeyError: 'segment'"),
        (lambda b, h, i, j: bool(i > j), "use & | ~ and torch.where"),
        (lambda b, h, i, j: torch.rand((i + j).shape) < 0.5, r"must return one value|different answers"),
        (lambda b, h, i, j: (i >= j) & (j < torch.tensor([5])[b]), "depends on b"),
        (lambda b, h, i, j: i - j, "must return a bool tensor"),
    ],
    ids=["raises", "branches", "random", "batch", "dtype"],
)
def test_functions_that_are_no_masks(function: Any, message: str) -> None:
    mask = masks.from_mask_mod(function)
    for use in (lambda: sparse_attention(*inputs(), mask), lambda: fuser.plan(mask, 70, 90)):
        with pytest.raises(MaskError, match=message):
            use()


def test_threads_change_nothing() -> None:
    q, k, v = inputs()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sparse_attention(q, k, v, masks.Longformer(4, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)  # type: ignore[arg-type]


# ---- gradients


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 4, 2, 5, 6, 3))
    runtime = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True) if bias else None
    key = attention.register_mask(masks.Causal())

    def both(q: Tensor, k: Tensor, v: Tensor, runtime: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = WITH_LSE(q, k, v, key, runtime, 0.5)
        return out, lse, OPERATOR(q, k, v, key, runtime, 0.5)

    assert torch.autograd.gradcheck(both, (q, k, v, runtime), fast_mode=True)


def test_gradients_in_single_precision() -> None:
    mask = masks.SlidingWindow(6, 2)
    leaves = [t.requires_grad_() for t in inputs()]
    weight = torch.randn(2, 4, 70, 32, generator=torch.Generator().manual_seed(5))
    (sparse_attention(*leaves, mask) * weight).sum().backward()  # type: ignore[operator]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    dense = torch.zeros(70, 90, dtype=torch.float64).masked_fill(~mask.dense(70, 90), -math.inf)
    seen = mask.dense(70, 90).any(-1)
    want = F.scaled_dot_product_attention(*doubles, dense, enable_gqa=True)
    (want * weight).sum().backward()
    assert bool(seen.all())
    for mine, theirs in zip(leaves, doubles, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 2e-6


def test_gradients_behind_more_masks_than_the_registry_keeps() -> None:
    q, k, v = inputs(1, 1, 1, 4, 4)
    q.requires_grad_()
    out = sparse_attention(q, k, v, masks.SlidingWindow(1, 1))
    for i in range(attention._REGISTERED + 1):
        sparse_attention(q, k, v, masks.SlidingWindow(i, 0))
    (got,) = torch.autograd.grad(out.sum(), q)  # type: ignore[union-attr]
    leaf = q.detach().double().requires_grad_()
    seen = masks.SlidingWindow(1, 1).dense(4)
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(leaf, k.double(), v.double(), seen).sum(), leaf)
    assert relative(got, want) < 2e-6


@pytest.mark.parametrize("given", ["mask", "tensor"])
def test_poison_that_nobody_sees_does_not_reach_gradients(given: str) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    allowed = masks.Causal().dense(70, 90) & (torch.arange(90) != 21)
    mask = masks.from_dense(allowed) if given == "mask" else allowed
    want = torch.autograd.grad(sparse_attention(*leaves, mask).sum(), leaves)  # type: ignore[union-attr]
    poisoned = [t.detach().clone() for t in leaves]
    for t in poisoned[1:]:
        t[:, :, 21] = math.nan
    for t in poisoned:
        t.requires_grad_()
    got = torch.autograd.grad(sparse_attention(*poisoned, mask).sum(), poisoned)  # type: ignore[union-attr]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", [OPERATOR, WITH_LSE])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_registered_well(operator: Any, transposed: bool) -> None:
    q, k, v = (LAYOUTS["heads inside tokens"](t) if transposed else t for t in inputs())
    key = attention.register_mask(masks.Longformer(4, 3))
    torch.library.opcheck(operator, (q.requires_grad_(), k, v, key, None, 0.2))
    runtime = torch.rand(2, 1, 1, 90) > 0.3
    torch.library.opcheck(operator, (q.detach(), k, v, key, runtime, 0.2))


# ---- tracing


class Block(nn.Module):
    def __init__(self, mask: Any, lse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)
        self.mask = mask
        self.lse = lse

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.lse:
            out, lse = sparse_attention(q, k, v, self.mask, return_lse=True)
            return self.out(out.transpose(1, 2).flatten(2)), lse
        return self.out(sparse_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))  # type: ignore[union-attr]


TRACED = {
    "pattern": masks.Longformer(4, 3),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i - j).abs() < 5),
    "tensor": torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(2)) > 0.3,
    "none": None,
}
X = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(4))


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


# ---- the registry


def test_a_traced_mask_outlives_its_owner() -> None:
    block = Block(masks.SlidingWindow(3, 11), lse=True).eval()
    with torch.no_grad():
        want = block(X)
    program = torch.export.export(block, (X,)).module()
    del block
    q, k, v = inputs(1, 1, 1, 4, 4)
    for i in range(2 * attention._REGISTERED):
        sparse_attention(q, k, v, masks.SlidingWindow(i, 0))
    gc.collect()
    assert len(attention._recent) <= attention._REGISTERED
    torch.testing.assert_close(program(X), want, rtol=0, atol=0)


def test_a_mask_that_somebody_holds_is_known() -> None:
    """As between a call's key and its operator, while other threads use other masks."""
    mask = masks.SlidingWindow(5, 13)
    key = attention._enter(mask, None, None)
    for i in range(attention._REGISTERED):
        attention._enter(masks.SlidingWindow(i, 1), None, None)
    assert key not in attention._recent and attention.mask_of(key) is mask
    del mask
    gc.collect()
    with pytest.raises(MaskError, match="knows no mask"):
        attention.mask_of(key)


def test_a_forked_child_does_not_wait_for_the_registry_of_its_parent() -> None:
    with attention._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if attention._lock.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_equal_masks_have_one_key() -> None:
    ones = torch.ones(4, 4, dtype=torch.bool)
    assert attention.register_mask(masks.from_dense(ones)) == attention.register_mask(masks.from_dense(ones.clone()))
    assert attention.register_mask(masks.Causal(1)) != attention.register_mask(masks.Causal(2))
    function = masks.from_mask_mod(lambda b, h, i, j: i >= j)
    assert attention.register_mask(function, 4) != attention.register_mask(function, 5)
    with pytest.raises(MaskError, match="fingerprint"):
        attention.register_mask(function)


def test_another_process_is_told_to_register_the_mask(tmp_path: Any) -> None:
    mask = masks.SlidingWindow(2, 5)
    block = Block(mask).eval()
    path = tmp_path / "block.pt2"
    torch.export.save(torch.export.export(block, (X,)), path)
    code = f"""
import torch, fuser.attention
program = torch.export.load({str(path)!r}).module()
x = torch.ones(2, 50, 64)
try:
    program(x)
except fuser.FuserError as error:
    assert "register_mask" in str(error), error
    fuser.attention.register_mask(fuser.masks.SlidingWindow(2, 5))
    print(program(x).double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout) == block(torch.ones(2, 50, 64)).double().sum().item()


# ---- errors


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), r"takes q \(B, H, Sq, D\).*\(2, 4, 8\)"),
        (((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)), "batch sizes differ"),
        (((2, 4, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16)), "multiple"),
        (((2, 4, 8, 16), (2, 2, 8, 16), (2, 4, 8, 16)), "multiple"),
        (((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 9, 16)), "as many rows"),
        (((2, 4, 8, 16), (2, 4, 8, 12), (2, 4, 8, 16)), "one width"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(*(torch.zeros(s) for s in shapes), masks.Causal())


def test_dtypes_that_do_not_fit() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"one floating-point dtype.*bfloat16"):
        sparse_attention(q, k.bfloat16(), v, masks.Causal())
    with pytest.raises(ValueError, match="floating-point"):
        sparse_attention(q.long(), k.long(), v.long(), masks.Causal())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("causal", "must be one of fuser.masks"),
        (
            torch.ones(2, 90, dtype=torch.bool),
            r"\(2, 90\) does not broadcast.*\(2, 4, 70, 90\).*mask\[:, None, None, :\]",
        ),
        (torch.ones(70, 90, dtype=torch.int64), "int64"),
        (torch.ones(1, 2, 4, 70, 90, dtype=torch.bool), "does not broadcast"),
        (masks.from_dense(torch.ones(70, 80, dtype=torch.bool)), "kv_len = 90"),
        (masks.per_head([masks.Causal(), masks.Dense()]), r"2 heads and q 4.*\(2, 4, 70, 32\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        sparse_attention(*inputs(), mask)
