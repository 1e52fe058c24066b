"""Calls without padding: the model's numbers where a token is, zeros elsewhere, and reasons where that cannot be."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import rounding_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser import DEQ, Int8Attention, Sanger, masks
from fuser.ir.errors import IndexRangeError, KernelError, PackingError
from fuser.ir.operators import DocumentMask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.kernels.plan import AttentionPlan
from fuser.module.ragged import Padding, packed_rows, rounded

WIDTH, HEADS, WORDS = 32, 2, 50
TOLERANCE = 1e-5
"""Relative to the largest number: rounding of fp32 through a layer."""


# ---- rows of a batch


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    entries, length = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    flags = draw(st.lists(st.booleans(), min_size=entries * length, max_size=entries * length))
    return np.array(flags).reshape(entries, length)


MASKS = [
    *(masks.Dense(), masks.Causal(), masks.SlidingWindow(3, 2), masks.SlidingWindow(3, 2) & masks.Causal()),
    *(masks.Strided(3), masks.SlidingWindow(2, 2) | masks.Strided(4)),
    masks.PerHead([masks.SlidingWindow(1, 1), masks.Strided(2)]),
]


@given(batches(), st.sampled_from(MASKS), st.booleans())
@settings(max_examples=80, deadline=None)
def test_rows_see_the_tokens_of_their_entry_that_a_mask_allows(keys: np.ndarray, mask: masks.Mask, picks: bool) -> None:
    if not keys.any():
        return
    try:
        found = packed_rows(keys, (0,) if picks else (), [mask])
    except PackingError as error:
        assert picks and "no token" in str(error)
        return
    entries, length = keys.shape
    rows, (plan,) = found.rows.numpy(), found.plans
    count = int(keys.sum()) + (int((~keys[:, 0]).sum()) if picks else 0)
    assert found.tokens == len(rows) == rounded(count) and (np.diff(rows[:count]) > 0).all()
    assert rows[found.keys.numpy()].tolist() == np.flatnonzero(keys).tolist()
    if picks:
        assert rows[found.picks[0].numpy()].tolist() == [entry * length for entry in range(entries)]
    entry, at = np.divmod(rows, length)
    is_key = keys.reshape(-1)[rows]
    allowed = mask.dense(length, length).numpy()[..., at[:, None], at]
    seen = (entry[None] == entry[:, None]) & is_key & allowed
    scores = torch.zeros(1, mask.heads or 1, len(rows), len(rows))
    operator = DocumentMask(pattern=mask)
    (masked,) = operator.evaluate(scores, *found.masked, plan)
    made = masked[0] == 0
    assert (made[:, :count, :count].numpy() == seen[..., :count, :count]).all()
    assert not made[:, :count, count:].any() and not made[:, count:, :count].any()
    AttentionPlan(plan.numpy().copy()).validate(masks.from_dense(made if mask.heads else made[0]))


def test_what_follows_from_distances_needs_neighbours() -> None:
    keys = np.array([[False, True, True, False], [True, True, True, True], [False, False, False, False]])
    assert packed_rows(keys, (), [masks.Dense()], by_distance=True).tokens == 16
    with pytest.raises(PackingError, match="distance"):
        packed_rows(np.array([[True, False, True]]), (), [masks.Dense()], by_distance=True)


def test_a_position_between_tokens_is_not_taken_from_padding() -> None:
    keys = np.array([[True, False, True], [True, True, True]])
    with pytest.raises(PackingError, match="position 1"):
        packed_rows(keys, (1,), [])


@pytest.mark.parametrize("count", [1, 16, 17, 500, 4000, 100_000])
def test_programs_have_few_rows_more_than_there_are(count: int) -> None:
    assert count <= rounded(count) <= max(16 * math.ceil(count / 16), 1.07 * count)
    assert len({rounded(n) for n in range(count, 2 * count)}) <= 70


# ---- models


class Encoder(nn.Module):
    """A transformer layer under a padding mask; ``end`` makes outputs of its rows."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any] = lambda x, mask: x, window: int | None = None) -> None:
        super().__init__()
        self.end, self.window = end, window
        self.embed, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def mask(self, attention_mask: Tensor) -> Tensor:
        return attention_mask[:, None, None].bool()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, allowed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        b, s = input_ids.shape
        at = torch.arange(s)
        x = self.embed(input_ids) + self.places(at)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        allowed = self.mask(attention_mask)
        if self.window is not None:
            allowed = allowed & ((at[:, None] - at).abs() <= self.window)
        mixed = self.attention(q, k, v, allowed)
        x = self.norm(x + self.out(mixed.transpose(1, 2).reshape(b, s, WIDTH)))
        return self.end(x + self.down(nn.functional.gelu(self.up(x))), attention_mask)


class Far(Encoder):
    """With a bias by distance and a mask that is no band."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = nn.Embedding(5, HEADS)

    def mask(self, attention_mask: Tensor) -> Tensor:
        at = torch.arange(attention_mask.shape[1])
        between = at - at[:, None]
        bias = self.buckets(between.clamp(-2, 2) + 2).permute(2, 0, 1)[None]
        allowed = attention_mask[:, None, None].bool() & ((between % 4 == 0) | (between.abs() < 2))
        return torch.where(allowed, bias, -math.inf)


class Additive(Encoder):
    def mask(self, attention_mask: Tensor) -> Tensor:
        dtype = self.embed.weight.dtype
        return (1.0 - attention_mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


def made(model: nn.Module, **options: Any) -> tuple[fuser.OptimizedModule, nn.Module]:
    return fuser.optimize(model.eval(), search="model", **options), model


def padded(spelling: str, b: int = 3, s: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (b, s), generator=generator)
    at, n = torch.arange(s), torch.randint(1, s, (b, 1), generator=generator)
    mask = {
        "right": at < n,
        "left": at >= s - n,
        "holes": torch.rand(b, s, generator=generator) < 0.6,
        "empty": (at < n) & (torch.arange(b)[:, None] != 1),
        "none": at < s + 0 * n,
        "all": at < 0 * n,
    }[spelling]
    return ids, mask.long()


def check(fast: nn.Module, model: nn.Module, ids: Tensor, mask: Tensor, zeros: bool = True) -> None:
    with torch.inference_mode():
        got, exact = fast(ids, mask), copy.deepcopy(model).double()(ids, mask)
    keep = mask.bool()
    assert got.shape == exact.shape and got.dtype == torch.float32
    error = (got.double() - exact)[keep].abs().max() if keep.any() else torch.tensor(0.0)
    assert float(error) <= TOLERANCE * float(exact.nan_to_num().abs().max())
    if zeros:
        assert torch.equal(got[~keep], torch.zeros_like(got[~keep]))


@pytest.mark.parametrize("kind", [Encoder, Additive, lambda: Encoder(window=3)], ids=["bool", "additive", "window"])
def test_rows_of_tokens_have_the_models_numbers_and_others_are_zero(kind: Callable[[], Encoder]) -> None:
    torch.manual_seed(0)
    fast, model = made(kind(), padding="skip")
    for i, spelling in enumerate(("right", "left", "holes", "empty", "all", "right")):
        check(fast, model, *padded(spelling, 3 - i // 5, 20 + i, i))
    (said,) = fast.snapshot().padding
    assert "rows were padding" in said
    assert fast.fallbacks == () and fast.specialized == () and fast.unfused == ()
    assert len(list(fast._engine.forms)) == 1


def test_biases_by_distance_and_masks_that_are_no_band() -> None:
    torch.manual_seed(0)
    fast, model = made(Far(), padding="skip")
    for i, spelling in enumerate(("right", "left", "empty", "right")):
        check(fast, model, *padded(spelling, 3 - i // 3, 20 + i, i))
    assert len(fast.snapshot().padding) == 1 and fast.unfused == ()
    check(fast, model, *padded("holes"), zeros=False)
    assert "distance" in fast.snapshot().padding[-1]


def test_a_batch_of_one_is_packed_too() -> None:
    fast, model = made(Encoder(), padding="skip")
    for spelling in ("right", "left", "holes"):
        check(fast, model, *padded(spelling, 1, 24))
    assert not any("computed" in line for line in fast.snapshot().padding)


def test_an_empty_batch_and_empty_texts_give_what_the_model_gives() -> None:
    fast, model = made(Encoder(), padding="skip")
    ids, mask = padded("right")
    with torch.inference_mode():
        fast(ids, mask)
        for given in ((ids[:0], mask[:0]), (ids[:, :0], mask[:, :0])):
            assert fast(*given).shape == model(*given).shape


def test_nothing_is_packed_where_nothing_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = made(Encoder(), padding="skip")
    monkeypatch.setattr("fuser.module.ragged.packed_rows", None)
    check(fast, model, *padded("none"))
    assert fast.programs[-1].graph.inputs == ("tensors_0", "tensors_1")


def test_few_programs_serve_many_batches() -> None:
    fast, model = made(Encoder(), padding="skip")
    for seed in range(8):
        check(fast, model, *padded("right", 4, 40, seed))
    tokens = {rounded(int(padded("right", 4, 40, seed)[1].sum())) for seed in range(8)}
    assert len(fast.programs) == len(tokens)


PICKS = {
    "first": lambda x, mask: x[:, 0].tanh(),
    "second": lambda x, mask: x[:, 1] * 2.0,
    "both": lambda x, mask: x[:, 0] + x[:, 1],
}


@pytest.mark.parametrize("end", PICKS)
def test_rows_at_one_position_are_exact_even_if_they_are_padding(end: str) -> None:
    torch.manual_seed(0)
    fast, model = made(Encoder(PICKS[end]), padding="skip")
    exact = copy.deepcopy(model).double()
    for ids, mask in (padded("right", seed=1), padded("left", seed=1)):
        with torch.inference_mode():
            torch.testing.assert_close(fast(ids, mask).double(), exact(ids, mask), rtol=0, atol=1e-5)
    said = fast.snapshot().padding
    assert "rows were padding" in said[0] and len(said) == (1 if end == "first" else 2)


class Convolved(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.end = lambda x, mask: self.conv(x.mT).mT


class ByQuery(Encoder):
    def mask(self, attention_mask: Tensor) -> Tensor:
        return attention_mask[:, None, None].bool() & attention_mask[:, None, :, None].bool()


class Weighed(Encoder):
    def mask(self, attention_mask: Tensor) -> Tensor:
        return attention_mask[:, None, None].float().log1p()


class Unmasked(Encoder):
    def mask(self, attention_mask: Tensor) -> Tensor:
        return torch.ones(1, 1, dtype=torch.bool)


REFUSED = {
    "pooling": (lambda: Encoder(lambda x, mask: x.mean(1)), "mixes the rows"),
    "pooling with the mask": (lambda: Encoder(lambda x, mask: (x * mask[..., None]).sum(1)), "mixes the rows"),
    "softmax over positions": (lambda: Encoder(lambda x, mask: x.mT.softmax(-1)), "along the sequence"),
    "the last position": (lambda: Encoder(lambda x, mask: x[:, -1] * 1.0), "some positions"),
    "reversed": (lambda: Encoder(lambda x, mask: x.flip(1)), "mixes the rows"),
    "convolution": (Convolved, "mixes the rows"),
    "a mask by query": (ByQuery, "by query"),
    "weights of positions": (Weighed, "adds numbers"),
    "no mask": (Unmasked, "no mask of padding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_padding_with_an_influence_is_computed_and_the_report_says_why(name: str) -> None:
    torch.manual_seed(0)
    make, reason = REFUSED[name]
    fast, model = made(make(), padding="skip")
    ids, mask = padded("right")
    with torch.inference_mode():
        got, expected = fast(ids, mask), model(ids, mask)
    torch.testing.assert_close(got.nan_to_num(), expected.nan_to_num(), rtol=0, atol=1e-4)
    assert any("was computed" in line and reason in line for line in fast.snapshot().padding), fast.snapshot().padding
    assert f"padding: {fast.snapshot().padding[-1]}" in fast.report()


def test_calls_that_want_gradients_compute_padding() -> None:
    fast, model = made(Encoder(), padding="skip")
    ids, mask = padded("right")
    torch.testing.assert_close(fast(ids, mask), model(ids, mask), rtol=0, atol=1e-5)
    fast(ids, mask).sum().backward()
    assert model.out.weight.grad is not None and "gradients" in fast.snapshot().padding[-1]


def test_new_weights_are_followed() -> None:
    fast, model = made(Encoder(), padding="skip")
    ids, mask = padded("right")
    check(fast, model, ids, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    check(fast, model, ids, mask)
    model.load_state_dict(Encoder().state_dict())
    check(fast, model, ids, mask)
    assert not any("computed" in line for line in fast.snapshot().padding)


def test_an_index_outside_its_table_is_an_error_of_the_call() -> None:
    fast, _ = made(Encoder(), padding="skip")
    ids, mask = padded("right")
    ids[0, 0] = WORDS
    with torch.inference_mode(), pytest.raises(IndexRangeError):
        fast(ids, mask)


def test_a_mask_for_attention_meets_the_one_of_padding() -> None:
    model, ids, mask = Encoder(), *padded("holes")
    fast, _ = made(model, padding="skip", attention=masks.SlidingWindow(2, 1))
    kept, _ = made(model, attention=masks.SlidingWindow(2, 1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids, mask), kept(ids, mask) * mask[..., None], rtol=0, atol=1e-6)
    assert len(fast.snapshot().padding) == 1


class Quantized(Encoder):
    """With scores of few bits, in plain PyTorch, and a constant mask."""

    def __init__(self, how: ScoreQuantization, pattern: masks.Mask) -> None:
        super().__init__()
        self.how, self.pattern = how, pattern

    def attention(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        s = q.shape[2]
        allowed = allowed & self.pattern.dense(s, s)
        added = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        return self.how.reference(q, k, v, additive_mask=added)[0]


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        (DEQ(threshold=0.3), masks.Dense()),
        (DEQ(threshold=0.2), masks.SlidingWindow(3, 2)),
        (Sanger(threshold=0.08), masks.Strided(4)),
        (Int8Attention(smooth=False), masks.SlidingWindow(5, 1)),
        (Int8Attention(), masks.Dense()),
    ],
)
def test_scores_of_few_bits_are_those_of_every_entry_alone(
    how: ScoreQuantization, pattern: masks.Mask, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, plain = Quantized(how, pattern).eval(), Encoder()
    plain.load_state_dict(model.state_dict())
    fast, _ = made(plain, padding="skip", quantize=how, attention=pattern)
    rounding = max(1e-5, rounding_of(how, values=1.5))
    for spelling in ("right", "left", "holes", "empty"):
        ids, mask = padded(spelling, 3, 31)
        with torch.inference_mode():
            got, want = fast(ids, mask), model(ids, mask)
        seen = mask.bool()
        torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=rounding)
        assert not got[~seen].any()
        for entry, count in enumerate(mask.sum(1).tolist() if spelling == "right" else []):
            with torch.inference_mode():
                alone = model(ids[entry : entry + 1, :count], mask[entry : entry + 1, :count])
            torch.testing.assert_close(got[entry, :count], alone[0], rtol=0, atol=rounding)
    assert len(fast.snapshot().padding) == 1
    fast.save(tmp_path / "model.fuser")
    with torch.inference_mode():
        assert torch.equal(fuser.load(tmp_path / "model.fuser")(ids, mask), fast(ids, mask))


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        (DEQ(calibration="dynamic"), Encoder, "scores with those of other rows"),
        (DEQ(before_softmax=True, unmasked_maximum=True), Additive, "scores with those of padding"),
    ],
)
def test_scores_that_depend_on_padding_compute_it(how: ScoreQuantization, kind: type[Encoder], reason: str) -> None:
    torch.manual_seed(0)
    fast, model = made(kind(), padding="skip", quantize=how)
    kept, _ = made(model, quantize=how)
    ids, mask = padded("right")
    with torch.inference_mode():
        assert torch.equal(fast(ids, mask), kept(ids, mask))
    assert any(reason in line for line in fast.snapshot().padding), fast.snapshot().padding


def test_other_numbers_of_rows_only_bind() -> None:
    """Nothing is prepared for calls that programs of rows do not serve."""
    fast, model = made(Encoder(), padding="skip")
    for length in (20, 21, 31):
        check(fast, model, *padded("right", 3, length))
    (form,) = (form for _, form in fast._engine.forms.items())
    assert all(compiled.growing is None for compiled in fast._engine.programs.values())
    assert sum(len(part.templates) for part in form.parts) <= 4


def test_kept_padding_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    fast, model = made(Encoder())
    with caplog.at_level(logging.INFO, "fuser"):
        for length in (20, 21):
            check(fast, model, *padded("right", 3, length), zeros=False)
    (line,) = fast.snapshot().padding
    counted = torch.cat([padded("right", 3, n)[1].flatten() for n in (20, 21)])
    assert line.startswith(f"{1 - counted.float().mean():.0%} of the rows") and 'padding="skip"' in line
    assert sum("of the rows were padding" in record.message for record in caplog.records) == 1
    assert f"padding: {line}" in fast.report()


def test_padding_is_an_attribute_of_the_model_if_it_has_one() -> None:
    fast, model = made(Encoder())
    with pytest.raises(AttributeError):
        _ = fast.padding
    model.padding = "same"
    assert fast.padding == "same"


def test_few_of_many_lengths_are_counted() -> None:
    padding = Padding("keep")
    due = [i for i in range(1, 101) if padding.is_due()]
    assert due == [*range(1, 9), 16, 32, 64]


def test_a_copy_and_a_file_keep_the_option(tmp_path: Path) -> None:
    fast, model = made(Encoder(), padding="skip")
    check(copy.deepcopy(fast), model, *padded("right"))
    check(fast, model, *padded("right"))
    fast.save(tmp_path / "model.fuser")
    loaded = fuser.load(tmp_path / "model.fuser")
    for spelling in ("right", "left", "holes", "empty", "none", "all"):
        check(loaded, model, *padded(spelling, 4, 31))


def test_a_file_says_why_padding_would_have_to_be_computed(tmp_path: Path) -> None:
    fast, model = made(Encoder(PICKS["second"]), padding="skip")
    ids, mask = padded("right")
    mask[:, :3] = 1
    with torch.inference_mode():
        fast(ids, mask)
    fast.save(tmp_path / "model.fuser")
    loaded = fuser.load(tmp_path / "model.fuser")
    torch.testing.assert_close(loaded(*padded("none")), model(*padded("none")), rtol=0, atol=1e-5)
    mask[0, 1:] = 0
    with pytest.raises(KernelError, match="position 1 of every entry"):
        loaded(ids, mask)


def test_an_option_is_keep_or_skip() -> None:
    with pytest.raises(ValueError, match="'keep' or 'skip'"):
        fuser.optimize(Encoder(), padding="drop")
