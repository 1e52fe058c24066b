"""Row expressions: what a fused group computes for every element of a matrix, as a small immutable program.

An expression reads *inputs* (matrices of shape ``(rows, columns)`` after broadcasting), applies elementwise
instructions and reductions along a row, and yields *outputs*. It is the one language for pointwise chains, row-wise
kernels (LayerNorm, RMSNorm, softmax) and GEMM epilogues, so that fusing two operators is composing two expressions.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Op(enum.Enum):
    """Instructions. The value is the name that rendered sources use."""

    INPUT = "input"
    CONSTANT = "constant"
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    LESS = "less"
    WHERE = "where"
    NEG = "neg"
    ABS = "abs"
    EXP = "exp"
    LOG = "log"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    RECIPROCAL = "reciprocal"
    TANH = "tanh"
    ERF = "erf"
    SIGMOID = "sigmoid"
    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    ROUND = "round_even"
    TO_BF16 = "to_bf16"
    TO_F16 = "to_f16"
    ROW_SUM = "row_sum"
    ROW_MEAN = "row_mean"
    ROW_MAX = "row_max"


REDUCTIONS = frozenset({Op.ROW_SUM, Op.ROW_MEAN, Op.ROW_MAX})
CASTS = {torch.bfloat16: Op.TO_BF16, torch.float16: Op.TO_F16}
"""Rounding a number to what a dtype can hold; to fp32, in which expressions compute, nothing rounds."""
_ROUNDINGS = frozenset({Op.ROUND, *CASTS.values()})
_ARITY = {
    **dict.fromkeys(Op, 1),
    Op.INPUT: 0,
    Op.CONSTANT: 0,
    **dict.fromkeys((Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM, Op.LESS), 2),
    Op.WHERE: 3,
}

_TORCH: dict[Op, Callable[..., Tensor]] = {
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.div,
    Op.MAXIMUM: torch.maximum,
    Op.MINIMUM: torch.minimum,
    Op.LESS: lambda a, b: (a < b).to(torch.promote_types(a.dtype, b.dtype)),
    Op.WHERE: lambda condition, a, b: torch.where(condition != 0, a, b),
    Op.NEG: torch.neg,
    Op.ABS: torch.abs,
    Op.EXP: torch.exp,
    Op.LOG: torch.log,
    Op.SQRT: torch.sqrt,
    Op.RSQRT: torch.rsqrt,
    Op.RECIPROCAL: torch.reciprocal,
    Op.TANH: torch.tanh,
    Op.ERF: torch.erf,
    Op.SIGMOID: torch.sigmoid,
    Op.RELU: torch.relu,
    Op.GELU: torch.nn.functional.gelu,
    Op.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Op.SILU: torch.nn.functional.silu,
    Op.ROUND: torch.round,
    Op.TO_BF16: lambda x: x.to(torch.bfloat16).to(x.dtype),
    Op.TO_F16: lambda x: x.to(torch.float16).to(x.dtype),
    Op.ROW_SUM: lambda x: x.sum(-1, keepdim=True),
    Op.ROW_MEAN: lambda x: x.mean(-1, keepdim=True),
    Op.ROW_MAX: lambda x: x.amax(-1, keepdim=True),
}

# Rough fp32 operations an element, for the roofline: a transcendental is a polynomial of about this length.
_FLOPS = {
    **dict.fromkeys(Op, 1),
    Op.INPUT: 0,
    Op.CONSTANT: 0,
    **dict.fromkeys((Op.EXP, Op.LOG, Op.SIGMOID, Op.SILU, Op.TANH, Op.GELU_TANH), 20),
    **dict.fromkeys((Op.ERF, Op.GELU), 36),
    **dict.fromkeys((Op.DIV, Op.SQRT, Op.RSQRT, Op.RECIPROCAL), 8),
}


@dataclass(frozen=True)
class Instruction:
    """One step: ``op`` applied to the results of earlier instructions ``args``.

    ``index`` is the number of the input (``INPUT``), ``value`` the number (``CONSTANT``).
    """

    op: Op
    args: tuple[int, ...] = ()
    index: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class Expression:
    """A straight-line program; ``outputs`` are indices of instructions, ``narrow`` the positions of those outputs that
    are one number a row.

    Raises ValueError when an instruction refers forward, has the wrong arity, or a constant is not a number.
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    narrow: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for position, instruction in enumerate(self.instructions):
            if len(instruction.args) != _ARITY[instruction.op]:
                raise ValueError(f"{instruction.op.value} takes {_ARITY[instruction.op]} operands: {instruction}")
            if any(not 0 <= arg < position for arg in instruction.args):
                raise ValueError(f"instruction {position} uses a result that is not there yet: {instruction}")
            if not isinstance(instruction.value, float):
                raise ValueError(f"the constant {instruction.value!r} is not a float")
        if any(not 0 <= output < len(self.instructions) for output in self.outputs):
            raise ValueError(f"outputs {self.outputs} outside the program")

    @property
    def inputs(self) -> int:
        """Number of inputs, counting from zero to the highest one used."""
        return max((i.index + 1 for i in self.instructions if i.op is Op.INPUT), default=0)

    @property
    def conditions(self) -> frozenset[int]:
        """Inputs that only decide between others, and so may be booleans."""
        places = {at: i.index for at, i in enumerate(self.instructions) if i.op is Op.INPUT}
        read = [(i.op is Op.WHERE and n == 0, a) for i in self.instructions for n, a in enumerate(i.args)]
        read += [(False, output) for output in self.outputs]
        decide, others = ({places[a] for only, a in read if only is wanted and a in places} for wanted in (True, False))
        return frozenset(decide - others)

    @property
    def has_reduction(self) -> bool:
        return any(i.op in REDUCTIONS for i in self.instructions)

    @property
    def rounds(self) -> bool:
        """Whether it rounds explicitly, so that the last bit of what it rounds can decide about a whole step; products
        are then rounded to fp32 as in PyTorch, never contracted with the sum that reads them."""
        return any(i.op in _ROUNDINGS for i in self.instructions)

    @property
    def flops(self) -> int:
        """fp32 operations for each element of the matrix."""
        return sum(_FLOPS[i.op] for i in self.instructions)

    def stages(self) -> tuple[frozenset[int], ...]:
        """Instructions grouped by the number of reductions that must be complete before them.

        Element ``s`` holds what pass ``s`` over a row computes: its reductions consume elementwise results that need
        only reductions of earlier passes. The last stage holds what the outputs need.
        """
        depth = self.depths()
        return tuple(frozenset(i for i, d in enumerate(depth) if d == s) for s in range(max(depth, default=0) + 1))

    def depths(self) -> tuple[int, ...]:
        """For every instruction, how many passes over the row must have ended before it can be computed."""
        depth: list[int] = []
        for instruction in self.instructions:
            depth.append(max((depth[a] + (self.instructions[a].op in REDUCTIONS) for a in instruction.args), default=0))
        return tuple(depth)

    def without_idle_casts(self, inputs: Mapping[int, torch.dtype], outputs: Sequence[torch.dtype]) -> Expression:
        """The same program without casts that change nothing: of inputs that are stored in that dtype already
        (``inputs`` by number), and of outputs that will be stored in it."""
        b = Builder()
        at: list[int] = []
        instructions = self.instructions
        idle = {index: CASTS[dtype] for index, dtype in inputs.items() if dtype in CASTS}
        for i in instructions:
            source = instructions[i.args[0]] if i.op in idle.values() else None
            if source is not None and source.op is Op.INPUT and idle.get(source.index) is i.op:
                at.append(at[i.args[0]])
            else:
                at.append(b.add(i, [at[a] for a in i.args]))
        results = []
        for output, dtype in zip(self.outputs, outputs, strict=True):
            i = instructions[output]
            results.append(at[i.args[0]] if i.op is CASTS.get(dtype) else at[output])
        return b.build(*results, narrow=self.narrow)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The plain PyTorch meaning, in the dtype of the inputs; inputs broadcast against ``(..., columns)``."""
        results: list[Tensor] = []
        like = next((x for x in inputs if x.is_floating_point()), inputs[0])
        for instruction in self.instructions:
            if instruction.op is Op.INPUT:
                results.append(inputs[instruction.index])
            elif instruction.op is Op.CONSTANT:
                results.append(torch.tensor(instruction.value, dtype=like.dtype, device=like.device))
            else:
                results.append(_TORCH[instruction.op](*(results[a] for a in instruction.args)))
        return tuple(results[o] for o in self.outputs)

    def __str__(self) -> str:
        names: list[str] = []
        for i in self.instructions:
            if i.op is Op.INPUT:
                names.append(f"x{i.index}")
            elif i.op is Op.CONSTANT:
                names.append(f"{i.value:g}")
            else:
                names.append(f"{i.op.value}({', '.join(names[a] for a in i.args)})")
        return ", ".join(names[o] for o in self.outputs)


class Builder:
    """Builds an expression instruction by instruction; equal instructions are shared."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._known: dict[tuple[Instruction, float], int] = {}

    def _add(self, instruction: Instruction) -> int:
        # Zeros of both signs are equal, but not the same constant.
        key = (instruction, math.copysign(1.0, instruction.value))
        if key not in self._known or math.isnan(instruction.value):
            self._known[key] = len(self._instructions)
            self._instructions.append(instruction)
        return self._known[key]

    def input(self, index: int) -> int:
        return self._add(Instruction(Op.INPUT, index=index))

    def constant(self, value: float) -> int:
        return self._add(Instruction(Op.CONSTANT, value=float(value)))

    def apply(self, op: Op, *args: int) -> int:
        return self._add(Instruction(op, args=args))

    def add(self, instruction: Instruction, args: Sequence[int]) -> int:
        """An instruction of another expression, applied to the results ``args``."""
        return self._add(dataclasses.replace(instruction, args=tuple(args)))

    def cast(self, value: int, dtype: torch.dtype) -> int:
        """``value`` rounded to what ``dtype`` can hold; fp32, in which expressions compute, holds everything."""
        op = CASTS.get(dtype)
        return value if op is None or self._instructions[value].op is op else self.apply(op, value)

    def inline(self, expression: Expression, inputs: Sequence[int]) -> tuple[int, ...]:
        """Copy ``expression`` in, its inputs replaced by the results ``inputs``; returns where its outputs are."""
        at: list[int] = []
        for i in expression.instructions:
            at.append(inputs[i.index] if i.op is Op.INPUT else self.add(i, [at[a] for a in i.args]))
        return tuple(at[o] for o in expression.outputs)

    def build(self, *outputs: int, narrow: tuple[int, ...] = ()) -> Expression:
        """The expression, without the instructions that no output needs; outputs at ``narrow`` are one number a row."""
        needed = set(outputs)
        for position in range(len(self._instructions) - 1, -1, -1):
            if position in needed:
                needed.update(self._instructions[position].args)
        kept = sorted(needed)
        renumber = {old: new for new, old in enumerate(kept)}
        instructions = tuple(
            Instruction(i.op, tuple(renumber[a] for a in i.args), i.index, i.value)
            for i in (self._instructions[k] for k in kept)
        )
        return Expression(instructions, tuple(renumber[o] for o in outputs), narrow)


def unary(op: Op) -> Expression:
    """``op(x0)``."""
    b = Builder()
    return b.build(b.apply(op, b.input(0)))


def binary(op: Op) -> Expression:
    """``op(x0, x1)``."""
    b = Builder()
    return b.build(b.apply(op, b.input(0), b.input(1)))


def layer_norm(eps: float, weight: bool = True, bias: bool = True) -> Expression:
    """LayerNorm along a row, two-pass: x0 the row, then the weight and the bias where there are any."""
    b = Builder()
    x = b.input(0)
    centred = b.apply(Op.SUB, x, b.apply(Op.ROW_MEAN, x))
    variance = b.apply(Op.ROW_MEAN, b.apply(Op.MUL, centred, centred))
    y = b.apply(Op.MUL, centred, b.apply(Op.RSQRT, b.apply(Op.ADD, variance, b.constant(eps))))
    if weight:
        y = b.apply(Op.MUL, y, b.input(1))
    if bias:
        y = b.apply(Op.ADD, y, b.input(1 + weight))
    return b.build(y)


def rms_norm(eps: float, weight: bool = True) -> Expression:
    """RMSNorm along a row: x0 / sqrt(mean(x0²) + eps) [· x1]."""
    b = Builder()
    x = b.input(0)
    mean = b.apply(Op.ROW_MEAN, b.apply(Op.MUL, x, x))
    y = b.apply(Op.MUL, x, b.apply(Op.RSQRT, b.apply(Op.ADD, mean, b.constant(eps))))
    return b.build(b.apply(Op.MUL, y, b.input(1)) if weight else y)


def quantize_rows(most: float, tiny: float, *, rounds: bool, factors: bool) -> Expression:
    """Rows as codes of eight bits up to ``most``, and their scales, one number a row (see
    :func:`fuser.ir.quantization.quantize_rows`, which gives the same numbers): x0 the row, x1 the ``factors`` of its
    elements where there are any; codes are integers if it ``rounds``. Rows up to ``tiny`` are zeros."""
    b = Builder()
    x = b.apply(Op.MUL, b.input(0), b.input(1)) if factors else b.input(0)
    largest, end, zero = b.apply(Op.ROW_MAX, b.apply(Op.ABS, x)), b.constant(most), b.constant(0.0)
    finite = b.apply(Op.LESS, largest, b.constant(math.inf))
    some = b.apply(Op.LESS, b.constant(tiny), largest)
    scale = b.apply(Op.WHERE, some, b.apply(Op.DIV, largest, end), zero)
    inverse = b.apply(Op.WHERE, some, b.apply(Op.DIV, end, largest), zero)
    codes = b.apply(Op.WHERE, finite, b.apply(Op.MUL, x, inverse), zero)
    if rounds:
        codes = b.apply(Op.ROUND, codes)
    return b.build(codes, b.apply(Op.WHERE, finite, scale, b.constant(math.nan)), narrow=(1,))


def softmax() -> Expression:
    """Softmax along a row; a row of -inf alone gives NaN."""
    b = Builder()
    x = b.input(0)
    e = b.apply(Op.EXP, b.apply(Op.SUB, x, b.apply(Op.ROW_MAX, x)))
    return b.build(b.apply(Op.DIV, e, b.apply(Op.ROW_SUM, e)))


def masked_softmax() -> Expression:
    """Softmax along a row of scores; a row of -inf alone, which may attend to nothing, gives zeros."""
    b = Builder()
    x = b.input(0)
    highest = b.apply(Op.MAXIMUM, b.apply(Op.ROW_MAX, x), b.constant(_LOWEST))
    e = b.apply(Op.EXP, b.apply(Op.SUB, x, highest))
    # The largest term of every other row is one.
    return b.build(b.apply(Op.DIV, e, b.apply(Op.MAXIMUM, b.apply(Op.ROW_SUM, e), b.constant(0.5))))


def log_sum_exp() -> Expression:
    """The logarithm of the sum of exponentials along a row; infinities as PyTorch has them."""
    b = Builder()
    x = b.input(0)
    # A finite number, whose differences to infinities are these.
    highest = b.apply(Op.MAXIMUM, b.apply(Op.ROW_MAX, x), b.constant(_LOWEST))
    highest = b.apply(Op.MINIMUM, highest, b.constant(-_LOWEST))
    total = b.apply(Op.ROW_SUM, b.apply(Op.EXP, b.apply(Op.SUB, x, highest)))
    return b.build(b.apply(Op.ADD, b.apply(Op.LOG, total), highest))


_LOWEST = -3.4028234663852886e38
"""The lowest finite number of fp32, so below every score but -inf."""
