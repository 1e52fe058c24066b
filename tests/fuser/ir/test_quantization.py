"""Rounding rows to int8, and products of such rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuser.ir.operators import Int8Gemm
from fuser.ir.quantization import TINY, Fixed, exact_products, quantize_rows


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(-25, 25), st.integers(0, 2**31))
def test_elements_are_half_a_step_off_at_most(rows: int, columns: int, power: float, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    integers, scales = quantize_rows(x)
    assert integers.dtype is torch.int8 and scales.dtype is torch.float32 and scales.shape == (rows, 1)
    assert int(integers.abs().amax()) <= 127
    # The largest element of a row is the end of its range.
    assert bool((integers.abs().amax(-1) == 127).all())
    off = (integers.double() * scales.double() - x.double()).abs()
    # Half a step, and the roundings of fp32 in a quotient of up to 127.
    assert bool((off <= scales.double() * (0.5 + 127 * 2.0**-22)).all())


def test_halves_go_to_even_integers() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_rows_without_a_scale() -> None:
    x = torch.tensor([[0.0, 0.0], [TINY, -TINY], [1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, 0.0]])
    integers, scales = quantize_rows(x)
    assert integers.tolist() == [[0, 0]] * 5
    assert scales[:2].flatten().tolist() == [0.0, 0.0] and bool(scales[2:].isnan().all())
    assert quantize_rows(torch.zeros(3, 0))[1].tolist() == [[0.0]] * 3


@pytest.mark.parametrize("k", [0, 1, 1040, 1041, 5000])
def test_products_are_exact_for_every_length(k: int) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8) for n in (3, 4))
    a[0], b[0] = 127, 127
    assert torch.equal(exact_products(a, b), (a.double() @ b.double().mT).float())


@pytest.mark.parametrize("transposed", [True, False])
def test_an_outlier_is_evened_out_by_factors(transposed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 64, generator=g), torch.randn(32, 64, generator=g) / 8
    x[:, 3] *= 300
    weight[:, 3] /= 30
    exact = x.double() @ weight.double().mT
    weight = weight if transposed else weight.mT.contiguous()
    factors = torch.ones(64)
    factors[3] = 1 / 60
    errors = [
        float((Int8Gemm(transposed).evaluate(x, weight, *more)[0] - exact).norm() / exact.norm())
        for more in ((), (factors,))
    ]
    assert errors[1] < 0.02 < 3 * errors[1] < errors[0]


def test_fixed_tensors_are_equal_by_content() -> None:
    one, same, other = (Fixed(torch.tensor(x)) for x in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0]))
    assert one == same and hash(one) == hash(same) and one != other
    assert torch.equal(one(), torch.tensor([1.0, 2.0]))
