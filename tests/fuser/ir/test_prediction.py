"""DEQ and Sanger against data of the authors' software, and what they promise about their decisions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import fuser
from fuser import DEQ, Sanger
from fuser.ir.errors import FuserError, ScoreError
from fuser.ir.prediction import BITS, EMA_DECAY, GRANULARITIES, METHODS, Prediction

GOLDEN = Path(__file__).parents[2] / "golden" / "deq"
DATA = load_file(GOLDEN / "deq_sanger.safetensors")
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
Q, K, V, MASK = (DATA[name] for name in ("q", "k", "v", "additive_mask"))
THRESHOLDS = float(DATA["threshold_q4"]), float(DATA["threshold_k4"])


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


# ---- the authors' software


@pytest.mark.parametrize("name", CASES)
def test_decisions_and_outputs_are_those_of_the_authors_software(name: str) -> None:
    sanger = name.startswith("sanger")
    kind: type[Prediction] = Sanger if sanger else DEQ
    rule = CASES[name] | ({"method": "probablity_threshold"} if sanger else {})
    spec = kind.from_config(rule, calibration="static", thresholds=THRESHOLDS)
    out, chosen = spec.reference(Q, K, V, additive_mask=MASK)
    names = (f"{name}.keep", f"{name}.output") if sanger else (f"deq.{name}.refine", f"deq.{name}.output")
    assert torch.equal(chosen, DATA[names[0]])
    torch.testing.assert_close(out, DATA[names[1]], rtol=0, atol=1e-12)
    if not sanger:
        assert DEQ.from_config(name, calibration="static", thresholds=THRESHOLDS) == spec


@pytest.mark.parametrize("bits", BITS)
def test_predicted_scores_are_those_of_the_authors_software(bits: int) -> None:
    want = DATA[f"score{bits}"]
    got = DEQ(bits=bits, calibration="static", thresholds=THRESHOLDS).predicted(Q, K, 0.25)
    torch.testing.assert_close(got[:, : want.shape[1]], want, rtol=0, atol=1e-12)


def test_one_step_of_calibration_finds_the_largest_elements() -> None:
    found = DEQ(calibration="ema").calibrated(Q, K)
    largest = tuple(float((t / t.norm(dim=-1, keepdim=True)).abs().max()) for t in (Q, K))
    assert found.thresholds == pytest.approx(largest, rel=1e-15)
    # A second step keeps nearly all of the average.
    moved = found.calibrated(2 * Q, K.roll(1, -1) * 3)
    assert moved.thresholds == pytest.approx(largest, rel=1e-12)
    other = torch.nn.functional.one_hot(torch.tensor([[[0]]]), 16).double()
    expected = [EMA_DECAY * t + (1 - EMA_DECAY) for t in largest]
    assert found.calibrated(other, other).thresholds == pytest.approx(expected, rel=1e-12)
    dynamic, average = (spec.predicted(Q, K, 0.25) for spec in (DEQ(calibration="dynamic"), found))
    assert torch.equal(dynamic, average)


# ---- names and configurations


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("adamax_nb80", {"threshold": 0.8, "granularity": "batch", "before_softmax": True}),
        ("adamax_h50", {"threshold": 0.5, "granularity": "head", "before_softmax": False}),
        ("gpt2_adamax_ns80.json", {"threshold": 0.8, "granularity": "seq", "before_softmax": True}),
        ("refine_2e-3", {"method": "probability_threshold", "threshold": 2e-3}),
        ("bert_base_refine_2e1", {"method": "probability_threshold", "threshold": 1.0}),
        ("refine_inv_2e-2", {"method": "inv_probability_threshold", "threshold": 2e-2}),
    ],
)
def test_names_of_configurations_of_deq(name: str, fields: dict[str, Any]) -> None:
    spec = DEQ.from_config(name)
    assert {key: getattr(spec, key) for key in fields} == fields
    assert (spec.bits, spec.normalize, spec.empty_row, spec.calibration) == (4, True, "predicted", "dynamic")
    assert spec.unmasked_maximum == spec.before_softmax


def test_configurations_of_models_are_read_with_their_spelling() -> None:
    spec = Sanger.from_config("sanger_2e-3")
    assert (spec.method, spec.threshold, spec.empty_row) == ("probability_threshold", 2e-3, "dense")
    config = {
        "hidden_size": 768,
        "normalize_qk": "inner_product",
        "quant_qk": {"method": "sym", "bitwidth": 4},
        "prune_score": {"method": "probablity_threshold", "threshold": 2e-3},
    }
    assert Sanger.from_config(config) == spec
    refine = {"method": "adaptive_maximum_threshold", "max_pct": 0.8, "granuality": "batch", "before_softmax": True}
    assert DEQ.from_config({"quant_qk": {"bitwidth": 8}, "refine_score": refine}) == DEQ(
        threshold=0.8,
        granularity="batch",
        before_softmax=True,
        bits=8,
        high_bits=None,
        normalize=False,
        calibration="dynamic",
        empty_row="predicted",
        unmasked_maximum=True,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEQ.from_config("sanger_2e-3"), "no configuration 'sanger_2e-3' with refine_score"),
        (lambda: Sanger.from_config("adamax_nb80"), "no configuration 'adamax_nb80' with prune_score"),
        (lambda: DEQ.from_config({"method": "otsu_threshold"}), "refused by the authors"),
        (lambda: DEQ.from_config({"method": "otsu"}), "method must be 'probability_threshold' or"),
        (lambda: DEQ.from_config({"method": "probablity_threshold", "treshold": 1}), "no key treshold"),
        (lambda: DEQ.from_config({"quant_qk": {"method": "asym"}, "refine_score": {}}), "symmetric method"),
        (lambda: DEQ.from_config({"quant_qk": {"bitwidth": 4}}), "no refine_score"),
        (lambda: DEQ(bits=3), "bits must be one of 2, 4, 6, 8"),
        (lambda: DEQ(bits=4.0), "bits must be one of"),
        (lambda: DEQ(threshold=1.5), "threshold must be from 0 to 1"),
        (lambda: DEQ(threshold=math.nan), "threshold must be from 0 to 1"),
        (lambda: DEQ(threshold="high"), "threshold must be a number"),
        (lambda: DEQ(granularity="row"), "granularity must be 'seq' or 'head' or 'batch'"),
        (lambda: DEQ(calibration="static"), "static calibration takes thresholds"),
        (lambda: DEQ(thresholds=(1.0, 1.0)), "not of 'row'"),
        (lambda: DEQ(calibration="static", thresholds=(0.5, 0.0)), "finite numbers above zero"),
        (lambda: DEQ(calibration="static", thresholds=(0.5,)), "two numbers"),
        (lambda: DEQ(calibration="static", thresholds=(math.inf, 1.0)), "finite numbers above zero"),
        (lambda: DEQ(method="probability_threshold", before_softmax=True), "takes an adaptive maximum"),
        (lambda: DEQ(unmasked_maximum=True), "takes before_softmax=True"),
        (lambda: DEQ(empty_row="zero"), "empty_row must be 'argmax' or 'dense' or 'predicted'"),
        (lambda: Sanger(empty_row="predicted"), "empty_row must be 'argmax' or 'dense' or 'zero'"),
        (lambda: Sanger(method="inv_probability_threshold"), "method must be"),
        (lambda: DEQ(calibration="ema").predicted(Q, K, 1.0), "no thresholds yet"),
        (lambda: DEQ().calibrated(Q, K), "only ema calibration"),
        (lambda: DEQ(calibration="ema").calibrated(0 * Q, K), "not all zero"),
        (lambda: DEQ(calibration="ema").calibrated(Q, K * math.nan), "finite rows"),
    ],
)
def test_what_is_no_specification_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        make()
    assert issubclass(ScoreError, FuserError)


def test_specifications_are_values() -> None:
    assert DEQ(threshold=0.5) == DEQ(threshold=0.5) and len({DEQ(), DEQ(), Sanger()}) == 2
    assert fuser.DEQ is DEQ and DEQ().form == DEQ(threshold=0.7).form != DEQ(bits=8).form


@pytest.mark.parametrize(
    ("spec", "by_row"),
    [
        (DEQ(), True),
        (DEQ(before_softmax=True), True),
        (DEQ(calibration="static", thresholds=(1.0, 1.0)), True),
        # A probability is of one row, whatever a maximum would be of.
        (Sanger(granularity="batch"), True),
        (DEQ(calibration="dynamic"), False),
        (DEQ(granularity="head"), False),
        (DEQ.from_config("adamax_nb80"), False),
    ],
)
def test_rows_decide_for_themselves_unless_they_are_compared(spec: Prediction, by_row: bool) -> None:
    q, k, _ = inputs(2, 3, 9, 16)
    chosen = spec.chosen(spec.predicted(q, k, 0.5))
    # Beside rows of one large element.
    q[:, :, 4:] = 0.0
    q[:, :, 4:, 0] = 9.0
    others = spec.chosen(spec.predicted(q, k, 0.5))
    assert spec.is_by_row == by_row == torch.equal(others[:, :, :4], chosen[:, :, :4])


# ---- decisions


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
    st.integers(0, 1000),
)
def test_limits_decide_as_the_rules_do(
    method: str, granularity: str, before: bool, threshold: float, seed: int
) -> None:
    """What the rules say of probabilities, computed as they are written."""
    adaptive = "adaptive" in method
    spec = DEQ(method, threshold, granularity, before_softmax=before and adaptive, empty_row="predicted")
    scores = 2 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[:, :, 1, 3:] = -math.inf
    compared = scores if spec.before_softmax else torch.softmax(scores, -1)
    over = {"seq": (-1,), "head": (-2, -1), "batch": (-3, -2, -1)}[granularity]
    limit: Any = threshold * compared.amax(over, keepdim=True) if adaptive else threshold
    want = compared <= limit if spec.is_inverse else compared > limit
    want &= scores > -math.inf
    sure = ~torch.isclose(compared, torch.as_tensor(limit, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.equal(spec.chosen(scores)[sure], want[sure])


@pytest.mark.parametrize("spec", [DEQ(threshold=1.0), Sanger(threshold=1.0), DEQ("probability_threshold", 1.0)])
def test_a_row_without_a_choice_computes_its_best_score_in_full(spec: Prediction) -> None:
    q, k, v = inputs(1, 2, 6, 8)
    _, chosen = spec.reference(q, k, v)
    predicted = spec.predicted(q, k, 8**-0.5)
    assert torch.equal(chosen, predicted == predicted.amax(-1, keepdim=True))


def test_the_other_answers_to_rows_without_a_choice() -> None:
    q, k, v = inputs(1, 2, 6, 8)
    out, chosen = Sanger(threshold=1.0, empty_row="zero").reference(q, k, v)
    assert not chosen.any() and not out.any()
    out, chosen = Sanger(threshold=1.0, high_bits=None, empty_row="dense").reference(q, k, v)
    assert chosen.all()
    torch.testing.assert_close(out, dense(q, k, v))
    out, chosen = DEQ(threshold=1.0, empty_row="predicted").reference(q, k, v)
    predicted = DEQ().predicted(q, k, 8**-0.5)
    assert not chosen.any()
    torch.testing.assert_close(out, torch.softmax(predicted, -1) @ v)


def test_padding_sets_the_maximum_before_softmax_only_for_the_authors() -> None:
    q, k, v = inputs(1, 1, 4, 8)
    k[:, :, 3] = 50 * q.mean(2)
    mask = torch.tensor([0.0, 0.0, 0.0, -1e4])
    ours = DEQ(threshold=0.8, before_softmax=True)
    theirs = DEQ(threshold=0.8, before_softmax=True, unmasked_maximum=True, empty_row="predicted")
    assert ours.reference(q, k, v, additive_mask=mask)[1][..., :3].any()
    positive = ours.predicted(q, k, 1.0)[..., 3] > 0
    assert not theirs.reference(q, k, v, additive_mask=mask)[1][..., :3][positive].any()


# ---- numbers


@pytest.mark.parametrize("calibration", ["row", "dynamic"])
@pytest.mark.parametrize("spec", [DEQ, Sanger])
def test_everything_in_full_is_exact_attention(spec: Any, calibration: str) -> None:
    q, k, v = inputs(2, 3, 9, 16, dtype=torch.float64)
    how = spec(method="probability_threshold", threshold=0.0, calibration=calibration, high_bits=None)
    out, chosen = how.reference(q, k, v)
    assert chosen.all()
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)


def test_what_is_chosen_is_a_product_of_rows_in_8_bits() -> None:
    q, k, v = inputs(2, 3, 9, 16, dtype=torch.float64)
    near = []
    for rows in (q, k):
        step = rows.abs().amax(-1, keepdim=True) / 127
        near.append((rows / step).round() * step)
    for how in (DEQ(method="probability_threshold", threshold=0.0, bits=2), DEQ(threshold=0.2), Sanger(threshold=0.1)):
        out, chosen = how.reference(q, k, v)
        assert chosen.any()
        want = near[0] @ near[1].mT / 4
        want = want.masked_fill(~chosen, -math.inf) if how.prunes else want.where(chosen, how.predicted(q, k, 1 / 4))
        torch.testing.assert_close(out, torch.softmax(want, -1) @ v, rtol=0, atol=1e-12)
        # Eight bits are enough for what is important: a score is within about 2 / 127 of its rows' lengths.
        exact = dataclasses.replace(how, high_bits=None).reference(q, k, v)[0]
        assert 0 < float((out - exact).norm() / exact.norm()) < 0.02


def test_more_bits_are_nearer() -> None:
    q, k, _ = inputs(1, 2, 32, 64)
    exact = q @ k.mT / 8
    errors = [float((DEQ(bits=bits).predicted(q, k, 1 / 8) - exact).norm() / exact.norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    # A code is within half a step: L steps are the largest of 64 normal numbers, about 2.5.
    assert all(error < 2.5 / (2 ** (bits - 1) - 1) for bits, error in zip(BITS, errors, strict=True))


def test_constant_rows_zeros_and_outliers_stay_finite() -> None:
    q, k, v = inputs(1, 2, 5, 8)
    q[:, :, 0], k[:, :, 1] = 0.0, 0.0
    q[:, :, 1], k[:, :, 2] = 3.0, -2.0
    k[:, :, 3, 0], q[:, :, 2, 5] = 1e4, -1e4
    q[:, :, 3] = 1e-35
    for calibration in ("row", "dynamic"):
        for spec in (DEQ(calibration=calibration), Sanger(calibration=calibration)):
            predicted = spec.predicted(q, k, 1.0)
            assert not predicted[:, :, (0, 3)].any() and not predicted[..., 1].any()
            assert spec.reference(q, k, v)[0].isfinite().all()
    # A constant row is its largest element everywhere: no rounding but that of the arithmetic.
    codes, step = DEQ().codes(q, 0)
    torch.testing.assert_close((codes * step)[:, :, 1], q[:, :, 1])
    everything = torch.zeros(1, 2, 4, 8)
    assert not DEQ(calibration="dynamic").predicted(everything, everything, 1.0).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", [DEQ(calibration="dynamic"), Sanger()])
def test_poison_does_what_it_does_in_exact_attention(spec: Prediction, poison: float) -> None:
    q, k, v = inputs(1, 2, 5, 8)
    mask = torch.zeros(5, 5)
    mask[:3, 4] = -math.inf
    clean = spec.reference(q, k[:, :, :4], v[:, :, :4])[0][:, :, :3]
    k[:, :, 4, 2] = poison
    out, chosen = spec.reference(q, k, v, additive_mask=mask)
    assert chosen[:, :, 3:, 4].all()
    torch.testing.assert_close(out[:, :, :3], clean)
    assert torch.equal(out[:, :, 3:].isnan(), dense(q, k, v)[:, :, 3:].isnan())


@pytest.mark.parametrize("high_bits", [8, None])
def test_gradients_pass_codes_as_if_they_were_not_rounded(high_bits: int | None) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 4, 8, dtype=torch.float64))
    spec = DEQ(threshold=0.6, high_bits=high_bits)
    out, chosen = spec.reference(q, k, v)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    # The same with scores that are linear in q and k: products of dequantized rows, of 8 bits where chosen, or exact.
    of_bytes = DEQ(bits=8)

    def product(how: DEQ) -> Tensor:
        q_near, k_near = how.rounded(q.detach(), 0), how.rounded(k.detach(), 1)
        return (q - q.detach() + q_near) @ (k - k.detach() + k_near).mT

    high = q @ k.mT if high_bits is None else product(of_bytes)
    scores = torch.where(chosen, high, product(spec)) / math.sqrt(8)
    want = torch.autograd.grad(((torch.softmax(scores, -1) @ v) * weights).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_groups_of_heads_share_keys_and_16_bits_are_computed_in_32() -> None:
    q, k, v = (t.bfloat16() for t in inputs(2, 4, 6, 16))
    k, v = k[:, :2], v[:, :2]
    out, chosen = DEQ().reference(q, k, v)
    wide = (t.float().repeat_interleave(2, 1) for t in (k, v))
    want, decisions = DEQ().reference(q.float(), *wide)
    assert out.dtype == torch.bfloat16 and torch.equal(chosen, decisions) and torch.equal(out, want.bfloat16())
