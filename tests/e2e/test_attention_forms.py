"""Attention in every form, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import INF, LOWEST, SDPA, WIDTH, B, D, H, Model, S, X, check, optimize, qkv
from torch import Tensor, nn

from fuser.module.optimized import OptimizedModule

pytestmark = pytest.mark.usefixtures("no_grad")


SCALE = D**-0.5


def written(scores: Callable[..., Tensor]) -> Model:
    """softmax(scores(q · kᵀ, *masks)) · v."""
    return Model(lambda m, q, k, v, *masks: torch.softmax(scores(q @ k.transpose(-2, -1), *masks), -1) @ v)


def families(fast: OptimizedModule) -> set[str]:
    return {kernel.family for kernel in fast.kernels}


RANDOM = torch.Generator().manual_seed(3)


# Any two of the dimensions in every combination.
@pytest.mark.parametrize(("batch", "heads", "rows"), [(1, 1, 1), (1, H, S), (B, 1, S), (B, H, 1)])
def test_masks_broadcast_over_everything(batch: int, heads: int, rows: int) -> None:
    additive = torch.randn(batch, heads, rows, S, generator=RANDOM)
    allowed = torch.rand(batch, heads, rows, S, generator=RANDOM) > 0.4
    allowed[..., 0] = True
    for fast in (
        check(written(lambda s, m: s * SCALE + m), *qkv(), additive),
        check(written(lambda s, m: (s * SCALE).masked_fill(m, -INF)), *qkv(), ~allowed),
        check(SDPA, *qkv(), allowed),
        check(SDPA, *qkv(), additive),
    ):
        assert families(fast) == {"attention"}


def some(*shape: int, share: float = 0.7) -> Tensor:
    """A boolean mask that allows every query its own key."""
    allowed = torch.rand(*shape, generator=RANDOM) < share
    return allowed | torch.eye(shape[-2], shape[-1], dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "masks"),
    [
        (lambda s, m: s * SCALE + m, (torch.randn(S, S, generator=RANDOM),)),
        (lambda s, m: s * SCALE + m, (torch.randn(H, 1, S, generator=RANDOM),)),
        (lambda s, m: s * SCALE + m, (torch.randn(S, generator=RANDOM),)),
        (lambda s, m: s * SCALE + m, (torch.randn(B, 1, S, 1, generator=RANDOM),)),
        (lambda s, m: s * SCALE + m, (torch.randn((), generator=RANDOM),)),
        (lambda s, m: s * SCALE + (1 - m) * -10000.0, (some(B, 1, 1, S).float(),)),
        (lambda s, m: s * SCALE + (1 - m) * LOWEST, (some(B, 1, 1, S).float(),)),
        (lambda s, m: (s * SCALE).masked_fill(m, -1e4), (~some(B, 1, S, S),)),
        (lambda s, m: (s * SCALE).masked_fill(m, LOWEST), (~some(B, 1, S, S),)),
        (lambda s, m: s.masked_fill(m, -INF) * SCALE, (~some(B, 1, S, S),)),
        (lambda s, m: s.masked_fill(m, -INF) / 4, (~some(B, 1, S, S),)),
        (lambda s, m: torch.where(m, s * SCALE, torch.tensor(-INF)), (some(B, 1, S, S),)),
        (lambda s, m: torch.where(m, LOWEST, s * SCALE), (~some(B, 1, S, S),)),
        (lambda s, m: (s + m) * SCALE, (torch.randn(B, 1, S, S, generator=RANDOM),)),
        (lambda s, m: (s + s[:1, :1]) * m, (torch.rand(H, 1, 1, generator=RANDOM),)),
        (lambda s, m: (s * SCALE + 1) * m, (torch.rand(B, H, 1, 1, generator=RANDOM),)),
        (lambda s, m: torch.tanh(s * SCALE) * m, (torch.rand(H, 1, 1, generator=RANDOM),)),
        (lambda s, a, m: (s + a) * m, (torch.randn(B, 1, S, S), torch.rand(H, 1, 1, generator=RANDOM))),
        (lambda s, a, m: s.masked_fill(a, LOWEST) * m, (~some(B, 1, S, S), torch.rand(H, 1, 1, generator=RANDOM))),
        (lambda s, a, m: torch.where(a, s * SCALE + m, LOWEST), (some(B, 1, S, S), torch.randn(1, H, S, S))),
        (lambda s, a, m: s * SCALE + torch.where(a, m, LOWEST), (some(B, 1, S, S), torch.randn(1, H, S, S))),
        (lambda s, a, m: s * SCALE + torch.where(a, m, -INF), (some(B, 1, S, S), torch.randn(1, H, S, S))),
        (lambda s, a, b: (s * SCALE + a).masked_fill(b, -INF), (torch.randn(B, 1, S, S), ~some(B, 1, S, S))),
        (lambda s, a, b: s.masked_fill(a, -INF).masked_fill(b, -INF), (~some(B, H, S, S), ~some(B, 1, S, S))),
        (lambda s: s.masked_fill(torch.ones(S, S).tril() == 0, -INF), ()),
        (lambda s: s.masked_fill(s < 0, -INF), ()),
        (lambda s: 3 * torch.tanh(s * SCALE / 3), ()),
        (lambda s, m: 3 * torch.tanh(s * SCALE / 3) + m, (torch.randn(B, 1, S, S, generator=RANDOM),)),
        (lambda s, m: (3 * torch.tanh(s * SCALE / 3)).masked_fill(m, -INF) / 2, (~some(B, 1, S, S),)),
        (lambda s: s * 0.0, ()),
        (lambda s: 1.0 / s, ()),
        (lambda s: (s * SCALE).double().float(), ()),
        (lambda s: (s * 3).int().float(), ()),
        (lambda s: (s * 1e4).half().float(), ()),
    ],
)
def test_scores_of_every_form(scores: Callable[..., Tensor], masks: tuple[Tensor, ...]) -> None:
    fast = check(written(scores), *qkv(), *masks)
    assert fast.fallbacks == ()


def test_masking_and_then_changing_the_sign_lets_the_masked_win() -> None:
    model = written(lambda s, m: s.masked_fill(m, LOWEST / 2) * -1.0)
    check(model, *qkv(), ~some(B, 1, S, S))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, q, k, v: (lambda p: (p @ v, p))(torch.softmax(q @ k.mT * SCALE, -1)),
        lambda m, q, k, v: (lambda s: (torch.softmax(s * SCALE, -1) @ v, s))(q @ k.mT),
        lambda m, q, k, v: (lambda s: (torch.softmax(s, -1) @ v, torch.softmax(2 * s, -1) @ v))(q @ k.mT),
        lambda m, q, k, v: torch.softmax(q @ k.mT, -2) @ v,
        lambda m, q, k, v: torch.softmax(q @ k.mT, 1) @ v,
        lambda m, q, k, v: torch.softmax((q @ k.mT).double(), -1) @ v.double(),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, q, q),
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:1], k, v),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
        lambda m, q, k, v: torch.softmax(q @ k[:, :1].mT, -1) @ v[:, :1],
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:, [0, 2]], k[:, [-1]], v[:, [-1]]),
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:, [2, 0]], k[:, [1, 1]], v[:, [0, 1]]),
        lambda m, q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
        lambda m, q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]),
        lambda m, q, k, v: F.scaled_dot_product_attention(*(t.repeat(1, 1, 1, 20) for t in (q, k, v))),
        lambda m, q, k, v: F.scaled_dot_product_attention(q[..., :0, :], k, v),
    ],
    ids=[
        "probabilities",
        "scores",
        "twice",
        "over queries",
        "over heads",
        "double",
        "of itself",
        "one query batch",
        "one key batch",
        "one key head",
        "one key head written",
        "even indices",
        "other indices",
        "two dims",
        "five dims",
        "narrow values",
        "wide heads",
        "no queries",
    ],
)
def test_attention_that_is_not_quite_one(run: Callable[..., Any]) -> None:
    fast = check(Model(run), *qkv())
    assert fast.fallbacks == ()


@pytest.mark.parametrize(("q_len", "kv_len"), [(10, S), (S, 10), (1, S), (S, 1)])
def test_causal_attention_counts_from_the_top_left(q_len: int, kv_len: int) -> None:
    fast = check(SDPA, *qkv(q_len=q_len, kv_len=kv_len), is_causal=True)
    assert families(fast) == {"attention"}


def test_grouped_queries() -> None:
    def expanded(t: Tensor) -> Tensor:
        return t[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D)

    def products(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ expanded(k).mT / 4).softmax(-1) @ expanded(v)).transpose(1, 2).flatten(2)

    operands = qkv(4, 2)
    for fast in (
        check(SDPA, *operands, enable_gqa=True),
        check(Model(lambda m, q, k, v: SDPA.run(m, q, *(t.repeat_interleave(2, 1) for t in (k, v)))), *operands),
        check(Model(lambda m, q, k, v: SDPA.run(m, q, expanded(k), expanded(v))), *operands),
        check(Model(products), *operands),
    ):
        assert (families(fast), fast.unfused) == ({"attention"}, ())


@pytest.mark.parametrize(
    "scores",
    [
        # Batch and heads as one dimension for the products alone (Bloom, DeBERTa).
        lambda m, q, k: torch.baddbmm(m.bias, q, k.mT, alpha=SCALE).view(B, H, S, S) + m.mask,
        lambda m, q, k: torch.baddbmm(m.bias, q, k.mT, beta=0.0, alpha=SCALE).view(B, H, S, S).masked_fill(m.no, -INF),
        lambda m, q, k: (q @ k.mT / 4 + m.bias).view(B, H, S, S).masked_fill(m.no, LOWEST),
        # Another number for every head, and masks of groups of samples, as windows are (Swin).
        lambda m, q, k: (q @ k.mT).view(B, H, S, S) * m.factors + m.mask,
        lambda m, q, k: (((q @ k.mT).view(B, H, S, S) * m.factors).view(1, B, H, S, S) + m.windows).view(B, H, S, S),
        lambda m, q, k: 3 * torch.tanh((q @ k.mT).view(B, H, S, S) * m.factors),
        # One that is learned.
        lambda m, q, k: ((q @ k.mT).view(B, H, S, S) * m.temperature.exp()).masked_fill(m.no, LOWEST),
        lambda m, q, k: (q @ k.mT).view(B, H, S, S) * m.temperature[None] + m.mask,
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_scores_in_other_shapes_than_their_products(scores: Callable[..., Tensor], constant: bool) -> None:
    operands = {
        "bias": torch.randn(B * H, 1, S, generator=RANDOM),
        "mask": torch.randn(1, H, S, S, generator=RANDOM),
        "no": ~some(B, 1, S, S),
        "factors": torch.rand(H, 1, 1, generator=RANDOM) + 0.5,
        "windows": torch.randn(1, B, 1, S, S, generator=RANDOM),
        "temperature": torch.tensor(0.3),
    }

    names = tuple(operands)

    def run(m: Model, q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        held = SimpleNamespace(**dict(zip(names, given, strict=True))) if given else m
        p = scores(held, q.flatten(0, 1), k.flatten(0, 1)).softmax(-1)
        return (p.view(B * H, S, S) @ v.flatten(0, 1)).view(B, H, S, D).transpose(1, 2).flatten(2)

    model = Model(run)
    if constant:
        for name, value in operands.items():
            model.register_buffer(name, value)
    fast = check(model, *qkv(), *([] if constant else operands.values()))
    assert "attention" in families(fast)


@pytest.mark.parametrize("masked", ["", "samples", "samples and heads"])
def test_samples_and_heads_as_one_dimension_are_not_copied(masked: str) -> None:
    masks = {"samples": some(B, 1, 1, S), "samples and heads": torch.randn(B * H, S, S, generator=RANDOM)}

    def run(m: Model, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2).reshape(B * H, S, D) for t in (q, k, v))
        scores = torch.bmm(q * SCALE, k.mT)
        if masked == "samples":
            scores = scores.view(B, H, S, S).masked_fill(~mask, -INF).view(B * H, S, S)
        elif mask is not None:
            scores = scores + mask
        return torch.bmm(scores.softmax(-1), v).view(B, H, S, D).transpose(1, 2).reshape(B, S, H * D)

    operands = [torch.randn(B, S, H * D, generator=RANDOM) for _ in range(3)]
    fast = check(Model(run), *operands, *([masks[masked]] if masked else []))
    assert {op.name for op in fast.programs[-1].graph.operators if "copy" in op.name or "gather" in op.name} == set()
    assert families(fast) == {"attention"}


@pytest.mark.parametrize("shape", [(6, S, S), (1, S, S), (6, 1, S), (S, S)])
def test_masks_of_attention_without_a_dimension_for_heads(shape: tuple[int, ...]) -> None:
    q, k, v = (t.reshape(B * H, S, D) for t in qkv())
    additive = torch.randn(shape, generator=RANDOM)
    check(written(lambda s, m: s * SCALE + m), q, k, v, additive)
    check(SDPA, q, k, v, additive)
    constant = Model(lambda m, q, k, v: torch.softmax((q @ k.mT).masked_fill(m.mask, -INF), -1) @ v)
    allowed = some(*shape) if shape[-2] == S else torch.ones(shape, dtype=torch.bool)
    constant.register_buffer("mask", ~allowed)
    check(constant, q, k, v)


@pytest.mark.parametrize(
    "mask",
    [
        (1 - some(1, 1, S, S).float()) * LOWEST,
        (1 - some(1, 1, S, S).float()) * -10000.0,
        torch.randn(1, H, S, S, generator=RANDOM),
        torch.zeros(S, S).masked_fill(~some(S, S), -INF),
        torch.full((S, S), LOWEST),
    ],
    ids=["lowest", "-10000", "bias", "-inf", "all lowest"],
)
def test_constant_additive_masks(mask: Tensor) -> None:
    model = Model(lambda m, q, k, v: torch.softmax(q @ k.mT * SCALE + m.mask, -1) @ v)
    model.register_buffer("mask", mask)
    check(model, *qkv())


@pytest.mark.parametrize("shape", [(1, 1, S, S), (B, 1, S, S), (1, H, S, S), (S, S)])
def test_constant_boolean_masks(shape: tuple[int, ...]) -> None:
    model = Model(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.mask))
    model.register_buffer("mask", some(*shape))
    check(model, *qkv())


def test_a_row_that_may_see_nothing_gives_zeros_in_every_form() -> None:
    allowed = some(B, 1, S, S)
    allowed[0, :, 3] = False
    forms = [
        (SDPA, allowed),
        (SDPA, torch.zeros(B, 1, S, S).masked_fill(~allowed, -INF)),
        (written(lambda s, m: (s * SCALE).masked_fill(m, -INF)), ~allowed),
    ]
    for model, mask in forms:
        out = optimize(model)(*qkv(), mask)
        assert torch.equal(out[0, :, 3], torch.zeros(H, D))
        assert bool(out.isfinite().all())
    # Wherever the numbers are finite, eager PyTorch's average over all keys is the answer.
    check(written(lambda s, m: s * SCALE + m), *qkv(), (1 - allowed.float()) * LOWEST)
    check(written(lambda s, m: (s * SCALE).masked_fill(m, LOWEST)), *qkv(), ~allowed)


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights: bool) -> None:
    layer = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    other = torch.randn(2, 10, WIDTH, generator=RANDOM)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 12:] = True
    check(layer, X, X, X, need_weights=weights)
    check(layer, X, X, X, need_weights=weights, key_padding_mask=padding)
    check(layer, X, X, X, need_weights=weights, attn_mask=~some(8, 16, 16))
    check(layer, other, X, X, need_weights=weights, key_padding_mask=padding)
    check(layer, X, X, X, need_weights=weights, average_attn_weights=False)


def test_transformer_decoder() -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True), 1)
    target = torch.randn(2, 10, WIDTH, generator=RANDOM)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 12:] = True
    fast = check(decoder, target, X)
    assert fast.unfused == ()
    causal = nn.Transformer.generate_square_subsequent_mask(10)
    check(decoder, target, X, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("order", [(0, 3, 1, 2, 4), (0, 1, 3, 2, 4), (3, 0, 1, 2, 4)], ids=str)
def test_attention_of_windows_has_five_dimensions(order: tuple[int, ...], causal: bool) -> None:
    """Samples, heads and windows (Twins, NesT) in any order, as they lie in a product or apart; nothing is copied where
    strides say it."""
    windows, rows = 4, S

    def run(_: Any, x: Tensor) -> Tensor:
        q, k, v = (t.view(B, windows, rows, H, D).permute(order) for t in x.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return y.permute(*(order.index(d) for d in range(5))).reshape(B, windows * rows, H * D)

    fast = check(Model(run), torch.randn(B, windows * rows, 3 * H * D, generator=RANDOM))
    assert families(fast) == {"attention"} and fast.unfused == ()
    operands = [torch.randn(2, H, 3, n, D, generator=RANDOM) for n in (S, 2 * S, 2 * S)]
    assert families(check(SDPA, *operands)) == {"attention"}
    # A mask of so many dimensions, and those that broadcast, are PyTorch's.
    check(SDPA, *operands, torch.randn(2, 1, 3, S, 2 * S, generator=RANDOM))
    check(SDPA, operands[0], *(t[:, :1] for t in operands[1:]))


def test_one_head_of_keys_for_all_queries() -> None:
    q, k, v = qkv()
    one = [t[:, :1] for t in (k, v)]
    mask = torch.randn(B, 1, S, S, generator=RANDOM)
    for scores, masks in ((lambda s: s * SCALE, ()), (lambda s, m: s * SCALE + m, (mask,))):
        assert families(check(written(scores), q, *one, *masks)) == {"attention"}
    # Not of one head for one of both, and of one sample.
    check(written(lambda s: s * SCALE), q, one[0], v)
    check(written(lambda s: s * SCALE), q, k, one[1])
    check(written(lambda s: s * SCALE), q, k[:1], v[:1])
    check(written(lambda s: s * SCALE), q[:, :1], k, v)
