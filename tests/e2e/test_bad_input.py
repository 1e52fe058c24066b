"""Awkward models, inputs and machines: the right answer, unfused if need be and said so, or one clear error."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import fuser
from fuser.ir.errors import FuserError, IndexRangeError
from fuser.module import optimized as fuser_module
from fuser.module.optimized import OptimizedModule
from fuser.runtime import cache as runtime_cache
from fuser.runtime.device import cpu_target

WIDTH = 32
NAN, INF = math.nan, math.inf
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Model(nn.Module):
    """A model given by its forward function, which may use one linear layer."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def optimize(model: nn.Module, **settings: Any) -> OptimizedModule:
    return fuser.optimize(model.eval(), **{"search": "model", **settings})


def assert_same(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    """Same structure, shapes, dtypes, NaN and infinities; finite numbers within the rounding of fp32."""
    mine, spec = pytree.tree_flatten(ours)
    eager, expected = pytree.tree_flatten(theirs)
    assert spec == expected
    for a, b in zip(mine, eager, strict=True):
        if not isinstance(b, Tensor):
            assert type(a) is type(b) and (a == b or a != a)
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if not b.is_floating_point():
            assert torch.equal(a, b)
            continue
        assert torch.equal(a.isnan(), b.isnan())
        finite = b.isfinite()
        assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()])
        bound = tolerance * {torch.bfloat16: 1e4, torch.float16: 2e3}.get(b.dtype, 1)
        error = (a - b)[finite].double().norm()
        assert float(error) <= bound * float(b[finite].double().norm())


def check(model: nn.Module, *args: Any, tolerance: float = 2e-6, **kwargs: Any) -> OptimizedModule:
    """The optimized model agrees with the model, twice, and leaves its inputs alone."""
    fast = optimize(model)
    expected = model(*args, **kwargs)
    before = [t.clone() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    for _ in range(2):
        assert_same(fast(*args, **kwargs), expected, tolerance)
    after = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    assert_same(after, before, 0.0)
    return fast


X = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1))


# ---- models that cannot be captured


@torch.library.custom_op("fuser_tests::twice_", mutates_args=("x",))
def twice_(x: Tensor) -> None:
    x.mul_(2)


def custom_mutation(model: Any, x: Tensor) -> Tensor:
    y = model.linear(x)
    twice_(y)
    return model.linear(y)


def asserting(model: Any, x: Tensor) -> Tensor:
    torch._assert_async(x.sum() < 1e9, "too large")
    return model.linear(x)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.linear(x) if x.sum() > 0 else m.linear(-x), "could not be captured"),
        (lambda m, x: m.linear(x) * x.sum().item(), "makes a number from the values"),
        (lambda m, x: m.linear(x)[x > 0], "depends on the values"),
        (lambda m, x: m.linear(x).relu().nonzero(), "depends on the values"),
        (lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), "cannot look into"),
        (lambda m, x: m.linear(x).to_sparse().to_dense(), "layout torch.sparse_coo"),
        (custom_mutation, "cannot look into"),
        (asserting, "checks or changes"),
        (lambda m, x: {"hidden": Opaque(m.linear(x)).tensor, "opaque": OPAQUE}, "returns a Opaque"),
    ],
    ids=["branch", "item", "mask", "nonzero", "cond", "sparse", "mutation", "assertion", "object"],
)
def test_a_model_that_cannot_be_captured_runs_as_it_is(run: Callable[..., Any], reason: str) -> None:
    fast = check(Model(run), X)
    assert len(fast.programs) == 0
    assert len(fast.fallbacks) == 1 and reason in fast.fallbacks[0]
    assert fast.unfused == (("*", fast.fallbacks[0]),)
    assert reason in fast.report()


class Opaque:
    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor


OPAQUE = Opaque(None)


def test_assertions_of_a_model_stay() -> None:
    with pytest.raises(RuntimeError, match="too large"):
        optimize(Model(asserting))(X + 1e9)


def test_a_model_may_change_its_input() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x.add_(1)
        return model.linear(x)

    model = Model(run)
    fast = optimize(model)
    mine, theirs = X.clone(), X.clone()
    for _ in range(2):
        assert torch.equal(fast(mine), model(theirs))
        assert torch.equal(mine, theirs)
    assert "in place" in fast.fallbacks[0]


class Counting(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        if plain:
            self.count = torch.zeros(())
        else:
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) * self.count


class Remembering(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(WIDTH, WIDTH), how
        self.calls, self.last, self.history, self.named = 0, None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls += self.how == "number"
        if self.how == "tensor":
            y, self.last = (y if self.last is None else y + self.last), y
        elif self.how == "list":
            self.history.append(y)
        elif self.how == "dict":
            self.named[len(self.named)] = y
        return y * (self.calls + 1) + len(self.history) + len(self.named)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Counting(False),
        lambda: Counting(True),
        lambda: Remembering("number"),
        lambda: Remembering("tensor"),
        lambda: Remembering("list"),
        lambda: Remembering("dict"),
        lambda: nn.Embedding(50, WIDTH, max_norm=1.0),
        lambda: nn.BatchNorm1d(16).train(),
    ],
    ids=["buffer", "constant", "number", "tensor", "list", "dict", "max_norm", "batch norm"],
)
def test_a_model_with_a_memory_keeps_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    twin = make()
    if not model.training:
        model.eval(), twin.eval()
    # A layer in training mode inside a model in evaluation mode.
    holder = nn.Sequential(model)
    holder.training = False
    fast = fuser.optimize(holder, search="model")
    x = torch.tensor([[1, 7, 1]]) if isinstance(model, nn.Embedding) else X
    for _ in range(4):
        assert_same(fast(x), twin(x))
    assert fast.programs == ()
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def test_a_model_that_fills_a_cache_is_fused_afterwards() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cache = nn.Linear(WIDTH, WIDTH), None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.arange(WIDTH).float()
            return self.linear(x) + self.cache

    model = Caching()
    fast = optimize(model)
    for _ in range(3):
        assert_same(fast(X), model(X))
    assert len(fast.programs) == 1


# ---- what models return


@dataclasses.dataclass
class Output:
    hidden: Any
    rest: Any = None


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: None,
        lambda m, x: 3,
        lambda m, x: (m.linear(x), 3, "a", 1.5, True, None, torch.float32),
        lambda m, x: Pair(m.linear(x), x),
        lambda m, x: collections.OrderedDict(a=m.linear(x), b=[x, (x,)]),
        lambda m, x: (m.linear(x).sum(), x.mean(), m.linear(x).argmax(), m.linear(x) > 0, m.linear(x).int()),
        lambda m, x: (m.linear.weight, m.linear.bias[:3], torch.ones(3), torch.tensor(2.0)),
        lambda m, x: [],
        lambda m, x: torch.sort(m.linear(x)),
        lambda m, x: torch.fft.fft(m.linear(x)).abs(),
    ],
    ids=["none", "int", "plain", "namedtuple", "dict", "scalars", "weights", "empty", "sort", "complex"],
)
def test_outputs_of_every_kind(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X)
    assert fast.fallbacks == ()


def test_dataclasses_that_nobody_registered() -> None:
    model = Model(lambda m, x: Output(m.linear(x), {"inner": [Output(x, 1), "text", None]}))
    fast = optimize(model)
    ours, theirs = fast(X), model(X)
    assert isinstance(ours, Output) and isinstance(ours.rest["inner"][0], Output)
    assert_same(ours.hidden, theirs.hidden)
    assert torch.equal(ours.rest["inner"][0].hidden, X)
    assert ours.rest["inner"][0].rest == 1 and ours.rest["inner"][1:] == ["text", None]
    assert fast.fallbacks == ()


def views(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.linear(x)
    a, b = y.split(16, -1)
    return y, y.clone(), y.view(-1), y.transpose(0, 1), y.transpose(0, 1).contiguous(), a, b, x, x.clone(), x.view(-1)


def test_outputs_share_memory_exactly_where_eager_does() -> None:
    model = Model(views)
    fast = optimize(model)
    given, same = X.clone(), X.clone()
    ours, theirs = [given, *fast(given)], [same, *model(same)]
    for i, a in enumerate(theirs):
        for j, b in enumerate(theirs):
            shared = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            assert (ours[i].untyped_storage().data_ptr() == ours[j].untyped_storage().data_ptr()) == shared, (i, j)
    ours[2].zero_()
    assert torch.equal(given, X)


def test_results_belong_to_the_caller() -> None:
    fast = optimize(Model(lambda m, x: (m.linear(x), m.linear.weight)))
    first, weight = fast(X)
    kept = first.clone()
    fast(X + 1)
    assert torch.equal(first, kept)
    first.zero_()
    weight.zero_()
    assert_same(fast(X)[0], kept)
    # The output of one call as the input of the next.
    assert_same(fast(fast(X)[0])[0], fast._model(fast._model(X)[0])[0])


# ---- operators


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x.clone().add_(1))
    y[:, 0] = 0
    y.relu_()
    return m.linear(y)


@torch.library.custom_op("fuser_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "run",
    [
        in_place,
        lambda m, x: m.linear(torch.cumsum(m.linear(x), 1)).relu(),
        lambda m, x: m.linear(torch.topk(m.linear(x), WIDTH).values),
        lambda m, x: m.linear(torch.fft.fft(m.linear(x)).conj().imag),
        lambda m, x: m.linear(twice(m.linear(x))),
        lambda m, x: torch.add(m.linear(x), x, alpha=2),
        lambda m, x: m.linear(x) * 1e300 + 1e-300,
        lambda m, x: (m.linear(x) ** 0, x**1.5, x**-1, x**3, x**0.5),
        lambda m, x: (m.linear(x).relu() + INF, x * NAN, x + True, x / 3, 3 / x, 1 - x),
        lambda m, x: (m.linear(x[0, 0]), m.linear(x[None, :, None])),
        lambda m, x: (m.linear(x).double().float(), m.linear(x).half().float(), (9 * m.linear(x)).int().float()),
        lambda m, x: F.layer_norm(m.linear(x).transpose(1, 2), (16,)),
        lambda m, x: (m.linear(x).softmax(1), m.linear(x).transpose(0, 2).softmax(-1)),
        lambda m, x: F.dropout(m.linear(x), 0.5, m.training),
    ],
    ids=[
        "in place",
        "cumsum",
        "topk",
        "conjugate",
        "custom",
        "alpha",
        "huge",
        "powers",
        "constants",
        "dims",
        "casts",
        "strided norm",
        "other softmax",
        "dropout",
    ],
)
def test_operators_inside_blocks(run: Callable[..., Any]) -> None:
    fast = check(Model(run), X)
    assert fast.fallbacks == ()
    assert len(fast.kernels) > 0


def test_random_numbers_are_drawn_in_the_order_of_the_model() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.linear(x)
        noisy = F.dropout(y.cumsum(1), 0.5, True) + torch.rand_like(y)
        torch.rand(5)
        return noisy, torch.rand(3), torch.randn_like(x)

    model = Model(run)
    fast = optimize(model)
    fast(X)
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert_same(fast(X), expected)
    assert fast.fallbacks == ()


# ---- attention

B, H, S, D = 2, 3, 24, 16
SCALE = D**-0.5


def qkv(heads: int = H, kv_heads: int | None = None, q_len: int = S, kv_len: int = S) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    kv = kv_heads or heads
    shapes = ((heads, q_len), (kv, kv_len), (kv, kv_len))
    return tuple(torch.randn(B, h, s, D, generator=g) for h, s in shapes)


def written(scores: Callable[..., Tensor]) -> Model:
    """softmax(scores(q · kᵀ, *masks)) · v."""
    return Model(lambda m, q, k, v, *masks: torch.softmax(scores(q @ k.transpose(-2, -1), *masks), -1) @ v)


def families(fast: OptimizedModule) -> set[str]:
    return {kernel.family for kernel in fast.kernels}


SDPA = Model(lambda m, q, k, v, *mask, **more: F.scaled_dot_product_attention(q, k, v, *mask, **more))
RANDOM = torch.Generator().manual_seed(3)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("rows", [1, S])
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
        (lambda s, a, b: (s * SCALE + a).masked_fill(b, -INF), (torch.randn(B, 1, S, S), ~some(B, 1, S, S))),
        (lambda s, a, b: s.masked_fill(a, -INF).masked_fill(b, -INF), (~some(B, H, S, S), ~some(B, 1, S, S))),
        (lambda s: s.masked_fill(torch.ones(S, S).tril() == 0, -INF), ()),
        (lambda s: s.masked_fill(s < 0, -INF), ()),
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

    operands = qkv(4, 2)
    check(SDPA, *operands, enable_gqa=True)
    check(Model(lambda m, q, k, v: SDPA.run(m, q, *(t.repeat_interleave(2, 1) for t in (k, v)))), *operands)
    check(Model(lambda m, q, k, v: SDPA.run(m, q, expanded(k), expanded(v))), *operands)


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


# ---- values


SPECIAL = torch.tensor(
    [NAN, INF, -INF, 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, 3.4e38, -3.4e38, 88.8, -88.8, 100, -200, 1e-45, 0.5, -1, 20]
)


@pytest.mark.parametrize(
    "function",
    [
        *(torch.relu, F.silu, torch.tanh, torch.sigmoid, torch.exp, torch.log, torch.erf, torch.sqrt, torch.rsqrt),
        *(torch.reciprocal, torch.neg, torch.abs, torch.square, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_special_values_through_elementwise_operators(function: Callable[[Tensor], Tensor]) -> None:
    x = SPECIAL.repeat(2, 1)
    ours, eager = optimize(Model(lambda m, x: function(x)))(x), function(x)
    assert torch.equal(ours.isnan(), eager.isnan())
    close = (ours == eager) | eager.isnan() | ((ours - eager).abs() <= 3e-6 * eager.abs() + 1e-30)
    assert bool(close.all()), (x[~close], ours[~close], eager[~close])


def test_special_values_through_gelu() -> None:
    # PyTorch's own vectorized GELU makes NaN of infinity, so the truth is float64.
    x = SPECIAL[3:].repeat(2, 1)
    ours, exact = optimize(Model(lambda m, x: F.gelu(x)))(x), F.gelu(x.double())
    assert bool(((ours - exact).abs() <= 1e-6 * exact.abs() + 1e-15).all())
    assert bool(optimize(Model(lambda m, x: F.gelu(x)))(torch.full((2, 19), NAN)).isnan().all())


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum])
def test_special_values_in_pairs(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    n = len(SPECIAL)
    a, b = SPECIAL[:, None].expand(n, n).contiguous(), SPECIAL[None].expand(n, n).contiguous()
    ours, eager = optimize(Model(lambda m, a, b: function(a, b)))(a, b), function(a, b)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours[~eager.isnan()], eager[~eager.isnan()])


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e-40])
def test_one_special_value_spreads_as_in_eager(value: float) -> None:
    x = X.clone()
    x[0, 3, 5] = value
    torch.manual_seed(0)
    for model in (
        Model(lambda m, x: F.softmax(x, -1)),
        nn.LayerNorm(WIDTH),
        nn.RMSNorm(WIDTH),
        Model(lambda m, x: m.linear(x)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
    ):
        check(model, x)
    for i in range(3):
        operands = [t.clone() for t in qkv()]
        operands[i][0, 1, 4, 3] = value
        check(SDPA, *operands)
    mask = torch.zeros(B, 1, S, S)
    mask[0, 0, 2, 7] = value
    check(SDPA, *qkv(), mask)


def test_nothing_but_extremes() -> None:
    check(Model(lambda m, x: F.softmax(x, -1)), torch.full((2, 4, WIDTH), -INF))
    check(Model(lambda m, x: F.softmax(x.transpose(1, 2), -1)), torch.full((2, 4, WIDTH), -INF))
    check(Model(lambda m, x: F.softmax(x, -1)), X * 1e30)
    check(nn.LayerNorm(WIDTH), torch.full((2, 4, WIDTH), 5.0))
    check(nn.LayerNorm(WIDTH), X * 1e18)
    check(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), X * 1e-42)


# ---- inputs


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(16, 2, WIDTH).transpose(0, 1),
        lambda: torch.randn(2, 32, 2 * WIDTH)[:, ::2, ::2],
        lambda: torch.randn(1, 16, WIDTH).expand(2, 16, WIDTH),
        lambda: torch.randn(3, 16, WIDTH)[1:],
        lambda: torch.randn(2 * 16 * WIDTH + 3)[3:].view(2, 16, WIDTH),
        lambda: torch.randn(2, 16, WIDTH, dtype=torch.complex64).conj().imag,
        lambda: torch._neg_view(torch.randn(2, 16, WIDTH)),
        lambda: nn.Parameter(torch.randn(2, 16, WIDTH)),
        lambda: torch.randn(0, 16, WIDTH),
        lambda: torch.randn(2, 1, WIDTH),
    ],
    ids=[
        "transposed",
        "sliced",
        "expanded",
        "offset",
        "unaligned",
        "conjugate",
        "negated",
        "parameter",
        "empty",
        "one",
    ],
)
def test_inputs_in_every_layout(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(4)
    x = make()
    fast = check(encoder(), x)
    assert fast.fallbacks == ()


def test_empty_sequences() -> None:
    model = Model(lambda m, x: F.layer_norm(m.linear(x).relu(), (WIDTH,)))
    check(model, X[:, :0])
    check(model, X[:0])
    check(nn.Sequential(nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)), torch.zeros(2, 0, dtype=torch.long))


def test_inputs_that_are_one_tensor_or_overlap() -> None:
    model = Model(lambda m, x, y: m.linear(x) + y)
    check(model, X, X)
    big = torch.randn(4, 16, WIDTH)
    check(model, big[:2], big[1:3])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids))


@pytest.mark.parametrize("bad", [50, -1, 2**40, -(2**62)])
def test_a_token_outside_the_vocabulary_is_an_index_error(bad: int) -> None:
    model = Both()
    fast = optimize(model)
    ids = torch.tensor([[1, bad, 3]])
    with pytest.raises(IndexError):
        model(ids)
    with pytest.raises(IndexError, match="outside the table") as caught:
        fast(ids)
    assert isinstance(caught.value, FuserError) and isinstance(caught.value, IndexRangeError)
    good = torch.tensor([[1, 2, 3]])
    assert_same(fast(good), model(good))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[1, 5]], dtype=torch.int32),
        torch.arange(8).view(2, 4).t(),
        torch.tensor([[1, 5]]).expand(3, 2),
        torch.tensor(3),
    ],
    ids=["int32", "transposed", "expanded", "single"],
)
def test_tokens_of_every_layout(ids: Tensor) -> None:
    check(Both(), ids)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 31),),
        (torch.randn(2, WIDTH).double(),),
        (torch.ones(2, WIDTH, dtype=torch.int64),),
        (),
        (X, X),
        (None,),
        ("text",),
        (torch.randn(2, WIDTH).to_sparse().to_dense()[:, :3],),
    ],
    ids=["width", "dtype", "integers", "none given", "too many", "none", "text", "sliced"],
)
def test_wrong_calls_fail_as_in_eager(arguments: tuple[Any, ...]) -> None:
    model = nn.Linear(WIDTH, WIDTH)
    fast = optimize(model)
    with pytest.raises(Exception) as eager:
        model(*arguments)
    for _ in range(2):
        with pytest.raises(type(eager.value)) as ours:
            fast(*arguments)
        assert type(ours.value) is type(eager.value)
    assert_same(fast(X), model(X))


class Tagged(Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: X.to_sparse(), "layout"),
        (lambda: X.as_subclass(Tagged), "Tagged"),
        (lambda: torch.nested.nested_tensor([X[0], X[1, :3]]), "nested"),
    ],
    ids=["sparse", "subclass", "nested"],
)
def test_inputs_that_kernels_cannot_take(make: Callable[[], Tensor], reason: str) -> None:
    model = Model(lambda m, x: m.linear(x.to_dense() if x.is_sparse else x.to_padded_tensor(0) if x.is_nested else x))
    fast = optimize(model)
    with torch.enable_grad():
        x = make()
        ours, theirs = fast(x), model(x)
    assert type(ours) is type(theirs)
    assert torch.equal(ours, theirs)
    assert reason in fast.fallbacks[0]


def test_inputs_on_other_devices() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    fast = optimize(model)
    x = X.to("meta")
    with pytest.raises(RuntimeError):
        model(x)
    with pytest.raises(RuntimeError):
        fast(x)
    assert "meta" in fast.fallbacks[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(X)).shape == X.shape


def test_tensors_without_memory_do_not_reach_kernels() -> None:
    model = encoder()
    fast = optimize(model)
    assert_same(fast(X), model(X))
    for run in (fast, optimize(model)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(run(X), FakeTensor)
        assert_same(run(X), model(X))
        assert "TorchDispatchMode" in run.fallbacks[0]


def test_nothing_is_compiled_for_another_default_device() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.device("meta"):
        assert_same(fast(X), model(X))
    assert "default device" in fast.fallbacks[0] and fast.programs == ()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1


def test_models_of_other_compilers() -> None:
    model = encoder()
    with pytest.raises(TypeError, match="before TorchScript"):
        fuser.optimize(torch.jit.trace(model, X))
    assert optimize(torch.compile(model))._model is model


def test_a_model_and_a_part_of_it_compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = optimize(encoder())
    whole = optimize(nn.Sequential(nn.Linear(WIDTH, WIDTH), part).eval())
    started, compile_call = threading.Event(), fuser_module.compile_call

    def slow(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model is part._model:
            # The whole is being captured by now.
            started.set()
            time.sleep(0.5)
        return compile_call(model, *args, **kwargs)

    def run_whole() -> None:
        started.wait()
        with torch.no_grad():
            whole(X)

    def run_part() -> None:
        with torch.no_grad():
            part(X)

    monkeypatch.setattr(fuser_module, "compile_call", slow)
    threads = [threading.Thread(target=run, daemon=True) for run in (run_part, run_whole)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert whole.fallbacks == part.fallbacks == () and len(whole.programs) == len(part.programs) == 1


# ---- dtypes and modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_every_dtype(dtype: torch.dtype) -> None:
    fast = check(encoder().to(dtype), X.to(dtype))
    assert fast.fallbacks == ()
    if dtype is torch.bfloat16:
        assert fast.unfused == ()
    else:
        assert len(fast.kernels) == 0


def test_models_of_several_dtypes() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(WIDTH, WIDTH, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = m.parts[0](x)
        b = m.parts[1](a.float())
        c = m.parts[2](b.bfloat16())
        return a, b + c, a + b

    model = Model(run, parts=nn.ModuleList(parts))
    fast = optimize(model)
    a, b, c = fast(X.double())
    x, y, z = model(X.double())
    assert_same((a, c), (x, z))
    assert_same(b, y, 1e-3)


def test_quantized_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    fast = optimize(quantized)
    assert torch.equal(fast(X), quantized(X))


def test_integers_and_booleans() -> None:
    check(Model(lambda m, x: (x * 2 + 1) // 3), torch.arange(12).view(3, 4))
    check(Model(lambda m, x: ~x & x.t()), torch.rand(4, 4) > 0.5)
    check(Model(lambda m, x, y: x + y), torch.arange(WIDTH), torch.randn(WIDTH))


def test_autocast_and_transforms_run_the_original() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(X), model(X))
    assert "autocast" in fast.fallbacks[-1]
    assert_same(torch.func.vmap(fast)(X[:, None]), torch.func.vmap(model)(X[:, None]))
    linear = nn.Linear(WIDTH, WIDTH)
    fast = optimize(linear)
    assert_same(torch.func.jvp(fast, (X,), (X,)), torch.func.jvp(linear, (X,), (X,)))
    assert_same(torch.jit.trace(fast, (X,))(X), linear(X))
    assert_same(torch.export.export(fast, (X,)).module()(X), linear(X))


def test_inference_mode() -> None:
    model = encoder()
    fast = optimize(model)
    with torch.inference_mode():
        inside = fast(X.clone())
    assert_same(fast(X), inside)
    fast = optimize(Model(lambda m, x: m.linear(x).cumsum(1)))
    fast(X)
    with torch.inference_mode():
        fast(X)


def test_training_mode_runs_the_original() -> None:
    model = Model(lambda m, x: F.dropout(m.linear(x), 0.5, m.training))
    fast = optimize(model)
    fast.train()
    assert model.training
    torch.manual_seed(3)
    ours = fast(X)
    torch.manual_seed(3)
    assert torch.equal(ours, model(X))
    assert "training mode" in fast.fallbacks[0]
    fast.eval()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1


# ---- arguments that are not tensors


def test_programs_are_made_for_plain_arguments() -> None:
    model = Model(lambda m, x, factor=1.0, flag=True: m.linear(x) * factor + int(flag))
    fast = optimize(model)
    for factor, flag in ((0.0, True), (-0.0, False), (1, True), (1.0, True), (True, 1), (2.5, None or False)):
        ours, theirs = fast(X, factor, flag=flag), model(X, factor, flag=flag)
        assert_same(ours, theirs)
        assert torch.equal(ours.signbit(), theirs.signbit())
    known = len(fast.programs)
    for _ in range(2):
        assert bool(fast(X, NAN).isnan().all())
    assert len(fast.programs) == known + 1


# ---- many callers


def test_threads_call_and_compile_at_once() -> None:
    model = encoder()
    fast = optimize(model)
    lengths = (3, 7, 12, 16)
    expected = {length: model(X[:, :length]) for length in lengths}
    uncapturable = Model(lambda m, x: m.linear(x) if x.shape[1] == 16 or x.sum() > -1e9 else x)
    other = optimize(uncapturable)
    truth = {length: uncapturable(X[:, :length]) for length in lengths}
    wrong: list[object] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(12):
                length = lengths[(first + i) % 4]
                try:
                    assert_same(fast(X[:, :length]), expected[length])
                    assert_same(other(X[:, :length]), truth[length])
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert len(fast.programs) == 4


def test_another_number_of_threads_is_followed() -> None:
    model = encoder()
    fast = optimize(model)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            assert_same(fast(X), model(X))
    finally:
        torch.set_num_threads(before)
    assert len(fast.programs) == 3
    assert len({id(compiled.graph) for compiled in fast.programs}) == 1


def test_an_interrupted_compilation_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    fast = optimize(model)
    identities = [id(p) for p in model.parameters()]
    from fuser.module import compiler

    for stage in ("raise_graph", "assemble", "load_kernels", "program_constants"):

        def interrupt(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the signal comes first")

        with monkeypatch.context() as patch:
            patch.setattr(compiler, stage, interrupt)
            with pytest.raises(KeyboardInterrupt):
                fast(X)
        assert [id(p) for p in model.parameters()] == identities
        assert torch.backends.mha.get_fastpath_enabled()
    assert_same(fast(X), model(X))
    assert len(fast.programs) == 1 and fast.fallbacks == ()


# ---- machines


def broken_machine(monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Path | str) -> OptimizedModule:
    """An optimized encoder that has to build its kernels with this compiler into this cache."""
    target = cpu_target()
    monkeypatch.setenv("FUSER_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(compiler))
    return optimize(encoder(), target=target)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "not an executable"),
        ("#!/bin/sh\nexit 1\n", ""),
        ("#!/bin/sh\ncase \"$1\" in --version) echo 'g++ (GCC) 12.2.0';; *) exit 0;; esac\n", ""),
    ],
    ids=["missing", "failing", "idle"],
)
def test_without_a_working_compiler_the_original_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, words: str
) -> None:
    compiler = tmp_path / "g++"
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    fast = broken_machine(monkeypatch, tmp_path / "cache", compiler)
    for _ in range(2):
        assert_same(fast(X), fast._model(X))
    assert fast.programs == ()
    assert len(fast.fallbacks) == 1 and words in fast.fallbacks[0]
    assert fast.fallbacks[0] in fast.report()


def test_without_any_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast = broken_machine(monkeypatch, tmp_path / "cache", "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and "compiler" in fast.fallbacks[0]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody, not even root, can make a directory there.
    fast = broken_machine(monkeypatch, Path("/proc/fuser"), os.environ.get("CXX", "g++"))
    assert_same(fast(X), fast._model(X))
    assert len(fast.programs) == 1 or "/proc/fuser" in fast.fallbacks[0]


def test_no_place_to_write_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = broken_machine(monkeypatch, Path("/proc/fuser"), os.environ.get("CXX", "g++"))
    monkeypatch.setattr(tempfile, "tempdir", "/proc/fuser-temporary")
    # What another test found out about this directory.
    runtime_cache._open.cache_clear()
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and len(fast.fallbacks) == 1


def test_a_cache_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    fast = broken_machine(monkeypatch, shared, os.environ.get("CXX", "g++"))
    assert_same(fast(X), fast._model(X))
    assert fast.programs == () and "other users can write" in fast.fallbacks[0]


# ---- random models

NODES = st.sampled_from(
    ["linear", "norm", "gelu", "relu", "residual", "scale", "bias", "transpose", "attention", "softmax", "cumsum"]
)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(NODES, min_size=1, max_size=7))
def test_random_chains(nodes: list[str]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first = x
        for node in nodes:
            if node == "linear":
                x = m.linear(x)
            elif node == "norm":
                x = F.layer_norm(x, (WIDTH,))
            elif node == "gelu":
                x = F.gelu(x)
            elif node == "relu":
                x = torch.relu(x)
            elif node == "residual":
                x = x + first
            elif node == "scale":
                x = x * 0.5
            elif node == "bias":
                x = x + m.linear.bias
            elif node == "transpose":
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            elif node == "attention":
                heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
                x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
            elif node == "softmax":
                x = torch.softmax(x, -1)
            else:
                x = torch.cumsum(x, 1)
        return x

    torch.manual_seed(0)
    model, exact = Model(run), Model(run).double()
    theirs, ours, truth = model(X), optimize(model)(X), exact(X.double())
    assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-6 * float(truth.norm())
