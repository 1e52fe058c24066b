"""What every kind of operator computes, against its definition, and what a kind must have."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from semantics import CASES, FORBIDDEN, SAMPLES, SCORES, normal
from torch import Tensor

from fuser.ir.expression import Op, layer_norm, unary
from fuser.ir.masks import Causal
from fuser.ir.operators import (
    KINDS,
    PV,
    QK,
    Activation,
    Bias,
    ChangeScores,
    Extern,
    Gemm,
    Norm,
    PatternMask,
    Residual,
    Scale,
    Semantics,
    Softmax,
    SplitHeads,
    kind,
)
from fuser.ir.scores import SoftCap


def concrete(kind: type[Semantics] = Semantics) -> Iterator[type[Semantics]]:
    """All kinds of the package, registered or not."""
    for found in kind.__subclasses__():
        yield from concrete(found)
        ours = found.__module__.startswith("fuser.") and not found.__name__.startswith("_")
        if ours and not getattr(found, "__abstractmethods__", None):
            yield found


def test_every_kind_is_registered_and_tested() -> None:
    found = set(concrete())
    assert found <= set(KINDS)
    assert found == set(CASES)


@pytest.mark.parametrize("of", CASES, ids=lambda of: of.__name__)
def test_a_kind_computes_its_definition(of: type[Semantics]) -> None:
    case = CASES[of]
    torch.testing.assert_close(case.semantics.evaluate(*case.inputs), case.expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", [of for of in CASES if SAMPLES[of].expression], ids=lambda of: of.__name__)
def test_kernels_compute_what_the_reference_does(of: type[Semantics]) -> None:
    expression = SAMPLES[of].expression
    assert expression is not None
    for got, expected in zip(expression.evaluate(*CASES[of].inputs), CASES[of].expected, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-12, atol=1e-12)


def test_only_a_masked_softmax_gives_zeros_to_a_row_that_sees_nothing() -> None:
    row = torch.full((1, 3), -math.inf)
    assert Softmax(masked=True).evaluate(row)[0].tolist() == [[0.0, 0.0, 0.0]]
    assert bool(Softmax(masked=False).evaluate(row)[0].isnan().all())


def test_a_weight_may_lie_either_way() -> None:
    x, weight = normal(3, 4), normal(4, 5)
    torch.testing.assert_close(Gemm(False).evaluate(x, weight), Gemm(True).evaluate(x, weight.T.contiguous()))


def test_a_causal_mask_and_a_pattern_both_forbid() -> None:
    (both,) = PatternMask(True, SAMPLES[PatternMask].pattern).evaluate(SCORES)  # type: ignore[attr-defined]
    expected = [[FORBIDDEN[i, j].item() or j > i for j in range(6)] for i in range(6)]
    assert torch.isneginf(both[1, 2]).tolist() == expected


def test_products_count_a_multiplication_and_an_addition_for_each_term() -> None:
    assert Gemm(True).flops([(3, 5, 7), (11, 7)], (3, 5, 11)) == 2 * 3 * 5 * 7 * 11
    assert QK().flops([(2, 4, 6, 8), (2, 2, 5, 8)], (2, 4, 6, 5)) == 2 * 2 * 4 * 6 * 5 * 8
    assert PV().flops([(2, 4, 6, 5), (2, 2, 5, 8)], (2, 4, 6, 8)) == 2 * 2 * 4 * 6 * 5 * 8
    assert Bias().flops([(3, 8), (8,)], (3, 8)) == 24


def test_words_for_pictures() -> None:
    assert Gemm(True).describe([(3, 768), (3072, 768)], (3, 3072)) == "768 → 3072"
    assert Scale(0.125).describe([(3, 8)], (3, 8)) == "× 0.125"
    assert SAMPLES[Norm].describe([(3, 8)], (3, 8)) == SAMPLES[Bias].describe([(3, 8)], (3, 8)) == "over 8"
    assert PatternMask(True).describe([], ()) == "causal"
    assert PatternMask(True, Causal()).describe([], ()) == f"causal, {Causal()}"
    assert SAMPLES[SplitHeads].describe([], ()) == "split heads"


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=lambda sample: type(sample).__name__)
def test_kinds_travel_to_other_processes(sample: Semantics) -> None:
    copy = pickle.loads(pickle.dumps(sample))
    assert copy == sample and copy.signature == sample.signature and hash(copy) == hash(sample)


def test_signatures_tell_all_fields_apart_to_the_last_bit() -> None:
    different = [
        *SAMPLES.values(),
        Gemm(transposed=False),
        Softmax(masked=False),
        Scale(math.nextafter(0.125, 1.0)),
        ChangeScores(SoftCap(math.nextafter(2.0, 3.0))),
        Norm(layer_norm(math.nextafter(1e-5, 1.0))),
        Activation(unary(Op.RELU)),
        Residual(unary(Op.GELU)),
        PatternMask(causal=True),
        PatternMask(pattern=Causal()),
        dataclasses.replace(SAMPLES[Extern], reason="another"),  # type: ignore[type-var]
    ]
    assert len({semantics.signature for semantics in different}) == len(different)


def test_a_kind_that_lacks_a_method_fails_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="the kind Forgetful lacks describe, evaluate"):

        @kind("forgetful")
        @dataclasses.dataclass(frozen=True)
        class Forgetful(Semantics):
            def flops(self, inputs: object, output: object) -> float:
                return 0.0


def test_a_kind_that_is_no_frozen_dataclass_fails_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="the kind Changing must be a frozen dataclass"):

        @kind("changing")
        @dataclasses.dataclass
        class Changing(Semantics):
            factor: float

            def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
                return inputs

            def flops(self, inputs: object, output: object) -> float:
                return 0.0

            def describe(self, inputs: object, output: object) -> str:
                return ""
