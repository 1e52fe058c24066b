"""FlexAttention's interface against PyTorch's own, in float64."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import rounding_of
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torchs

import fuser
from fuser.attention.launch import say
from fuser.ir.errors import ScoreError
from fuser.ir.prediction import Prediction
from fuser.ir.scores import SoftCap

HEADS, QUERIES, KEYS = 4, 70, 90
SLOPES = torch.exp2(-torch.arange(1, HEADS + 1) * 2.0)
TABLE = torch.randn(HEADS, QUERIES + KEYS, generator=torch.Generator().manual_seed(1))
SEEN = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(2)) > 0.2


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say.cache_clear()
        yield


def inputs(heads: int = HEADS, keys: int = KEYS) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, n, 16, generator=g) for h, n in ((HEADS, QUERIES), (heads, keys), (heads, keys)))


def check(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> None:
    out, lse = fuser.flex_attention(q, k, v, return_lse=True, **settings)
    exact, sums = torchs.flex_attention(q.double(), k.double(), v.double(), return_lse=True, **settings)
    # Scores reach 150, and their exponentials have that many roundings.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), sums.double(), rtol=2e-6, atol=1e-5)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


KNOWN: dict[str, Callable[..., Any]] = {
    "same": lambda s, b, h, q, k: s,
    "factor": lambda s, b, h, q, k: s * 0.5,
    "quotient": lambda s, b, h, q, k: s / 3,
    "relative": lambda s, b, h, q, k: s + (q - k),
    "by head": lambda s, b, h, q, k: s + h,
    "by batch": lambda s, b, h, q, k: s - b * 0.1 * q,
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "table": lambda s, b, h, q, k: s + TABLE[h, q - k + KEYS],
    "number": lambda s, b, h, q, k: 2.0 + s,
    "cap": lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0),
    "cap of more": lambda s, b, h, q, k: torch.tanh(s * 0.7) * 2.0,
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf),
    "inverted": lambda s, b, h, q, k: torch.where(q < k, torch.tensor(-math.inf), s),
    "padding": lambda s, b, h, q, k: torch.where(SEEN[b, k], s, float("-inf")),
    "all": lambda s, b, h, q, k: torch.where(q >= k, 5 * torch.tanh(s * 2 / 5) + SLOPES[h] * (k - q) + 1, -math.inf),
}


@pytest.mark.parametrize("name", KNOWN)
def test_kernels_know(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(*inputs(), score_mod=KNOWN[name])
    assert not caplog.records


UNKNOWN: dict[str, tuple[Callable[..., Any], str]] = {
    "square": (lambda s, b, h, q, k: s * s, "more than"),
    "sine": (lambda s, b, h, q, k: torch.sin(s), "sin"),
    "factor by head": (lambda s, b, h, q, k: s * SLOPES[h], "differ between pairs"),
    "factor at last": (lambda s, b, h, q, k: (s + q) * 2, "after it has changed"),
    "tanh alone": (lambda s, b, h, q, k: torch.tanh(s), "soft cap"),
    "negative": (lambda s, b, h, q, k: q - s, "subtracts the score"),
    "replaced": (lambda s, b, h, q, k: torch.where(q >= k, s, -1.0), "something else"),
    "of the score": (lambda s, b, h, q, k: torch.where(s > 0, s, -math.inf), "more than"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_kernels_do_not_know_is_said_once_and_right(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, words = UNKNOWN[name]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check(*inputs(), score_mod=function)
    (record,) = caplog.records
    assert words in record.getMessage()


def test_block_masks_scales_and_grouped_heads() -> None:
    mask = torchs.create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    check(*inputs(), block_mask=mask, score_mod=KNOWN["alibi"], scale=0.3)
    check(*inputs(2), enable_gqa=True, score_mod=KNOWN["cap"])
    with pytest.raises(ValueError, match="enable_gqa=True"):
        fuser.flex_attention(*inputs(2))


@pytest.mark.skipif(not hasattr(torchs, "AuxRequest"), reason="this PyTorch has no auxiliary outputs")
@pytest.mark.parametrize("name", ["alibi", "sine"])
@pytest.mark.parametrize("lse", [False, True])
def test_auxiliary_outputs(lse: bool, name: str) -> None:
    q, k, v = inputs()
    function = KNOWN[name] if name in KNOWN else UNKNOWN[name][0]
    settings = {"score_mod": function, "return_aux": torchs.AuxRequest(lse)}
    out, aux = fuser.flex_attention(q, k, v, **settings)
    exact, expected = torchs.flex_attention(q.double(), k.double(), v.double(), **settings)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    assert aux.max_scores is None
    assert (aux.lse is not None) is lse
    if lse:
        torch.testing.assert_close(aux.lse.double(), expected.lse.double(), rtol=2e-6, atol=1e-5)
    with pytest.raises(ValueError, match="return_lse"):
        fuser.flex_attention(q, k, v, return_lse=True, **settings)
    with pytest.raises(NotImplementedError, match="max scores"):
        # As PyTorch on CPUs.
        fuser.flex_attention(q, k, v, return_aux=torchs.AuxRequest(lse, max_scores=True))


def test_one_block_far_larger_than_the_mask() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.int32)
    mask = torchs.BlockMask.from_kv_blocks(one[..., 0], one - 1, BLOCK_SIZE=2**30, seq_lengths=(QUERIES, KEYS))
    check(*inputs(), block_mask=mask)


def test_keys_of_one_batch_entry_serve_all() -> None:
    q, k, v = inputs(2)
    mask = torchs.create_block_mask(causal, len(q), None, QUERIES, KEYS, device="cpu")
    check(q, k[:1], v[:1], block_mask=mask, score_mod=KNOWN["alibi"], enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cap", fuser.DEQ(threshold=0.2)),
        ("all", fuser.DEQ(threshold=0.2)),
        ("alibi", fuser.Sanger(threshold=0.05)),
    ],
)
def test_scores_of_few_bits(name: str, how: Prediction, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = inputs()
    mask = torchs.create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    with caplog.at_level(logging.WARNING):
        out = fuser.flex_attention(q, k, v, KNOWN[name], mask, quantize=how)
    assert "plain PyTorch" not in caplog.text and "no kernel knows" not in caplog.text
    rows, keys = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    added, cap, factor = torch.zeros(HEADS, QUERIES, KEYS), None, 1.0
    if name != "cap":
        added = SLOPES[:, None, None] * (keys - rows) + (name == "all")
    if name != "alibi":
        cap, factor = (SoftCap(2.0), 1.0) if name == "cap" else (SoftCap(5.0), 2.0)
    added = added.masked_fill(rows < keys, -math.inf)
    want, _ = how.reference(q, k, v, additive_mask=added, score=cap, scale=factor / 4)
    torch.testing.assert_close(out, want, rtol=0, atol=max(1e-5, rounding_of(how)))


def test_few_bits_take_scores_that_kernels_know() -> None:
    with pytest.raises(ScoreError, match="a score_mod that kernels know"):
        fuser.flex_attention(*inputs(), UNKNOWN["sine"][0], quantize=fuser.DEQ())
    with pytest.raises(ScoreError, match=r"quantize must be a fuser\.DEQ"):
        fuser.flex_attention(*inputs(), quantize="adamax_nb80")  # type: ignore[arg-type]


def test_gradients_reach_what_a_function_reads() -> None:
    q, k, v = (t.requires_grad_() for t in inputs())
    table = TABLE.clone().requires_grad_()
    places = torch.arange(QUERIES)[:, None] - torch.arange(KEYS) + KEYS

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 4 + table[:, places], -1) @ v

    found = []
    for out in (
        fuser.flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[h, q - k + KEYS]),
        written_out(q, k, v),
    ):
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v, table)))  # type: ignore[union-attr]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_a_function_reads_may_change_between_calls() -> None:
    table = TABLE.clone()
    for _ in range(2):
        check(*inputs(), score_mod=lambda s, b, h, q, k: s + table[h, q - k + KEYS])
        table.mul_(-2)


@pytest.mark.parametrize("name", ["cap", "alibi"])
def test_in_an_optimized_model(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Any:
            q, k, v = (t.unflatten(-1, (HEADS, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return fuser.flex_attention(q, k, v, score_mod=KNOWN[name]).transpose(1, 2).flatten(2)

    model = Model().eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        for length in (40, 23):
            x = torch.randn(2, length, 64)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert fast.fallbacks == () and any(kernel.family == "attention" for kernel in fast.kernels)
    assert bool(fast.programs[-1].sizes) == (name == "cap")


@pytest.mark.parametrize("of", ["scores", "positions"])
def test_control_flow_on_data_is_refused_as_pytorch_refuses_it(of: str) -> None:
    q, k, v = inputs()

    def branch(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s if (s > 0 if of == "scores" else i > j) else -s

    for run in (torchs.flex_attention, fuser.flex_attention):
        with pytest.raises(Exception, match="Data-dependent branching"):
            run(q, k, v, score_mod=branch)
