"""The kernel of attention in 8 bits against its reference, on instruction sets, and what its bytes must give."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from dot_bytes import MODEL, NARROW, bytes_of, check_bytes, target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser import Int8Attention, SoftCap, masks
from fuser.attention.launch import run_plan
from fuser.attention.reference import chosen_of, reference
from fuser.codegen.render import header_folder, render
from fuser.ir.attention import AttentionSpec
from fuser.ir.graph import TensorSpec
from fuser.ir.masks import Mask
from fuser.ir.scores import ScoreRule
from fuser.ir.target import Isa
from fuser.kernels.attention import Operands, call_of
from fuser.kernels.attention_int8 import Int8Kernel, Int8Launch, multiplies_bytes
from fuser.kernels.base import Literal
from fuser.kernels.planner import plan
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cpuinfo import detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

NATIVE = detect_isa()
ISAS = pytest.mark.parametrize("isa", dict.fromkeys([None, NATIVE, Isa.PORTABLE, *NARROW]))
Q_LEN, KV_LEN, WIDTH, VALUES = 70, 150, 22, 19
SCALE = 0.4
MASKS: list[Mask] = [masks.Dense(), masks.Longformer(6, 2), masks.Strided(7), masks.Causal()]
# Weights become 255ths, up to 7/8 of one away, and values the nearest 127ths.
BYTES = 0.875 / 255 + 0.5 / 127


@functools.cache
def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of four heads, which share two of the keys, that have much in common; outliers and zeros among
    them."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 4, Q_LEN, WIDTH, generator=g), torch.randn(2, 2, KV_LEN, WIDTH, generator=g)
    v = torch.randn(2, 2, KV_LEN, VALUES, generator=g)
    k += 2 * torch.randn(2, 2, 1, WIDTH, generator=g)
    q[0, 0, 3], q[1, 2, 4], k[0, 0, 9, 3], v[0, 1, :, 2] = 0.0, 2.0, 40.0, 0.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    how: Int8Attention,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    dtype: torch.dtype = torch.float32,
    isa: Isa | str | None = NATIVE,
    threads: int = 2,
    given: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of the kernel."""
    q, k, v = inputs(dtype) if given is None else given
    on = target(isa)
    out, lse = torch.full((*q.shape[:3], v.shape[3]), 7.0, dtype=q.dtype), torch.full(q.shape[:3], 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = plan(mask, q.shape[2], k.shape[2], on)
        run_plan(q, k, v, made, attn_mask, SCALE, out, lse, on, rule, how)
    finally:
        torch.set_num_threads(before)
    return out, lse


def check(
    how: Int8Attention,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    dtype: torch.dtype = torch.float32,
    isa: Isa | str | None = NATIVE,
) -> None:
    q, k, v = inputs(dtype)
    out, lse = run(how, mask, attn_mask, rule, dtype, isa)
    want, want_lse = reference(q, k, v, AttentionSpec(mask, rule, how), attn_mask, SCALE)
    seen = ~want_lse.isneginf()
    assert torch.equal(seen, ~lse.isneginf()) and not out[~seen].any()
    largest = float(v.float().abs().max())
    torch.testing.assert_close(lse[seen], want_lse[seen], rtol=1e-6, atol=5e-6)
    if multiplies_bytes(target(isa)):
        torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=4 * BYTES * largest)
        assert float((out.float() - want.float()).norm()) < 1.5 * BYTES * float(want.float().norm()) + 1e-6
        return
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out, want, rtol=rounding, atol=1e-5 + rounding / 8)


@ISAS
def test_it_computes_what_the_reference_does(isa: Isa | str | None) -> None:
    for mask in MASKS:
        for smooth in (True, False):
            check(Int8Attention(smooth=smooth), mask, isa=isa)
    check(Int8Attention(), masks.Longformer(6, 2), dtype=torch.bfloat16, isa=isa)


@ISAS
def test_biases_masks_and_rules(isa: Isa | str | None) -> None:
    generator = torch.Generator().manual_seed(2)
    bias = 2 * torch.randn(1, 4, Q_LEN, KV_LEN, generator=generator)
    bias[..., 120:] = -1e4
    bias[:, :, 5:9, 3:] = -math.inf
    bias[:, 1, 11] = -math.inf
    visible = torch.rand(2, 1, 1, KV_LEN, generator=generator) > 0.3
    check(Int8Attention(), MASKS[1], bias.expand(2, -1, -1, -1), SoftCap(8.0), isa=isa)
    check(Int8Attention(), MASKS[0], bias.expand(2, -1, -1, -1), isa=isa)
    check(Int8Attention(), MASKS[3], visible.expand(2, 4, Q_LEN, KV_LEN), isa=isa)


@ISAS
def test_scores_have_the_bits_of_the_reference(isa: Isa | str | None) -> None:
    """A row that sees one key has its score for a log-sum-exp."""
    q, k, _ = inputs()
    generator = torch.Generator().manual_seed(9)
    how = Int8Attention(smooth=False)
    scores = chosen_of(q, k, AttentionSpec(masks.Dense(), None, how), None, SCALE).scores
    for _ in range(3):
        key = torch.randint(KV_LEN, (Q_LEN,), generator=generator)
        one = torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)
        one[torch.arange(Q_LEN), key] = True
        _, lse = run(how, masks.from_dense(one), isa=isa)
        # Where values are bytes, the logarithm of their step comes and goes.
        near = 3e-6 if multiplies_bytes(target(isa)) else 0.0
        torch.testing.assert_close(lse, scores[..., torch.arange(Q_LEN), key], rtol=0, atol=near)


@pytest.mark.skipif(not multiplies_bytes(cpu_target()), reason="this CPU does not multiply bytes in one instruction")
def test_bytes_are_weights_and_values_rounded_once() -> None:
    q, k, v = inputs()
    how = Int8Attention(skip=0.0)
    out, _ = run(how, masks.Dense(), isa=None)
    scores = chosen_of(q, k, AttentionSpec(masks.Dense(), None, how), None, SCALE).scores
    check_bytes(out, bytes_of(scores, v.repeat_interleave(2, 1)))


def test_rows_depend_on_what_they_see_alone() -> None:
    """Values of keys that a row may not see, however large, leave its numbers."""
    q, k, v = (t.clone() for t in inputs())
    k, v = k[:, :, :Q_LEN], v[:, :, :Q_LEN]
    how, mask = Int8Attention(smooth=False), masks.Causal()
    want, want_lse = run(how, mask, isa=None, given=(q, k, v))
    k[:, :, 60:] *= 50
    v[:, :, 60:] *= 1e5
    out, lse = run(how, mask, isa=None, given=(q, k, v))
    assert torch.equal(out[:, :, :60], want[:, :, :60]) and torch.equal(lse[:, :, :60], want_lse[:, :, :60])
    assert float(out[:, :, 61:].abs().max()) > 1e3


def test_values_of_all_sizes() -> None:
    """Zeros count in sums, next to values of any size."""
    q, k, v = (t.clone() for t in inputs())
    v[:, :, :100] = 0.0
    v[:, :, 120:] *= torch.logspace(-30, 0, 30)[:, None]
    want, _ = reference(q, k, v, AttentionSpec(masks.Dense(), None, Int8Attention(skip=0.0)), None, SCALE)
    out, _ = run(Int8Attention(skip=0.0), masks.Dense(), isa=None, given=(q, k, v))
    torch.testing.assert_close(out, want, rtol=0, atol=4 * BYTES * float(v.abs().max()))
    for size in (1e-20, 1e25):
        big, _ = run(Int8Attention(skip=0.0), masks.Dense(), isa=None, given=(q, k, v * size))
        torch.testing.assert_close(big / size, out, rtol=1e-3, atol=2e-3)


def test_rows_that_are_too_large_for_codes_are_exact() -> None:
    for which in (0, 1):
        given = [t.clone() for t in inputs()]
        given[which][0, 0, 5, 1] = 1e25
        q, k, v = given
        out, _ = run(Int8Attention(smooth=False), masks.Dense(), isa=None, given=(q, k, v))
        exact, _ = reference(q, k, v, AttentionSpec(masks.Dense()), None, SCALE)
        rows = (0, slice(0, 2)) if which else (0, 0, 5)
        torch.testing.assert_close(out[rows], exact[rows], rtol=1e-5, atol=1e-5)


def test_threads_change_nothing() -> None:
    for mask in MASKS:
        one, three = (run(Int8Attention(), mask, isa=None, threads=threads) for threads in (1, 3))
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@ISAS
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_what_is_not_finite_does_what_it_does_in_exact_attention(isa: Isa | str | None, poison: float) -> None:
    """It reaches those rows that may see it, in its own head."""
    mask = masks.Strided(7)
    sees = mask.dense(Q_LEN, KV_LEN)[:, 21]
    for which in (1, 2):
        given = [t.clone() for t in inputs()]
        given[which][1, 0, 21, 0] = poison
        q, k, v = given
        out, _ = run(Int8Attention(), mask, isa=isa, given=(q, k, v))
        want, _ = reference(q, k, v, AttentionSpec(mask, None, Int8Attention()), None, SCALE)
        assert torch.equal(out.isfinite(), want.isfinite())
        assert not out[1, 0, sees].isfinite().all() and out[1, 0, ~sees].isfinite().all()
        finite = want.isfinite()
        torch.testing.assert_close(out[finite], want[finite], rtol=0, atol=4 * BYTES * float(inputs()[2].abs().max()))
        # Heads with keys that are not finite are exact.
        exact, _ = reference(q, k, v, AttentionSpec(mask), None, SCALE)
        if which == 1:
            torch.testing.assert_close(out[1, 0, ~sees], exact[1, 0, ~sees], rtol=1e-5, atol=1e-5)
    q, k, v = (t.clone() for t in inputs())
    q[0, 1, 5, 2] = poison
    out, _ = run(Int8Attention(), mask, isa=isa, given=(q, k, v))
    exact, _ = reference(q, k, v, AttentionSpec(mask), None, SCALE)
    torch.testing.assert_close(out[0, 1, 5], exact[0, 1, 5], equal_nan=True)
    # A query that has no codes takes up to 64 rows to exact attention, and no other.
    want, _ = run(Int8Attention(), mask, isa=isa)
    others = torch.ones(2, 4, Q_LEN, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(out[others], want[others])
    near = out[0, 1, 6:].isfinite().all() and (out[0, 1, 6:] - exact[0, 1, 6:]).norm() < 0.1 * exact[0, 1, 6:].norm()
    assert near


def test_rows_that_see_nothing_are_zero_whatever_their_query() -> None:
    q, k, v = (t.clone() for t in inputs())
    q[:, :, 2] = math.inf
    visible = torch.ones(2, 4, Q_LEN, KV_LEN, dtype=torch.bool)
    visible[:, :, 2] = False
    out, lse = run(Int8Attention(), masks.Dense(), visible, isa=None, given=(q, k, v))
    assert not out[:, :, 2].any() and lse[:, :, 2].isneginf().all() and out.isfinite().all()


def test_poison_that_nobody_sees_does_nothing() -> None:
    q, k, v = (t.clone() for t in inputs())
    visible = torch.ones(2, 4, Q_LEN, KV_LEN, dtype=torch.bool)
    visible[..., 100:] = False
    want, _ = run(Int8Attention(smooth=False), masks.Dense(), visible, isa=None)
    v[:, :, 120:] = math.nan
    out, _ = run(Int8Attention(smooth=False), masks.Dense(), visible, isa=None, given=(q, k, v))
    torch.testing.assert_close(out, want, rtol=0, atol=4 * BYTES * float(inputs()[2].abs().max()))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1e-1, 1e-2, 1e-3]), st.floats(0.5, 12.0), st.integers(0, 99))
def test_no_more_of_a_row_is_skipped_than_was_allowed(skip: float, peak: float, seed: int) -> None:
    """Keys whose scores fall from one block to the next, so that there is much to be skipped."""
    g = torch.Generator().manual_seed(seed)
    q, v = torch.randn(1, 1, 64, 16, generator=g) + 4, torch.randn(1, 1, 400, 16, generator=g)
    k = torch.randn(1, 1, 400, 16, generator=g) * 0.3
    k[:, :, :40] += peak / 4
    exact, sums = run(Int8Attention(skip=0.0), masks.Dense(), given=(q, k, v))
    out, lse = run(Int8Attention(skip=skip), masks.Dense(), given=(q, k, v))
    lost = 1 - (lse - sums).exp()
    assert float(lost.max()) <= skip + 1e-5 and float(lost.min()) >= -1e-5
    assert float((out - exact).abs().max()) <= 2 * skip * float(v.abs().max()) + 1e-5


def test_what_does_not_matter_is_skipped() -> None:
    q, v = torch.full((1, 1, 64, 16), 2.0), torch.ones(1, 1, 960, 16)
    k = torch.zeros(1, 1, 960, 16)
    k[:, :, :8] = 3.0
    v[:, :, 96:] = 100.0
    # Scores are 38 above the rest of the keys, whose weights of 1e-17 times 864 times 100 fp32 still sees.
    given = q, k, v
    (kept, _), (skipped, lse) = (run(Int8Attention(skip=s), masks.Dense(), given=given) for s in (0.0, 1e-3))
    assert torch.equal(skipped, torch.ones_like(skipped)) and bool((kept >= skipped).all())
    torch.testing.assert_close(lse, torch.full_like(lse, 16 * 6 * SCALE + math.log(8)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("mask", [masks.Dense(), masks.Strided(5)])
def test_dot_products_of_bytes(mask: Mask) -> None:
    """The code around the instruction, with a model of it in its place, in registers of all widths."""
    q, k, v = inputs()
    how, on = Int8Attention(skip=0.0), target(NATIVE)
    specs = (TensorSpec.contiguous(t.shape, t.dtype) for t in (q, k, v, q.new_empty(2, 4, Q_LEN, VALUES)))
    call = call_of(
        mask, Operands(*specs), ("q", "k", "v"), ("out",), SCALE, Int8Launch(Int8Kernel(WIDTH, VALUES), how), on, 2
    )
    source = render(call.spec)
    path = build([dataclasses.replace(source, text=MODEL + source.text)], on, headers=header_folder(on))[source.symbol]
    values = {"q": q, "k": k, "v": v, "out": torch.full((2, 4, Q_LEN, VALUES), math.nan)}
    tensors = [ref.tensor if isinstance(ref, Literal) else values[str(ref)] for ref in call.tensors]
    scratch = torch.empty(call.workspace_bytes // 4 + 16)
    workspace = -(-scratch.data_ptr() // 64) * 64
    load(path, source.symbol)(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2, workspace))
    out = values["out"]
    if mask.allows_all:
        scores = chosen_of(q, k, AttentionSpec(mask, None, how), None, SCALE).scores
        check_bytes(out, bytes_of(scores, v.repeat_interleave(2, 1)))
    want, _ = reference(q, k, v, AttentionSpec(mask, None, how), None, SCALE)
    torch.testing.assert_close(out, want, rtol=0, atol=4 * BYTES * float(v.abs().max()))
    if multiplies_bytes(cpu_target()):
        real, _ = run(how, mask, isa=None)
        torch.testing.assert_close(out, real, rtol=0, atol=1e-5)


def test_it_compiles_for_avx512_with_and_without_vnni() -> None:
    for extensions in (frozenset({"avx512_vnni"}), frozenset[str]()):
        on = dataclasses.replace(cpu_target(), arch=Isa.AVX512.value, features=extensions)
        assert build([render(Int8Kernel(16, 16).spec)], on, headers=header_folder(on))
