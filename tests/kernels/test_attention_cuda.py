"""The CUDA attention kernel on the emulator against float64, its checks by the emulator, and what nvcc makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from attention_reference import exact
from torch import Tensor

from fuser import masks
from fuser.attention.launch import run_plan
from fuser.codegen.render import header_folder, render
from fuser.ir.graph import Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import PV, QK, BooleanMask, PatternMask, Scale, Semantics, Softmax
from fuser.ir.scores import SoftCap
from fuser.ir.target import cuda_target, emulated_target
from fuser.kernels import attention_cuda
from fuser.kernels.attention import AttentionFamily, Distances, cached_plan
from fuser.kernels.attention_cuda import CudaAttention, CudaAttentionParameters, Schedule, choices, extents, schedule
from fuser.kernels.base import STORAGE, DType, Literal
from fuser.kernels.plan import AttentionPlan
from fuser.runtime.build import build
from fuser.runtime.nvcc import Resources

TARGET = emulated_target()
Run = Callable[..., int]

HALF = CudaAttentionParameters(64, 64, lse=True)
LARGE = CudaAttentionParameters(64, 64, DType.BF16, lse=True, rows=128, stages=3)
EXACT = CudaAttentionParameters(64, 64, DType.F32, lse=True, keys=32)
TF32 = CudaAttentionParameters(64, 64, DType.F32, lse=True, tf32=True)
BOOLEAN = CudaAttentionParameters(32, 32, mask=DType.BOOL, lse=True)
ADDITIVE = CudaAttentionParameters(32, 32, mask=DType.F32, lse=True)
HALF_ADDITIVE = CudaAttentionParameters(32, 32, DType.BF16, mask=DType.BF16, lse=True)
EXACT_ADDITIVE = CudaAttentionParameters(32, 32, DType.F32, mask=DType.F32, lse=True, keys=16)
EXACT_BOOLEAN = CudaAttentionParameters(64, 64, DType.F32, mask=DType.BOOL, lse=True, rows=128, keys=32, stages=3)
TF32_ADDITIVE = CudaAttentionParameters(32, 32, DType.F32, mask=DType.F32, lse=True, tf32=True, rows=128, stages=3)
WIDE_ADDITIVE = CudaAttentionParameters(136, 40, mask=DType.F16, keys=16)
FAR = [
    CudaAttentionParameters(32, 32, lse=True, distances=DType.F32),
    CudaAttentionParameters(32, 32, DType.BF16, mask=DType.BOOL, lse=True, distances=DType.BF16),
    CudaAttentionParameters(32, 32, DType.F32, mask=DType.F32, lse=True, keys=16, distances=DType.F32),
]
CAPPED = CudaAttentionParameters(32, 32, lse=True, rule=SoftCap(2.0))
EXACT_CAPPED = CudaAttentionParameters(32, 32, DType.F32, mask=DType.F32, lse=True, keys=16, rule=SoftCap(2.0))
WIDTHS = [
    CudaAttentionParameters(59, 16, lse=True),
    CudaAttentionParameters(80, 128, DType.BF16, lse=True, rows=128),
    CudaAttentionParameters(128, 72, lse=True, stages=3),
    CudaAttentionParameters(256, 256, lse=True, keys=32),
    CudaAttentionParameters(200, 256, DType.F32, lse=True, keys=16),
    CudaAttentionParameters(25, 40, DType.F32, lse=True, tf32=True),
    CudaAttentionParameters(96, 52, DType.F32, lse=True, tf32=True, keys=32),
    CudaAttentionParameters(256, 256, DType.F32, lse=True, tf32=True, keys=16),
]
KINDS = [HALF, LARGE, EXACT, TF32]
BIASES = [ADDITIVE, HALF_ADDITIVE, EXACT_ADDITIVE, TF32_ADDITIVE, WIDE_ADDITIVE]
ALL = [*KINDS, BOOLEAN, EXACT_BOOLEAN, CAPPED, EXACT_CAPPED, *BIASES, *FAR, *WIDTHS]
DESIGN = [
    masks.Dense(),
    masks.Causal(),
    masks.Strided(),
    masks.Fixed(),
    masks.SlidingWindow(20, 10),
    masks.Dilated(9, 4),
    masks.Longformer(11, 5),
    masks.BigBird(16, 3, 1, 2, 0),
    masks.from_dense(torch.rand(150, 150, generator=torch.Generator().manual_seed(7)) > 0.7),
    masks.per_head([masks.Causal(), masks.Strided(4), ~masks.Dense(), masks.Dense()]),
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """All kernels of this file, side by side."""
    build([render(p.spec) for p in ALL], TARGET, headers=header_folder(TARGET))


def name(p: CudaAttentionParameters) -> str:
    mask = f"-{p.mask.value}" if p.mask else ""
    return f"{'tf32' if p.tf32 else p.dtype.value}-{p.head_dim}-{p.value_dim}-{p.rows}x{p.keys}x{p.stages}{mask}"


def attend(
    run: Run,
    p: CudaAttentionParameters,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: AttentionPlan,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    cores: int = TARGET.cores,
    out: Tensor | None = None,
    chosen: Schedule | None = None,
    distances: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = q.shape
    assert (width, v.shape[3], STORAGE[q.dtype]) == (p.head_dim, p.value_dim, p.dtype)
    chosen = schedule(tiles, p, batch, heads, cores) if chosen is None else chosen
    out = torch.full((batch, heads, rows, v.shape[3]), 7.0, dtype=q.dtype) if out is None else out
    lse = torch.full((batch, rows, heads), math.nan).transpose(1, 2)
    full = None if mask is None else mask.expand(batch, heads, rows, k.shape[2])
    given = (t for t in (full, distances) if t is not None)
    tensors = [q, k, v, *given, torch.from_numpy(chosen.tiles.array.copy()), out]
    sizes = extents(
        batch,
        heads,
        k.shape[1],
        tiles,
        chosen,
        1 / math.sqrt(width) if scale is None else scale,
        cores,
        [t.stride()[:3] for t in (q, k, v, out)],
        None if full is None else full.stride(),
        None if distances is None else Distances(distances.stride(0), k.shape[2] - 1, -1),
        lse.stride(),
    )
    given = [*tensors, lse] if p.lse else tensors
    status = run(p.spec, given, sizes, workspace_bytes=chosen.workspace_bytes)
    assert status == 0
    return out, lse


def scores(
    q: Tensor, k: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float | None, dtype: torch.dtype
) -> Tensor:
    wide = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (1 / math.sqrt(q.shape[3]) if scale is None else scale) * (q.to(dtype) @ wide.mT)
    s = s if bias is None else s + bias.to(dtype)
    return s if allowed is None else s.masked_fill(~allowed, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    s = scores(q, k, allowed, bias, scale, dtype)
    p = torch.softmax(s, -1).masked_fill(torch.isneginf(s).all(-1, keepdim=True), 0.0)
    return p @ v.to(dtype).repeat_interleave(q.shape[1] // v.shape[1], 1), torch.logsumexp(s.double(), -1)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(
    p: CudaAttentionParameters,
    result: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Within twice the error of eager PyTorch in the same dtype (rounded operands for TF32), empty rows exactly."""
    expected, sums = attention(q, k, v, allowed, bias, scale)
    # How much larger scores and their errors are than with the default scale.
    larger = 1.0 if scale is None else max(1.0, abs(scale) * math.sqrt(p.head_dim))
    if p.tf32:
        # Eager rounds operands to 11 bits as well; three roundings of half a unit each.
        limit = larger * 3 * 2.0**-11 / math.sqrt(3)
    else:
        eager = attention(q, k, v, allowed, bias, scale, q.dtype)[0]
        limit = 2 * max(error(eager, expected), {DType.F32: 2e-7}.get(p.dtype, 0.0))
    out, lse = result
    assert error(out, expected) <= limit
    empty = torch.isneginf(sums)
    assert (out[empty] == 0).all()
    if not p.lse:
        return
    assert torch.equal(torch.isneginf(lse), empty)
    assert torch.allclose(lse[~empty].double(), sums[~empty], atol=larger * 2e-3 if p.tf32 else 4e-6, rtol=1e-6)


def operands(
    p: CudaAttentionParameters, batch: int, heads: int, key_heads: int, q_len: int, kv_len: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, heads, q_len, p.head_dim),
        (batch, key_heads, kv_len, p.head_dim),
        (batch, key_heads, kv_len, p.value_dim),
    ]
    q, k, v = (torch.randn(shape, generator=generator).to(p.dtype.torch) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("mask", DESIGN, ids=lambda mask: mask.name[:24])
@pytest.mark.parametrize("p", KINDS, ids=name)
def test_masks_of_the_design(run_cuda: Run, p: CudaAttentionParameters, mask: masks.Mask) -> None:
    q, k, v = operands(p, 1, 4, 2, 150, 150)
    tiles = cached_plan(mask, 150, 150, TARGET)
    result = attend(run_cuda, p, q, k, v, tiles)
    check(p, result, q, k, v, mask.dense(150))
    again = attend(run_cuda, p, q, k, v, tiles)
    assert torch.equal(again[0], result[0])
    assert torch.equal(again[1], result[1])


@pytest.mark.parametrize("p", WIDTHS, ids=name)
def test_head_sizes_and_rectangles(run_cuda: Run, p: CudaAttentionParameters) -> None:
    for q_len, kv_len, mask in ((70, 131, masks.Causal(3) | masks.Strided(7)), (1, 65, masks.Dense())):
        q, k, v = operands(p, 2, 2, 1, q_len, kv_len)
        check(
            p,
            attend(run_cuda, p, q, k, v, cached_plan(mask, q_len, kv_len, TARGET)),
            q,
            k,
            v,
            mask.dense(q_len, kv_len),
        )


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 64), (64, 63), (65, 1), (129, 257)])
@pytest.mark.parametrize("p", [HALF, LARGE, EXACT], ids=name)
def test_lengths(run_cuda: Run, p: CudaAttentionParameters, q_len: int, kv_len: int) -> None:
    q, k, v = operands(p, 1, 2, 1, q_len, kv_len)
    for mask in (masks.Dense(), masks.SlidingWindow(2, 3)):
        tiles = cached_plan(mask, q_len, kv_len, TARGET)
        check(p, attend(run_cuda, p, q, k, v, tiles), q, k, v, mask.dense(q_len, kv_len))


def test_empty_sequences(run_cuda: Run) -> None:
    for q_len, kv_len in ((0, 5), (5, 0), (0, 0)):
        q, k, v = operands(HALF, 2, 2, 1, q_len, kv_len)
        out, lse = attend(run_cuda, HALF, q, k, v, cached_plan(masks.Dense(), q_len, kv_len, TARGET))
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@pytest.mark.parametrize("cores", [1, 4, 200])
def test_cut_tiles_and_few_blocks_give_the_same(run_cuda: Run, cores: int) -> None:
    """Long rows in parts, rows in several phases, and many units through few states, whatever runs side by side."""
    for p, length, mask in ((HALF, 700, masks.Longformer(20, 2)), (EXACT, 300, masks.Strided(16))):
        q, k, v = operands(p, 3, 8, 4, length, length)
        tiles = cached_plan(mask, length, length, TARGET)
        results = [attend(run_cuda, p, q, k, v, tiles, cores=cores) for _ in range(2)]
        check(p, results[0], q, k, v, mask.dense(length))
        assert torch.equal(results[0][0], results[1][0])
    q, k, v = operands(HALF, 1, 2, 1, 1, 1500)
    tiles = cached_plan(masks.Dense(), 1, 1500, TARGET)
    assert schedule(tiles, HALF, 1, 2, 200).tiles.states == 3
    check(HALF, attend(run_cuda, HALF, q, k, v, tiles, cores=cores), q, k, v)


@pytest.mark.parametrize("p", [HALF, EXACT], ids=name)
def test_units_wait_for_the_places_of_earlier_ones(run_cuda: Run, p: CudaAttentionParameters) -> None:
    """Places for the partial results of one unit, which four units need one after the other."""
    q, k, v = operands(p, 2, 2, 1, 70, 700)
    tiles = cached_plan(masks.Dense(), 70, 700, TARGET)
    roomy = schedule(tiles, p, 2, 2, 200)
    assert roomy.tiles.states > 0 and roomy.in_flight == 4
    expected = attend(run_cuda, p, q, k, v, tiles, chosen=roomy, cores=200)
    check(p, expected, q, k, v)
    for cores in (1, 4):
        found = attend(run_cuda, p, q, k, v, tiles, chosen=dataclasses.replace(roomy, in_flight=1), cores=cores)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("p", [HALF, EXACT, TF32], ids=name)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_heads_of_a_packed_projection(run_cuda: Run, p: CudaAttentionParameters, offset: int) -> None:
    """Heads as views of a (B, S, 3HD) tensor at any alignment, and an output inside a larger one."""
    batch, heads, length, width = 2, 3, 70, 64
    generator = torch.Generator().manual_seed(offset)
    packed = torch.randn(batch, length, 3 * heads * width + 2 * offset, generator=generator).to(p.dtype.torch)
    inner = packed[..., offset : packed.shape[2] - offset]
    q, k, v = inner.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
    memory = torch.full((batch, length + 2, heads, width + offset), 5.0, dtype=p.dtype.torch)
    out = memory[:, 1:-1, :, offset:].transpose(1, 2)
    result = attend(run_cuda, p, q, k, v, cached_plan(masks.Causal(), length, length, TARGET), out=out)
    check(p, result, q, k, v, masks.Causal().dense(length))
    memory[:, 1:-1, :, offset:] = 5.0
    assert (memory == 5.0).all()


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
@pytest.mark.parametrize("p", [HALF, EXACT_BOOLEAN, TF32_ADDITIVE], ids=name)
def test_scales(run_cuda: Run, p: CudaAttentionParameters, scale: float) -> None:
    q, k, v = operands(p, 1, 2, 2, 70, 70)
    allowed, given, bias = masks.Causal().dense(70), None, None
    if p.mask:
        allowed = allowed & torch.arange(70).ne(3)
        given = torch.arange(70).ne(3).expand(1, 1, 1, 70)
    if p.mask is DType.F32:
        given = bias = torch.where(torch.arange(70).ne(3), torch.linspace(-1, 1, 70), -math.inf)[None, None, None]
    result = attend(run_cuda, p, q, k, v, cached_plan(masks.Causal(), 70, 70, TARGET), given, scale=scale)
    check(p, result, q, k, v, allowed, bias, scale)


MASK_SHAPES = [(2, 1, 1, 110), (2, 4, 90, 110), (1, 4, 90, 1)]
# Relative errors of results under a bias.
BIASED = {DType.F32: 1e-6, DType.F16: 2e-3, DType.BF16: 8e-3}


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_runtime_masks_compose_with_plans(run_cuda: Run, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    allowed = torch.rand(shape, generator=generator) > 0.6
    allowed[..., : shape[-1] // 3] = False
    noise = torch.randn(shape, generator=generator)
    for pattern in (masks.Dense(), masks.Strided(9)):
        tiles, dense = cached_plan(pattern, 90, 110, TARGET), pattern.dense(90, 110)
        q, k, v = operands(BOOLEAN, 2, 4, 2, 90, 110)
        for p in (BOOLEAN, EXACT_BOOLEAN):
            q, k, v = operands(p, 2, 4, 2, 90, 110)
            for given in (allowed, allowed.expand(2, 4, 90, 110).mT.contiguous().mT):
                check(p, attend(run_cuda, p, q, k, v, tiles, given), q, k, v, dense & allowed)
        for p in BIASES:
            assert p.mask
            q, k, v = operands(p, 2, 4, 2, 90, 110)
            for low in (-math.inf, torch.finfo(p.mask.torch).min):
                bias = torch.where(allowed, noise, low).to(p.mask.torch)
                # Scores beside the lowest bias vanish in its rounding, whoever adds them.
                result = attend(run_cuda, p, q, k, v, tiles, bias)
                expected, sums = attention(q, k, v, dense, bias)
                assert error(result[0], expected) <= (1e-3 if p.tf32 else BIASED[p.dtype])
                if p.lse and not p.tf32:
                    assert torch.allclose(result[1].double(), sums, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("p", FAR, ids=name)
def test_biases_by_distance_meet_masks(run_cuda: Run, p: CudaAttentionParameters) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = operands(p, 2, 4, 2, 90, 110)
    row = torch.randn(4, 199, generator=generator).to(p.distances.torch)
    far = row[:, 109 + torch.arange(90)[:, None] - torch.arange(110)]
    seen = torch.rand(2, 1, 90, 110, generator=generator) > 0.4
    pattern = masks.Strided(9)
    allowed, given, bias = pattern.dense(90, 110), None, far.double()
    if p.mask is DType.BOOL:
        allowed, given = allowed & seen, seen
    elif p.mask is not None:
        given = torch.where(seen, torch.randn(seen.shape, generator=generator), -math.inf)
        bias = bias + given
    out, sums = attend(run_cuda, p, q, k, v, cached_plan(pattern, 90, 110, TARGET), given, distances=row)
    expected, exact_sums = attention(q, k, v, allowed, bias)
    assert error(out, expected) <= BIASED[p.dtype]
    assert torch.allclose(sums.double(), exact_sums, rtol=1e-6, atol=4e-6)


def test_rows_that_see_only_the_lowest_bias_are_uniform(run_cuda: Run) -> None:
    """As in eager PyTorch: the lowest float is a bias, and only -inf excludes."""
    q, k, v = operands(ADDITIVE, 1, 2, 2, 40, 40)
    tiles = cached_plan(masks.Dense(), 40, 40, TARGET)
    bias = torch.zeros(1, 1, 40, 40)
    bias[:, :, 3] = torch.finfo(torch.float32).min
    bias[:, :, 4] = -math.inf
    out, lse = attend(run_cuda, ADDITIVE, q, k, v, tiles, bias)
    assert torch.allclose(out[:, :, 3].float(), v.float().mean(2), atol=1e-3)
    assert (out[:, :, 4] == 0).all()
    assert (lse[:, :, 4] == -math.inf).all()
    padding = torch.full((1, 1, 1, 40), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    q, k, v = operands(HALF_ADDITIVE, 1, 2, 2, 40, 40)
    out, _ = attend(run_cuda, HALF_ADDITIVE, q, k, v, tiles, padding)
    assert torch.allclose(out.float(), v.float().mean(2, keepdim=True).expand_as(out), atol=4e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("given", ["plan", "phases", "rows", "keys", "bias"])
@pytest.mark.parametrize("kind", ["half", "exact"])
def test_poison_reaches_only_rows_that_may_see_it(
    run_cuda: Run, kind: str, given: str, where: str, poison: float
) -> None:
    n = 110
    boolean, additive = (BOOLEAN, ADDITIVE) if kind == "half" else (EXACT_BOOLEAN, EXACT_ADDITIVE)
    pattern = masks.Strided(7).dense(n)
    tiles, mask, p = cached_plan(masks.Dense(), n, n, TARGET), pattern[None, None], boolean
    if given == "plan":
        tiles, mask = cached_plan(masks.Strided(7), n, n, TARGET), torch.ones(1, 1, 1, n, dtype=torch.bool)
    elif given == "phases":
        # Cut into parts, so that partial results are merged.
        pattern = masks.Causal().dense(n)
        tiles, mask = cached_plan(masks.Causal(), n, n, TARGET), torch.ones(1, 1, 1, n, dtype=torch.bool)
    elif given == "keys":
        pattern = torch.arange(n)[None, :].ne(21) & masks.Causal().dense(n)
        tiles, mask = cached_plan(masks.Causal(), n, n, TARGET), torch.arange(n).ne(21)[None, None, None]
    elif given == "bias":
        mask, p = torch.where(mask, 0.0, -math.inf), additive
    # What is computed again must know that a scale is negative.
    scale = -0.2 if given in ("plan", "rows") else 0.2
    q, k, v = operands(p, 1, 2, 2, n, n)
    clean = attend(run_cuda, p, q, k, v, tiles, mask, scale=scale)[0]
    (k if where == "key" else v)[:, :, 21] = poison
    out = attend(run_cuda, p, q, k, v, tiles, mask, scale=scale)[0]
    sees = pattern[:, 21]
    # Rows that do not see the poison are computed again in another order, in fp32 throughout.
    bound = {"rtol": 4e-3, "atol": 1e-3} if kind == "half" else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(out[:, :, ~sees], clean[:, :, ~sees], **bound)
    probabilities = torch.softmax(scores(q, k, pattern, None, scale, torch.float64), -1)
    terms = torch.where(pattern[..., None], probabilities[..., None] * v.double()[:, :, None], 0.0)
    expected = terms.sum(-2)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_poison_in_a_part_of_a_row(run_cuda: Run) -> None:
    """A row that is merged from several parts, one of which must be computed again."""
    q, k, v = operands(HALF, 1, 2, 2, 20, 1200)
    allowed = torch.ones(20, 1200, dtype=torch.bool)
    allowed[::2, 700] = False
    tiles = cached_plan(masks.from_dense(allowed), 20, 1200, TARGET)
    assert schedule(tiles, HALF, 1, 2, 200).tiles.states > 0
    clean, _ = attend(run_cuda, HALF, q, k, v, tiles, cores=200)
    v[:, :, 700] = math.nan
    out, _ = attend(run_cuda, HALF, q, k, v, tiles, cores=200)
    assert torch.allclose(out[:, :, ::2], clean[:, :, ::2], rtol=4e-3, atol=1e-3)
    assert out[:, :, 1::2].isnan().all()


def test_large_scores_do_not_overflow(run_cuda: Run) -> None:
    q, k, v = operands(EXACT, 1, 2, 2, 100, 100)
    q, k = q * 1e3, k * 1e2
    out, _ = attend(run_cuda, EXACT, q, k, v, cached_plan(masks.Causal(), 100, 100, TARGET))
    allowed = masks.Causal().dense(100)
    expected, eager = attention(q, k, v, allowed)[0], attention(q, k, v, allowed, dtype=torch.float32)[0]
    # Scores near 1e6 carry errors near 0.1 whoever computes them, so compare with what eager does.
    assert out.isfinite().all()
    assert error(out, expected) <= 2 * error(eager, expected) + 8e-7


@pytest.mark.parametrize("cores", [1, 200])
def test_large_scores_keep_the_digits_in_which_they_differ(run_cuda: Run, cores: int) -> None:
    """Whole numbers up to about 100, which fp32 holds, in rows whose maximum grows and which are merged from parts."""
    q, k, v = operands(EXACT, 1, 2, 1, 20, 1100)
    q, k = q.mul(20).round(), k.round() * torch.linspace(0.25, 1, 1100).mul(4).round().div(4)[:, None]
    tiles = cached_plan(masks.Dense(), 20, 1100, TARGET)
    assert (schedule(tiles, EXACT, 1, 2, cores).tiles.states > 0) == (cores == 200)
    expected = attention(q, k, v, scale=0.125)[0]
    assert error(attention(q, k, v, scale=0.125, dtype=torch.float32)[0], expected) <= 2.0**-22
    assert error(attend(run_cuda, EXACT, q, k, v, tiles, scale=0.125, cores=cores)[0], expected) <= 2.0**-21


@pytest.mark.parametrize("scale", [0.2, -0.2])
@pytest.mark.parametrize("p", [CAPPED, EXACT_CAPPED], ids=name)
def test_scores_are_softly_capped_before_masks(run_cuda: Run, p: CudaAttentionParameters, scale: float) -> None:
    """Scores up to twice the cap, with rows that poison makes the kernel compute again."""
    q, k, v = operands(p, 1, 4, 2, 150, 150)
    v[:, :, 140] = math.inf
    allowed = masks.Causal().dense(150)
    bias = (
        torch.where(torch.arange(150).ne(7), torch.linspace(-2, 2, 150), -math.inf)[None, None, None]
        if p.mask
        else None
    )
    tiles = cached_plan(masks.Causal(), 150, 150, TARGET)
    out, lse = attend(run_cuda, p, q, k, v, tiles, bias, scale=scale)
    expected, sums = exact(
        q[:, :, :140],
        k[:, :, :140],
        v[:, :, :140],
        allowed[:140, :140],
        None if bias is None else bias[..., :140],
        scale,
        cap=2.0,
    )
    assert error(out[:, :, :140], expected) <= BIASED[p.dtype]
    assert torch.allclose(lse[:, :, :140].double(), sums, rtol=1e-6, atol=4e-6)


# Every dtype, queries in registers and in shared memory, masks by key and by row, both sizes of tiles.
CHECKED = [HALF, LARGE, EXACT, TF32, BOOLEAN, TF32_ADDITIVE, EXACT_BOOLEAN, WIDE_ADDITIVE, WIDTHS[-1]]


@pytest.fixture(scope="module")
def _built_checked() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSER_EMULATOR_CHECKED", "1")
        build([render(p.spec) for p in CHECKED], TARGET, headers=header_folder(TARGET))


@pytest.fixture
def checked(_built_checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's checking mode, for which its kernels are built side by side."""
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")


@pytest.mark.parametrize("p", CHECKED, ids=name)
def test_nothing_races_or_leaves_its_arrays(run_cuda: Run, checked: None, p: CudaAttentionParameters) -> None:
    """The output alone may be written: by blocks that take several tiles, and by parts of rows that are merged."""

    def mask_of(seen: Tensor) -> Tensor | None:
        if p.mask is None:
            return None
        return seen if p.mask is DType.BOOL else torch.where(seen, 0.0, -math.inf).to(p.mask.torch)

    q, k, v = operands(p, 1, 2, 1, 130, 130)
    seen = torch.arange(130).lt(99)[None, None, None] if p.mask else torch.ones(1, 1, 1, 130, dtype=torch.bool)
    tiles = cached_plan(masks.Strided(11), 130, 130, TARGET)
    result = attend(run_cuda, p, q, k, v, tiles, mask_of(seen), cores=1)
    check(p, result, q, k, v, masks.Strided(11).dense(130) & seen)
    # So many multiprocessors that keys are cut into parts; masks by row, one of which is empty.
    q, k, v = operands(p, 1, 2, 1, 5, 700)
    seen = masks.Strided(3).dense(5, 700) if p.mask else torch.ones(5, 700, dtype=torch.bool)
    seen[2] &= p.mask is None
    tiles = cached_plan(masks.Dense(), 5, 700, TARGET)
    cut = schedule(tiles, p, 1, 2, 200).tiles
    assert cut.states > 0 and cut.most_steps > p.stages
    for places, cores in ((2, 200), (1, 1)):
        chosen = dataclasses.replace(schedule(tiles, p, 1, 2, 200), in_flight=places)
        result = attend(run_cuda, p, q, k, v, tiles, mask_of(seen[None, None]), chosen=chosen, cores=cores)
        check(p, result, q, k, v, seen)


@pytest.mark.parametrize("p", [BOOLEAN, EXACT_BOOLEAN], ids=name)
def test_nothing_races_where_rows_are_computed_again(run_cuda: Run, checked: None, p: CudaAttentionParameters) -> None:
    q, k, v = operands(p, 1, 2, 2, 20, 1100)
    allowed = torch.ones(20, 1100, dtype=torch.bool)
    allowed[::2, 700] = False
    tiles = cached_plan(masks.from_dense(allowed), 20, 1100, TARGET)
    assert schedule(tiles, p, 1, 2, 200).tiles.states > 0
    every = torch.ones(1, 1, 1, 1100, dtype=torch.bool)
    v[:, :, 700] = math.nan
    out, _ = attend(run_cuda, p, q, k, v, tiles, every, cores=200)
    v[:, :, 700] = 0.0
    assert error(out[:, :, ::2], attention(q, k, v, allowed)[0][:, :, ::2]) <= 2.0**-11
    assert out[:, :, 1::2].isnan().all()


def test_offsets_beyond_32_bits(run_cuda: Run) -> None:
    """Rows that lie half a gigabyte apart; memory that is never touched costs nothing."""
    row, length = 1 << 28, 10
    try:
        memory = torch.empty(length * row, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not lend out 5 GiB of addresses")
    # Rows of q, k, v and out lie side by side.
    q, k, v, out = memory.as_strided((4, 1, 2, length, 64), (128, 0, 64, row, 1))
    near = operands(HALF, 1, 2, 2, length, length)
    for far, tensor in zip((q, k, v), near, strict=True):
        far.copy_(tensor)
    tiles = cached_plan(masks.Causal(), length, length, TARGET)
    check(HALF, attend(run_cuda, HALF, q, k, v, tiles, out=out), *near, masks.Causal().dense(length))


def test_rows_too_far_apart_are_refused(run_cuda: Run) -> None:
    tiles = cached_plan(masks.Dense(), 3, 3, TARGET)
    chosen = schedule(tiles, HALF, 1, 1, 4)
    strides = [(0, 0, 64)] * 3 + [(0, 0, (1 << 28) + 1)]
    sizes = extents(1, 1, 1, tiles, chosen, 0.125, TARGET.cores, strides)
    nowhere = [torch.empty(3, 64)] * 3 + [torch.from_numpy(chosen.tiles.array.copy())] + [torch.empty(3, 64)] * 2
    assert run_cuda(HALF.spec, nowhere, sizes, workspace_bytes=chosen.workspace_bytes) == 2


def test_sparse_attention_runs_choices_on_the_emulator() -> None:
    """What ``fuser.sparse_attention`` calls for tensors on a GPU, and its choice by predicted cost."""
    q, k, v = operands(HALF, 1, 2, 2, 130, 130)
    out, lse, mask = torch.empty_like(q), torch.empty(1, 2, 130), masks.Longformer(9, 2)
    run_plan(q, k, v, cached_plan(mask, 130, 130, TARGET), None, 0.125, out, lse, TARGET)
    check(HALF, (out, lse), q, k, v, mask.dense(130))


def operators(*made: tuple[Semantics, Sequence[str]]) -> tuple[Operator, ...]:
    return tuple(Operator(f"op{i}", semantics, tuple(read), (f"t{i}",)) for i, (semantics, read) in enumerate(made))


def test_family_matches_attention_and_calls_its_kernel(run_cuda: Run) -> None:
    pattern = masks.Longformer(6, 2)
    ops = operators(
        (QK(), ("q", "k")),
        (Scale(0.125), ("t0",)),
        (PatternMask(True, pattern), ("t1",)),
        (BooleanMask(), ("t2", "mask")),
        (Softmax(masked=True), ("t3",)),
        (PV(), ("t4", "v")),
    )
    half = torch.float16
    values = {name: TensorSpec.contiguous((2, heads, 50, 32), half) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    values["mask"] = TensorSpec((2, 4, 50, 50), torch.bool, (50, 0, 0, 1))
    values |= {
        op.output: TensorSpec.contiguous((2, 4, 50, 32 if isinstance(op.semantics, PV) else 50), half) for op in ops
    }
    made = OperatorGraph(ops, values, ("q", "k", "v", "mask"), ("t5",), {})
    implementation = CudaAttention()
    match = AttentionFamily().match(made.group(ops), TARGET)
    assert match is not None
    found = implementation.space(match, TARGET)
    assert all(isinstance(p, CudaAttentionParameters) and p.mask is DType.BOOL for p in found)
    assert {p.rows for p in found} == {64, 128}
    p = dataclasses.replace(found[0], lse=False)
    call = implementation.call(match, p, TARGET, 1)
    assert implementation.cost(match, p, TARGET).seconds(TARGET) > 0
    assert call.outputs == ("t5",)
    q, k, v = operands(p, 2, 4, 2, 50, 50)
    padding = torch.arange(50).lt(torch.tensor([[44], [50]]))
    tensors = {"q": q, "k": k, "v": v, "mask": padding[:, None, None].expand(2, 4, 50, 50), "t5": torch.zeros_like(q)}
    given = [
        torch.from_numpy(ref.array.copy()) if isinstance(ref, Literal) else tensors[str(ref)] for ref in call.tensors
    ]
    assert run_cuda(call.spec, given, call.extents, workspace_bytes=call.workspace_bytes) == 0
    allowed = (pattern & masks.Causal()).dense(50) & padding[:, None, None]
    expected, _ = attention(q, k, v, allowed, scale=0.125)
    assert error(tensors["t5"], expected) <= 2.0**-11


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_89"])
def test_choices_fit_the_device(arch: str) -> None:
    target = cuda_target(arch)
    for widths in ((32, 32), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256)):
        for dtype in (DType.F16, DType.BF16, DType.F32):
            for mask in (None, DType.BOOL, DType.F32):
                found = choices(*widths, dtype, mask, True, target)
                # The queries of a tile alone fill most of the shared memory of smaller GPUs.
                if arch == "sm_89" and dtype is DType.F32 and widths == (256, 256):
                    assert not found
                    continue
                assert found[0].rows == 64
                assert all(p.shared_bytes <= target.shared_bytes for p in found)


def test_costs_prefer_what_gathers_less() -> None:
    """Many rows with the same keys share them in tall tiles; few tiles must not be made fewer."""
    target = cuda_target("sm_90")
    small, tall = (dataclasses.replace(HALF, rows=rows) for rows in (64, 128))
    seconds = {}
    for batch, length in ((16, 4096), (1, 256)):
        tiles = cached_plan(masks.Dense(), length, length, target)
        for p in (small, tall):
            seconds[batch, p.rows] = attention_cuda.cost(p, tiles, batch, 12, 0, target).seconds(target)
    assert seconds[16, 128] < seconds[16, 64]
    assert seconds[1, 64] <= seconds[1, 128]
    causal = cached_plan(masks.Causal(), 4096, 4096, target)
    half = attention_cuda.cost(small, causal, 16, 12, 0, target).seconds(target)
    assert 0.4 < half / seconds[16, 64] < 0.7


COMPILED = [
    *((arch, p) for arch in ("sm_80", "sm_90a") for p in (0, 1)),
    *(("sm_80", p) for p in (2, 3, 4)),
]
DEFAULTS = [(64, DType.F16, None), (128, DType.BF16, None), (64, DType.F32, None), (64, DType.F16, DType.BOOL)]
DEFAULTS.append((256, DType.F16, None))


@pytest.mark.parametrize(("arch", "index"), COMPILED)
def test_defaults_compile_without_spills(
    compile_cuda: Callable[..., tuple[Resources, ...]], arch: str, index: int
) -> None:
    width, dtype, mask = DEFAULTS[index]
    p = choices(width, width, dtype, mask, False, cuda_target(arch))[0]
    (kernel,) = compile_cuda(p.spec, arch)
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
    # As many blocks as the parameters promise fit the registers of a multiprocessor.
    assert kernel.registers * 32 * (p.rows // 16) * p.blocks <= 65536
