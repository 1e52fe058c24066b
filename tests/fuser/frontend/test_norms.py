"""Norms in the spellings that models have: one operator each, which computes what the model does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import OperatorGraph

WIDTH = 24
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5
Run = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(m: Any, x: Tensor) -> Tensor:
    return m.weight * rms(x.to(torch.float32)).to(x.dtype)


def gemma(m: Any, x: Tensor) -> Tensor:
    return (rms(x.float()) * (1.0 + m.weight.float())).type_as(x)


def t5(m: Any, x: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * x.to(m.weight.dtype)


def standardized(m: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * m.weight + m.bias


def over_heads(m: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (3, -1)).transpose(1, 2)
    return rms(heads).transpose(1, 2).flatten(2)


def softmax(m: Any, x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


SPELLINGS: Mapping[str, Run] = {
    "llama": llama,
    "gemma": gemma,
    "t5": t5,
    "olmo2": lambda m, x: (m.weight * rms(x.float())).to(x.dtype),
    "rms_norm": lambda m, x: F.rms_norm(x, (WIDTH,), m.weight, 1e-6),
    "layer_norm": lambda m, x: F.layer_norm(x, (WIDTH,), m.weight, m.bias),
    "square": lambda m, x: x / torch.sqrt(torch.square(x).mean(dim=2, keepdim=True) + 1e-6) * m.weight,
    "product": lambda m, x: x * (1.0 / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()),
    "power": lambda m, x: x * ((x**2).sum(-1, keepdim=True) / WIDTH + 1e-6) ** -0.5,
    "last dimension dropped": lambda m, x: x * (x.pow(2).mean(-1) + 1e-6).rsqrt().unsqueeze(-1),
    "expanded": lambda m, x: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt().expand_as(x),
    "vector_norm": lambda m, x: WIDTH**0.5 * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "linalg.norm": lambda m, x: x / torch.linalg.norm(x, dim=-1, keepdim=True),
    "norm": lambda m, x: x / x.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-12),
    "norm of one": lambda m, x: x / x.norm(p=1, dim=-1, keepdim=True),
    "largest": lambda m, x: x / torch.linalg.vector_norm(x, torch.inf, -1)[..., None],
    "normalize": lambda m, x: F.normalize(x, dim=-1) * m.weight,
    "centred": lambda m, x: x - x.mean(-1, keepdim=True),
    "variance": lambda m, x: (x - x.mean(-1, True)) * (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt(),
    "deviation": lambda m, x: m.weight * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5) + m.bias,
    "standardized": standardized,
    "heads": over_heads,
    "time first": lambda m, x: rms(x.transpose(0, 1)).transpose(0, 1) * m.weight,
    "softmax": softmax,
}


def raised(run: Run, x: Tensor = X, dtype: torch.dtype = torch.float32, dynamic: Any = False) -> OperatorGraph:
    with torch.no_grad():
        return raise_graph(capture(Model(run).eval().to(dtype), flatten_call((x.to(dtype),), {}), dynamic))


def kinds(graph: OperatorGraph) -> Counter[str]:
    return Counter(op.kind for op in graph.compute)


def computed(graph: OperatorGraph, run: Run, x: Tensor, dtype: torch.dtype, precision: torch.dtype | None) -> Tensor:
    state = {f"p_model_{name}": p for name, p in Model(run).to(dtype).named_parameters()}
    values = {name: state[name] for name in graph.constants if name in state}
    for name, constant in graph.constants.items():
        if constant.call is not None:
            values[name] = constant.evaluate([values[s] for s in constant.sources])
    found = evaluate(graph, {**values, graph.inputs[0]: x.to(dtype)}, precision)
    (out,) = (found[name] for name in graph.outputs)
    return out


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_one_operator_that_computes_what_was_written(name: str, dtype: torch.dtype) -> None:
    run = SPELLINGS[name]
    graph = raised(run, dtype=dtype)
    assert kinds(graph) == {"norm": 1}
    exact = run(Model(run).to(dtype).double(), X.to(dtype).double())
    ours = computed(graph, run, X, dtype, None).double()
    # What is stored in bf16 on the way is rounded once more, here by the model and there by what kernels store.
    assert (ours - exact).norm() <= (4e-7 if dtype is torch.float32 else 1e-2) * exact.norm()


@pytest.mark.parametrize("name", ["llama", "gemma", "deviation", "heads", "time first"])
def test_a_norm_is_found_for_all_lengths(name: str) -> None:
    graph = raised(SPELLINGS[name], dynamic=[[0, 1]])
    assert kinds(graph) == {"norm": 1}
    assert [str(size) for size in graph.values[graph.outputs[0]].shape] == ["batch", "sequence", str(WIDTH)]


def test_a_norm_keeps_the_order_of_casts_and_weight() -> None:
    x = X.bfloat16()
    for run in (llama, gemma, SPELLINGS["olmo2"]):
        ours = computed(raised(run, dtype=torch.bfloat16), run, X, torch.bfloat16, None)
        assert torch.equal(ours, run(Model(run).bfloat16(), x).to(ours.dtype)), run


def test_a_residual_before_a_norm_is_an_operator_of_its_own() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        x = x + m.linear(x)
        return x + m.linear(llama(m, x))

    found = [op.kind for op in raised(block).compute]
    assert found == ["gemm", "residual", "norm", "gemm", "residual"]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda m, x: (lambda y: (y * m.weight, y * m.bias))(rms(x)), {"norm": 1, "pointwise": 2}),
        (lambda m, x: rms(x) * (1 + m.linear(x)), {"norm": 1, "gemm": 1, "pointwise": 2}),
        (lambda m, x: F.silu(rms(x)), {"norm": 1, "activation": 1}),
        (lambda m, x: rms(rms(x) + 1), {"norm": 1}),
        (lambda m, x: rms(x * m.linear(x)), {"gemm": 1, "pointwise": 1, "norm": 1}),
        (lambda m, x: x.pow(2).mean(-1, keepdim=True), {"pointwise": 1, "reduction": 1}),
        (lambda m, x: x / x.mean(1, keepdim=True), {"pointwise": 2}),
        (lambda m, x: x / x.std((1, 2), keepdim=True), {"extern": 1, "pointwise": 1}),
        (lambda m, x: x * x.transpose(1, 2).mean(-1)[:, None], {"reduction": 1, "pointwise": 1}),
    ],
    ids=[
        "two weights",
        "run-time weight",
        "activation",
        "norm of a norm",
        "of a product",
        "no norm",
        "another dimension",
        "two dimensions",
        "of other rows",
    ],
)
def test_what_a_norm_is_made_of(run: Run, expected: dict[str, int]) -> None:
    assert kinds(raised(run)) == expected


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x * x.mean(-1, keepdim=True).sum(-1, keepdim=True),
        lambda m, x: x * x.mean(-1).sum(-1, keepdim=True)[..., None],
        lambda m, x: x / x.pow(2).sum(-1, keepdim=True).norm(dim=-1, keepdim=True),
    ],
    ids=["of a mean", "of the means of all rows", "of a norm"],
)
@pytest.mark.parametrize("length", [1, 5])
def test_a_reduction_of_one_number_is_no_part_of_a_norm(run: Run, length: int) -> None:
    # An expression would count the number once for every column.
    assert kinds(raised(run, X[:, :length]))["reduction"] >= 1


def test_what_is_used_elsewhere_is_no_part_of_a_norm() -> None:
    def run(m: Any, x: Tensor) -> Any:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * scale, scale

    graph = raised(run)
    assert kinds(graph) == {"pointwise": 4, "reduction": 1}
    assert len(graph.outputs) == 2
