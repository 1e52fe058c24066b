"""The kernel of DEQ and Sanger against their reference: integers and decisions element by element, on instruction sets.

Values are the identity, so outputs are weights, and with the log-sum-exp every score can be told.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from dot_bytes import MODEL, NARROW, bytes_of, check_bytes, target
from torch import Tensor

from fuser import DEQ, Sanger, SoftCap, masks
from fuser.attention.launch import run_plan
from fuser.attention.reference import chosen_of, reference
from fuser.codegen.render import header_folder, render
from fuser.ir.attention import AttentionSpec
from fuser.ir.graph import TensorSpec
from fuser.ir.masks import Mask
from fuser.ir.prediction import Prediction
from fuser.ir.scores import ScoreRule
from fuser.ir.target import Isa, Target
from fuser.kernels import attention_int8 as int8
from fuser.kernels.attention import Operands, call_of
from fuser.kernels.attention_predicted import PredictedAttention, PredictedKernel
from fuser.kernels.base import Literal
from fuser.kernels.planner import plan
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cpuinfo import detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

NATIVE = detect_isa()
ISAS = pytest.mark.parametrize("isa", dict.fromkeys([None, NATIVE, Isa.PORTABLE, *NARROW]))
Q_LEN, KV_LEN, WIDTH = 70, 60, 22
SCALE = 0.4
MASKS: list[Mask] = [masks.Dense(), masks.Longformer(6, 2), masks.Strided(7), masks.Causal()]
NEVER = {"threshold": 1.0, "empty_row": "predicted"}


def multiplies_bytes(how: Prediction, on: Target) -> bool:
    """Whether weights become 255ths of the largest in their row and block; values are 127ths of one already."""
    return how.high_bits is not None and not how.prunes and int8.multiplies_bytes(on)


@functools.cache
def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of four heads, which share two of the keys; outliers, zeros and a constant row among them."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 4, Q_LEN, WIDTH, generator=g), torch.randn(2, 2, KV_LEN, WIDTH, generator=g)
    q[0, 0, 3], k[1, 1, 7], q[1, 2, 4], k[0, 0, 9, 3] = 0.0, 0.0, 2.0, 40.0
    v = torch.eye(KV_LEN).expand(2, 2, KV_LEN, KV_LEN).contiguous()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    how: Prediction,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    dtype: torch.dtype = torch.float32,
    isa: Isa | str | None = NATIVE,
    threads: int = 2,
    rows: int = Q_LEN,
) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exps of the kernel."""
    q, k, v = inputs(dtype)
    q = q[:, :, :rows]
    on = target(isa)
    out, lse = torch.full((2, 4, rows, KV_LEN), 7.0).to(dtype), torch.full((2, 4, rows), 7.0)
    run_plan(q, k, v, plan(mask, rows, KV_LEN, on), attn_mask, SCALE, out, lse, on, rule, how)
    return out, lse


def check(
    how: Prediction,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    dtype: torch.dtype = torch.float32,
    isa: Isa | str | None = NATIVE,
) -> None:
    q, k, v = inputs(dtype)
    spec = AttentionSpec(mask, rule, how)
    weights, lse = run(how, mask, attn_mask, rule, dtype, isa)
    want, want_lse = reference(q, k, v, spec, attn_mask, SCALE)
    seen = ~want_lse.isneginf()
    assert torch.equal(seen, ~lse.isneginf()) and not weights[~seen].any()
    torch.testing.assert_close(lse[seen], want_lse[seen], rtol=1e-6, atol=5e-6)
    if multiplies_bytes(how, target(isa)):
        torch.testing.assert_close(weights, want, rtol=0, atol=0.875 / 255 + torch.finfo(dtype).eps)
        return
    # Where bf16 numbers are multiplied, weights are rounded to them.
    rounding = 2.0**-8 if "avx512_bf16" in target(isa).features else 0.0
    torch.testing.assert_close(weights, want, rtol=rounding, atol=1e-6 + torch.finfo(dtype).eps / 2)
    if dtype != torch.float32:
        return
    # What a score must be for its weight, where the weight has digits enough to tell.
    found = weights.log() + lse[..., None]
    chosen = chosen_of(q, k, spec, attn_mask, SCALE)
    clear = want > 1e-5
    torch.testing.assert_close(found[clear], chosen.scores[clear], rtol=0, atol=3e-5 + 1.01 * rounding)
    if how.prunes:
        assert chosen.full is not None and torch.equal(weights[chosen.full] > 0, want[chosen.full] > 0)
        assert not weights[~chosen.full].any()


@ISAS
def test_predicted_scores_are_products_of_integers(isa: Isa | str | None) -> None:
    """With nothing chosen, every score is a whole number times two steps, the one that PyTorch finds."""
    q, k, _ = inputs()
    weights, lse = run(DEQ(high_bits=None, **NEVER), masks.Dense(), isa=isa)  # type: ignore[arg-type]
    (q_codes, q_step), (k_codes, k_step) = DEQ().codes(q, 0), DEQ().codes(k.repeat_interleave(2, 1), 1)
    steps = (q_step * SCALE) * k_step.mT
    whole = (weights.log() + lse[..., None]) / steps
    sure = (steps > 0.02) & (weights > 1e-6)
    assert sure.float().mean() > 0.9
    assert torch.equal(whole[sure].round(), (q_codes @ k_codes.mT)[sure])


@ISAS
@pytest.mark.parametrize("high_bits", [8, None])
def test_what_is_chosen_of_rows_is_computed_with_more_bits(high_bits: int | None, isa: Isa | str | None) -> None:
    for mask in MASKS:
        for threshold in (0.02, 0.4, 1.0):
            check(DEQ(threshold=threshold, high_bits=high_bits), mask, isa=isa)
    if isa is None:
        check(DEQ(threshold=0.1, high_bits=high_bits), masks.Longformer(6, 2), dtype=torch.bfloat16, isa=isa)


@ISAS
@pytest.mark.parametrize("how", [DEQ(), DEQ(**NEVER), Sanger()])  # type: ignore[arg-type]
def test_scores_have_the_bits_of_the_reference(how: Prediction, isa: Isa | str | None) -> None:
    """A row that sees one key, its best, has its score for a log-sum-exp."""
    q, k, _ = inputs()
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        key = torch.randint(KV_LEN, (Q_LEN,), generator=generator)
        one = torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)
        one[torch.arange(Q_LEN), key] = True
        mask = masks.from_dense(one)
        _, lse = run(how, mask, isa=isa)
        scores = chosen_of(q, k, AttentionSpec(mask, None, how), None, SCALE).scores
        # Where values are bytes, the logarithm of their step comes and goes.
        near = 3e-6 if multiplies_bytes(how, target(isa)) else 0.0
        torch.testing.assert_close(lse, scores[..., torch.arange(Q_LEN), key], rtol=0, atol=near)


@pytest.mark.skipif(
    not int8.multiplies_bytes(cpu_target()), reason="this CPU does not multiply bytes in one instruction"
)
def test_weights_are_bytes_of_scores_that_were_chosen_from() -> None:
    """Each of which is the reference's, low or high, so that a wrong decision would show."""
    q, k, v = inputs()
    for threshold in (0.02, 0.3):
        how = DEQ(threshold=threshold)
        out, _ = run(how, masks.Dense(), isa=None)
        chosen = chosen_of(q, k, AttentionSpec(masks.Dense(), None, how), None, SCALE)
        assert chosen.full is not None and 0.02 < chosen.full.float().mean() < 0.9
        check_bytes(out, bytes_of(chosen.scores, v.repeat_interleave(2, 1)), 1.0)


def test_the_largest_of_a_sample_or_a_head_is_of_all_its_rows() -> None:
    sample = DEQ.from_config("adamax_nb80")
    head = DEQ("adaptive_maximum_threshold", 0.05, "head", bits=6, calibration="static", thresholds=(0.6, 0.5))
    for mask in MASKS[:2]:
        check(sample, mask)
        check(head, mask, dtype=torch.bfloat16)


def test_inverse_methods_choose_what_is_unimportant() -> None:
    for threshold in (1e-3, 0.02):
        average = DEQ("inv_probability_threshold", threshold, bits=8, calibration="ema")
        check(average.calibrated(*inputs()[:2]), MASKS[2])


def test_sanger_leaves_out_what_is_not_chosen() -> None:
    """Under a mask, a bias that counts in decisions, and a rule."""
    bias = 2 * torch.randn(1, 4, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(2))
    bias[..., 50:] = -1e4
    bias[:, :, 5:9, 3:] = -math.inf
    for mask in MASKS[:2]:
        for threshold in (5e-3, 0.05, 0.9):
            check(Sanger(threshold=threshold), mask, bias.expand(2, -1, -1, -1), SoftCap(8.0))
        check(Sanger(threshold=0.05), mask, bias.expand(2, -1, -1, -1), SoftCap(8.0), isa=None)


def test_threads_and_numbers_of_rows_change_nothing() -> None:
    how = DEQ(threshold=0.3)
    whole = run(how, masks.Dense(), threads=1)
    for threads, rows in ((2, Q_LEN), (3, Q_LEN), (2, 1), (2, 9)):
        part = run(how, masks.Dense(), threads=threads, rows=rows)
        assert all(torch.equal(a[:, :, :rows], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("how", [DEQ(threshold=1.0, empty_row="dense"), Sanger(threshold=1.0, empty_row="zero")])
def test_heads_where_nothing_is_above_a_limit(how: Prediction) -> None:
    """All rows are computed whole, or give zeros; with the other answers they are in the tests above."""
    q, k, _ = inputs()
    full = chosen_of(q, k, AttentionSpec(MASKS[1], None, how), None, SCALE).full
    assert full is not None and torch.equal(full, MASKS[1].dense(Q_LEN, KV_LEN).expand_as(full) & (not how.prunes))
    check(how, MASKS[1])


def test_outliers_leave_the_numbers_of_other_rows() -> None:
    q, k, v = (t.clone() for t in inputs())
    on, how, mask = target(NATIVE), DEQ(threshold=0.4), masks.Dense()
    k[0, 0, 5, 2], q[1, 0, 6, 3] = 1e4, -1e4
    out, lse = torch.empty(2, 4, Q_LEN, KV_LEN), torch.empty(2, 4, Q_LEN)
    run_plan(q, k, v, plan(mask, Q_LEN, KV_LEN, on), None, SCALE, out, lse, on, None, how)
    want, want_lse = reference(q, k, v, AttentionSpec(mask, None, how), None, SCALE)
    # Scores are as large as 1e4, of which fp32 holds three digits behind the point.
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=2e-3)
    rounding = 0.875 / 255 if multiplies_bytes(how, on) else 2.0**-8 if "avx512_bf16" in on.features else 2e-3
    torch.testing.assert_close(out, want, rtol=0, atol=rounding)
    before, _ = run(how, mask)
    assert torch.equal(out[1, 2:], before[1, 2:]) and torch.equal(out[1, 0, :6], before[1, 0, :6])


@pytest.mark.parametrize("poison", [math.inf, -math.inf])
def test_infinity_does_what_it_does_in_exact_attention(poison: float) -> None:
    q, k, v = (t.clone() for t in inputs())
    on, how, mask = target(NATIVE), DEQ(), masks.Strided(7)
    k[:, :, 21, 0] = poison
    out, lse = torch.empty(2, 4, Q_LEN, KV_LEN), torch.empty(2, 4, Q_LEN)
    run_plan(q, k, v, plan(mask, Q_LEN, KV_LEN, on), None, SCALE, out, lse, on, None, how)
    want, want_lse = reference(q, k, v, AttentionSpec(mask, None, how), None, SCALE)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isfinite(), want_lse.isfinite())
    sound = want.isfinite()
    assert sound[:, :, 21].any() and not sound[:, :, 21].all()
    rounding = 2.0**-8 if "avx512_bf16" in on.features else 1e-6
    torch.testing.assert_close(out[sound], want[sound], rtol=0, atol=rounding)


def test_poison_reaches_rows_that_may_see_it() -> None:
    q, k, v = (t.clone() for t in inputs())
    on, how = target(NATIVE), DEQ()
    mask = masks.Strided(7)
    sees = mask.dense(Q_LEN, KV_LEN)[:, 21]
    results = []
    for poison in (0.0, math.nan):
        k[:, :, 21, 0] += poison
        out, lse = torch.empty(2, 4, Q_LEN, KV_LEN), torch.empty(2, 4, Q_LEN)
        run_plan(q, k, v, plan(mask, Q_LEN, KV_LEN, on), None, SCALE, out, lse, on, None, how)
        results.append(out)
    assert torch.equal(results[0][:, :, ~sees], results[1][:, :, ~sees])
    assert results[1][:, :, sees].isnan().all()


def test_one_kernel_serves_all_thresholds() -> None:
    kernels = {
        PredictedKernel(64, 64, form=how.form).spec.hash
        for how in (DEQ(), DEQ(threshold=0.5), DEQ(granularity="seq", threshold=0.9))
    }
    other = PredictedKernel(64, 64, form=DEQ(bits=8).form).spec.hash
    assert len(kernels) == 1 and other not in kernels


def test_dot_products_of_vnni_give_the_same_bits() -> None:
    """The code around the instruction, with a model of it in its place."""
    q, k, v = inputs()
    how, on = DEQ(bits=8, high_bits=None, threshold=0.3), target(NATIVE)
    operands = Operands(*(TensorSpec.contiguous(t.shape, t.dtype) for t in (q, k, v, q.new_empty(2, 4, Q_LEN, KV_LEN))))
    parameters = PredictedAttention(PredictedKernel(WIDTH, KV_LEN, form=how.form), how)
    call = call_of(masks.Dense(), operands, ("q", "k", "v"), ("out",), SCALE, parameters, on, 2)
    source = render(call.spec)
    texts = [source.text, MODEL + source.text]
    results = []
    for text in texts:
        path = build([dataclasses.replace(source, text=text)], on, headers=header_folder(on))[source.symbol]
        values = {"q": q, "k": k, "v": v, "out": torch.full((2, 4, Q_LEN, KV_LEN), math.nan)}
        tensors = [ref.tensor if isinstance(ref, Literal) else values[str(ref)] for ref in call.tensors]
        scratch = torch.empty(call.workspace_bytes // 4 + 16)
        workspace = -(-scratch.data_ptr() // 64) * 64
        load(path, source.symbol)(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2, workspace))
        results.append(values["out"])
    assert torch.equal(results[0], results[1])
    want, _ = reference(q, k, v, AttentionSpec(masks.Dense(), None, how), None, SCALE)
    torch.testing.assert_close(results[1], want, rtol=0, atol=1e-6)


def test_it_compiles_for_avx512_with_and_without_vnni() -> None:
    for features, bits in ((frozenset({"avx512_vnni"}), 4), (frozenset(), 8)):
        on = dataclasses.replace(cpu_target(), arch=Isa.AVX512.value, features=features)
        assert build([render(PredictedKernel(16, 16, form=DEQ(bits=bits).form).spec)], on, headers=header_folder(on))


def test_values_of_what_is_left_out_do_not_matter() -> None:
    q, k, v = (t.clone() for t in inputs())
    v[:, :, 30] = math.nan
    how, rule, bias, on = Sanger(threshold=0.05), SoftCap(8.0), torch.zeros(2, 4, Q_LEN, KV_LEN), target(NATIVE)
    out, lse = torch.empty(2, 4, Q_LEN, KV_LEN), torch.empty(2, 4, Q_LEN)
    run_plan(q, k, v, plan(masks.Dense(), Q_LEN, KV_LEN, on), bias, SCALE, out, lse, on, rule, how)
    full = chosen_of(q, k, AttentionSpec(masks.Dense(), rule, how), bias, SCALE).full
    assert full is not None and 0 < full[..., 30].sum() < full[..., 30].numel() / 2
    assert torch.equal(out.isnan().all(-1), full[..., 30])
    want, _ = run(how, masks.Dense(), bias, rule)
    torch.testing.assert_close(out[~full[..., 30]], want[~full[..., 30]])
