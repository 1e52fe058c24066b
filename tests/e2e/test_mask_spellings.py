"""Masks as models write them: what is forbidden, what is only very low, and what stays fused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fuser

B, S, WIDTH, HEADS = 2, 12, 32, 2
LOW = torch.finfo(torch.float32).min
X = torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(0))
# The first sample is padded on the left, so that with a causal mask its first rows see nothing.
PADDING = torch.arange(S) >= torch.tensor([[5], [0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
Scores = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, scores: Scores) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("causal", CAUSAL)
        self.scores = scores

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q @ k.transpose(-1, -2) * 0.25, padding)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def added(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


MASKS: dict[str, Scores] = {
    "padding filled with the minimum": lambda s, p: s.masked_fill(~p[:, None, None], LOW),
    "padding chosen over the minimum": lambda s, p: torch.where(p[:, None, None], s, LOW),
    "padding added as the minimum": lambda s, p: s + (1.0 - p[:, None, None].float()) * LOW,
    "padding added as a number": lambda s, p: s + (1.0 - p[:, None, None].float()) * -10000.0,
    "causal filled with the minimum": lambda s, p: s.masked_fill(~CAUSAL, LOW),
    "causal and padding, both the minimum": lambda s, p: s.masked_fill(~(CAUSAL & p[:, None, None]), LOW),
    "causal the minimum, then padding added": lambda s, p: torch.where(CAUSAL, s, LOW) + added(p[:, None, None], LOW),
    "future rows that see nothing": lambda s, p: s + added(CAUSAL.roll(3, 0) & CAUSAL, LOW),
}


@pytest.mark.parametrize("everything", [False, True], ids=["some", "nothing"])
@pytest.mark.parametrize("name", MASKS)
def test_a_finite_minimum_is_added_and_forbids_nothing(name: str, everything: bool) -> None:
    model = Attention(MASKS[name]).eval()
    fast = fuser.optimize(model)
    padding = PADDING & torch.tensor([[not everything], [True]])
    with torch.no_grad():
        mine, theirs, truth = fast(X, padding), model(X, padding), model.double()(X.double(), padding)
    if "number" in name or "added" in name:
        # What is left of a score below a large number is its rounding, which is PyTorch's only in PyTorch's order.
        assert torch.allclose(mine, theirs, atol=2e-3)
    else:
        assert float((mine - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-6 * float(truth.norm())
    assert {k.family for k in fast.kernels} >= {"attention"} and fast.fallbacks == ()


@pytest.mark.parametrize("low", [LOW, -math.inf])
def test_a_causal_mask_stays_a_pattern_where_every_row_sees_something(low: float) -> None:
    fast = fuser.optimize(Attention(lambda s, p: s.masked_fill(~CAUSAL, low)).eval(), example_inputs=(X, PADDING))
    (kernel,) = (k for k in fast.kernels if k.family == "attention")
    (program,) = fast.programs
    (mask,) = (op for op in program.graph.operators if op.kind == "mask")
    assert mask.semantics.pattern is not None and len(mask.inputs) == 1
    assert mask.name in kernel.operators


def layers(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = getattr(nn, f"Transformer{kind}Layer")(WIDTH, HEADS, 64, batch_first=True)
    return getattr(nn, f"Transformer{kind}")(layer, 1).eval()


@pytest.mark.parametrize("written", ["bool", "float"])
def test_encoders_and_decoders_take_masks_without_a_word_about_causality(written: str) -> None:
    mask = ~CAUSAL if written == "bool" else nn.Transformer.generate_square_subsequent_mask(S)
    encoder, decoder = layers("Encoder"), layers("Decoder")
    for model, inputs, names in ((encoder, (X,), {"mask": mask}), (decoder, (X, X * 0.5), {"tgt_mask": mask})):
        fast = fuser.optimize(model)
        with torch.no_grad():
            assert torch.allclose(fast(*inputs, **names), model(*inputs, **names), atol=1e-5)
        assert fast.fallbacks == ()
        assert {k.family for k in fast.kernels} >= {"gemm", "attention"}
