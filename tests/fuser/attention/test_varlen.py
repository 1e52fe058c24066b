"""``fuser.varlen_attention`` against float64 of every document by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from attention_cases import rounding_of
from attention_reference import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser import DEQ, Int8Attention, Sanger, SoftCap, masks, varlen_attention
from fuser.attention.launch import run_plan
from fuser.codegen import launch
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.target import emulated_target
from fuser.kernels.documents import plan_documents

OPERATOR = torch.ops.fuser.varlen_attention.default
LENGTHS = ((5, 5), (0, 0), (1, 1), (130, 130), (64, 64), (7, 40), (40, 7), (3, 0), (0, 6))
MASKS = {
    "none": None,
    "dense": masks.Dense(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5, 9),
    "causal window": masks.Causal() & masks.SlidingWindow(20, 0),
    "longformer": masks.Longformer(4, 2),
    "strided": masks.Strided(7),
    "function": masks.from_mask_mod(lambda b, h, i, j: (i + j) % 3 == 0),
    "per head": masks.per_head([masks.Causal(), masks.Dense(), masks.Dilated(3, 2), masks.Fixed(8)]),
}


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=dtype)


def packed(
    lengths: Sequence[tuple[int, int]], heads: int = 4, kv_heads: int = 2, width: int = 32
) -> tuple[Tensor, ...]:
    """q, k, v and both offsets."""
    g = torch.Generator().manual_seed(sum(n + m for n, m in lengths))
    rows, keys = (sum(one) for one in zip(*lengths, strict=True))
    q, k, v = (torch.randn(n, h, width, generator=g) for n, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads)))
    return q, k, v, offsets([n for n, _ in lengths]), offsets([m for _, m in lengths])


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    mask: masks.Mask | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Each document by itself, its queries the last rows of the square that its keys make; or all pairs."""
    outs, sums = [q.new_zeros(0, q.shape[1], v.shape[2]).double()], [q.new_zeros(q.shape[1], 0).double()]
    for (a, b), (c, d) in zip(
        *(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) for cu in (cu_q, cu_k)), strict=True
    ):
        n, m = b - a, d - c
        allowed = torch.ones(n, m, dtype=torch.bool)
        if mask is not None and not isinstance(mask, masks.Dense):
            square = mask.dense(m)
            allowed = torch.zeros(*square.shape[:-2], n, m, dtype=torch.bool)
            if rows := min(n, m):
                allowed[..., n - rows :, :] = square[..., m - rows :, :]
        one = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        out, lse = exact(*one, allowed, scale=scale, cap=cap)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 3e-6) -> None:
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_document_attends_to_itself(name: str, dtype: torch.dtype) -> None:
    q, k, v, cu_q, cu_k = packed(LENGTHS)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, MASKS[name], scale=0.3, return_lse=True)
    assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == (4, len(q))
    # A rounding of the weights and one of the result, which is at most about 4, to bfloat16.
    check((out, lse), expected(q, k, v, cu_q, cu_k, MASKS[name], 0.3), 2.0**-6 if dtype == torch.bfloat16 else 3e-6)
    alone = varlen_attention(q, k, v, cu_q.long(), cu_k.long(), MASKS[name], scale=0.3)
    torch.testing.assert_close(alone, out, rtol=0, atol=0)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=5), st.sampled_from(list(MASKS)))
@settings(max_examples=40, deadline=None)
def test_any_lengths(lengths: list[tuple[int, int]], name: str) -> None:
    given = packed([*lengths, (2, 2)])
    check(varlen_attention(*given, MASKS[name], return_lse=True), expected(*given, MASKS[name]))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_the_same_lengths_of_queries_and_keys_are_those_of_sparse_attention(lengths: list[int]) -> None:
    q, k, v, cu, _ = packed([(n, n) for n in lengths])
    out = varlen_attention(q, k, v, cu, mask=masks.Causal())
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        one = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        want = fuser.sparse_attention(*one, masks.Causal())
        torch.testing.assert_close(out[a:b], want[0].transpose(0, 1), rtol=0, atol=2e-6)  # type: ignore[index, call-overload]


def test_a_new_set_of_lengths_builds_nothing() -> None:
    given = packed([(9, 9), (30, 30)])
    varlen_attention(*given, masks.Causal())
    before = launch._kernel.cache_info().misses
    for lengths in ([(1, 1)], [(70, 70), (3, 3), (500, 500)], [(0, 0), (8, 80)]):
        given = packed(lengths)
        check(varlen_attention(*given, masks.Causal(), return_lse=True), expected(*given, masks.Causal()))
        for mask in (masks.Causal(), masks.Longformer(3, 1), None):
            varlen_attention(*given, mask)
    # The one with the log-sum-exp, if no test before has built it.
    assert launch._kernel.cache_info().misses <= before + 1


def test_slices_of_one_product_are_read_where_they_lie() -> None:
    qkv = torch.randn(90, 3, 4, 32, generator=torch.Generator().manual_seed(1))
    cu = offsets([40, 0, 50])
    q, k, v = qkv.unbind(1)
    check(varlen_attention(q, k, v, cu, return_lse=True), expected(q, k, v, cu, cu))
    wide = torch.cat([q, q], -1)[..., ::2]
    check(varlen_attention(wide, k, v, cu, return_lse=True), expected(wide, k, v, cu, cu))


def test_scores_are_capped() -> None:
    given = packed(LENGTHS)
    got = varlen_attention(*given, masks.Causal(), score=SoftCap(0.5), return_lse=True)
    check(got, expected(*given, masks.Causal(), cap=0.5))


@pytest.mark.parametrize("name", ["none", "causal", "longformer", "per head"])
def test_the_emulated_gpu_runs_documents(name: str) -> None:
    q, k, v, cu_q, cu_k = packed(LENGTHS)
    q, k, v = (t.half() for t in (q, k, v))
    mask, target = MASKS[name] or masks.Dense(), emulated_target()
    plan = plan_documents(mask, cu_q.long().numpy(), cu_k.long().numpy(), target)
    out, lse = torch.empty_like(q), torch.empty(1, 4, len(q))
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    run_plan(*heads, plan, None, 0.3, out.transpose(0, 1)[None], lse, target)  # type: ignore[call-arg, arg-type, misc]
    check((out, lse[0]), expected(q, k, v, cu_q, cu_k, mask, 0.3), 2.0**-8)


@pytest.mark.parametrize("score", [None, SoftCap(1.5)])
def test_gradients(score: SoftCap | None) -> None:
    lengths = ((4, 4), (0, 0), (5, 3), (2, 5), (1, 0))
    q, k, v, cu_q, cu_k = packed(lengths, width=3)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    seen = torch.tensor([row not in (4, 5, 11) for row in range(12)])

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = varlen_attention(q, k, v, cu_q, cu_k, masks.Causal(), score=score, return_lse=True)
        return out, lse[:, seen], varlen_attention(q, k, v, cu_q, cu_k, score=score)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


def test_gradients_in_single_precision() -> None:
    q, k, v, cu_q, cu_k = packed(LENGTHS)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = varlen_attention(*leaves, cu_q, cu_k, masks.SlidingWindow(8, 2))
        (out * torch.arange(32)).sum().backward()  # type: ignore[operator]
        grads.append([t.grad for t in leaves])
    for mine, right in zip(*grads, strict=True):
        assert mine is not None and right is not None
        assert float((mine.double() - right).norm() / right.norm()) < 2e-6


def test_tangents() -> None:
    q, k, v, cu_q, cu_k = packed(((4, 4), (3, 3)), width=8)
    q, k, v = (t.double() for t in (q, k, v))
    tangents = tuple(torch.randn_like(t) for t in (q, k, v))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return varlen_attention(q, k, v, cu_q, cu_k, masks.Causal())

    step = 1e-6
    ahead, behind = (
        expected(*(t + s * d for t, d in zip((q, k, v), tangents, strict=True)), cu_q, cu_k, masks.Causal())[0]
        for s in (step, -step)
    )
    _, tangent = torch.func.jvp(run, (q, k, v), tangents)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_the_operator_is_registered_well() -> None:
    q, k, v, cu_q, cu_k = packed(((4, 4), (9, 12)))
    key = fuser.attention.register_mask(masks.Longformer(4, 3))
    for lse in (True, False):
        torch.library.opcheck(OPERATOR, (q.clone().requires_grad_(), k, v, cu_q, cu_k, key, 0.2, lse))


class Packed(nn.Module):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.mask = nn.Linear(64, 192), nn.Linear(64, 64), mask

    def forward(self, x: Tensor, cu: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(1)
        return self.out(varlen_attention(q, k, v, cu, mask=self.mask).flatten(1))  # type: ignore[union-attr, no-any-return]


def test_one_compilation_serves_all_lengths() -> None:
    model, counter = Packed(masks.Causal()).eval(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ((7, 30), (3, 1, 0, 50), (2,) * 12):
            x = torch.randn(sum(lengths), 64)
            torch.testing.assert_close(compiled(x, offsets(lengths)), model(x, offsets(lengths)))
    assert counter.frame_count == 1


def test_an_exported_program_serves_all_lengths() -> None:
    model = Packed(masks.SlidingWindow(3, 3)).eval()
    given = torch.randn(37, 64), offsets((7, 30))
    tokens, ends = torch.export.Dim("tokens", min=2), torch.export.Dim("ends", min=3)
    program = torch.export.export(model, given, dynamic_shapes=({0: tokens}, {0: ends})).module()
    with torch.no_grad():
        for lengths in ((7, 30), (3, 1, 0, 50)):
            x = torch.randn(sum(lengths), 64)
            torch.testing.assert_close(program(x, offsets(lengths)), model(x, offsets(lengths)))


def test_an_optimized_model_takes_it_along(tmp_path: Path) -> None:
    model, x, cu = Packed(masks.Longformer(4, 1)).eval(), torch.randn(40, 64), offsets((30, 10))
    with torch.inference_mode():
        want = model(x, cu)
        fast = fuser.optimize(model)
        torch.testing.assert_close(fast(x, cu), want, rtol=1e-5, atol=1e-5)
        # The offsets are an input: others are no other program.
        other = offsets((5, 35))
        torch.testing.assert_close(fast(x, other), model(x, other), rtol=1e-5, atol=1e-5)
    assert fast.fallbacks == () and len(fast.programs) == 1
    assert any("varlen_attention" in name for name, _ in fast.unfused)
    fast.save(tmp_path / "packed.fuser")
    with torch.inference_mode():
        torch.testing.assert_close(fuser.load(tmp_path / "packed.fuser")(x, cu), want, rtol=1e-5, atol=1e-5)


def test_functions_cannot_be_saved_for_any_lengths(tmp_path: Path) -> None:
    model, x, cu = Packed(MASKS["function"]).eval(), torch.randn(40, 64), offsets((30, 10))
    with torch.inference_mode():
        want = model(x, cu)
        fast = fuser.optimize(model)
        torch.testing.assert_close(fast(x, cu), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(FuserError, match="documents of any lengths cannot be saved"):
        fast.save(tmp_path / "packed.fuser")


def test_what_a_function_reads_may_change() -> None:
    table = torch.zeros(64, dtype=torch.bool)
    mask = masks.from_mask_mod(lambda b, h, i, j: table[j] | (i == j))
    given = packed(((20, 20), (7, 7)))
    for columns in (3, 9):
        table[:columns] = True
        check(varlen_attention(*given, mask, return_lse=True), expected(*given, mask))


def test_without_rows() -> None:
    q, k, v, cu, _ = packed(((0, 0), (0, 0)))
    out, lse = varlen_attention(q, k, v, cu, mask=masks.Causal(), return_lse=True)
    assert out.shape == (0, 4, 32) and lse.shape == (4, 0)
    q, k, v, cu_q, cu_k = packed(((3, 0), (2, 0)))
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    assert not out.any() and bool(torch.isneginf(lse).all())
    none = torch.zeros(1, dtype=torch.int32)
    assert varlen_attention(q[:0], k, v, none).shape == (0, 4, 32)  # type: ignore[union-attr]


BAD: dict[str, tuple[Any, str]] = {
    "offsets that go down": (
        {"cu_seqlens_q": torch.tensor([0, 6, 4, 10])},
        "cu_seqlens_q must ascend: it is 6 at 1 and 4 at 2",
    ),
    "offsets that end early": ({"cu_seqlens_k": torch.tensor([0, 4, 5, 9])}, "cu_seqlens_k must go from 0 to .* 10"),
    "offsets that end late": ({"cu_seqlens_q": torch.tensor([0, 4, 5, 11])}, "from 0 to the number of rows, 10"),
    "offsets that start late": ({"cu_seqlens_q": torch.tensor([1, 4, 5, 10])}, "and is from 1 to 10"),
    "no offsets": ({"cu_seqlens_q": torch.tensor([], dtype=torch.int32)}, "as many documents|nothing"),
    "offsets of floats": ({"cu_seqlens_q": torch.tensor([0.0, 4, 5, 10])}, "int32 or int64"),
    "offsets in two dimensions": ({"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int32)}, "documents"),
    "other numbers of documents": ({"cu_seqlens_q": torch.tensor([0, 10])}, "as many documents, got 1 and 3"),
    "offsets elsewhere": ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32, device="meta")}, "on the device of q"),
    "padded queries": ({"q": torch.zeros(1, 4, 10, 32)}, r"takes q \(total_q, H, D\)"),
    "other widths": ({"q": torch.zeros(10, 4, 16)}, "heads of one width"),
    "heads that are no multiple": ({"q": torch.zeros(10, 3, 32)}, "multiple"),
    "mixed dtypes": ({"q": torch.zeros(10, 4, 32, dtype=torch.bfloat16)}, "one floating-point dtype"),
    "other rows of values": ({"v": torch.zeros(9, 2, 32)}, "as many rows"),
    "a tensor as mask": ({"mask": torch.ones(10, 10, dtype=torch.bool)}, "one of fuser.masks or None"),
    "a mask for each batch entry": ({"mask": masks.per_batch([masks.Causal()] * 3)}, "one of fuser.masks or None"),
    "a mask of other heads": ({"mask": masks.per_head([masks.Causal()] * 3)}, "has 3 heads and q 4"),
    "a mask of other lengths": ({"mask": masks.from_dense(torch.ones(9, 9, dtype=torch.bool))}, "9"),
    "a score that is no rule": ({"score": 30.0}, "fuser.SoftCap"),
    "bits that are no specification": ({"quantize": 4}, r"fuser\.DEQ, a fuser\.Sanger, a fuser\.Int8Attention or None"),
    "averages that nothing has begun": ({"quantize": DEQ(calibration="ema")}, "no thresholds yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    q, k, v, _, _ = packed(((10, 10),))
    cu = torch.tensor([0, 4, 5, 10])
    changes, message = BAD[name]
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**given)


def test_maskerror_is_what_masks_raise() -> None:
    with pytest.raises(MaskError):
        varlen_attention(*packed(((4, 4),)), masks.from_dense(torch.ones(3, 3, dtype=torch.bool)))


def test_lengths_that_flash_attention_asks_for_are_not_needed() -> None:
    given = packed(((40, 40), (7, 7)))
    out = varlen_attention(*given, max_seqlen_q=40, max_seqlen_k=40)
    assert torch.equal(out, varlen_attention(*given))  # type: ignore[arg-type]
    assert math.isfinite(float(out.sum()))  # type: ignore[union-attr]


def test_nested_tensors_are_packed_ones() -> None:
    lengths = (5, 0, 17, 3)
    q, k, v = (
        torch.nested.nested_tensor([torch.randn(n, h, 16) for n in lengths], layout=torch.jagged, requires_grad=True)
        for h in (4, 2, 2)
    )
    cu = q.offsets()
    out, lse = fuser.varlen_attention(q, k, v, mask=masks.Causal(), return_lse=True)
    want, sums = fuser.varlen_attention(q.values(), k.values(), v.values(), cu, mask=masks.Causal(), return_lse=True)
    assert out.is_nested and torch.equal(out.offsets(), cu)
    assert torch.equal(out.values(), want) and torch.equal(lse, sums)
    (gradient,) = torch.autograd.grad(out.values().sum(), v)
    assert gradient.is_nested and gradient.values().abs().sum() > 0
    other = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (5, 1, 16, 3)], layout=torch.jagged)
    for operands in ((q, k.values(), v), (q, k, other), (q, k, v, cu)):
        with pytest.raises(ValueError, match=r"nested tensors all three|equal lengths"):
            fuser.varlen_attention(*operands)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        fuser.varlen_attention(q.values(), k.values(), v.values())
    with pytest.raises(ValueError, match="second dimension"):
        fuser.varlen_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


# ---- scores of few bits

KERNELS: dict[str, ScoreQuantization] = {
    "deq": DEQ(threshold=0.2),
    "a sample": DEQ(granularity="batch", calibration="dynamic", threshold=0.4),
    "sanger": Sanger(threshold=0.05),
    "bytes": Int8Attention(smooth=False),
    "bytes of what differs": Int8Attention(),
}
QUANTIZED = KERNELS | {
    "eight bits": DEQ(bits=8, method="probability_threshold", threshold=0.02),
    "unimportant": DEQ(method="inv_adaptive_maximum_threshold"),
    "static": DEQ(calibration="static", thresholds=(0.4, 0.5), empty_row="dense"),
    "a head": DEQ(granularity="head", before_softmax=True, threshold=0.3, empty_row="predicted"),
    "dynamic": Sanger(calibration="dynamic", threshold=0.1, empty_row="zero"),
}


def expected_of_few_bits(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, mask: masks.Mask | None, how: ScoreQuantization
) -> Tensor:
    """The reference of the specification on the rows of each document that see something."""
    out = torch.zeros_like(q)
    bounds = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    for a, b, c, d in bounds:
        rows = b - a if mask is None else min(b - a, d - c)
        if not rows or c == d:
            continue
        seen = torch.ones(rows, d - c) if mask is None else mask.dense(d - c)[..., d - c - rows :, :]
        added = torch.zeros(seen.shape).masked_fill(~seen.bool(), -math.inf)
        one = (t.transpose(0, 1)[None] for t in (q[b - rows : b], k[c:d], v[c:d]))
        out[b - rows : b] = how.reference(*one, additive_mask=added)[0][0].transpose(0, 1)
    return out


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("mask", ["none", "causal", "longformer", "strided", "per head"])
def test_scores_of_few_bits_are_those_of_every_document_by_itself(name: str, mask: str) -> None:
    given, how = packed(LENGTHS), QUANTIZED[name]
    # float64 has no kernel.
    wide = (*(t.double() for t in given[:3]), *given[3:])
    plain, sums = varlen_attention(*wide, MASKS[mask], quantize=how, return_lse=True)
    want = expected_of_few_bits(*wide, MASKS[mask], how)
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-12)
    if name in KERNELS:
        out, lse = varlen_attention(*given, MASKS[mask], quantize=how, return_lse=True)
        want = expected_of_few_bits(*given, MASKS[mask], how)
        torch.testing.assert_close(out, want, rtol=0, atol=rounding_of(how, float(given[2].abs().max())))
        assert torch.equal(lse.isneginf(), sums.isneginf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_lose_the_mean_of_their_own_document(dtype: torch.dtype) -> None:
    lengths, how = [5, 70, 1, 0, 200, 64], Int8Attention()
    generator = torch.Generator().manual_seed(0)
    # Documents whose keys are far from zero, each elsewhere: the mean of all of them would leave few digits.
    far = [30 * torch.randn(1, 4, 40, generator=generator).expand(n, -1, -1) for n in lengths]
    q, k, v = torch.randn(3, sum(lengths), 4, 40, generator=generator).unbind()
    q, k, v = (t.to(dtype) for t in (q, k + torch.cat(far), v))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    got, without = (varlen_attention(q, k, v, cu, quantize=how) for how in (how, Int8Attention(smooth=False)))
    want = varlen_attention(q.double(), k.double(), v.double(), cu)
    for start, stop in itertools.pairwise(cu.tolist()):
        one = (t[start:stop].transpose(0, 1)[None] for t in (q, k, v))
        alone = fuser.sparse_attention(*one, masks.Dense(), quantize=how)[0].transpose(0, 1)
        assert torch.equal(got[start:stop], alone)
    error, worse = (float((out - want).norm() / want.norm()) for out in (got, without))
    assert error < 0.03 < worse
    # A rule sees scores with what the mean adds to them.
    capped = varlen_attention(q, k, v, cu, score=SoftCap(50.0), quantize=how)
    want = varlen_attention(q.double(), k.double(), v.double(), cu, score=SoftCap(50.0))
    assert float((capped - want).norm() / want.norm()) < 0.05


def test_outliers_zeros_and_poison_of_one_document_are_its_own() -> None:
    given, how = packed(LENGTHS), KERNELS["a sample"]
    want, _ = varlen_attention(*given, quantize=how, return_lse=True)
    q, k, _, cu, _ = given
    start, stop = cu[3].item(), cu[4].item()
    for row, value in ((start, 1e4), (start + 1, 0.0), (stop - 1, math.inf), (stop - 2, math.nan)):
        q[row], k[row] = value, value
    out, _ = varlen_attention(*given, quantize=how, return_lse=True)
    others = torch.ones(len(q), dtype=torch.bool)
    others[start:stop] = False
    assert torch.equal(out[others], want[others]) and out[start:stop].isnan().any()


def test_gradients_of_few_bits_are_those_of_the_reference() -> None:
    q, k, v, cu_q, cu_k = packed(((5, 5), (3, 8)), width=8)
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    how = DEQ(threshold=0.3, calibration="dynamic")
    grad = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = varlen_attention(q, k, v, cu_q, cu_k, masks.Causal(), quantize=how)
    want = expected_of_few_bits(q, k, v, cu_q, cu_k, masks.Causal(), how)
    for a, b in zip(*(torch.autograd.grad((o * grad).sum(), (q, k, v)) for o in (out, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
