"""Operators of attention: scores, what is added to them, weighted values, and linear attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuser.ir.importance import importance_bias
from fuser.ir.linear_attention import FeatureMap, Recurrence
from fuser.ir.masks import Dense, Mask
from fuser.ir.operators.base import Semantics, Shape, kind
from fuser.ir.operators.score_masks import DocumentMask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.windows import Windowed


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
