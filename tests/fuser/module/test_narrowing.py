"""Values that pass between layers in int8 and are stored in bf16: which, what becomes of numbers, when they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fuser
from fuser.ir.evaluation import evaluate, value_of
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import Target, emulated_target
from fuser.module import quantizing
from fuser.module.narrowing import narrows


@pytest.fixture(autouse=True)
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU stores and reads bf16; that only some gain by it is left out."""
    monkeypatch.setattr(quantizing, "narrows", lambda target: True)


class Attention(nn.Module):
    """Attention with 4 heads of 16 whose projections are layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 16)).transpose(1, 2)

    def forward(self, x: Tensor) -> Any:
        found = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A post-norm block, whose gelu has 128 columns."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = attention or Attention()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x + self.attention(x))
        return self.second(x + self.down(F.gelu(self.up(x))))


class ReturnsGelu(Block):
    def forward(self, x: Tensor) -> Any:
        inner = F.gelu(self.up(x))
        return self.down(inner), inner


class ReturnsKeys(Attention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), k


class ReturnsWeights(Attention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        weights = (q @ k.mT / 4).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class ReadTwice(Attention):
    """Values of attention that something else reads, too."""

    def forward(self, x: Tensor) -> Any:
        v = self.v(x)
        found = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(v))
        return self.out(found.transpose(1, 2).flatten(2)) + v


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.both, self.down = nn.Linear(64, 256), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))


def run(make: Callable[[], nn.Module], x: Tensor, **options: Any) -> tuple[fuser.OptimizedModule, nn.Module, Any]:
    torch.manual_seed(0)
    model = make().eval()
    fast = fuser.optimize(model, quantize=fuser.Int8(quality=0, smooth=False, **options), search="model")
    with torch.no_grad():
        return fast, model, fast(x)


def narrow(graph: OperatorGraph) -> list[tuple[int, ...]]:
    """Shapes of what is stored in bf16."""
    return sorted(s.shape for s in graph.values.values() if s.base is None and s.dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (Block, [(2, 4, 9, 16), (2, 9, 128), (2, 9, 192)]),
        # The norm of a pre-norm block is not stored at all, but rounded to codes by its kernel.
        (Gated, [(2, 9, 128)]),
        (ReturnsGelu, []),
        (ReturnsKeys, []),
        (ReturnsWeights, []),
        (ReadTwice, []),
    ],
)
def test_what_only_layers_and_their_attention_read_is_narrow(
    make: Callable[[], nn.Module], shapes: list[tuple[int, ...]]
) -> None:
    x = rows(2, 9)
    fast, model, got = run(make, x)
    graph = fast.programs[-1].graph
    assert narrow(graph) == shapes
    assert all(graph.values[v].dtype == torch.float32 for v in (*graph.inputs, *graph.outputs))
    with torch.no_grad():
        want = model(x)
    got, want = ((r if isinstance(r, tuple) else (r,)) for r in (got, want))
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == exact.dtype
        assert F.cosine_similarity(ours.double(), exact.double(), dim=-1).min() > 0.998


@pytest.mark.parametrize("make", [Block, Gated])
def test_kernels_give_what_the_graph_says(make: Callable[[], nn.Module]) -> None:
    x = rows(3, 17)
    fast, _, got = run(make, x)
    graph, parameters = fast.programs[-1].graph, fast.programs[-1].captured.parameters
    constants = {name: value_of(name, graph.constants, parameters) for name in graph.constants}
    values = {**constants, graph.inputs[0]: x}
    (want,) = evaluate(graph, values).values()
    # Scores are rounded to bf16 there alone, and a number at a border may become the code beside it.
    assert float((got - want).norm() / want.norm()) < 5e-3
    plain = run(make, x, bf16=False)[2]
    assert 0 < float((got - plain).norm() / plain.norm()) < 2e-2


def test_outputs_decide() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), rows(2, 9)
    kept = {}
    for quality in (0.9, 0.999999):
        how = fuser.Int8([x], quality=quality, smooth=False)
        fast = fuser.optimize(model, quantize=how, search="model")
        with torch.no_grad():
            fast(x)
        precision = fast.snapshot().precision
        assert precision is not None
        kept[quality] = precision.narrow
        line = "values between layers in eight bits: bf16"
        assert (line in precision.lines) == precision.narrow == bool(narrow(fast.programs[-1].graph))
    assert kept == {0.9: True, 0.999999: False}


def test_targets_that_gain() -> None:
    def cpu(arch: str, *features: str) -> Target:
        return Target("cpu", arch, frozenset(features), 2, (1, 1, 1), 1e11, 1e12, 0.0)

    assert narrows(cpu("avx512", "avx512_bf16"))
    assert not narrows(cpu("avx512")) and not narrows(cpu("avx2"))
    assert not narrows(emulated_target("sm_90"))
