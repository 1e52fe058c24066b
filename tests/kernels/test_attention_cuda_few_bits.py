"""The CUDA kernels of attention with few bits on the emulator against their references: integers and decisions element
by element.

Values are the identity where keys are few, so outputs are weights, and with the log-sum-exp every score can be told.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuser import DEQ, Int8Attention, Sanger, SoftCap, masks
from fuser.attention.launch import NoKernelError, run_plan, target_for
from fuser.attention.reference import chosen_of, reference
from fuser.ir.attention import AttentionSpec
from fuser.ir.masks import Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.ir.target import cuda_target, emulated_target
from fuser.kernels.attention import cached_plan
from fuser.kernels.attention_quantized_cuda import quantized_choices
from fuser.kernels.base import DType
from fuser.runtime.nvcc import Resources

TARGET = emulated_target()
Q_LEN, KV_LEN, WIDTH = 70, 60, 22
SCALE = 0.4
MASKS: list[Mask] = [
    masks.Dense(),
    masks.Causal(),
    masks.Strided(7),
    masks.from_dense(torch.rand(Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(7)) > 0.7),
    masks.per_head([masks.Causal(), masks.Strided(4), ~masks.Dense(), masks.Dense()]),
]
INT8 = [Int8Attention(), Int8Attention(smooth=False)]
PREDICTED = [DEQ(), Sanger(), DEQ(high_bits=None, threshold=0.3)]
HOWS = pytest.mark.parametrize("how", [*INT8, *PREDICTED], ids=lambda how: type(how).__name__)
NEVER = DEQ(threshold=1.0, empty_row="predicted")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def _scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel reads before it has written it is not a number."""
    monkeypatch.setattr(
        "fuser.codegen.launch.scratch", lambda size, device: torch.full((size,), 255, dtype=torch.uint8, device=device)
    )


@functools.cache
def inputs(
    dtype: torch.dtype = torch.float32, width: int = WIDTH, q_len: int = Q_LEN, kv_len: int = KV_LEN, values: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of four heads, which share two of the keys, that have much in common; outliers, zeros and a constant
    row among them."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 4, q_len, width, generator=g), torch.randn(2, 2, kv_len, width, generator=g)
    k += 2 * torch.randn(2, 2, 1, width, generator=g)
    q[0, 0, 3 % q_len], q[1, 2, 4 % q_len], k[0, 0, 9 % kv_len, 3], k[1, 1, 7 % kv_len] = 0.0, 2.0, 40.0, 0.0
    v = torch.randn(2, 2, kv_len, values, generator=g)
    v = v if values else torch.eye(kv_len).expand(2, 2, kv_len, kv_len).contiguous()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    how: ScoreQuantization,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    given: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float = SCALE,
    cores: int = TARGET.cores,
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of the kernel."""
    q, k, v = inputs() if given is None else given
    out, lse = torch.full((*q.shape[:3], v.shape[3]), 7.0, dtype=q.dtype), torch.full(q.shape[:3], 7.0)
    on = dataclasses.replace(TARGET, cores=cores)
    run_plan(q, k, v, cached_plan(mask, q.shape[2], k.shape[2], on), attn_mask, scale, out, lse, on, rule, how)
    return out, lse


def check(
    how: ScoreQuantization,
    mask: Mask,
    attn_mask: Tensor | None = None,
    rule: ScoreRule | None = None,
    given: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: float = SCALE,
    cores: int = TARGET.cores,
) -> None:
    q, k, v = inputs() if given is None else given
    spec = AttentionSpec(mask, rule, how)
    out, lse = run(how, mask, attn_mask, rule, given, scale, cores)
    want, want_lse = reference(q, k, v, spec, attn_mask, scale)
    seen = ~want_lse.isneginf()
    assert torch.equal(seen, ~lse.isneginf()) and not out[~seen].any()
    torch.testing.assert_close(lse[seen], want_lse[seen], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(out, want, rtol=0, atol=ROUNDING[q.dtype] * max(1.0, float(v.abs().max())))
    if q.dtype != torch.float32 or given is not None:
        return
    # What a score must be for its weight, where the weight has digits enough to tell.
    chosen = chosen_of(q, k, spec, attn_mask, scale)
    clear = want > 1e-5
    torch.testing.assert_close((out.log() + lse[..., None])[clear], chosen.scores[clear], rtol=0, atol=3e-5)
    if how.prunes:
        assert chosen.full is not None and torch.equal(out[chosen.full] > 0, want[chosen.full] > 0)
        assert not out[~chosen.full].any()


@HOWS
def test_it_computes_what_the_reference_does(how: ScoreQuantization) -> None:
    for mask in MASKS:
        for dtype in (torch.float32, torch.float16):
            check(how, mask, given=None if dtype == torch.float32 else inputs(dtype))
    check(how, masks.Causal(), given=inputs(torch.bfloat16))


@pytest.mark.parametrize(
    ("how", "dtype", "width", "values"),
    [
        (INT8[0], torch.float16, 59, 24),
        (PREDICTED[1], torch.bfloat16, 72, 7),
        (PREDICTED[0], torch.float16, 200, 136),
        (PREDICTED[1], torch.float32, 136, 36),
        (PREDICTED[2], torch.bfloat16, 59, 24),
        (PREDICTED[2], torch.float16, 136, 136),
    ],
    ids=str,
)
def test_widths_and_lengths(how: ScoreQuantization, dtype: torch.dtype, width: int, values: int) -> None:
    """Rows of codes in registers and in shared memory, in one tile and in several, and few queries."""
    for q_len, kv_len, mask in ((130, 131, masks.Causal(3) | masks.Strided(9)), (1, 65, masks.Dense())):
        check(how, mask, given=inputs(dtype, width, q_len, kv_len, values), scale=1 / math.sqrt(width))


@HOWS
def test_biases_masks_and_rules(how: ScoreQuantization) -> None:
    generator = torch.Generator().manual_seed(2)
    bias = 2 * torch.randn(1, 4, Q_LEN, KV_LEN, generator=generator)
    bias[..., 50:] = -1e4
    bias[:, :, 5:9, 3:] = -math.inf
    bias[:, 1, 11] = -math.inf
    visible = torch.rand(2, 1, 1, KV_LEN, generator=generator) > 0.3
    check(how, MASKS[2], bias.expand(2, -1, -1, -1), SoftCap(8.0))
    check(how, MASKS[0], bias.expand(2, -1, -1, -1))
    check(how, MASKS[1], visible.expand(2, 4, Q_LEN, KV_LEN))
    # A row that has nothing but the lowest number added.
    bias[:, :, 13] = torch.finfo(torch.float32).min
    out, _ = run(how, MASKS[0], bias.expand(2, -1, -1, -1))
    torch.testing.assert_close(out[:, :, 13], torch.full((2, 4, KV_LEN), 1 / KV_LEN))


def test_tf32_is_for_values_alone() -> None:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        for how in (Int8Attention(), Sanger()):
            out, lse = run(how, MASKS[2])
            want, want_lse = reference(*inputs(), AttentionSpec(MASKS[2], None, how), None, SCALE)
            torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=5e-6)
            torch.testing.assert_close(out, want, rtol=2.0**-10, atol=1e-6)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("how", [INT8[1], DEQ(), NEVER, Sanger()], ids=lambda how: type(how).__name__)
def test_scores_have_the_bits_of_the_reference(how: ScoreQuantization) -> None:
    """A row that sees one key, its best, has its score for a log-sum-exp."""
    q, k, _ = inputs()
    generator = torch.Generator().manual_seed(9)
    for added in (None, torch.randn(2, 4, Q_LEN, KV_LEN, generator=generator)):
        key = torch.randint(KV_LEN, (Q_LEN,), generator=generator)
        one = torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)
        one[torch.arange(Q_LEN), key] = True
        mask = masks.from_dense(one)
        scores = chosen_of(q, k, AttentionSpec(mask, None, how), added, SCALE).scores
        _, lse = run(how, mask, added)
        assert torch.equal(lse, scores[..., torch.arange(Q_LEN), key])


@pytest.mark.parametrize(
    "how",
    [
        DEQ(threshold=0.4),
        DEQ.from_config("adamax_s30", calibration="static", thresholds=(0.4, 0.5)),
        DEQ(method="probability_threshold", threshold=0.02, empty_row="dense"),
        DEQ(method="inv_adaptive_maximum_threshold", bits=2),
        DEQ(method="inv_probability_threshold", threshold=0.02, bits=8),
        DEQ(before_softmax=True, threshold=0.7, bits=6, unmasked_maximum=True),
        DEQ(calibration="static", thresholds=(0.4, 0.5)),
        DEQ(calibration="ema", thresholds=(1.5, 2.5), normalize=False),
        Sanger(threshold=0.05, empty_row="zero"),
        Sanger(threshold=0.05, empty_row="dense"),
        Sanger(method="adaptive_maximum_threshold", threshold=0.3),
    ],
    ids=lambda how: how.method + how.calibration,
)
def test_every_rule_of_rows(how: ScoreQuantization) -> None:
    for mask in MASKS[:2]:
        check(how, mask)


@pytest.mark.parametrize(
    "how",
    [
        DEQ.from_config("adamax_nb80"),
        DEQ(granularity="head", threshold=0.3, empty_row="predicted"),
        DEQ(granularity="batch", threshold=0.1, calibration="dynamic", normalize=False),
    ],
    ids=lambda how: how.granularity + how.calibration,
)
def test_rows_that_share_what_decides(how: ScoreQuantization) -> None:
    for mask in (MASKS[0], MASKS[4]):
        check(how, mask)
    check(how, masks.Longformer(9, 2), torch.arange(KV_LEN).lt(50).expand(2, 4, Q_LEN, KV_LEN))
    check(how, masks.Dense(), given=inputs(torch.float16, WIDTH, 5, 1300, KV_LEN), cores=200)
    q, k, v = (t.clone() for t in inputs())
    k[0, 0, 5, 2], q[0, 1, 7, 1] = math.nan, 1e25
    out, _ = run(how, MASKS[1], given=(q, k, v))
    want, _ = reference(q, k, v, AttentionSpec(MASKS[1], None, how), None, SCALE)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6, equal_nan=True)


@HOWS
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales(how: ScoreQuantization, scale: float) -> None:
    check(how, masks.Causal(), scale=scale)


@HOWS
def test_cut_tiles_give_the_same(how: ScoreQuantization) -> None:
    """Keys of a row in several tiles, whose parts a row's limit and its results are merged from."""
    check(how, masks.Dense(), given=inputs(torch.float16, WIDTH, 5, 1300, KV_LEN), cores=200)
    check(how, masks.Longformer(20, 2), given=inputs(torch.float32, WIDTH, 300, 300, KV_LEN), cores=200)


@HOWS
def test_what_is_not_finite_does_what_it_does_in_the_reference(how: ScoreQuantization) -> None:
    """It reaches those rows that may see it; rows without codes are computed as they are given."""
    mask = masks.Strided(7)
    for which in (0, 1, 2):
        for poison in (math.inf, math.nan, -1e25, 1e4):
            given = [t.clone() for t in inputs(values=KV_LEN)]
            given[which][1, 1, 21, 0] = poison
            q, k, v = given
            if poison == 1e4:
                check(how, mask, given=(q, k, v), scale=0.01)
                continue
            out, lse = run(how, mask, given=(q, k, v))
            want, want_lse = reference(q, k, v, AttentionSpec(mask, None, how), None, SCALE)
            assert torch.equal(out.isfinite(), want.isfinite())
            # Values of 1e25 cancel to what is left of their digits.
            near = want.isfinite() & (want.abs() < 1e20)
            torch.testing.assert_close(out[near], want[near], rtol=1e-5, atol=1e-5)
            sound = want_lse.isfinite() & want.isfinite().all(-1)
            torch.testing.assert_close(lse[sound], want_lse[sound], rtol=1e-5, atol=5e-6)


@HOWS
def test_rows_that_see_nothing_are_zero_whatever_there_is(how: ScoreQuantization) -> None:
    q, k, v = (t.clone() for t in inputs())
    want, _ = run(dataclasses.replace(how, **({"smooth": False} if isinstance(how, Int8Attention) else {})), MASKS[0])
    q[:, :, 2] = math.inf
    visible = torch.ones(2, 4, Q_LEN, KV_LEN, dtype=torch.bool)
    visible[:, :, 2] = False
    out, lse = run(how, masks.Dense(), visible, given=(q, k, v))
    assert not out[:, :, 2].any() and lse[:, :, 2].isneginf().all() and out.isfinite().all()
    if how.is_by_row:
        torch.testing.assert_close(out[:, :, 3:], want[:, :, 3:], rtol=0, atol=2e-6)


def test_rows_depend_on_what_they_see_alone() -> None:
    for how in (INT8[1], *PREDICTED):
        q, k, v = (t.clone() for t in inputs())
        want, want_lse = run(how, masks.Causal())
        k[:, :, 50:] *= 50
        v[:, :, 50:] *= 1e5
        out, lse = run(how, masks.Causal(), given=(q, k, v))
        # When rows are rescaled depends on the others of a warp.
        torch.testing.assert_close(out[:, :, :50], want[:, :, :50], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse[:, :, :50], want_lse[:, :, :50], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("how", "dtype"), [(INT8[0], torch.float16), (PREDICTED[1], torch.float32)], ids=str)
def test_nothing_races_or_leaves_its_arrays(
    how: ScoreQuantization, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    seen = torch.arange(700).lt(600).expand(2, 4, 5, 700)
    check(how, masks.Dense(), seen, given=inputs(dtype, 59, 5, 700, 24), cores=200)


def test_who_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.attention.launch.target_of", lambda _: TARGET)
    q, _, v = inputs()
    assert target_for(q, v, None, Sanger()) == TARGET
    with pytest.raises(NoKernelError, match="without the mask"):
        target_for(q, v, torch.zeros(Q_LEN, KV_LEN), DEQ(before_softmax=True, unmasked_maximum=True))


@pytest.mark.parametrize(("arch", "width", "dtype"), [("sm_80", 64, DType.F16), ("sm_90a", 128, DType.BF16)], ids=str)
@pytest.mark.parametrize("how", [INT8[0], PREDICTED[0]], ids=lambda how: type(how).__name__)
def test_defaults_compile_without_spills(
    compile_cuda: Callable[..., tuple[Resources, ...]], how: ScoreQuantization, arch: str, width: int, dtype: DType
) -> None:
    p = quantized_choices(how, width, width, dtype, None, False, cuda_target(arch), None)[0]
    kernels = compile_cuda(p.spec, arch)
    assert len(kernels) == 4
    assert not any(kernel.spill_store_bytes or kernel.spill_load_bytes for kernel in kernels)
    # As many blocks as the parameters promise fit the registers of a multiprocessor.
    assert max(kernel.registers for kernel in kernels) * 32 * (p.rows // 16) * p.blocks <= 65536
