"""One operator of every kind, with inputs and the definition of what it makes of them, for tests that need any."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from linear_reference import recurrent
from torch import Tensor

from fuser.ir.expression import Expression, Op, layer_norm, unary
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.masks import SlidingWindow
from fuser.ir.operators import (
    PV,
    QK,
    Activation,
    AdditiveMask,
    Append,
    Bf16Gemm,
    Bias,
    BiasByDistance,
    BooleanMask,
    ChangeScores,
    CodeGemm,
    Concat,
    Depthwise,
    DisentangledBias,
    DocumentMask,
    Embedding,
    Extern,
    FakeQuantize,
    FakeQuantizeAsFound,
    Features,
    GatherRows,
    Gemm,
    GroupedGemm,
    ImportanceBias,
    Int8Gemm,
    Int8WeightGemm,
    JoinedKeys,
    LinearAttention,
    LogSumExp,
    MergeHeads,
    Norm,
    PatternMask,
    Pointwise,
    PredictedAttention,
    QuantizedGemm,
    QuantizeRows,
    Reduction,
    Ref,
    Residual,
    Rotary,
    Scale,
    Semantics,
    Softmax,
    SplitHeads,
    TorchCall,
    Unfold,
    View,
    WriteRows,
)
from fuser.ir.prediction import DEQ
from fuser.ir.scores import SoftCap
from fuser.ir.windows import Windowed


@dataclass(frozen=True)
class Case:
    """An operator, inputs in float64, and its definition in other words."""

    semantics: Semantics
    inputs: tuple[Tensor, ...]
    definition: Callable[..., Tensor | tuple[Tensor, ...]]

    @property
    def expected(self) -> tuple[Tensor, ...]:
        """What it is to make of the inputs."""
        found = self.definition(*self.inputs)
        return found if isinstance(found, tuple) else (found,)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


X, ROW, SCORES = normal(2, 5, 8), normal(8), normal(2, 4, 6, 6)
BEYOND_ONE = [[abs(i - j) > 1 for j in range(6)] for i in range(6)]
OUTSIDE = ~torch.tensor(
    [[c == "x" for c in row] for row in ("xx....", "xx....", ".x....", "...xx.", "...xxx", "....xx")]
)
FORBIDDEN = torch.tensor(BEYOND_ONE)
RUNTIME = torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(1)) < 0.5
BARRED = SCORES.masked_fill(FORBIDDEN, -math.inf)
BARRED[0, 0, 3] = -math.inf


def _in_bytes(rows: Tensor) -> Tensor:
    """Rows in 127ths of their largest magnitude."""
    step = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / step).round() * step


def _softmax(x: Tensor) -> Tensor:
    weights = torch.where(torch.isinf(x), 0.0, x.exp())
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    scales = [t.float().abs().amax(-1, keepdim=True) / 127 for t in (x, weight)]
    a, b = (torch.round(t.float() / scale).double() for t, scale in zip((x, weight), scales, strict=True))
    return (torch.einsum("bsk,nk->bsn", a, b).float() * (scales[0] * scales[1].mT)).to(x.dtype)


EIGHTHS = normal(2, 5, 8).mul(30).round().clamp(-127, 127) / 8
EIGHTHS[..., 3] = 127 / 8
"""Rows whose codes are exactly eight times as large."""


def _product_of_codes(codes: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    own = weight.float().abs().amax(-1, keepdim=True) / 127
    columns = torch.round(weight.float() / own).double()
    return torch.einsum("bsk,nk->bsn", codes.double(), columns).float().to(scales.dtype) * (scales * own.mT)


def _int8_product_in_range(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """From -64 to 63; the scales of a half of the rows would be less than 0.02."""
    own = torch.maximum(x.float().abs().amax(-1, keepdim=True) / 63.5, torch.tensor(0.02))
    a = torch.minimum(torch.round(x.float() * (1 / own)), torch.tensor(63.0))
    return (torch.einsum("bsk,nk->bsn", a.double(), weight.double()).float() * own * scales).to(x.dtype)


def _int8_product_of_ranges(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """From -64 to 63, with zero points."""
    low, high = x.float().amin(-1, keepdim=True).clamp(max=0), x.float().amax(-1, keepdim=True).clamp(min=0)
    own = torch.maximum((high - low) / 127.0, torch.tensor(0.02))
    point = (-64 - torch.round(low / own)).clamp(-64, 63)
    a = (torch.round(x.float() * (1 / own)) + point).clamp(-64, 63) - point
    return (torch.einsum("bsk,nk->bsn", a.double(), weight.double()).float() * own * scales).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / (centred.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt() * weight + bias


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Columns 2 and 4, and 3 and 5, as complex numbers."""
    turned = x.clone()
    pairs = torch.complex(x[..., 2:4], x[..., 4:6]) * torch.complex(cos, sin)[..., :2]
    turned[..., 2:6] = torch.cat((pairs.real, pairs.imag), -1)
    return turned


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3 × 2 taps of every second line, the columns of a tap two apart, a line of zeros above and below."""
    lines = torch.cat((torch.zeros(2, 1, 6, 3), x, torch.zeros(2, 1, 6, 3)), 1).double()
    taps = [(i, j) for i in range(3) for j in range(2)]
    return sum(lines[:, i : i + 5 : 2, 2 * j : 2 * j + 4] * weight[:, 0, i, j] for i, j in taps)


def _windows(x: Tensor) -> Tensor:
    """2 × 3 pixels of every second line, a column of zeros on either side."""
    zeros = torch.zeros(2, 3, 4, 1, 2, dtype=x.dtype)
    grid = torch.cat((zeros, x, zeros), 3)
    rows = [[grid[:, :, i : i + 2, j : j + 3].flatten(1) for j in range(5)] for i in (0, 2)]
    return torch.stack([torch.stack(line, 1) for line in rows], 1)


def _positive(on: Tensor, x: Tensor) -> Tensor:
    most = torch.stack([torch.stack([head.max() for head in entry]) for entry in on])[..., None, None]
    return math.e ** (on - (x * x / 4).sum(-1, keepdim=True) - most) / 5**0.5 + 1e-4


def _importance(q: Tensor, landmarks: Tensor, sums: Tensor, heuristic: Tensor, offset: Tensor) -> Tensor:
    """LARA's weights, one landmark after another."""
    close = [((q * landmarks[:, :, None, c]).sum(-1) / 2 - sums[:, :, None, c]).exp() for c in range(5)]
    mean = sum(close) / 5
    alpha = [heuristic[:, :, None, c] + 2 * (close[c] - mean) for c in range(5)]
    return torch.stack([a.clamp(min=1e-8).log() + offset[:, :, None, c] for c, a in enumerate(alpha)], -1)


ANGLES = normal(5, 2).repeat(1, 2)
_VIEW = TorchCall(torch.as_strided, (Ref(0), (2, 3, 4, 8), (96, 8, 24, 1), 0))
CASES: Mapping[type[Semantics], Case] = {
    type(case.semantics): case
    for case in (
        Case(Extern(TorchCall(torch.add, (Ref(0), Ref(0))), "no kernel adds a value to itself"), (X,), lambda x: 2 * x),
        Case(
            PredictedAttention(DEQ(threshold=0.0, high_bits=None), 0.25),
            (SCORES, SCORES + 1, SCORES - 1),
            lambda q, k, v: _softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 4) @ v,
        ),
        Case(
            PredictedAttention(DEQ(threshold=0.0), 0.25),
            (SCORES, SCORES + 1, SCORES - 1),
            lambda q, k, v: _softmax(torch.einsum("bhid,bhjd->bhij", _in_bytes(q), _in_bytes(k)) / 4) @ v,
        ),
        Case(View(_VIEW), (normal(2, 4, 24),), lambda x: x.reshape(2, 4, 3, 8).permute(0, 2, 1, 3)),
        Case(SplitHeads(_VIEW), (normal(2, 4, 24),), lambda x: x.reshape(2, 4, 3, 8).permute(0, 2, 1, 3)),
        Case(
            MergeHeads(TorchCall(torch.as_strided, (Ref(0), (2, 4, 24), (96, 24, 1), 0))),
            (normal(2, 4, 3, 8),),
            lambda x: x.reshape(2, 4, 24),
        ),
        Case(Gemm(transposed=True), (X, normal(7, 8)), lambda x, w: torch.einsum("bsk,nk->bsn", x, w)),
        Case(
            Bf16Gemm(transposed=True),
            (X, normal(7, 8)),
            lambda x, w: torch.einsum("bsk,nk->bsn", x.bfloat16().double(), w.bfloat16().double()),
        ),
        Case(QuantizedGemm(transposed=True), (X, normal(7, 8)), _int8_product),
        Case(
            CodeGemm(transposed=True),
            ((8 * EIGHTHS).to(torch.int8), normal(7, 8), normal(2, 5, 1).abs()),
            _product_of_codes,
        ),
        Case(
            GroupedGemm(transposed=False),
            (X[0], normal(3, 8, 4), torch.tensor([2, 2, 4])),
            lambda x, w, _: torch.stack([*(x[:2] @ w[0]), *(x[2:4] @ w[2]), torch.zeros(4).double()]),
        ),
        Case(
            Int8Gemm(transposed=True, low=-64, high=63, least=0.02),
            (X, normal(7, 8).mul(40).round().to(torch.int8), normal(7).abs().float()),
            _int8_product_in_range,
        ),
        Case(
            Int8Gemm(transposed=True, low=-64, high=63, least=0.02, symmetric=False),
            (X, normal(7, 8).mul(40).round().to(torch.int8), normal(7).abs().float()),
            _int8_product_of_ranges,
        ),
        Case(
            Int8WeightGemm(transposed=False),
            (X, normal(8, 7).mul(40).round().to(torch.int8), normal(7).abs().float()),
            lambda x, w, s: torch.einsum("bsk,kn->bsn", x, w.to(x.dtype) * s.to(x.dtype)),
        ),
        Case(
            QK(),
            (normal(2, 4, 6, 8), normal(2, 2, 5, 8)),
            lambda q, k: torch.stack([torch.einsum("bqd,bkd->bqk", q[:, h], k[:, h // 2]) for h in range(4)], 1),
        ),
        Case(
            PV(),
            (SCORES, normal(2, 2, 6, 8)),
            lambda p, v: torch.stack([torch.einsum("bqk,bkd->bqd", p[:, h], v[:, h // 2]) for h in range(4)], 1),
        ),
        Case(
            LinearAttention(Recurrence(0.5, decay=True, delta=True)),
            (
                *(normal(2, 2, 40, width) / 2 for width in (3, 3, 5)),
                -normal(2, 2, 40, 3).abs(),
                normal(2, 2, 40, 1) / 9,
            ),
            lambda q, k, v, decay, beta: recurrent(q, k, v, decay, beta, scale=0.5)[0],
        ),
        Case(
            Features(FeatureMap.FAVOR_KEYS),
            (normal(2, 3, 6, 4), normal(3, 5, 4)),
            lambda x, w: _positive(torch.einsum("bhnd,hmd->bhnm", x, w) / 2**0.5, x),
        ),
        Case(
            LogSumExp(),
            (SCORES,),
            lambda s: torch.stack([torch.log(sum(head.exp().unbind(-1))) for head in s.unbind(1)], 1),
        ),
        Case(
            ImportanceBias(2.0, 0.5),
            (normal(2, 3, 7, 4), normal(2, 3, 5, 4), *(normal(2, 3, 5).abs() for _ in range(3))),
            _importance,
        ),
        Case(
            DisentangledBias(0.5, 2.0),
            (normal(2, 4, 3, 5), torch.tensor([4, 4, 0, 1, 2]).int(), normal(2, 4, 3, 5), torch.arange(5).int()),
            lambda q, of_q, k, of_k: torch.stack(
                [
                    torch.stack(
                        [q[:, :, i, of_q[2 + i - j]] / 2 + k[:, :, j, of_k[2 + i - j]] * 2 for j in range(3)], 2
                    )
                    for i in range(3)
                ],
                2,
            ),
        ),
        Case(
            JoinedKeys(Windowed(4, before=2, chunk=2, relative=True)),
            (normal(2, 3, 8, 5), normal(2, 3, 4, 5)),
            lambda near, far: torch.stack(
                [*near.unbind(2)[::-1], *[torch.zeros(2, 3, 5)] * 5, *far.unbind(2)[::-1]], 2
            ),
        ),
        Case(Bias(), (X, ROW), lambda x, b: x + b),
        Case(Activation(unary(Op.GELU)), (X,), lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
        Case(Residual(), (X, normal(2, 5, 8)), lambda x, y: x + y),
        Case(Norm(layer_norm(1e-5)), (X, ROW, -ROW), _norm),
        Case(Reduction(unary(Op.ROW_MEAN)), (X,), lambda x: sum(x.unbind(-1))[..., None] / 8),
        Case(
            QuantizeRows(factors=True),
            (EIGHTHS / 4, torch.full((8,), 4.0).double()),
            lambda x, _: ((x * 32).to(torch.int8), torch.full((2, 5, 1), 0.125)),
        ),
        Case(Pointwise(unary(Op.EXP)), (X,), lambda x: math.e**x),
        Case(Scale(0.125), (X,), lambda x: x / 8),
        Case(
            FakeQuantize(0.0625, -5, -12, 9),
            (X,),
            lambda x: ((x * 16).round() - 5).clamp(-12, 9).add(5) / 16,
        ),
        Case(
            FakeQuantizeAsFound(-12, 9),
            (X, torch.tensor([0.0625, 16, -5])),
            lambda x, _: ((x * 16).round() - 5).clamp(-12, 9).add(5) / 16,
        ),
        Case(ChangeScores(SoftCap(2.0)), (SCORES,), lambda s: 2 * torch.tanh(s / 2)),
        Case(Softmax(masked=True), (BARRED,), _softmax),
        Case(Embedding(), (normal(9, 3), torch.tensor([[8, 0], [4, 4]])), lambda t, i: torch.stack([t[j] for j in i])),
        Case(GatherRows(), (X[0], torch.tensor([[4, 0], [2, 2]])), lambda t, i: torch.stack([t[j] for j in i])),
        Case(Rotary(2, 4, interleaved=False), (X, ANGLES.cos(), ANGLES.sin()), _turned),
        Case(Append(), (SCORES, SCORES[:, :, :2]), lambda a, b: torch.stack([*a.unbind(2), *b.unbind(2)], 2)),
        Case(Depthwise((2, 1), (1, 0), (1, 2)), (normal(2, 5, 6, 3), normal(3, 1, 3, 2)), _depthwise),
        Case(Unfold((2, 3), (2, 1), (0, 1)), (normal(2, 3, 4, 5, 2),), _windows),
        Case(Concat(1), (X, X[:, :2]), lambda a, b: torch.stack([*a.unbind(1), *b.unbind(1)], 1)),
        Case(
            WriteRows(),
            (SCORES, SCORES[:, :, :2], torch.tensor([3, 0])),
            lambda a, b, _: torch.stack([b[:, :, 1], a[:, :, 1], a[:, :, 2], b[:, :, 0], *a.unbind(2)[4:]], 2),
        ),
        Case(PatternMask(pattern=SlidingWindow(1, 1)), (SCORES,), lambda s: torch.where(FORBIDDEN, -math.inf, s)),
        Case(
            DocumentMask(pattern=SlidingWindow(1, 1)),
            (SCORES, torch.tensor([0, 1, 2, 5, 6, 7]), torch.tensor([5]), torch.arange(6) != 2, torch.tensor([0])),
            lambda s, *_: s.masked_fill(OUTSIDE, -math.inf),
        ),
        Case(
            BiasByDistance(5),
            (SCORES, normal(4, 11)),
            lambda s, b: s + torch.stack([torch.stack([head[i : i + 6].flip(0) for i in range(6)]) for head in b]),
        ),
        Case(BooleanMask(), (SCORES, RUNTIME), lambda s, m: torch.where(m, s, -math.inf)),
        Case(AdditiveMask(), (SCORES, RUNTIME.double()), lambda s, m: s + m),
    )
}
SAMPLES: Mapping[type[Semantics], Semantics] = {kind: case.semantics for kind, case in CASES.items()}


def semantics(kind: type[Semantics], function: Expression) -> Semantics:
    """An operator of a kind; one that can compute any row expression computes ``function``."""
    made: Semantics = kind(function) if hasattr(SAMPLES[kind], "function") else SAMPLES[kind]  # type: ignore[call-arg]
    return made
