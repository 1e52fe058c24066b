"""Rounding rows to int8, and products of such rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from fuser.ir.operators import QuantizedGemm
from fuser.ir.quantization import (
    TINY,
    Fixed,
    exact_products,
    quantize_rows,
    round_rows,
    round_tensor,
    rounding_as_row,
)


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


@pytest.mark.parametrize("kind", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-64, 63)])
def test_rows_in_a_range_are_those_of_torchao(low: int, high: int, dtype: torch.dtype, kind: MappingType) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 33, generator=g) * 10 ** (8 * torch.rand(500, 1, generator=g) - 7)
    x += x.abs().amax(-1, keepdim=True) * torch.randn(500, 1, generator=g)
    x[1], x[2], x[3, 0], x[4], x[5] = 0, 1e-9, 1e30, x[4].abs(), -x[5].abs()
    x = x.to(dtype)
    symmetric = kind is MappingType.SYMMETRIC
    codes, scales = round_rows(x, low, high, 2.0**-23, symmetric)
    whole, points = choose_qparams_affine(
        x, kind, (1, 33), torch.int8, low, high, 2.0**-23, torch.float32, torch.int8, True
    )
    assert torch.equal(scales, whole) and bool(points.any()) != symmetric
    want = quantize_affine(x, (1, 33), whole, points, torch.int8, low, high)
    assert torch.equal(codes + points, want.float())
    assert want.min() == low and want.max() == high
    # As one row.
    whole, point = choose_qparams_affine(
        x, kind, x.shape, torch.int8, low, high, 2.0**-23, torch.float32, torch.int8, True
    )
    codes, scale = round_tensor(x, low, high, rounding_as_row(x, low, high, 2.0**-23, symmetric))
    assert scale == whole
    assert torch.equal(codes + point, quantize_affine(x, x.shape, whole, point, torch.int8, low, high).float())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "shifted"])
def test_rows_in_a_range_without_a_scale(symmetric: bool) -> None:
    x = torch.ones(5, 8)
    x[0, 1], x[1, 2], x[2, 3], x[3, 4], x[3, 5] = torch.nan, -torch.inf, torch.inf, 3e38, -3e38
    codes, scales = round_rows(x, -128, 127, 2.0**-23, symmetric)
    # The range of the fourth is more than fp32 holds.
    assert scales.isnan().flatten().tolist() == [True, True, True, not symmetric, False]
    assert not codes[:3].any() and bool((codes[4] == (127 if symmetric else 255)).all())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(-25, 25), st.integers(0, 2**31))
def test_fp8_keeps_four_significant_bits(rows: int, columns: int, power: float, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    codes, scales = quantize_rows(x, codes=torch.float8_e4m3fn)
    assert codes.dtype is torch.float8_e4m3fn and scales.dtype is torch.float32 and scales.shape == (rows, 1)
    assert bool((codes.float().abs().amax(-1) == 448).all())
    want = x.double() / x.double().abs().amax(-1, keepdim=True) * 448
    off = (codes.double() - want).abs()
    # Half a step of four bits or of subnormal numbers, and the roundings of fp32.
    assert bool((off <= (want.abs() * 2.0**-4).clamp_min(2.0**-10) + want.abs() * 2.0**-22).all())
    torch.testing.assert_close(scales.double() * 448, x.double().abs().amax(-1, keepdim=True), rtol=2.0**-23, atol=0.0)


def test_fp8_codes_are_those_of_the_conversion() -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    # A row whose scale is one: its elements are what PyTorch makes of them.
    x[0] = torch.linspace(-20, 20, 300) ** 3 / 20
    x[0, 0] = 448
    codes, scales = quantize_rows(x, codes=torch.float8_e4m3fn)
    assert scales[0] == 1 and torch.equal(codes[0].float(), x[0].to(torch.float8_e4m3fn).float())
    halves = torch.tensor([[448.0, 17.0, 19.0, 21.0, -17.0, -19.0]])
    assert quantize_rows(halves, codes=torch.float8_e4m3fn)[0].float().tolist() == [[448, 16, 20, 20, -16, -20]]


@pytest.mark.parametrize("transposed", [True, False])
def test_products_of_fp8_codes(transposed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 96, generator=g), torch.randn(7, 96, generator=g)
    scales = [t.abs().amax(-1, keepdim=True) / 448 for t in (x, weight)]
    a, b = ((t / s).to(torch.float8_e4m3fn).double() for t, s in zip((x, weight), scales, strict=True))
    want = a @ b.mT * (scales[0] * scales[1].mT).double()
    how = QuantizedGemm(transposed, torch.float8_e4m3fn)
    given = weight if transposed else weight.mT
    # Nothing of these rows lies where a quotient and a product with an inverse round to different codes.
    torch.testing.assert_close(how.evaluate(x.double(), given)[0], want, rtol=2.0**-22, atol=1e-6)
    torch.testing.assert_close(how.evaluate(x, given)[0].double(), want, rtol=2.0**-20, atol=1e-4)
    assert how.signature != QuantizedGemm(transposed).signature


def test_halves_go_to_even_integers() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_without_a_scale(codes: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [TINY, -TINY], [1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, 0.0]])
    found, scales = quantize_rows(x, codes=codes)
    assert found.float().tolist() == [[0, 0]] * 5
    assert scales[:2].flatten().tolist() == [0.0, 0.0] and bool(scales[2:].isnan().all())
    assert quantize_rows(torch.zeros(3, 0), codes=codes)[1].tolist() == [[0.0]] * 3


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
        float((QuantizedGemm(transposed).evaluate(x, weight, *more)[0] - exact).norm() / exact.norm())
        for more in ((), (factors,))
    ]
    assert errors[1] < 0.02 < 3 * errors[1] < errors[0]


def test_fixed_tensors_are_equal_by_content() -> None:
    one, same, other = (Fixed(torch.tensor(x)) for x in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0]))
    assert one == same and hash(one) == hash(same) and one != other
    assert torch.equal(one(), torch.tensor([1.0, 2.0]))
