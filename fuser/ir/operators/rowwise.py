"""Elementwise and row-wise operators, most of which their expressions say everything about."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir import expression as ex
from fuser.ir.expression import Builder, Expression, Op
from fuser.ir.operators.base import Semantics, Shape, kind
from fuser.ir.quantization import MOST, NAMES, TINY, quantize_rows, round_tensor
from fuser.ir.scores import ScoreRule


class RowWise(Semantics):
    """An operator that its expression says everything about."""

    @property
    @abstractmethod
    def expression(self) -> Expression: ...

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.expression.evaluate(*inputs)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(self.expression.flops * math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@dataclass(frozen=True)
class _Function(RowWise):
    function: Expression

    @property
    def expression(self) -> Expression:
        return self.function


ADD = ex.binary(Op.ADD)


@kind("bias")
@dataclass(frozen=True)
class Bias(_Function):
    """A sum with a constant row."""

    function: Expression = ADD

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"over {output[-1]}"


@kind("activation")
@dataclass(frozen=True)
class Activation(_Function):
    """The function between two products."""


@kind("residual")
@dataclass(frozen=True)
class Residual(_Function):
    """A sum of two values."""

    function: Expression = ADD

    finishes_rows = True


class _AlongRows(_Function):
    """A function that reduces along rows, where sums in less than fp32 would lose digits."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.expression.evaluate(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs))


@kind("norm")
@dataclass(frozen=True)
class Norm(_AlongRows):
    """A normalization of rows, with its weight and bias."""

    finishes_rows = True

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"over {output[-1]}"


@kind("reduction")
@dataclass(frozen=True)
class Reduction(_AlongRows):
    """One number of every row (…, N), as (…, 1): a part of a norm that is written out."""

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(self.expression.flops * math.prod(inputs[0]))


@kind("quantize_rows")
@dataclass(frozen=True)
class QuantizeRows(RowWise):
    """Rows (…, K) as ``codes`` of eight bits (…, K), and the fp32 scale of each (…, 1):
    :func:`~fuser.ir.quantization.quantize_rows`, with ``factors`` of a second input (K,)."""

    codes: torch.dtype = torch.int8
    factors: bool = False

    finishes_rows = True

    @functools.cached_property
    def expression(self) -> Expression:
        rounds = not self.codes.is_floating_point
        return ex.quantize_rows(MOST[self.codes], TINY, rounds=rounds, factors=self.factors)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return quantize_rows(*inputs, codes=self.codes)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return NAMES[self.codes]


@kind("pointwise")
@dataclass(frozen=True)
class Pointwise(_Function):
    """Any other elementwise function."""


@kind("scale")
@dataclass(frozen=True)
class Scale(RowWise):
    """A product with the number ``scale``."""

    scale: float

    @functools.cached_property
    def expression(self) -> Expression:
        b = Builder()
        return b.build(b.apply(Op.MUL, b.input(0), b.constant(self.scale)))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"× {self.scale:.4g}"


@kind("fake quantize")
@dataclass(frozen=True)
class FakeQuantize(RowWise):
    """x in steps of ``scale``, of which there are ``low`` to ``high`` with the zero point added: what is left of it by
    ``quantize_per_tensor`` and ``dequantize_per_tensor`` of torch.ao."""

    scale: float
    zero_point: int
    low: int
    high: int

    @functools.cached_property
    def expression(self) -> Expression:
        b = Builder()
        steps = b.apply(Op.ROUND, b.apply(Op.MUL, b.input(0), b.constant(1.0 / self.scale)))
        kept = b.apply(Op.MAXIMUM, steps, b.constant(float(self.low - self.zero_point)))
        kept = b.apply(Op.MINIMUM, kept, b.constant(float(self.high - self.zero_point)))
        return b.build(b.apply(Op.MUL, kept, b.constant(self.scale)))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"steps of {self.scale:.4g}"


@kind("fake quantize as found")
@dataclass(frozen=True)
class FakeQuantizeAsFound(Semantics):
    """As :class:`FakeQuantize`, with the scale and the zero point in a second input (3,), as
    :func:`~fuser.ir.quantization.round_tensor` is given them."""

    fusible = False

    low: int
    high: int

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        steps, scale = round_tensor(inputs[0], self.low, self.high, inputs[1])
        return ((steps * scale).to(torch.promote_types(inputs[0].dtype, torch.float32)),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 4.0 * math.prod(output)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "steps found at run time"


@kind("score rule")
@dataclass(frozen=True)
class ChangeScores(RowWise):
    """What the score rule ``rule`` makes of scaled scores."""

    rule: ScoreRule

    @property
    def expression(self) -> Expression:
        return self.rule.expression

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return str(self.rule)


@kind("softmax")
@dataclass(frozen=True)
class Softmax(RowWise):
    """Softmax of rows; a row of -inf alone gives zeros if it is ``masked``, else NaN."""

    masked: bool

    @functools.cached_property
    def expression(self) -> Expression:
        return ex.masked_softmax() if self.masked else ex.softmax()

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        # PyTorch's own is what eager runs, bit for bit.
        probabilities = torch.softmax(x, -1)
        if self.masked:
            probabilities = probabilities.masked_fill(torch.isneginf(x).all(-1, keepdim=True), 0.0)
        return (probabilities,)
