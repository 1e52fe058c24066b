"""The operator graphs that models raise to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import CaptureError
from fuser.ir.graph import Operator, OperatorGraph, is_kind
from fuser.ir.masks import Causal, SlidingWindow
from fuser.ir.operators import (
    PV,
    QK,
    AdditiveMask,
    BooleanMask,
    ChangeScores,
    Extern,
    Gemm,
    PatternMask,
    Scale,
    ScoreMask,
    Semantics,
)
from fuser.ir.scores import SoftCap
from fuser.masks import from_dense

WIDTH, HEADS, S = 32, 4, 12
X = torch.randn(2, S, WIDTH, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.ones(S, S, dtype=torch.bool).tril())
        self.register_buffer("bias", torch.randn(HEADS, S, S))
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


M = TypeVar("M", bound=Semantics)


def raised(run: Callable[..., Any], *inputs: Tensor, **settings: Any) -> OperatorGraph:
    return raise_graph(capture(Model(run).eval(), flatten_call(inputs or (X,), {})), **settings)


def kinds(graph: OperatorGraph) -> Counter[str]:
    return Counter(op.kind for op in graph.compute)


def only(graph: OperatorGraph, kind: type[M]) -> Operator[M]:
    (found,) = (op for op in graph.operators if is_kind(op, kind))
    return found


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attention(*masks: Tensor, causal: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        return F.scaled_dot_product_attention(q, k, v, *masks, is_causal=causal).transpose(1, 2).flatten(2)

    return run


def test_attention_is_one_gemm_and_five_operators_without_copies() -> None:
    graph = raised(attention())
    assert kinds(graph) == {"gemm": 1, "bias": 1, "qk": 1, "scale": 1, "softmax": 1, "pv": 1}
    gemm = only(graph, Gemm)
    assert graph.values[gemm.output].shape == (2, S, 3 * WIDTH)
    assert only(graph, Scale).semantics.scale == pytest.approx((WIDTH // HEADS) ** -0.5)
    pv = graph.values[only(graph, PV).output]
    # Heads lie inside a token, so that merging them moves nothing.
    assert pv.strides == (S * WIDTH, WIDTH // HEADS, WIDTH, 1)


def test_a_block_keeps_the_granularity_of_the_table() -> None:
    graph = raised(lambda m, x: m.norm(x + m.b(F.gelu(m.a(x)))))
    assert [op.kind for op in graph.operators] == [*("gemm", "bias", "activation", "gemm", "bias", "residual", "norm")]


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: F.dropout(m.a(x), 0.1, False),
        lambda m, x: m.a(x).contiguous().clone().detach(),
        lambda m, x: m.a(x).to(torch.float32),
        lambda m, x: m.a(x).view(2 * S, WIDTH).reshape(2, S, WIDTH).unsqueeze(0).squeeze(0),
        lambda m, x: x @ m.a.weight.t() + m.a.bias,
        lambda m, x: torch.addmm(m.a.bias, x.view(-1, WIDTH), m.a.weight.t()).view(2, S, WIDTH),
        lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1).contiguous(),
    ],
)
def test_what_moves_nothing_costs_nothing(run: Callable[..., Any]) -> None:
    assert kinds(raised(run)) == {"gemm": 1, "bias": 1}


def test_what_depends_on_weights_alone_is_a_constant() -> None:
    graph = raised(lambda m, x: F.linear(x, (m.a.weight @ m.b.weight).tanh(), m.c.bias * 2 + torch.arange(WIDTH)))
    assert kinds(graph) == {"gemm": 1, "bias": 1}
    assert {v for op in graph.compute for v in op.inputs} - set(graph.inputs) - set(graph.producer) <= set(
        graph.constants
    )


def test_a_masked_row_of_a_causal_mask_stays_a_pattern() -> None:
    expected = raised(attention(causal=True))
    assert only(expected, PatternMask).semantics.causal is True

    def buffered(m: Any, x: Tensor) -> Tensor:
        return attention(m.mask)(m, x)

    graph = raised(buffered)
    assert only(graph, PatternMask).semantics.pattern == Causal()
    assert len(only(graph, PatternMask).inputs) == 1
    assert len(graph.inspected) == 1


@pytest.mark.parametrize(
    "mask",
    [
        lambda m: torch.zeros(S, S).masked_fill(~m.mask, -math.inf),
        lambda m: (1.0 - m.mask.float()) * torch.finfo(torch.float32).min,
        lambda m: m.mask[None, None].expand(2, HEADS, S, S),
    ],
    ids=["-inf", "lowest", "expanded"],
)
def test_constant_masks_become_patterns(mask: Callable[[Any], Tensor]) -> None:
    graph = raised(lambda m, x: attention(mask(m))(m, x))
    assert only(graph, PatternMask).semantics.pattern == Causal()


def test_a_constant_mask_that_allows_everything_vanishes() -> None:
    graph = raised(lambda m, x: attention(m.mask | True)(m, x))
    assert kinds(graph)["mask"] == 0


def test_masks_of_each_head_are_patterns_and_biases_are_not() -> None:
    per_head = raised(lambda m, x: attention(m.bias > -1)(m, x))
    assert only(per_head, PatternMask).semantics.pattern.heads == HEADS
    bias = only(raised(lambda m, x: attention(m.bias)(m, x)), ScoreMask)
    assert bias.semantics == AdditiveMask() and len(bias.inputs) == 2


def test_a_constant_and_a_runtime_mask_stay_apart() -> None:
    keep = torch.ones(2, 1, 1, S, dtype=torch.bool)
    graph = raised(lambda m, x, keep: attention(m.mask & keep)(m, x), X, keep)
    masks = [op for op in graph.operators if is_kind(op, ScoreMask)]
    assert [op.semantics for op in masks] == [PatternMask(pattern=Causal()), BooleanMask()]
    assert [len(op.inputs) for op in masks] == [1, 2]
    # Where both are needed as one tensor they are computed.
    both = raised(lambda m, x, keep: (attention(m.mask & keep)(m, x), m.mask & keep), X, keep)
    assert kinds(both)["extern"] == 1


def test_the_attention_argument_restricts_self_attention() -> None:
    window = SlidingWindow(2, 2)
    assert only(raised(attention(), attention=AttentionSpec(window)), PatternMask).semantics.pattern == window
    other = torch.randn(2, 5, WIDTH)
    cross = raised(
        lambda m, x, y: F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(y)), heads(m.c(y))),
        X,
        other,
        attention=AttentionSpec(window),
    )
    assert kinds(cross)["mask"] == 0


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: (s / math.sqrt(8)).masked_fill(torch.ones(S, S).tril() == 0, -math.inf),
        lambda s: torch.where(torch.ones(S, S).tril() > 0, s * 8**-0.5, torch.tensor(-1e38)),
        lambda s: torch.where(torch.ones(S, S).tril() > 0, s, torch.full((), -math.inf)) / torch.tensor(8.0).sqrt(),
        lambda s: s.double().float() * 8**-0.5 + torch.full((S, S), -math.inf).triu(1),
    ],
)
def test_written_attention_is_recognized(scores: Callable[[Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        return (torch.softmax(scores(q @ k.transpose(-1, -2)), -1) @ v).transpose(1, 2).flatten(2)

    graph = raised(run)
    assert kinds(graph) == {"gemm": 1, "bias": 1, "qk": 1, "scale": 1, "mask": 1, "softmax": 1, "pv": 1}
    assert only(graph, PatternMask).semantics.pattern == Causal()
    assert only(graph, Scale).semantics.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: s.masked_fill(s > 1, -math.inf) * -1.0,
        lambda s: (s * 3).int().float(),
        lambda s: s.half().float(),
        lambda s: (s + torch.randn(S, S)) * 0.5,
        lambda s: s.masked_fill(torch.ones(S, S).tril() == 0, -100.0),
        lambda s: 1.0 / s,
    ],
    ids=["negated", "integers", "half", "scaled sum", "mild", "inverse"],
)
def test_what_is_not_attention_is_left_alone(scores: Callable[[Tensor], Tensor]) -> None:
    graph = raised(lambda m, x: torch.softmax(scores(heads(x) @ heads(x).transpose(-1, -2)), -1) @ heads(x))
    assert kinds(graph)["qk"] == 0 and kinds(graph)["pv"] == 0


def test_an_average_of_attention_that_nobody_reads_is_no_reader() -> None:
    torch.manual_seed(0)
    pool, probe = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(1, 1, WIDTH)

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool
            self.probe = nn.Parameter(probe)

        def forward(self, x: Tensor) -> Tensor:
            pooled: Tensor = self.pool(self.probe.expand(len(x), -1, -1), x, x)[0]
            return pooled

    found = kinds(raise_graph(capture(Pooling().eval(), flatten_call((X,), {}))))
    assert (found["qk"], found["softmax"], found["pv"], found["extern"]) == (1, 1, 1, 0)


def test_scores_that_are_returned_stay() -> None:
    def run(m: Any, x: Tensor) -> Any:
        p = torch.softmax(heads(m.a(x)) @ heads(m.b(x)).transpose(-1, -2), -1)
        return p @ heads(m.c(x)), p

    assert kinds(raised(run))["qk"] == 0


def test_outputs_that_eager_copies_are_copied() -> None:
    graph = raised(lambda m, x: (lambda y: (x, x.clone(), y, y.view(-1), y.clone()))(m.a(x)))
    bases = [graph.base(v) for v in graph.outputs]
    assert bases[2] == bases[3]
    assert len(set(bases)) == 4
    assert sum("copy" in op.reason for op in graph.compute) == 2


def test_one_tensor_several_times_is_not_copied() -> None:
    graph = raised(lambda m, x: torch.stack([m.a(x)] * 2, 1) * torch.stack([m.b(x), m.c(x)], 1))
    assert [str(op.semantics) for op in graph.operators if is_kind(op, Extern)] == ["aten::stack"]


def test_few_rows_made_at_run_time_are_multiplied_by_sums() -> None:
    graph = raised(lambda m, x: m.a(x[:, 0]) @ m.b(x[:, 1]).t() * 3)
    assert kinds(graph) == {"gemm": 2, "bias": 2, "reduction": 1, "pointwise": 1}
    many = raised(lambda m, x: m.a(x[0]) @ m.b(x[1]).t() * 3)
    assert kinds(many)["extern"] == 1


def test_a_mask_that_every_layer_makes_is_made_once_unless_it_is_returned() -> None:
    allowed, bias = torch.rand(S, S) > 0.5, torch.randn(HEADS, S, S)

    def mask(allowed: Tensor, bias: Tensor, lowest: float) -> Tensor:
        return torch.where(allowed, bias, lowest)

    def run(m: Any, x: Tensor, allowed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        returned = mask(allowed, bias, -5.0), mask(allowed, bias, -5.0)[:, None]
        for lowest in (-math.inf, -math.inf, -1e4):
            q = heads(m.a(x))
            x = F.scaled_dot_product_attention(q, q, q, mask(allowed, bias, lowest)).transpose(1, 2).flatten(2)
        return x, *returned

    graph = raised(run, X, allowed, bias)
    # Two that are returned, and one for each number.
    assert sum("where" in str(op.semantics) for op in graph.operators) == 4


def test_random_operators_keep_their_order() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.a(x) + torch.rand_like(m.a(x).cumsum(0)), torch.rand(3), torch.rand(4)

    graph = raised(run)
    sizes = [graph.values[op.output].numel for op in graph.operators if op.semantics.is_random]
    assert sizes == [X.numel(), 3, 4]


def test_unused_operators_are_dropped_unless_they_draw_numbers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.b(x + 1).cumsum(1)
        torch.rand(3)
        return m.a(x)

    assert kinds(raised(run)) == {"gemm": 1, "bias": 1, "extern": 1}


def test_scalars_that_are_parameters_are_remembered() -> None:
    graph = raised(lambda m, x: m.a(x) * m.scale)
    assert len(graph.inspected) == 1
    assert raised(lambda m, x: m.a(x) * 0.5).inspected == frozenset()


def test_masks_with_functions_inside_get_a_hash() -> None:
    mask = from_dense(torch.ones(S, S, dtype=torch.bool).tril()) & SlidingWindow(3, 0)
    graph = raised(attention(), attention=AttentionSpec(mask))
    assert graph.regions[-1].hash


def test_constants_lie_as_operators_of_pytorch_read_them() -> None:
    graph = raised(lambda m, x: torch.cdist(x[0], m.a.weight.t()) + torch.cdist(x[1], m.a.weight.t()))
    read = {op.inputs[1] for op in graph.operators if is_kind(op, Extern) and len(op.inputs) == 2}
    (name,) = (name for name in read if name in graph.constants)
    assert graph.values[name].strides == (1, WIDTH)
    weight = torch.randn(WIDTH, WIDTH)
    made = graph.constants[name].evaluate([graph.constants[graph.constants[name].sources[0]].evaluate([weight])])
    assert made.stride() == (1, WIDTH) and made.equal(weight.t())


def test_axes_that_do_not_follow_each_other_are_reduced_one_by_one() -> None:
    x = torch.randn(17, 4, 18, 32)
    graph = raised(lambda m, x: x.mean((0, 2)) + x.sum((0, 1, 2)), x)
    assert [list(op.semantics.call.args[1]) for op in graph.operators if is_kind(op, Extern)] == [[2], [0], [0, 1, 2]]


def test_equal_layers_are_equal_regions() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    graph = raise_graph(capture(model, flatten_call((X,), {})))
    assert len(graph.regions) > len({region.hash for region in graph.regions})
    assert kinds(graph)["extern"] == 0


def test_graphs_with_parts_are_refused() -> None:
    with pytest.raises(CaptureError, match="cannot look into"):
        raised(lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)))


@pytest.mark.parametrize("dynamic", [False, [[0, 1]]], ids=["fixed", "all lengths"])
@pytest.mark.parametrize("written_out", [False, True])
def test_heads_repeated_for_groups_of_queries_are_read_in_place(dynamic: Any, written_out: bool) -> None:
    def repeated(t: Tensor) -> Tensor:
        batch, kv_heads, length, width = t.shape
        return t[:, :, None].expand(batch, kv_heads, 2, length, width).reshape(batch, 2 * kv_heads, length, width)

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        k, v = (repeated(t[:, ::2]) for t in (k, v))
        if written_out:
            return ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    graph = raise_graph(capture(Model(run).eval(), flatten_call((X,), {}), dynamic), sample={"batch": 2, "sequence": S})
    assert kinds(graph) == {"gemm": 1, "bias": 1, "qk": 1, "scale": 1, "softmax": 1, "pv": 1}
    for op, position in ((only(graph, QK), 1), (only(graph, PV), 1)):
        assert graph.values[op.inputs[position]].shape[1] == HEADS // 2


@pytest.mark.parametrize("dynamic", [False, [[0, 1]]], ids=["fixed", "all lengths"])
def test_what_is_joined_with_nothing_stays_where_it_is(dynamic: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        k, v = torch.cat([torch.tensor([]), k], dim=-2), torch.cat([v[:, :, :0], v], dim=-2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    graph = raise_graph(capture(Model(run).eval(), flatten_call((X,), {}), dynamic), sample={"batch": 2, "sequence": S})
    assert kinds(graph) == {"gemm": 1, "bias": 1, "qk": 1, "scale": 1, "softmax": 1, "pv": 1}


CAPPED = {"gemm": 1, "bias": 1, "qk": 1, "scale": 1, "score rule": 1, "softmax": 1, "pv": 1}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (lambda m, s: torch.tanh(s * 0.3 / 20) * 20, CAPPED),
        (lambda m, s: 20.0 * torch.tanh(s * 0.3 / 20) + m.bias, {**CAPPED, "mask": 1}),
        (lambda m, s: (torch.tanh(s * 0.3 / 20) * 20).masked_fill(~m.mask, -math.inf), {**CAPPED, "mask": 1}),
    ],
    ids=["alone", "bias", "mask"],
)
def test_a_soft_cap_of_scores_that_is_written_out_is_a_rule(
    scores: Callable[[Any, Tensor], Tensor], expected: dict[str, int]
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        return (scores(m, q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    graph = raised(run)
    assert kinds(graph) == expected
    assert only(graph, ChangeScores).semantics.rule == SoftCap(20.0)
    assert only(graph, Scale).semantics.scale == pytest.approx(0.3)


@pytest.mark.parametrize(
    "scores",
    [
        lambda m, s: torch.tanh(s + m.bias) * 20,
        lambda m, s: torch.tanh(torch.tanh(s) * 3) * 20,
        lambda m, s: torch.tanh(s) * -20,
        lambda m, s: torch.tanh(s.masked_fill(~m.mask, -math.inf)) * 20,
    ],
    ids=["bias inside", "twice", "negative", "mask inside"],
)
def test_other_functions_of_scores_are_no_soft_cap(scores: Callable[[Any, Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x)) for p in (m.a, m.b, m.c))
        return (scores(m, q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    assert "score rule" not in kinds(raised(run))
