"""The attention kernel against float64: plans, run-time masks, storage, instruction sets, threads, poison."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_reference import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser import masks
from fuser.codegen.render import header_folder, render
from fuser.ir.errors import KernelError
from fuser.ir.evaluation import evaluate
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import PV, QK, ChangeScores, PatternMask, Scale, Semantics, Softmax
from fuser.ir.scores import ScoreRule, SoftCap
from fuser.ir.target import Isa, Target, cuda_target
from fuser.kernels.attention import (
    AttentionFamily,
    AttentionMatch,
    AttentionParameters,
    CpuAttention,
    Distances,
    extents,
    workspace_bytes,
)
from fuser.kernels.attention_cuda import CudaAttention
from fuser.kernels.base import STORAGE, DType, Literal
from fuser.kernels.plan import FEW_ROWS, AttentionPlan, Group
from fuser.kernels.planner import plan
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cpuinfo import detect_isa
from fuser.runtime.device import cpu_target
from fuser.runtime.library import Kernel, load

NATIVE = detect_isa()
ISAS = {Isa.AVX512: (Isa.AVX512, Isa.AVX2, Isa.PORTABLE), Isa.AVX2: (Isa.AVX2, Isa.PORTABLE)}.get(NATIVE, (NATIVE,))
# Twice what eager PyTorch has for these sizes (3 to 4e-7).
FP32 = 8e-7
PLAIN = AttentionParameters(59, 16, lse=True)
BOOLEAN = AttentionParameters(32, 32, mask=DType.BOOL, lse=True)
ADDITIVE = AttentionParameters(32, 32, mask=DType.F32, lse=True)
CAPPED = AttentionParameters(32, 32, lse=True, rule=SoftCap(2.0))
FAR = [
    AttentionParameters(32, 32, mask=mask, lse=True, distances=kind)
    for mask, kind in ((None, DType.F32), (DType.BOOL, DType.F32), (DType.F32, DType.BF16))
]
SPECIAL = [
    AttentionParameters(32, 32, mask=DType.BOOL, lse=True, rule=SoftCap(2.0)),
    AttentionParameters(32, 32, mask=DType.F32, lse=True, rule=SoftCap(2.0)),
    AttentionParameters(24, 80, DType.BF16),
    AttentionParameters(256, 256, DType.BF16, mask=DType.BOOL),
    AttentionParameters(32, 32, mask=DType.BF16, lse=True),
    AttentionParameters(64, 64),
]


def target(isa: Isa = NATIVE) -> Target:
    return Target("cpu", isa.value, frozenset(), 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 1e-6)


@functools.cache
def libraries(isa: Isa) -> dict[str, Path]:
    """All kernels of this file for one instruction set, built side by side."""
    wanted = [PLAIN, BOOLEAN, ADDITIVE, CAPPED, *FAR, *(SPECIAL if isa is NATIVE else ())]
    return build([render(p.spec) for p in wanted], target(isa), headers=header_folder(target(isa)))


def kernel(parameters: AttentionParameters, isa: Isa) -> Kernel:
    symbol = parameters.spec.symbol
    return load(libraries(isa)[symbol], symbol)


# The code around the instruction that multiplies pairs of bf16 numbers, with it where there is one, and with a model.
DOTS = {"model": "#define FUSER_DOTS_BF16\n"} | ({"bf16": ""} if "avx512_bf16" in cpu_target().features else {})
# Weights are rounded to eight bits, and so is the result.
PAIRS = math.sqrt(2) * 2.0**-9
IN_PAIRS = [
    AttentionParameters(59, 18, DType.BF16, lse=True),
    AttentionParameters(32, 32, DType.BF16, DType.BOOL, lse=True),
    AttentionParameters(32, 32, DType.BF16, DType.F32, lse=True),
]


@functools.cache
def dots(name: str) -> dict[str, Path]:
    """The kernels that multiply in pairs; the model's for AVX2, where tails and vectors are others."""
    on = cpu_target() if name == "bf16" else target(ISAS[min(1, len(ISAS) - 1)])
    sources = [render(p.spec) for p in IN_PAIRS]
    sources = [dataclasses.replace(source, text=DOTS[name] + source.text) for source in sources]
    return build(sources, on, headers=header_folder(on))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: AttentionPlan,
    mask: Tensor | None = None,
    *,
    lse: bool = True,
    scale: float | None = None,
    threads: int = 2,
    isa: Isa = NATIVE,
    out: Tensor | None = None,
    in_flight: int = 2,
    rule: ScoreRule | None = None,
    dot: str | None = None,
    distances: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on views as they are; the output is (B, S, H, D) in memory unless given, sums (B, S, H). ``dot``:
    of DOTS."""
    (batch, heads, q_len, dim), (_, key_heads, kv_len, value_dim) = q.shape, v.shape
    kind = None if mask is None else STORAGE[mask.dtype]
    parameters = AttentionParameters(dim, value_dim, STORAGE[q.dtype], kind, lse, rule=rule)
    if distances is not None:
        parameters = dataclasses.replace(parameters, distances=STORAGE[distances.dtype])
    symbol = parameters.spec.symbol
    run = kernel(parameters, isa) if dot is None else load(dots(dot)[symbol], symbol)
    if out is None:
        out = torch.full((batch, q_len, heads, value_dim), 777.0, dtype=q.dtype).transpose(1, 2)
    sums = torch.full((batch, q_len, heads), 777.0).transpose(1, 2)
    whole = None if mask is None else mask.expand(batch, heads, q_len, kv_len)
    array = torch.from_numpy(tiles.array.copy())
    far = None
    if distances is not None:
        far = Distances(distances.stride(0), 0 if reverse else kv_len - 1, 1 if reverse else -1)
    tensors = [q, k, v, *(t for t in (whole, distances) if t is not None), array, out, *([sums] if lse else [])]
    sizes = extents(
        batch,
        heads,
        key_heads,
        *tiles.lengths,
        1 / math.sqrt(dim) if scale is None else scale,
        [t.stride()[:3] for t in (q, k, v, out)],
        None if whole is None else whole.stride(),
        far,
        in_flight,
        sums.stride(),
    )
    scratch = torch.empty(workspace_bytes(batch, heads, value_dim, tiles, in_flight) + 64, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 64) * 64
    run(KernelArgs.pack([t.data_ptr() for t in tensors], sizes, threads, aligned))
    return out, sums


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = FP32) -> None:
    assert error(result[0], expected[0]) <= tolerance
    assert torch.equal(result[0].double()[expected[1].isneginf()], expected[0][expected[1].isneginf()])
    assert torch.allclose(result[1].double(), expected[1], rtol=1e-6, atol=3e-6)


def heads(seed: int, batch: int, count: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, S, D), a view of rows that hold all heads, as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, count, dim, generator=generator).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "mask",
    [masks.Dense(), masks.Causal(), masks.SlidingWindow(9, 4), masks.Strided(), masks.Longformer(8, 3), ~masks.Dense()],
    ids=str,
)
def test_odd_sizes_with_shared_key_heads(mask: masks.Mask, isa: Isa) -> None:
    for q_len, kv_len in [(1, 1), (1, 200), (7, 65), (63, 7), (65, 63), (200, 65), (200, 201)]:
        q, k, v = heads(1, 2, 4, q_len, 59), heads(2, 2, 2, kv_len, 59), heads(3, 2, 2, kv_len, 16)
        result = attend(q, k, v, plan(mask, q_len, kv_len), isa=isa, scale=0.2)
        check(result, exact(q, k, v, mask.dense(q_len, kv_len), scale=0.2))


def test_views_of_one_projection_and_untouched_neighbours() -> None:
    """Strided operands from one (B, S, 3HD) tensor, and an output inside a larger one."""
    batch, count, length, dim = 2, 3, 70, 64
    packed = torch.randn(batch, length, 3 * count * dim + 5, generator=torch.Generator().manual_seed(0))
    q, k, v = packed[..., 2:-3].unflatten(-1, (3, count, dim)).permute(2, 0, 3, 1, 4)
    memory = torch.full((batch, length + 2, count, dim + 3), 5.0)
    out = memory[:, 1:-1, :, 1:-2].transpose(1, 2)
    attend(q, k, v, plan(masks.Causal(), length), out=out, lse=False)
    assert error(out, exact(q, k, v, masks.Causal().dense(length))[0]) <= FP32
    memory[:, 1:-1, :, 1:-2] = 5.0
    assert (memory == 5.0).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(q_len: int, kv_len: int) -> None:
    q, k, v = heads(1, 2, 4, q_len, 59), heads(2, 2, 4, kv_len, 59), heads(3, 2, 4, kv_len, 16)
    out, lse = attend(q, k, v, plan(masks.Dense(), q_len, kv_len))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_heads_with_masks_of_their_own() -> None:
    mask = masks.per_head([masks.Causal(), masks.Strided(4), ~masks.Dense(), masks.Dense()])
    q, k, v = heads(1, 2, 4, 90, 59), heads(2, 2, 2, 80, 59), heads(3, 2, 2, 80, 16)
    check(attend(q, k, v, plan(mask, 90, 80)), exact(q, k, v, mask.dense(90, 80)))


MASK_SHAPES = [(1, 1, 1, 200), (2, 1, 1, 200), (2, 4, 1, 200), (1, 1, 130, 200), (2, 4, 130, 200), (1, 4, 130, 1)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_runtime_masks_compose_with_plans(shape: tuple[int, ...], isa: Isa) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v = heads(1, 2, 4, 130, 32), heads(2, 2, 2, 200, 32), heads(3, 2, 2, 200, 32)
    allowed = torch.rand(shape, generator=generator) > 0.6
    allowed[..., : shape[-1] // 3] = False
    noise = torch.randn(shape, generator=generator)
    for mask in (masks.Dense(), masks.Causal(5), masks.Strided(9)):
        tiles, pattern = plan(mask, 130, 200), mask.dense(130, 200)
        check(attend(q, k, v, tiles, allowed, isa=isa), exact(q, k, v, pattern & allowed))
        transposed = allowed.expand(2, 4, 130, 200).mT.contiguous().mT
        check(attend(q, k, v, tiles, transposed, isa=isa), exact(q, k, v, pattern & allowed))
        for low in (-math.inf, torch.finfo(torch.float32).min):
            bias = torch.where(allowed, noise, low)
            check(attend(q, k, v, tiles, bias, isa=isa), exact(q, k, v, pattern, bias))
        bias = torch.where(allowed, noise, -math.inf).expand(2, 4, 130, 200).mT.contiguous().mT
        check(attend(q, k, v, tiles, bias, isa=isa), exact(q, k, v, pattern, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("parameters", FAR, ids=lambda p: str(p.mask))
def test_biases_by_distance_meet_masks(parameters: AttentionParameters, isa: Isa) -> None:
    generator = torch.Generator().manual_seed(0)
    for q_len, kv_len, pattern in ((70, 70, masks.Dense()), (70, 90, masks.Strided(5)), (3, 120, masks.Dense())):
        q, k, v = heads(1, 2, 4, q_len, 32), heads(2, 2, 2, kv_len, 32), heads(3, 2, 2, kv_len, 32)
        row = torch.randn(4, q_len + kv_len - 1, generator=generator).to(parameters.distances.torch)
        at, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
        seen = torch.rand(2, 1, q_len, kv_len, generator=generator) > 0.3
        for mask in (seen, seen[:, :, :1]):
            allowed, bias, given = pattern.dense(q_len, kv_len), torch.zeros(()), None
            if parameters.mask is DType.BOOL:
                allowed, given = allowed & mask, mask
            elif parameters.mask is not None:
                given = bias = torch.where(mask, torch.randn(mask.shape, generator=generator), -math.inf)
            for reverse in (False, True):
                far = row[:, at + key if reverse else kv_len - 1 + at - key]
                result = attend(q, k, v, plan(pattern, q_len, kv_len), given, isa=isa, distances=row, reverse=reverse)
                check(result, exact(q, k, v, allowed, bias=far.double() + bias))


def test_half_precision_masks() -> None:
    q, k, v = (heads(i, 1, 2, 90, 32) for i in range(3))
    bias = torch.randn(90, 90, generator=torch.Generator().manual_seed(4)).bfloat16()
    bias[:, 50:] = torch.finfo(torch.bfloat16).min
    check(attend(q, k, v, plan(masks.Dense(), 90), bias[None, None]), exact(q, k, v, bias=bias))


def test_rows_that_see_only_the_lowest_bias_are_uniform() -> None:
    """As in eager PyTorch: the lowest float is a bias, and only -inf excludes."""
    q, k, v = (heads(i, 1, 2, 40, 32) for i in range(3))
    bias = torch.zeros(1, 1, 40, 40)
    bias[:, :, 3] = torch.finfo(torch.float32).min
    bias[:, :, 4] = -math.inf
    out, lse = attend(q, k, v, plan(masks.Dense(), 40), bias)
    assert torch.allclose(out[:, :, 3], v.mean(2), atol=1e-6)
    assert (out[:, :, 4] == 0).all()
    assert (lse[:, :, 4] == -math.inf).all()
    padding = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    assert torch.allclose(attend(q, k, v, plan(masks.Dense(), 40), padding)[0][:, :, 7], v.mean(2), atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("given", ["plan", "rows", "keys", "bias"])
def test_poison_reaches_only_rows_that_may_see_it(given: str, where: str, poison: float, isa: Isa) -> None:
    n = 110
    q, k, v = (heads(i, 1, 2, n, 32) for i in range(3))
    pattern = masks.Strided(7).dense(n)
    if given == "keys":
        pattern = torch.arange(n)[None, :].ne(21) & masks.Causal().dense(n)
    tiles = plan(masks.from_dense(pattern), n) if given == "plan" else plan(masks.Dense(), n)
    mask = pattern[None, None]
    if given == "plan":
        mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    elif given == "keys":
        tiles, mask = plan(masks.Causal(), n), torch.arange(n).ne(21)[None, None, None]
    elif given == "bias":
        mask = torch.where(mask, 0.0, -math.inf)
    clean = attend(q, k, v, tiles, mask, isa=isa)[0].clone()
    (k if where == "key" else v)[:, :, 21] = poison
    out = attend(q, k, v, tiles, mask, isa=isa)[0]
    sees = pattern[:, 21]
    # Probabilities of other keys do not change, so what is not touched is equal to rounding, and mostly to the bit.
    assert torch.allclose(out[:, :, ~sees], clean[:, :, ~sees], rtol=1e-4, atol=1e-6)
    # A product of zero and NaN is NaN, so the reference leaves out what a row may not see.
    probabilities = torch.softmax((q.double() @ k.double().mT / math.sqrt(32)).masked_fill(~pattern, -math.inf), -1)
    terms = torch.where(pattern[..., None], probabilities[..., None] * v.double()[:, :, None], 0.0)
    expected = terms.sum(-2)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_plans_know_which_rows_are_few() -> None:
    assert PLAIN.few_rows == FEW_ROWS
    assert [plan(masks.Dense(), rows, 100).work_ratio for rows in (1, FEW_ROWS, FEW_ROWS + 1)] == [1.0, 1.0, 16 / 5]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_few_rows(rows: int, isa: Isa) -> None:
    """Decoding: up to four rows are computed with their elements in lanes."""
    generator = torch.Generator().manual_seed(rows)
    pattern = torch.rand(rows, 300, generator=generator) > 0.5
    seen = torch.rand(2, 1, 1, 300, generator=generator) > 0.3
    by_row = torch.rand(2, 4, rows, 300, generator=generator) > 0.3
    bias = torch.randn(2, 1, 1, 300, generator=generator).masked_fill(~seen, -math.inf)
    for dim, value_dim, mask in ((59, 16, None), (32, 32, seen), (32, 32, by_row), (32, 32, bias)):
        q, k, v = heads(1, 2, 4, rows, dim), heads(2, 2, 2, 300, dim), heads(3, 2, 2, 300, value_dim)
        added = torch.zeros(()) if mask is None else mask
        for tiles, allowed in (
            (plan(masks.Dense(), rows, 300), torch.ones(rows, 300, dtype=torch.bool)),
            (plan(masks.from_dense(pattern), rows, 300), pattern),
        ):
            if added.dtype == torch.bool:
                check(attend(q, k, v, tiles, mask, isa=isa), exact(q, k, v, allowed & added))
            else:
                check(attend(q, k, v, tiles, mask, isa=isa), exact(q, k, v, allowed, added))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("lowest", [None, -math.inf, torch.finfo(torch.float32).min])
def test_buffers_of_which_a_part_is_in_use(lowest: float | None, rows: int, isa: Isa) -> None:
    """What a row sees is one stretch of a long buffer: its start, its end, a window, almost all of it, nothing."""
    kv_len, stretches = 333, [(0, 5), (64, 128), (100, 229), (0, 332), (332, 333), (7, 7)]
    q, k, v = heads(1, 6, 4, rows, 32), heads(2, 6, 2, kv_len, 32), heads(3, 6, 2, kv_len, 32)
    first, last = torch.tensor(stretches).T[:, :, None, None, None]
    keys = torch.arange(kv_len)
    tiles = plan(masks.Dense(), rows, kv_len)
    for until in (last, last + torch.arange(rows)[:, None] * (last > first)):
        seen = (keys >= first) & (keys < until)
        # Nobody reads the rest, but where all are equally low.
        unread = ~seen.any(-2, keepdim=True) & (seen.any((-2, -1), keepdim=True) | (lowest != torch.finfo().min))
        dirty = [t.masked_fill(unread.mT, math.nan) for t in (k, v)]
        if lowest is None:
            check(attend(q, *dirty, tiles, seen, isa=isa), exact(q, k, v, seen))
            continue
        bias = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~seen, lowest)
        check(attend(q, *dirty, tiles, bias, isa=isa), exact(q, k, v, bias=bias))


@pytest.mark.parametrize("where", ["key", "value"])
def test_poison_among_few_rows(where: str) -> None:
    q, k, v = heads(1, 1, 2, 3, 32), heads(2, 1, 2, 50, 32), heads(3, 1, 2, 50, 32)
    pattern = torch.ones(3, 50, dtype=torch.bool)
    pattern[1, 21] = False
    tiles = plan(masks.from_dense(pattern), 3, 50)
    visible = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    (k if where == "key" else v)[:, :, 21] = math.nan
    out = attend(q, k, v, tiles, visible)[0]
    assert out[:, :, [0, 2]].isnan().all()
    others = [j for j in range(50) if j != 21]
    expected = exact(q[:, :, 1:2], k[:, :, others], v[:, :, others], torch.ones(1, 49, dtype=torch.bool))[0]
    assert error(out[:, :, 1:2], expected) <= FP32


def test_few_rows_of_several_phases() -> None:
    """Partial results of few rows are resumed, and wide heads need several tiles of values."""
    q, k, v = (heads(i, 1, 2, n, 256, torch.bfloat16) for i, n in ((1, 3), (2, 400), (3, 400)))
    everything = torch.ones(1, 1, 1, 400, dtype=torch.bool)
    rows, keys, lanes = np.arange(3, dtype=np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint64)
    halves = [Group(rows, np.array([[200 * p, 200, 1]], np.int32), keys, lanes, 16, phase=p) for p in (0, 1)]
    out, _ = attend(q, k, v, AttentionPlan.of(3, 400, halves), everything, lse=False)
    expected, _ = exact(q, k, v, torch.ones(3, 400, dtype=torch.bool))
    assert error(out, expected) <= 2.0**-9


def test_large_scores_do_not_overflow() -> None:
    q, k, v = heads(1, 1, 2, 100, 64) * 1e3, heads(2, 1, 2, 100, 64) * 1e2, heads(3, 1, 2, 100, 64)
    out, _ = attend(q, k, v, plan(masks.Causal(), 100), lse=False)
    expected = exact(q, k, v, masks.Causal().dense(100))
    # Scores near 1e6 carry errors near 0.1 whoever computes them, so compare with what eager does.
    eager = torch.softmax((q @ k.mT / 8).masked_fill(~masks.Causal().dense(100), -math.inf), -1) @ v
    assert out.isfinite().all()
    assert error(out, expected[0]) <= 2 * error(eager, expected[0]) + FP32


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_keep_the_digits_in_which_they_differ(isa: Isa) -> None:
    """Whole numbers up to about 100, which fp32 holds: nothing may be lost before the maximum is subtracted."""
    q, k, v = heads(1, 1, 2, 150, 59).mul(20).round(), heads(2, 1, 2, 200, 59).round(), heads(3, 1, 2, 200, 16)
    scores = 0.125 * (q @ k.mT)
    assert torch.equal(scores.double(), 0.125 * (q.double() @ k.double().mT))
    assert 80 < scores.abs().max() < 128
    for rows in (150, 3):
        result = attend(q[:, :, :rows], k, v, plan(masks.Dense(), rows, 200), scale=0.125, isa=isa)
        check(result, exact(q[:, :, :rows], k, v, scale=0.125), 2.0**-22)


@pytest.mark.parametrize("isa", ISAS)
def test_scores_are_softly_capped_before_masks(isa: Isa) -> None:
    """Scores up to twice the cap, so that a kernel without the rule is far off."""
    rule = SoftCap(2.0)
    for rows, mask in ((130, masks.Causal()), (130, masks.Strided(9)), (3, masks.Dense())):
        q, k, v = heads(1, 2, 4, rows, 32), heads(2, 2, 2, 130, 32), heads(3, 2, 2, 130, 32)
        tiles, pattern = plan(mask, rows, 130), mask.dense(rows, 130)
        expected = exact(q, k, v, pattern, cap=2.0)
        assert error(exact(q, k, v, pattern)[0].float(), expected[0]) > 0.01
        check(attend(q, k, v, tiles, isa=isa, rule=rule), expected)
        if isa is NATIVE:
            allowed = torch.rand(2, 1, rows, 130, generator=torch.Generator().manual_seed(rows)) > 0.4
            check(attend(q, k, v, tiles, allowed, rule=rule), exact(q, k, v, pattern & allowed, cap=2.0))
            bias = torch.where(allowed, 3.0 * heads(4, 2, 1, rows, 130), -math.inf)
            check(attend(q, k, v, tiles, bias, rule=rule), exact(q, k, v, pattern, bias, cap=2.0))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_caps_are_finite_and_above_zero(cap: float) -> None:
    with pytest.raises(ValueError, match="finite number above zero"):
        SoftCap(cap)


def test_half_precision_storage() -> None:
    q, k, v = (heads(i, 2, h, 130, d, torch.bfloat16) for i, h, d in ((1, 4, 24), (2, 2, 24), (3, 2, 80)))
    mask = masks.Strided(9)
    out, _ = attend(q, k, v, plan(mask, 130), lse=False)
    expected, _ = exact(q, k, v, mask.dense(130))
    scores = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(24)).masked_fill(~mask.dense(130), -math.inf)
    eager = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
    assert error(out, expected) <= 2 * error(eager, expected)
    # Only the result is rounded, to eight bits.
    assert error(out, expected) <= 2.0**-9


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize(
    "mask",
    [masks.Dense(), masks.Causal(), masks.SlidingWindow(9, 4), masks.Strided(), masks.Longformer(8, 3), ~masks.Dense()],
    ids=str,
)
def test_pairs_of_bf16_numbers(mask: masks.Mask, dot: str) -> None:
    """Odd heads, odd numbers of keys, few rows, several phases; scores are exact, and so are their sums."""
    for q_len, kv_len in [(1, 1), (3, 200), (7, 65), (65, 63), (200, 201)]:
        q, k, v = (
            heads(i, 2, h, n, d, torch.bfloat16)
            for i, h, n, d in ((1, 4, q_len, 59), (2, 2, kv_len, 59), (3, 2, kv_len, 18))
        )
        expected = exact(q, k, v, mask.dense(q_len, kv_len), scale=0.2)
        check(attend(q, k, v, plan(mask, q_len, kv_len), scale=0.2, dot=dot), expected, PAIRS)


@pytest.mark.parametrize("dot", DOTS)
def test_pairs_under_runtime_masks_are_as_near_as_sdpa(dot: str) -> None:
    q, k, v = (heads(i, 2, 4, n, 32, torch.bfloat16) for i, n in ((1, 130), (2, 201), (3, 201)))
    allowed = torch.rand(2, 1, 130, 201, generator=torch.Generator().manual_seed(0)) > 0.4
    bias = torch.where(allowed, heads(4, 2, 1, 130, 201), -math.inf)
    sdpa = F.scaled_dot_product_attention(q, k, v, bias.bfloat16())
    sdpa_error = error(sdpa, exact(q, k, v, bias=bias.bfloat16())[0])
    for mask in (masks.Dense(), masks.Strided(9)):
        tiles, pattern = plan(mask, 130, 201), mask.dense(130, 201)
        for seen in (allowed, allowed[:, :, :1]):
            check(attend(q, k, v, tiles, seen, dot=dot), exact(q, k, v, pattern & seen), PAIRS)
        result, expected = attend(q, k, v, tiles, bias, dot=dot), exact(q, k, v, pattern, bias)
        check(result, expected, PAIRS)
        assert error(result[0], expected[0]) <= 1.5 * sdpa_error


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_in_pairs_reaches_only_rows_that_may_see_it(poison: float, dot: str) -> None:
    """What stands beside a poisoned key in a pair, masked or beyond an odd last one, does not matter."""
    q, k, v = (heads(i, 1, 2, 111, 32, torch.bfloat16) for i in range(3))
    pattern = masks.Strided(7).dense(111) & torch.arange(111).ne(109)
    tiles = plan(masks.Dense(), 111)
    clean = attend(q, k, v, tiles, pattern[None, None], dot=dot)[0].clone()
    for where in (k, v):
        before = where[:, :, 110].clone()
        where[:, :, 110] = where[:, :, 109] = poison
        out = attend(q, k, v, tiles, pattern[None, None], dot=dot)[0]
        sees = pattern[:, 110]
        torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees], rtol=2.0**-7, atol=1e-3)
        if where is v:
            assert (out[:, :, sees].isnan() if poison != poison else out[:, :, sees] == poison).all()
        else:
            assert not out[:, :, sees].equal(clean[:, :, sees])
        where[:, :, 110] = before


def test_largest_heads() -> None:
    q, k, v = (heads(i, 1, 2, 90, 256, torch.bfloat16) for i in range(3))
    allowed = torch.rand(1, 1, 90, 90, generator=torch.Generator().manual_seed(1)) > 0.5
    out, _ = attend(q, k, v, plan(masks.Dense(), 90), allowed, lse=False)
    assert error(out, exact(q, k, v, allowed)[0]) <= 2.0**-9


def two_phases(length: int, step: int, width: int) -> AttentionPlan:
    """The strided mask as a band, then residue classes modulo the step."""
    groups = list(plan(masks.SlidingWindow(step - 1, 0), length))
    for residue in range(step):
        rows = np.arange(residue, length, step)
        for start in range(0, len(rows), width):
            part = rows[start : start + width]
            every = (1 << len(part)) - 1
            before = np.array([[residue, start, step]] if start else [], np.int32).reshape(-1, 3)
            lanes = np.array([every & ~((2 << i) - 1) for i in range(len(part) - 1)], np.uint64)
            if start or len(lanes):
                groups.append(Group(part.astype(np.int32), before, part[:-1].astype(np.int32), lanes, width, 1))
    return AttentionPlan.of(length, length, groups)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_phases_of_gathered_rows_merge_exactly(width: int, isa: Isa) -> None:
    length, step = 400, 10
    tiles, mask = two_phases(length, step, width), masks.Strided(step)
    tiles.validate(mask)
    assert tiles.phases == 2
    q, k, v = heads(1, 2, 4, length, 59), heads(2, 2, 2, length, 59), heads(3, 2, 2, length, 16)
    expected = exact(q, k, v, mask.dense(length))
    results = [attend(q, k, v, tiles, threads=t, in_flight=f, isa=isa) for t, f in ((1, 1), (2, 1), (3, 2), (2, 8))]
    check(results[0], expected)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize(
    ("mask", "phases"), [(masks.Strided(24), 2), (masks.Dilated(20, 8) | masks.Strided(25), 3)], ids=str
)
def test_planned_phases_merge_exactly(mask: masks.Mask, phases: int) -> None:
    length = 601
    q, k, v = heads(1, 2, 4, length, 59), heads(2, 2, 2, length, 59), heads(3, 2, 2, length, 16)
    expected = exact(q, k, v, mask.dense(length))
    tiles = plan(mask, length)
    assert tiles.phases == phases
    check(attend(q, k, v, tiles), expected)
    check(attend(q, k, v, plan(masks.from_dense(mask.dense(length)), length)), expected)


def random_plan(rng: np.random.Generator, allowed: np.ndarray, phases: int) -> AttentionPlan:
    """The allowed pairs, thrown into phases, rows shuffled into groups, keys in any order."""
    q_len, kv_len = allowed.shape
    phase_of = rng.integers(0, phases, allowed.shape)
    groups, plans = [], []
    for phase in range(phases):
        rows = rng.permutation(q_len)
        if phase:
            # Rows need not take part in every phase; those that still have pairs in this one must.
            rows = rows[rng.random(q_len) < 0.5]
            rest = np.setdiff1d(np.arange(q_len), rows)
            phase_of[rest] = np.where(phase_of[rest] == phase, 0, phase_of[rest])
        plans.append(rows)
    for phase, rows in enumerate(plans):
        while len(rows):
            width = int(rng.choice([16, 32, 64]))
            size = rng.integers(1, width + 1)
            part, rows = rows[:size], rows[size:]
            mine = allowed[part] & (phase_of[part] == phase)
            full, some = np.flatnonzero(mine.all(0)), np.flatnonzero(mine.any(0) & ~mine.all(0))
            full, some = rng.permutation(full), rng.permutation(some)
            lanes = (mine[:, some].astype(np.uint64) << np.arange(len(part), dtype=np.uint64)[:, None]).sum(
                0, np.uint64
            )
            runs = np.stack([full, np.ones_like(full), rng.integers(-3, 4, len(full))], 1)
            groups.append(
                Group(part.astype(np.int32), runs.astype(np.int32), some.astype(np.int32), lanes, width, phase)
            )
    return AttentionPlan.of(q_len, kv_len, groups)


@given(st.integers(0, 2**32 - 1), st.integers(1, 150), st.integers(1, 150), st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_any_partition_gives_the_same(seed: int, q_len: int, kv_len: int, phases: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    allowed = rng.random((q_len, kv_len)) < density
    tiles = random_plan(rng, allowed, phases)
    pattern = torch.from_numpy(allowed)
    tiles.validate(masks.from_dense(pattern))
    q, k, v = heads(seed, 1, 2, q_len, 59), heads(seed + 1, 1, 2, kv_len, 59), heads(seed + 2, 1, 2, kv_len, 16)
    results = [attend(q, k, v, tiles, threads=t) for t in (1, 2, 3)]
    check(results[0], exact(q, k, v, pattern), 1e-6)
    assert all(torch.equal(results[0][0], out) and torch.equal(results[0][1], lse) for out, lse in results[1:])


def test_plans_for_other_heads_are_refused() -> None:
    q, k, v = heads(1, 1, 3, 20, 59), heads(2, 1, 3, 20, 59), heads(3, 1, 3, 20, 16)
    with pytest.raises(KernelError):
        attend(q, k, v, plan(masks.per_head([masks.Causal()] * 2), 20))


def operators(*made: tuple[Semantics, Sequence[str]]) -> tuple[Operator, ...]:
    return tuple(Operator(f"op{i}", semantics, tuple(read), (f"t{i}",)) for i, (semantics, read) in enumerate(made))


def graph(ops: tuple[Operator, ...], outputs: tuple[str, ...], mask: torch.dtype | None) -> OperatorGraph:
    def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
        return TensorSpec.contiguous(shape, dtype)

    values = {"q": spec(2, 4, 50, 64), "k": spec(2, 2, 50, 64), "v": spec(2, 2, 50, 64)}
    if mask is not None:
        values["mask"] = TensorSpec((2, 4, 50, 50), mask, (50, 0, 0, 1))
    for op in ops:
        values[op.output] = spec(2, 4, 50, 64 if isinstance(op.semantics, PV) else 50)
    inputs = tuple(name for name in ("q", "k", "v", "mask") if name in values)
    return OperatorGraph(ops, values, inputs, outputs, {})


def test_family_matches_attention_and_calls_its_kernel() -> None:
    pattern = masks.Longformer(6, 2)
    ops = operators(
        (QK(), ("q", "k")),
        (Scale(0.125), ("t0",)),
        (PatternMask(True, pattern), ("t1",)),
        (Softmax(masked=True), ("t2",)),
        (PV(), ("t3", "v")),
    )
    family, made = AttentionFamily(), graph(ops, ("t4",), None)
    match = family.match(made.group(ops), target())
    assert match is not None
    (parameters,) = CpuAttention().space(match, target())
    call = CpuAttention().call(match, parameters, target(), 2)
    assert parameters == AttentionParameters(64, 64)
    assert call.outputs == ("t4",)
    literal = next(t for t in call.tensors if isinstance(t, Literal))
    allowed = (pattern & masks.Causal()).dense(50)
    AttentionPlan(literal.array.copy()).validate(masks.from_dense(allowed))
    tensors = {"q": torch.randn(2, 4, 50, 64), "k": torch.randn(2, 2, 50, 64), "v": torch.randn(2, 2, 50, 64)}
    tensors["t4"] = torch.zeros(2, 4, 50, 64)
    array = torch.from_numpy(literal.array.copy())
    addresses = [(tensors[t] if isinstance(t, str) else array).data_ptr() for t in call.tensors]
    kernel(parameters, NATIVE)(KernelArgs.pack(addresses, call.extents, 2))
    expected = exact(tensors["q"], tensors["k"], tensors["v"], allowed)[0]
    assert error(tensors["t4"], expected) <= FP32
    meaning = evaluate(match.group, {n: t for n, t in tensors.items() if n != "t4"}, torch.float64)
    assert error(meaning["t4"], expected) <= 1e-14
    assert CpuAttention().cost(match, parameters, target()).flops < 8 * 50 * 50 * 4 * 64
    # Nothing that escapes or is left over can be one kernel.
    escaping = graph(ops, ("t3", "t4"), None)
    assert family.match(escaping.group(ops), target()) is None
    assert family.match(made.group(ops[:-1]), target()) is None


def test_a_score_rule_comes_between_scale_and_masks() -> None:
    steps: dict[str, Semantics] = {"s": Scale(0.125), "r": ChangeScores(SoftCap(2.0)), "m": PatternMask(causal=True)}

    def match(order: str) -> AttentionMatch | None:
        middle = [(steps[step], (f"t{i}",)) for i, step in enumerate(order)]
        last = len(order)
        ops = operators(
            (QK(), ("q", "k")), *middle, (Softmax(masked=True), (f"t{last}",)), (PV(), (f"t{last + 1}", "v"))
        )
        return AttentionFamily().match(graph(ops, (f"t{last + 2}",), None).group(ops), target())

    found = match("srm")
    assert found is not None and found.rule == SoftCap(2.0)
    (parameters,) = CpuAttention().space(found, target())
    assert parameters == AttentionParameters(64, 64, rule=SoftCap(2.0))
    assert all(p.rule == SoftCap(2.0) for p in CudaAttention().space(found, cuda_target("sm_90")))
    for other in ("rsm", "smr", "msr", "srmr", "rr"):
        assert match(other) is None


def test_matches_scaled_dot_product_attention() -> None:
    q, k, v = (heads(i, 2, 4, 97, 64) for i in range(3))
    out, _ = attend(q, k, v, plan(masks.Causal(), 97), lse=False)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=2e-6)
