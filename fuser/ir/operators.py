"""Operators: one frozen class a kind, which knows what it computes, what that costs and how others may treat it.

Nothing else knows a kind's meaning: kernels ask for its :attr:`~Semantics.expression` or its attributes, the reference
that they are checked against, PyTorch where no kernel runs it, the cost model, pictures and hashes ask its methods.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fuser.ir import expression as ex
from fuser.ir.expression import Builder, Expression, Op
from fuser.ir.importance import importance_bias
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.masks import Dense, Mask
from fuser.ir.quantization import (
    MAX_TERMS,
    NAMES,
    code_products,
    quantize_rows,
    round_rows,
    round_tensor,
)
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.windows import Windowed

Shape = tuple[int, ...]


class Semantics(ABC):
    """What an operator means, whatever its values are called.

    A kind is a subclass that is a frozen dataclass, registered by :func:`kind`; all its fields enter
    :attr:`fuser.ir.graph.Region.hash`. The class attributes are what the compiler asks about a kind.
    """

    kind: ClassVar[str]
    """The name to print."""
    fusible: ClassVar[bool] = True
    """Whether it can share a kernel with a neighbour."""
    is_linear: ClassVar[bool] = False
    """Whether it multiplies rows by constant weights: where a new region may start."""
    finishes_rows: ClassVar[bool] = False
    """Whether its rows are where blocks of a model meet: residual sums, their norms, embeddings."""
    makes_scores: ClassVar[bool] = False
    """Whether it compares queries with keys: where attention starts."""
    consumes_scores: ClassVar[bool] = False
    """Whether it weighs values by what became of scores: where attention ends."""
    gathers: ClassVar[tuple[int, ...]] = ()
    """Positions of the inputs that are tables, of which it reads rows by number."""
    writes: ClassVar[tuple[int, ...]] = ()
    """Positions of the inputs that it writes in place, which are states of the graph or views of them."""

    @property
    def expression(self) -> Expression | None:
        """What it computes of rows that broadcast to its output's shape, for kernels that work row by row; None where
        no row expression says it."""
        return None

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, whose order matters."""
        return False

    @abstractmethod
    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Its outputs by PyTorch, in the dtype of the inputs; they broadcast to the outputs' shapes. The inputs that it
        ``writes``, and no others, are changed."""

    @abstractmethod
    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        """fp32 operations for values of these shapes."""

    @abstractmethod
    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        """A few words for pictures about what it does to values of these shapes; empty where its name says it."""

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        """Whether every row of its output, all dimensions but the last, follows from the rows of its inputs in the same
        place alone, as PyTorch broadcasts them."""
        return self.expression is not None

    def widths(self, inputs: Sequence[Shape]) -> Shape:
        """Sizes of run-time inputs that do not follow from the number of tokens, nor from constants."""
        return ()

    @property
    def signature(self) -> str:
        """A text that is equal exactly when the kind and all its fields are."""
        return canonical(self)

    def __str__(self) -> str:
        return str(self.expression or "")


S = TypeVar("S", bound=Semantics)
KINDS: list[type[Semantics]] = []
"""All kinds."""


def kind(name: str) -> Callable[[type[S]], type[S]]:
    """Registers a kind that prints as ``name``. Raises TypeError for one that lacks a method or can be changed."""

    def register(cls: type[S]) -> type[S]:
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise TypeError(f"the kind {cls.__name__} lacks {', '.join(missing)}")
        parameters = cls.__dict__.get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            raise TypeError(f"the kind {cls.__name__} must be a frozen dataclass")
        cls.kind = name
        KINDS.append(cls)
        return cls

    return register


def canonical(value: Any) -> str:
    """A text that is equal exactly when the values are, to the last bit of their numbers."""
    if isinstance(value, Mask):
        return value.hash
    if isinstance(value, TorchCall):
        return f"{value}({canonical(value.args)},{canonical(value.kwargs)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={canonical(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({','.join(fields)})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(canonical, value))})"
    return value.hex() if isinstance(value, float) else repr(value)


# ---- operators that PyTorch runs


@dataclass(frozen=True)
class Ref:
    """Stands for the operator's input number ``index`` inside the arguments of a :class:`TorchCall`; with ``strides``,
    laid out like that, for functions whose results depend on it."""

    index: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TorchCall:
    """A PyTorch function with its arguments, tensors replaced by :class:`Ref`."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on ``inputs``; always a tuple of the results."""
        args = [_substitute(a, inputs) for a in self.args]
        result = self.target(*args, **{k: _substitute(v, inputs) for k, v in self.kwargs})
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def __str__(self) -> str:
        return str(getattr(self.target, "_name", None) or getattr(self.target, "__name__", self.target))

    def __reduce__(self) -> tuple[Any, ...]:
        # ATen overloads do not pickle; their names do.
        if isinstance(self.target, torch._ops.OpOverload):
            namespace, name = self.target._schema.name.split("::")
            return _restore_call, (namespace, name, self.target._overloadname, self.args, self.kwargs)
        return TorchCall, (self.target, self.args, self.kwargs)


def _restore_call(namespace: str, name: str, overload: str, args: Any, kwargs: Any) -> TorchCall:
    return TorchCall(getattr(getattr(getattr(torch.ops, namespace), name), overload), args, kwargs)


def laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of ``tensor`` in memory of its own with these strides; where they let elements share memory, those are
    equal."""
    # Expanded dimensions hold one element, to which PyTorch refuses to write several.
    once = tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.empty_strided(once, strides, dtype=tensor.dtype, device=tensor.device)
    memory.copy_(tensor[tuple(slice(size) for size in once)])
    return memory.as_strided(tensor.shape, strides)


def _substitute(value: Any, inputs: tuple[Tensor, ...]) -> Any:
    if isinstance(value, Ref):
        tensor = inputs[value.index]
        return tensor if value.strides is None or value.strides == tensor.stride() else laid_out(tensor, value.strides)
    if isinstance(value, (tuple, list)):
        return type(value)(_substitute(v, inputs) for v in value)
    return value


_ELEMENTWISE = frozenset(
    {
        *(torch.add, torch.logical_and, torch.logical_not),
        *(torch.ops.aten.where.ScalarOther, torch.ops.aten.where.ScalarSelf, torch.ops.aten.where.Scalar),
        *(torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten._to_copy.default),
    }
)
"""Functions that PyTorch does not mark as what they are."""


@dataclass(frozen=True)
class _Called(Semantics):
    call: TorchCall

    fusible = False

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.call.target, "tags", ())

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.call(*inputs)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        """What is known to: elementwise functions, copies, and rows put together of parts of rows."""
        target = self.call.target
        if target is torch.ops.aten.cat.default:
            dim: int = dict(zip(("tensors", "dim"), self.call.args, strict=False)).get("dim", 0)
            return dim % len(output) == len(output) - 1
        return target is laid_out or self.is_elementwise

    @property
    def is_elementwise(self) -> bool:
        """Whether it is known to compute every element from those in the same place."""
        pointwise = torch.Tag.pointwise in getattr(self.call.target, "tags", ()) and not self.is_random
        return pointwise or self.call.target in _ELEMENTWISE

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        """Unknown, and so not counted."""
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""

    def __str__(self) -> str:
        return str(self.call)


@kind("extern")
@dataclass(frozen=True)
class Extern(_Called):
    """What PyTorch runs as it is, for a ``reason`` that the report gives."""

    reason: str


@kind("view")
@dataclass(frozen=True)
class View(_Called):
    """Another shape of the same storage, which costs nothing."""

    part_of_reader: ClassVar[bool] = False
    """Whether a report counts it to the kernel that reads through it."""
    part_of_writer: ClassVar[bool] = False
    """Whether a report counts it to the kernel that writes through it."""


@kind("split_heads")
@dataclass(frozen=True)
class SplitHeads(View):
    """(B, S, H·D) seen as (B, H, S, D)."""

    part_of_reader = True

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "split heads"


@kind("merge_heads")
@dataclass(frozen=True)
class MergeHeads(View):
    """(B, H, S, D) seen as (B, S, H·D)."""

    part_of_writer = True

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "merge heads"


# ---- products


class Product(Semantics):
    """Rows times a constant matrix: x (…, K) and W, (N, K) if ``transposed``, else (K, N)."""

    transposed: bool

    is_linear = True

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

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


@kind("quantized_gemm")
@dataclass(frozen=True)
class QuantizedGemm(Product):
    """x · W as :class:`Gemm`, multiplied in ``codes`` of eight bits: :func:`~fuser.ir.quantization.quantize_rows` of x
    and of the columns of W, their products summed (exactly for int8, in fp32 or wider for ``torch.float8_e4m3fn``), and
    scaled back. An optional third input (K,) are factors that x is multiplied and W divided by before (SmoothQuant,
    Xiao et al., arXiv:2211.10438, equation 3)."""

    transposed: bool
    codes: torch.dtype = torch.int8

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{super().describe(inputs, output)}, {NAMES[self.codes]}"

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, *factors = inputs
        columns = weight if self.transposed else weight.mT
        rows, row_scales = quantize_rows(x, *factors, codes=self.codes)
        weights, scales = quantize_rows(columns, *(1 / f for f in factors), codes=self.codes)
        sums = code_products(rows, weights, torch.promote_types(x.dtype, torch.float32))
        return ((sums * (row_scales * scales.mT)).to(x.dtype),)


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


@kind("qk")
@dataclass(frozen=True)
class QK(Semantics):
    """q · kᵀ for q (B, H, Sq, D) and k (B, Hkv, Sk, D), heads of k serving groups of those of q."""

    makes_scores = True

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k = inputs
        return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT,)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * math.prod(output) * inputs[0][-1]

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""

    def widths(self, inputs: Sequence[Shape]) -> Shape:
        return inputs[0][1], inputs[0][-1]


@kind("pv")
@dataclass(frozen=True)
class PV(Semantics):
    """p · v for p (B, H, Sq, Sk) and v (B, Hkv, Sk, Dv), heads of v serving groups of those of p."""

    consumes_scores = True

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        p, v = inputs
        return (p.to(v.dtype) @ v.repeat_interleave(p.shape[1] // v.shape[1], 1),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * math.prod(output) * inputs[0][-1]

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@kind("predicted_attention")
@dataclass(frozen=True)
class PredictedAttention(Semantics):
    """Attention of q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) that decides by few bits which of its
    scores are computed in full, as ``quantize`` says: see :class:`fuser.ir.score_quantization.ScoreQuantization`.

    ``rule`` changes scaled scores before masks do; ``pattern`` is what constants allow; a fourth input is a run-time
    mask, boolean or added, that broadcasts to the scores. Of ``packed`` rows the other inputs are those of a
    :class:`DocumentMask`, whose documents have the pattern each.
    """

    quantize: ScoreQuantization
    scale: float
    pattern: Mask = Dense()  # noqa: RUF009 a frozen value
    rule: ScoreRule | None = None
    packed: bool = False

    makes_scores = True
    consumes_scores = True

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._reference(*inputs)[:1]

    def decisions(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Which scores are computed in full, and which may attend: bool (B, H, Sq, Sk) each."""
        _, chosen, allowed = self._reference(*inputs)
        return chosen, allowed.expand(chosen.shape)

    def _reference(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *rest = inputs
        if self.packed:
            return self._of_documents(q, k, v, *rest[:3])
        added = torch.zeros((), dtype=q.dtype, device=q.device)
        allowed = self.pattern.dense(q.shape[2], k.shape[2]).to(q.device)
        for mask in rest:
            allowed, added = (allowed & mask, added) if mask.dtype == torch.bool else (allowed, mask)
        added = torch.where(allowed, added, -math.inf)
        out, chosen = self.quantize.reference(q, k, v, additive_mask=added, score=self.rule, scale=self.scale)
        return out, chosen, added > -math.inf

    def _of_documents(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, length: Tensor, is_key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        allowed = DocumentMask(pattern=self.pattern).allowed(rows, length, is_key)
        added = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, -math.inf)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        chosen = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        _, sizes = torch.unique_consecutive(rows // length, return_counts=True)
        for start, stop in itertools.pairwise([0, *sizes.cumsum(0).tolist()]):
            part = slice(start, stop)
            given = (t[:, :, part] for t in (q, k, v))
            out[:, :, part], chosen[:, :, part, part] = self.quantize.reference(
                *given, additive_mask=added[..., part, part], score=self.rule, scale=self.scale
            )
        return out, chosen, allowed

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        """As if all scores were computed in full."""
        q, k, v, *_ = inputs
        return 2.0 * math.prod(q[:3]) * k[2] * (q[3] + v[3])

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        pattern = "" if self.pattern.allows_all else str(self.pattern)
        how = f"{type(self.quantize).__name__}, {self.quantize.bits} bits"
        return ", ".join(part for part in (how, "packed" if self.packed else "", pattern) if part)

    def widths(self, inputs: Sequence[Shape]) -> Shape:
        return inputs[0][1], inputs[0][-1], inputs[2][-1]


@kind("log-sum-exp")
@dataclass(frozen=True)
class LogSumExp(Semantics):
    """The logarithm of what softmax divides rows of scores (B, H, Sq, Sk) by, (B, H, Sq); -inf for a row of -inf."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (scores,) = inputs
        return (scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 20.0 * math.prod(inputs[0])

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@kind("importance bias")
@dataclass(frozen=True)
class ImportanceBias(Semantics):
    """What LARA's optimal importance weights add to the scores of queries for proposals: see
    :func:`fuser.ir.importance.importance_bias`.

    Inputs are queries (B, H, N, D), landmarks (B, H, C, D), and sums, heuristic and offset (B, H, C); it makes (B, H,
    N, C).
    """

    coefficient: float
    scale: float

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (importance_bias(*inputs, coefficient=self.coefficient, scale=self.scale),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return (2.0 * inputs[0][-1] + 50) * math.prod(output)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"of {output[-1]} landmarks"


@kind("disentangled bias")
@dataclass(frozen=True)
class DisentangledBias(Semantics):
    """What relative positions add to scores: ``queries`` times the products of query i with the position of key j, plus
    ``keys`` times those of key j with the position of query i (He et al., DeBERTa, arXiv:2006.03654, equation 4); one
    of them may be None, and is left out.

    Inputs are for each of these products of all rows with all positions, (B, H, Sq or Sk, P), and the position (Sq + Sk
    - 1,), int32, that a distance has: element Sk - 1 + i - j. Then perhaps a mask of the scores' shape, which is added,
    or forbids with False. It makes (B, H, Sq, Sk).
    """

    queries: float | None
    keys: float | None

    @property
    def parts(self) -> int:
        """How many of the two there are."""
        return (self.queries is not None) + (self.keys is not None)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        total, given = None, list(inputs)
        for factor, of_keys in ((self.queries, False), (self.keys, True)):
            if factor is None:
                continue
            products, positions = given.pop(0), given.pop(0)
            rows = products.shape[-2]
            others = positions.shape[0] + 1 - rows
            row, other = (torch.arange(size, device=products.device) for size in (rows, others))
            element = rows - 1 - row[:, None] + other if of_keys else others - 1 + row[:, None] - other
            part = products.gather(-1, positions[element].long().expand(*products.shape[:-1], others)) * factor
            part = part.mT if of_keys else part
            total = part if total is None else total + part
        assert total is not None
        for mask in given:
            total = total.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else total + mask
        return (total,)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * self.parts * math.prod(output)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"of {inputs[0][-1]} positions"


@kind("joined keys")
@dataclass(frozen=True)
class JoinedKeys(Semantics):
    """Keys or values of tokens (B, H, N, D) and of summaries (B, H, C, D) in one list, as windows see them."""

    windowed: Windowed

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.windowed.joined(*inputs),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[0][-2]} and {inputs[1][-2]}"


@kind("linear attention")
@dataclass(frozen=True)
class LinearAttention(Semantics):
    """Linear attention by a :class:`~fuser.ir.linear_attention.Recurrence`.

    Inputs are q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv), then, where there are some, decay (B, Hkv, Sk,
    1 or D), beta (B, Hkv, Sk, 1), and the first state, if it is ``resumed``. The second output is the last state, if it
    is ``kept``.
    """

    recurrence: Recurrence
    resumed: bool = False
    kept: bool = False

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *rest = inputs
        more = iter(rest)
        asked = self.recurrence.decay, self.recurrence.delta, self.resumed
        found = self.recurrence.evaluate(q, k, v, *(next(more) if there else None for there in asked))
        return found if self.kept else found[:1]

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        (batch, heads, queries, width), (_, kv_heads, keys, _) = inputs[:2]
        steps = 1 + self.recurrence.decay / 2 + self.recurrence.delta
        return 2.0 * batch * width * output[-1] * (heads * queries + steps * kv_heads * keys)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        r = self.recurrence
        parts = ("causal", r.causal), ("decay", r.decay), ("delta rule", r.delta), ("divided by sums", bool(r.floor))
        return ", ".join(word for word, said in parts if said)

    def widths(self, inputs: Sequence[Shape]) -> Shape:
        return inputs[0][1], inputs[0][-1]


@kind("features")
@dataclass(frozen=True)
class Features(Semantics):
    """A feature map of x (B, H, N, D) on directions (H, M, D): (B, H, N, M)."""

    map: FeatureMap

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.map.evaluate(*inputs),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return (2.0 * inputs[0][-1] + 20) * math.prod(output)

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return self.map.value


# ---- elementwise and row-wise operators


class _RowWise(Semantics):
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
class _Function(_RowWise):
    function: Expression

    @property
    def expression(self) -> Expression:
        return self.function


_ADD = ex.binary(Op.ADD)


@kind("bias")
@dataclass(frozen=True)
class Bias(_Function):
    """A sum with a constant row."""

    function: Expression = _ADD

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

    function: Expression = _ADD

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


@kind("pointwise")
@dataclass(frozen=True)
class Pointwise(_Function):
    """Any other elementwise function."""


@kind("scale")
@dataclass(frozen=True)
class Scale(_RowWise):
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
class FakeQuantize(_RowWise):
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
class ChangeScores(_RowWise):
    """What the score rule ``rule`` makes of scaled scores."""

    rule: ScoreRule

    @property
    def expression(self) -> Expression:
        return self.rule.expression

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return str(self.rule)


@kind("softmax")
@dataclass(frozen=True)
class Softmax(_RowWise):
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


@kind("embedding")
@dataclass(frozen=True)
class Embedding(Semantics):
    """Rows of a table (N, D) by their numbers (…)."""

    finishes_rows = True
    gathers = (0,)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        table, index = inputs
        return (torch.nn.functional.embedding(index, table),)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return ""


@kind("gather rows")
@dataclass(frozen=True)
class GatherRows(Embedding):
    """Rows of a value, seen as a matrix (N, D), by their numbers (…): windows of an image, what is shifted, or
    one token of every text."""


@kind("rotary")
@dataclass(frozen=True)
class Rotary(Semantics):
    """Rotary embedding of x (…, D): ``width`` columns from ``start`` on rotated by pairs, (a, b) to (a·cos − b·sin,
    b·cos + a·sin), the others as they are.

    The members of a pair are neighbours if ``interleaved``, else ``width / 2`` apart. cos and sin (…, width), which
    broadcast to x before their last dimension, have a number for each column; or, (…, width / 2), one for each pair.
    Raises ValueError for columns that are no pairs.
    """

    start: int
    width: int
    interleaved: bool

    def __post_init__(self) -> None:
        if self.start < 0 or self.width < 2 or self.width % 2:
            raise ValueError(f"{self.width} columns from {self.start} on cannot be rotated by pairs")

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = inputs[0]
        end = self.start + self.width
        cos, sin = (table if table.shape[-1] == self.width else self._of_columns(table) for table in inputs[1:])
        turned = x[..., self.start : end]
        if self.interleaved:
            partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            partner = torch.cat((-b, a), -1)
        return (torch.cat((x[..., : self.start], turned * cos + partner * sin, x[..., end:]), -1),)

    def keeps_rows(self, inputs: Sequence[Shape], output: Shape) -> bool:
        return True

    def _of_columns(self, table: Tensor) -> Tensor:
        return table.repeat_interleave(2, -1) if self.interleaved else torch.cat((table, table), -1)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 3.0 * math.prod(output[:-1]) * self.width

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        columns = f"{self.width} of {output[-1]}" if self.width < output[-1] else str(self.width)
        return f"{columns}, interleaved" if self.interleaved else columns


@kind("depthwise")
@dataclass(frozen=True)
class Depthwise(Semantics):
    """A convolution of every channel of a grid x (B, H, W, C) by itself with a weight (C, 1, kh, kw), amid ``padding``
    lines and columns of zeros on both sides; sizes are of lines, then columns."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight = inputs
        # A weight may be kept narrower than what it is multiplied with.
        grid, weight = x.permute(0, 3, 1, 2), weight.to(x.dtype)
        how = self.stride, self.padding, self.dilation
        return (torch.nn.functional.conv2d(grid, weight, None, *how, groups=weight.shape[0]).permute(0, 2, 3, 1),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 2.0 * math.prod(output) * math.prod(inputs[1][2:])

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][2]} × {inputs[1][3]} over {output[-1]}"


@kind("unfold")
@dataclass(frozen=True)
class Unfold(Semantics):
    """Windows of ``kernel`` pixels, ``stride`` apart, of grids x (B, P, H, W, C) amid ``padding`` lines and columns of
    zeros on both sides, as rows (B, lines, columns, P · kh · kw · C); sizes are of lines, then columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        (top, left), (high, wide), (down, right) = self.padding, self.kernel, self.stride
        padded = torch.nn.functional.pad(x, (0, 0, left, left, top, top))
        windows = padded.unfold(2, high, down).unfold(3, wide, right)
        return (windows.permute(0, 2, 3, 1, 5, 6, 4).flatten(3),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{self.kernel[0]} × {self.kernel[1]}"


@kind("concat")
@dataclass(frozen=True)
class Concat(Semantics):
    """Its inputs one behind the other along the dimension ``dim``."""

    dim: int

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, self.dim),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return " + ".join(str(shape[self.dim]) for shape in inputs)


# ---- caches


@kind("append")
@dataclass(frozen=True)
class Append(Semantics):
    """Rows (B, H, n, D) behind those of a cache (B, H, m, D): the cache of m + n rows.

    Its output has :func:`room` behind its rows. Where the memory of the cache that is given has it, too, and nobody
    else can see that, the output is in the same memory, and the rows that were there stay where they are.
    """

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(inputs, -2),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][-2]} behind {inputs[0][-2]}"


@kind("write rows")
@dataclass(frozen=True)
class WriteRows(Semantics):
    """Rows (B, H, n, D) at the positions (n,), int64, of a cache (B, H, m, D): the cache with these rows.

    Where it is what a call leaves in the cache that is given, it lies in the memory of that, and the other rows stay
    where they are. A position outside of the cache raises IndexRangeError.
    """

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        before, rows, at = inputs
        # A row of zeros may stand for all of them.
        return (before.contiguous().index_copy(2, at, rows),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][-2]} of {output[-2]}"


def room(rows: int) -> int:
    """Rows for which a cache of so many has room behind them: a quarter, in multiples of 64."""
    capacity = 64
    while capacity < rows:
        capacity += max(64, capacity // 256 * 64)
    return capacity - rows


# ---- masks of attention's scores (B, H, Sq, Sk)


class ScoreMask(Semantics):
    """What lets scores through or not; their second input, if they have one, is a mask given at run time."""


@kind("mask")
@dataclass(frozen=True)
class PatternMask(ScoreMask):
    """-inf for pairs that the constant ``pattern`` forbids, and for keys behind the query if it is ``causal``."""

    causal: bool = False
    pattern: Mask | None = None

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (scores,) = inputs
        q_len, kv_len = scores.shape[-2:]
        if self.causal:
            allowed = torch.ones(q_len, kv_len, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if self.pattern is not None:
            scores = scores.masked_fill(~self.pattern.dense(q_len, kv_len).to(scores.device), -math.inf)
        return (scores,)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        pattern = "" if self.pattern is None else str(self.pattern)
        return ", ".join(part for part in ("causal" if self.causal else "", pattern) if part)


@kind("mask")
@dataclass(frozen=True)
class BooleanMask(ScoreMask):
    """-inf where its second input, which broadcasts to the scores, is False."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, allowed = inputs
        return (scores.masked_fill(~allowed, -math.inf),)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "given at run time"


@kind("mask")
@dataclass(frozen=True)
class AdditiveMask(ScoreMask, _RowWise):
    """The sum with its second input, which broadcasts to the scores."""

    @property
    def expression(self) -> Expression:
        return _ADD

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "given at run time"


@kind("mask")
@dataclass(frozen=True)
class BiasByDistance(ScoreMask):
    """The sum with a bias of which query i and key j have element ``first`` + i - j, or + j where keys are
    ``reversed``: the second input, (1 or H, distances). Masked scores may have none."""

    first: int
    reversed: bool = False

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, row = inputs
        query, key = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        element = self.first + query[:, None] + (key if self.reversed else -key)
        return (scores + row[:, element.clamp(0, row.shape[1] - 1)],)

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return "a bias by distance"


@kind("mask")
@dataclass(frozen=True)
class DocumentMask(ScoreMask):
    """-inf for pairs of rows that are not of one document, or that the document's own mask forbids: its ``pattern``,
    and what is behind the query if it is ``causal``.

    Inputs are the scores, the ``rows`` (S,) and ``length`` (1,), both int64, ``is_key`` (S,) bool, and a plan of the
    same pairs (see :mod:`fuser.kernels.plan`), which attention kernels read in their place. Row r is position r %
    length of document r // length. How long the plan is, is known when it is there.
    """

    causal: bool = False
    pattern: Mask | None = None

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, rows, length, is_key, _ = inputs
        return (scores.masked_fill(~self.allowed(rows, length, is_key), -math.inf),)

    def allowed(self, rows: Tensor, length: Tensor, is_key: Tensor) -> Tensor:
        """Which rows see which: (S, S) bool, or (H, S, S) where the pattern has heads."""
        size = int(length)
        document, at = rows // size, rows % size
        allowed = (document[:, None] == document) & is_key
        if self.causal:
            allowed = allowed & (at[:, None] >= at)
        if self.pattern is not None:
            allowed = allowed & self.pattern.dense(size, size).to(rows.device)[..., at[:, None], at]
        return allowed

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return float(math.prod(output))

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        pattern = "" if self.pattern is None else str(self.pattern)
        return ", ".join(part for part in ("packed", "causal" if self.causal else "", pattern) if part)
