"""Numbers in few bits: what kernels of every target make of rows, bit for bit."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The formats of eight bits that rows are rounded to, and the largest magnitude that each is used for."""
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""What reports and kernels call the formats."""
TINY = 2.0**-100
"""Rows whose largest magnitude is not above are zero, so that inverses of scales are finite."""
_EXACT = 2**24 // 128**2
_MOST_FP32 = float(np.finfo(np.float32).max)
MAX_TERMS = 131_072
"""Products of two int8 numbers whose sum always fits into int32: 2**31 / 127**2 and a little less."""


def quantize_rows(
    x: Tensor, factors: Tensor | None = None, *, codes: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Rows (…, K) as ``codes``, one of :data:`MOST`, with a scale each: codes (…, K), float32 scales (…, 1).

    Symmetric and found at run time: the scale is the row's largest magnitude over that of the codes (127 for int8, 448
    for ``torch.float8_e4m3fn``), and elements are rounded to the nearest code, halves to even. Everything is computed
    in fp32. ``factors`` (K,) multiply the row before. A row with NaN or an infinity has the scale NaN; one of zeros (or
    below 2**-100) the scale zero; the codes of both are zeros.
    """
    end = MOST[codes]
    x = x.float() if factors is None else x.float() * factors.float()
    if x.shape[-1] == 0:
        return x.to(codes), x.new_zeros((*x.shape[:-1], 1))
    most = x.abs().amax(-1, keepdim=True)
    finite = most < torch.inf
    scales = torch.where(most > TINY, most / end, 0.0)
    # A number over a tensor would be the rounded reciprocal times the number.
    inverses = torch.where(finite & (most > TINY), torch.full_like(most, end) / most, 0.0)
    scaled = torch.where(finite, x * inverses, 0.0)
    rounded = scaled if codes.is_floating_point else scaled.round()
    return rounded.to(codes), torch.where(finite, scales, torch.nan)


def round_rows(x: Tensor, low: int, high: int, least: float, symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """Rows (…, K) as integers less their zero point, as torchao rounds them: float32 (…, K), float32 scales (…, 1).

    The zero point is zero where ranges are ``symmetric``, and the scale the row's largest magnitude over half of the
    range; else integers from ``low`` to ``high`` stand for all from its lowest to its highest number, with zero in it.
    Scales are computed in the rows' dtype, and ``least`` or more; elements are multiplied by their reciprocal, rounded
    to the nearest integer, halves to even, and kept in the range, in fp32. A row with NaN or an infinity, or a range
    that fp32 cannot hold, has the scale NaN and zeros.
    """
    scales, zeros = _ranges_of_rows(x, low, high, least, symmetric)
    rounded = torch.where(scales.isnan(), 0.0, x.float() * (1.0 / scales)).round()
    return torch.minimum(torch.maximum(rounded, low - zeros), high - zeros), scales


def _ranges_of_rows(x: Tensor, low: int, high: int, least: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales, NaN where there is none, and zero points of rows, float32 (…, 1)."""
    if symmetric:
        most = x.float().abs().amax(-1, keepdim=True)
        scales, zeros = (most / ((high - low) / 2)).to(x.dtype).float().clamp_min(least), torch.zeros_like(most)
    else:
        bottom, top = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        exact = ((top - bottom) / float(high - low)).clamp_min(least)
        scales, zeros, most = exact.float(), (low - (bottom / exact).round()).float().clamp(low, high), exact
    finite = most < torch.inf
    return torch.where(finite, scales, torch.nan), torch.where(finite, zeros, 0.0)


def round_tensor(x: Tensor, low: int, high: int, given: Tensor) -> tuple[Tensor, Tensor]:
    """x as integers less their zero point, and their scale, as ``quantize_per_tensor`` of torch.ao rounds.

    ``given`` (3,) has the scale, its inverse and the zero point of all of x. Elements are multiplied by the inverse,
    rounded to the nearest integer, halves to even, and kept from ``low`` to ``high`` with the zero point added, in
    fp32, which is what comes back: integers below 256 in magnitude. NaN becomes the lowest.
    """
    scale, inverse, zero = given.float().unbind()
    rounded = (x.float() * inverse).round().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return rounded.clamp(low - zero, high - zero), scale


def rounding_of(scale: float | Tensor, zero_point: int | Tensor, shift: int = 0) -> Tensor:
    """What :func:`round_tensor` is given, for integers that are all less by ``shift``; NaN for a scale that is not
    finite."""
    if not isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        known = math.isfinite(scale)
        numbers = (scale, 1.0 / scale if scale else math.inf, zero_point - shift) if known else (math.nan,) * 3
        return torch.tensor(numbers, dtype=torch.float32)
    exact = torch.as_tensor(scale, dtype=torch.float64).reshape(())
    if not exact.isfinite():
        return torch.full((3,), torch.nan, device=exact.device)
    zero = torch.as_tensor(zero_point, device=exact.device).reshape(()) - shift
    return torch.stack([exact, 1.0 / exact, zero]).float()


def found_rounding(x: Tensor, low: int, high: int, least: float, shift: int = 0) -> Tensor:
    """What :func:`round_tensor` is given for the range of an fp32 tensor, with zero in it, from ``low`` to ``high``: as
    ``choose_qparams`` of torch.ao finds it, in fp32, with the least scale ``least``; NaN where x is not finite."""
    bottom, top = (np.float32(float(end)) for end in torch.aminmax(x))
    if not bottom <= top:
        return torch.full((3,), torch.nan, device=x.device)
    bottom, top = min(bottom, np.float32(0)), max(top, np.float32(0))
    with np.errstate(all="ignore"):
        scale = max((top - bottom) / np.float32(high - low), np.float32(least))
        below = np.round(bottom / scale)
    zero = min(max(low - int(below), low), high) if math.isfinite(below) else low
    return rounding_of(float(scale), zero, shift).to(x.device)


_LEAST_PACKED = 6.1e-5
"""The least scale of activations of packed layers."""


def packed_range(x: Tensor, levels: int) -> tuple[float, int]:
    """The scale, a number of fp32, and the zero point by which layers that ``torch.ao`` has packed round an fp32 tensor
    to integers from 0 to ``levels``: its range with zero in it, in fp64. NaN and 0 where x is not finite."""
    low, high = (float(end) for end in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        return math.nan, 0
    found = float(np.float32((high - low) / levels))
    if found == 0.0 or found < 1.0 / _MOST_FP32:
        return 0.1, 0
    # From the upper end only where it is as far away as there are levels: both say the same but for rounding.
    from_low, from_high = -low / found, levels - high / found
    point = from_low if from_low > high / found - levels else from_high
    return max(found, float(np.float32(_LEAST_PACKED))), min(max(round(point), 0), levels)


def packed_rounding(x: Tensor, levels: int, shift: int) -> Tensor:
    """What :func:`round_tensor` is given for :func:`packed_range`."""
    return rounding_of(*packed_range(x, levels), shift).to(x.device)


def rounding_as_row(x: Tensor, low: int, high: int, least: float, symmetric: bool = True) -> Tensor:
    """What :func:`round_tensor` is given for what :func:`round_rows` finds if all of x is one row."""
    return rounding_of(*_ranges_of_rows(x.flatten(), low, high, least, symmetric))


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ for int8 (…, M, K) and (N, K), summed exactly and rounded once to fp32, as kernels do."""
    # Sums of so many products are integers below 2**24, which fp32 holds, in whatever order they are added.
    parts = [(a[..., k : k + _EXACT].float() @ b[:, k : k + _EXACT].float().mT) for k in range(0, a.shape[-1], _EXACT)]
    if len(parts) <= 1:
        return parts[0] if parts else torch.zeros(*a.shape[:-1], len(b))
    return sum(part.double() for part in parts).float()  # type: ignore[union-attr]


def code_products(a: Tensor, b: Tensor, wide: torch.dtype = torch.float32) -> Tensor:
    """a · bᵀ for codes (…, M, K) and (N, K): :func:`exact_products` of integers, else summed in ``wide``."""
    if a.dtype == torch.int8:
        return exact_products(a, b)
    return a.to(wide) @ b.to(wide).mT


def integers_of(weight: Tensor, transposed: bool) -> Tensor:
    """A weight, (N, K) if ``transposed``, else (K, N), in int8: (N, K)."""
    return quantize_rows(weight if transposed else weight.mT)[0]


def scales_of(weight: Tensor, transposed: bool) -> Tensor:
    """The scales (N,) that go with :func:`integers_of`, fp32."""
    return quantize_rows(weight if transposed else weight.mT)[1][:, 0]


def recovered_scales(weight: Tensor, integers: Tensor, transposed: bool, turned: bool = False) -> Tensor:
    """The scale (N,) of every output for a ``weight`` that is the product of int8 ``integers`` of its shape and such
    scales, fp32 and all to rounding; or, if ``turned``, of the transposed shape. The integers are (N, K) if
    ``transposed``, else (K, N).

    Raises ValueError for a weight that is not, such as one with zero points.
    """
    if turned:
        weight = weight.mT
    if not transposed:
        weight, integers = weight.mT, integers.mT
    whole = integers.float()
    place = whole.abs().argmax(-1, keepdim=True)
    most = whole.gather(-1, place)
    scales = torch.where(most == 0, 0.0, weight.float().gather(-1, place) / torch.where(most == 0, 1.0, most))
    # Two roundings: that of the product, and that of the quotient here.
    if not torch.allclose(whole * scales, weight.float(), rtol=2.0**-21, atol=0.0):
        raise ValueError("the weight is not its integers times one scale for each output")
    return scales[:, 0]


class Fixed:
    """A function without arguments whose result is a contiguous tensor on the CPU, made when a model was optimized.
    Equal by its contents."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._content = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def __call__(self) -> Tensor:
        return self.tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return f"Fixed({self._content})"
