"""Products of rows and constant weights, in every precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.operators.base import Semantics, Shape, kind
from fuser.ir.quantization import MAX_TERMS, NAMES, code_products, quantize_rows, round_rows, round_tensor


class Product(Semantics):
    """Rows times a constant matrix: x (…, K) and W, (N, K) if ``transposed``, else (K, N)."""

    transposed: bool

    is_linear = True

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

    def rows(self, inputs: int) -> tuple[int, ...]:
        """Positions of those of so many inputs that have the rows of the output; the others are its weight."""
        return (0,)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * math.prod(output) * inputs[0][-1]

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[0][-1]} → {output[-1]}"


@kind("gemm")
@dataclass(frozen=True)
class Gemm(Product):
    """x · W for x (…, K) and a constant W: (N, K) if ``transposed``, else (K, N)."""

    transposed: bool

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight = inputs
        # A weight may be kept narrower than what it is multiplied with.
        weight = weight.to(x.dtype)
        return (x @ (weight.mT if self.transposed else weight),)


@kind("bf16_gemm")
@dataclass(frozen=True)
class Bf16Gemm(Product):
    """x · W as :class:`Gemm`, x and W rounded to bf16; sums are of fp32 or wider."""

    transposed: bool

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        rows, columns = (t.to(torch.bfloat16).to(wide) for t in inputs)
        return ((rows @ (columns.mT if self.transposed else columns)).to(inputs[0].dtype),)


class CodedProduct(Product):
    """A product in ``codes`` of eight bits, whose weight :func:`~fuser.ir.quantization.quantize_rows` rounds."""

    codes: torch.dtype

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{super().describe(inputs, output)}, {NAMES[self.codes]}"

    def product(
        self, rows: Tensor, row_scales: Tensor, weight: Tensor, factors: Sequence[Tensor], wide: torch.dtype
    ) -> Tensor:
        """What codes with scales times a weight over ``factors`` stand for; codes that are no integers are summed in
        ``wide``."""
        columns = weight if self.transposed else weight.mT
        weights, scales = quantize_rows(columns, *(1 / f for f in factors), codes=self.codes)
        return code_products(rows, weights, wide) * (row_scales * scales.mT)


@kind("quantized_gemm")
@dataclass(frozen=True)
class QuantizedGemm(CodedProduct):
    """x · W as :class:`Gemm`, multiplied in ``codes`` of eight bits: :func:`~fuser.ir.quantization.quantize_rows` of x
    and of the columns of W, their products summed (exactly for int8, in fp32 or wider for ``torch.float8_e4m3fn``), and
    scaled back. An optional third input (K,) are factors that x is multiplied and W divided by before (SmoothQuant,
    Xiao et al., arXiv:2211.10438, equation 3)."""

    transposed: bool
    codes: torch.dtype = torch.int8

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, *factors = inputs
        rounded = quantize_rows(x, *factors, codes=self.codes)
        return (self.product(*rounded, weight, factors, torch.promote_types(x.dtype, torch.float32)).to(x.dtype),)


@kind("code_gemm")
@dataclass(frozen=True)
class CodeGemm(CodedProduct):
    """x · W as :class:`QuantizedGemm`, of an x that :class:`~fuser.ir.operators.QuantizeRows` has rounded: its
    ``codes``, W, the factors that W is divided by, if there are some, and the scales of x, the last input."""

    transposed: bool
    codes: torch.dtype = torch.int8

    def rows(self, inputs: int) -> tuple[int, ...]:
        return 0, inputs - 1

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows, weight, *factors, row_scales = inputs
        return (self.product(rows.to(self.codes), row_scales, weight, factors, row_scales.dtype),)


@kind("int8_weight_gemm")
@dataclass(frozen=True)
class Int8WeightGemm(Product):
    """x · W as :class:`Gemm` with W in int8, and a third input (N,): the fp32 scale of every output, which sums are
    multiplied with. x and the sums stay in floating point."""

    transposed: bool

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, integers, scales = inputs
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = integers.to(wide)
        return ((x.to(wide) @ (columns.mT if self.transposed else columns) * scales.to(wide)).to(x.dtype),)


@kind("int8_gemm")
@dataclass(frozen=True)
class Int8Gemm(Product):
    """x · W as :class:`Int8WeightGemm`, with x in int8, too: :func:`~fuser.ir.quantization.round_rows` from ``low`` to
    ``high`` with scales of ``least`` or more, and zero points unless ``symmetric``; or, without ``least``,
    :func:`~fuser.ir.quantization.round_tensor` as the fourth input (3,) says. Products of integers are summed exactly,
    and scaled back in fp32."""

    transposed: bool
    low: int
    high: int
    least: float | None
    symmetric: bool = True

    @property
    def shifted(self) -> bool:
        """Whether integers have zero points."""
        return self.least is None or not self.symmetric

    @property
    def max_terms(self) -> int:
        """Products whose sum always fits into int32."""
        # Those of -128 are larger than those that MAX_TERMS counts; a zero point makes them twice as large.
        return MAX_TERMS // 2 if self.shifted else MAX_TERMS - 1

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, integers, scales, *given = inputs
        columns = integers if self.transposed else integers.mT
        if self.least is None:
            rows, own = round_tensor(x, self.low, self.high, *given)
        else:
            rows, own = round_rows(x, self.low, self.high, self.least, self.symmetric)
        # In this order, in which numbers do not vanish that would not in fp32.
        product = (rows.double() @ columns.double().mT).float() * own * scales.float()
        return (product.to(torch.promote_types(x.dtype, torch.float32)),)


@kind("grouped_gemm")
@dataclass(frozen=True)
class GroupedGemm(Product):
    """Rows of x (M, K), sorted by group, times the matrix of their group, as the experts of a mixture multiply their
    tokens: W (G, N, K) if ``transposed``, else (G, K, N).

    The third input (G,), int32 or int64, says where groups end: group g has the rows from the end of those before it
    to element g. Rows behind the last group give zeros.
    """

    transposed: bool

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return False

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, ends = inputs
        out = x.new_zeros(x.shape[0], weight.shape[1 if self.transposed else 2])
        start = 0
        for matrix, end in zip(weight, ends.tolist(), strict=True):
            end = max(start, min(end, x.shape[0]))
            out[start:end] = x[start:end] @ (matrix.mT if self.transposed else matrix)
            start = end
        return (out,)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][0]} × {super().describe(inputs, output)}"
